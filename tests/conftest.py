import os
from pathlib import Path
import pytest

shared = Path(__file__).resolve().parent.parent.parent/'shared' # material for development and CI, not for users
os.environ.setdefault('MPLBACKEND', 'agg')
os.environ.setdefault('OMP_NUM_THREADS', '1') # one thread a process: pytest starts several

@pytest.fixture(scope='session')
def real():
    "Real photographs and a stand-in CLIP, where a developer has them."
    if not (shared/'real'/'data').exists(): pytest.skip('the real photographs are not beside this checkout (../shared/real)')
    return shared/'real'
