"""Each notebook runs from top to bottom, and the notebooks keep what papermill and nbdev need."""
import json
import os
import subprocess
import sys
from pathlib import Path
import pytest
import readme

nbs = Path(__file__).resolve().parent.parent/'nbs'
notebooks = sorted(p for p in nbs.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
master = 'run_dataset.ipynb' # test_study runs it

def cells(path): return json.loads(path.read_text(encoding='utf-8'))['cells']

@pytest.mark.parametrize('path', [p for p in notebooks if p.name != master], ids=lambda p: p.stem)
def test_runs(path):
    nbdev_test = Path(sys.executable).parent/'nbdev_test'
    command = [nbdev_test, '--path', path, '--n_workers', '0']
    done = subprocess.run(command, capture_output=True, text=True, cwd=nbs, env=os.environ | dict(MPLBACKEND='agg'))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

@pytest.mark.parametrize('name, parameter', [(master, 'dataset'), ('benchmark_features.ipynb', 'n_images')])
def test_keeps_its_parameters_tag(name, parameter):
    tagged = [c for c in cells(nbs/name) if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1 and parameter in ''.join(tagged[0]['source'])

@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
def test_cell_ids_are_unique(path):
    ids = [c['id'] for c in cells(path)]
    assert len(set(ids)) == len(ids)

def test_readme_is_the_index_notebook():
    assert (nbs.parent/'README.md').read_text(encoding='utf-8') == readme.render(), 'run: python tests/readme.py'
