"Checks of evaluation that are no documentation: agreement with independent computations, odd input."
import numpy as np, pytest
from scipy import stats
from ipo_nb.core import DEFAULT_PROMPT, IpoError, PLACEHOLDER, named_classes
from ipo_nb.evaluation import *
from ipo_nb.stats import *

PRINTED = [ # prompts that the paper prints (tables 3 and 17)
    "TLet's address problem, a photo of a <CLASS>.",
    "Take a well-composed photo of a <CLASS> with optimal lighting, focus, and minimal distractions. Capture the pet's unique characteristics, including expression and posture, to ensure a clear and distinct image.",
    "Capture a comprehensive range of well-lit, high-resolution images of an <CLASS> from various angles, meticulously showcasing its specific design features with perfect clarity and precision for unparalleled accuracy in aircraft.",
    "A photo of a <CLASS>, a type of large-scale scene.", "Classify the intricate <CLASS> texture.",
    "Use a higher resolution camera to capture the vehicle photo <CLASS>..", "Categorize the <CLASS> shown in the image."]

@pytest.mark.parametrize('n,p', [(20, .5), (240, .8), (8100, .53), (50_000, .66)])
def test_interval_is_the_binomial_quantile(n, p):
    correct = np.arange(n) < n*p
    exact = stats.binom.ppf([.025, .975], n, correct.mean())/n*100
    assert np.allclose(interval(correct), exact, atol=200/n + .05)

def test_interval_of_h_agrees_with_plain_resampling():
    rng = np.random.RandomState(1); b, v = rng.rand(150) < .8, rng.rand(120) < .6
    hs = []
    for _ in range(4000):
        x, y = rng.choice(b, 150).mean(), rng.choice(v, 120).mean(); hs.append(200*x*y/(x+y))
    assert np.allclose(interval_h(b, v), np.percentile(hs, [2.5, 97.5]), atol=.8)

def test_extremes():
    assert interval([1]*30) == [100., 100.] and interval([0]*30) == [0., 0.]
    assert interval_h([0]*5, [0]*5) == [0., 0.]
    ev = make_evaluation('x', '<CLASS>', [0], [1])
    assert (ev.base, ev.novel, ev.h) == (0., 100., 0.)

def test_paired_test_agrees_with_scipy():
    rng = np.random.RandomState(2)
    for _ in range(20):
        a, b = rng.rand(60) < .7, rng.rand(60) < .6
        r = paired_test(a, b); k = r['a_only'] + r['b_only']
        assert r['p'] == pytest.approx(stats.binomtest(r['b_only'], k).pvalue, rel=1e-5)
        assert paired_test(b, a)['p'] == r['p']

@pytest.mark.parametrize('prompt', PRINTED)
def test_leave_one_out_keeps_the_placeholder(prompt):
    for mode in ('words', 'phrases', 'auto'):
        parts = leave_one_out(prompt, mode)
        assert parts and all(p.prompt.count(PLACEHOLDER) == 1 and '  ' not in p.prompt and p.prompt.strip() == p.prompt for p in parts)
        covered = [i for p in parts if p.kind in ('word', 'phrase') for i in range(p.start, p.end)]
        words = prompt.split()
        assert covered == [i for i, w in enumerate(words) if PLACEHOLDER not in w] # each word once
        assert parts[-1].kind in ('before', 'after', 'all')

@pytest.mark.parametrize('prompt', [*PRINTED, DEFAULT_PROMPT, '<CLASS>', '<CLASS>.', 'aerial view: <CLASS>'])
def test_printed_prompts_are_readable(prompt): assert unreadable(prompt) == ''

@pytest.mark.parametrize('prompt', ['qzx vfrt wlkj <CLASS>', '<CLASS> <CLASS <CLASS> ... %%% 123 45', 'photo photo photo <CLASS>'])
def test_gibberish_is_not(prompt): assert unreadable(prompt)

@pytest.mark.parametrize('prompt', ['', '   ', '.', '<CLASS>', '...', '日本語 <CLASS>', '\n<CLASS>\t', "''' <CLASS>"])
def test_odd_text_raises_nothing_unexpected(prompt):
    unreadable(prompt), odd_words(prompt), named_classes(prompt, ['', 'a', '日本語'])
    if PLACEHOLDER in prompt: leave_one_out(prompt)
    else:
        with pytest.raises(IpoError): leave_one_out(prompt)

def test_class_names_with_odd_characters():
    names = ['a/b', "bird's nest", 'c<d>', '...', 'AnnualCrop']
    assert named_classes("a bird's nest and <CLASS>", names) == ["bird's nest"]
    assert named_classes('annualcrop <CLASS>', names) == ['AnnualCrop']
    assert named_classes('a class <CLASS>', ['class', 'CLASS']) == [] # too common a word to tell
    assert named_classes('a <CLASS>', ['class']) == []

def test_signatures_without_the_other_methods():
    result = dict(methods=[make_evaluation('IPO', 'a <CLASS>', [1], [1]).to_dict()], paired=[], chosen=dict(prompt='a <CLASS>'),
                  data=dict(classes=['x']), search=dict(status={}))
    assert [s['found'] for s in signatures(result)] == [False]*3

# --- elsewhere ---

def test_transfer_scores_a_target_against_its_own_names():
    from ipo_nb.data import load_dataset, original_labels, shifts
    original = load_dataset('mini_objects').classes
    for name in shifts('mini_objects'): assert load_dataset(name).classes == [original[i] for i in original_labels(name)]
    names, seen = [original[i] for i in (0, 3, 5)], []
    def predict(clip, prompts, names, feats): seen.append(list(names)); return np.array([[0, 1, 2, 2]]*len(prompts))
    row, = transfer(None, {'IPO': 'a <CLASS>'}, [('some', Half(names, np.zeros((4, 2)), np.array([0, 1, 2, 0])))], predict=predict)
    assert seen == [names] and (row['accuracy'], row['n'], row['classes'], row['skipped']) == (75., 4, 3, '')
    assert row['interval'] == interval([1, 1, 1, 0])

def test_transfer_keeps_a_row_for_what_it_skips():
    def predict(clip, prompts, names, feats):
        if 'long' in prompts[0]: raise IpoError('too long.')
        return np.zeros((1, len(feats)), int)
    half = Half(['a', 'b'], np.zeros((3, 2)), np.array([0, 0, 1]))
    rows = transfer(None, {'IPO': 'long <CLASS>', 'default prompt': '<CLASS>'}, [('x', half), ('y', 'not here.')], predict=predict)
    assert [(r['dataset'], r['method'], r['skipped']) for r in rows] == [('x', 'IPO', 'too long.'), ('x', 'default prompt', ''), ('y', '', 'not here.')]
    assert transfer_means(rows) == {} and transfer_means(rows[1:]) == {'default prompt': 66.6667}
