"Checks of tables that are no documentation: what it refuses, what it claims, and whether the map of the paper is true."
import csv
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
import matplotlib
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from ipo_nb.core import IpoError, project_dir
from ipo_nb.evaluation import make_evaluation
from ipo_nb.evidence.compare import Cell, answers, versus, with_best
from ipo_nb.evidence.records import Shelf, made_up_run, read_records
from ipo_nb.evidence.show import Num, Refused, Table, Writer
from ipo_nb.paper.map import check_paper, load_map, map_page, map_problems, needed, record_facts
from ipo_nb.paper.printed import ELEVEN, FLAWS
from ipo_nb.paper.tables import axis_table, base_to_novel, cost_sheet, tokens_sheet
from ipo_nb.stats import pack_bits

nbs = Path(__file__).resolve().parent.parent/'nbs'
NASTY = 'a $x_1$ photo_of <script> | `$5` “façade” \\frac{1}{2} ~^ 50% & #1 <CLASS>'

def changed(result, changes): # the same result with other parts; what is a dict is mixed in
    return result | {k: result[k] | v if isinstance(v, dict) else v for k, v in changes.items()}

def edit(run, **changes): # the record on disk with other parts
    path = run.path/'result.json'
    path.write_text(json.dumps(changed(json.loads(path.read_text()), changes)))
    return run

def shelf_of(runs): return Shelf(list(runs), [], [])

def lines_of(table, method): return [r for r in table.rows if r['method'].startswith(method)]

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp('records')
    for ds, seed in product(('plates', 'shells'), (1, 2, 3)): made_up_run(home/ds/f'one-{seed}', ds, seed=seed)
    for memory, seed in product((0, 5), (1, 2, 3)):
        made_up_run(home/'plates'/f'memory{memory}-{seed}', 'plates', memory=memory, seed=seed)
    return home

# ---- the map

def page_of_map(): return (nbs/'paper_map.md').read_text(encoding='utf-8')

def test_map_names_what_is_there():
    assert not map_problems(load_map()[0])

def test_map_has_every_table_and_figure():
    said = ' '.join(r['paper'] for r in load_map()[0])
    tables = {int(n) for n in re.findall(r'table (\d+)', said)} | set(range(19, 30))
    assert 'tables 19 to 29' in said and 'figures 2 to 8' in said and 'figure 9' in said
    assert tables == set(range(1, 30))

def test_map_page_is_up_to_date():
    assert page_of_map() == map_page(load_map()[0], record_facts()), 'run: python -m ipo_nb.paper.map'

def test_map_claims_no_record_that_is_not_there():
    records = record_facts()
    lines = page_of_map().split('|---|\n')[1].splitlines()
    for line, row in zip(lines, load_map()[0]):
        assert row['paper'] in line
        if 'embedded record committed' in line: assert needed(row['needs'], records) == ''

@pytest.mark.parametrize('changes, said', [
    (dict(section='Base to novel'), "has no section 'Base to novel'"),
    (dict(notebook='x.ipynb'), 'no notebook'),
    (dict(command='python -m ipo_nb.nothing'), 'no module'),
    (dict(real='ipo_sweep paper_table6 -p dataroot x'), 'dataroot is no parameter'),
    (dict(command='ipo_nothing'), 'ipo_nothing is no command'),
    (dict(), 'table 14 of the paper has no row')])
def test_a_wrong_row_is_found(changes, said):
    sixth = next(r for r in load_map()[0] if r['paper'] == 'table 6')
    assert any(said in problem for problem in map_problems([sixth | changes]))

def test_a_changed_number_of_the_paper(tmp_path):
    check_paper()
    files = load_map()[1]
    for f in files: (tmp_path/f).write_bytes((nbs.parent/'data_cards'/'paper'/f).read_bytes())
    ablations = tmp_path/'ablations.csv'
    ablations.write_text(ablations.read_text().replace('74.29', '74.28', 1))
    with pytest.raises(IpoError, match='ablations.csv of the paper.s figures has been changed'):
        check_paper(tmp_path, files)

# ---- what is refused

def test_reads_no_model():
    code = "import sys, ipo_nb.paper.tables; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=nbs.parent)
    assert done.stdout.strip() == 'False', done.stderr

@pytest.mark.parametrize('text', ['{', '[]', 'null', '{"methods": []}', '{"format": 7}'])
def test_damaged_record(tmp_path, text):
    run = made_up_run(tmp_path/'d'/'run')
    (run.path/'result.json').write_text(text)
    with pytest.raises(IpoError) as e: read_records(tmp_path)
    assert '\n' not in str(e.value)

def test_record_of_another_version(tmp_path):
    edit(made_up_run(tmp_path/'d'/'run'), format=0)
    with pytest.raises(IpoError, match='has format 0'): read_records(tmp_path)

def test_unfinished_run_is_named(tmp_path):
    made_up_run(tmp_path/'d'/'whole')
    run = made_up_run(tmp_path/'d'/'begun', seed=2)
    (run.path/'result.json').unlink()
    shelf = read_records(tmp_path)
    assert len(shelf.runs) == 1 and any('d/begun is unfinished' in n for n in shelf.notes)

def ipo_seeds(runs): return lines_of(base_to_novel(shelf_of(runs)), 'IPO')[0]['seeds']

def test_two_runs_claim_one_cell(home, tmp_path):
    runs = read_records(home).runs
    same = next(r for r in runs if r.path.name == 'one-1' and r.result['dataset'] == 'plates')
    assert ipo_seeds(runs) == ipo_seeds([*runs, same]) == 3 # the same answers twice count once
    other = made_up_run(tmp_path/'plates'/'again', 'plates', skill=.5, seed=1)
    with pytest.raises(IpoError, match='two records claim ipo on plates with seed 1'):
        base_to_novel(shelf_of([*runs, other]))

@pytest.mark.parametrize('what, changes', [
    ('split', dict(data=dict(split_sha='3'*64))), ('few-shot images', dict(data=dict(few_shot_sha='3'*64)))])
def test_other_data_is_not_mixed(home, tmp_path, what, changes):
    edit(made_up_run(tmp_path/'plates'/'x', 'plates', seed=1, memory=20), **changes)
    runs, others = read_records(home).runs, read_records(tmp_path).runs
    with pytest.raises(IpoError, match=f'differ in the {what} of'): base_to_novel(shelf_of([*runs, *others]))

def made_by(folder, seed, manifest): # a run with a manifest of its own
    run = made_up_run(folder/'d'/f'{seed}', 'd', seed=seed)
    (run.path/'manifest.json').write_text(json.dumps(manifest))

@pytest.mark.parametrize('what, part, key', [
    ('weights of CLIP', 'clip', 'weights_sha256'),
    ('generator of the embedded world', 'data', 'generator'),
    ('version of ipo_nb', 'versions', 'ipo_nb')])
def test_other_code_is_not_mixed(tmp_path, what, part, key):
    for seed, value in ((1, 'a'), (2, 'b')): made_by(tmp_path, seed, {part: {key: value}})
    shelf = read_records(tmp_path)
    with pytest.raises(IpoError, match=f'differ in the {what}'): base_to_novel(shelf)
    assert base_to_novel(shelf, mix=True).rows

@pytest.fixture(scope='module')
def tempered(home, tmp_path_factory): # records at three temperatures, and the folder of two of them
    folder = tmp_path_factory.mktemp('tempered')
    for seed in (1, 2, 3): made_up_run(folder/'plates'/f'warm-{seed}', 'plates', seed=seed, temperature=.5)
    for ds in ('plates', 'shells'): made_up_run(folder/ds/f'hot-{ds}', ds, seed=1, temperature=1.5)
    return read_records([home, folder]), folder

def test_settings_that_are_equally_broad_are_refused(tempered):
    for ds in ('plates', 'shells'): made_up_run(tempered[1]/ds/f'cold-{ds}', ds, seed=1, temperature=.1)
    with pytest.raises(IpoError, match='temperature 1.5 or 0.1|temperature 0.1 or 1.5'):
        base_to_novel(shelf_of(read_records([tempered[1]]).runs))

def test_settings_are_chosen_and_never_averaged(tempered):
    shelf, _ = tempered
    def seeds(temperature):
        table = base_to_novel(shelf, where=dict(temperature=temperature))
        return [(r['dataset'], r['seeds']) for r in lines_of(table, 'IPO')]
    assert any('left out (temperature' in n for n in base_to_novel(shelf).notes)
    assert ('plates', 3) in seeds(.5) and ('shells', 1) in seeds(1.5)
    mixed = [r['method'] for r in lines_of(base_to_novel(shelf, mix=True), 'IPO') if r['dataset'] == 'plates']
    assert len(mixed) == 3 and sum('temperature' in m for m in mixed) == 2 # one more for each other temperature

# ---- what is claimed

def with_seed(answer, seed): return answer | dict(settings=answer['settings'] | dict(seed=seed))

def thrice(answer): return Cell(tuple(with_seed(answer, seed) for seed in (1, 2, 3)))

def test_seeds_are_not_images(home):
    runs = read_records(home).runs
    run = next(r for r in runs if r.path.name.startswith('one') and r.result['dataset'] == 'plates')
    found = {a['method']: a for a in answers(run)}
    ipo, random = found['ipo'], found['random']
    for half in ('base', 'novel', 'h'):
        assert versus(thrice(ipo), thrice(random), half) == versus(Cell((ipo,)), Cell((random,)), half)
    assert thrice(ipo).nums()['h'].sd is None # three times the same is no spread

def cell(bits, dataset='d', seed=1):
    evaluation = make_evaluation('m', '<CLASS>', bits, bits).to_dict()
    return Cell((dict(dataset=dataset, method='m', settings=dict(seed=seed), evaluation=evaluation),))

def best(**bits): # names of the bold ones
    cells = {name: cell(found) for name, found in bits.items()}
    return [name for name, n in with_best(cells).items() if n['h'].best]

def test_bold_needs_a_test_against_everything():
    rng = np.random.RandomState(0)
    a = rng.rand(300) < .7
    b = a.copy()
    b[:4] = ~b[:4]
    c = rng.rand(300) < .3
    assert best(a=a, c=c) == ['a']
    assert best(a=a, b=b, c=c) == [] # b is as good
    assert best(a=a) == []

def test_average_counts_each_dataset_once():
    small, large = np.arange(10) < 9, np.arange(1000) < 300
    both = Cell(cell(small, 'small').answers + cell(large, 'large').answers).nums()
    assert both['base'].mean == pytest.approx(60.) and both['base'].low < 60 < both['base'].high

def test_missing_seed_is_named(home):
    runs = [r for r in read_records(home).runs if r.path.name != 'one-2' or r.result['dataset'] != 'shells']
    assert any(n.startswith('Seed 2 missing: shells, IPO') for n in base_to_novel(shelf_of(runs)).notes)

def shown_tables(nb): # what the code cells of a notebook show as Markdown
    for c in nb.cells:
        for o in c.get('outputs', ()):
            if 'text/markdown' in o.get('data', {}): yield o.data['text/markdown']

def test_saved_page_is_what_the_records_say(tmp_path):
    "The outputs in the repository, against those of this code on the committed records."
    page = project_dir()/'nbs'/'tables_and_figures.ipynb'
    saved, again = nbformat.read(page, 4), nbformat.read(page, 4)
    parameters = next(c for c in again.cells if 'parameters' in c.metadata.get('tags', []))
    parameters.source += f"\nout = {str(tmp_path)!r}"
    NotebookClient(again, resources=dict(metadata=dict(path=str(page.parent)))).execute()
    tables = list(shown_tables(saved))
    assert len(tables) > 25 and tables == list(shown_tables(again))

def test_a_refused_table_stops_no_other(tmp_path):
    grid = product((.1, 1.5), (1, 2))
    runs = [made_up_run(tmp_path/'d'/f'{t}-{s}', 'd', temperature=t, seed=s) for t, s in grid]
    put = Writer(tmp_path/'out')
    shown = put(base_to_novel, shelf_of(runs))
    assert isinstance(shown, Refused) and 'two grids of one size' in shown._repr_markdown_()
    assert len(put.refused) == 1
    assert put(base_to_novel, shelf_of(runs[:2])).rows
    assert [p.name for p in (tmp_path/'out'/'tables').glob('*.csv')] == ['base_to_novel_1shot.csv']

def test_of_equal_grids_the_usual_one_is_taken(tmp_path):
    "The sweeps of tables 4, 6 and 15 write into one folder."
    grid = product((('none', 20), ('a', 20), ('b', 20), ('a', 0)), (1, 2))
    runs = [made_up_run(tmp_path/'d'/f'{c}-{m}-{s}', 'd', captioner=c, memory=m, seed=s) for (c, m), s in grid]
    table = base_to_novel(shelf_of(runs))
    assert 'captioner a' in table.title and any('6 runs' in n or '4 runs' in n for n in table.notes)
    free = axis_table(runs, ('captioner',), 'x', 'x', where=dict(captioner='a')) # an axis is free
    assert [r['captioner'] for r in free.rows] == ['a', 'b', 'none']

def answer(seed, bits):
    evaluation = dict(base_correct=pack_bits(bits), novel_correct=pack_bits(bits))
    return dict(dataset='d', settings=dict(seed=seed), evaluation=evaluation)

def cell_of_seeds(rows): return Cell(tuple(answer(seed, bits) for seed, bits in enumerate(rows)))

def test_one_lucky_seed_is_not_beyond_chance():
    x = np.zeros((3, 200), bool)
    y = x.copy()
    y[0, :50] = True
    assert versus(cell_of_seeds(y), cell_of_seeds(x)) > .3
    assert versus(cell_of_seeds(y[:1]), cell_of_seeds(x[:1])) < 1e-6
    assert versus(cell_of_seeds(y[[0, 0, 0]]), cell_of_seeds(x)) < 1e-6

# ---- beside the paper

ELEVEN_RUNS = dict(shots=1, clip='ViT-B-16/openai', llm='openai:gpt-3.5-turbo', steps=100)
PAPER = 'paper: base / novel / H'

def other(run, dataset=None, **changes): # a run with other parts
    named = dict(dataset=dataset) if dataset else {}
    return replace(run, result=changed(run.result, changes) | named)

@pytest.fixture(scope='module')
def real(tmp_path_factory):
    run = made_up_run(tmp_path_factory.mktemp('real')/'d'/'run', 'd', **ELEVEN_RUNS)
    published = other(run, data=dict(split_source='published'))
    grid = product(ELEVEN, (1, 20))
    return [other(published, ds, settings=dict(dataset=ds, memory=memory)) for ds, memory in grid]

def test_paper_beside_its_own_conditions(real):
    by = {(r['dataset'], r['method']): r for r in base_to_novel(shelf_of(real)).rows}
    average = by['average of 11', 'IPO']
    assert by['dtd', 'IPO'][PAPER].startswith('5') and average[PAPER] == '71.8 / 77.0 / 74.3'
    assert by['dtd', 'random control'][PAPER] == ''
    assert average['gap of H'] == pytest.approx(average['H'].mean - 74.29, abs=.01)

def test_paper_beside_one_setting_varied(real):
    table = axis_table(real, ('memory',), 'x', 'x', paper=('15', str))
    by = {(r['dataset'], r['memory']): r for r in table.rows}
    assert by['average of 11', '1'][PAPER] == '70.2 / 75.4 / 72.7' and by['dtd', '1'][PAPER] == ''

def test_paper_is_not_beside_other_conditions(real, home):
    ten = [r for r in real if r.result['dataset'] != 'dtd']
    few = axis_table(ten, ('memory',), 'x', 'x', paper=('15', str))
    assert 'gap of H' not in few.columns # ten datasets are not its eleven
    assert 'gap of H' not in base_to_novel(read_records(home)).columns
    own = [other(r, data=dict(split_source='subset')) for r in real]
    assert 'gap of H' not in base_to_novel(shelf_of(own)).columns

def test_flaws_of_the_paper_are_footnotes(home):
    assert any('do not reproduce' in n for n in FLAWS['8'])
    assert set(FLAWS['6']) <= set(base_to_novel(read_records(home)).notes)

def coop(dataset, clip, weights, evaluation): # an invented record of CoOp
    vector = dict(removed=None, words=[], base=1., novel=1., h=1.)
    return dict(dataset=dataset, method='coop', title='CoOp', kind='gradient', data={}, cost={}, seconds=0,
                settings=dict(clip=clip, shots=1, seed=1), folder=f'{dataset}/coop', tokens=[vector],
                manifest=dict(clip=dict(weights_sha256=weights)), evaluation=evaluation)

def test_peers_with_another_clip_stay_out(home):
    runs = read_records(home).runs
    evaluation = runs[0].result['methods'][0]
    both = Shelf(runs, [coop('plates', 'none', 'a', evaluation), coop('eurosat', 'other', 'b', evaluation)], [])
    table = base_to_novel(both)
    assert {r['dataset'] for r in tokens_sheet(both, 1).rows} == {'plates'} and lines_of(table, 'CoOp')
    assert 'eurosat' not in {r['dataset'] for r in table.rows + cost_sheet(both).rows}
    only = base_to_novel(both, where=dict(dataset='plates'))
    assert len(only.rows) == sum(r['dataset'] == 'plates' for r in table.rows)

# ---- files

def test_latex_of_awkward_text():
    rows = [dict(prompt=NASTY, H=Num(1., .5, 0., 2., True), p=.0123, none=None)]
    text = Table('t', NASTY, rows, notes=(NASTY,)).latex()
    row = next(line for line in text.splitlines() if line.endswith(r'\\') and '0.012' in line)
    assert len(re.findall(r'(?<!\\)&', row)) == 3 and not re.search(r'(?<!\\)[%#]', text)
    bare = re.sub(r'\\[{}$]', '', text)
    assert bare.count('{') == bare.count('}') and bare.count('$') % 2 == 0
    assert r'\toprule' in text and r'\textbf{1.0} $\pm$ 0.5 [0.0, 2.0]' in text

def test_csv_has_one_number_a_column(home):
    first = next(csv.DictReader(io.StringIO(base_to_novel(read_records(home)).csv())))
    assert float(first['H_low']) < float(first['H']) < float(first['H_high'])
    assert first['H_best'] in ('True', 'False')

def test_every_row_has_control_and_template(home):
    table = axis_table(read_records(home).runs, ('memory',), 'x', 'x')
    assert [r['memory'] for r in table.rows] == ['0', '5', '20'] # shells has one value and is left out
    for name in ('random control', 'hand-written template'):
        assert all(isinstance(r[f'H of {name}'], Num) for r in table.rows)
    assert any('shells' in n for n in table.notes)

def test_searches_under_other_names_are_rows(tmp_path): # 'accuracy' without descriptions is the peer 'opro' elsewhere
    for f, seed in product(('both', 'accuracy'), (1, 2)):
        made_up_run(tmp_path/'d'/f'{f}{seed}', 'd', feedback=f, captioner='none', seed=seed)
    table = axis_table(read_records(tmp_path).runs, ('feedback',), 'x', 'x')
    assert [r['feedback'] for r in table.rows] == ['accuracy', 'both']
    assert all(r['H of random control'] for r in table.rows)

# ---- the notebook

def notebook(): return json.loads((nbs/'tables_and_figures.ipynb').read_text(encoding='utf-8'))['cells']

def code_cells(): return [c for c in notebook() if c['cell_type'] == 'code']

def has_parameters(cell): return 'parameters' in cell['metadata'].get('tags', [])

def test_notebook_keeps_its_parameters_tag():
    tagged = [''.join(c['source']) for c in notebook() if has_parameters(c)]
    assert len(tagged) == 1 and all(p in tagged[0] for p in ('records', 'out', 'where', 'mix'))

MANY = dict(shots=16, captioner='none')
FEW = dict(shots=2, captioner='none')
VARIANTS = [dict(memory=0), dict(captioner='none'), MANY, MANY | dict(step_images=4), dict(max_words=4),
            dict(described=4), dict(candidates=2, steps=25), FEW, FEW | dict(holdout=True)]

def made_up_sweeps(folder): # a run of every variant, and two of the usual settings
    for i, changes in enumerate([dict(seed=1), dict(seed=2), *VARIANTS]):
        made_up_run(folder/'plates'/f'{i}', 'plates', **dict(captioner='clip', seed=1) | changes)

WRITTEN = {'base_to_novel_1shot', 'history_length', 'transfer', 'shifts', 'holdout', 'words_plates', 'predict_16shot'}
DRAWN = {'figure_9.pdf', 'figure_9.png', 'predict_1shot.pdf', 'cost_plates.png', 'trajectory_plates.pdf'}

def test_notebook_on_made_up_records(tmp_path, monkeypatch):
    matplotlib.use('agg')
    made_up_sweeps(tmp_path)
    monkeypatch.setattr('builtins.print', lambda *a, **k: None)
    names, out = {}, tmp_path/'out'
    for c in code_cells():
        exec(compile(''.join(c['source']), 'tables_and_figures', 'exec'), names)
        if has_parameters(c): names |= dict(records=str(tmp_path), out=str(out), where={}, mix=False)
    files = {p.stem: p.read_text() for p in out.rglob('*.tex')}
    empty = {name for name, text in files.items() if 'no records yet' in text}
    assert WRITTEN <= set(files) and empty == {'tokens_1shot', 'tokens_16shot', 'segmentation'}
    assert DRAWN <= {p.name for p in (out/'figures').iterdir()}
