"The opened towers against open_clip itself, and training against accidents."
import random
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_scorer import tiny
from ipo_nb.core import IpoError, project_dir, sha
from ipo_nb.data import Item
from ipo_nb.peers.base import (
    TRAINING,
    Damaged,
    Diverged,
    Images,
    Learner,
    Task,
    embed,
    image_forward,
    load_learned,
    save_learned,
    slots,
    text_forward,
    tiny_clip,
)

SHAPES = {
    'CLIP': {},
    'CustomTextCLIP': dict(custom=True),
    'quick gelu': dict(quick_gelu=True),
    'layer scale': dict(text=dict(ls_init_value=.1)),
    'end of text id': dict(text=dict(pool_type='eos')),
    'projection with bias': dict(text=dict(proj_bias=True)),
    'no projection': dict(custom=True, text=dict(proj_type='none', width=24))}
VISIONS = [dict(pool_type='avg', final_ln_after_pool=True), dict(no_ln_pre=True),
           dict(attentional_pool=True, attn_pooler_heads=2)]
TEXTS = ['a photo of a rose.', 'x', 'an image with a Jack-in-the-pulpit, a type of flower, at night 🌻']

@pytest.mark.parametrize('shape', SHAPES)
def test_plain_vectors_are_encode(shape):
    clip = tiny(**SHAPES[shape])
    ids, (embeds, ends) = clip.tokenizer(TEXTS), embed(clip, TEXTS)
    want = clip.model.encode_text(ids)
    assert torch.equal(text_forward(clip, clip.tower.embed(ids), ends), want)
    assert torch.allclose(text_forward(clip, embeds, ends), want, atol=1e-5)
    assert torch.allclose(text_forward(clip, embeds, ends, deep=lambda i, x: x, checkpointing=True), want, atol=1e-5)
    pixels = torch.randn(3, 3, 32, 32)
    assert torch.equal(image_forward(clip, pixels, deep=lambda i, x: x), clip.model.encode_image(pixels))

@pytest.mark.parametrize('vision', VISIONS)
def test_image_towers(vision):
    shape = dict(image_size=32, patch_size=16, width=32, layers=2, head_width=16) | vision
    m = open_clip.CLIP(24, shape, dict(width=32, heads=2, layers=1)).eval()
    clip, pixels = tiny(), torch.randn(2, 3, 32, 32)
    clip.model = m
    assert torch.equal(image_forward(clip, pixels), m.encode_image(pixels))
    assert image_forward(clip, pixels, extra=torch.randn(3, 32)).shape == (2, 24)

def test_deep_is_called_before_each_block():
    clip, seen = tiny(), []
    embeds, ends = embed(clip, TEXTS)
    def deep(i, x):
        seen.append((i, tuple(x.shape)))
        return x
    text_forward(clip, embeds, ends, deep=deep)
    assert seen == [(i, tuple(embeds.shape)) for i in range(3)]

@pytest.mark.parametrize('custom', [False, True])
def test_a_forward_pass_leaves_the_model_alone(custom):
    clip = tiny(custom=custom)
    before = {k: v.clone() for k, v in clip.model.state_dict().items()}
    x = embed(clip, TEXTS)[0].requires_grad_()
    text_forward(clip, x, torch.tensor([2, 2, 2])).sum().backward()
    assert x.grad.any() and all(torch.equal(v, before[k]) for k, v in clip.model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in clip.model.parameters())

class Picture:
    def __init__(self, i): self.i, self.key = i, f'picture {i}'
    def sha(self): return sha('test picture', self.i)
    def open(self):
        size = 20 + 13*self.i, 61, 3
        return Image.fromarray(np.random.default_rng(self.i).integers(0, 255, size, np.uint8))

@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.setenv('IPO_NB_CACHE', str(tmp_path/'cache'))
    items = lambda n, at: [Item(Picture(at + i), i % 3, 'abc'[i % 3]) for i in range(n)]
    base, novel = ['rose', 'tiger lily', "bird's nest"], ['cup', 'saucer', 'tea pot']
    test = dict(base=items(7, 10), novel=items(8, 20))
    return Task(tiny_clip(), base, novel, items(6, 0), test, 'a <CLASS>.', 2, 1, folder=tmp_path/'learned')

class Both(Learner): # one vector in each tower
    name, title, needs = 'both', 'Both', ('text', 'image')
    defaults = TRAINING | dict(epochs=4, batch_size=4, lr=.1)
    def build(self, task, settings):
        self.slots = {tuple(n): slots(task.clip, n, 1) for n in (task.base, task.novel)}
        return torch.nn.ParameterDict(dict(text=.02*torch.randn(1, 32), image=.02*torch.randn(1, 32)))
    def text(self, task, names):
        s, again = self.slots[tuple(names)], self.used['checkpointing']
        x = text_forward(task.clip, s.fill(self.learned['text']), s.ends, checkpointing=again)
        return F.normalize(x.float(), dim=-1)
    def see(self, task, pixels):
        again = self.used['checkpointing']
        x = image_forward(task.clip, pixels, extra=self.learned['image'], checkpointing=again)
        return F.normalize(x.float(), dim=-1)
    def image(self, task, which):
        images = Images(task.clip, task.items(which), augment=False)
        return self.see(task, images.pixels(range(len(images))))
    def loss(self, task, batch, settings):
        image, text = self.see(task, batch.pixels), self.text(task, task.base)
        return F.cross_entropy(task.clip.logit_scale * image @ text.T, batch.labels)

def fitted(task, **kw):
    peer = Both()
    peer.fit(task, peer.settings(2, **kw))
    return peer

def test_learns_both_towers_and_nothing_else(task):
    frozen = {k: v.clone() for k, v in task.clip.model.state_dict().items()}
    peer = fitted(task, epochs=30, batch_size=6, lr=.01, augment=False)
    assert peer.losses[-1] < peer.losses[0] - .01
    assert all(torch.equal(v, frozen[k]) for k, v in task.clip.model.state_dict().items())

def test_the_same_seed_gives_the_same_bits_whatever_else_draws(task):
    a = fitted(task)
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    torch.rand(5)
    state = torch.get_rng_state()
    b = fitted(task)
    assert torch.equal(torch.get_rng_state(), state) # and global randomness is left as it was
    assert all(torch.equal(a.state()[k], b.state()[k]) for k in a.state()) and a.losses == b.losses
    task.seed = 2
    assert not torch.equal(fitted(task).state()['image'], a.state()['image'])

def test_checkpointing_and_autocast(task):
    plain = fitted(task)
    assert torch.allclose(fitted(task, checkpointing=True).state()['text'], plain.state()['text'], atol=1e-5)
    half = fitted(task, amp='bf16')
    assert torch.isfinite(half.state()['text']).all() and abs(half.losses[0] - plain.losses[0]) < .2
    assert not torch.equal(half.state()['text'], plain.state()['text'])

def test_a_loss_that_is_no_number(task):
    class Bad(Both):
        calls = 0
        def loss(self, task, batch, settings):
            Bad.calls += 1
            if Bad.calls == 4: self.before = self.state()
            return super().loss(task, batch, settings) * (float('nan') if Bad.calls == 4 else 1)
    peer = Bad()
    where = 'Both: the loss is nan in training step 4 with epochs 4, batch_size 4, lr 0.1, '
    with pytest.raises(Diverged, match=where + r'.*: lower lr; .*last_good.safetensors\.$'):
        peer.fit(task, peer.settings(2))
    assert all(torch.equal(v, peer.before[k]) for k, v in peer.state().items())
    again = load_learned(Both(), task, task.folder/'last_good.safetensors')
    logits = again.logits(task, 'novel')
    assert torch.equal(logits, peer.logits(task, 'novel')) and torch.isfinite(logits).all()

def test_a_step_that_breaks_the_parameters_is_undone(task):
    peer = Both()
    settings = peer.settings(2, lr=1e38, warmup=0, weight_decay=1e5)
    with pytest.raises(Diverged, match='training step'): peer.fit(task, settings)
    assert all(v.isfinite().all() for v in peer.state().values())

ON_CPU = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to allocate"

@pytest.mark.parametrize('error', [torch.OutOfMemoryError('CUDA out of memory'), RuntimeError(ON_CPU)])
def test_out_of_memory(task, error):
    class Big(Both):
        def loss(self, task, batch, settings): raise error
    least = dict(batch_size=1, checkpointing=True)
    for kw, says in ({}, 'lower batch_size (now 4), or set checkpointing to True'), (least, 'choose a smaller CLIP'):
        with pytest.raises(IpoError) as e: Big().fit(task, Big().settings(2, **kw))
        assert str(e.value) == f'memory ran out in training step 1: {says}.'

def test_other_errors_are_not_hidden(task):
    class Odd(Both):
        def loss(self, task, batch, settings): raise RuntimeError('shapes do not match')
    with pytest.raises(RuntimeError, match='shapes'): Odd().fit(task, Odd().settings(2))

def test_the_file_is_for_one_peer_one_class_list_and_one_clip(task, tmp_path):
    peer, file = fitted(task, epochs=1), tmp_path/'learned.safetensors'
    save_learned(peer, task, file)
    again = load_learned(Both(), task, file)
    for half in ('base', 'novel'): assert torch.equal(again.logits(task, half), peer.logits(task, half))
    class Other(Both): name, title = 'other', 'Other'
    with pytest.raises(IpoError, match=r'by another peer \(both\): train Other'): load_learned(Other(), task, file)
    task.base = task.base[::-1]
    with pytest.raises(IpoError, match='on another class list: train Both'): load_learned(Both(), task, file)
    peer_clip = task.clip
    task.base, task.clip = task.base[::-1], tiny_clip(seed=5)
    with pytest.raises(IpoError, match='on another CLIP'): load_learned(Both(), task, file)
    task.clip, task.seed = peer_clip, task.seed + 1
    with pytest.raises(IpoError, match='from other few-shot images: train Both'): load_learned(Both(), task, file)
    task.seed -= 1
    whole = file.read_bytes()
    for damage in (whole[:40], whole[:-1], whole[:-1] + bytes([whole[-1] ^ 128]), b'\0'*len(whole), b''):
        file.write_bytes(damage)
        with pytest.raises(Damaged, match='delete it'): load_learned(Both(), task, file)

def test_towers_that_a_peer_cannot_use(task):
    task.clip.model.visual = torch.nn.Flatten()
    said = 'Both puts learned tokens into a'
    with pytest.raises(IpoError, match=f'{said} ViT image tower, and tiny has none: use mini'): fitted(task)
    task.clip = tiny(text=dict(no_causal_mask=True), custom=True)
    with pytest.raises(IpoError, match=f'{said} causal text tower'): fitted(task)

def test_an_unreadable_picture_is_named(task, tmp_path):
    from ipo_nb.data import FileImage
    (tmp_path/'empty.png').write_bytes(b'')
    task.few_shot[2] = Item(FileImage(str(tmp_path/'empty.png'), 'empty.png'), 2, 'c')
    with pytest.raises(IpoError, match='empty.png is empty'): fitted(task)

def test_every_subpackage_is_in_the_wheel():
    inits = [p.relative_to(project_dir()) for p in project_dir().glob('ipo_nb/**/__init__.py')]
    folders = {'.'.join(p.parent.parts) for p in inits}
    setup = (project_dir()/'setup.py').read_text()
    assert folders == {'ipo_nb', *(f'ipo_nb.{wing}' for wing in ('evidence', 'paper', 'peers'))}
    assert "for wing in wings" in setup # which are looked for, not listed
