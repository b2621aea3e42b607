"""Steps made in other ways end where plain ones end: from several batches, in parts, in half precision, resumed in between; and what is broken stops in time."""
import logging, math
import pytest, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from deep_studio_nb.common.errors import ConfigError, DataError, RunError
from deep_studio_nb.data.loaders import BaseDataLoader
from deep_studio_nb.data.tensors import Tensors
from deep_studio_nb.training.checkpoints import load_checkpoint, weights_for_use
from deep_studio_nb.training.events import Callback, When
from deep_studio_nb.training.trainer import Trainer
from training_toy import STEPS, assert_same, data, rows, stop_at, trainer, weights

SGD = dict(optimizer={'type': 'SGD', 'args': {'lr': 0.1, 'momentum': 0.9}}, scheduler=None)

def run(t):
    t.train()
    return t

def smooth(seed=3):
    "A model without batch norm and dropout, whose gradients do not depend on how samples are batched."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))

def plain(batch=12, model=None, loader=None, **kwargs):
    "A trainer of the toy's data in their own order."
    x, y = data()
    loader = loader or DataLoader(TensorDataset(x[:66], y[:66]), batch)
    return Trainer(model or smooth(), loader, DataLoader(TensorDataset(x[66:], y[66:]), 12), **dict(loss='cross_entropy', metrics=['accuracy'], epochs=2, device='cpu', progress=False) | SGD | kwargs)

def assert_close(a, b, tol=1e-6):
    for k,v in a.model.state_dict().items(): assert torch.allclose(v, b.model.state_dict()[k], atol=tol, rtol=1e-5), k
    for r,q in zip(rows(a), rows(b)):
        for k in r: assert r[k]==pytest.approx(q[k], abs=1e-5), k

@pytest.fixture
def said(caplog):
    "What is logged, as a list of texts."
    log = logging.getLogger('deep_studio_nb')
    log.addHandler(caplog.handler)
    caplog.set_level('INFO', logger='deep_studio_nb')
    yield lambda: list(dict.fromkeys(o.getMessage() for o in caplog.records))
    log.removeHandler(caplog.handler)

# --- several batches, one step ---

@pytest.mark.parametrize('k,b', [(2, 12), (3, 12), (4, 6), (7, 5), (66, 1), (5, 16)])
def test_k_batches_of_b_are_one_of_k_times_b(k, b):
    "66 samples: the last batch is short for most, and so is the last group."
    many, one = run(plain(b, accumulate=k)), run(plain(k*b))
    assert_close(many, one)
    assert many.updates==one.updates==2*math.ceil(66/(k*b)) and many.steps==2*math.ceil(66/b)

def test_clipping_sees_the_mean_of_the_group():
    args = dict(clip_norm=0.05, clip_value=0.02)
    assert_close(run(plain(6, accumulate=4, **args)), run(plain(24, **args)))
    assert not torch.allclose(run(plain(24, **args)).model[0].weight, run(plain(24)).model[0].weight, atol=1e-3)

def test_a_loader_without_length_ends_with_a_short_group():
    class Bare:
        def __init__(self, loader): self.loader = loader
        def __iter__(self): return iter(self.loader)
    x, y = data()
    bare = Bare(DataLoader(TensorDataset(x[:66], y[:66]), 12))
    a, b = run(plain(loader=bare, accumulate=4)), run(plain(12, accumulate=4))
    assert_same(a, b)
    assert a.updates==b.updates==4

def test_schedules_count_steps_of_the_optimizer():
    once = {'optimizer': {'type': 'SGD', 'args': {'lr': 0.1}}, 'scheduler': {'type': 'OneCycleLR', 'args': {'max_lr': 0.1}}}
    t = run(plain(12, accumulate=4, **once))
    assert t.updates==4 and t.scheduler.scheduler.total_steps==4
    assert_close(t, run(plain(48, **once)))

def test_events_of_a_group():
    told = []
    names = 'after_backward', 'after_step', 'after_batch'
    run(plain(12, accumulate=4, epochs=1, callbacks=[When(**{n: lambda t, n=n: told.append(n) for n in names})]))
    assert [told.count(n) for n in names]==[6, 2, 6]
    assert told[-3:]==list(names)

@pytest.mark.parametrize('kind', ['plain', 'ours'])
@pytest.mark.parametrize('step', [1, 3, 4, 5, STEPS, STEPS+2, 3*STEPS-1])
def test_resume_within_a_group(tmp_path, kind, step):
    whole = run(trainer(kind, accumulate=4))
    first = run(trainer(kind, accumulate=4, folder=tmp_path, callbacks=[stop_at(step)]))
    assert first.stopped and first.steps==step
    assert_same(run(trainer(kind, accumulate=4, folder=tmp_path).load(tmp_path)), whole)
    first.callbacks.clear()
    assert_same(run(first), whole)

# --- half precision ---

@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
@pytest.mark.parametrize('accumulate', [1, 4])
@pytest.mark.parametrize('step', [3, STEPS+1])
def test_half_precision_resumes_exactly(tmp_path, precision, accumulate, step):
    def half(**kwargs): return trainer(precision=precision, accumulate=accumulate, **kwargs)
    whole = run(half())
    run(half(folder=tmp_path, callbacks=[stop_at(step)]))
    state = load_checkpoint(tmp_path/'last.pt')
    assert (state['scaler'] is not None)==(precision=='fp16')
    again = run(half(folder=tmp_path).load(tmp_path))
    assert_same(again, whole)
    if precision=='fp16': assert again.scaler.state_dict()==whole.scaler.state_dict()

@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_half_precision_learns_the_same(precision):
    a, b = run(plain(precision=precision, epochs=3)), run(plain(epochs=3))
    assert a.history[-1]['val_loss']==pytest.approx(b.history[-1]['val_loss'], abs=0.02)
    assert all(p.dtype==torch.float32 for p in a.model.parameters())

def test_predictions_in_half_precision_reach_metrics_in_full():
    seen = set()
    def kind(preds, target):
        seen.add(preds.dtype)
        return (preds.argmax(1)==target).float()
    run(plain(precision='bf16', epochs=1, metrics={'kind': kind}))
    assert seen=={torch.float32}

def test_a_step_that_the_scaler_leaves_out_moves_nothing():
    moved = []
    t = plain(precision='fp16', epochs=1, optimizer={'type': 'SGD', 'args': {'lr': 0.1}}, scheduler={'type': 'OneCycleLR', 'args': {'max_lr': 0.1}}, callbacks=[When(after_step=lambda t: moved.append(t.steps))])
    t.scaler = torch.amp.GradScaler('cpu', init_scale=2.**40)                # far too large: infinite gradients
    run(t)
    assert t.updates==len(moved)<t.steps==6
    assert t.scheduler.scheduler.last_epoch==t.updates

def test_another_precision_in_the_checkpoint(tmp_path):
    run(trainer(precision='fp16', epochs=1, folder=tmp_path))
    with pytest.raises(Exception, match='made with scaler `GradScaler`, this run has none'): trainer(epochs=1).load(tmp_path)

# --- memory that does not suffice ---

class Small(nn.Module):
    "A model that runs out of memory with more than `room` samples, forward or backward, as a GPU does or as the CPU does."
    def __init__(self, room, when='forward', kind='cuda'):
        super().__init__()
        self.net, self.room, self.when, self.kind, self.tries = smooth(), room, when, kind, []
    def fail(self):
        if self.kind=='cuda': raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:114] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes.")
    def forward(self, x):
        if not self.training or not torch.is_grad_enabled(): return self.net(x)
        self.tries.append(len(x))
        full = len(x)>self.room
        if full and self.when=='forward': self.fail()
        out = self.net(x)
        if full: out.register_hook(lambda grad: self.fail())
        return out

@pytest.mark.parametrize('kind', ['cuda', 'cpu'])
@pytest.mark.parametrize('when', ['forward', 'backward'])
@pytest.mark.parametrize('accumulate', [1, 4])
def test_out_of_memory_cuts_the_batch_and_changes_nothing(said, kind, when, accumulate):
    t, whole = run(plain(model=Small(4, when, kind), accumulate=accumulate)), run(plain(accumulate=accumulate))
    assert t.micro==4 and t.model.tries[:3]==[12, 6, 3]
    for k,v in whole.model.state_dict().items(): assert torch.allclose(v, t.model.state_dict()[f'net.{k}'], atol=1e-6)
    for r,q in zip(rows(t), rows(whole)): assert all(r[k]==pytest.approx(q[k], abs=1e-5) for k in q)
    lines = [o for o in said() if 'Memory does not suffice' in o]
    assert len(lines)==1 and 'cut into 4 parts' in lines[0] and 'batch of 12' in lines[0]

@pytest.mark.parametrize('when', ['forward', 'backward'])
def test_out_of_memory_later_in_a_group(when):
    "The gradients of the batches before it are not lost, nor counted twice."
    t = plain(model=Small(12, when), accumulate=4, epochs=1)
    def shrink(t):
        if t.step==2: t.model.room = 5
    t.add(When(before_batch=shrink))
    run(t)
    assert t.micro==4 and t.model.tries[:5]==[12, 12, 12, 6, 3]
    whole = run(plain(accumulate=4, epochs=1))
    for k,v in whole.model.state_dict().items(): assert torch.allclose(v, t.model.state_dict()[f'net.{k}'], atol=1e-6)

def test_the_parts_are_in_the_checkpoint(tmp_path):
    run(plain(model=Small(4), folder=tmp_path, callbacks=[stop_at(3)]))
    again = plain(model=Small(4), folder=tmp_path).load(tmp_path)
    assert again.micro==4
    whole = run(plain(model=Small(4)))
    assert_same(run(again), whole)
    assert again.model.tries[0]==3

def test_a_single_sample_that_does_not_fit():
    with pytest.raises(RunError, match='does not suffice for a single sample, in step 1 of epoch 1: CUDA out of memory'): run(plain(model=Small(0)))

def test_other_errors_pass():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 2)
        def forward(self, x):
            if self.training and torch.is_grad_enabled(): raise RuntimeError('shapes do not match')
            return self.net(x)
    with pytest.raises(RuntimeError, match='shapes do not match'): run(plain(model=Broken()))

# --- what is not finite ---

class Poison(Callback):
    "Make the loss or a gradient not finite at a step of the run, counted from 1."
    def __init__(self, step, what='loss', value=math.nan): self.step, self.what, self.value = step, what, value
    def after_loss(self, trainer):
        if trainer.steps+1==self.step and self.what=='loss': trainer.loss = trainer.loss*self.value
        if trainer.steps+1==self.step and self.what=='gradient': trainer.preds.register_hook(lambda g: g*self.value)

@pytest.mark.parametrize('what', ['loss', 'gradient'])
@pytest.mark.parametrize('value', [math.nan, math.inf])
@pytest.mark.parametrize('step', [1, STEPS+3])
def test_it_stops_before_the_weights_change(tmp_path, what, value, step):
    t, kept = plain(folder=tmp_path, callbacks=[Poison(step, what, value)]), {}
    def keep(t): kept.update(weights(t))
    t.add(When(before_batch=keep))
    with pytest.raises(RunError) as e: t.train()
    epoch, at = divmod(step-1, STEPS)
    assert f'in epoch {epoch+1}, step {at+1}' in str(e.value) and 'nan_batch.pt' in str(e.value) and 'clip_norm' in str(e.value)
    assert all(torch.equal(v, kept[k]) for k,v in weights(t).items())
    found = torch.load(tmp_path/'nan_batch.pt', weights_only=True)
    x, y = data()
    assert (found['epoch'], found['step'])==(epoch+1, at+1) and torch.equal(found['batch'][0], x[12*at:12*at+12]) and torch.equal(found['batch'][1], y[12*at:12*at+12])
    assert found['preds'].shape==(12, 2) and list(found['losses'])==['loss']
    if epoch: assert load_checkpoint(tmp_path/'last.pt')['epoch']==epoch

def test_without_a_folder_the_error_has_the_batch():
    with pytest.raises(RunError, match='in `batch` of this error') as e: run(plain(callbacks=[Poison(2)]))
    assert e.value.batch['batch'][0].shape==(12, 4) and e.value.file is None

def test_the_samples_are_named_where_they_have_names(tmp_path):
    x, y = data()
    loader = BaseDataLoader(Tensors(x[:66], y[:66]), 12, seed=4)
    t = plain(loader=loader, callbacks=[Poison(STEPS+2)])
    ids = {}
    def look(t): ids.update(batch=t.batch[0])
    t.add(When(before_batch=look))
    with pytest.raises(RunError) as e: t.train()
    names = e.value.batch['ids']
    assert len(names)==12 and all(torch.equal(x[i], v) for i,v in zip([next(j for j in range(66) if loader.dataset.sample_id(j)==n) for n in names], ids['batch']))
    assert names[0] in str(e.value)

def test_broken_data_is_named_as_such():
    x, y = data()
    x[30, 2] = math.nan
    with pytest.raises(DataError, match='epoch 1, step 3.*look for NaN in the data'): run(plain(loader=DataLoader(TensorDataset(x[:66], y[:66]), 12)))

def test_within_a_group_and_in_parts():
    for kwargs in (dict(accumulate=4), dict(model=Small(4))):
        with pytest.raises(RunError, match='epoch 1, step 3'): run(plain(callbacks=[Poison(3, 'gradient')], **kwargs))

def test_fp16_looks_at_the_loss():
    with pytest.raises(RunError, match='The loss is .* epoch 1, step 2'): run(plain(precision='fp16', callbacks=[Poison(2)]))

def test_warn_goes_on():
    t = run(plain(callbacks=[Poison(2)], on_nan='warn'))
    assert len(t.history)==2 and math.isnan(t.history[0]['val_loss'])

@pytest.mark.parametrize('wrong,text', [({'precision': 'fp61'}, 'did you mean `fp16`'), ({'accumulate': 0}, '`accumulate` is 0'), ({'accumulate': 2.}, '`accumulate` is 2.0'), ({'clip_norm': 0}, '`clip_norm` is 0'),
    ({'clip_value': -1.}, '`clip_value` is -1.0'), ({'on_nan': 'halt'}, '`on_nan` is \'halt\'')])
def test_settings(wrong, text):
    with pytest.raises(ConfigError) as e: plain(**wrong)
    assert text in str(e.value)

# --- compiled ---

def test_a_machine_without_a_compiler(said, monkeypatch):
    def nowhere(fn, **kwargs):
        def fail(*batch): raise torch._dynamo.exc.BackendCompilerFailed(None, RuntimeError('InvalidCxxCompiler: No working C++ compiler found'), None)
        return fail
    import torch._dynamo
    monkeypatch.setattr(torch, 'compile', nowhere)
    t = run(plain(compile=True))
    assert_same(t, run(plain()))
    lines = [o for o in said() if 'cannot be compiled' in o]
    assert len(lines)==1 and lines[0].endswith('No working C++ compiler found')

@pytest.mark.parametrize('own', [False, True])
def test_compiled_without_kernels(monkeypatch, own):
    "Traced and run as it is: the same bits, for a plain model and for one that scores itself; what is saved has the model's own names."
    class Scored(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = smooth()
        def forward_train(self, batch):
            preds = self.net(batch[0])
            return preds, nn.functional.cross_entropy(preds, batch[1]), {}
        def forward_test(self, batch): return self.net(batch[0])
    make = Scored if own else smooth
    compile_ = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda fn, mode, **kwargs: compile_(fn, backend='eager', **kwargs))
    a, b = run(plain(model=make(), compile=True, metrics=())), run(plain(model=make(), metrics=()))
    assert_same(a, b)
    assert list(a.state_dict()['model'])==list(b.model.state_dict())

@pytest.mark.slow
def test_compiled_resumes_exactly(tmp_path):
    whole = run(trainer(compile=True))
    run(trainer(compile=True, folder=tmp_path, callbacks=[stop_at(STEPS+2)]))
    assert_same(run(trainer(compile=True, folder=tmp_path).load(tmp_path)), whole)

# --- a few batches ---

def test_fast_dev_run(tmp_path):
    t = run(trainer(fast_dev_run=True, epochs=50, folder=tmp_path/'run'))
    assert len(t.history)==1 and t.steps==2 and not (tmp_path/'run').exists() and 'val_accuracy' in t.history[0]

@pytest.mark.parametrize('kind', ['plain', 'plain generator', 'ours', 'ours each'])
def test_overfitting_the_same_batches(tmp_path, kind):
    seen = []
    args = dict(overfit_batches=2, epochs=4, scheduler=None)
    t = run(trainer(kind, callbacks=[When(before_batch=lambda t: seen.append(t.batch))], **args))
    x, y = data()
    assert t.steps==8 and all(torch.equal(seen[i][0], x[12*(i%2):12*(i%2)+12]) for i in range(8))
    run(trainer(kind, folder=tmp_path, callbacks=[stop_at(5)], **args))
    assert_same(run(trainer(kind, folder=tmp_path, **args).load(tmp_path)), t)

def test_it_learns_a_batch_by_heart():
    t = run(plain(overfit_batches=1, epochs=300, optimizer={'type': 'AdamW', 'args': {'lr': 0.02}}))
    assert t.history[-1]['accuracy']==t.history[-1]['val_accuracy']==1 and t.history[-1]['val_loss']<0.1

@pytest.mark.parametrize('kind', ['plain', 'plain generator', 'ours', 'ours each', 'plain workers'])
def test_find_batch_size_leaves_no_trace(kind):
    t, whole = trainer(kind), run(trainer(kind))
    before, draws = weights(t), torch.get_rng_state()
    sizes = t.find_batch_size(limit=64)
    assert [o['size'] for o in sizes.rows]==[8, 16, 32, 64] and sizes.best<=sizes.largest==64
    assert all(torch.equal(v, before[k]) for k,v in weights(t).items()) and torch.equal(draws, torch.get_rng_state())
    assert_same(run(t), whole)

# --- the best at the end ---

@pytest.mark.parametrize('with_folder', [True, False])
def test_the_best_weights_at_the_end_and_longer_training_from_the_last(tmp_path, with_folder, said):
    def worse(**kwargs): return trainer(scheduler=None, optimizer={'type': 'SGD', 'args': {'lr': 0.1}}, callbacks=[When(after_step=worsen)], **kwargs)
    def worsen(t):
        if t.epoch>2:
            for p in t.model.parameters(): p.data.mul_(1.1)
    folder = tmp_path/'a' if with_folder else None
    kept = {}
    t = worse(folder=folder, epochs=5)
    t.add(When(after_epoch=lambda t: kept.update({t.epoch: weights(t)})))
    run(t)
    best = t.history.best()['epoch']
    assert best<5 and all(torch.equal(v, kept[best][k]) for k,v in weights(t).items())
    assert any(f'The model has the weights of epoch {best}, the best: val_loss' in o for o in said())
    assert all(torch.equal(v, kept[5][k]) for k,v in t.state_dict()['model'].items())
    whole = run(worse(epochs=8))
    again = worse(epochs=8, folder=folder).load(folder or t.state_dict())
    assert all(torch.equal(v, kept[5][k]) for k,v in weights(again).items())
    assert_same(run(again), whole)
    t.epochs = 8
    assert_same(run(t), whole)

def test_after_a_resume_the_best_may_lie_before_it(tmp_path):
    def best_first(**kwargs): return trainer(scheduler=None, optimizer={'type': 'SGD', 'args': {'lr': 5.}}, epochs=4, monitor='max loss' if kwargs.pop('rising', False) else None, **kwargs)
    whole = run(best_first())
    first = run(best_first(folder=tmp_path, callbacks=[stop_at(3*STEPS+2)]))
    assert first.stopped and first._last is None
    assert_same(run(best_first(folder=tmp_path).load(tmp_path)), whole)

def test_a_stopped_run_keeps_its_last_weights_and_restore_best_can_be_off():
    t = run(trainer(callbacks=[stop_at(STEPS*2)]))
    assert all(torch.equal(v, t.state_dict()['model'][k]) for k,v in weights(t).items()) and t._last is None
    off = run(trainer(restore_best=False))
    assert all(torch.equal(v, off.state_dict()['model'][k]) for k,v in weights(off).items())
    on = run(trainer())
    assert all(torch.equal(v, off.model.state_dict()[k]) for k,v in on.state_dict()['model'].items())

class Mean(Callback):
    "The mean of all weights so far."
    def __init__(self): self.n, self.mean = 0, None
    def after_step(self, trainer):
        self.n += 1
        now = {k: p.detach().clone() for k,p in trainer.model.named_parameters()}
        self.mean = now if self.mean is None else {k: self.mean[k].lerp(v, 1/self.n) for k,v in now.items()}
    def averaged(self): return self.mean
    def state_dict(self): return {'n': self.n, 'mean': self.mean}
    def load_state_dict(self, state): self.n, self.mean = state['n'], state['mean']

@pytest.mark.parametrize('step', [3, 2*STEPS, 3*STEPS+1])
def test_averages_are_validated_and_used_and_the_raw_weights_go_on(tmp_path, step):
    whole = run(trainer(callbacks=[Mean()]))
    raw = run(trainer())
    assert all(torch.equal(v, raw.state_dict()['model'][k]) for k,v in whole.state_dict()['model'].items())       # training is the same
    assert whole.history['val_loss']!=raw.history['val_loss']
    run(trainer(callbacks=[Mean(), stop_at(step)], folder=tmp_path))
    again = run(trainer(callbacks=[Mean()], folder=tmp_path).load(tmp_path))
    assert_same(again, whole)
    best = load_checkpoint(tmp_path/'best_model.pt')
    assert all(torch.equal(v, weights_for_use(best)[k]) for k,v in weights(again).items())
