"CoOp and CoCoOp: what they start from, what they train, what they leave behind."
import pytest
import torch
import torch.nn.functional as F
from ipo_nb.core import IpoError, fill
from ipo_nb.data import load_dataset
from ipo_nb.peers.base import Diverged, Images, load_learned, make_task, save_learned, slots, text_forward, tiny_clip
from ipo_nb.peers.cocoop import CoCoOp
from ipo_nb.peers.coop import CoOp, importance_table, token_importance, without
from ipo_nb.scorer import load_clip

CLIPS = dict(mini=lambda: load_clip('mini'), tiny=tiny_clip, custom=lambda: tiny_clip(custom=True))
VARIANTS = { # peer, settings, parameters for width W of tokens and D of features
    'CoOp': (CoOp, {}, lambda W, D: 4*W),
    'CoOp 16': (CoOp, dict(context=16), lambda W, D: 16*W),
    'CoOp specific': (CoOp, dict(class_specific=True), lambda W, D: 12*4*W),
    'CoOp specific 16': (CoOp, dict(class_specific=True, context=16, position='middle'), lambda W, D: 12*16*W),
    'CoOp middle': (CoOp, dict(position='middle'), lambda W, D: 4*W),
    'CoOp front': (CoOp, dict(position='front'), lambda W, D: 4*W),
    'CoCoOp': (CoCoOp, {}, lambda W, D: 4*W + (D*(D//16) + D//16) + ((D//16)*W + W))}
variants = pytest.mark.parametrize('variant', VARIANTS)

def short(task, n=48):
    task.test = {half: items[:n] for half, items in task.test.items()}
    return task

@pytest.fixture(scope='module')
def dataset(): return load_dataset('mini_textures')
@pytest.fixture(scope='module')
def tasks(dataset): return {k: short(make_task(dataset, make(), 1, 1)) for k, make in CLIPS.items()}
@pytest.fixture(scope='module')
def task(tasks): return tasks['mini']

def fitted(variant, task, **kw):
    cls, changes, _ = VARIANTS[variant]
    peer = cls()
    return peer, peer.fit(task, peer.settings(1, **dict(epochs=3, augment=False) | changes | kw))

def unlearned(cls, task, **kw):
    peer = cls()
    peer.prepare(task, peer.settings(1, **kw))
    if cls is CoCoOp:
        with torch.no_grad():
            for p in peer.learned.meta.parameters(): p.zero_()
    return peer

def zero_shot(task, half, prompt):
    ids = task.clip.tokenizer([fill(prompt, n) for n in task.names(half)])
    text = task.clip.model.encode_text(ids, normalize=True)
    return task.clip.logit_scale * task.feats(half) @ text.T

BEGINNINGS = [
    (CoOp, {}, 'a photo of a <CLASS>.'),
    (CoOp, dict(class_specific=True), 'a photo of a <CLASS>.'),
    (CoOp, dict(position='front'), '<CLASS> a photo of a.'),
    (CoOp, dict(position='middle', context=2, init='picture of'), 'picture <CLASS> of.'),
    (CoCoOp, {}, 'a photo of a <CLASS>.'),
    (CoCoOp, dict(chunk=7), 'a photo of a <CLASS>.')]

@pytest.mark.parametrize('model', CLIPS)
@pytest.mark.parametrize('cls, kw, prompt', BEGINNINGS)
def test_nothing_learned_is_zero_shot_clip(tasks, model, cls, kw, prompt):
    task = tasks[model]
    peer = unlearned(cls, task, **kw)
    for half in ('base', 'novel'):
        got, want = peer.logits(task, half), zero_shot(task, half, prompt)
        assert got.shape == want.shape == (48, 12)
        assert torch.allclose(got, want, atol=2e-4*task.clip.logit_scale/100)
        assert torch.equal(got.argmax(-1), want.argmax(-1))

def test_the_full_length_is_zero_shot_clip_to_the_bit(tasks):
    for task in tasks.values():
        peer, ids = unlearned(CoOp, task), task.clip.tokenizer([f'a photo of a {n}.' for n in task.base])
        padded, s = task.clip.tower.embed(ids), peer.slots(task, task.base)
        n = s.embeds.shape[1]
        inside = (torch.arange(n) <= s.ends[:, None])[..., None]
        padded[:, :n] = s.fill(peer.learned['context']).where(inside, padded[:, :n])
        assert torch.equal(text_forward(task.clip, padded, s.ends), task.clip.model.encode_text(ids))

@variants
def test_only_its_own_parameters_learn_and_they_are_as_many_as_the_paper_says(task, variant):
    frozen = {k: v.clone() for k, v in task.clip.model.state_dict().items()}
    peer, spent = fitted(variant, task)
    W, D = task.clip.tower.position.shape[1], task.feats('base').shape[1]
    assert spent['parameters'] == VARIANTS[variant][2](W, D) == sum(v.numel() for v in peer.state().values())
    assert spent['images'] == 3*12 and spent['calls'] == 0
    batch = next(Images(task.clip, task.few_shot, augment=False).batches(0, 12))
    peer.learned.zero_grad()
    peer.loss(task, batch, peer.used).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in peer.learned.parameters())
    assert all(p.grad is None and not p.requires_grad for p in task.clip.model.parameters())
    assert all(torch.equal(v, frozen[k]) for k, v in task.clip.model.state_dict().items())

@variants
def test_loss_falls_on_a_batch(task, variant):
    cls, kw, _ = VARIANTS[variant]
    peer = cls()
    peer.prepare(task, peer.settings(1, **kw))
    batch = next(Images(task.clip, task.few_shot, augment=False).batches(0, 12))
    opt, losses = torch.optim.SGD(peer.learned.parameters(), .01), []
    for _ in range(6):
        opt.zero_grad()
        loss = peer.loss(task, batch, peer.used)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - .003

@variants
def test_saved_and_loaded_gives_the_same_logits(task, variant, tmp_path):
    peer, _ = fitted(variant, task)
    file = save_learned(peer, task, tmp_path/'learned.safetensors')
    again = load_learned(VARIANTS[variant][0](), task, file)
    for half in ('base', 'novel'): assert torch.equal(again.logits(task, half), peer.logits(task, half))
    assert again.used == peer.used

@pytest.mark.parametrize('variant', ['CoOp 16', 'CoCoOp'])
def test_deterministic_for_a_seed(task, dataset, variant):
    a, b = (fitted(variant, task, augment=True)[0] for _ in range(2))
    assert all(torch.equal(a.state()[k], b.state()[k]) for k in a.state()) and a.losses == b.losses
    other = make_task(dataset, task.clip, 1, 2)
    assert not torch.equal(fitted(variant, other, augment=True)[0].state()['context'], a.state()['context'])

def test_files_of_each_other_are_refused(task, dataset, tmp_path):
    file = save_learned(fitted('CoOp', task)[0], task, tmp_path/'learned.safetensors')
    with pytest.raises(IpoError, match=r'by another peer \(coop\): train CoCoOp'): load_learned(CoCoOp(), task, file)
    other = make_task(load_dataset('mini_objects'), task.clip, 1, 1)
    with pytest.raises(IpoError, match='another class list'): load_learned(CoOp(), other, file)
    peer, state = CoOp(), {'context': torch.zeros(4, 128)}
    with pytest.raises(IpoError, match='do not fit CoOp'): peer.load(task, peer.settings(1, context=7), state)

@pytest.mark.parametrize('variant', ['CoOp', 'CoCoOp'])
def test_a_loss_that_is_no_number_keeps_the_last_good_state(task, variant):
    cls = VARIANTS[variant][0]
    class Bad(cls):
        steps = 0
        def loss(self, task, batch, settings):
            self.steps += 1
            good = self.steps < 3
            if not good: self.last = self.state()
            return super().loss(task, batch, settings) * (1 if good else float('inf'))
    peer, said = Bad(), rf'{variant}: the loss is inf in training step 3 with .*lr 0.002.*: lower lr'
    with pytest.raises(Diverged, match=said): peer.fit(task, peer.settings(1, batch_size=4))
    assert all(torch.equal(v, peer.last[k]) and v.isfinite().all() for k, v in peer.state().items())

def test_conditional_is_one_image_after_the_other(task):
    peer, _ = fitted('CoCoOp', task)
    feats = task.feats('base')[:5]
    with torch.no_grad():
        together, s = peer.conditional(task, feats, task.base), slots(task.clip, task.base, 4)
        for f, row in zip(feats, together):
            ctx = peer.learned.context + peer.learned.meta(f)
            text = F.normalize(text_forward(task.clip, s.fill(ctx), s.ends), dim=-1)
            assert torch.allclose(task.clip.logit_scale * text @ f, row, atol=1e-4)

def test_chunks_and_checkpointing_change_no_gradient(task):
    batch, found = next(Images(task.clip, task.few_shot, augment=False).batches(0, 4)), []
    for kw in ({}, dict(chunk=5), dict(chunk=30, checkpointing=True)):
        peer = CoCoOp()
        peer.prepare(task, peer.settings(1, **kw))
        peer.loss(task, batch, peer.used).backward()
        found.append(peer.learned.context.grad)
    assert torch.allclose(found[0], found[1], atol=1e-5) and torch.allclose(found[0], found[2], atol=1e-5)

def test_a_novel_class_gets_the_mean_of_class_specific_contexts(task):
    (peer, _), unified = fitted('CoOp specific', task), unlearned(CoOp, task)
    with torch.no_grad(): unified.learned['context'].copy_(peer.learned['context'].mean(0))
    assert torch.allclose(unified.logits(task, 'novel'), peer.logits(task, 'novel'), atol=1e-4)

@pytest.mark.parametrize('variant', ['CoOp', 'CoOp specific', 'CoCoOp'])
def test_one_vector_less(task, variant):
    peer, _ = fitted(variant, task)
    rows = token_importance(peer, task, k=2)
    assert [r['removed'] for r in rows] == [None, 0, 1, 2, 3] and all(len(r['words']) == 2 for r in rows[1:])
    two = without(without(peer, task, 0), task, 2)
    assert two.state()['context'].equal(peer.state()['context'][..., [1, 2], :])
    assert importance_table(rows, peer.title).count('\n') == 6
    last = peer
    for _ in range(4): last = without(last, task, 0)
    assert last.logits(task, 'base').shape == (48, 12) # nothing but the name is left

WRONG = [
    (CoOp, dict(position='back'), 'choose one of end, middle, front'),
    (CoOp, dict(contex=4), "did you mean 'context'"),
    (CoOp, dict(init='a photo', context=3), 'set context to 2'),
    (CoOp, dict(context=100), 'too long'),
    (CoCoOp, dict(chunk=0), 'above 0'),
    (CoCoOp, dict(position='end'), "no setting 'position'"),
    (CoOp, dict(context=-1), 'above 0')]

def test_bad_settings(task):
    for cls, kw, says in WRONG:
        peer = cls()
        with pytest.raises(IpoError, match=says): peer.fit(task, peer.settings(1, **kw))

def test_the_papers_epochs():
    assert [CoOp().settings(s)['epochs'] for s in (1, 2, 4, 8, 16)] == [50, 100, 100, 200, 200]
    assert {(CoCoOp().settings(s)['epochs'], CoCoOp().settings(s)['batch_size']) for s in (1, 4, 16)} == {(10, 1)}

def test_on_photographs_with_a_convolutional_image_tower(real):
    clip = load_clip(f'local-dir:{real}/clip_small')
    task = short(make_task(load_dataset('eurosat', data_root=real/'data'), clip, 1, 1), 40)
    for cls in (CoOp, CoCoOp):
        peer = cls()
        peer.fit(task, peer.settings(1, epochs=6, batch_size=5, augment=False))
        assert peer.losses[-1] < peer.losses[0] and peer.logits(task, 'novel').shape == (40, 5)
