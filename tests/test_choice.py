"Rules of choosing: ties, one prompt, equal prompts, any order, damaged numbers, and the committed runs."
import json
import numpy as np
import pytest
import torch
from ipo_nb import scorer
from ipo_nb.choice import RULES, Choice, Evidence, choose, choose_all, compare_rules, few_shot_score, holm, mix, shrunk
from ipo_nb.core import IpoError, Scored, cards_dir, runs_in
from ipo_nb.evaluation import Half
from ipo_nb.stats import unpack_bits

def unit(x): return x/np.linalg.norm(x, axis=-1, keepdims=True)

def parts(prompts=6, classes=5, images=10, seed=0, width=8):
    rng = np.random.RandomState(seed)
    labels = np.arange(images) % classes
    classifier = unit(rng.randn(classes, width))
    texts = unit(classifier + .6*rng.randn(prompts, classes, width))
    feats, views = (unit(classifier[labels] + .6*rng.randn(*shape, images, width)) for shape in ((), (3,)))
    return dict(texts=texts, images=feats, labels=labels, views=views, scale=10.)

def evidence(texts, names=None, **kw):
    "Evidence whose `Scored` records are what its arrays say."
    names = names or [f'prompt {i} of <CLASS>' for i in range(len(texts))]
    blank = Evidence([Scored(n, 0., 0.) for n in names], texts=texts, **kw)
    scored = [Scored(s.prompt, float(l), float(a)) for s, l, a in zip(blank.scored, blank.losses, blank.accuracies)]
    by = {s.prompt: s for s in scored}
    return Evidence([by[n] for n in names], texts=texts, **kw)

@pytest.mark.parametrize('seed', range(30))
def test_the_order_of_the_prompts_does_not_matter(seed):
    rng = np.random.RandomState(100 + seed)
    known = parts(prompts=rng.randint(1, 15), classes=rng.randint(1, 8), images=rng.randint(1, 20), seed=seed)
    n = len(known['texts'])
    if n > 2: known['texts'][rng.randint(n)] = known['texts'][0] # the features of two are equal
    names = [f'{chr(97 + rng.randint(26))} {i} <CLASS>' for i in range(n)]
    first = choose_all(evidence(names=names, **known))
    for _ in range(3):
        order = rng.permutation(n)
        again = evidence(names=[names[i] for i in order], **known | dict(texts=known['texts'][order]))
        assert choose_all(again) == first # prompts, and weights to the last bit

@pytest.mark.parametrize('rule', RULES)
def test_weights_are_a_distribution(rule):
    for seed in range(5):
        choice = choose(rule, evidence(**parts(seed=seed, prompts=12)))
        assert sum(choice.weights) == pytest.approx(1, abs=1e-5) and min(choice.weights) > 0
        assert list(choice.weights) == sorted(choice.weights, reverse=True)
        assert len(set(choice.prompts)) == len(choice.prompts)

@pytest.mark.parametrize('rule', RULES)
def test_one_prompt_is_chosen_by_every_rule(rule):
    assert choose(rule, evidence(**parts(prompts=1))) == Choice(rule, ('prompt 0 of <CLASS>',), (1.,))

@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('classes, images', [(1, 1), (2, 1), (2, 2), (5, 1), (3, 20)])
def test_few_classes_and_images(rule, classes, images):
    assert choose(rule, evidence(**parts(prompts=4, classes=classes, images=images))).prompts

@pytest.mark.parametrize('rule', RULES)
def test_equal_prompts_tie_by_text(rule):
    known = parts(prompts=3)
    known['texts'][:] = known['texts'][0] # equal in all that can be measured
    choice = choose(rule, evidence(names=['c <CLASS>', 'a <CLASS>', 'b <CLASS>'], **known))
    assert choice.prompts in (('a <CLASS>',), ('a <CLASS>', 'b <CLASS>', 'c <CLASS>'))

def test_the_paper_ties_by_loss_and_then_by_text():
    known = parts(prompts=4)
    scores = [('d', .5, 90.), ('c', .4, 90.), ('b', .4, 90.), ('a', .1, 80.)]
    assert choose('paper', Evidence([Scored(*s) for s in scores], **known)).prompts == ('b',)

def test_ties_go_to_the_lowest_loss():
    e = evidence(**parts(prompts=5))
    def indifferent(evidence): return np.ones(len(evidence))
    assert choose(indifferent, e).prompts == tuple(e.prompts) and e.losses.tolist() == sorted(e.losses)

@pytest.mark.parametrize('which', ['texts', 'images', 'views'])
@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_what_is_not_finite_is_refused(which, bad):
    known = parts()
    known[which].flat[3] = bad
    with pytest.raises(IpoError, match='not finite'): evidence(**known)

@pytest.mark.parametrize('loss, accuracy', [(np.nan, 50.), (1., np.nan), (np.inf, 50.)])
def test_a_score_that_is_not_finite_is_refused(loss, accuracy):
    with pytest.raises(IpoError, match='not finite'): Evidence([Scored('<CLASS>', loss, accuracy)], **parts(prompts=1))

def test_what_does_not_fit_is_refused():
    known, scored = parts(prompts=2), [Scored('a <CLASS>', 1., 50.), Scored('b <CLASS>', 1., 50.)]
    with pytest.raises(IpoError, match='twice'): Evidence([scored[0]]*2, **known)
    with pytest.raises(IpoError, match='no scored prompt'): Evidence([], **known)
    with pytest.raises(IpoError, match='fit together'): Evidence(scored, **known | dict(views=known['views'][:, :3]))
    with pytest.raises(IpoError, match='fit together'): Evidence(scored, **known | dict(views=known['views'][:0]))
    with pytest.raises(IpoError, match='fit together'): Evidence(scored, **known | dict(texts=known['texts'][0]))
    with pytest.raises(IpoError, match='0 to 4'): Evidence(scored, **known | dict(labels=known['labels'] - 1))

@pytest.mark.parametrize('weights', [[1, -1, 1], [0, 0, 0], [1, 1], [np.nan]*3, [[1, 1, 1]], 1])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(IpoError, match='must give 3 weights'): choose(lambda e: weights, evidence(**parts(prompts=3)))

def test_a_choice_leaves_out_what_weighs_nothing():
    e = evidence(**parts(prompts=3))
    choice = choose(lambda e: [2., 1e-4, 2.], e)
    assert choice.weights == (.5, .5) and choice.prompts == (e.prompts[0], e.prompts[2])

def test_markdown_shows_signs_as_signs():
    shown = Choice('r', ('<b>*_`$|~ <CLASS>\n',), (1.,))._repr_markdown_().splitlines()[-1]
    assert shown.count('|') == 3 and not set('<>*_`$~') & set(shown.replace('<code>', '').replace('</code>', ''))

def test_mixing_is_the_mean_at_unit_length():
    texts = parts(prompts=3)['texts']
    mixed = mix(texts, [.5, .25, .25])
    assert np.allclose(np.linalg.norm(mixed, axis=1), 1, atol=1e-6)
    assert np.allclose(mixed, unit(.5*texts[0] + .25*texts[1] + .25*texts[2]), atol=1e-6)
    assert np.array_equal(mix(texts[:1], [1.]), texts[0])

def test_few_shot_score_of_one_prompt_is_the_searchs():
    e = evidence(**parts())
    for s in e.scored:
        score = few_shot_score(Choice('', (s.prompt,), (1.,)), e)
        assert (score.loss, score.accuracy) == (pytest.approx(s.loss, abs=1e-5), pytest.approx(s.accuracy, abs=1e-3))

def test_shrinkage_finds_better_prompts_than_the_loss():
    "Prompts in three families of one true quality each, seen through much noise: the family is what can be known."
    hits = dict(loss=0, shrinkage=0)
    for seed in range(60):
        rng = np.random.RandomState(seed)
        known = parts(prompts=30, images=10, seed=seed)
        family = np.arange(30) % 3
        centres = unit(rng.randn(3, 5, 8))
        known['texts'] = unit(centres[family] + .05*rng.randn(30, 5, 8))
        e = evidence(**known)
        family = np.array([int(p.split()[1]) % 3 for p in e.prompts])
        quality = np.array([0., 1., 2.])[family]
        e.loglik = quality[:, None]*.2 + rng.randn(30, 10)
        hits['loss'] += family[e.loglik.mean(1).argmax()] == 2
        hits['shrinkage'] += family[shrunk(e).argmax()] == 2
    assert hits['shrinkage'] > hits['loss'] + 5

def test_holm_agrees_with_its_definition():
    rng = np.random.RandomState(3)
    for n in (1, 4, 9):
        ps = rng.rand(n)**3
        def corrected(i): return max(min(1., q*sum(ps >= q)) for q in ps if q <= ps[i])
        assert holm(ps.tolist()) == pytest.approx([corrected(i) for i in range(n)], rel=1e-5)

class ToyClip:
    logit_scale = 10.

@pytest.fixture
def toy(monkeypatch):
    "A stand-in whose text features are those of the evidence; the few-shot images stand in for test images."
    known = parts(prompts=6, images=40)
    e = evidence(**known)
    at = dict(zip(e.prompts, e.texts))
    def text_features(clip, prompts, names): return torch.tensor(np.stack([at[p] for p in prompts]))
    monkeypatch.setattr(scorer, 'text_features', text_features)
    halves = [Half(list('abcde'), torch.tensor(known['images'][::step]), known['labels'][::step]) for step in (1, 2)]
    return e, halves

def test_all_rules_are_compared_in_one_reading(toy, monkeypatch):
    e, (base, novel) = toy
    read = []
    class Once:
        def __init__(self, feats): self.feats = feats
        def split(self, chunk):
            read.append(chunk)
            return self.feats.split(chunk)
    halves = [Half(h.names, Once(h.feats), h.labels) for h in (base, novel)]
    compared = compare_rules(ToyClip(), {'IPO': e, 'random control': e}, *halves)
    assert len(read) == 2 # each half once
    assert [r['rule'] for r in compared['rows']] == 2*compared['rules']
    assert [r['by'] for r in compared['rows']] == ['IPO']*len(RULES) + ['random control']*len(RULES)
    assert compared['about'].startswith(f'comparison of {len(RULES)} rules') and compared['rules'][0] == 'paper'
    assert json.loads(json.dumps(compared)) == compared
    known = compared['answers']
    assert all(known.count(answers) == 1 for answers in known) and len(known) <= len(RULES) # both searches are one
    for r in compared['rows']:
        assert 100*unpack_bits(known[r['answers']]['base_correct']).mean() == pytest.approx(r['base'], abs=1e-3)
        assert r['base'] == pytest.approx(r['accuracy'], abs=1e-3) # the base half of this toy are the few-shot images
        assert r['against_paper']['p_holm'] >= r['against_paper']['p']

RECORDS = [run/'result.json' for run in runs_in(cards_dir()/'records'/'every_prompt').values()]

@pytest.mark.parametrize('path', RECORDS, ids=lambda p: p.parent.name)
def test_the_papers_rule_chooses_what_the_record_says(path):
    result = json.loads(path.read_text(encoding='utf-8'))
    for by, key in (('IPO', 'chosen'), ('random control', 'control_chosen')):
        scored = [Scored(t['prompt'], t['loss'], t['accuracy'], t['step']) for t in result['tried'] if t['by'] == by]
        known = parts(prompts=len(scored)) # which the paper's rule does not look at
        assert choose('paper', Evidence(scored, **known)).prompts == (result[key]['prompt'],)
