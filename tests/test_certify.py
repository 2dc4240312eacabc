"The certificate: verdicts under the paper's conditions, silence elsewhere, and the committed record."
import csv
import io
import json
from dataclasses import replace
import pytest
from fastcore.script import anno_parser
import ipo_nb.paper.certify as C
from ipo_nb.core import IpoError, cards_dir, project_dir
from ipo_nb.evaluation import Half
from ipo_nb.paper.certify import (
    KINDS,
    Claim,
    certified_datasets,
    certify,
    checks,
    claims,
    explain,
    gaps,
    judge,
    load_certificate,
    made_up,
    main,
    make_certificate,
    mended,
    stand_in,
    unmet,
    verdict,
)
from ipo_nb.paper.printed import paper_file
from ipo_nb.peers.base import tiny_clip

@pytest.fixture(scope='module')
def clip(): return replace(tiny_clip(), spec='ViT-B-16/openai') # the paper's name, and weights that are not read

def as_printed(name, off={}): # predictions that hit every printed number (the first of two), `off` points away
    out = {}
    for c in claims(name):
        more = off.get(c.prompt, 0)
        out.setdefault(c.prompt, (c.numbers['base'] + more, c.numbers['novel'] + more))
    return made_up(out)

def fixed(monkeypatch, clip, names, predict): # `certify` with datasets under the paper's conditions and no images
    sets = {n: stand_in(n) for n in names}
    halves = {}
    for _, base, novel in sets.values(): halves |= {tuple(base.names): base, tuple(novel.names): novel}
    monkeypatch.setattr(C, 'load_clip', lambda *a: clip)
    monkeypatch.setattr(C, '_here', lambda name, root: name in sets)
    monkeypatch.setattr(C, 'load_dataset', lambda name, *a, **kw: sets[name][0])
    monkeypatch.setattr(C, 'make_half', lambda clip, names, items, **kw: halves[tuple(names)])
    evaluate = C.evaluate
    monkeypatch.setattr(C, 'evaluate', lambda *a, **kw: evaluate(*a, predict=predict))
    monkeypatch.setattr(C, 'describe', lambda ds: dict(dataset=ds.name, note=ds.note))

def asked(*argv): # what a command line asks of `main`
    found = vars(anno_parser(main.__wrapped__, 'ipo_certify').parse_args([str(a) for a in argv]))
    return {k: v for k, v in found.items() if k not in ('pdb', 'xtra')}

def all_claims(): return sum((claims(d) for d in certified_datasets()), [])

def judged(clip, name, predict): # the verdicts on a stand-in, by what is claimed
    out = judge(clip, *stand_in(name), predict)
    return {r['what']: r for r in out['rows']}

def one_shot(name): return next(c.prompt for c in claims(name) if c.what == 'IPO, 1 shot')

def committed(): return cards_dir()/'records'/'certificate'

# ---- what is printed

def test_every_printed_prompt_is_a_claim():
    "Nothing of the three files is lost but the rows that are no single prompt."
    all_ = all_claims()
    prompts = {(c.dataset, c.prompt) for c in all_}
    for r in paper_file('prompt_scores') + paper_file('prompts'): assert (r['dataset'], r['prompt']) in prompts, r
    for r in paper_file('base_to_novel'):
        if r['dataset'] == 'average' or r['method'].partition(',')[0] not in ('CLIP', 'IPO'): continue
        numbers = {k: float(r[k]) for k in ('base', 'novel', 'h')}
        assert any((c.dataset, c.numbers) == (r['dataset'], numbers) for c in all_), r
    assert len({(c.dataset, c.prompt, *c.numbers.values()) for c in all_}) == len(all_)
    assert {c.what for c in all_} == set(KINDS)

def test_prompt_and_numbers_are_joined_by_shots():
    found = {c.what: c for c in claims('eurosat')}
    one, many = found['IPO, 1 shot'], found['IPO, 16 shots']
    assert one.prompt.startswith('Analyze the') and one.numbers == dict(base=64.97, novel=82.13, h=72.54)
    assert many.prompt.startswith('Construct a') and many.numbers['base'] == 94.25

def test_what_the_paper_says_twice_is_noted():
    one, many = [c for c in claims('sun397') if c.what.startswith('IPO')]
    assert any('table 8 prints 81.25' in n for n in one.notes) and any('table 6 prints 72.25' in n for n in many.notes)
    assert 'which is 96.17' in str([c.notes for c in claims('oxford_pets')])
    assert str([c.notes for c in all_claims()]).count('the printed H is not') == 1

def test_a_changed_number_is_refused(monkeypatch):
    first, *rows = paper_file('prompt_scores')
    changed = (first | dict(base='53.71'), *rows)
    monkeypatch.setattr(C, 'paper_file', lambda name: changed if name == 'prompt_scores' else paper_file(name))
    with pytest.raises(IpoError, match='git checkout data_cards/paper/prompt_scores.csv') as e: claims('dtd')
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('text, read', [
    ('a <CLASS>..', 'a <CLASS>.'), ('TLet it <CLASS>', 'Let it <CLASS>'), (' a   <CLASS>\n.', 'a <CLASS> .')])
def test_mended(text, read): assert mended(text) == read

@pytest.mark.parametrize('text', ['A photo of <CLASS>.', 'HD photo of <CLASS>', '<CLASS>.', 'wait ... a <CLASS>'])
def test_nothing_to_mend(text): assert mended(text) == text

# ---- verdicts

@pytest.mark.parametrize('ours, said', [
    (50.3, 'within 0.3'), (50.304, 'within 0.3'), (50.306, 'outside: base'),
    (49.7, 'within 0.3'), (49.69, 'outside: base'), (0., 'outside: base')])
def test_the_border(ours, said):
    assert verdict(gaps(dict(base=50., novel=60.), dict(base=ours, novel=60., h=0.))) == said

@pytest.mark.parametrize('name', ['dtd', 'eurosat', 'food101'])
def test_all_stand_under_the_conditions(clip, name):
    "On the real halves and test sizes, predictions that hit each printed number, as near as a count of images can."
    out = judge(clip, *stand_in(name), as_printed(name))
    twice = {c.prompt for c in claims(name) if 'same prompt' in str(c.notes)}
    assert out['unmet'] == []
    for r in out['rows']:
        if r['prompt'] in twice: continue
        assert r['verdict'] == 'within 0.3' and r['why'] == [], r
        assert max(map(abs, r['gap'].values())) <= .12, r

def test_of_two_numbers_for_one_prompt_one_falls(clip):
    rows = judged(clip, 'sun397', as_printed('sun397'))
    one, many = rows['IPO, 1 shot'], rows['IPO, 16 shots']
    assert one['verdict'] == 'within 0.3' and many['verdict'] == 'outside: base, novel, H'
    assert any('72.25' in w for w in many['why'])

def test_a_miss_beside_a_default_prompt_that_stands(clip):
    rows = judged(clip, 'ucf101', as_printed('ucf101', {one_shot('ucf101'): 3.}))
    one = rows['IPO, 1 shot']
    assert rows['default prompt']['verdict'] == 'within 0.3' and one['verdict'] == 'outside: base, novel, H'
    assert one['gap']['base'] == pytest.approx(3, abs=.05) and 'wording or number' in one['why'][-1]

def test_a_miss_beside_a_default_prompt_that_stands_alone(clip):
    "The hand-written template is missed, too, and the default prompt is enough of an anchor."
    claimed = next(c for c in claims('ucf101') if c.what == 'default prompt')
    rows = judged(clip, 'ucf101', made_up({claimed.prompt: (claimed.numbers['base'], claimed.numbers['novel'])}))
    assert rows['hand-written template']['verdict'].startswith('outside')
    assert 'the default prompt or the hand-written template stands' in rows['IPO, 1 shot']['why'][-1]

def test_a_miss_where_nothing_stands_names_suspects(clip):
    for r in judge(clip, *stand_in('ucf101'), made_up({}))['rows']:
        assert r['verdict'].startswith('outside')
        assert r['why'][-1] == 'not as in the paper: precision and transform'

def test_the_mended_reading_explains(clip):
    c = next(c for c in claims('stanford_cars') if c.what == 'IPO, 16 shots')
    as_meant = made_up({mended(c.prompt): (c.numbers['base'], c.numbers['novel'])})
    row = judged(clip, 'stanford_cars', as_meant)['IPO, 16 shots']
    assert row['prompt'] == c.prompt and row['verdict'].startswith('outside')
    assert any(w.endswith('it is within 0.3') for w in row['why'])

def test_no_difference_known():
    line = Claim('dtd', '6', 'IPO, 1 shot', 'a <CLASS>.', dict(base=50.))
    assert explain(line, dict(base=1.), {}, (), []) == ['no difference to the conditions of the paper is known']

# ---- conditions

OTHER_FILE = 'split_zhou_DescribableTextures.json sha256:' + '0'*64

@pytest.mark.parametrize('change, said', [
    (dict(split_source='subset'), 'subset of the published split'), (dict(split_source='own split'), 'divided here'),
    (dict(split_source='file'), 'of your own'), (dict(split_file=OTHER_FILE), "not CoOp's published one")])
def test_each_condition_of_the_split_silences(clip, change, said):
    ds, base, novel = stand_in('dtd')
    for k, v in change.items(): setattr(ds, k, v)
    out = judge(clip, ds, base, novel, as_printed('dtd'))
    assert len(out['unmet']) == 1 and said in out['unmet'][0]
    assert {r['verdict'] for r in out['rows']} == {'no claim'}
    assert all(r['gap'] is None and r['why'] == [] and r['ours'] for r in out['rows'])

@pytest.mark.parametrize('spec', ['mini', 'ViT-B-32/openai', 'ViT-B-16/laion2b_s34b_b88k',
                                  'local-dir:ViT-B-16/openai', 'hf-hub:someone/ViT-B-16'])
def test_another_model_silences(clip, spec):
    out = judge(replace(clip, spec=spec), *stand_in('dtd'), as_printed('dtd'))
    assert {r['verdict'] for r in out['rows']} == {'no claim'}

def test_fewer_images_and_fewer_classes_silence():
    ds, base, novel = stand_in('dtd')
    less = Half(base.names, base.feats[:-1], base.labels[:-1])
    fewer = Half(base.names[1:], base.feats, base.labels)
    said = "1,691 test images are looked at, and the paper's test set has 1,692"
    assert unmet('ViT-B-16/openai', ds, less, novel) == [said]
    assert 'compared' in unmet('ViT-B-16/openai', ds, fewer, novel)[0]

def test_precision_and_transform_are_no_conditions(clip):
    def differing(model): return {c['what'] for c in checks(model, *stand_in('dtd')) if not c['same']}
    assert unmet(clip.spec, *stand_in('dtd')) == [] and differing(clip) == {'precision', 'transform'}
    assert differing(replace(clip, precision='fp16')) == {'transform'}

def test_a_prompt_that_does_not_fit_is_told_and_the_rest_is_scored(clip):
    ds, base, novel = stand_in('fgvc_aircraft')
    long = Half([n + ' with a very long name'*9 for n in base.names], base.feats, base.labels)
    rows = judge(clip, ds, long, novel, made_up({}))['rows']
    gone = [r for r in rows if r['verdict'] == 'not scored']
    assert gone and len(gone) < len(rows)
    for r in gone: assert 'is too long' in r['why'][0] and r['ours'] is None and r['gap'] is None

# ---- the whole

def by_dataset(dtd, eurosat): # predictions of two datasets; a half of EuroSAT has five classes
    return lambda clip, prompts, names, feats: (eurosat if len(names) == 5 else dtd)(clip, prompts, names, feats)

def test_whole_certificate_under_the_conditions(monkeypatch, clip, tmp_path, capsys):
    predict = by_dataset(as_printed('dtd'), as_printed('eurosat', {one_shot('eurosat'): -5.}))
    fixed(monkeypatch, clip, ('dtd', 'eurosat'), predict)
    out = tmp_path/'out'
    assert main(**asked('--data_root', tmp_path, '--out', out)) == 0
    page = capsys.readouterr().out
    assert 'measured under the paper' in page and 'No claim' not in page and '## eurosat' in page
    assert 'oxford&#95;pets: not here' not in page and 'oxford_pets: not here; `ipo_data get oxford_pets' in page
    cert = load_certificate(out)
    of_eurosat = {r['verdict'] for r in cert.rows if r['dataset'] == 'eurosat'}
    assert of_eurosat == {'within 0.3', 'outside: base, novel, H'}
    total = cert.summary().rows[-1]
    count = sum(len(r['printed']) for r in cert.rows if r['dataset'] in ('dtd', 'eurosat'))
    assert total['printed for'] == 'all' and total['within 0.3'] + total['outside'] == count
    assert total['no claim'] == 0 and total['not measured'] == total['numbers'] - count
    assert f"Of {count} printed numbers" in cert.headline() and f"{total['outside']} do not" in cert.headline()
    assert str(tmp_path) not in ''.join(p.read_text() for p in out.iterdir())

def test_the_same_bytes_twice(monkeypatch, clip, tmp_path):
    fixed(monkeypatch, clip, ('dtd',), as_printed('dtd'))
    for d in 'ab': certify(tmp_path, datasets=['dtd']).write(tmp_path/d)
    for p in (tmp_path/'a').iterdir(): assert p.read_bytes() == (tmp_path/'b'/p.name).read_bytes()

def test_flat_lines_can_be_read_back(clip):
    cert = make_certificate(clip, [judge(clip, *stand_in('dtd'), as_printed('dtd')), C._absent('imagenet')])
    rows = list(csv.DictReader(io.StringIO(cert.flat().csv())))
    assert len(rows) == len(claims('dtd')) + len(claims('imagenet'))
    assert rows[-1]['verdict'] == 'not here' and rows[-1]['base_ours'] == ''
    for r in rows[:9]: assert abs(float(r['base_ours']) - float(r['base_printed']) - float(r['base_gap'])) < .0101

def test_views_are_escaped(clip):
    part = judge(clip, *stand_in('dtd'), as_printed('dtd'))
    part['unmet'], part['rows'][0]['why'] = ['<script>alert(1)</script>'], ['<img src=x>|']
    cert = make_certificate(clip, [part, C._absent('eurosat', 'not usable', '<b>bad</b>')])
    for text in (cert.markdown(), cert._repr_html_()):
        for tag in ('<script>', '<img', '<b>bad', '<CLASS>'): assert tag not in text

# ---- mistakes

@pytest.mark.parametrize('argv, said', [
    (['--dataset', 'dtb'], "did you mean 'dtd'"), (['--dataset', 'mini_textures'], 'prints no prompt'),
    (['--clip', 'ViT-B-16/openia'], "did you mean 'openai'"), (['--clip', 'local-dir:nowhere'], 'does not exist'),
    ([], 'holds none of imagenet'), (['--dataset', 'dtd'], 'ipo_data get dtd'),
    (['--out', '{here}/file'], 'cannot be made a folder')])
def test_mistakes_end_in_one_sentence(argv, said, tmp_path, capsys):
    (tmp_path/'file').write_text('x')
    assert main(**asked('--data_root', tmp_path, *(a.format(here=tmp_path) for a in argv))) == 1
    err = capsys.readouterr().err
    assert said in err and err.startswith('ipo_certify: ') and err.count('\n') == 1

def test_the_command_line():
    usual = dict(clip='ViT-B-16/openai', dataset=None, out=None, split='auto', device='auto', precision='auto')
    assert asked('--data_root', 'x') == asked('--data-root', 'x') == dict(data_root='x') | usual
    assert asked('--data_root=x', *'--dataset a b --dataset c'.split())['dataset'] == ['a', 'b', 'c']

@pytest.mark.parametrize('argv, said', [
    ([], 'required: --data_root/--data-root'), (['--data_root', 'x', '--split', 'mine'], "invalid choice: 'mine'"),
    (['--data_root', 'x', '--what'], 'unrecognized arguments: --what'),
    (['--data_root', 'x', '--dataset'], 'at least one')])
def test_a_line_that_is_not_understood(argv, said, capsys):
    with pytest.raises(SystemExit) as e: asked(*argv)
    assert e.value.code == 2 and said in capsys.readouterr().err

def test_ctrl_c_says_what_is_kept(monkeypatch, clip, tmp_path, capsys):
    def stop(*args): raise KeyboardInterrupt
    monkeypatch.setattr(C, 'certify', stop)
    assert main(data_root=str(tmp_path)) == 130
    assert capsys.readouterr().err == ('ipo_certify: stopped; features of finished datasets are kept, '
                                       'and the same command goes on from there.\n')

def test_a_dataset_that_cannot_be_used_leaves_the_others(monkeypatch, clip, tmp_path):
    fixed(monkeypatch, clip, ('dtd', 'eurosat'), as_printed('dtd'))
    good = C.load_dataset
    def load(name, root, *a, **kw):
        if name == 'eurosat': raise IpoError(f'the image {root}/eurosat/2750/x.jpg is empty: fetch it again.')
        return good(name)
    monkeypatch.setattr(C, 'load_dataset', load)
    cert = certify(tmp_path, datasets=['eurosat', 'dtd'])
    first, second = cert.record['datasets']
    assert (first['dataset'], first['state']) == ('dtd', 'scored')
    assert (second['dataset'], second['state']) == ('eurosat', 'not usable')
    assert 'DATA_ROOT/eurosat/2750/x.jpg' in second['why'] and str(tmp_path) not in json.dumps(cert.record)

def test_the_console_script_is_declared():
    assert 'ipo_certify=ipo_nb.commands:ipo_certify' in (project_dir()/'settings.ini').read_text()

# ---- the record

def test_the_committed_record_claims_nothing():
    cert = load_certificate(committed())
    assert 'no claim is made' in cert.headline() and {r['verdict'] for r in cert.rows} == {'no claim', 'not here'}
    assert [d['dataset'] for d in cert.scored] == ['caltech101', 'dtd', 'eurosat']
    assert all(len(d['unmet']) >= 3 for d in cert.scored)
    assert (committed()/'certificate.md').read_text() == cert.markdown()
    assert (committed()/'certificate.csv').read_text() == cert.flat().csv()

def test_an_older_record_is_refused(tmp_path):
    record = load_certificate(committed()).record | dict(format=1)
    (tmp_path/'certificate.json').write_text(json.dumps(record))
    with pytest.raises(IpoError, match='no certificate of format 2: write it again with `ipo_certify'):
        load_certificate(tmp_path)

def test_the_committed_record_is_what_the_command_makes(real, tmp_path):
    "Numbers only: other versions of torch may round the last digits otherwise."
    def of_dtd(cert): return next(d for d in cert.scored if d['dataset'] == 'dtd')
    old = load_certificate(committed())
    new = certify(real/'data', f"local-dir:{real/'clip_small'}", ['dtd'], device='cpu')
    for a, b in zip(of_dtd(old)['rows'], of_dtd(new)['rows']):
        assert a['prompt'] == b['prompt']
        assert a['ours'] == pytest.approx(b['ours'], abs=5.01) # one image weighs 5 points
    ours, theirs = new.record['clip'], old.record['clip']
    assert ours['spec'] == 'local-dir:clip_small' and ours['weights_sha256'] == theirs['weights_sha256']
    for k in ('split_sha', 'test_sizes_sha'): assert of_dtd(new)['facts'][k] == of_dtd(old)['facts'][k]
