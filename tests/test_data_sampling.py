"Which samples an epoch gives: exact shares, orders that follow from (seed, epoch), draws of samples that come several times."
import pytest
import torch

from deep_studio_nb.common.errors import DataError
from deep_studio_nb.common.randomness import generator
from deep_studio_nb.data.batches import EpochSampler
from deep_studio_nb.data.loaders import BaseDataLoader
from deep_studio_nb.data.sampling import by_length, class_counts, class_weights, fill_places, order_of, positive_weights, share_places
from deep_studio_nb.data.tensors import Tensors

COUNTS = [(50, 30, 20), (97, 2, 1), (1, 1, 1), (1000, 1), (5, 0, 5), (3, 200, 40, 7, 1, 1)]


def data(counts):
    "A dataset whose labels are shuffled, as in life."
    y = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    y = y[torch.randperm(len(y), generator=generator(0))]
    return Tensors(torch.arange(len(y))[:, None].float(), y, classes=[f'c{i}' for i in range(len(counts))])


class Sentences(Tensors):
    def __init__(self, lengths):
        super().__init__(torch.zeros(len(lengths), 1))
        self._lengths = lengths
    def lengths(self): return self._lengths


@pytest.mark.parametrize('counts', COUNTS)
def test_balanced_shares_are_exact(counts):
    ds = data(counts)
    n, present = len(ds), sum(c>0 for c in counts)
    order = order_of(ds, 'balanced', seed=3)
    for epoch in range(4):
        idx = order(epoch)
        assert len(idx)==n
        got = ds.y[idx].bincount(minlength=len(counts))
        for c, m in zip(counts, got.tolist(), strict=True): assert m==0 if c==0 else abs(m-n/present) < 1
        times = idx.bincount(minlength=n)
        for c in range(len(counts)):
            mine = times[ds.y==c]
            if len(mine): assert mine.max()-mine.min() <= 1


def test_all_samples_of_a_frequent_class_come_in_time():
    ds = data((90, 10))
    order = order_of(ds, 'balanced')
    seen = torch.stack([order(e).bincount(minlength=100)>0 for e in range(8)])
    assert 50 <= seen[0].sum() < 100
    assert seen.any(0).all()


@pytest.mark.parametrize('weights, shares', [({'c1': 9}, (90, 90)), ([1, 1], (90, 10)), ({'c0': 0}, (0, 1)), ({'c0': 1, 'c1': 4.5}, (90, 45)), (torch.tensor([2., 2.]), (90, 10))])
def test_weighted_shares(weights, shares):
    ds = data((90, 10))
    got = ds.y[order_of(ds, 'weighted', weights=weights)(1)].bincount(minlength=2)
    want = torch.tensor(shares)*100/sum(shares)
    assert got.sum()==100 and (got-want).abs().max() < 1


def test_odd_places_go_round():
    got = torch.stack([share_places(torch.ones(3), 100, generator(i)) for i in range(300)])
    assert (got.sum(1)==100).all() and got.min()==33 and got.max()==34
    assert (got==34).sum(0).min() > 70


@pytest.mark.parametrize('sampling, extra', [('balanced', {}), ('weighted', dict(weights={'c1': 3})), ('by_length', dict(batch_size=4))])
def test_an_order_follows_from_seed_and_epoch_alone(sampling, extra):
    ds = Sentences([i*7 % 31 for i in range(40)]) if sampling=='by_length' else data((30, 10))
    made = order_of(ds, sampling, seed=5, **extra)
    state = torch.get_rng_state()
    want = [made(e) for e in range(4)]
    assert torch.equal(torch.get_rng_state(), state)
    again = order_of(ds, sampling, seed=5, **extra)
    for e in (3, 1, 0, 2): assert torch.equal(again(e), want[e])
    assert len({tuple(o.tolist()) for o in want})==4
    assert not torch.equal(order_of(ds, sampling, seed=6, **extra)(0), want[0])


@pytest.mark.parametrize('step', [0, 1, 7, 40])
def test_an_epoch_goes_on_in_its_middle(step):
    ds = data((33, 7))
    def sampler(): return EpochSampler(len(ds), seed=2, order_of=order_of(ds, 'balanced', seed=2))
    whole = sampler()
    whole.epoch = 3
    want = [(int(i), i.draw) for i in whole]
    part = sampler()
    part.epoch, part.start = 3, step
    assert [(int(i), i.draw) for i in part]==want[step:]
    assert part.epoch==4 and part.start==0
    assert [(int(i), i.draw) for i in part]==[(int(i), i.draw) for i in whole]


def test_each_time_a_sample_comes_has_its_own_draw():
    ds = data((38, 2))
    plain = {int(i): i.draw for i in EpochSampler(40, seed=1)}
    seen = {}
    for i in EpochSampler(40, seed=1, order_of=order_of(ds, 'balanced', seed=1)): seen.setdefault(int(i), []).append(i.draw)
    rare = [draws for i, draws in seen.items() if ds.y[i]==1]
    assert [len(o) for o in rare]==[10, 10]
    assert len({o for draws in seen.values() for o in draws})==40
    for i, draws in seen.items(): assert draws[0]==plain[i]


# --- by length ---

@pytest.mark.parametrize('n', [1, 7, 8, 9, 64, 1003])
def test_texts_of_like_length_meet(n):
    lengths = (torch.rand(n, generator=generator(1))**3*200).long()
    order = by_length(lengths, 8, generator(2))
    assert torch.equal(order.sort().values, torch.arange(n))
    batches = order.split(8)
    assert all(len(o)==8 for o in batches[:-1])
    if n>=8: assert lengths[batches[0]].max() >= max(lengths[o].max() for o in batches if len(o)==8)
    if n>1000:
        def padding(order): return sum((lengths[o].max()-lengths[o]).sum().item() for o in order.split(8))
        assert padding(order) < 0.1*padding(torch.randperm(n, generator=generator(3)))
        other = {frozenset(o.tolist()) for o in by_length(lengths, 8, generator(4)).split(8)}
        assert len(other & {frozenset(o.tolist()) for o in batches}) < 5   # other texts meet in another epoch


# --- what cannot be done is said ---

@pytest.mark.parametrize('sampling, weights, says', [
    ('balansed', None, 'did you mean `balanced`'),
    ('weighted', None, 'how many times as often'),
    ('weighted', {'c1x': 2}, 'did you mean `c1`'),
    ('weighted', [1, 2, 3], '3 entries for 2 classes'),
    ('weighted', [-1, 2], 'at least 0'),
    ('weighted', [float('nan'), 2], 'at least 0'),
    ('weighted', [0, 0], 'not all 0'),
    ('weighted', 'balanced', "`weights` is 'balanced'"),
    ('shuffle', [1, 2], 'belong to `sampling`'),
    ('by_length', None, 'It is for texts'),
])
def test_a_mistake_is_told_before_the_first_epoch(sampling, weights, says):
    with pytest.raises(DataError, match=says): order_of(data((3, 2)), sampling, weights)


def test_targets_that_are_no_classes_are_told():
    for ds, says in [(Tensors(torch.zeros(4, 1), torch.rand(4)), 'are numbers'), (Tensors(torch.zeros(4, 1), torch.rand(4, 2)), r'shape \(2,\)'),
                     (Tensors(torch.zeros(4, 1)), 'needs the labels'), (Tensors(torch.zeros(4, 1), torch.ones(4, 2), classes=['a', 'b']), 'several labels')]:
        with pytest.raises(DataError, match=says): order_of(ds, 'balanced')


def test_a_weight_on_a_class_without_samples_is_told():
    with pytest.raises(DataError, match='leaves no sample'): order_of(data((0, 5)), 'weighted', {'c1': 0})


# --- counts and weights ---

def test_counts_of_a_part_are_those_of_the_part():
    ds = data((50, 30, 20))
    part = ds.subset(torch.arange(40).tolist())
    assert torch.equal(class_counts(part), ds.y[:40].bincount(minlength=3))
    w = class_weights(part)
    assert torch.allclose(w*class_counts(part), torch.full((3,), 40/3))


def test_a_dataset_may_count_for_itself():
    ds = data((3, 2))
    ds.class_counts = lambda: [10, 20]
    assert class_counts(ds).tolist()==[10, 20] and class_weights(ds).tolist()==[1.5, 0.75]


def test_weights_of_labels():
    ds = Tensors(torch.zeros(4, 1), torch.tensor([[1., 0, 0], [1, 1, 0], [1, 0, 0], [0, 0, 0]]), classes=['a', 'b', 'c'])
    assert torch.allclose(positive_weights(ds), torch.tensor([1/3, 3, 1]))


def test_places_of_a_class_without_samples_stay_empty():
    assert fill_places(torch.tensor([0, 2, 2]), torch.tensor([2, 0, 3]), generator(0)).bincount().tolist()[0]==2


# --- through a loader ---

@pytest.mark.parametrize('sampling, weights', [('balanced', None), ('weighted', {'c1': 5})])
def test_a_loader_samples_by_class_in_training_only(sampling, weights):
    ds = data((90, 10))
    loader = BaseDataLoader(ds, 10, validation_split=0.2, sampling=sampling, weights=weights, seed=4)
    y = torch.cat([y for _, y in loader])
    want = (40, 40) if sampling=='balanced' else (51, 29)
    assert len(y)==80 and (y.bincount()-torch.tensor(want)).abs().max() <= 1
    valid = torch.cat([y for _, y in loader.split_validation()])
    assert valid.bincount().tolist()==[18, 2]


def test_a_loader_goes_on_in_the_middle_of_a_balanced_epoch():
    ds = data((33, 7))
    def batches(step):
        loader = BaseDataLoader(ds, 8, sampling='balanced', seed=2)
        loader.set_epoch(2)
        loader.start_at(step)
        return list(loader)
    want = batches(0)
    for step in (1, 4):
        for a, b in zip(batches(step), want[step:], strict=True): assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_a_loader_puts_texts_of_like_length_together():
    ds = Sentences([i*7 % 31 for i in range(40)])
    loader = BaseDataLoader(ds, 4, sampling='by_length')
    order = loader.sampler.order()
    assert torch.equal(order.sort().values, torch.arange(40))
    spread = [max(ds.lengths()[i] for i in o)-min(ds.lengths()[i] for i in o) for o in order.split(4)]
    assert max(spread) <= 4
    with pytest.raises(DataError, match='`shuffle` is false'): BaseDataLoader(ds, 4, shuffle=False, sampling='by_length')
