"Checks of tables that are no documentation: what it refuses, what it claims, and whether the map of the paper is true."
import csv, io, json, re, subprocess, sys
from dataclasses import replace
from itertools import product
from pathlib import Path
import numpy as np
import pytest
from ipo_nb.core import IpoError, project_dir
from ipo_nb.evaluation import make_evaluation
from ipo_nb.stats import *
from ipo_nb.evidence.compare import *
from ipo_nb.evidence.records import *
from ipo_nb.evidence.show import *
from ipo_nb.paper.map import *
from ipo_nb.paper.printed import *
from ipo_nb.paper.tables import *

nbs = Path(__file__).resolve().parent.parent/'nbs'
NASTY = 'a $x_1$ photo_of <script> | `$5` “façade” \\frac{1}{2} ~^ 50% & #1 <CLASS>'

def edit(run, **changes): # a copy of the record on disk with other parts
    path = run.path/'result.json'; r = json.loads(path.read_text())
    for k, v in changes.items(): r[k] = r[k] | v if isinstance(v, dict) else v
    path.write_text(json.dumps(r)); return run

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp('records')
    for ds, seed in product(('plates', 'shells'), (1, 2, 3)): made_up_run(home/ds/f'one-{seed}', ds, seed=seed)
    for memory, seed in product((0, 5), (1, 2, 3)): made_up_run(home/'plates'/f'memory{memory}-{seed}', 'plates', memory=memory, seed=seed)
    return home

# ---- the map

def test_map_names_what_is_there():
    rows, _ = load_map(); problems = map_problems(rows)
    scripts = (nbs.parent/'settings.ini').read_text()
    if not (nbs/'sweeps').exists(): problems = [p for p in problems if 'ipo_sweep is no command' not in p] # until the sweeps are merged
    if 'ipo_certify=' not in scripts: problems = [p for p in problems if 'ipo_certify is no command' not in p]
    assert not problems

def test_map_has_every_table_and_figure():
    said = ' '.join(r['paper'] for r in load_map()[0])
    tables = {int(n) for n in re.findall(r'table (\d+)', said)} | set(range(19, 30)); assert 'tables 19 to 29' in said and 'figures 2 to 8' in said and 'figure 9' in said
    assert tables == set(range(1, 30))

def test_map_page_is_up_to_date():
    assert (nbs/'paper_map.md').read_text(encoding='utf-8') == map_page(load_map()[0], record_facts()), 'run: python -m ipo_nb.paper.map'

def test_map_claims_no_record_that_is_not_there():
    records = record_facts()
    for line, row in zip((nbs/'paper_map.md').read_text(encoding='utf-8').split('|---|\n')[1].splitlines(), load_map()[0]):
        assert row['paper'] in line
        if 'embedded record committed' in line: assert needed(row['needs'], records) == ''

def test_a_wrong_row_is_found():
    rows, _ = load_map(); sixth = next(r for r in rows if r['paper'] == 'table 6')
    assert any("has no section 'Base to novel'" in p for p in map_problems([sixth | dict(section='Base to novel')]))
    assert any('no notebook' in p for p in map_problems([sixth | dict(notebook='x.ipynb')]))
    assert any('no module' in p for p in map_problems([sixth | dict(command='python -m ipo_nb.nothing')]))
    assert any('dataroot is no parameter' in p for p in map_problems([sixth | dict(real='ipo_sweep paper_table6 -p dataroot x')]))
    assert 'table 14 of the paper has no row' in map_problems([sixth])
    assert any('ipo_nothing is no command' in p for p in map_problems([sixth | dict(command='ipo_nothing')]))

def test_a_changed_number_of_the_paper(tmp_path):
    check_paper(); files = load_map()[1]
    for f in files: (tmp_path/f).write_bytes((nbs.parent/'data_cards'/'paper'/f).read_bytes())
    text = (tmp_path/'ablations.csv').read_text(); (tmp_path/'ablations.csv').write_text(text.replace('74.29', '74.28', 1))
    with pytest.raises(IpoError, match='ablations.csv of the paper.s figures has been changed'): check_paper(tmp_path, files)

# ---- what is refused

def test_reads_no_model():
    done = subprocess.run([sys.executable, '-c', "import sys, ipo_nb.paper.tables; print('torch' in sys.modules)"], capture_output=True, text=True, cwd=nbs.parent)
    assert done.stdout.strip() == 'False', done.stderr

@pytest.mark.parametrize('text', ['{', '[]', 'null', '{"methods": []}', '{"format": 7}'])
def test_damaged_record(tmp_path, text):
    run = made_up_run(tmp_path/'d'/'run'); (run.path/'result.json').write_text(text)
    with pytest.raises(IpoError) as e: read_records(tmp_path)
    assert '\n' not in str(e.value)

def test_record_of_another_version(tmp_path):
    edit(made_up_run(tmp_path/'d'/'run'), format=0)
    with pytest.raises(IpoError, match='has format 0'): read_records(tmp_path)

def test_unfinished_run_is_named(tmp_path):
    made_up_run(tmp_path/'d'/'whole'); run = made_up_run(tmp_path/'d'/'begun', seed=2); (run.path/'result.json').unlink()
    shelf = read_records(tmp_path); assert len(shelf.runs) == 1 and any('d/begun is unfinished' in n for n in shelf.notes)

def test_two_runs_claim_one_cell(home, tmp_path):
    runs = read_records(home).runs; same = next(r for r in runs if r.path.name == 'one-1' and r.result['dataset'] == 'plates')
    n = lambda rs: next(r['seeds'] for r in base_to_novel(Shelf(rs, [], [])).rows if r['method'] == 'IPO')
    assert n(runs) == n([*runs, same]) == 3 # the same answers twice count once
    other = made_up_run(tmp_path/'plates'/'again', 'plates', skill=.5, seed=1)
    with pytest.raises(IpoError, match='two records claim ipo on plates with seed 1'): base_to_novel(Shelf([*runs, other], [], []))

@pytest.mark.parametrize('what, changes', [('split', dict(data=dict(split_sha='3'*64))), ('few-shot images', dict(data=dict(few_shot_sha='3'*64)))])
def test_other_data_is_not_mixed(home, tmp_path, what, changes):
    runs = read_records(home).runs
    a = edit(made_up_run(tmp_path/'plates'/'x', 'plates', seed=1, memory=20), **changes)
    other = read_records(tmp_path).runs
    with pytest.raises(IpoError, match=f'differ in the {what} of'): base_to_novel(Shelf([*runs, *other], [], []))

@pytest.mark.parametrize('what, manifest', [('weights of CLIP', dict(clip=dict(weights_sha256='W'))), ('generator of the embedded world', dict(data=dict(generator='W'))), ('version of ipo_nb', dict(versions=dict(ipo_nb='W')))])
def test_other_code_is_not_mixed(tmp_path, what, manifest):
    def run(seed, value):
        r = made_up_run(tmp_path/'d'/f'{what}-{seed}', 'd', seed=seed)
        (r.path/'manifest.json').write_text(json.dumps(manifest).replace('W', value))
    run(1, 'a'); run(2, 'b'); shelf = read_records(tmp_path)
    with pytest.raises(IpoError, match=f'differ in the {what}'): base_to_novel(shelf)
    assert base_to_novel(shelf, mix=True).rows

def test_settings_are_chosen_and_never_averaged(home, tmp_path):
    for seed in (1, 2, 3): made_up_run(tmp_path/'plates'/f'warm-{seed}', 'plates', seed=seed, temperature=.5)
    for ds in ('plates', 'shells'): made_up_run(tmp_path/ds/f'hot-{ds}', ds, seed=1, temperature=1.5)
    shelf = read_records([home, tmp_path])
    for ds in ('plates', 'shells'): made_up_run(tmp_path/ds/f'cold-{ds}', ds, seed=1, temperature=.1)
    others = Shelf([r for r in read_records([tmp_path]).runs], [], [])
    with pytest.raises(IpoError, match='temperature 1.5 or 0.1|temperature 0.1 or 1.5'): base_to_novel(others)
    assert any('left out (temperature' in n for n in base_to_novel(shelf).notes)
    seeds = lambda s: [(r['dataset'], r['seeds']) for r in s.rows if r['method'].startswith('IPO')]
    assert ('plates', 3) in seeds(base_to_novel(shelf, where=dict(temperature=.5))) and ('shells', 1) in seeds(base_to_novel(shelf, where=dict(temperature=1.5)))
    mixed = [r['method'] for r in base_to_novel(shelf, mix=True).rows if r['dataset'] == 'plates' and r['method'].startswith('IPO')]
    assert len(mixed) == 3 and sum('temperature' in m for m in mixed) == 2 # one more for each other temperature

# ---- what is claimed

def test_seeds_are_not_images(home):
    runs = [r for r in read_records(home).runs if r.path.name.startswith('one') and r.result['dataset'] == 'plates']
    one = {a['method']: a for a in answers(runs[0])}
    thrice = {m: Cell(tuple(a | dict(settings=a['settings'] | dict(seed=s)) for s in (1, 2, 3))) for m, a in one.items()}
    for half in ('base', 'novel', 'h'): assert versus(thrice['ipo'], thrice['random'], half) == versus(Cell((one['ipo'],)), Cell((one['random'],)), half)
    assert thrice['ipo'].nums()['h'].sd is None # three times the same is no spread

def cell(bits, dataset='d', seed=1): return Cell((dict(dataset=dataset, method='m', settings=dict(seed=seed), evaluation=make_evaluation('m', '<CLASS>', bits, bits).to_dict()),))

def test_bold_needs_a_test_against_everything():
    rng = np.random.RandomState(0); a = rng.rand(300) < .7; b = a.copy(); b[:4] = ~b[:4]; c = rng.rand(300) < .3
    best = lambda cells: [k for k, n in with_best(cells).items() if n['h'].best]
    assert best(dict(a=cell(a), c=cell(c))) == ['a']
    assert best(dict(a=cell(a), b=cell(b), c=cell(c))) == [] # b is as good
    assert best(dict(a=cell(a))) == []

def test_average_counts_each_dataset_once():
    small, large = np.arange(10) < 9, np.arange(1000) < 300
    both = Cell(cell(small, 'small').answers + cell(large, 'large').answers).nums()
    assert both['base'].mean == pytest.approx(60.) and both['base'].low < 60 < both['base'].high

def test_missing_seed_is_named(home):
    s = base_to_novel(Shelf([r for r in read_records(home).runs if r.path.name != 'one-2' or r.result['dataset'] != 'shells'], [], []))
    assert any(n.startswith('Seed 2 missing: shells, IPO') for n in s.notes)

def test_saved_page_is_what_the_records_say(tmp_path):
    "The outputs in the repository, against those of this code on the committed records."
    import nbformat; from nbclient import NotebookClient
    saved = nbformat.read(project_dir()/'nbs'/'tables_and_figures.ipynb', 4); again = nbformat.from_dict(json.loads(json.dumps(saved)))
    next(c for c in again.cells if 'parameters' in c.metadata.get('tags', [])).source += f"\nout = {str(tmp_path)!r}"
    NotebookClient(again, resources=dict(metadata=dict(path=str(project_dir()/'nbs')))).execute()
    tables = lambda nb: [o.data['text/markdown'] for c in nb.cells if c.cell_type == 'code' for o in c.outputs if 'text/markdown' in o.get('data', {})]
    assert len(tables(saved)) > 25 and tables(saved) == tables(again)

def test_a_refused_table_stops_no_other(tmp_path):
    runs = [made_up_run(tmp_path/'d'/f'{t}-{s}', 'd', temperature=t, seed=s) for t in (.1, 1.5) for s in (1, 2)]
    put = Writer(tmp_path/'out'); shown = put(base_to_novel, Shelf(runs, [], []))
    assert isinstance(shown, Refused) and 'two grids of one size' in shown._repr_markdown_() and len(put.refused) == 1
    assert put(base_to_novel, Shelf(runs[:2], [], [])).rows and [p.name for p in (tmp_path/'out'/'tables').glob('*.csv')] == ['base_to_novel_1shot.csv']

def test_of_equal_grids_the_usual_one_is_taken(tmp_path):
    "The sweeps of tables 4, 6 and 15 write into one folder."
    runs = [made_up_run(tmp_path/'d'/f'{c}-{m}-{s}', 'd', captioner=c, memory=m, seed=s) for c, m in (('none', 20), ('a', 20), ('b', 20), ('a', 0)) for s in (1, 2)]
    s = base_to_novel(Shelf(runs, [], [])); assert 'captioner a' in s.title and any('6 runs' in n or '4 runs' in n for n in s.notes)
    t = axis_table(runs, ('captioner',), 'x', 'x', where=dict(captioner='a')); assert [r['captioner'] for r in t.rows] == ['a', 'b', 'none'] # an axis is free

def test_one_lucky_seed_is_not_beyond_chance(tmp_path):
    x = np.zeros((3, 200), bool); y = x.copy(); y[0, :50] = True
    at = lambda rows: Cell(tuple(dict(dataset='d', settings=dict(seed=i), evaluation=dict(base_correct=pack_bits(b), novel_correct=pack_bits(b))) for i, b in enumerate(rows)))
    assert versus(at(y), at(x)) > .3 and versus(at(y[:1]), at(x[:1])) < 1e-6 and versus(at(y[[0, 0, 0]]), at(x)) < 1e-6

ELEVEN_RUNS = dict(shots=1, clip='ViT-B-16/openai', llm='openai:gpt-3.5-turbo', steps=100)

@pytest.fixture(scope='module')
def real(tmp_path_factory):
    run = made_up_run(tmp_path_factory.mktemp('real')/'d'/'run', 'd', **ELEVEN_RUNS); r = run.result
    def one(ds, memory): return replace(run, result=r | dict(dataset=ds, settings=r['settings'] | dict(dataset=ds, memory=memory), data=r['data'] | dict(split_source='published')))
    return [one(ds, memory) for ds, memory in product(ELEVEN, (1, 20))]

def test_paper_beside_its_own_conditions(real):
    s = base_to_novel(Shelf(real, [], [])); by = {(r['dataset'], r['method']): r for r in s.rows}
    assert by['dtd', 'IPO']['paper: base / novel / H'].startswith('5') and by['average of 11', 'IPO']['paper: base / novel / H'] == '71.8 / 77.0 / 74.3'
    assert by['dtd', 'random control']['paper: base / novel / H'] == ''
    assert by['average of 11', 'IPO']['gap of H'] == pytest.approx(by['average of 11', 'IPO']['H'].mean - 74.29, abs=.01)
    t = axis_table(real, ('memory',), 'x', 'x', paper=('15', str)); by = {(r['dataset'], r['memory']): r for r in t.rows}
    assert by['average of 11', '1']['paper: base / novel / H'] == '70.2 / 75.4 / 72.7' and by['dtd', '1']['paper: base / novel / H'] == ''

def test_paper_is_not_beside_other_conditions(real, home):
    few = axis_table([r for r in real if r.result['dataset'] != 'dtd'], ('memory',), 'x', 'x', paper=('15', str))
    assert 'gap of H' not in few.columns # ten datasets are not its eleven
    assert 'gap of H' not in base_to_novel(read_records(home)).columns
    own = [replace(r, result=r.result | dict(data=r.result['data'] | dict(split_source='subset'))) for r in real]
    assert 'gap of H' not in base_to_novel(Shelf(own, [], [])).columns

def test_flaws_of_the_paper_are_footnotes(home):
    assert any('do not reproduce' in n for n in FLAWS['8']) and set(FLAWS['6']) <= set(base_to_novel(read_records(home)).notes)

def test_peers_with_another_clip_stay_out(home):
    shelf = read_records(home); m = shelf.runs[0].result['methods'][0]
    def peer(ds, clip, sha): return dict(dataset=ds, method='coop', title='CoOp', kind='gradient', settings=dict(clip=clip, shots=1, seed=1), data={}, cost={}, seconds=0, folder=f'{ds}/coop', manifest=dict(clip=dict(weights_sha256=sha)),
        evaluation=m, tokens=[dict(removed=None, words=[], base=1., novel=1., h=1.)])
    both = Shelf(shelf.runs, [peer('plates', 'none', 'a'), peer('eurosat', 'other', 'b')], [])
    assert {r['dataset'] for r in tokens_sheet(both, 1).rows} == {'plates'} and 'CoOp' in {r['method'] for r in base_to_novel(both).rows}
    assert 'eurosat' not in {r['dataset'] for r in base_to_novel(both).rows + cost_sheet(both).rows}
    assert len(base_to_novel(both, where=dict(dataset='plates')).rows) == len([r for r in base_to_novel(both).rows if r['dataset'] == 'plates'])

# ---- files

def test_latex_of_awkward_text():
    s = Table('t', NASTY, [dict(prompt=NASTY, H=Num(1., .5, 0., 2., True), p=.0123, none=None)], notes=(NASTY,)); text = s.latex()
    row = next(l for l in text.splitlines() if l.endswith(r'\\') and '0.012' in l)
    assert len(re.findall(r'(?<!\\)&', row)) == 3 and not re.search(r'(?<!\\)[%#]', text)
    bare = re.sub(r'\\[{}$]', '', text); assert bare.count('{') == bare.count('}') and bare.count('$') % 2 == 0
    assert r'\toprule' in text and r'\textbf{1.0} $\pm$ 0.5 [0.0, 2.0]' in text

def test_csv_has_one_number_a_column(home):
    rows = list(csv.DictReader(io.StringIO(base_to_novel(read_records(home)).csv())))
    assert float(rows[0]['H_low']) < float(rows[0]['H']) < float(rows[0]['H_high']) and rows[0]['H_best'] in ('True', 'False')

def test_every_row_has_control_and_template(home):
    t = axis_table(read_records(home).runs, ('memory',), 'x', 'x')
    assert [r['memory'] for r in t.rows] == ['0', '5', '20'] # shells has one value and is left out
    assert all(isinstance(r['H of random control'], Num) and isinstance(r['H of plain template'], Num) for r in t.rows) and any('shells' in n for n in t.notes)

def test_searches_under_other_names_are_rows(tmp_path): # 'accuracy' without descriptions is the peer 'opro' elsewhere
    for f, seed in product(('both', 'accuracy'), (1, 2)): made_up_run(tmp_path/'d'/f'{f}{seed}', 'd', feedback=f, captioner='none', seed=seed)
    t = axis_table(read_records(tmp_path).runs, ('feedback',), 'x', 'x')
    assert [r['feedback'] for r in t.rows] == ['accuracy', 'both'] and all(r['H of random control'] for r in t.rows)

# ---- the notebook

def notebook(): return json.loads((nbs/'tables_and_figures.ipynb').read_text(encoding='utf-8'))['cells']

def test_notebook_keeps_its_parameters_tag():
    tagged = [c for c in notebook() if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1 and all(p in ''.join(tagged[0]['source']) for p in ('records', 'out', 'where', 'mix'))

def test_notebook_on_made_up_records(tmp_path, monkeypatch):
    import matplotlib; matplotlib.use('agg')
    variants = [dict(), dict(memory=0), dict(captioner='none'), dict(shots=16, captioner='none'), dict(shots=16, captioner='none', step_images=4), dict(max_words=4), dict(candidates=2, steps=25), dict(shots=2, captioner='none'), dict(shots=2, captioner='none', holdout=True)]
    for i, (v, seed) in enumerate((v, s) for v in variants for s in ((1, 2) if not v else (1,))): made_up_run(tmp_path/'plates'/f'{i}', 'plates', **dict(captioner='clip') | v, seed=seed)
    names = {}; monkeypatch.setattr('builtins.print', lambda *a, **k: None)
    for c in notebook():
        if c['cell_type'] != 'code': continue
        exec(compile(''.join(c['source']), 'tables_and_figures', 'exec'), names)
        if 'parameters' in c['metadata'].get('tags', []): names |= dict(records=str(tmp_path), out=str(tmp_path/'out'), where={}, mix=False)
    files = {p.stem for p in (tmp_path/'out').rglob('*.tex')} ; figures = {p.name for p in (tmp_path/'out'/'figures').iterdir()}
    empty = {p.stem for p in (tmp_path/'out').rglob('*.tex') if 'no records yet' in p.read_text()}
    assert {'base_to_novel_1shot', 'history_length', 'transfer', 'shifts', 'holdout', 'words_plates', 'predict_16shot'} <= files and empty == {'tokens_1shot', 'tokens_16shot', 'segmentation'}
    assert {'figure_9.pdf', 'figure_9.png', 'predict_1shot.pdf', 'cost_plates.png', 'trajectory_plates.pdf'} <= figures
