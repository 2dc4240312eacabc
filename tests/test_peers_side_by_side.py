"Checks of the comparison that are no documentation: damaged records, cut-off runs, awkward text, and whether the paper's figures add up."
import subprocess, sys
from dataclasses import replace
from pathlib import Path
import numpy as np, pytest, torch
from ipo_nb.core import IpoError, Scored
from ipo_nb.data import load_dataset
from ipo_nb.stats import harmonic_mean
from ipo_nb.llm import load_llm
from ipo_nb.peers import registry as S
from ipo_nb.peers.base import make_task, tiny_clip
from ipo_nb.peers.registry import *
from ipo_nb.evidence.records import *
from ipo_nb.paper.methods import *
from ipo_nb.paper.printed import *

# ---- the paper's figures

def floats(name): return [r | {k: float(r[k]) for k in ('base', 'novel', 'h')} for r in paper_file(name)]
def off(rows, least): return [r for r in rows if abs(r['h'] - harmonic_mean(r['base'], r['novel'])) > least]
def means(shots, method):
    rows = [r for r in floats('base_to_novel') if int(r['shots']) == shots and r['method'] == method]
    sets, printed = [r for r in rows if r['dataset'] != 'average'], [r for r in rows if r['dataset'] == 'average']
    assert len(sets) == 11
    return [round(float(np.mean([r[k] for r in sets])), 2) for k in ('base', 'novel')], [printed[0][k] for k in ('base', 'novel')] if printed else None

@pytest.mark.parametrize('method', ['CLIP', 'CoOp', 'CoCoOp', 'MaPLe', 'PromptSRC', 'CoPrompt', 'IPO'])
def test_rows_of_table_6_give_its_averages(method):
    found, printed = means(1, method)
    assert found == pytest.approx(printed, abs=.0101)
    assert [r['h'] for r in paper_rows('average', 1) if r['method'] == method] == pytest.approx([harmonic_mean(*printed)], abs=.0101)

@pytest.mark.parametrize('method', ['CoOp', 'CoCoOp', 'MaPLe', 'PromptSRC'])
def test_rows_of_table_8_give_its_averages_but_for_ipo(method):
    found, printed = means(16, method)
    assert found == pytest.approx(printed, abs=.0101)

def test_known_flaws_are_still_there():
    assert means(16, 'IPO') == ([83.24, 78.47], [79.92, 80.51]) and means(0, 'CLIP, a photo of a <CLASS>.')[0] == [68.27, 73.99]
    assert [(r['table'], r['dataset'], r['method']) for r in off(floats('base_to_novel'), .0201)] == [('6', 'oxford_pets', 'IPO')]
    assert [(r['table'], r['value']) for r in off(floats('ablations'), .0151)] == [('2b', 'BLIP-2'), ('14', '16'), ('14', '4'), ('14', '64')]

def test_cross_dataset_average_of_ipo_alone_counts_the_source():
    for r in paper_file('cross_dataset'):
        xs = [float(v) for k, v in r.items() if k not in ('method', 'average_printed')]
        assert np.mean(xs if r['method'] == 'IPO' else xs[1:]) == pytest.approx(float(r['average_printed']), abs=.0101)

def test_every_prompt_has_one_placeholder():
    for name in ('prompts', 'prompt_scores'): assert all(r['prompt'].count('<CLASS>') == 1 for r in paper_file(name))

def test_the_wheel_takes_the_figures_and_the_peers_along():
    text = (Path(__file__).parent.parent/'setup.py').read_text()
    assert "'paper/*'" in text and "f'{lib}.peers'" in text

# ---- records

@pytest.fixture(scope='module')
def task():
    t = make_task(load_dataset('mini_textures', verbose=False), tiny_clip(), 1, 1)
    return replace(t, test={h: items[:12] for h, items in t.test.items()})

def learn(task, out, name='coop', **kw): return run_peer(name, task, out, 'mini_textures', **dict(epochs=1, augment=False) | kw)

def test_a_gradient_peer_cut_off_after_learning_does_not_learn_again(task, tmp_path, monkeypatch):
    whole = learn(task, tmp_path/'a')
    monkeypatch.setattr(S, '_evaluate', lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt): learn(task, tmp_path/'b')
    monkeypatch.undo()
    monkeypatch.setattr(peer_class('coop'), 'fit', lambda *a: pytest.fail('learned again'))
    again = learn(task, tmp_path/'b')
    assert Path(again['folder'], 'result.json').read_bytes() == Path(whole['folder'], 'result.json').read_bytes()
    assert again['cost']['parameters'] > 0 and again['cost']['images'] == len(task.few_shot)

def test_records_of_other_settings_seeds_and_variants_lie_apart(task, tmp_path):
    one = learn(task, tmp_path); other = learn(task, tmp_path, lr=.01); variant = learn(task, tmp_path, 'coop_front')
    assert len({r['folder'] for r in (one, other, variant)}) == 3 and variant['settings']['position'] == 'front'
    assert {s.title for s in summarise(load_records(tmp_path))} == {'CoOp (lr 0.002)', 'CoOp (lr 0.01)', 'CoOp, class name in front'}

@pytest.mark.parametrize('text', ['', '[]', 'null', '{"format": 1', '{"format": 9}', '{"format": 1}', '\ud83d'])
def test_damaged_results(task, tmp_path, text):
    folder = Path(run_peer('template', task, tmp_path, 'mini_textures')['folder'])
    (folder/'result.json').write_bytes(text.encode('utf-8', 'surrogatepass'))
    with pytest.raises(IpoError) as e: run_peer('template', task, tmp_path, 'mini_textures')
    assert '\n' not in str(e.value) and 'delete' in str(e.value)
    with pytest.raises(IpoError): load_records(tmp_path)

def test_damaged_tensors_and_a_missing_manifest(task, tmp_path):
    folder = Path(learn(task, tmp_path)['folder'])
    (folder/'result.json').unlink(); (folder/'learned.safetensors').write_bytes(b'nothing')
    with pytest.raises(IpoError, match='cannot be read: delete it'): learn(task, tmp_path)
    (folder/'learned.safetensors').unlink(); learn(task, tmp_path); (folder/'manifest.json').unlink()
    with pytest.raises(IpoError, match='no manifest.json'): learn(task, tmp_path)

def test_two_processes_cannot_share_a_record(task, tmp_path):
    folder = Path(run_peer('template', task, tmp_path, 'mini_textures')['folder']); (folder/'result.json').unlink()
    code = f"import time; from filelock import FileLock; l = FileLock({str(folder/'.lock')!r}); l.acquire(); print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == 'held\n'
        with pytest.raises(IpoError, match='another process is working'): run_peer('template', task, tmp_path, 'mini_textures')
    finally: other.kill(); other.wait()
    assert run_peer('template', task, tmp_path, 'mini_textures')

def test_logits_that_are_no_numbers(task, tmp_path, monkeypatch):
    monkeypatch.setattr(peer_class('template'), 'logits', lambda self, task, which: torch.full((12, len(task.names(which))), torch.nan))
    with pytest.raises(IpoError, match='no numbers'): run_peer('template', task, tmp_path, 'mini_textures')
    assert not list(tmp_path.glob('*/*/result.json'))

def test_a_class_with_too_few_images(task, tmp_path):
    with pytest.raises(IpoError, match=f"0 few-shot images of '{task.base[0]}'"): run_peer('template', replace(task, few_shot=task.few_shot[1:]), tmp_path, 'mini_textures')
    for shots in (0, -3):
        with pytest.raises(IpoError, match='shots must be'): run_peer('template', replace(task, shots=shots), tmp_path, 'mini_textures')

def test_the_search_behind_an_ensemble_is_counted(task, tmp_path):
    t = replace(task, scored=[Scored('a <CLASS>.', 1., 50.)])
    r = run_peer('ipo_top1', t, tmp_path, 'mini_textures', spent=dict(calls=7, tokens_in=70, tokens_out=7, seconds=3.))
    assert (r['cost']['calls'], r['evaluation']['prompt'], r['title']) == (7, 'a <CLASS>.', 'IPO, top 1') and r['seconds'] >= 3
    assert run_peer('template', t, tmp_path, 'mini_textures', spent=dict(calls=7))['cost']['calls'] == 0

def test_every_name_is_a_peer():
    for name in PEERS: assert set(PEERS[name][2]) <= set(peer_class(name).defaults)

def test_awkward_text_is_escaped(task, tmp_path):
    nasty = '<script>alert(1)</script> | $x$ [l](javascript:x)'
    t = replace(task, llm=load_llm('mock', answers={'': f'<INS>{nasty} <CLASS></INS>'}))
    r = run_peer('sentences', t, tmp_path, 'mini_textures') | dict(title=nasty, dataset=nasty)
    for text in (peer_table([r]).markdown(), peer_table([r]).html(), peer_table([r])._repr_markdown_()): assert '<script' not in text and '](java' not in text and '$' not in text
    assert all(len(f.data()) > 1000 for f in peer_figures([r | dict(dataset='mini')]).values())
