"Do the paper's figures add up? Its known flaws are still there, and nothing else is off."
from pathlib import Path
import numpy as np
import pytest
from setuptools import find_packages
from ipo_nb.paper.printed import paper_file, paper_rows
from ipo_nb.stats import harmonic_mean

HALVES = 'base', 'novel'

def number(row): return row | {k: float(row[k]) for k in (*HALVES, 'h')}

def halves(row): return [row[k] for k in HALVES]

def floats(name): return [number(r) for r in paper_file(name)]

def off(rows, least): # whose H is not that of their base and novel accuracy
    return [r for r in rows if abs(r['h'] - harmonic_mean(r['base'], r['novel'])) > least]

def rows_of(shots, method): # rows of the eleven datasets, and the printed average
    rows = [r for r in floats('base_to_novel') if int(r['shots']) == shots and r['method'] == method]
    sets = [r for r in rows if r['dataset'] != 'average']
    assert len(sets) == 11
    return sets, [r for r in rows if r['dataset'] == 'average']

def means(shots, method): # base and novel: mean of the rows, and the printed average
    sets, printed = rows_of(shots, method)
    found = np.mean([halves(r) for r in sets], axis=0).round(2)
    return found.tolist(), halves(printed[0]) if printed else None

def printed_h(shots, method): return [r['h'] for r in paper_rows('average', shots) if r['method'] == method]

@pytest.mark.parametrize('method', ['CLIP', 'CoOp', 'CoCoOp', 'MaPLe', 'PromptSRC', 'CoPrompt', 'IPO'])
def test_rows_of_table_6_give_its_averages(method):
    found, printed = means(1, method)
    assert found == pytest.approx(printed, abs=.0101)
    assert printed_h(1, method) == pytest.approx([harmonic_mean(*printed)], abs=.0101)

@pytest.mark.parametrize('method', ['CoOp', 'CoCoOp', 'MaPLe', 'PromptSRC'])
def test_rows_of_table_8_give_its_averages_but_for_ipo(method):
    found, printed = means(16, method)
    assert found == pytest.approx(printed, abs=.0101)

def test_known_flaws_are_still_there():
    assert means(16, 'IPO') == ([83.24, 78.47], [79.92, 80.51])
    assert means(0, 'CLIP, a photo of a <CLASS>.')[0] == [68.27, 73.99]
    table_6 = off(floats('base_to_novel'), .0201)
    assert [(r['table'], r['dataset'], r['method']) for r in table_6] == [('6', 'oxford_pets', 'IPO')]
    ablations = off(floats('ablations'), .0151)
    assert [(r['table'], r['value']) for r in ablations] == [('2b', 'BLIP-2'), ('14', '16'), ('14', '4'), ('14', '64')]

def test_cross_dataset_average_of_ipo_alone_counts_the_source():
    for r in paper_file('cross_dataset'):
        xs = [float(v) for k, v in r.items() if k not in ('method', 'average_printed')]
        counted = xs if r['method'] == 'IPO' else xs[1:]
        assert np.mean(counted) == pytest.approx(float(r['average_printed']), abs=.0101)

@pytest.mark.parametrize('name', ['prompts', 'prompt_scores'])
def test_every_prompt_has_one_placeholder(name):
    assert all(r['prompt'].count('<CLASS>') == 1 for r in paper_file(name))

def test_the_wheel_takes_the_figures_and_the_peers_along():
    root = Path(__file__).parent.parent
    text = (root/'setup.py').read_text()
    assert "'paper/*'" in text and "wings" in text
    assert {'ipo_nb.peers', 'ipo_nb.paper', 'ipo_nb.evidence'} <= set(find_packages(root, include=['ipo_nb.*']))
