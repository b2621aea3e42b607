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


@pytest.mark.filterwarnings('ignore:Metric `SpearmanCorr')
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
    from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
    gen = torch.Generator().manual_seed(5)
    preds,target = (torch.rand(9, 3, 24, 24, generator=gen) for _ in range(2))
    batches = list(zip(preds.split([4,3,2]), target.split([4,3,2])))
    metrics = {'ssim': StructuralSimilarityIndexMeasure(data_range=1.), 'psnr': PeakSignalNoiseRatio(data_range=1.),
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
    metric = meter.metrics['m0'].metric.metric
    assert not metric.sync_on_compute and not metric._to_sync


def prob(p): return p.double().softmax(1).numpy()


def specificity(t, g):
    table = sk.confusion_matrix(t, g, labels=range(K))
    return np.mean([(table.sum()-table[i].sum()-table[:,i].sum()+table[i,i])/(table.sum()-table[i].sum()) for i in range(K)])


SHORT_CLASSES = {
    'precision': lambda p,t: sk.precision_score(t, p.argmax(1), average='macro'),
    'recall': lambda p,t: sk.recall_score(t, p.argmax(1), average='macro'),
    'specificity': lambda p,t: specificity(t, p.argmax(1)),
    'balanced_accuracy': lambda p,t: sk.balanced_accuracy_score(t, p.argmax(1)),
    'fbeta': lambda p,t: sk.fbeta_score(t, p.argmax(1), beta=1., average='macro'),
    'auroc': lambda p,t: sk.roc_auc_score(t, prob(p), multi_class='ovr'),
    'average_precision': lambda p,t: sk.average_precision_score(np.eye(K)[t], prob(p), average='macro'),
    'jaccard': lambda p,t: sk.jaccard_score(t, p.argmax(1), average='macro'),
    'cohen_kappa': lambda p,t: sk.cohen_kappa_score(t, p.argmax(1)),
    'mcc': lambda p,t: sk.matthews_corrcoef(t, p.argmax(1)),
    'hamming': lambda p,t: sk.hamming_loss(t, p.argmax(1))}
SMALL = [1., 0.05]     # logits of this size: the small ones all lie within 0 and 1 now and then, where they could be taken for probabilities


@pytest.mark.filterwarnings('ignore:No .* samples in targets')
@pytest.mark.parametrize('cut', CUTS, ids=str)
@pytest.mark.parametrize('size', SMALL)
def test_short_names_of_classes_equal_scikit_learn_however_batches_are_cut(cut, size):
    preds,target = class_data()
    preds = preds*size
    found = over(Meter(list(SHORT_CLASSES), facts={'num_classes':K, 'task':'classes'}), preds, target, cut).compute()
    for name,fn in SHORT_CLASSES.items(): assert found[name] == pytest.approx(fn(preds, target), abs=2e-5), name


def label_data(size=1.):
    gen = torch.Generator().manual_seed(6)
    return torch.randn(N, K, generator=gen)*size, (torch.randn(N, K, generator=gen)>0.3).float()


SHORT_LABELS = {
    'accuracy': lambda p,t: (p.sigmoid().numpy().round()==t.numpy()).mean(),
    'f1': lambda p,t: sk.f1_score(t, p>0, average='macro'),
    'precision': lambda p,t: sk.precision_score(t, p>0, average='macro'),
    'recall': lambda p,t: sk.recall_score(t, p>0, average='macro'),
    'auroc': lambda p,t: sk.roc_auc_score(t, p, average='macro'),
    'average_precision': lambda p,t: sk.average_precision_score(t, p, average='macro'),
    'hamming': lambda p,t: sk.hamming_loss(t, p>0),
    'jaccard': lambda p,t: sk.jaccard_score(t, p>0, average='macro'),
    'exact_match': lambda p,t: sk.accuracy_score(t, p>0),
    'label_accuracy': lambda p,t: 1-sk.hamming_loss(t, p>0),
    'label_f1': lambda p,t: sk.f1_score(t, p>0, average='samples', zero_division=1.)}


@pytest.mark.filterwarnings('ignore:No .* samples in targets')
@pytest.mark.parametrize('cut', CUTS, ids=str)
@pytest.mark.parametrize('size', SMALL)
def test_names_mean_labels_where_items_have_several(cut, size):
    preds,target = label_data(size)
    found = over(Meter(list(SHORT_LABELS), facts={'num_classes':K, 'task':'labels'}), preds, target, cut).compute()
    for name,fn in SHORT_LABELS.items(): assert found[name] == pytest.approx(fn(preds, target), abs=2e-5), name
    with pytest.raises(ConfigError, match='several labels'): build_metrics(['top_k_acc'], {'num_classes':K, 'task':'labels'})


@pytest.mark.parametrize('shape', ['one logit', 'one logit, axis', 'two logits'])
def test_two_classes_whatever_the_model_gives(shape):
    gen = torch.Generator().manual_seed(7)
    logit,target = torch.randn(N, generator=gen),torch.randint(2, (N,), generator=gen)
    preds = {'one logit': logit, 'one logit, axis': logit[:,None], 'two logits': torch.stack([logit/3, logit*4/3], 1)}[shape]
    yes = {'yes_precision':{'type':'precision', 'args':{'task':'binary'}}, 'yes_ap':{'type':'average_precision', 'args':{'task':'binary'}}, 'auroc':'auroc', 'both':'precision'}
    found = over(Meter(yes, facts={'num_classes':2, 'task':'classes'}), preds, target, CUTS[1]).compute()
    assert found['yes_precision'] == pytest.approx(sk.precision_score(target, logit>0), abs=1e-6)
    assert found['both'] == pytest.approx(sk.precision_score(target, logit>0, average='macro'), abs=1e-6)
    assert found['auroc'] == pytest.approx(sk.roc_auc_score(target, logit), abs=1e-5)
    assert found['yes_ap'] == pytest.approx(sk.average_precision_score(target, logit), abs=1e-5)


def test_shares_of_classes_as_targets_and_masks_with_places_that_do_not_count():
    preds,target = class_data()
    soft = F.one_hot(target, K)*0.8+0.05
    make = lambda: Meter(['auroc', 'recall'], facts={'num_classes':K})
    assert over(make(), preds, soft, CUTS[1]).compute()==over(make(), preds, target, CUTS[1]).compute()
    gen = torch.Generator().manual_seed(8)
    maps,masks = torch.randn(6, 3, 5, 4, generator=gen),torch.randint(3, (6,5,4), generator=gen)
    masks[:,0] = -100
    facts = {'num_classes':3, 'task':'mask', 'ignore_index':-100}
    found = over(Meter(['precision', 'jaccard', 'iou', 'dice'], facts=facts), maps, masks, [4,2]).compute()
    guess,truth = maps.argmax(1)[:,1:].flatten(),masks[:,1:].flatten()
    assert found['precision'] == pytest.approx(sk.precision_score(truth, guess, average='macro'), abs=1e-6)
    for name in ('jaccard', 'iou'): assert found[name] == pytest.approx(sk.jaccard_score(truth, guess, average='macro'), abs=1e-6)
    assert found['dice'] == pytest.approx(sk.f1_score(truth, guess, average='macro'), abs=1e-6)


@pytest.mark.filterwarnings('ignore:Metric `SpearmanCorr')
@pytest.mark.parametrize('cut', CUTS[:2]+CUTS[3:], ids=str)
def test_short_names_of_numbers_equal_scipy_and_scikit_learn(cut):
    from scipy import stats
    preds,target = number_data()
    preds,target = preds+0.5*target[:,None]+5,target+5
    x,y = preds[:,0].double().numpy(),target.double().numpy()
    theirs = {'pearson': stats.pearsonr(x, y)[0], 'spearman': stats.spearmanr(x, y)[0], 'kendall': stats.kendalltau(x, y)[0], 'explained_variance': sk.explained_variance_score(y, x), 'mape': sk.mean_absolute_percentage_error(y, x)}
    found = over(Meter(list(theirs), facts={'out_features':1, 'task':'number'}), preds, target, cut).compute()
    assert found == pytest.approx(theirs, rel=1e-4)
    with pytest.raises(ConfigError, match='of another kind'): build_metrics(['auroc'], {'out_features':1, 'task':'number'})


def test_several_numbers_an_item_are_each_correlated():
    gen = torch.Generator().manual_seed(9)
    preds,target = torch.randn(N, 2, generator=gen),torch.randn(N, 2, generator=gen)
    found = over(Meter(['pearson', 'mae', 'r2'], facts={'out_features':2, 'task':'number'}), preds, target, CUTS[1]).compute()
    assert found['pearson_1'] == pytest.approx(np.corrcoef(preds[:,1], target[:,1])[0,1], abs=1e-5)
    assert found['mae'] == pytest.approx(sk.mean_absolute_error(target, preds), abs=1e-6)


@pytest.mark.parametrize('cut', [[9], [4,3,2], [1]*9], ids=str)
def test_pictures_by_name(cut):
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    gen = torch.Generator().manual_seed(10)
    target = torch.rand(9, 3, 24, 24, generator=gen)
    preds = (target+0.1*torch.randn(target.shape, generator=gen)).clamp(0, 1)
    found = over(Meter(['psnr', 'ssim', 'PeakSignalNoiseRatio', 'StructuralSimilarityIndexMeasure'], facts={'task':'image'}), preds, target, cut).compute()
    assert found['psnr'] == pytest.approx(np.mean([peak_signal_noise_ratio(t.numpy(), p.numpy(), data_range=1.) for p,t in zip(preds, target)]), abs=1e-4)
    assert found['ssim'] == pytest.approx(np.mean([structural_similarity(t.numpy(), p.numpy(), gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1., channel_axis=0) for p,t in zip(preds, target)]), abs=1e-4)
    assert found['PeakSignalNoiseRatio'] == pytest.approx(-10*np.log10(((preds-target)**2).double().mean().item()), abs=1e-4)
    assert found['StructuralSimilarityIndexMeasure'] == pytest.approx(found['ssim'], abs=0.02)      # which also counts a border beyond the edge


def test_torchmetrics_is_imported_only_when_one_of_its_metrics_is_built():
    import subprocess, sys
    code = """import sys
from deep_studio_nb.training.metrics import Meter, METRICS
Meter(['accuracy', 'f1', 'ssim', 'iou', 'dice'], facts={'num_classes': 3}), METRICS._repr_markdown_(), METRICS.names()
print('torchmetrics' in sys.modules)
Meter(['auroc'], facts={'num_classes': 3})
print('torchmetrics' in sys.modules)"""
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()==['False','True']


def test_predictions_that_do_not_fit_are_told_with_their_shapes():
    meter = Meter(['auroc'], facts={'num_classes':3})
    with pytest.raises(DataError, match='`MulticlassAUROC` cannot take predictions of shape \\(4, 5\\)'): meter.add(None, torch.randn(4,5), torch.tensor([0,1,2,0]))
    meter = Meter(['auroc'], facts={'num_classes':3, 'task':'labels'})
    with pytest.raises(DataError, match='several labels'): meter.add(None, torch.randn(4,3), torch.tensor([0,1,2,0]))


def test_all_metrics_are_known_on_both_splits_of_a_training():
    from training_toy import loaders, model
    from deep_studio_nb.training.trainer import Trainer
    train,valid = loaders('ours')
    loss = {'type':'sum', 'args':{'losses':['cross_entropy', {'type':'focal', 'weight':0.5}]}}
    run = Trainer(model(), train, valid, loss=loss, metrics=['accuracy', 'auroc', {'type':'recall', 'args':{'average':'none'}}, 'cohen_kappa', 'f1'], epochs=2, device='cpu', progress=False, monitor='max val_auroc')
    row = run.train()[-1]
    names = ['loss', 'cross_entropy', 'focal', 'accuracy', 'auroc', 'recall_0', 'recall_1', 'cohen_kappa', 'f1']
    assert [o for o in row if o not in ('epoch', 'lr', 'seconds')] == names+[f'val_{o}' for o in names]
    for o in ('', 'val_'): assert row[f'{o}loss'] == pytest.approx(row[f'{o}cross_entropy']+0.5*row[f'{o}focal'], abs=1e-6)
    with torch.no_grad(): preds = torch.cat([run.model.eval()(x) for x,_ in valid])
    target = torch.cat([y for _,y in valid])
    assert row['val_auroc'] == pytest.approx(sk.roc_auc_score(target, (preds[:,1]-preds[:,0])), abs=1e-5)


def test_states_from_a_file_go_to_the_device_of_the_metric():
    preds,target = class_data()
    saved = over(Meter(named(TORCHMETRICS), facts={'num_classes':K}), preds, target, CUTS[1]).state_dict()
    away = Meter(named(TORCHMETRICS), facts={'num_classes':K})
    for o in away.metrics.values(): o.metric.to('meta')
    away.load_state_dict(saved)
    for o in away.metrics.values():
        states = [x for s in o.metric.metric.metric_state.values() for x in (s if isinstance(s, list) else [s])]
        assert states and all(x.device.type=='meta' for x in states)
