"""kill -9 at random moments, inside journal writes too.

The finished search is the uninterrupted one, and no call is paid twice but the one in flight.
"""
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
import pytest
import torch
from ipo_nb import core, study
from ipo_nb import llm as L
from ipo_nb import optimizer as O
from ipo_nb.core import IpoError, Score, sha
from ipo_nb.evidence import report

STEPS = 12

@pytest.fixture(scope='module', autouse=True)
def no_shared_lock():
    "tqdm shares a lock between forked processes, which a killed child would keep for ever: an accident of these tests."
    core.tqdm.monitor_interval = 0
    core.tqdm.set_lock(threading.RLock())

WORDS = 'warm cold old new red plain soft'.split()

def candidate(rng): return f"<INS>{' '.join(rng.choices(WORDS, k=4))} <CLASS>.</INS>"

def search(folder, pace=.004):
    "A search whose optimizer writes each paid call into a list of its own, as a server would."
    def answers(message):
        with open(folder/'paid', 'a') as f: f.write(sha(message)[:16] + '\n')
        time.sleep(pace*random.random())
        rng = random.Random(message)
        return [candidate(rng) for _ in range(3)]
    def score(prompts):
        time.sleep(pace*random.random())
        return [Score.make(10/len(p), len(set(p))) for p in prompts]
    llm = L.Recorded(L.load_llm('mock', answers=answers), L.Calls(folder/'calls.jsonl'))
    return O.Search(llm, score, folder/'history.jsonl', ['river'], ['green and brown'],
                    rules=[O.after('steps', STEPS)], candidates=3)

def result(s, why):
    scores = [(p, x.loss, x.accuracy, x.step) for p, x in s.scored.items()]
    return json.dumps([s.summary(why), s.shown(), scores]).encode()

def in_child(work, silent=(2,)):
    "Do something in a child that ends with os._exit, or by a signal. Its number."
    pid = os.fork()
    if pid: return pid
    for fd in silent: os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
    try:
        work()
        os._exit(0)
    except BaseException: os._exit(1)

def ended(pid):
    "Wait for a child; its status. Whatever it was that ended it, it was not a mistake."
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return status

def child(folder, limit=None):
    "Run the search in a child; at most `limit` bytes fit into a file."
    def work():
        random.seed(os.getpid())
        if limit:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL) # the write that goes beyond the limit is cut there and kills
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        search(folder).run()
    return in_child(work)

def check(folder, whole, kills):
    s = search(folder, 0)
    assert result(s, s.run()) == whole
    assert all(json.loads(line) for line in (folder/'history.jsonl').read_text().splitlines())
    paid = Counter((folder/'paid').read_text().split())
    assert len(paid) == STEPS and sum(paid.values()) <= STEPS + kills # a kill costs no more than the call in flight

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole')
    s = search(folder, 0)
    return result(s, s.run()), (folder/'history.jsonl').read_bytes(), (folder/'calls.jsonl').read_bytes()

def test_killed_at_random_moments(tmp_path, whole):
    rng, kills, rounds = random.Random(4), 0, 0
    while kills < 40:
        folder, mine, rounds = tmp_path/str(rounds), 0, rounds + 1
        folder.mkdir()
        for _ in range(8): # up to eight kills of one and the same search
            pid = child(folder)
            time.sleep(rng.uniform(.002, .08))
            os.kill(pid, signal.SIGKILL)
            killed = os.WIFSIGNALED(ended(pid))
            mine += killed
            if not killed: break
        check(folder, whole[0], mine)
        kills += mine
    assert kills >= 40

def test_killed_inside_a_write(tmp_path, whole):
    rng, longest = random.Random(5), max(map(len, whole[1:]))
    for i in range(30):
        folder = tmp_path/str(i)
        folder.mkdir()
        status = os.waitpid(child(folder, rng.randrange(1, longest)), 0)[1]
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXFSZ
        check(folder, whole[0], 1)

def test_cut_at_every_byte_of_the_last_lines(tmp_path, whole):
    "Whatever a kill leaves of the two journals, what follows is the same."
    lines = [b.splitlines(keepends=True) for b in whole[1:]]
    for cut in range(0, len(lines[0][-1]), 40):
        for name, (*before, last) in zip(('history.jsonl', 'calls.jsonl'), lines):
            (tmp_path/name).write_bytes(b''.join(before) + last[:cut])
        (tmp_path/'paid').write_text('')
        s = search(tmp_path, 0)
        assert result(s, s.run()) == whole[0] and len((tmp_path/'paid').read_text().split()) <= 1

def test_a_journal_of_another_configuration(tmp_path, whole):
    (tmp_path/'history.jsonl').write_bytes(whole[1])
    s = search(tmp_path, 0)
    with pytest.raises(IpoError, match='another configuration'):
        O.Search(s.llm, s.score, s.journal, ['river'], ['blue and white'], candidates=3)

# --- whole runs: data, descriptions, search, control, evaluation, record

def small(folder, steps=12):
    return dict(dataset='mini_aerial', llm='random', steps=steps, candidates=3, out_dir=str(folder))

def complete(folder, steps=12):
    "The stages of `run_dataset.ipynb` on a small study; its figures are drawn from the record and left out."
    torch.set_num_threads(1)
    s = study.open_study(small(folder, steps))
    s.finish()
    return s.folder

def kill_one(folder, after):
    "A whole run in a child, killed after so many seconds; was it killed before it ended?"
    pid = in_child(lambda: complete(folder), silent=(1, 2))
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(ended(pid))

def test_whole_runs_killed_at_random_moments(tmp_path, monkeypatch):
    monkeypatch.setattr(report, 'write_report', lambda *_: None)
    complete(tmp_path/'warm') # image features into the cache, imports
    start = time.perf_counter()
    whole = (complete(tmp_path/'whole')/'result.json').read_bytes()
    long = time.perf_counter() - start
    rng, kills, stages, rounds = random.Random(6), 0, set(), 0
    # a busy machine hits other moments than a quiet one
    while kills < 8 or not stages >= {'history.jsonl', 'descriptions.json'}:
        rounds += 1
        assert rounds <= 12, (kills, stages)
        folder = tmp_path/str(rounds)
        for _ in range(3):
            killed = kill_one(folder, rng.uniform(.1, .9)*long)
            kills += killed
            if not killed: long *= .7
            stages |= {p.name for p in folder.glob('*/*/*')}
        assert (complete(folder)/'result.json').read_bytes() == whole
        assert not list(folder.glob('*/*/*.tmp'))

def test_ctrl_c_and_a_second_process(tmp_path, monkeypatch):
    "A real ipo_run: this process is refused the same run; Ctrl-C ends it with a sentence; what follows is the same."
    monkeypatch.setattr(report, 'write_report', lambda *_: None)
    params = small(tmp_path/'cut', 60)
    command = [Path(sys.executable).parent/'ipo_run']
    for name, value in params.items(): command += ['-p', name, str(value)]
    p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    def lines(): return sum(f.read_bytes().count(b'\n') for f in tmp_path.glob('cut/*/*/history.jsonl'))
    try:
        deadline = time.time() + 240
        while lines() < 3 and p.poll() is None and time.time() < deadline: time.sleep(.01)
        said = 'another process is working on this very run'
        with pytest.raises(IpoError, match=said): study.open_study(params)
    finally: os.killpg(p.pid, signal.SIGINT)
    said = p.communicate(timeout=120)[0]
    assert p.returncode == 130 and 'Traceback' not in said, said[-2000:]
    assert 'ipo_run: interrupted; steps that were finished are kept' in said
    assert 3 <= lines() <= 61 and not list(tmp_path.glob('cut/*/*/result.json'))
    results = [complete(tmp_path/folder, 60)/'result.json' for folder in ('cut', 'whole')]
    assert results[0].read_bytes() == results[1].read_bytes()
