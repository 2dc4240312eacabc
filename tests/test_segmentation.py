"Segmentation against arithmetic by hand, towers that it must refuse, and files of VOC that are not as they should be."
import json
from dataclasses import asdict
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg
from PIL import Image
import ipo_nb.paper.segmentation as seg
from ipo_nb.core import DEFAULT_PROMPT, IpoError, cards_dir
from ipo_nb.evidence.records import made_up_record
from ipo_nb.miniworld import GENERATOR, TEXTURES, class_names, render
from ipo_nb.paper.segmentation import (
    IGNORE,
    METRICS,
    PATHS,
    MiniScenes,
    Segmented,
    VocScenes,
    class_logits,
    dense_features,
    printed_segmenters,
    seg_compare,
    seg_intervals,
    seg_metrics,
    seg_sentences,
    segment,
    segment_all,
)
from ipo_nb.scorer import Clip, load_clip, predict, text_features

def tiny(custom=False, precision='fp32', **vision):
    torch.manual_seed(3)
    vision = dict(image_size=32, patch_size=8, width=32, layers=2, head_width=8) | vision
    make = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    m = make(embed_dim=24, vision_cfg=vision, text_cfg=dict(width=32, heads=2, layers=1))
    m.visual.preprocess_cfg = asdict(PreprocessCfg(size=32))
    if precision == 'bf16': m = m.bfloat16()
    return Clip('tiny', m.eval().requires_grad_(False), open_clip.get_tokenizer('ViT-B-16'), precision=precision)

def classes_in(mask): return set(np.unique(mask).tolist()) - {IGNORE}

def norm(x, ln): return (x - x.mean())/np.sqrt(x.var() + ln.eps)*ln.weight.numpy() + ln.bias.numpy()

def by_hand(clip, tokens, i, path):
    "The feature of patch `i` from the weights alone, in numpy, a vector at a time."
    def w(t): return t.numpy().astype(np.float64)
    v, tokens = clip.model.visual, w(tokens)
    b = v.transformer.resblocks[-1]
    value = w(b.attn.in_proj_weight)[-32:] @ norm(tokens[i+1], b.ln_1) + w(b.attn.in_proj_bias)[-32:]
    z = w(b.attn.out_proj.weight) @ value + w(b.attn.out_proj.bias)
    if path != 'value':
        z = z + tokens[i+1 if path == 'self' else 0]
        hidden = w(b.mlp.c_fc.weight) @ norm(z, b.ln_2) + w(b.mlp.c_fc.bias)
        z = z + w(b.mlp.c_proj.weight) @ F.gelu(torch.tensor(hidden)).numpy() + w(b.mlp.c_proj.bias)
    f = norm(z, v.ln_post) @ w(v.proj)
    return f/np.linalg.norm(f)

@pytest.mark.parametrize('path', [p for p in PATHS if p != 'pooled'])
@pytest.mark.parametrize('kw', [dict(), dict(layers=1), dict(custom=True), dict(head_width=32)], ids=str)
def test_dense_features_equal_a_hand_computation(path, kw):
    clip, x = tiny(**kw), torch.randn(2, 3, 32, 32)
    v = clip.model.visual
    for p in v.parameters(): p.add_(.05*torch.randn_like(p)) # biases that are not zero
    tokens = v._embeds(x)
    for block in v.transformer.resblocks[:-1]: tokens = block(tokens)
    found = dense_features(clip, x, path)
    for b, i in ((0, 0), (1, 6), (1, 15)):
        wanted = by_hand(clip, tokens[b], i, path)
        assert np.abs(wanted - found[b, :, i//4, i%4].numpy()).max() < 1e-5

def test_layer_scale_and_precision():
    x = torch.randn(1, 3, 32, 32)
    scaled = dense_features(tiny(ls_init_value=.1), x, 'token')
    assert not torch.allclose(scaled, dense_features(tiny(), x, 'token'))
    assert (dense_features(tiny(precision='bf16'), x)*dense_features(tiny(), x)).sum(1).min() > .99

def test_the_tower_is_left_as_it_was():
    clip, x = tiny(), torch.randn(1, 3, 32, 32)
    before = clip.model.encode_image(x)
    dense_features(clip, x)
    assert not clip.model.visual.transformer.resblocks[-1]._forward_pre_hooks
    assert torch.equal(clip.model.encode_image(x), before)

@pytest.mark.parametrize('kw, words', [
    (dict(layers=[1, 1, 1, 1], width=8, head_width=8), 'ModifiedResNet'),
    (dict(pool_type='avg'), 'pools in another way'),
    (dict(attentional_pool=True, attn_pooler_heads=2), 'pools in another way'),
    (dict(qk_norm=True), 'blocks of its own')])
def test_towers_that_are_refused(kw, words):
    with pytest.raises(IpoError, match=words) as e: dense_features(tiny(**kw), torch.randn(1, 3, 32, 32))
    assert '\n' not in str(e.value) and 'mini, ViT-B-16/openai' in str(e.value)

COLOURS = [(200, 30, 30), (30, 160, 40), (40, 60, 220), (230, 220, 60)]

@pytest.mark.parametrize('path', PATHS)
def test_each_pixel_gets_the_class_of_its_place(path):
    "Texts that are the tower's own features of plain colours find these where they are, in an image that is no square."
    clip = tiny()
    clip.model.visual.positional_embedding.mul_(.05)
    plain = torch.stack([seg._scaled(clip, Image.new('RGB', (32, 32), c), 32) for c in COLOURS])
    texts = F.normalize(dense_features(clip, plain, path).mean((2, 3)), dim=-1)[None]
    truth = np.zeros((96, 160), np.uint8)
    truth[:40, 100:], truth[40:, :60], truth[40:, 60:] = 1, 2, 3
    image = Image.fromarray(np.array(COLOURS, np.uint8)[truth])
    found, = segment(clip, image, None, None, path, 96, 8 if path == 'pooled' else 16, texts)
    assert found.shape == truth.shape and (found == truth).mean() > .75
    for y, x, c in ((5, 5, 0), (5, 155, 1), (90, 5, 2), (90, 155, 3)): assert found[y, x] == c

def test_logits_are_averaged_over_windows_and_reach_the_edge():
    clip, texts = tiny(), F.normalize(torch.randn(2, 3, 24), dim=-1)
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (33, 70, 3), np.uint8))
    logits = class_logits(clip, image, texts, 'value', 32)
    assert logits.shape == (2, 3, 32, 68) and logits.isfinite().all()
    assert torch.allclose(logits, class_logits(clip, image, texts, 'value', 32, batch=1), atol=1e-4)
    one = class_logits(clip, image, texts[1:], 'value', 32)
    assert torch.allclose(logits[1:], one, atol=1e-4)
    flat = class_logits(clip, Image.new('RGB', (64, 32), 'red'), texts, 'pooled', 32)
    assert torch.allclose(flat, flat[..., :1, :1].expand_as(flat), atol=1e-4) # windows that agree

def test_pooled_windows_name_a_scene_of_one_texture():
    "Right on most pixels where the classifier of images is right, and with its answer."
    mini, names = load_clip('mini', 'cpu', 'fp32'), class_names('mini_textures')
    shown = [Image.fromarray(render('mini_textures', 'test', i)) for i in range(24)]
    texts = text_features(mini, [DEFAULT_PROMPT], names)
    feats = F.normalize(mini.model.encode_image(torch.stack([mini.preprocess(x) for x in shown])), dim=-1)
    answers = predict(mini, [DEFAULT_PROMPT], names, feats)[0].tolist()
    found = [segment(mini, x, None, None, 'pooled', texts=texts)[0] for x in shown]
    assert all((f == a).all() for f, a in zip(found, answers))
    assert sum((f == i).mean() > .5 for i, f in enumerate(found)) >= 12

def test_masks_are_exact(monkeypatch):
    "With textures that are one flat colour, each region of the mask is that colour to its last pixel."
    for name in TEXTURES: monkeypatch.setitem(TEXTURES, name, lambda u, v, r: np.zeros(u.shape, int))
    for shot in MiniScenes(n=8):
        image = np.asarray(shot.image).astype(int)
        for c in classes_in(shot.mask):
            region = image[shot.mask == c]
            inner = np.clip(region, 8, 247)
            middle = (inner.min(0) + inner.max(0))/2
            assert (np.abs(region - middle) <= 15).all(), (shot.key, c)
        assert .001 < (shot.mask == IGNORE).mean() < .03

@pytest.mark.parametrize('k', range(0, 20, 4))
def test_silhouettes_are_exact(k):
    "Sample by sample: outside of a silhouette is the quarter's plain ground and nothing else, inside there is a thing."
    rgb, labels = seg._things([k, k+1, k+2, k+3], class_names('mini_objects'), seg.Rnd('silhouettes', k))
    for q, (x, y) in enumerate([(0, 0), (0, 192), (192, 0), (192, 192)]):
        colours, label = rgb[y:y+192, x:x+192], labels[y:y+192, x:x+192]
        inside = label != IGNORE
        ground = np.unique(colours[~inside], axis=0)
        assert classes_in(label) == {k+q} and len(ground) == 1 and .02 < inside.mean() < .6
        assert (colours[inside] != ground).any(-1).mean() > .3

def test_scenes_show_each_class_equally_often():
    seen = sum((sorted(classes_in(shot.mask)) for shot in MiniScenes()), [])
    assert np.bincount(seen).tolist() == [10]*24

def voc_mask(k, width, height):
    mask = np.zeros((height, width), np.uint8)
    mask[5:20, 5:20], mask[20:30, 5:20], mask[5, 5] = 1 + k, 20 - k, 255
    return mask

@pytest.fixture
def voc(tmp_path):
    base = tmp_path/'VOCdevkit'/'VOC2012'
    for d in ('ImageSets/Segmentation', 'JPEGImages', 'SegmentationClass'): (base/d).mkdir(parents=True)
    rng, sizes = np.random.RandomState(0), {'2007_000033': (50, 40), '2007_000042': (40, 60), '2008_000001': (32, 32)}
    (base/'ImageSets/Segmentation/val.txt').write_text('\n'.join(sizes) + '\n')
    for k, (name, size) in enumerate(sizes.items()):
        mask = voc_mask(k, *size)
        m = Image.fromarray(mask).convert('P')
        m.putpalette(rng.randint(0, 255, 768).astype(np.uint8).tobytes())
        m.putdata(mask.ravel().tolist())
        m.save(base/'SegmentationClass'/f'{name}.png')
        Image.fromarray(rng.randint(0, 255, (*mask.shape, 3), np.uint8)).save(base/'JPEGImages'/f'{name}.jpg')
    return tmp_path

def test_voc_is_read(voc):
    scenes = VocScenes(voc)
    assert len(scenes) == 3 and len(VocScenes(voc, n=2)) == 2 and len(scenes.names) == 20
    shot = scenes[1]
    def named(y, x): return scenes.names[shot.mask[y, x]]
    assert shot.key == '2007_000042' and shot.image.size == (40, 60) and shot.mask.shape == (60, 40)
    assert shot.mask[0, 0] == IGNORE and shot.mask[5, 5] == IGNORE
    assert named(10, 10) == 'bicycle' and named(25, 10) == 'train'
    unseen = [scenes.names[i] for i in scenes.unseen]
    assert unseen == ['potted plant', 'sheep', 'sofa', 'train', 'tv monitor'] and scenes.seen == list(range(15))

def test_voc_is_segmented(voc):
    a, b = segment_all(tiny(), VocScenes(voc), {'default prompt': DEFAULT_PROMPT, 'other': 'a <CLASS>.'}, side=32)
    assert a.counts.shape == (3, 20, 20) and a.counts.sum((1, 2)).tolist() == [15*15 - 1 + 10*15]*3
    assert set(a.metrics) == set(METRICS) and set(seg_compare(a, b)) == set(METRICS)

@pytest.mark.parametrize('damage, words', [
    ('image', 'cannot be read'), ('size', 'its mask 9x9 pixels'), ('number', 'holds the number 77'),
    ('lists', 'is not under'), ('gone', 'cannot be read')])
def test_damaged_voc_ends_in_one_sentence(voc, damage, words):
    base = voc/'VOCdevkit'/'VOC2012'
    mask = base/'SegmentationClass'/'2007_000033.png'
    if damage == 'image': (base/'JPEGImages'/'2007_000033.jpg').write_bytes(b'no image')
    if damage == 'size': Image.new('L', (9, 9)).save(mask)
    if damage == 'number': Image.new('L', (50, 40), 77).save(mask)
    if damage == 'lists': (base/'ImageSets/Segmentation/val.txt').unlink()
    if damage == 'gone': mask.unlink()
    with pytest.raises(IpoError, match=words) as e: VocScenes(voc)[0]
    assert '\n' not in str(e.value)

def test_metrics_by_hand():
    "Three classes of 100, 50 and 0 pixels, and the unseen one is found where it is not."
    counts = np.array([[80, 10, 10], [20, 30, 0], [0, 0, 0]])
    m = seg_metrics(counts, [0, 1], [2])
    assert m['pAcc'] == pytest.approx(100*110/150) and m['mIoU_seen'] == pytest.approx(50*(80/120 + 30/60))
    assert m['mIoU_unseen'] == 0 and m['hIoU'] == 0
    absent = np.diag([5, 5, 0, 5]) # class 2 is neither there nor found
    assert seg_metrics(absent, [0, 1], [2, 3])['mIoU_unseen'] == 100

def test_intervals_hold_the_truth():
    "The interval covers the metric of the world that images are drawn from about as often as it says."
    rng, hits = np.random.RandomState(1), 0
    for _ in range(60):
        right = rng.binomial(100, rng.beta(6, 3, 50)) # images differ, their mean is 2/3
        counts = np.array([[[k, 100-k], [0, 0]] for k in right])
        lo, hi = seg_intervals(Segmented('x', 'x', [0], [1], counts))['pAcc']
        hits += lo < 100*2/3 < hi
    assert hits >= 51

def test_two_draws_of_one_result_are_the_same():
    "Pairs share their resamples, so the interval of a difference is narrower than those of its parts."
    rng = np.random.RandomState(2)
    hard = rng.beta(6, 3, 80) # some images are easy for both
    def result(more): return np.array([[[k, 100-k], [0, 0]] for k in rng.binomial(100, (hard + more).clip(0, 1))])
    a, b = (Segmented(n, n, [0], [1], result(more)) for n, more in (('a', .02), ('b', 0)))
    def width(interval): return interval[1] - interval[0]
    assert width(seg_compare(a, b)['pAcc']['interval']) < width(seg_intervals(a)['pAcc'])/2
    again = Segmented('a', 'a', [0], [1], a.counts)
    assert seg_intervals(a) == seg_intervals(again)

def test_the_committed_record_is_of_these_scenes():
    record = json.loads((cards_dir()/'records'/'segmentation'/'mini_scenes.json').read_text())
    mini = load_clip('mini', 'cpu', 'fp32')
    assert record['clip']['weights_sha256'] == mini.weights[1] and 'stand-in' in record['note']
    for name, facts in record['scenes'].items():
        assert facts['generator'] == GENERATOR and facts['sha'] == seg.scenes_sha(MiniScenes(name, facts['images']))
    for r in record['rows']:
        for k in METRICS: assert 0 <= r['intervals'][k][0] <= r['intervals'][k][1] <= 100
    for said in seg_sentences(record): assert 'against the default prompt (hIoU' in said

def test_command(tmp_path, capsys):
    seg.main(scenes='mini_objects', n=2, path='value', prompts='my <CLASS>', out=str(tmp_path/'x.json'))
    rows = json.loads((tmp_path/'x.json').read_text())['rows']
    assert [r['name'] for r in rows][:2] == ['default prompt', 'hand-written template']
    assert rows[-1]['prompt'] == 'my <CLASS>'
    assert '![mini&#95;objects' in (tmp_path/'x.md').read_text()
    assert Image.open(tmp_path/'x_mini_objects.png').size[0] > 1000
    assert 'a photo of a &lt;CLASS&gt;.' in capsys.readouterr().out

@pytest.mark.parametrize('kw, words', [
    (dict(scenes='voc'), 'needs data_root'), (dict(scenes='mini_object'), "did you mean 'mini_objects'"),
    (dict(path='vlaue'), "did you mean 'value'"), (dict(side=10), 'smaller than the 96'),
    (dict(prompts='no placeholder'), '0 times'), (dict(runs='nowhere'), 'no finished run')])
def test_mistakes_of_the_command(kw, words):
    with pytest.raises(SystemExit, match=words) as e: seg.main(**dict(n=1) | kw)
    assert '\n' not in str(e.value.code)

def test_printed_segmenters():
    first = dict(method='Zsseg', pAcc=90., mIoU_seen=83.5, mIoU_unseen=72.5, hIoU=77.5)
    assert printed_segmenters()[0] == first and len(printed_segmenters()) == 4

def test_prompts_of_runs_with_methods_that_have_none(tmp_path):
    folders = [tmp_path/'aaaaaaaa', tmp_path/'bbbbbbbb']
    for f in folders: made_up_record(f)
    result = json.loads((folders[0]/'result.json').read_text())
    result['settings']['seed'] = 7
    first = result['methods'][0]
    for name, prompt in (('vectors', None), ('words', 'no placeholder')):
        result['methods'].append(first | dict(name=name, prompt=prompt))
    (folders[0]/'result.json').write_text(json.dumps(result))
    found = seg.run_prompts(folders)
    assert list(found) == ['default prompt', 'hand-written template', 'IPO (seed 7)', 'random control (seed 7)']
    assert all('<CLASS>' in p for p in found.values())
