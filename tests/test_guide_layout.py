"The guide 'Add a dataset layout' of CONTRIBUTING, walked with a toy layout in a scratch copy of the source."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
import pytest
from PIL import Image
from ipo_nb.core import project_dir

ROOT = project_dir()
pytestmark = pytest.mark.skipif(not (ROOT/'nbs'/'04_data.ipynb').exists(), reason='not a clone')

READER = """#| export
def _layout_prefix(card, home): # CLASS--ANYTHING.jpg, all in one folder
    found, images = {}, home/card.images
    for f in _files(images): found.setdefault(f.partition('--')[0], []).append(f)
    if not found: raise IpoError(f"{images} should hold images called CLASS--ANYTHING.jpg: name them so.")
    return own_split(found), 'own split'"""

DEMO = """(tmp/'prefixed').mkdir()
for name in ('ant--1', 'ant--2', 'bee--1', 'bee--2'): (tmp/'prefixed'/f'{name}.jpg').touch()
test_eq([n for _, _, n in _layout_prefix(Card(**plain), tmp/'prefixed')[0]['test']], ['ant', 'bee'])
test_fail(lambda: _layout_prefix(Card(**plain), tmp/'bare'), contains='images called CLASS--ANYTHING.jpg')"""

ENTRY = "    prefix=Layout('what stands before -- in the file name', _layout_prefix),\n"

CARD = """---
name: toy
title: Toys
licence: CC0-1.0
citation: none
task: [toys]
layout: prefix
template: a photo of a <CLASS>.
folders: [toys]
images: img
---
Small things.
"""

USE = """
from ipo_nb.data import LAYOUTS, load_dataset
from ipo_nb.download import main
ds = load_dataset('toy', 'data', verbose=False)
print(ds.classes, len(ds.train), len(ds.test), ds.split_source, LAYOUTS['prefix'].drawn)
raise SystemExit(main('check', ['toy', '--data_root', 'data']))
"""


def cell(source): # of a notebook
    return dict(cell_type='code', execution_count=None, id=f'{len(source):08x}', metadata={}, outputs=[],
                source=source.splitlines(True))

def with_toy(path): # steps 1 and 2 of the guide: the reader with its demonstration, and its line in the table
    nb = json.loads(path.read_text(encoding='utf-8'))
    k = next(k for k, c in enumerate(nb['cells']) if 'LAYOUTS = dict(\n' in c['source'])
    table = nb['cells'][k]['source']
    table.insert(table.index('LAYOUTS = dict(\n') + 1, ENTRY)
    nb['cells'][k:k] = [cell(READER), cell(DEMO)]
    path.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')

@pytest.fixture
def scratch(tmp_path):
    "A copy of what the guide touches; the embedded model is linked."
    (tmp_path/'nbs').mkdir()
    shutil.copy(ROOT/'nbs'/'04_data.ipynb', tmp_path/'nbs')
    shutil.copy(ROOT/'settings.ini', tmp_path)
    shutil.copytree(ROOT/'data_cards', tmp_path/'data_cards', ignore=shutil.ignore_patterns('records', 'paper'))
    shutil.copytree(ROOT/'ipo_nb', tmp_path/'ipo_nb', ignore=shutil.ignore_patterns('models', '__pycache__'))
    (tmp_path/'ipo_nb'/'models').symlink_to(ROOT/'ipo_nb'/'models')
    return tmp_path

def runs(folder, *command):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | dict(MPLBACKEND='agg'))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_a_layout_is_a_reader_and_one_line(scratch):
    nb = scratch/'nbs'/'04_data.ipynb'
    with_toy(nb)
    runs(scratch, Path(sys.executable).parent/'nbdev_export', '--path', nb)
    (scratch/'data_cards'/'toy.md').write_text(CARD)
    images = scratch/'data'/'toys'/'img'
    images.mkdir(parents=True)
    for k, c in enumerate(('ant', 'bee')):
        for i in range(4): Image.new('RGB', (4, 4), (i, k, 9)).save(images/f'{c}--{i}.jpg')
    out = runs(scratch, sys.executable, '-c', USE)
    assert out.startswith("['ant', 'bee'] 4 4 own split False\n") and 'toy passes.' in out
    assert '8 of 8: 4 train, 0 val, 4 test' in out
