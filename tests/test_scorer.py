"The scorer against open_clip itself, and against damaged or awkward input."
import json
import time
from dataclasses import asdict
import numpy as np
import open_clip
import pytest
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.transform import PreprocessCfg
from PIL import Image
from safetensors.torch import save as to_bytes
from ipo_nb.core import IpoError, Score, fill, models_dir, project_dir, sha
from ipo_nb.scorer import Clip, check_length, image_features, load_clip, predict, score, text_features, token_length

SHARED = project_dir().parent/'shared'/'real'
PROMPTS = ['a photo of a <CLASS>.', 'Identify the unique visual features of the <CLASS> flower accurately.',
           'Take a well-composed photo of a <CLASS> with optimal lighting, focus, and minimal distractions.',
           'a close-up photo of a <CLASS>, a type of flower.', 'Categorize the <CLASS> shown in the image.',
           '<CLASS>', '<CLASS>s', 'non-<CLASS>ish', '!!<CLASS>!!', 'an image with <end_of_text> and a <CLASS>',
           'ünï <CLASS> 🌻']
NAMES = ['rose', 'tiger lily', "bird's nest", "colt's foot", 'café', 'crème brûlée', 'and/or', '<b>bold</b>', 'a < b',
         '&lt;', '"quoted"', 'Jack-in-the-pulpit', '睡蓮', '!']
MINI = models_dir()/'mini'/'open_clip_config.json'
no_mini = pytest.mark.skipif(not MINI.exists(), reason='the mini model is not built')
no_small = pytest.mark.skipif(not (SHARED/'clip_small').exists(), reason='no ../shared/real/clip_small')
MODELS = [pytest.param('mini', marks=no_mini), pytest.param(f'local-dir:{SHARED}/clip_small', marks=no_small)]

def tiny(text={}, custom=False, **kw):
    torch.manual_seed(1)
    text = dict(width=32, heads=2, layers=3) | text
    vision = dict(image_size=32, patch_size=16, width=32, layers=1, head_width=16)
    m = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(embed_dim=24, vision_cfg=vision, text_cfg=text, **kw)
    m.visual.preprocess_cfg = asdict(PreprocessCfg(size=32))
    return Clip('tiny', m.eval().requires_grad_(False), open_clip.get_tokenizer('ViT-B-16'))

class Picture:
    def __init__(self, path): self.path, self.key = path, path.name
    def sha(self): return sha(self.path.read_bytes())
    def open(self): return Image.open(self.path)

@pytest.fixture
def pictures(tmp_path):
    for i in range(6): Image.fromarray(np.full((40, 50, 3), 40*i, np.uint8)).save(tmp_path/f'{i}.png')
    return [Picture(tmp_path/f'{i}.png') for i in range(6)]

def agrees(clip, names=NAMES, prompts=PROMPTS):
    got = text_features(clip, prompts, names)
    for p, t in zip(prompts, got):
        want = open_clip.build_zero_shot_classifier(clip.model, clip.tokenizer, names, [lambda n: fill(p, n)]).T
        assert (t - want).abs().max() < 1e-5, p

@pytest.mark.parametrize('spec', MODELS)
def test_equals_open_clips_classifier(spec):
    clip = load_clip(spec, 'cpu', 'fp32')
    assert clip.causal and clip.describe()['weights_hash_of'] == 'open_clip_model.safetensors'
    agrees(clip)

@pytest.mark.parametrize('kw', [dict(), dict(custom=True), dict(quick_gelu=True), dict(text=dict(ls_init_value=.1)),
    dict(text=dict(pool_type='eos', eos_id=49407)), dict(custom=True, text=dict(proj_bias=True)),
    dict(text=dict(layers=1)), dict(text=dict(act_kwargs={}, norm_kwargs={'eps': 1e-3}))])
def test_fast_way_equals_plain_way(kw):
    clip = tiny(**kw)
    assert clip.causal
    agrees(clip)

@pytest.mark.parametrize('kw', [dict(text=dict(no_causal_mask=True)), dict(custom=True, text=dict(no_causal_mask=True)),
    dict(text=dict(pool_type='last')), dict(text=dict(pool_type='first')), dict(text=dict(qk_norm=True)),
    dict(custom=True, text=dict(embed_cls=True))])
def test_other_towers_take_encode_text(kw, monkeypatch):
    clip, calls = tiny(**kw), []
    assert not clip.causal
    real = clip.model.encode_text
    monkeypatch.setattr(clip.model, 'encode_text', lambda *a, **k: calls.append(1) or real(*a, **k))
    text_features(clip, PROMPTS[:2], NAMES)
    assert calls
    agrees(clip)

def test_hugging_face_text_tower_takes_encode_text():
    from transformers import BertConfig
    clip = tiny(custom=True)
    config = BertConfig(vocab_size=49408, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=64, max_position_embeddings=80)
    tower = HFTextEncoder('', output_dim=24, config=config, pooler_type='mean_pooler', proj_type='linear')
    clip.model.text = tower.eval()
    assert not clip.causal and clip.describe()['text_path'] == 'encode_text'
    agrees(clip)

def test_long_list_of_texts_in_groups():
    clip, names = tiny(), [f'thing {i} {"of many " * (i % 9)}parts' for i in range(150)]
    fast, plain = text_features(clip, PROMPTS, names), text_features(clip, PROMPTS, names, fast=False)
    assert torch.allclose(fast, plain, atol=1e-6)

@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_half_precision_is_near(precision):
    small = SHARED/'clip_small'
    if not small.exists(): pytest.skip('no ../shared/real/clip_small')
    full, half = (load_clip(f'local-dir:{small}', 'cpu', p) for p in ('fp32', precision))
    a, b = (text_features(clip, PROMPTS[:3], NAMES[:3]) for clip in (full, half))
    assert (a*b).sum(-1).min() > .999

def test_overflow_is_refused_by_name():
    clip, long = tiny(), 'very ' * 73 + '<CLASS>'
    assert token_length(clip, long, ['cat']) == 76 and token_length(clip, long, ['cat', 'sea lion']) == 77
    check_length(clip, long, ['cat', 'sea lion'])
    names, feats = ['cat', 'sea lion'], torch.ones(1, 24)
    said = "too long: with class 'sea lion' it has 78 tokens and the model reads 77; shorten it by 1"
    calls = [lambda p: check_length(clip, p, names), lambda p: text_features(clip, ['ok <CLASS>', p], names),
             lambda p: score(clip, [p], names, feats, [0]), lambda p: predict(clip, [p], names, feats)]
    for call in calls:
        with pytest.raises(IpoError, match=said): call('so ' + long)

def test_duplicates_are_encoded_once(monkeypatch):
    clip, seen = tiny(), []
    import ipo_nb.scorer as s
    real = s.text_features
    monkeypatch.setattr(s, 'text_features', lambda c, p, n, **k: seen.extend(p) or real(c, p, n, **k))
    a, b, c = score(clip, ['a <CLASS>', 'b <CLASS>', 'a <CLASS>'], NAMES, torch.randn(5, 24), [0, 1, 2, 3, 4])
    assert a == c and isinstance(b, Score) and seen == ['a <CLASS>', 'b <CLASS>']

def test_features_are_computed_once_and_survive_damage(pictures, tmp_path, monkeypatch, capsys):
    clip, calls, folder = tiny(), [], tmp_path/'cache'
    real = clip.model.encode_image
    monkeypatch.setattr(clip.model, 'encode_image', lambda x: calls.append(len(x)) or real(x))
    first = image_features(clip, pictures, folder)
    for _ in range(3): assert torch.equal(image_features(clip, pictures, folder), first)
    assert calls == [6]
    file, = folder.iterdir()
    whole = file.read_bytes()
    start = len(whole) - first.nbytes # of the vectors, behind the header
    flipped = whole[:start+2] + bytes([whole[start+2] ^ 1]) + whole[start+3:]
    other = to_bytes({'features': first}, dict(made=f'{"0"*64} {"0"*64}'))
    turned, swapped = (whole[:start] + x.numpy().tobytes() for x in (-first, first[[1, 0, 2, 3, 4, 5]]))
    damages = [b'', whole[:50], whole[:-7], b'\0'*len(whole), b'nonsense', flipped, other, turned, swapped]
    for damage in damages:
        file.write_bytes(damage)
        assert torch.equal(image_features(clip, pictures, folder), first) and file.read_bytes() == whole
        assert 'damaged or of an older version: they are made anew' in capsys.readouterr().out
    assert calls == [6]*10
    image_features(clip, pictures[:5], folder)               # other images
    pictures[0].path.write_bytes(pictures[1].path.read_bytes()) # other content under the same name
    assert not torch.equal(image_features(clip, pictures, folder), first) and len(calls) == 12
    changed = image_features(clip, pictures, folder)
    for f in folder.iterdir(): f.write_bytes(whole)             # a file of another key, copied over
    assert torch.equal(image_features(clip, pictures, folder), changed) and capsys.readouterr().out
    assert len(list(folder.iterdir())) == 3

def test_other_weights_have_other_features(pictures, tmp_path):
    a, b = tiny(), tiny(quick_gelu=True)
    assert a.weights == b.weights # the same tensors in another architecture
    assert not torch.equal(image_features(a, pictures, tmp_path/'c'), image_features(b, pictures, tmp_path/'c'))

@pytest.mark.parametrize('content, words', [(b'', 'it is empty or no image'), (b'hello', 'it is empty or no image'),
    ('cut', 'truncated'), (None, 'No such file or directory)')])
def test_unreadable_image_is_named(pictures, content, words):
    path = pictures[2].path
    if content is None: path.unlink()
    else: path.write_bytes(path.read_bytes()[:-30] if content == 'cut' else content)
    for cache in (False, path.parent/'cache'):
        with pytest.raises(IpoError, match='image 2.png cannot be read') as e: image_features(tiny(), pictures, cache)
        assert words in str(e.value) and '\n' not in str(e.value) and ' at 0x' not in str(e.value)

@pytest.mark.parametrize('spec, words', [('ViT-B16/openai', "did you mean 'ViT-B-16'"),
    ('ViT-B-16/opnai', "did you mean 'openai'"), ('ViT-B-16', 'no weights called'), ('minni', "did you mean 'mini'"),
    ('', 'unknown'), ('local-dir:', 'config'), ('local-dir:no/such', 'does not exist'),
    ('hf-hub:no-such-org/x', 'hub')])
def test_wrong_model_names_end_in_one_sentence(spec, words):
    start = time.time()
    with pytest.raises(IpoError, match=words) as e: load_clip(spec, 'cpu')
    assert '\n' not in str(e.value) and time.time() - start < 15

def test_damaged_checkpoint_ends_in_one_sentence(tmp_path):
    vision = dict(image_size=32, patch_size=16, width=32, layers=1, head_width=16)
    good = dict(embed_dim=8, vision_cfg=vision, text_cfg=dict(width=32, heads=2, layers=1))
    cfg, odd = (json.dumps(dict(model_cfg=c)) for c in (good, good | dict(wat=1)))
    for config, weights in (('{', None), ('{}', None), (cfg, None), (cfg, b'junk'), (odd, b'junk')):
        (tmp_path/'open_clip_config.json').write_text(config)
        if weights: (tmp_path/'open_clip_model.safetensors').write_bytes(weights)
        with pytest.raises(IpoError, match='cannot be loaded') as e: load_clip(f'local-dir:{tmp_path}', 'cpu')
        assert '\n' not in str(e.value)

def test_predict_agrees_with_score():
    clip, feats = tiny(), torch.nn.functional.normalize(torch.randn(50, 24), dim=-1)
    labels = [i % len(NAMES) for i in range(50)]
    found = predict(clip, PROMPTS, NAMES, feats, chunk=7)
    for row, s in zip(found, score(clip, PROMPTS, NAMES, feats, labels, batch=2)):
        assert s.accuracy == round(100 * (row == torch.tensor(labels)).sum().item() / 50, 4)
