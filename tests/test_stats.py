"Checks of stats that are no documentation: agreement with independent computations, odd input."
import numpy as np
import pytest
from scipy import stats
from ipo_nb.stats import accuracy, drawn_interval, interval, interval_h, paired_difference, paired_test, resample_counts

@pytest.mark.parametrize('n, p', [(20, .5), (240, .8), (8100, .53), (50_000, .66)])
def test_interval_is_the_binomial_quantile(n, p):
    correct = np.arange(n) < n*p
    exact = stats.binom.ppf([.025, .975], n, correct.mean())/n*100
    assert np.allclose(interval(correct), exact, atol=200/n + .05)

def test_interval_of_h_agrees_with_plain_resampling():
    rng = np.random.RandomState(1)
    b, v = rng.rand(150) < .8, rng.rand(120) < .6
    hs = []
    for _ in range(4000):
        x, y = rng.choice(b, 150).mean(), rng.choice(v, 120).mean()
        hs.append(200*x*y/(x+y))
    assert np.allclose(interval_h(b, v), np.percentile(hs, [2.5, 97.5]), atol=.8)

def test_extremes():
    assert interval([1]*30) == [100., 100.] and interval([0]*30) == [0., 0.]
    assert interval_h([0]*5, [0]*5) == [0., 0.]

def test_paired_test_agrees_with_scipy():
    rng = np.random.RandomState(2)
    for _ in range(20):
        a, b = rng.rand(60) < .7, rng.rand(60) < .6
        r = paired_test(a, b)
        k = r['a_only'] + r['b_only']
        assert r['p'] == pytest.approx(stats.binomtest(r['b_only'], k).pvalue, rel=1e-5)
        assert paired_test(b, a)['p'] == r['p']

def test_counts_are_those_of_drawing_with_replacement():
    "Each image once a resample on average, with the variance of a multinomial law, and rows that are no copies."
    counts = resample_counts(7, range(50), 4000)
    assert (counts.sum(1) == 50).all() and counts.min() == 0
    assert counts.mean(0) == pytest.approx(1, abs=.08) and counts.var(0) == pytest.approx(1 - 1/50, abs=.12)
    assert len(np.unique(counts, axis=0)) == 4000 and (counts != resample_counts(8, range(50), 4000)).any()

FIXED = [[3, 0, 1, 0], [0, 1, 1, 2], [2, 1, 1, 0]] # by a counter: the same under each version of numpy

def test_counts_never_change():
    assert resample_counts(0, range(4), 3).tolist() == FIXED
    assert resample_counts(0, [0, 1, 1, 0], 3).tolist() == [[r[0]+r[3], r[1]+r[2]] for r in FIXED]
    assert resample_counts(0, [0], 2).tolist() == [[1], [1]]

def test_interval_of_draws_agrees_with_the_law():
    correct = np.random.RandomState(3).rand(300) < .7
    drawn = resample_counts(1, range(300), 4000) @ correct/3
    assert drawn_interval(drawn) == pytest.approx(interval(correct), abs=.7)
    assert drawn_interval(drawn, .5) == pytest.approx(interval(correct, .5), abs=.7)
    assert drawn_interval([5.]) == [5., 5.] and set(drawn_interval(range(10))) <= set(range(10))

def test_a_difference_over_one_seed_agrees_with_plain_resampling():
    "Of accuracies that are the same on both halves, H is the accuracy."
    rng = np.random.RandomState(4)
    a, b = rng.rand(1, 400) < .75, rng.rand(1, 400) < .65
    found = paired_difference([dict(base=(a, b), novel=(a, b))])
    assert found['mean'] == pytest.approx(accuracy(a[0]) - accuracy(b[0]), abs=1e-3)
    assert found['low'] < found['mean'] < found['high'] and found['p'] < .05
