"""Sweeps: what a file may hold, runs that fail in every way, interrupts and kills, and what comes after them."""
import json, os, signal, subprocess, sys, threading, time
from pathlib import Path
from types import SimpleNamespace
import psutil, pytest
from ipo_nb import study, sweep
from ipo_nb.evidence import records, report
from ipo_nb.core import IpoError, append_jsonl, write_json, write_text

quick = dict(llm='random', steps=3, candidates=3, captioner='none')

def spec(tmp_path, text, **base):
    "A sweep in a file, with its records beside it."
    base = quick | dict(out_dir=str(tmp_path/'runs')) | base
    return write_text(tmp_path/'small.yaml', f'name: small\nbase: {json.dumps(base)}\n{text}\n')

def start(path, *args):
    "`ipo_sweep` as a terminal would start it."
    return subprocess.Popen([sys.executable, '-c', 'import sys; from ipo_nb.sweep import main; sys.exit(main())', str(path), *args],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)

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
    assert {r.get('seed') for r in runs} == {1, 2, 3} and {r['llm'] for r in runs} == {'smollm2'} and all(r.get('control', True) for r in runs)
    assert all(r['dataset'].startswith('eurosat' if path.stem == 'peers_eurosat' else 'mini_') for r in runs) and found.seconds_per_step

def test_all_runs_of_the_embedded_sweeps_can_start():
    for path in sorted(sweep.sweeps_dir().glob('[!p]*.yaml')):
        runs = sweep.look_all(sweep.load_sweep(path)[1])
        assert not [r.why for r in runs if r.state == 'failed']

def test_table_6_names_what_is_missing(tmp_path):
    runs = sweep.look_all(sweep.load_sweep('paper_table6', data_root=str(tmp_path))[1])
    assert len(runs) == 33 and all(r.state == 'failed' and r.why for r in runs)
    said = sweep.plan_text(sweep.load_sweep('paper_table6')[0], runs)
    assert '33 runs: 33 not yet.' in said and ' 0 LLM calls' not in said and 'about 9.2 hours' in said # a budget before anything is downloaded

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
    assert sweep.main([str(spec(tmp_path, text))]) == 1
    said = capsys.readouterr().err.strip()
    assert sentence in said and said.startswith('ipo_sweep: ') and '\n' not in said and not (tmp_path/'runs').exists()

@pytest.mark.parametrize('content', [b'', b'[1]', b'\xff\xfe\x00', b'name: [', b'1: 2', b'name: {a: 1}'])
def test_a_file_that_is_no_sweep(tmp_path, capsys, content):
    write_text(tmp_path/'x.yaml', content)
    assert sweep.main([str(tmp_path/'x.yaml')]) == 1
    assert capsys.readouterr().err.strip().startswith('ipo_sweep: x.yaml')

# --- failures ---

fakes = dict(works="import sys, json; from pathlib import Path; p = Path(sys.argv[1]); p.mkdir(parents=True); (p/'result.json').write_text(json.dumps(dict(methods=[dict(name='IPO', h=50.)])))",
             killed='import os, signal; os.kill(os.getpid(), signal.SIGKILL)', memory="raise MemoryError('too large')",
             mistake="import sys; sys.exit('ipo_run: the disk is full: free some space.')", silent='import os; os._exit(3)', nothing='pass')

def test_a_failure_of_each_kind_is_a_line_and_not_the_end(tmp_path, monkeypatch, capsys):
    path = spec(tmp_path, 'grid: {dataset: [mini_aerial], seed: [1, 2, 3, 4, 5, 6]}\nalso: [{dataset: eurosat, data_root: /nowhere}]')
    monkeypatch.setattr(sweep, 'command', lambda r: [sys.executable, '-c', list(fakes.values())[r.number-1], str(r.folder)])
    assert sweep.main([str(path), '--workers', '3']) == 1
    out = capsys.readouterr().out
    for sentence in ('ended by SIGKILL: perhaps there was not enough memory', 'MemoryError: too large', 'the disk is full: free some space.',
                     'exit code 3 and an empty log', '7 runs: 1 done, 6 failed.', '/nowhere'): assert sentence in out, sentence

def test_no_more_than_so_many_at_a_time(tmp_path, monkeypatch):
    running, most = set(), []
    def work(run, stop):
        running.add(run.number); most.append(len(running)); time.sleep(.2); running.discard(run.number)
        run.state, run.why = 'failed', 'tried'; return run
    runs = sweep.look_all(sweep.load_sweep(spec(tmp_path, 'grid: {dataset: [mini_aerial], seed: [1, 2, 3, 4, 5]}'))[1])
    sweep.in_threads(runs, work, 2)
    assert max(most) == 2 and len(most) == 5

# --- the plan ---

def test_the_plan_counts_what_is_left_and_starts_nothing(tmp_path, capsys):
    path = spec(tmp_path, 'grid: {dataset: [mini_aerial], seed: [1, 2]}\nseconds_per_step: 3600', llm='openai:none@http://127.0.0.1:9/v1')
    assert sweep.main([str(path), '--plan', '--workers', '2']) == 0
    out = capsys.readouterr().out
    assert 'at most 6 LLM calls' in out and 'about 3 hours with 2 at a time' in out and not (tmp_path/'runs').exists()
    first = sweep.look_all(sweep.load_sweep(path)[1])[0]
    for step in range(3): append_jsonl(first.folder/'history.jsonl', dict(step=step, candidates=[], seconds=1.)) # two steps are done
    assert sweep.main([str(path), '--plan']) == 0
    out = capsys.readouterr().out
    assert '1 to do, 1 cut off' in out and 'at most 4 LLM calls' in out and 'about 4 hours with 1 at a time' in out

def test_hours_come_from_records_of_the_same_optimizer(tmp_path, capsys):
    path = spec(tmp_path, 'grid: {dataset: [mini_aerial], seed: [1]}')
    assert sweep.main([str(path), '--plan']) == 0 and 'unknown until the first run is done' in capsys.readouterr().out
    for i, seconds in enumerate((10, 1000, 30)):
        folder = tmp_path/'runs'/'mini_objects'/str(i)
        for name, obj in dict(config=dict(llm='random'), manifest=dict(seconds=dict(search=5., evaluate=seconds)), result={}).items(): write_json(folder/f'{name}.json', obj)
        for step in range(3): append_jsonl(folder/'history.jsonl', dict(step=step, seconds=0.))
    write_text(tmp_path/'runs'/'mini_objects'/'2'/'manifest.json', '{')  # damaged: does not count
    assert sweep.main([str(path), '--plan']) == 0
    assert '252 s a step of random, from 2 finished runs' in capsys.readouterr().out

# --- interrupts and kills, with papermill ---

@pytest.fixture
def sweeps():
    "Starts sweeps, and ends what a failing test leaves."
    started = []
    def begin(path):
        started.append(start(path)); return started[-1]
    yield begin
    for p in started: p.kill()

def test_interrupted_killed_without_memory_and_in_the_end_whole(tmp_path, sweeps):
    path = spec(tmp_path, 'grid: {dataset: [mini_aerial], seed: [1]}', steps=60)
    run, = sweep.look_all(sweep.load_sweep(path)[1])
    def until_it_has(steps): until(lambda: process.poll() is not None or sweep.steps_done(run) >= steps); return family(process)

    process = sweeps(path); below = until_it_has(3)
    process.send_signal(signal.SIGINT) # Ctrl-C
    said = process.communicate(timeout=120)[1].strip().splitlines()
    assert process.returncode == 130 and said[-1].startswith('ipo_sweep: interrupted;') and 'Traceback' not in ''.join(said)
    until(lambda: not alive(below)) # neither papermill nor its kernel goes on alone

    process = sweeps(path); below = until_it_has(steps := sweep.steps_done(run) + 3)
    process.kill(); process.communicate()
    until(lambda: not alive(below))
    assert sweep.look(1, run.params).state == 'cut off' and sweep.steps_done(run) >= steps

    process = sweeps(path); below = until_it_has(sweep.steps_done(run) + 3)
    next(p for p in below if 'ipykernel_launcher' in p.cmdline()).kill() # as the system does where memory ends
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 1 and '1 failed' in out and 'the notebook kernel died' in out

    process = sweeps(path); out = process.communicate(timeout=600)[0]
    assert process.returncode == 0 and '1 done' in out
    whole = study.open_study(run.params | dict(out_dir=str(tmp_path/'whole')))
    whole.describe(); whole.search(); whole.run_control(); whole.finish()
    assert (run.folder/'result.json').read_bytes() == (whole.folder/'result.json').read_bytes() and records.load_record(run.folder)

    begin = time.monotonic()
    assert sweep.main([str(path)]) == 0 and time.monotonic() - begin < 30 # skipped, without a kernel

    loose = records.load_record(run.folder); assert (run.folder/'report.html').exists()
    assert sweep.main([str(path), '--pack']) == 0 and not [f for f in run.folder.iterdir() if f.suffix in ('.jsonl', '.html')]
    tight = records.load_record(run.folder)
    assert (tight.result, tight.history, tight.control) == (loose.result, loose.history, loose.control)
    assert study.main([x for k, v in run.params.items() for x in ('-p', k, str(v))]) == 0 and (run.folder/'report.html').exists() # drawn again

# --- Ray ---

without_kernel = '''
import os, sys, time
from ipo_nb import study, sweep
judge = study.Study.judge
def slowly(self, prompts, rows): time.sleep(.1); return judge(self, prompts, rows)
study.Study.judge = slowly # journals come home once a second
def run(params, out=None):
    with open({where!r}, 'a') as f: f.write('begun\\n')
    s = study.open_study(params); s.describe(); s.search(); s.run_control(); s.finish(); return out
study.run_notebook = run
sys.exit(sweep.child())
'''

@pytest.fixture
def cluster():
    "Two nodes of one core on this machine."
    ray = pytest.importorskip('ray', reason='Ray is an extra: pip install ipo_nb[ray]')
    from ray.cluster_utils import Cluster
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    small = dict(num_cpus=1, object_store_memory=80*2**20)
    c = Cluster()
    try:
        c.add_node(include_dashboard=False, **small); c.second = c.add_node(**small)
        ray.init(c.address, logging_level='ERROR', log_to_driver=False)
    except Exception as e: # Ray gives a node 30 seconds to start, and says so with a plain Exception
        c.shutdown()
        if 'timed out' not in str(e): raise
        pytest.skip('this machine is too busy: a Ray node did not start within its 30 seconds')
    yield c
    ray.shutdown(); c.shutdown()

def test_a_node_is_killed_in_mid_sweep(tmp_path, cluster):
    path = spec(tmp_path, 'grid: {dataset: [mini_aerial], seed: [1, 2]}', steps=100)
    runs, code = sweep.look_all(sweep.load_sweep(path)[1], from_afar=True), without_kernel.format(where=str(tmp_path/'begun'))
    at = []
    def kill():
        until(lambda: all(sweep.steps_done(r) > 3 for r in runs))
        at.extend(map(sweep.steps_done, runs)); cluster.remove_node(cluster.second, allow_graceful=False)
    killer = threading.Thread(target=kill); killer.start()
    sweep.run_on_ray(runs, cluster.address, argv=lambda r: [sys.executable, '-c', code, *sweep.command(r)[3:]])
    killer.join()
    assert [r.state for r in runs] == ['done', 'done'], [r.why for r in runs]
    assert max(at) < 100 and len((tmp_path/'begun').read_text().split()) == 3 # two began, and one of them again
    for r in runs:
        whole = study.open_study(r.params | dict(out_dir=str(tmp_path/'whole')))
        whole.describe(); whole.search(); whole.run_control(); whole.finish()
        home, alone = sweep.files_of(r.folder), sweep.files_of(whole.folder)
        assert home['result.json'] == alone['result.json'] and home.keys() == alone.keys()
        assert 'out_dir' not in json.loads(home['config.json']) and r.log.exists()
    assert [r.state for r in sweep.look_all([r.params for r in runs])] == ['finished', 'finished']

def test_a_cluster_that_goes_away_leaves_a_reason_and_the_steps(tmp_path):
    ray = pytest.importorskip('ray', reason='Ray is an extra: pip install ipo_nb[ray]')
    def gone(*a, **kw): raise ray.exceptions.ActorUnavailableError('the node is gone', b'0'*16)
    run, = sweep.look_all(sweep.load_sweep(spec(tmp_path, 'grid: {dataset: [mini_aerial]}'))[1])
    sweep._wait(SimpleNamespace(wait=gone, exceptions=ray.exceptions), lambda: None, None, run, threading.Event())
    assert run.state == 'failed' and run.why.startswith('Ray lost it (ActorUnavailableError)')

@pytest.mark.parametrize('address, sentence', [('127.0.0.1:1', 'there is no Ray cluster at 127.0.0.1:1'), ('nowhere', 'there is no Ray cluster at nowhere')])
def test_no_cluster_is_one_sentence(tmp_path, capsys, address, sentence):
    pytest.importorskip('ray', reason='Ray is an extra: pip install ipo_nb[ray]')
    assert sweep.main([str(spec(tmp_path, 'grid: {dataset: [mini_aerial]}')), '--ray', address]) == 1
    assert sentence in capsys.readouterr().err

def test_without_ray_one_is_told_how_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', None)
    assert sweep.main([str(spec(tmp_path, 'grid: {dataset: [mini_aerial]}')), '--ray']) == 1
    assert "pip install 'ipo_nb[ray]'" in capsys.readouterr().err

def test_a_run_for_a_gpu_elsewhere_has_the_name_that_it_will_have_there(tmp_path):
    params = quick | dict(dataset='mini_aerial', device='cuda', out_dir=str(tmp_path))
    afar, = sweep.look_all([params], from_afar=True)
    assert afar.state == 'to do' and afar.folder == sweep.look(1, params | dict(device='cpu', precision='fp16')).folder
    sent = sweep._sent(afar)
    assert sweep._on_gpu(afar) and (sent['device'], sent['precision']) == ('cuda', 'fp16')
