"""Metrics over a split equal those of other libraries, however the split is cut into batches."""

import io

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
import torch.nn.functional as F

from deep_studio_nb.common.errors import ConfigError, DataError, UnknownName
from deep_studio_nb.common.types import Loss
from deep_studio_nb.training.metrics import Meter, build_metrics

N,K = 203,4
CUTS = [[203], [64,64,64,11], [1]*203, [200,1,2]]


def class_data():
    gen = torch.Generator().manual_seed(0)
    return torch.randn(N, K, generator=gen), torch.randint(K, (N,), generator=gen)


def number_data():
    gen = torch.Generator().manual_seed(1)
    return torch.randn(N, 1, generator=gen), torch.randn(N, generator=gen)*3+1


def over(meter, preds, target, cut, loss=None):
    "Show `meter` all items in batches of the sizes of `cut`."
    for p,t in zip(preds.split(cut), target.split(cut)): meter.add(loss(p, t) if loss else None, p, t)
    return meter


CLASS_METRICS = {
    'accuracy': lambda p,t: sk.accuracy_score(t, p.argmax(1)),
    'top_k_acc': lambda p,t: sk.top_k_accuracy_score(t, p, k=3),
    'f1': lambda p,t: sk.f1_score(t, p.argmax(1), average='macro')}
NUMBER_METRICS = {
    'mae': lambda p,t: sk.mean_absolute_error(t, p),
    'mse': lambda p,t: sk.mean_squared_error(t, p),
    'rmse': lambda p,t: sk.root_mean_squared_error(t, p),
    'r2': lambda p,t: sk.r2_score(t, p)}


@pytest.mark.parametrize('cut', CUTS, ids=str)
@pytest.mark.parametrize('data, theirs', [(class_data, CLASS_METRICS), (number_data, NUMBER_METRICS)], ids=['classes', 'numbers'])
def test_metrics_equal_those_of_scikit_learn_however_batches_are_cut(data, theirs, cut):
    preds,target = data()
    found = over(Meter(list(theirs)), preds, target, cut).compute()
    for name,fn in theirs.items(): assert found[name] == pytest.approx(fn(preds, target), abs=1e-6), name


@pytest.mark.parametrize('cut', CUTS, ids=str)
def test_the_loss_is_the_mean_over_items(cut):
    preds,target = class_data()
    meter = over(Meter(), preds, target, cut, F.cross_entropy)
    assert meter.compute()['loss'] == pytest.approx(F.cross_entropy(preds, target).item(), abs=1e-6)


@pytest.mark.parametrize('cut', CUTS[:2], ids=str)
def test_metrics_of_torchmetrics_by_name(cut):
    preds,target = class_data()
    specs = ['Accuracy', {'type':'F1Score', 'args':{'average':'macro'}}, 'AUROC', {'type':'Recall', 'args':{'average':'none'}}]
    found = over(Meter(specs, facts={'num_classes':K, 'in_channels':1}), preds, target, cut).compute()
    guess = preds.argmax(1)
    assert found['Accuracy'] == pytest.approx(sk.accuracy_score(target, guess))
    assert found['F1Score'] == pytest.approx(sk.f1_score(target, guess, average='macro'))
    assert found['AUROC'] == pytest.approx(sk.roc_auc_score(target, preds.softmax(1), multi_class='ovr'), abs=1e-5)
    assert [found[f'Recall_{i}'] for i in range(K)] == pytest.approx(list(sk.recall_score(target, guess, average=None)))


def test_our_metrics_equal_torchmetrics():
    preds,target = class_data()
    specs = ['accuracy', 'f1', 'Accuracy', {'type':'F1Score', 'args':{'average':'macro'}}]
    found = over(Meter(specs, facts={'num_classes':K}), preds, target, CUTS[1]).compute()
    assert found['accuracy'] == pytest.approx(found['Accuracy'])
    assert found['f1'] == pytest.approx(found['F1Score'])


def test_two_classes_by_one_logit():
    gen = torch.Generator().manual_seed(2)
    preds,target = torch.randn(N, generator=gen),torch.randint(2, (N,), generator=gen)
    for p in (preds, preds[:,None]):
        found = over(Meter(['accuracy', 'f1']), p, target, CUTS[1]).compute()
        assert found['accuracy'] == pytest.approx(sk.accuracy_score(target, preds>0))
        assert found['f1'] == pytest.approx(sk.f1_score(target, preds>0, average='macro'))


def test_masks_count_places_and_soft_targets_count_as_their_class():
    gen = torch.Generator().manual_seed(3)
    preds,target = torch.randn(10, K, 6, 5, generator=gen),torch.randint(K, (10,6,5), generator=gen)
    found = over(Meter(['accuracy']), preds, target, [4,6]).compute()
    assert found['accuracy'] == pytest.approx((preds.argmax(1)==target).float().mean().item())
    preds,target = class_data()
    soft = F.one_hot(target, K)*0.8+0.05
    assert over(Meter(['accuracy']), preds, soft, [N]).compute() == over(Meter(['accuracy']), preds, target, [N]).compute()


def test_functions_that_return_python_numbers_are_computed_on_the_whole_split():
    def median_error(preds, target): return float(np.median(abs(preds[:,0].numpy()-target.numpy())))
    preds,target = number_data()
    found = over(Meter([median_error]), preds, target, CUTS[1]).compute()
    assert found['median_error'] == pytest.approx(sk.median_absolute_error(target, preds))


def test_predictions_may_carry_gradients_and_none_are_kept():
    preds,target = class_data()
    preds.requires_grad_(True)
    meter = over(Meter(['accuracy', 'f1']), preds, target, CUTS[1], F.cross_entropy)
    kept = meter.loss.parts+meter.metrics['f1'].preds+meter.metrics['accuracy'].mean.parts
    assert kept and not any(o.requires_grad for o in kept)


@pytest.mark.filterwarnings('ignore:No .* samples in targets')
def test_stop_in_the_middle_changes_no_bit():
    preds,target = class_data()
    specs = ['accuracy', 'f1', {'type':'top_k_acc', 'args':{'k':2}}, 'AUROC', 'F1Score']
    make = lambda: Meter(specs, facts={'num_classes':K})
    def loss(p, t): return Loss({'main':F.cross_entropy(p, t), 'size':p.pow(2).mean()}, weights={'size':0.1})
    cut = [1]*150+[20,33]
    whole = over(make(), preds, target, cut, loss)
    for stop in (1, 120, 151):
        at = sum(cut[:stop])
        first = over(make(), preds[:at], target[:at], cut[:stop], loss)
        first.compute()  # a display may ask at any time
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        second = make()
        second.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        assert over(second, preds[at:], target[at:], cut[stop:], loss).compute() == whole.compute()


def test_long_splits_are_folded_and_stay_exact():
    meter,values = Meter(),torch.rand(5000, generator=torch.Generator().manual_seed(4))
    for o in values: meter.add(o, n=3)
    assert len(meter.loss.parts)<256
    assert meter.compute()['loss'] == pytest.approx(values.double().mean().item(), abs=1e-12)


def test_reset_forgets_everything():
    preds,target = class_data()
    meter = over(Meter(['accuracy', 'f1', 'Accuracy'], facts={'num_classes':K}), preds, target, [N], F.cross_entropy)
    first = meter.compute()
    meter.reset()
    over(meter, preds[:50], target[:50], [50], F.cross_entropy)
    assert meter.compute() == over(Meter(['accuracy', 'f1', 'Accuracy'], facts={'num_classes':K}), preds[:50], target[:50], [50], F.cross_entropy).compute() != first


def test_meters_do_not_share_metric_objects():
    import torchmetrics
    preds,target = class_data()
    metric = torchmetrics.Accuracy(task='multiclass', num_classes=K)
    train,valid = Meter([metric]),Meter([metric])
    over(train, preds, target, [N])
    over(valid, target.eq(torch.arange(K)[:,None]).T.float(), target, [N])
    assert valid.compute()['MulticlassAccuracy'] == 1. > train.compute()['MulticlassAccuracy']


@pytest.mark.parametrize('specs, kind, text', [
    (['acuracy'], UnknownName, '`accuracy`'),
    ([{'type':'top_k_acc', 'args':{'kk':2}}], ConfigError, '`k`'),
    ([{'type':'top_k_acc', 'args':{'k':'many'}}], ConfigError, "is 'many', want int"),
    ([{'name':'accuracy'}], ConfigError, '`type`'),
    (['accuracy', 'accuracy'], ConfigError, 'two metrics'),
    (['Accuracy'], ConfigError, '`task`'),
    ([3], ConfigError, '3 is no metric'),
])
def test_wrong_specs_are_told_before_training(specs, kind, text):
    with pytest.raises(kind, match=text): build_metrics(specs)


def test_k_beyond_the_classes_and_other_shapes_are_told():
    preds,target = class_data()
    with pytest.raises(DataError, match='have 4 classes'): over(Meter([{'type':'top_k_acc', 'args':{'k':5}}]), preds, target, [N])
    with pytest.raises(DataError, match='want the same'): over(Meter(['mae']), preds, target, [N])
    with pytest.raises(DataError, match='need them'): Meter(['accuracy']).add(None, preds, None, n=N)
