"Checks of the comparison that are no documentation: damaged records, cut-off runs, awkward text."
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
import pytest
import torch
from ipo_nb.core import IpoError, Scored
from ipo_nb.data import load_dataset
from ipo_nb.evidence.records import load_records
from ipo_nb.llm import load_llm
from ipo_nb.paper.methods import peer_figures, peer_table, summarise
from ipo_nb.peers import registry
from ipo_nb.peers.base import make_task, tiny_clip
from ipo_nb.peers.registry import PEERS, peer_class, run_peer

@pytest.fixture(scope='module')
def task():
    t = make_task(load_dataset('mini_textures', verbose=False), tiny_clip(), 1, 1)
    return replace(t, test={half: items[:12] for half, items in t.test.items()})

def run(task, out, name='template', **kw): return run_peer(name, task, out, 'mini_textures', **kw)

def learn(task, out, name='coop', **kw): return run(task, out, name, **dict(epochs=1, augment=False) | kw)

def result_of(record): return Path(record['folder'], 'result.json')

def interrupted(*args): raise KeyboardInterrupt

def test_a_gradient_peer_cut_off_after_learning_does_not_learn_again(task, tmp_path, monkeypatch):
    whole = learn(task, tmp_path/'a')
    monkeypatch.setattr(registry, '_evaluate', interrupted)
    with pytest.raises(KeyboardInterrupt): learn(task, tmp_path/'b')
    monkeypatch.undo()
    monkeypatch.setattr(peer_class('coop'), 'fit', lambda *a: pytest.fail('learned again'))
    again = learn(task, tmp_path/'b')
    assert result_of(again).read_bytes() == result_of(whole).read_bytes()
    assert again['cost']['parameters'] > 0 and again['cost']['images'] == len(task.few_shot)

def test_records_of_other_settings_seeds_and_variants_lie_apart(task, tmp_path):
    one, other = learn(task, tmp_path), learn(task, tmp_path, lr=.01)
    variant = learn(task, tmp_path, 'coop_front')
    assert len({r['folder'] for r in (one, other, variant)}) == 3
    assert variant['settings']['position'] == 'front'
    titles = {s.title for s in summarise(load_records(tmp_path))}
    assert titles == {'CoOp (lr 0.002)', 'CoOp (lr 0.01)', 'CoOp, class name in front'}

@pytest.mark.parametrize('text', ['', '[]', 'null', '{"format": 1', '{"format": 9}', '{"format": 1}', '\ud83d'])
def test_damaged_results(task, tmp_path, text):
    result_of(run(task, tmp_path)).write_bytes(text.encode('utf-8', 'surrogatepass'))
    with pytest.raises(IpoError) as e: run(task, tmp_path)
    assert '\n' not in str(e.value) and 'delete' in str(e.value)
    with pytest.raises(IpoError): load_records(tmp_path)

def test_damaged_tensors_and_a_missing_manifest(task, tmp_path, capsys):
    folder = Path(learn(task, tmp_path)['folder'])
    (folder/'result.json').unlink()
    (folder/'learned.safetensors').write_bytes(b'nothing')
    learn(task, tmp_path)
    assert 'they are learned anew' in capsys.readouterr().out
    (folder/'manifest.json').unlink()
    with pytest.raises(IpoError, match='no manifest.json'): learn(task, tmp_path)

HOLD = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print('held', flush=True)
time.sleep(60)
"""

def test_two_processes_cannot_share_a_record(task, tmp_path):
    path = result_of(run(task, tmp_path))
    path.unlink()
    command = [sys.executable, '-c', HOLD, str(path.with_name('.lock'))]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == 'held\n'
        with pytest.raises(IpoError, match='another process is working'): run(task, tmp_path)
    finally:
        other.kill()
        other.wait()
    assert run(task, tmp_path)

def no_numbers(self, task, which): return torch.full((12, len(task.names(which))), torch.nan)

def test_logits_that_are_no_numbers(task, tmp_path, monkeypatch):
    monkeypatch.setattr(peer_class('template'), 'logits', no_numbers)
    with pytest.raises(IpoError, match='no numbers'): run(task, tmp_path)
    assert not list(tmp_path.glob('*/*/result.json'))

def test_a_class_with_too_few_images(task, tmp_path):
    fewer = replace(task, few_shot=task.few_shot[1:])
    with pytest.raises(IpoError, match=f"0 few-shot images of '{task.base[0]}'"): run(fewer, tmp_path)

@pytest.mark.parametrize('shots', [0, -3])
def test_a_task_of_no_shots(task, tmp_path, shots):
    with pytest.raises(IpoError, match='shots must be'): run(replace(task, shots=shots), tmp_path)

def test_the_search_behind_an_ensemble_is_counted(task, tmp_path):
    t = replace(task, scored=[Scored('a <CLASS>.', 1., 50.)])
    r = run(t, tmp_path, 'ipo_top1', spent=dict(calls=7, tokens_in=70, tokens_out=7, seconds=3.))
    assert (r['cost']['calls'], r['evaluation']['prompt'], r['title']) == (7, 'a <CLASS>.', 'IPO, top 1')
    assert r['seconds'] >= 3
    assert run(t, tmp_path, spent=dict(calls=7))['cost']['calls'] == 0

def test_every_name_is_a_peer():
    for name, entry in PEERS.items(): assert set(entry.settings) <= set(peer_class(name).defaults)

def test_awkward_text_is_escaped(task, tmp_path):
    nasty = '<script>alert(1)</script> | $x$ [l](javascript:x)'
    t = replace(task, llm=load_llm('mock', answers={'': f'<INS>{nasty} <CLASS></INS>'}))
    r = run(t, tmp_path, 'sentences') | dict(title=nasty, dataset=nasty)
    table = peer_table([r])
    for text in (table.markdown(), table.html(), table._repr_markdown_()):
        assert '<script' not in text and '](java' not in text and '$' not in text
    for fig in peer_figures([r | dict(dataset='mini')]).values(): assert len(fig.data()) > 1000
