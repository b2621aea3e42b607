"""Losses: equal to reference implementations, right gradients, bounds, symmetries, sums of several, and wrong batches told in words."""

import logging
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from deep_studio_nb.common.errors import ConfigError, DataError, StudioError
from deep_studio_nb.common.registry import LOSSES
from deep_studio_nb.common.types import Loss
from deep_studio_nb.training.class_losses import binary_focal_loss, focal_loss
from deep_studio_nb.training.contrastive_losses import contrastive_loss
from deep_studio_nb.training.loss_checks import check_loss
from deep_studio_nb.training.losses import LossSum, build_loss, loss_name, loss_option
from deep_studio_nb.training.number_losses import charbonnier_loss
from deep_studio_nb.training.overlap_losses import dice_loss, jaccard_loss
from deep_studio_nb.training.structure_losses import ssim, ssim_loss

some = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 10_000)


def rand(seed, *shape, ints=0, dtype=torch.double):
    gen = torch.Generator().manual_seed(seed)
    return torch.randint(ints, shape, generator=gen) if ints else torch.randn(shape, generator=gen, dtype=dtype)


def spread(x):
    "Strong logits of either sign, so that every formula is tried far from its middle."
    return x*4


# name -> (loss, predictions and targets of a seed)
CASES = {
    'focal': (focal_loss, lambda s: (rand(s, 3, 4), rand(s+1, 3, ints=4))),
    'focal masks': (focal_loss, lambda s: (rand(s, 2, 3, 2, 3), rand(s+1, 2, 2, 3, ints=3))),
    'focal shares': (focal_loss, lambda s: (rand(s, 3, 4), rand(s+1, 3, 4).softmax(1))),
    'focal, gamma 0.5': (lambda p,t: focal_loss(p, t, 0.5), lambda s: (rand(s, 3, 4), rand(s+1, 3, ints=4))),
    'binary_focal': (binary_focal_loss, lambda s: (rand(s, 3, 4), rand(s+1, 3, 4, ints=2).double())),
    'dice': (dice_loss, lambda s: (rand(s, 2, 3, 3, 2), rand(s+1, 2, 3, 2, ints=3))),
    'dice, one logit': (dice_loss, lambda s: (rand(s, 2, 1, 3, 2), rand(s+1, 2, 3, 2, ints=2))),
    'dice, batch': (lambda p,t: dice_loss(p, t, batch=True, skip=0), lambda s: (rand(s, 2, 3, 3, 2), rand(s+1, 2, 3, 2, ints=3))),
    'jaccard': (jaccard_loss, lambda s: (rand(s, 2, 3, 3, 2), rand(s+1, 2, 3, 2, ints=3))),
    'jaccard, overlapping': (lambda p,t: jaccard_loss(p, t, overlapping=True), lambda s: (rand(s, 2, 3, 3, 2), rand(s+1, 2, 3, 3, 2, ints=2))),
    'ssim': (lambda p,t: ssim_loss(p, t, window=3), lambda s: (rand(s, 2, 2, 5, 4).sigmoid(), rand(s+1, 2, 2, 5, 4).sigmoid())),
    'charbonnier': (charbonnier_loss, lambda s: (rand(s, 3, 4), rand(s+1, 3, 4))),
    'contrastive': (contrastive_loss, lambda s: (rand(s, 6, 3), rand(s+1, 6, ints=3))),
    'contrastive views': (contrastive_loss, lambda s: (rand(s, 3, 2, 4), torch.arange(3))),
}


@pytest.mark.parametrize('name', CASES)
@given(seed=seeds)
@settings(max_examples=5, deadline=None)
def test_gradients_are_those_of_the_formula(name, seed):
    fn,make = CASES[name]
    x,t = make(seed)
    assert torch.autograd.gradcheck(lambda o: fn(o, t), x.requires_grad_())


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('scale', [0., 1., 40., 1e4])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_and_gradients_are_finite_for_predictions_of_any_size(name, scale, dtype):
    fn,make = CASES[name]
    x,t = make(0)
    x = (x*scale).to(dtype).requires_grad_()
    value = fn(x, t.to(dtype) if t.is_floating_point() and name in ('ssim', 'charbonnier') else t.float() if t.is_floating_point() else t)
    assert value.ndim==0 and value.dtype==torch.float32 and value.isfinite()
    assert torch.autograd.grad(value, x)[0].isfinite().all()


@pytest.mark.parametrize('name', CASES)
@given(seed=seeds)
@some
def test_losses_stay_within_their_bounds(name, seed):
    fn,make = CASES[name]
    x,t = make(seed)
    top = {'dice':1., 'jaccard':1., 'ssim':2.}.get(name.split(',')[0].split()[0], math.inf)
    assert -1e-9<=fn(spread(x) if name!='ssim' else x, t)<=top+1e-9


@pytest.mark.parametrize('name', [o for o in CASES if 'batch' not in o and 'contrastive' not in o])
@given(seed=seeds, data=st.data())
@some
def test_the_order_of_items_does_not_matter_and_a_batch_is_the_mean_of_its_items(name, seed, data):
    fn,make = CASES[name]
    x,t = make(seed)
    order = torch.tensor(data.draw(st.permutations(range(len(x)))))
    assert fn(x[order], t[order])==pytest.approx(fn(x, t).item(), rel=1e-9)
    each = [fn(x[i:i+1], t[i:i+1]).item() for i in range(len(x))]
    assert sum(each)/len(each)==pytest.approx(fn(x, t).item(), rel=1e-9)


@pytest.mark.parametrize('fn', [charbonnier_loss, lambda p,t: ssim_loss(p, t, window=3)], ids=['charbonnier', 'ssim'])
@given(seed=seeds)
@some
def test_losses_over_numbers_are_symmetric(fn, seed):
    a,b = rand(seed, 2, 2, 5, 6),rand(seed+1, 2, 2, 5, 6)
    assert fn(a, b)==pytest.approx(fn(b, a).item(), rel=1e-9)


@pytest.mark.parametrize('fn', [dice_loss, jaccard_loss])
@given(seed=seeds)
@some
def test_overlaps_are_symmetric(fn, seed):
    a,b = rand(seed, 2, 1, 3, 4).sigmoid(),rand(seed+1, 2, 1, 3, 4).sigmoid()
    assert fn(a.logit(), b)==pytest.approx(fn(b.logit(), a).item(), rel=1e-7)


# Reference implementations, written as the papers write them, one place at a time

def focal_by_hand(x, t, gamma, weight):
    p,total,count = x.softmax(1).movedim(1, -1).reshape(-1, x.shape[1]),0.,0.
    for row,k in zip(p, t.flatten()):
        if k==-100: continue
        total += weight[k]*(1-row[k])**gamma*-row[k].log()
        count += weight[k]
    return total/count


def overlap_by_hand(x, t, smooth, kind, ignore=-100):
    p,scores = x.softmax(1),[]
    for pi,ti in zip(p, t):
        for k in range(x.shape[1]):
            both = guess = there = 0.
            for place in np.ndindex(*ti.shape):
                if ti[place]==ignore: continue
                is_k = float(ti[place]==k)
                both,guess,there = both+pi[(k,*place)].item()*is_k,guess+pi[(k,*place)].item(),there+is_k
            scores.append((2*both+smooth)/(guess+there+smooth) if kind=='dice' else (both+smooth)/(guess+there-both+smooth))
    return 1-sum(scores)/len(scores)


@given(seed=seeds, gamma=st.sampled_from([0., 0.5, 2., 5.]))
@some
def test_focal_equals_the_formula_place_by_place(seed, gamma):
    x,t,w = rand(seed, 2, 3, 3, 2),rand(seed+1, 2, 3, 2, ints=3),rand(seed+2, 3).exp()
    t[0,0] = -100
    assert focal_loss(x, t, gamma, w)==pytest.approx(focal_by_hand(x, t, gamma, w).item(), rel=1e-9)


@given(seed=seeds, gamma=st.sampled_from([0., 0.5, 2.]), alpha=st.sampled_from([None, 0.25, 0.9]))
@some
def test_binary_focal_equals_torchvision(seed, gamma, alpha):
    from torchvision.ops import sigmoid_focal_loss
    x,t = spread(rand(seed, 5, 4)),rand(seed+1, 5, 4, ints=2).double()
    assert binary_focal_loss(x, t, gamma, alpha)==pytest.approx(sigmoid_focal_loss(x, t, -1 if alpha is None else alpha, gamma, reduction='mean').item(), rel=1e-9)


@pytest.mark.parametrize('kind, fn', [('dice', dice_loss), ('jaccard', jaccard_loss)])
@given(seed=seeds, smooth=st.sampled_from([1e-5, 1., 10.]), ignore=st.sampled_from([-100, 255, 1]))
@some
def test_overlaps_equal_the_formula_place_by_place(kind, fn, seed, smooth, ignore):
    x,t = rand(seed, 2, 3, 3, 2),rand(seed+1, 2, 3, 2, ints=3)
    t[1,0] = ignore
    assert fn(x, t, smooth=smooth, ignore_index=ignore)==pytest.approx(overlap_by_hand(x, t, smooth, kind, ignore), rel=1e-6)


def test_overlaps_of_sure_masks_equal_scikit_learn_and_torchmetrics():
    import sklearn.metrics as sk
    from torchmetrics.functional.segmentation import dice_score
    t,guess = rand(0, 1, 20, 20, ints=3),rand(1, 1, 20, 20, ints=3)
    x = F.one_hot(guess, 3).movedim(-1, 1)*60.
    assert dice_loss(x, t, smooth=0.)==pytest.approx(1-sk.f1_score(t.flatten(), guess.flatten(), average='macro'), abs=1e-6)
    assert jaccard_loss(x, t, smooth=0.)==pytest.approx(1-sk.jaccard_score(t.flatten(), guess.flatten(), average='macro'), abs=1e-6)
    theirs = dice_score(guess, t, num_classes=3, average='macro', input_format='index')
    assert dice_loss(x, t, smooth=0.)==pytest.approx(1-theirs.mean().item(), abs=1e-6)


@pytest.mark.parametrize('channels', [1, 3])
@given(seed=seeds, noise=st.sampled_from([0.01, 0.1, 0.5]), sigma=st.sampled_from([(11, 1.5), (9, 1.), (15, 2.)]), top=st.sampled_from([1., 255.]))
@some
def test_ssim_equals_scikit_image(channels, seed, noise, sigma, top):
    from skimage.metrics import structural_similarity
    a = rand(seed, 2, channels, 24, 20).sigmoid()
    b = (a+noise*rand(seed+1, 2, channels, 24, 20)).clamp(0, 1)
    window,width = sigma
    theirs = [structural_similarity(x.numpy()*top, y.numpy()*top, win_size=window, gaussian_weights=True, sigma=width, use_sample_covariance=False, data_range=top, channel_axis=0, truncate=3.5) for x,y in zip(a, b)]
    assert ssim(a*top, b*top, window, width, top).tolist()==pytest.approx(theirs, abs=1e-6)


def test_ssim_equals_torchmetrics_within_the_picture():
    from torchmetrics.functional.image import structural_similarity_index_measure
    a,b = rand(0, 3, 2, 20, 30, dtype=torch.float32).sigmoid(),rand(1, 3, 2, 20, 30, dtype=torch.float32).sigmoid()
    whole = structural_similarity_index_measure(a, b, data_range=1., reduction='none', return_full_image=True)[1]
    assert ssim(a, b).tolist()==pytest.approx(whole[:,:,5:-5,5:-5].flatten(1).mean(1).tolist(), abs=1e-5)


@given(seed=seeds, t=st.sampled_from([0.05, 0.1, 1.]))
@some
def test_contrastive_equals_the_formula_and_nt_xent(seed, t):
    x,y = rand(seed, 8, 5),rand(seed+1, 8, ints=3)
    z,terms = F.normalize(x, dim=1),[]
    for i in range(8):
        kin = [j for j in range(8) if j!=i and y[j]==y[i]]
        total = sum(((z[i]@z[j])/t).exp() for j in range(8) if j!=i)
        if kin: terms.append(-sum((((z[i]@z[j])/t).exp()/total).log() for j in kin)/len(kin))
    assert contrastive_loss(x, y, t)==pytest.approx((sum(terms)/len(terms)).item() if terms else 0., rel=1e-8)
    views = rand(seed, 4, 2, 5)
    z = F.normalize(torch.cat([views[:,0], views[:,1]]), dim=1)
    near = (z@z.T/t).masked_fill(torch.eye(8, dtype=torch.bool), -math.inf)
    assert contrastive_loss(views, torch.arange(4), t)==pytest.approx(F.cross_entropy(near, (torch.arange(8)+4)%8).item(), rel=1e-8)


@pytest.mark.parametrize('short, fn', [('bce', F.binary_cross_entropy_with_logits), ('mse', F.mse_loss), ('l1', F.l1_loss), ('huber', F.huber_loss), ('nll', F.nll_loss), ('cross_entropy', F.cross_entropy), ('focal', focal_loss),
                                       ('binary_focal', binary_focal_loss), ('dice', dice_loss), ('jaccard', jaccard_loss), ('ssim', ssim_loss), ('charbonnier', charbonnier_loss), ('contrastive', contrastive_loss)])
def test_losses_are_found_by_name(short, fn):
    assert build_loss(short) is fn and short in (*LOSSES.names(), 'cross_entropy')


def test_cross_entropy_with_smoothing_and_weights_is_torch_s_own():
    x,t = rand(0, 6, 3, dtype=torch.float32),rand(1, 6, ints=3)
    built = build_loss({'type':'cross_entropy', 'args':{'label_smoothing':0.1, 'weight':'balanced', 'ignore_index':2}}, dict(class_counts=[6,3,1]))
    w = loss_option(built, 'weight')
    assert built(x, t)==F.cross_entropy(x, t, weight=w, label_smoothing=0.1, ignore_index=2) and w.argmax()==2
    assert (loss_name(built), loss_option(built, 'ignore_index')) == ('cross_entropy', 2)


@given(seed=seeds, w=st.lists(st.floats(0, 3), min_size=2, max_size=2))
@some
def test_a_sum_is_its_parts_times_their_weights(seed, w):
    x,t = rand(seed, 2, 3, 4, 4, dtype=torch.float32),rand(seed+1, 2, 4, 4, ints=3)
    both = build_loss({'type':'sum', 'args':{'losses':[{'type':'cross_entropy', 'weight':w[0]}, {'type':'dice', 'weight':w[1], 'args':{'skip':0}}]}})
    value = both(x, t)
    assert isinstance(value, Loss) and list(value)==['cross_entropy', 'dice']
    assert value.total.item()==pytest.approx(w[0]*F.cross_entropy(x, t).item()+w[1]*dice_loss(x, t, skip=0).item(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize('losses, text', [([], 'is empty'), (['dice', 'dice'], 'two are'), ([{'type':'mse', 'name':'loss'}], 'that is the total'), ([{'type':'mse', 'wight':2}], 'did you mean `weight`'), (['dise'], 'did you mean `dice`'),
                                          ([{'type':'mse', 'weight':'2'}], 'want a number'), ([{'type':'mse', 'weight':True}], 'want a number'), ([{'type':'dice', 'args':{'smoth':1.}}], '`smooth`'), ([{'args':{}}], 'type'), ([LossSum(['mse'])], 'within a `sum`')])
def test_wrong_sums_are_told(losses, text):
    with pytest.raises(StudioError, match=text): LossSum(losses)


def test_modules_of_a_sum_move_with_it():
    both = LossSum([nn.CrossEntropyLoss(weight=torch.ones(3)), 'mse'])
    assert [o.device.type for o in both.to('meta').buffers()]==['meta']


WRONG = [('focal', (4,3), (4,1)), ('focal', (4,), (4,)), ('dice', (2,3,4,4), (2,4,5)), ('dice', (2,3), (2,)), ('jaccard', (2,3,4,4), (2,1,4,4)), ('binary_focal', (4,1), (4,)), ('charbonnier', (2,3), (3,2)),
         ('ssim', (2,1,12,12), (2,3,12,12)), ('ssim', (2,12,12), (2,12,12)), ('ssim', (2,1,8,12), (2,1,8,12)), ('contrastive', (4,3), (5,)), ('contrastive', (4,), (4,))]


@pytest.mark.parametrize('name, shape, other', WRONG, ids=str)
def test_shapes_that_do_not_match_are_told_in_words(name, shape, other):
    x = torch.rand(shape)
    t = torch.rand(other) if name in ('binary_focal', 'charbonnier', 'ssim') else torch.zeros(other, dtype=torch.long)
    for call in (build_loss(name), lambda p,t: check_loss(build_loss(name), p, t)):
        with pytest.raises(DataError, match='shape|windows') as e: call(x, t)
        assert f'`{name}' in str(e.value) and 'Traceback' not in str(e.value)


@pytest.mark.parametrize('spec, x, t, text', [
    ('focal', torch.zeros(3,2), torch.tensor([0,1,2]), 'class number 2'),
    ('dice', torch.zeros(1,2,3,3), torch.full((1,3,3), 2), 'class number 2'),
    ({'type':'dice', 'args':{'ignore_index':255}}, torch.zeros(1,2,3,3), torch.full((1,3,3), -100), 'What is not to count has the number 255'),
    ('jaccard', torch.zeros(1,1,3,3), torch.full((1,3,3), 255), 'Divide masks that go to 255'),
    ('bce', torch.zeros(3,1), torch.tensor([[0.],[3.],[1.]]), 'want 1 for yes and 0 for no'),
    ('binary_focal', torch.zeros(3,1), torch.tensor([[0],[3],[1]]), 'use `cross_entropy`'),
    ({'type':'focal', 'args':{'weight':[1.,2.,3.]}}, torch.zeros(3,2), torch.tensor([0,1,0]), '3 numbers as `weight`'),
])
def test_the_first_batch_tells_what_is_wrong(spec, x, t, text):
    with pytest.raises(DataError, match=text): check_loss(build_loss(spec), x, t)
    both = build_loss({'type':'sum', 'args':{'losses':[spec]}})
    with pytest.raises(DataError, match=text): check_loss(both, x, t)


@pytest.mark.parametrize('spec, x, t, text', [
    ('bce', torch.rand(8,5), torch.ones(8,5), 'Leave out the sigmoid'),
    ('dice', torch.rand(2,1,8,8), torch.ones(2,8,8).long(), 'Leave out the sigmoid'),
    ('focal', torch.rand(8,5).softmax(1), torch.zeros(8).long(), 'Leave out the softmax'),
    ('dice', torch.rand(2,3,8,8).softmax(1), torch.ones(2,8,8).long(), 'Leave out the softmax'),
    ('ssim', torch.rand(1,1,12,12), torch.rand(1,1,12,12)*255, 'Set its `data_range`'),
    ('contrastive', torch.rand(4,3), torch.arange(4), 'larger batches'),
])
def test_the_first_batch_tells_what_looks_wrong(spec, x, t, text, caplog):
    with caplog.at_level(logging.WARNING): check_loss(build_loss(spec), x, t)
    assert len(caplog.messages)==1 and text in caplog.messages[0]
    caplog.clear()
    with caplog.at_level(logging.WARNING): check_loss(build_loss(spec), x.logit() if spec!='ssim' else x, t if spec not in ('ssim', 'contrastive') else x if spec=='ssim' else t//2)
    assert not caplog.messages


def test_ssim_wants_an_odd_window_and_contrastive_a_temperature():
    for window in (10, 0, -3, 2.5):
        with pytest.raises(ConfigError, match='odd number'): ssim(torch.rand(1,1,12,12), torch.rand(1,1,12,12), window)
    with pytest.raises(ConfigError, match='above 0'): contrastive_loss(torch.rand(4,3), torch.zeros(4).long(), -1.)
