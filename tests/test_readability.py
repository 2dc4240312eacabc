"""The numbers that the notebook on readability keeps, measured again on a small part."""
import json
import re
from pathlib import Path
import numpy as np
import pytest
from ipo_nb import core, llm, readability

notebook = Path(__file__).resolve().parent.parent/'nbs'/'08b_readability.ipynb'

@pytest.fixture(scope='module')
def cells(): return json.loads(notebook.read_text(encoding='utf-8'))['cells']

def source(cell): return ''.join(cell['source'])

def printed(cell):
    "What a cell has printed, as it is kept in the notebook."
    return ''.join(''.join(out.get('text', ())) for out in cell['outputs'])

def texts_of_the_plan(cells):
    "The held-out texts and their scattered words, by the notebook's own cells."
    known = vars(core) | {name: getattr(core, name) for name in core.__all__}
    for cell in cells:
        code = source(cell)
        helps = re.search(r'^(import csv|WORD = |def shuffles|def rows|def family)', code, flags=re.M)
        if cell['cell_type'] == 'code' and helps: exec(code, known)
    return known['confirm'], known['scattered']

def area(good, bad): return np.mean([(g > b) + (g == b)/2 for g in good for b in bad])

def test_each_measuring_cell_is_slow_and_keeps_what_it_printed(cells):
    slow = [c for c in cells if source(c).startswith('#| slow\n')]
    assert len(slow) == 7
    assert all(c['outputs'] for c in slow if 'print(' in source(c))

def test_a_part_of_the_held_out_half_is_measured_again(cells):
    if llm.smollm2_gguf() is None: pytest.skip('the embedded model is not installed')
    kept, = [printed(c) for c in cells if source(c).startswith('#| slow\nsome = confirm')]
    first, second = kept.strip().splitlines()
    confirm, scattered = texts_of_the_plan(cells)
    some = confirm[:8]
    measure = readability.Fluency()
    scores, apart = measure(some), measure([scattered(text) for text in some])
    assert scores == pytest.approx([float(x) for x in second.split()], abs=.02)
    assert area(scores, apart) == pytest.approx(float(first.split()[-1]), abs=.02)
