"""What all tests share, and the fast lane: `pytest -m fast`.

`tests/slow.txt` lists what is not in the lane, measured: `pytest --write-lane` runs everything and writes it anew, so
that the quickest tests which together take `LANE` seconds of work stay in. A new test is in the lane until then.
"""
import os
from collections import Counter
from pathlib import Path
import pytest

shared = Path(__file__).resolve().parent.parent.parent/'shared' # material for development and CI, not for users
os.environ.setdefault('MPLBACKEND', 'agg')
os.environ.setdefault('OMP_NUM_THREADS', '1') # one thread a process: pytest starts several

LANE = 120 # seconds of work: with two processes about 60 seconds, and starting them takes some more
slow_list = Path(__file__).with_name('slow.txt')
seconds = Counter() # name of a test -> seconds, as far as it has run

def name_of(nodeid):
    "test_study.py::test_x[1], from wherever pytest was started."
    file, _, test = nodeid.partition('::')
    return f'{Path(file).name}::{test}'

def named(name):
    "A test, the function that it is a case of, its file."
    return {name, name.partition('[')[0], name.partition('::')[0]}

def pytest_addoption(parser):
    parser.addoption('--write-lane', action='store_true', help='measure the tests and write tests/slow.txt anew')

def pytest_collection_modifyitems(items):
    slow = set(slow_list.read_text(encoding='utf-8').splitlines())
    for item in items:
        if not named(name_of(item.nodeid)) & slow: item.add_marker('fast')

def pytest_runtest_logreport(report): seconds[name_of(report.nodeid)] += report.duration

def lane():
    "The slow ones: all but the quickest that fit into the lane."
    spent, slow = 0, []
    for name, s in sorted(seconds.items(), key=lambda x: x[1]):
        spent += s
        if spent > LANE: slow.append(name)
    return slow

def pytest_sessionfinish(session):
    if session.config.getoption('write_lane') and not hasattr(session.config, 'workerinput'):
        slow_list.write_text('\n'.join(sorted(lane())) + '\n', encoding='utf-8')

@pytest.fixture(scope='session')
def real():
    "Real photographs and a stand-in CLIP, where a developer has them."
    if not (shared/'real'/'data').exists():
        pytest.skip('the real photographs are not beside this checkout (../shared/real)')
    return shared/'real'
