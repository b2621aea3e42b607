"Do intervals hold what they promise? Tried out on scores whose truth is known, with fixed seeds; and what comes in wrong."
import math
import pytest
import torch
from deep_studio_nb.common.errors import DataError
from deep_studio_nb.experiments.bootstrap import Bootstrap, paired_bootstrap, resamples
from deep_studio_nb.experiments.recipes import spread_difference

TRIALS = 600

def of(seed): return torch.Generator().manual_seed(seed)

def coverage(make, truth, trials=TRIALS, **kw):
    "The share of trials in which the interval of B - A holds the truth; the seed of the draws changes with the trial."
    g, held = of(7), 0
    for i in range(trials):
        b, a, more = make(g)
        d = paired_bootstrap(b, a, draws=1000, seed=i, **more, **kw)
        held += d.low<=truth<=d.high
    return held/trials

def allowed(level, trials=TRIALS, slack=0.):
    "Between what bounds the share of hits lies by chance, four standard errors wide, plus what a method may fall short."
    spread = 4*math.sqrt(level*(1-level)/trials)
    return level-spread-slack, min(level+spread, 1)

def numbers(n, d=0.3, noise=0.5):
    "Scores that share most of what makes a sample hard."
    def make(g):
        shared = torch.randn(n, generator=g)
        return shared+d+noise*torch.randn(n, generator=g), shared+noise*torch.randn(n, generator=g), {}
    return make

def answers(n, p_b=0.86, p_a=0.80):
    "Right or wrong, on samples that are hard for both."
    def make(g):
        hard = torch.rand(n, generator=g)
        slip = torch.rand(2, n, generator=g)<0.05
        b, a = (((hard<p)^o).double() for p,o in zip((p_b, p_a), slip))
        return b, a, {}
    return make

def losses(n):
    "Lopsided, as losses are: a few samples cost most."
    def make(g):
        shared = torch.rand(n, generator=g)
        b, a = (-torch.log(torch.rand(n, generator=g))*k*(0.5+shared) for k in (0.8, 1.))
        return b, a, {}
    return make

@pytest.mark.parametrize('n', [12, 40, 300])
def test_intervals_of_numbers_cover(n):
    low, high = allowed(0.95)
    assert low <= coverage(numbers(n), 0.3) <= high

@pytest.mark.parametrize('level', [0.5, 0.8, 0.99])
def test_any_level_covers(level):
    low, high = allowed(level)
    assert low <= coverage(numbers(50), 0.3, level=level) <= high

@pytest.mark.parametrize('n', [100, 400])
def test_intervals_of_right_and_wrong_cover(n):
    low, _ = allowed(0.95, slack=0.01)          # steps of 1/n: a little more or less than asked for
    assert low <= coverage(answers(n), 0.9*(0.86-0.80))

@pytest.mark.parametrize('n, slack', [(30, 0.03), (200, 0.01)])
def test_intervals_of_lopsided_losses_cover(n, slack):
    low, high = allowed(0.95, slack=slack)      # few samples of a long tail rarely hold its end: known, and bounded
    assert low <= coverage(losses(n), -0.2) <= high

def test_a_metric_of_the_whole_split_covers():
    "The root mean square error is no mean of scores; its truth is known for normal errors."
    n, trials = 80, 150
    def make(g):
        shared = torch.randn(n, generator=g)
        def rmse(e): return lambda i: float(e[i].square().mean().sqrt())
        return rmse(shared+0.8*torch.randn(n, generator=g)), rmse(shared+0.6*torch.randn(n, generator=g)), dict(n=n)
    g, held = of(3), 0
    truth = math.sqrt(1.64)-math.sqrt(1.36)
    for i in range(trials):
        b, a, more = make(g)
        d = paired_bootstrap(b, a, draws=400, seed=i, **more)
        held += d.low<=truth<=d.high
    assert held/trials >= allowed(0.95, trials, slack=0.02)[0]

def test_groups_cover_where_samples_alone_do_not():
    "Forty patients with ten alike photos each."
    def make(groups):
        def of_trial(g):
            series = torch.arange(40).repeat_interleave(10)
            d = 0.3+torch.randn(40, generator=g)[series]+0.2*torch.randn(400, generator=g)
            return d, torch.zeros(400), dict(groups=series.tolist()) if groups else {}
        return of_trial
    low, high = allowed(0.95, 300)
    assert low <= coverage(make(True), 0.3, trials=300) <= high
    assert coverage(make(False), 0.3, trials=300) < 0.7

def test_two_equal_models_are_rarely_told_apart():
    "False evidence comes as rarely as the level says, for numbers and for answers."
    low, _ = allowed(0.95)
    for make in (numbers(40, d=0.), answers(200, 0.8, 0.8)):
        g, wrong = of(11), 0
        for i in range(TRIALS):
            b, a, _ = make(g)
            wrong += paired_bootstrap(b, a, draws=1000, seed=i).evidence
        assert wrong/TRIALS <= 1-low

def test_a_real_difference_is_found():
    g, found = of(5), 0
    for i in range(100):
        b, a, _ = numbers(200)(g)
        found += paired_bootstrap(b, a, draws=1000, seed=i).better=='B'
    assert found >= 98

def test_spreads_over_seeds_and_folds_cover():
    g, held, pairs = of(2), 0, 0
    for _ in range(TRIALS):
        shared = torch.randn(5, generator=g)
        b, a = (shared+d+0.4*torch.randn(5, generator=g) for d in (0.5, 0.))
        both, apart = (spread_difference(b.tolist(), a.tolist(), paired=o) for o in (True, False))
        pairs += both.low<=0.5<=both.high
        held += apart.low<=0.5<=apart.high
    low, high = allowed(0.95)
    assert low <= pairs/TRIALS <= high
    assert low <= held/TRIALS                   # pairs that are taken for strangers: wider than needed

def test_pairs_tell_more_than_strangers():
    b, a, _ = numbers(100, noise=0.1)(of(1))
    boot = Bootstrap(dict(B=b, A=a))
    d, x, y = boot.difference('B', 'A'), boot.interval('B'), boot.interval('A')
    assert d.high-d.low < 0.3*((x.high-x.low)+(y.high-y.low))

def test_fast_and_slow_way_are_one():
    "A mean of scores, drawn as counts, is the same number as a function that is called for each draw."
    g = of(4)
    b, a = torch.rand(37, generator=g, dtype=torch.double), torch.rand(37, generator=g, dtype=torch.double)
    fast = paired_bootstrap(b, a, draws=500, groups=[i//3 for i in range(37)])
    slow = paired_bootstrap(lambda i: b[i].mean(), lambda i: a[i].mean(), n=37, draws=500, groups=[i//3 for i in range(37)])
    assert (fast.value, fast.low, fast.high) == pytest.approx((slow.value, slow.low, slow.high), abs=1e-12)
    mixed = paired_bootstrap(b, lambda i: a[i].mean(), draws=500, groups=[i//3 for i in range(37)])
    assert (mixed.low, mixed.differ) == (pytest.approx(fast.low, abs=1e-12), None)

def test_draws_are_the_same_again_and_touch_no_global_state():
    before = torch.random.get_rng_state()
    b, a, _ = numbers(50)(of(0))
    one, two, other = paired_bootstrap(b, a), paired_bootstrap(b, a), paired_bootstrap(b, a, seed=1)
    assert one==two and one!=other
    assert torch.equal(before, torch.random.get_rng_state())

def test_many_samples_take_bounded_memory():
    "Counts come in pieces: half a million samples are one row at a time or a few, not two thousand."
    assert max(len(o)*o.shape[1] for o in resamples(500_000, draws=12)) <= 2**22

@pytest.mark.parametrize('few', [0, 1, 5])
def test_a_handful_of_differing_samples_is_no_evidence(few):
    a = torch.zeros(400)
    b = a.clone()
    b[:few] = 1
    d = paired_bootstrap(b, a)
    assert (d.differ, d.evidence, d.better) == (few, False, None)
    assert 'no evidence' in str(d) and ('same on all' if not few else f'only {few} of them make') in str(d)

def test_a_clear_majority_of_few_is_evidence():
    a = torch.zeros(400)
    b = a.clone()
    b[:12] = 1
    assert paired_bootstrap(b, a).better=='B'

def test_few_samples_are_said_to_be_few():
    b, a, _ = numbers(8, d=5.)(of(0))
    said = str(paired_bootstrap(b, a))
    assert said.startswith('B > A') and 'hint' in said and 'over 8 samples' in said
    one = paired_bootstrap(torch.ones(1), torch.zeros(1))
    assert not one.evidence and one.low==-math.inf and 'one alone' in str(one)
    two = paired_bootstrap(torch.ones(2), torch.zeros(2))
    assert not two.evidence

def test_lower_is_better_turns_the_verdict_and_not_the_numbers():
    b, a, _ = numbers(300, d=-0.5)(of(0))
    up, down = paired_bootstrap(b, a), paired_bootstrap(b, a, mode='min')
    assert (up.low, up.high) == (down.low, down.high)
    assert (up.better, down.better) == ('A', 'B')
    assert str(down).startswith('B < A') and str(down).endswith('(lower is better)')

@pytest.mark.parametrize('b, a, kw, said', [
    (torch.zeros(3), torch.zeros(4), {}, 'different samples'),
    (torch.zeros(3, 2), torch.zeros(3, 2), {}, 'shape (3, 2)'),
    (torch.tensor([1., math.nan]), torch.zeros(2), {}, 'not finite'),
    (torch.tensor([1., math.inf]), torch.zeros(2), {}, 'not finite'),
    (torch.zeros(0), torch.zeros(0), {}, 'no samples'),
    (lambda i: 0., lambda i: 0., {}, 'Give `n`'),
    (lambda i: 0., torch.zeros(3), dict(n=4), 'different samples'),
    (lambda i: math.nan, lambda i: 0., dict(n=4), 'no value on most draws'),
    (torch.zeros(3), torch.zeros(3), dict(level=95), 'between 0 and 1'),
    (torch.zeros(3), torch.zeros(3), dict(groups=[1]), '1 groups for 3 samples'),
])
def test_what_comes_in_wrong(b, a, kw, said):
    with pytest.raises(DataError) as e: paired_bootstrap(b, a, **kw)
    assert said in str(e.value)
