"The stream of image features: killed, damaged, and large."
import os
import signal
import subprocess
import sys
import textwrap
import numpy as np
import pytest
import torch
from PIL import Image
from test_scorer import tiny
from ipo_nb import scorer
from ipo_nb.core import IpoError
from ipo_nb.data import FileImage
from ipo_nb.scorer import Features, image_features, predict

PRELUDE = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n" + textwrap.dedent("""
    import os, resource, signal, torch
    torch.set_num_threads(1)
    from PIL import Image
    from ipo_nb import scorer
    from test_scorer import tiny
    clip = tiny()
    """)

def python(code, *args):
    code = PRELUDE + textwrap.dedent(code)
    return subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True)

@pytest.fixture
def photos(tmp_path):
    "Twenty files."
    (tmp_path/'photos').mkdir()
    for i in range(20): Image.fromarray(np.full((40, 50, 3), 12*i, np.uint8)).save(tmp_path/'photos'/f'{i:02}.png')
    return [FileImage(str(p), p.name) for p in sorted((tmp_path/'photos').iterdir())]

@pytest.fixture
def small(monkeypatch):
    "Shards of four images, tensors up to eight."
    monkeypatch.setattr(scorer, 'SHARD', 4)
    monkeypatch.setattr(scorer, 'WHOLE', 8)

def counted(clip, monkeypatch):
    calls, real = [], clip.model.encode_image
    monkeypatch.setattr(clip.model, 'encode_image', lambda x: calls.append(len(x)) or real(x))
    return calls

@pytest.mark.parametrize('workers', [0, 2])
def test_shards_are_the_features_of_the_whole(photos, small, tmp_path, workers):
    clip = tiny()
    whole = image_features(clip, photos, False)
    got = image_features(clip, photos, tmp_path/'cache', workers)
    assert isinstance(got, Features) and got.shape == whole.shape and len(list((tmp_path/'cache').iterdir())) == 5
    assert torch.equal(got[:], whole)
    found = [predict(clip, ['a <CLASS>', '<CLASS>'], ['cat', 'dog', 'emu'], f, chunk=3) for f in (got, whole)]
    assert torch.equal(*found)
    scores = [scorer.score(clip, ['a <CLASS>'], ['cat', 'dog'], f, [0, 1]*10) for f in (got, whole)]
    assert scores[0] == scores[1]
    assert torch.equal(image_features(clip, photos[:8], tmp_path/'cache'), whole[:8]) # a set of two shards, both known

def test_a_set_of_one_shard_is_one_file_and_a_tensor(photos, tmp_path):
    got = image_features(tiny(), photos, tmp_path/'cache')
    assert type(got) is torch.Tensor and len(list((tmp_path/'cache').iterdir())) == 1

@pytest.mark.parametrize('workers', [0, 2])
def test_a_killed_pass_goes_on_at_the_first_missing_shard(photos, small, tmp_path, monkeypatch, workers):
    done = python("""
        folder, cache, workers = sys.argv[1:]
        from ipo_nb.data import FileImage
        scorer.SHARD, scorer.WHOLE, seen, real = 4, 8, [], clip.model.encode_image
        def encode(x):
            seen.append(1)
            if len(seen) == 4: os.kill(os.getpid(), signal.SIGKILL) # in the fourth shard
            return real(x)
        clip.model.encode_image = encode
        images = [FileImage(f'{folder}/{n}', n) for n in sorted(os.listdir(folder))]
        scorer.image_features(clip, images, cache, int(workers))
        """, tmp_path/'photos', tmp_path/'cache', workers)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list((tmp_path/'cache').glob('*.safetensors'))) == 3
    clip = tiny()
    whole, calls = image_features(clip, photos, False), counted(clip, monkeypatch)
    assert torch.equal(image_features(clip, photos, tmp_path/'cache', workers)[:], whole) and calls == [4, 4]

def test_a_damaged_shard_alone_is_computed_again(photos, small, tmp_path, monkeypatch):
    clip, cache = tiny(), tmp_path/'cache'
    first = image_features(clip, photos, cache)
    whole, file = first[:], first.files[2]
    good, calls = file.read_bytes(), counted(clip, monkeypatch)
    for damage in (b'', good[:30], good[:-5], good[:-200] + b'\0'*200, b'nonsense'*99):
        file.write_bytes(damage)
        assert torch.equal(image_features(clip, photos, cache)[:], whole) and file.read_bytes() == good
    assert calls == [4]*5

def test_a_changed_file_costs_one_shard(photos, small, tmp_path, monkeypatch):
    clip, cache = tiny(), tmp_path/'cache'
    before, calls = image_features(clip, photos, cache)[:], counted(clip, monkeypatch)
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (40, 50, 3), np.uint8)).save(photos[9].path)
    after = image_features(clip, photos, cache)[:]
    assert calls == [4] and [i for i in range(20) if not torch.equal(before[i], after[i])] == [9]

@pytest.mark.parametrize('workers', [0, 2])
def test_one_damaged_image_is_named_and_finished_shards_stay(photos, small, tmp_path, workers):
    path = photos[13].path
    open(path, 'wb').write(b'no picture')
    with pytest.raises(IpoError, match='13.png') as e: image_features(tiny(), photos, tmp_path/'cache', workers)
    assert '\n' not in str(e.value) and 'Traceback' not in str(e.value)
    assert len(list((tmp_path/'cache').glob('*.safetensors'))) == 3

def test_a_decoding_process_that_is_killed_ends_in_a_sentence(tmp_path):
    class Bomb:
        key = 'bomb'
        def sha(self): return 'bomb'
        def open(self): os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(IpoError, match='workers=0'): image_features(tiny(), [Bomb()]*20, False, workers=1)

MEMORY = """
    n, cache, workers = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    class Drawn:
        def __init__(self, i): self.i, self.key = i, str(i)
        def sha(self): return self.key
        def open(self): return Image.new('RGB', (256, 256), (self.i % 251, self.i % 241, self.i % 239))
    scorer.SHARD, scorer.WHOLE = 256, 256
    feats = scorer.image_features(clip, [Drawn(i) for i in range(n)], cache, workers)
    for part in feats.split(100): part.sum()
    scorer.predict(clip, ['a <CLASS>'], ['cat', 'dog'], feats)
    print(*(resource.getrusage(w).ru_maxrss//1024 for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
    """

@pytest.mark.parametrize('workers', [0, 2])
def test_memory_does_not_grow_with_the_number_of_images(tmp_path, workers):
    "Pixels of the 3,000 further images would be 36 MB after the transform and 590 MB before it."
    few, many = (python(MEMORY, n, tmp_path/str(n), workers) for n in (1000, 4000))
    assert not few.returncode and not many.returncode, few.stderr + many.stderr
    few, many = (list(map(int, r.stdout.split())) for r in (few, many))
    assert max(b - a for a, b in zip(few, many)) < 12, (few, many)
