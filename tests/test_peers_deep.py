"MaPLe, PromptSRC and CoPrompt: what each must hold to, whichever the towers."
import copy
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from ipo_nb.core import IpoError, sha
from ipo_nb.data import Item
from ipo_nb.llm import Mock
from ipo_nb.peers import base
from ipo_nb.peers.base import Images, Task, cost, load_learned, save_learned, tiny_clip
from ipo_nb.peers.coprompt import Adapter, CoPrompt
from ipo_nb.peers.maple import Coupled, MaPLe, tower_shape
from ipo_nb.peers.promptsrc import Independent, PromptSRC
from ipo_nb.scorer import image_features, text_features

PEERS = [MaPLe, PromptSRC, CoPrompt]
each = pytest.mark.parametrize('kind', PEERS, ids=lambda k: k.name)

class Picture:
    def __init__(self, i): self.i, self.key = i, f'picture {i}'
    def sha(self): return sha('deep test picture', self.i)
    def open(self):
        return Image.fromarray(np.random.default_rng(self.i).integers(0, 255, (40, 36, 3), np.uint8))

@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv('IPO_NB_CACHE', str(tmp_path/'cache'))

def sentences(message): return ' '.join(f'<INS>a {w} thing like a <CLASS></INS>' for w in ('round', 'red', 'soft'))

def make(clip=None, seed=1, n=6, llm=None):
    if llm:
        llm = Mock(llm)
        llm.spec = 'mock'
    items = lambda n, at: [Item(Picture(at + i), i % 3, 'abc'[i % 3]) for i in range(n)]
    base, novel = ['rose', 'tiger lily', "bird's nest"], ['cup', 'saucer', 'tea pot']
    test = dict(base=items(7, 10), novel=items(8, 20))
    return Task(clip or tiny_clip(), base, novel, items(n, 0), test, 'a <CLASS>.', 2, seed, llm=llm)

def fitted(kind, task, **kw):
    peer = kind()
    peer.spent = peer.fit(task, peer.settings(2, **dict(epochs=2) | kw))
    return peer

def formula(kind, clip, J, n):
    wt, bt, wv, bv = tower_shape(clip)
    if kind is PromptSRC: return n*(min(J, bt)*wt + min(J, bv)*wv)
    J, D = min(J, bt, bv), clip.model.visual.output_dim
    return J*n*wt + J*(wt*wv + wv) + (kind is CoPrompt)*D*D

@each
@pytest.mark.parametrize('custom', [False, True])
@pytest.mark.parametrize('layers,depth', [(3, 9), (3, 1), (2, 2)])
def test_its_own_parameters_learn_and_no_others(kind, custom, layers, depth):
    task = make(tiny_clip(custom, layers=layers))
    before = copy.deepcopy(task.clip.model.state_dict())
    peer = fitted(kind, task, epochs=1, depth=depth)
    n = peer.used['n_ctx']
    images = 12 if kind is CoPrompt else 6 # CoPrompt sees two views
    assert peer.spent == cost(formula(kind, task.clip, depth, n), images)
    assert all(p.requires_grad and p.grad is not None and p.grad.any() for p in peer.learned.parameters())
    assert all(p.grad is None for p in task.clip.model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in task.clip.model.state_dict().items())
    assert bool(peer.note.startswith('depth')) == (depth > layers)

@each
def test_without_prompts_it_is_clip(kind):
    "No prompt in either tower and nothing from the adapters: the features of CLIP, and its answers."
    task, peer = make(), kind()
    peer.prepare(task, peer.settings(2))
    none = tuple(p[:0].detach() for p in peer.prompts())
    peer.prompts = lambda: none
    if kind is CoPrompt:
        for side in ('text', 'image'): peer.learned[side].share = 0.
    for half in ('base', 'novel'):
        names, pictures = task.names(half), [i.image for i in task.items(half)]
        with torch.no_grad(): text, image = peer.text(task, names), peer.image(task, half)
        assert torch.allclose(text, text_features(task.clip, ['a photo of a <CLASS>.'], names)[0], atol=1e-6)
        pixels = torch.stack([task.clip.preprocess(p.open()) for p in pictures]) # in the same batch, to the bit
        assert torch.equal(image, F.normalize(task.clip.model.encode_image(pixels), dim=-1))
        want = task.clip.logit_scale * image_features(task.clip, pictures) @ text.T
        assert torch.allclose(peer.logits(task, half), want, atol=1e-4)

@each
def test_the_first_text_prompt_alone_is_the_default_prompt(kind):
    "Depth 1 and nothing learned: the words stand where they stood."
    task, peer = make(), kind()
    peer.prepare(task, peer.settings(2, depth=1))
    text, image = peer.prompts()
    peer.prompts = lambda: (text, image)
    if kind is CoPrompt:
        with torch.no_grad(): peer.learned['text'].up.weight.zero_()
    want = text_features(task.clip, ['a photo of a <CLASS>.'], task.novel)[0]
    assert torch.allclose(peer.text(task, task.novel), want, atol=1e-6)
    with torch.no_grad(): text += noise(text)
    assert not torch.allclose(peer.text(task, task.novel), want, atol=1e-3)

def noise(x): return torch.randn(x.shape, generator=torch.Generator().manual_seed(0))

@each
@pytest.mark.parametrize('side', [0, 1], ids=['text', 'image'])
@pytest.mark.parametrize('block', [0, 1, 2])
def test_each_prompt_of_each_block_counts(kind, side, block):
    task, peer = make(), kind()
    peer.prepare(task, peer.settings(2))
    prompts = [p.detach().clone() for p in peer.prompts()]
    peer.prompts = lambda: prompts
    before = peer.logits(task, 'base')
    prompts[side][block] += noise(prompts[side][block])
    assert not torch.allclose(peer.logits(task, 'base'), before, atol=1e-4)

@each
def test_loss_falls_on_a_batch(kind):
    task, peer = make(), kind()
    peer.fit(task, peer.settings(2, epochs=30, lr=.01, batch_size=6, augment=False, warmup=0))
    assert peer.losses[-1] < .9*peer.losses[0]

@each
def test_the_labels_count(kind):
    "Whatever else a loss holds, it holds the cross-entropy."
    task, peer, losses = make(), fitted(kind, make(), epochs=1), []
    images, peer.kept = Images(task.clip, task.few_shot, augment=False), {}
    for shift in range(3):
        images.labels = torch.tensor([(i.label + shift) % 3 for i in task.few_shot])
        if kind is CoPrompt: peer.gen.manual_seed(0)
        batch = next(images.batches(0, 6))
        _, _, logits = peer.views(task, batch)
        losses.append((peer.loss(task, batch, peer.used) - F.cross_entropy(logits, batch.labels)).item())
    assert losses == pytest.approx([losses[0]]*3, abs=1e-4) and (losses[0] > .01) == (kind is not MaPLe)

@each
def test_same_seed_same_numbers(kind):
    a, b, c = (fitted(kind, make(seed=s, llm=sentences), batch_size=2) for s in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a.state().values(), b.state().values()))
    assert any(not torch.equal(x, y) for x, y in zip(a.state().values(), c.state().values()))
    torch.manual_seed(7)
    torch.rand(3) # somebody else's randomness
    assert fitted(kind, make(llm=sentences), batch_size=2).losses == a.losses

@each
def test_saved_and_loaded(kind, tmp_path):
    task = make()
    peer = fitted(kind, task)
    file = save_learned(peer, task, tmp_path/'learned.safetensors')
    again = load_learned(kind(), task, file)
    for half in ('base', 'novel'): assert torch.equal(again.logits(task, half), peer.logits(task, half))
    other = PEERS[(PEERS.index(kind) + 1) % 3]
    with pytest.raises(IpoError, match='another peer'): load_learned(other(), task, file)
    less = make()
    less.base = less.base[:2]
    with pytest.raises(IpoError, match='another class list'): load_learned(kind(), less, file)
    with pytest.raises(IpoError, match='do not fit'): kind().load(task, peer.used | dict(n_ctx=1), peer.state())

@each
def test_novel_classes_have_their_own_names(kind):
    task, turned, again = make(), make(), kind()
    peer = fitted(kind, task)
    logits = peer.logits(task, 'novel')
    assert logits.shape == (8, 3) and logits.isfinite().all()
    turned.novel = turned.novel[::-1]
    again.load(turned, peer.used, peer.state())
    assert torch.allclose(again.logits(turned, 'novel'), logits.flip(1), atol=1e-4)

SAVERS = [dict(checkpointing=True), dict(amp='bf16'), dict(amp='bf16', checkpointing=True)]

@each
@pytest.mark.parametrize('change', SAVERS, ids=str)
def test_memory_savers_learn_the_same(kind, change):
    plain, saved = fitted(kind, make()), fitted(kind, make(), **change)
    assert saved.losses == pytest.approx(plain.losses, rel=.05 if 'amp' in change else 1e-4)
    assert all(v.dtype == torch.float32 for v in saved.state().values())

@each
def test_checkpointing_is_passed_on(kind, monkeypatch):
    seen, real, task = [], base.checkpoint, make()
    monkeypatch.setattr(base, 'checkpoint', lambda block, *a, **kw: seen.append(block) or real(block, *a, **kw))
    fitted(kind, task, epochs=1, checkpointing=True)
    blocks = [*task.clip.tower.blocks, *task.clip.model.visual.transformer.resblocks]
    assert {id(b) for b in seen} == {id(b) for b in blocks}

@each
def test_a_convolutional_tower_is_refused(kind):
    vision = dict(image_size=32, layers=(1, 1, 1, 1), width=16, head_width=16)
    net = open_clip.CLIP(24, vision, dict(width=32, heads=2, layers=1)).eval()
    task = make(llm=lambda message: pytest.fail('a language model was asked for nothing'))
    task.clip.model = net
    with pytest.raises(IpoError, match=f'{kind.title} puts learned tokens into a ViT image tower'): fitted(kind, task)

SENSELESS = [(dict(depth=0), 'nothing to learn'), (dict(n_ctx=0), 'nothing to learn'), (dict(n_ctx=5), 'longer init')]

@each
@pytest.mark.parametrize('change,says', SENSELESS, ids=str)
def test_settings_that_make_no_sense(kind, change, says):
    with pytest.raises(IpoError, match=says) as e: fitted(kind, make(), **change)
    assert str(e.value).count('.') <= 1 and kind.title in str(e.value)

def test_settings_of_the_papers():
    keys = ('n_ctx', 'depth', 'epochs', 'batch_size', 'lr')
    papers = {MaPLe: (2, 9, 5, 4, .0035), PromptSRC: (4, 9, 20, 4, .0025), CoPrompt: (2, 9, 8, 4, .0035)}
    for kind, want in papers.items(): assert tuple(kind().settings(16)[k] for k in keys) == want

def test_parameters_of_the_papers():
    "ViT-B/16 with its 512 and 768 wide towers: MaPLe's 3.55 M and PromptSRC's 46 thousand."
    count = lambda *modules: sum(p.numel() for m in modules for p in m.parameters())
    maple = Coupled(torch.zeros(2, 512), 9, 768)
    assert count(maple) == 3_555_072
    assert count(Independent(torch.zeros(4, 512), (9, 9), 768)) == 46_080
    assert count(maple, Adapter(512, .1), Adapter(512, .2)) == 3_817_216

def test_coprompt_asks_about_base_classes_only():
    asked = []
    def answer(message):
        asked.append(message)
        return '<INS>a thing like a <CLASS>, round</INS>'
    task = make(llm=answer)
    peer = fitted(CoPrompt, task)
    assert peer.spent['calls'] == len(asked) == 3 and not any(n in m for m in asked for n in task.novel)
    assert 'for 3 of 3 classes' in peer.note
    task.llm.answers = lambda m: 'I would rather not.'
    peer = fitted(CoPrompt, task)
    assert 'for 0 of 3 classes, else the template' in peer.note
    assert fitted(CoPrompt, make()).losses == peer.losses # the template stands in for each
