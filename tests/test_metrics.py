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


TORCHMETRICS = ['Accuracy', {'type':'F1Score', 'args':{'average':'macro'}}, 'AUROC', {'type':'AUROC', 'args':{'thresholds':20}}]
OWNERS = [[0,1,2,3]], [[0,2], [1,3]], [[0,1,2,3], []], [[], [3], [0,1,2]], [[2], [], [0,3], [1]]


def named(specs): return {f'm{i}': o for i,o in enumerate(specs)}


def merged(make, batches, owners, loss=None, between=None):
    "A meter that knows only the states of those that saw the batches that they own, as a file keeps them."
    states = []
    for mine in owners:
        one = make()
        for i in mine: one.add(loss(*batches[i]) if loss else None, *batches[i])
        if between: between(one)
        file = io.BytesIO()
        torch.save(one.state_dict(), file)
        states.append(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    return make().merge(states)


@pytest.mark.filterwarnings('ignore:No .* samples in targets')
@pytest.mark.parametrize('owners', OWNERS, ids=str)
def test_states_of_several_processes_make_the_meter_that_saw_all(owners):
    preds,target = class_data()
    batches = list(zip(preds.split(CUTS[1]), target.split(CUTS[1])))
    make = lambda: Meter(named(['accuracy', 'f1', {'type':'iou', 'args':{}}, *TORCHMETRICS]), facts={'num_classes':K})
    def loss(p, t): return Loss({'main':F.cross_entropy(p, t), 'size':p.pow(2).mean()}, weights={'size':0.1})
    whole = over(make(), preds, target, CUTS[1], loss).compute()
    for between in (None, Meter.compute):
        found = merged(make, batches, owners, loss, between).compute()
        assert list(found)==list(whole)
        for k in whole: assert found[k]==pytest.approx(whole[k], abs=1e-6 if k.startswith('m') else 1e-12), k


@pytest.mark.parametrize('owners', OWNERS, ids=str)
def test_merged_numbers_go_on_and_merge_again(owners):
    preds,target = number_data()
    preds,target = preds[:,0],target
    batches = list(zip(preds.split(CUTS[1]), target.split(CUTS[1])))
    make = lambda: Meter(named(['mae', 'rmse', 'r2', 'MeanSquaredError', 'R2Score', 'PearsonCorrCoef', 'SpearmanCorrCoef', 'ConcordanceCorrCoef']))
    whole = over(make(), preds, target, CUTS[1])
    found = merged(make, batches, owners)
    assert found.compute()==pytest.approx(whole.compute(), abs=1e-5)
    again = make().merge([found.state_dict(), make().state_dict()])     # a run that was stopped, and goes on in two processes
    for meter in (whole, again): meter.add(None, preds.flip(0), target)
    assert again.compute()==pytest.approx(whole.compute(), abs=1e-5)
    again.reset()
    assert over(again, preds, target, [N]).compute()==pytest.approx(over(make(), preds, target, [N]).compute())


def test_pictures_and_collections_merge():
    import torchmetrics as tm
    gen = torch.Generator().manual_seed(5)
    preds,target = (torch.rand(9, 3, 24, 24, generator=gen) for _ in range(2))
    batches = list(zip(preds.split([4,3,2]), target.split([4,3,2])))
    metrics = {'ssim': tm.StructuralSimilarityIndexMeasure(data_range=1.), 'psnr': tm.PeakSignalNoiseRatio(data_range=1.), 'free': tm.PeakSignalNoiseRatio(),
               'both': tm.MetricCollection([tm.MeanSquaredError(), tm.MeanAbsoluteError()])}
    make = lambda: Meter(metrics)
    whole = over(make(), preds, target, [4,3,2]).compute()
    assert merged(make, batches, [[0,2],[1]]).compute()==pytest.approx(whole, abs=1e-5)


def test_an_object_that_cannot_merge_says_so_even_without_items():
    class Count:
        def reset(self): self.n = 0
        def update(self, preds, target): self.n += len(target)
        def compute(self): return self.n
        def state_dict(self): return {'n': self.n}
        def load_state_dict(self, state): self.n = state['n']
    meter = Meter([Count()])
    assert meter.merge([meter.state_dict()]).compute().keys()=={'Count'}
    with pytest.raises(ConfigError, match='`Count` has no `merge`'): meter.merge([meter.state_dict()]*2)


def test_a_batch_without_items_counts_for_nothing():
    preds,target = class_data()
    meter = over(Meter(['accuracy']), preds, target, [N], F.cross_entropy)
    before = meter.compute()
    meter.add(torch.tensor(float('nan')), preds[:0], target[:0])
    assert meter.compute()==before


def test_torchmetrics_asks_no_other_process_by_itself():
    meter = Meter(named(['Accuracy']), facts={'num_classes':K})
    metric = meter.metrics['m0'].metric
    assert not metric.sync_on_compute and not metric._to_sync
