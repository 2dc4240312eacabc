"""Cross-cutting checks of the drawn worlds: the same bytes without vector instructions,
and no image of an evaluation split in training."""
import importlib
import os
import subprocess
import sys
import numpy as np
import pytest
from ipo_nb import miniworld as mw

LOOK = 'from ipo_nb.miniworld import golden; print(golden())'

def _golden(**env):
    command, env = [sys.executable, '-c', LOOK], {**os.environ, **env}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip()

def _vector_features():
    try: umath = importlib.import_module('numpy._core._multiarray_umath')
    except ImportError: return ''
    return ' '.join(umath.__cpu_dispatch__)

def test_same_bytes_without_vector_instructions():
    assert _golden(NPY_DISABLE_CPU_FEATURES=_vector_features()) == mw.GENERATOR == mw.golden()

@pytest.mark.parametrize('dataset', mw.MINI)
def test_splits_differ(dataset):
    seen = [mw.render(dataset, s, i).tobytes() for s in mw.SPLITS for i in range(3)]
    assert len(set(seen)) == len(seen)

@pytest.mark.parametrize('dataset', mw.MINI)
def test_every_class_draws(dataset):
    for i,name in enumerate(mw.class_names(dataset)):
        im = mw.render(dataset, 'train', i)
        assert im.shape == (96, 96, 3) and im.dtype == np.uint8 and im.std() > 2, name
