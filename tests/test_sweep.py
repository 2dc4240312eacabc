"""Sweeps: what a file may hold, runs that fail in every way, interrupts and kills, and what comes after them."""
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
import psutil
import pytest
from ipo_nb import cluster, study, sweep
from ipo_nb.core import append_jsonl, write_json, write_text
from ipo_nb.evidence import records

quick = dict(llm='random', steps=3, candidates=3, captioner='none')

def spec(tmp_path, text, **base):
    "A sweep in a file, with its records beside it."
    base = quick | dict(out_dir=str(tmp_path/'runs')) | base
    return write_text(tmp_path/'small.yaml', f'name: small\nbase: {json.dumps(base)}\n{text}\n')

def start(path, *args):
    "`ipo_sweep` as a terminal would start it."
    return subprocess.Popen([Path(sys.executable).parent/'ipo_sweep', str(path), *args], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)

def ipo_sweep(path, *args):
    "The same in this process."
    return study.called(sweep.main, [str(path), *args])

def planned(path): return sweep.look_all(sweep.load_sweep(path)[1])

def complete(params, out_dir):
    "The run that would have been without a sweep."
    s = study.open_study(params | dict(out_dir=str(out_dir)))
    s.finish()
    return s.folder

def until(what, seconds=300):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, 'it took too long'
        time.sleep(.1)

def family(process): return psutil.Process(process.pid).children(recursive=True)
def alive(processes): return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

# --- the file ---

@pytest.mark.parametrize('path', sorted(sweep.sweeps_dir().glob('*.yaml')), ids=lambda p: p.stem)
def test_the_sweeps_of_the_repository_can_be_read(path):
    found, runs = sweep.load_sweep(path.stem)
    assert found.name == path.stem and found.about
    if path.stem.startswith('paper'): return
    model = 'openai:gpt-4o-mini' if path.stem == 'confusions' else 'smollm2' # which reads no message
    assert {r.get('seed') for r in runs} == {1, 2, 3} and {r['llm'] for r in runs} == {model}
    assert all(r.get('control', True) for r in runs) and found.seconds_per_step
    datasets = 'eurosat' if path.stem == 'peers_eurosat' else 'mini_'
    assert all(r['dataset'].startswith(datasets) for r in runs)

def test_all_runs_of_the_embedded_sweeps_can_start():
    for path in sorted(sweep.sweeps_dir().glob('[!p]*.yaml')):
        assert not [r.why for r in planned(path) if r.state == 'failed']

def test_table_6_names_what_is_missing(tmp_path):
    runs = sweep.look_all(sweep.load_sweep('paper_table6', data_root=str(tmp_path))[1])
    assert len(runs) == 33 and all(r.state == 'failed' and r.why for r in runs)
    said = sweep.plan_text(sweep.load_sweep('paper_table6')[0], runs)
    assert '33 runs: 33 not yet.' in said # a budget before anything is downloaded
    assert ' 0 LLM calls' not in said and 'about 9.2 hours' in said

@pytest.mark.parametrize('text, sentence', [
    ('grid: {sed: [1]}', "'sed' in grid is no parameter of run_dataset.ipynb; did you mean 'seed'?"),
    ('grd: {seed: [1]}', "'grd' is unknown; did you mean 'grid'?"),
    ('grid: {dataset: []}', "'grid.dataset' is empty"),
    ('grid: {dataset: mini_aerial}', "'grid.dataset' must be a list"),
    ('grid: {dataset: [mini_aerial, mini_aerial]}', 'runs 1 and 2 are one and the same (dataset mini_aerial)'),
    ('grid: {dataset: [mini_aerial], memory: [20, null]}', 'runs 1 and 2 are one and the same'),
    ('grid: {dataset: [mini_aerial], steps: [1]}', "'steps' is fixed and varied too (grid)"),
    ('grid: {dataset: [mini_arial]}', "did you mean 'mini_aerial'"),
    ('grid: {dataset: [mini_aerial], shots: [1, many]}', "run 2 (shots many): parameter 'shots' cannot be 'many'"),
    ('grid: {dataset: [mini_aerial], settings: [seed]}', "'settings' in grid holds 'seed'"),
    ('grid: {dataset: [mini_aerial], seed: [1], settings: [{seed: 2}]}', "'seed' stands twice in grid"),
    ('also: [{dataset: mini_aerial, grid: {dataset: [dtd]}}]', "'dataset' is fixed and varied too (also)"),
    ('also: [{datset: mini_aerial}]', "'datset' in also is no parameter"),
    ('also: [3]', "also.0 cannot be 3"),
    ('grid: {seed: [1]}', "parameter 'dataset' is missing"),
    ('grid: {seed: [1]}\ngrid: {shots: [1]}', "the key 'grid' stands twice"),
    ('grid: {seed: [1', 'cannot be read as YAML in line'),
    ('seconds_per_step: -1', 'seconds_per_step cannot be -1')])
def test_a_wrong_file_is_one_sentence(tmp_path, capsys, text, sentence):
    assert ipo_sweep(spec(tmp_path, text)) == 1
    said = capsys.readouterr().err.strip()
    assert sentence in said and said.startswith('ipo_sweep: ') and '\n' not in said and not (tmp_path/'runs').exists()

@pytest.mark.parametrize('content', [b'', b'[1]', b'\xff\xfe\x00', b'name: [', b'1: 2', b'name: {a: 1}'])
def test_a_file_that_is_no_sweep(tmp_path, capsys, content):
    write_text(tmp_path/'x.yaml', content)
    assert ipo_sweep(tmp_path/'x.yaml') == 1
    assert capsys.readouterr().err.strip().startswith('ipo_sweep: x.yaml')

# --- failures ---

works = '''
import json, sys
from pathlib import Path
folder = Path(sys.argv[1])
folder.mkdir(parents=True)
(folder/'result.json').write_text(json.dumps(dict(methods=[dict(name='IPO', h=50.)])))
'''
fakes = [works,
         'import os, signal\nos.kill(os.getpid(), signal.SIGKILL)',
         "raise MemoryError('too large')",
         "import sys\nsys.exit('ipo_run: the disk is full: free some space.')",
         'import os\nos._exit(3)',
         'pass']

def test_a_failure_of_each_kind_is_a_line_and_not_the_end(tmp_path, monkeypatch, capsys):
    grid = 'grid: {dataset: [mini_aerial], seed: [1, 2, 3, 4, 5, 6]}'
    path = spec(tmp_path, f'{grid}\nalso: [{{dataset: eurosat, data_root: /nowhere}}]')
    def command(run): return [sys.executable, '-c', fakes[run.number-1], str(run.folder)]
    monkeypatch.setattr(sweep, 'command', command)
    assert ipo_sweep(path, '--workers', '3') == 1
    out = capsys.readouterr().out
    assert 'ended by SIGKILL: perhaps there was not enough memory' in out
    assert 'MemoryError: too large' in out
    assert 'the disk is full: free some space.' in out
    assert 'exit code 3 and an empty log' in out
    assert '7 runs: 1 done, 6 failed.' in out and '/nowhere' in out

def test_no_more_than_so_many_at_a_time(tmp_path, monkeypatch):
    running, most = set(), []
    def work(run, stop):
        running.add(run.number)
        most.append(len(running))
        time.sleep(.2)
        running.discard(run.number)
        return run.fail('tried')
    runs = planned(spec(tmp_path, 'grid: {dataset: [mini_aerial], seed: [1, 2, 3, 4, 5]}'))
    sweep.in_threads(runs, work, 2)
    assert max(most) == 2 and len(most) == 5

# --- the plan ---

def test_the_plan_counts_what_is_left_and_starts_nothing(tmp_path, capsys):
    grid = 'grid: {dataset: [mini_aerial], seed: [1, 2]}\nseconds_per_step: 3600'
    path = spec(tmp_path, grid, llm='openai:none@http://127.0.0.1:9/v1')
    assert ipo_sweep(path, '--plan', '--workers', '2') == 0
    out = capsys.readouterr().out
    assert 'at most 6 LLM calls' in out and 'about 3 hours with 2 at a time' in out
    assert not (tmp_path/'runs').exists()
    journal = planned(path)[0].folder/'history.jsonl'
    for step in range(3): append_jsonl(journal, dict(step=step, candidates=[], seconds=1.)) # two steps are done
    assert ipo_sweep(path, '--plan') == 0
    out = capsys.readouterr().out
    assert '1 to do, 1 cut off' in out and 'at most 4 LLM calls' in out
    assert 'about 4 hours with 1 at a time' in out

def test_hours_come_from_records_of_the_same_optimizer(tmp_path, capsys):
    path = spec(tmp_path, 'grid: {dataset: [mini_aerial], seed: [1]}')
    assert ipo_sweep(path, '--plan') == 0
    assert 'unknown until the first run is done' in capsys.readouterr().out
    for i, seconds in enumerate((10, 1000, 30)):
        folder = tmp_path/'runs'/'mini_objects'/str(i)
        write_json(folder/'config.json', dict(llm='random'))
        write_json(folder/'manifest.json', dict(seconds=dict(search=5., evaluate=seconds)))
        write_json(folder/'result.json', {})
        for step in range(3): append_jsonl(folder/'history.jsonl', dict(step=step, seconds=0.))
    write_text(tmp_path/'runs'/'mini_objects'/'2'/'manifest.json', '{')  # damaged: does not count
    assert ipo_sweep(path, '--plan') == 0
    assert '252 s a step of random, from 2 finished runs' in capsys.readouterr().out

# --- interrupts and kills, with papermill ---

@pytest.fixture
def sweeps():
    "Starts sweeps, and ends what a failing test leaves."
    started = []
    def begin(path):
        started.append(start(path))
        return started[-1]
    yield begin
    for p in started: p.kill()

def test_interrupted_killed_without_memory_and_in_the_end_whole(tmp_path, sweeps):
    path = spec(tmp_path, 'grid: {dataset: [mini_aerial], seed: [1]}', steps=60)
    run, = planned(path)
    def begun(steps): # a sweep that has made so many steps more, and the processes below it
        process, wanted = sweeps(path), sweep.steps_done(run) + steps
        until(lambda: process.poll() is not None or sweep.steps_done(run) >= wanted)
        return process, family(process)

    process, below = begun(3)
    process.send_signal(signal.SIGINT) # Ctrl-C
    said = process.communicate(timeout=120)[1].strip().splitlines()
    assert process.returncode == 130 and said[-1].startswith('ipo_sweep: interrupted;')
    assert 'Traceback' not in ''.join(said)
    until(lambda: not alive(below)) # neither papermill nor its kernel goes on alone

    before = sweep.steps_done(run)
    process, below = begun(3)
    process.kill()
    process.communicate()
    until(lambda: not alive(below))
    assert sweep.look(1, run.params).state == 'cut off' and sweep.steps_done(run) >= before + 3

    process, below = begun(3)
    next(p for p in below if 'ipykernel_launcher' in p.cmdline()).kill() # as the system does where memory ends
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 1 and '1 failed' in out and 'the notebook kernel died' in out

    process = sweeps(path)
    out = process.communicate(timeout=600)[0]
    assert process.returncode == 0 and '1 done' in out
    whole = complete(run.params, tmp_path/'whole')
    assert (run.folder/'result.json').read_bytes() == (whole/'result.json').read_bytes()

    begin = time.monotonic()
    assert ipo_sweep(path) == 0 and time.monotonic() - begin < 30 # skipped, without a kernel

    loose = records.load_record(run.folder)
    assert (run.folder/'report.html').exists()
    assert ipo_sweep(path, '--pack') == 0 and not run.folder.exists()
    assert sweep.look(1, run.params).state == 'finished'
    assert ipo_sweep(path, '--pack') == 0 and not run.folder.exists()
    tight = records.load_record(run.folder)
    assert (tight.result, tight.history, tight.control) == (loose.result, loose.history, loose.control)
    assert study.run(run.params) == 0 and (run.folder/'report.html').exists() # drawn again

# --- Ray ---

without_kernel = '''
import os, sys, time
from ipo_nb import study, sweep
judge = study.Study.judge
def slowly(self, prompts, rows):
    time.sleep(.1)
    return judge(self, prompts, rows)
study.Study.judge = slowly # journals come home once a second
def run(params, out=None):
    with open({where!r}, 'a') as f: f.write('begun\\n')
    study.open_study(params).finish()
    return out
study.run_notebook = run
sys.exit(sweep.child())
'''

@pytest.fixture
def two_nodes():
    "Two nodes of one core on this machine."
    ray = pytest.importorskip('ray', reason='Ray is an extra: pip install ipo_nb[ray]')
    from ray.cluster_utils import Cluster
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    small = dict(num_cpus=1, object_store_memory=80*2**20)
    c = Cluster()
    try:
        c.add_node(include_dashboard=False, **small)
        c.second = c.add_node(**small)
        ray.init(c.address, logging_level='ERROR', log_to_driver=False)
    except Exception as e: # Ray gives a node 30 seconds to start, and says so with a plain Exception
        c.shutdown()
        if 'timed out' not in str(e): raise
        pytest.skip('this machine is too busy: a Ray node did not start within its 30 seconds')
    yield c
    ray.shutdown()
    c.shutdown()

def test_a_node_is_killed_in_mid_sweep(tmp_path, two_nodes):
    path = spec(tmp_path, 'grid: {dataset: [mini_aerial], seed: [1, 2]}', steps=100)
    runs = sweep.look_all(sweep.load_sweep(path)[1], from_afar=True)
    code, at = without_kernel.format(where=str(tmp_path/'begun')), []
    def argv(run): return [sys.executable, '-c', code, *sweep.command(run)[3:]]
    def kill():
        until(lambda: all(sweep.steps_done(r) > 3 for r in runs))
        at.extend(map(sweep.steps_done, runs))
        two_nodes.remove_node(two_nodes.second, allow_graceful=False)
    killer = threading.Thread(target=kill)
    killer.start()
    sweep.run_on_ray(runs, two_nodes.address, argv=argv)
    killer.join()
    assert [r.state for r in runs] == ['done', 'done'], [r.why for r in runs]
    assert max(at) < 100
    assert len((tmp_path/'begun').read_text().split()) == 3 # two began, and one of them again
    for r in runs:
        whole = complete(r.params, tmp_path/'whole')
        home, alone = cluster.files_of(r.folder), cluster.files_of(whole)
        assert home['result.json'] == alone['result.json'] and home.keys() == alone.keys()
        assert 'out_dir' not in json.loads(home['config.json']) and r.log.exists()
    assert [r.state for r in sweep.look_all([r.params for r in runs])] == ['finished', 'finished']

def test_a_cluster_that_goes_away_leaves_a_reason_and_the_steps(tmp_path):
    ray = pytest.importorskip('ray', reason='Ray is an extra: pip install ipo_nb[ray]')
    def gone(*a, **kw): raise ray.exceptions.ActorUnavailableError('the node is gone', b'0'*16)
    run, = planned(spec(tmp_path, 'grid: {dataset: [mini_aerial]}'))
    lost = SimpleNamespace(wait=gone, exceptions=ray.exceptions)
    cluster._wait(lost, lambda: None, None, run, threading.Event())
    assert run.state == 'failed' and run.why.startswith('Ray lost it (ActorUnavailableError)')

@pytest.mark.parametrize('address', ['127.0.0.1:1', 'nowhere'])
def test_no_cluster_is_one_sentence(tmp_path, capsys, address):
    pytest.importorskip('ray', reason='Ray is an extra: pip install ipo_nb[ray]')
    assert ipo_sweep(spec(tmp_path, 'grid: {dataset: [mini_aerial]}'), '--ray', address) == 1
    assert f'there is no Ray cluster at {address}' in capsys.readouterr().err

def test_without_ray_one_is_told_how_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', None)
    assert ipo_sweep(spec(tmp_path, 'grid: {dataset: [mini_aerial]}'), '--ray') == 1
    assert "pip install 'ipo_nb[ray]'" in capsys.readouterr().err

def test_a_run_for_a_gpu_elsewhere_has_the_name_that_it_will_have_there(tmp_path):
    params = quick | dict(dataset='mini_aerial', device='cuda', out_dir=str(tmp_path))
    afar, = sweep.look_all([params], from_afar=True)
    there = sweep.look(1, params | dict(device='cpu', precision='fp16'))
    assert afar.state == 'to do' and afar.folder == there.folder
    sent = cluster.sent(afar)
    assert cluster.on_gpu(afar) and (sent['device'], sent['precision']) == ('cuda', 'fp16')

# --- the same without Ray: what it is asked for, in this process ---

class Here:
    "Ray on one machine and in one thread: a task is done when it is begun."
    exceptions = SimpleNamespace(RayTaskError=ZeroDivisionError, RayError=ZeroDivisionError)
    def init(self, **kw): pass
    def cluster_resources(self): return {}
    def get(self, x, timeout=None): return x
    def wait(self, refs, timeout): return refs, []
    def remote(self, **kw): return lambda function: Task(function)

class Task:
    "A function that answers `remote`."
    def __init__(self, function): self.function = function
    def options(self, **kw): return self
    def remote(self, *args): return self.function(*args)

class Desk(cluster.Desk):
    "A desk of which the methods answer `remote`."
    def __init__(self):
        super().__init__()
        self.lay, self.read = Task(self.lay), Task(self.read)

def test_a_run_goes_away_and_comes_home(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', Here())
    monkeypatch.setattr(cluster, '_desk', lambda ray: Desk())
    runs = planned(spec(tmp_path, 'grid: {dataset: [mini_aerial], seed: [1, 2]}'))
    seen = []
    def argv(run):
        seen.append(run.folder)
        return [sys.executable, '-c', works if run.number == 1 else fakes[1], str(run.folder)]
    sweep.run_on_ray(runs, argv=argv)
    assert [r.state for r in runs] == ['done', 'failed'] and 'SIGKILL' in runs[1].why
    assert {f.name for f in seen} == {r.folder.name for r in runs}
    assert not {f.parent for f in seen} & {r.folder.parent for r in runs} # in a folder of its own, over there
    assert (runs[0].folder/'result.json').exists() and runs[0].log.exists()
    assert not (runs[1].folder/'result.json').exists()
