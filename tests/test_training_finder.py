"""The learning-rate finder leaves no trace: everything that a training depends on is hashed before and after, also when the finder fails or is interrupted; and a training with it ends with the same bits."""
import hashlib, os, signal
import pytest, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from deep_studio_nb.common.errors import RunError
from deep_studio_nb.common.randomness import rng_state
from deep_studio_nb.training.events import Callback
from deep_studio_nb.training.finder import find_lr
from deep_studio_nb.training.trainer import Trainer
from training_toy import STEPS, assert_same, data, loaders, model, stop_at, trainer

LOADERS = ['plain', 'plain generator', 'plain workers', 'ours', 'ours samples', 'ours workers']

class Counts(Callback):
    "A callback with a state."
    def __init__(self): self.n = 0
    def before_batch(self, trainer): self.n += 1
    def state_dict(self): return {'n': self.n}
    def load_state_dict(self, state): self.n = state['n']

def plain(o):
    "Whatever decides how a training goes on, as bytes: tensors by their bits, objects by what they hold."
    if isinstance(o, torch.Tensor): return str((o.dtype, tuple(o.shape), o.stride())).encode()+o.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(o, torch.Generator): return plain(o.get_state())
    if isinstance(o, dict): return b'{'+b','.join(plain(k)+b':'+plain(v) for k,v in o.items())+b'}'
    if isinstance(o, (list, tuple)): return b'['+b','.join(map(plain, o))+b']'
    return repr(o).encode()

def of_module(m):
    return [[(k, p, p.grad) for k,p in m.named_parameters()], list(m.named_buffers()), [o.training for o in m.modules()]]

def of_loader(loader):
    inner = getattr(loader, 'loader', loader)
    parts = [loader, inner, inner.sampler, inner.batch_sampler, inner.batch_sampler.sampler]
    return [[(k, v) for k,v in vars(o).items() if isinstance(v, (int, float, str, bool, type(None), torch.Generator))] for o in parts if o is not None and hasattr(o, '__dict__')]

def everything(t):
    "A hash over a trainer, its loader, and the random numbers of the process."
    state = {k: v for k,v in t.state_dict().items() if k!='rng'}
    own = {k: v for k,v in vars(t).items() if isinstance(v, (int, float, str, bool, type(None), list))}
    return hashlib.sha256(plain([of_module(t.model), state, own, of_loader(t.train_loader), rng_state(), [id(p) for p in t.model.parameters()],
                                 [id(o) for o in (t.model, t.optimizer, t.scheduler, t.train_loader, *t.callbacks)]])).hexdigest()

def with_buffers():
    "A model with running means, dropout, and a buffer that its state does not name."
    net = model()
    net.register_buffer('seen', torch.zeros(3), persistent=False)
    def count(module, inputs, preds): module.seen += 1
    net.register_forward_hook(count)
    return net

def looked_at(kind, **kwargs):
    settings = dict(loss='cross_entropy', optimizer={'type': 'SGD', 'args': {'lr': 0.02, 'momentum': 0.9, 'no_decay': True, 'weight_decay': 0.01}}, scheduler={'type': 'OneCycleLR', 'args': {'max_lr': 0.05, 'warmup_steps': 5}},
                    epochs=4, device='cpu', progress=False, callbacks=[Counts()])
    return Trainer(with_buffers(), *loaders(kind), **settings | kwargs)

# --- no trace ---

@pytest.mark.parametrize('kind', LOADERS)
@pytest.mark.parametrize('at', [0, 3, STEPS])
def test_everything_is_as_it_was(kind, at):
    t = looked_at(kind)
    if at:
        t.add(stop_at(at))
        t.train()
    before = everything(t)
    found = t.find_lr(steps=20)
    assert len(found.lrs)>3 and everything(t)==before

@pytest.mark.parametrize('settings', [dict(accumulate=4), dict(precision='bf16'), dict(precision='fp16'), dict(clip_norm=0.5), dict(optimizer={'type': 'Muon', 'args': {'groups': {'0.weight': {'muon': True}}}}), dict(scheduler='ReduceLROnPlateau'), dict(scheduler=None),
                                      dict(overfit_batches=2), dict(fast_dev_run=True), dict(scheduler={'type': 'CosineAnnealingLR', 'args': {'warmup_epochs': 1}})], ids=str)
def test_everything_is_as_it_was_with(settings):
    t = looked_at('ours', **settings)
    t.add(stop_at(2))
    t.train()
    before = everything(t)
    assert len(t.find_lr(steps=15).lrs)>3 and everything(t)==before

class Breaks(nn.Module):
    "A loss that does something at its tenth call."
    def __init__(self, what):
        super().__init__()
        self.what,self.calls = what,[0]
        self.register_buffer('sums', torch.zeros(1))
    def forward(self, preds, target):
        self.sums += 1
        self.calls[0] += 1
        torch.rand(1)
        if self.calls[0]==10: self.what()
        return nn.functional.cross_entropy(preds, target)
    def __deepcopy__(self, memo):
        res = Breaks(self.what)
        res.calls = self.calls      # shared, so that the test sees how far it went
        return res

def fail(): raise ValueError('in the middle')
def ctrl_c(): os.kill(os.getpid(), signal.SIGINT)

@pytest.mark.parametrize('kind', ['plain', 'plain generator', 'ours', 'ours workers'])
@pytest.mark.parametrize('what,error', [(fail, ValueError), (ctrl_c, KeyboardInterrupt)])
def test_everything_is_as_it_was_after_a_failure(kind, what, error):
    t = looked_at(kind, loss=Breaks(what))
    before = everything(t), t.loss_fn.sums.clone()
    with pytest.raises(error): t.find_lr(steps=30)
    assert t.loss_fn.calls==[10] and everything(t)==before[0] and torch.equal(t.loss_fn.sums, before[1])

# --- the same training ---

@pytest.mark.parametrize('kind', LOADERS)
def test_a_training_with_it_is_the_same(kind):
    straight, looked = trainer(kind), trainer(kind)
    straight.train()
    looked.find_lr(steps=25)
    for at in (4, 8):
        looked.add(stop_at(at))
        looked.train()
        assert looked.stopped
        looked.find_lr(steps=25)
        looked.callbacks.pop(0)
    looked.train()
    assert_same(straight, looked)

def test_workers_that_are_kept_go_on_where_they_were():
    "Worker processes of a plain loader draw numbers of their own; the finder must not move those."
    def fresh():
        x, y = data()
        torch.manual_seed(1)
        train = DataLoader(Noisy(x[:66], y[:66]), 12, num_workers=1, persistent_workers=True)
        return Trainer(model(), train, None, loss='cross_entropy', optimizer='SGD', epochs=1, device='cpu', progress=False)
    straight, looked = fresh(), fresh()
    for t in (straight, looked):
        t.train()
        workers = t.train_loader._iterator
        if t is looked: t.find_lr(steps=12)
        assert t.train_loader._iterator is workers is not None
        t.epochs = 3
        t.train()
    assert_same(straight, looked)

class Noisy(TensorDataset):
    "Samples with noise that is drawn in the worker."
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x+torch.randn(4)*0.1, y

# --- what it measures ---

def test_one_step_is_what_the_trainer_makes():
    "At a single rate throughout, the finder's losses are those of a training at that rate."
    from deep_studio_nb.training.events import When
    for settings in (dict(), dict(accumulate=2), dict(precision='bf16'), dict(clip_norm=0.05), dict(micro=3)):
        micro = settings.pop('micro', 1)
        seen = []
        make = lambda: Trainer(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), loaders('ours')[0], None, loss='cross_entropy', optimizer={'type': 'SGD', 'args': {'lr': 0.1}}, epochs=3, device='cpu', progress=False, **settings)
        torch.manual_seed(0)
        t = make()
        t.micro = micro
        found = t.find_lr(start=0.1, end=0.1*(1+1e-9), steps=10)
        assert len(found.losses)==10
        t.add(When(after_batch=lambda t: seen.append((t.loss.item(), len(t.batch[0])))))
        t.train()
        k = settings.get('accumulate', 1)
        groups = [seen[i:i+k] for i in range(0, len(seen), k)]
        means = [sum(v*n for v,n in g)/sum(n for _,n in g) for g in groups]
        assert found.losses[:len(means)]==pytest.approx(means[:10], rel=1e-4 if settings.get('precision') is None else 1e-2), settings

def test_it_takes_parts_when_memory_does_not_suffice():
    class Small(nn.Linear):
        def forward(self, x):
            if len(x)>4: raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")
            return super().forward(x)
    x, y = data()
    torch.manual_seed(0)
    small, large = Small(4, 2), nn.Linear(4, 2)
    large.load_state_dict(small.state_dict())
    loader = DataLoader(TensorDataset(x[:64], y[:64]), 16)
    a, b = (find_lr(net, loader, 'cross_entropy', 'SGD', steps=20) for net in (small, large))
    assert a.losses==pytest.approx(b.losses, rel=1e-5)

def test_not_while_it_trains_elsewhere(monkeypatch):
    from deep_studio_nb.training import finder
    monkeypatch.setattr(finder, 'world', lambda: 2)
    with pytest.raises(RunError, match='is for one process'): trainer().find_lr()
