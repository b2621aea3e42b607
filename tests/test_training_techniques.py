"""Techniques in whole runs: each goes on exactly after a stop, what they make is what is used, and several work together."""
import gzip, json, logging
import pytest, torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from deep_studio_nb.common.config import Config
from deep_studio_nb.common.errors import ConfigError
from deep_studio_nb.common.processes import in_processes
from deep_studio_nb.data.loaders import BaseDataLoader
from deep_studio_nb.experiments.build import learn_names
from deep_studio_nb.training.averaging import EMA, SWA, averageable
from deep_studio_nb.training.callbacks import StopAfter
from deep_studio_nb.training.checkpoints import load_checkpoint, load_model_state, weights_for_use
from deep_studio_nb.training.events import When
from deep_studio_nb.training.freezing import Freeze, checksums
from deep_studio_nb.training.keeping import KeepBest, KeepEvery
from deep_studio_nb.training.mixing import CutMix, Mixup
from deep_studio_nb.training.profiling import Profile
from deep_studio_nb.training.trainer import Trainer, validate

STEPS, EPOCHS = 5, 4

class Net(nn.Module):
    "Convolutions, batch norm, dropout: a little of everything."
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(72, 3))
    def forward(self, x): return self.head(self.body(x))

def data(n, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 8, 8, generator=g)
    return TensorDataset(x, (x.mean((1, 2, 3))*60).long()%3)

def trainer(*callbacks, workers=0, **kwargs):
    "A run of `EPOCHS` epochs of `STEPS` steps, the last batch short, always from the same weights."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = Net()
    settings = dict(loss='cross_entropy', metrics=['accuracy'], optimizer={'type': 'AdamW', 'args': {'lr': 0.01}}, scheduler='CosineAnnealingLR', epochs=EPOCHS, device='cpu', progress=False, save_period=0)
    return Trainer(net, BaseDataLoader(data(54, 0), 12, num_workers=workers, seed=7), DataLoader(data(30, 1), 15), callbacks=callbacks, **settings|kwargs)

def rows(t): return [{k: v for k,v in o.items() if k!='seconds'} for o in t.history]

def same(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys()==b.keys() and all(same(v, b[k]) for k,v in a.items() if k!='seconds')
    if isinstance(a, (list, tuple)): return len(a)==len(b) and all(map(same, a, b))
    return a==b or a!=a and b!=b

def assert_same(a, b):
    "Two runs ended with the same bits: weights in use, weights to go on from, averages, callbacks, optimizer, history."
    one, two = a.state_dict(), b.state_dict()
    assert same(dict(a.model.state_dict()), dict(b.model.state_dict()))
    for k in ('model', 'averaged', 'callbacks', 'optimizer', 'steps', 'updates'): assert same(one[k], two[k]), k
    assert rows(a)==rows(b)

TECHNIQUES = dict(
    ema=lambda: [EMA(0.9)], ema_plain=lambda: [EMA(0.9, warmup=False)], swa=lambda: [SWA(2, batches=3)], swa_late=lambda: [SWA(0.75)],
    mixup=lambda: [Mixup(0.5)], cutmix=lambda: [CutMix()], both=lambda: [Mixup(0.5), CutMix(p=0.7)],
    freeze=lambda: [Freeze({'body.0': 2, 'body.1': 2, 'body.3': 3})], best=lambda: [KeepBest(2)], every=lambda: [KeepEvery(steps=3, last=2)],
    profile=lambda: [Profile(steps=3, skip=1)],
    together=lambda: [EMA(0.9), Mixup(0.5), CutMix(), Freeze('body.0', 1), KeepBest(2), KeepEvery(1, pattern='{epoch}', last=1), Profile(2, 0)],
    swa_together=lambda: [SWA(2), CutMix(), Freeze('body', 2), KeepBest(1)])

@pytest.mark.parametrize('name', TECHNIQUES)
@pytest.mark.parametrize('stop', [7, 2*STEPS, 18])
def test_goes_on_exactly(tmp_path, name, stop):
    make = TECHNIQUES[name]
    whole = trainer(*make(), folder=tmp_path/'whole')
    whole.train()
    first = trainer(*make(), StopAfter(steps=stop), folder=tmp_path/'parts')
    first.train()
    assert first.stopped and first.steps==stop
    second = trainer(*make(), folder=tmp_path/'parts').load(tmp_path/'parts')
    second.train()
    assert_same(whole, second)
    first.train()
    assert_same(whole, first)                                     # the same trainer, trained on
    left = {o.name for o in (tmp_path/'parts').glob('*.pt')}
    assert left=={o.name for o in (tmp_path/'whole').glob('*.pt')}

def test_goes_on_exactly_within_a_group_of_batches(tmp_path):
    make = lambda: [EMA(0.9), Mixup(0.5), KeepEvery(steps=4)]
    whole = trainer(*make(), accumulate=3)
    whole.train()
    assert whole.callbacks[0].count==whole.updates==2*EPOCHS      # one update for each step of the optimizer
    trainer(*make(), StopAfter(steps=9), accumulate=3, folder=tmp_path).train()
    second = trainer(*make(), accumulate=3, folder=tmp_path).load(tmp_path)
    second.train()
    assert_same(whole, second)

@pytest.mark.parametrize('name', ['ema', 'both', 'swa'])
def test_workers_do_not_matter(name):
    a, b = trainer(*TECHNIQUES[name]()), trainer(*TECHNIQUES[name](), workers=2)
    a.train(), b.train()
    assert_same(a, b)

@pytest.mark.parametrize('make', [lambda: EMA(0.9), lambda: SWA(2)], ids=['EMA', 'SWA'])
def test_averaged_weights_are_what_is_scored_saved_and_used(tmp_path, make):
    t = trainer(make(), folder=tmp_path)
    t.train()
    state = load_checkpoint(tmp_path/'best_model.pt')
    best = t.history.best()
    assert same({k: v for k,v in state['averaged'].items()}, {k: t.model.state_dict()[k] for k in averageable(t.model)})     # the run ended with the best
    net = load_model_state(Net(), weights_for_use(state))
    assert validate(net, t.valid_loader, 'cross_entropy')['loss']==pytest.approx(best['val_loss'], abs=1e-7)
    raw = load_model_state(Net(), state['model'])
    assert validate(raw, t.valid_loader, 'cross_entropy')['loss']!=pytest.approx(best['val_loss'], abs=1e-7)

def test_a_run_with_an_average_ends_with_its_best_in_memory():
    t = trainer(EMA(0.9))
    t.train()
    assert validate(t.model, t.valid_loader, 'cross_entropy')['loss']==pytest.approx(t.history.best()['val_loss'], abs=1e-7)

@pytest.mark.parametrize('name', ['ema', 'swa', 'profile', 'best', 'every'])
def test_what_only_looks_on_does_not_change_the_training(name, tmp_path):
    plain, with_it = trainer(restore_best=False, folder=tmp_path/'a'), trainer(*TECHNIQUES[name](), restore_best=False, folder=tmp_path/'b')
    plain.train(), with_it.train()
    assert same(dict(plain.model.state_dict()), dict(with_it.model.state_dict()))
    assert plain.history['loss']==with_it.history['loss']

@pytest.mark.parametrize('loss', ['cross_entropy', {'type': 'cross_entropy', 'args': {'weight': [1., 2., 4.], 'label_smoothing': 0.1}}], ids=['plain', 'weights and smoothing'])
@pytest.mark.parametrize('make', [lambda: Mixup(1.), lambda: CutMix()], ids=['Mixup', 'CutMix'])
def test_the_loss_of_a_mixed_batch_is_the_mix_of_the_losses(loss, make):
    seen = []
    def look(t):
        x, soft = t.batch
        if soft.ndim==2: seen.append((t.loss.item(), t.preds.detach(), soft, dict(weight=None, label_smoothing=0.) if loss=='cross_entropy' else dict(weight=torch.tensor([1., 2., 4.]), label_smoothing=0.1)))
    trainer(make(), When(after_loss=look), loss=loss, epochs=1).train()
    assert len(seen)==STEPS
    for value, preds, soft, kw in seen:
        (la, a), (lb, b) = ((o.unsqueeze(1), i) for o,i in zip(*[o.T for o in soft.topk(2)]))
        each = lambda y: F.cross_entropy(preds, y, reduction='none', **kw)
        assert value==pytest.approx((la[:,0]*each(a)+lb[:,0]*each(b)).mean().item(), abs=1e-5)

def test_metrics_of_the_train_split_see_class_numbers():
    seen = []
    def hit(preds, target):
        seen.append(target)
        return (preds.argmax(1)==target).float()
    t = trainer(Mixup(1.), metrics={'hit': hit}, epochs=2)
    t.train()
    assert all(o.dtype==torch.int64 and o.ndim==1 for o in seen) and all(0<=v<=1 for v in t.history['hit'])

def test_mixing_by_own_loss_and_several_labels():
    class Own(nn.Module):
        def __init__(self): super().__init__(); self.net = Net()
        def forward(self, x): return self.net(x)
        def forward_train(self, batch):
            preds = self.net(batch[0])
            return preds, F.cross_entropy(preds, batch[1]), {}
    t = Trainer(Own(), DataLoader(data(24, 0), 8), callbacks=[Mixup(num_classes=3)], device='cpu', progress=False)
    t.train()
    assert 0<t.history['loss'][0]<5
    x, y = data(24, 0).tensors
    t = Trainer(Net(), DataLoader(TensorDataset(x, F.one_hot(y, 3).float()), 8), loss='binary_cross_entropy_with_logits', metrics=['label_f1'], callbacks=[CutMix()], device='cpu', progress=False)
    t.train()
    assert 0<=t.history['label_f1'][0]<=1

def test_files_of_another_run_stay(tmp_path):
    trainer(KeepBest(1), folder=tmp_path/'one').train()
    before = {o: o.stat().st_mtime_ns for o in (tmp_path/'one').iterdir()}
    t = trainer(KeepBest(1), folder=tmp_path/'one')              # takes the next free name
    t.train()
    assert t.folder!=tmp_path/'one' and before=={o: o.stat().st_mtime_ns for o in (tmp_path/'one').iterdir()}

def test_every_kept_file_goes_on_exactly(tmp_path):
    whole = trainer(EMA(0.9), KeepEvery(1), KeepBest(2), folder=tmp_path)
    whole.train()
    for n in range(1, EPOCHS):
        again = trainer(EMA(0.9), KeepEvery(1), KeepBest(2), folder=tmp_path).load(tmp_path/f'epoch_{n:03d}.pt')
        again.train()
        assert_same(whole, again)

def test_frozen_parts_keep_their_bits_through_all_else(tmp_path):
    kept = checksums({k: v for k,v in trainer().model.state_dict().items() if k.startswith('body.')})
    t = trainer(Freeze('body'), EMA(0.9), Mixup(), folder=tmp_path, optimizer={'type': 'AdamW', 'args': {'lr': 0.01, 'weight_decay': 0.5}})
    t.train()
    for state in (t.model.state_dict(), weights_for_use(load_checkpoint(tmp_path/'last.pt')), load_checkpoint(tmp_path/'last.pt')['model']):
        assert checksums({k: v for k,v in state.items() if k.startswith('body.')})==kept

def test_profile_of_a_run(tmp_path, caplog):
    t = trainer(Profile(steps=8, skip=2), folder=tmp_path/'checkpoints')
    with caplog.at_level(logging.INFO, 'deep_studio_nb'): t.train()
    assert 'waiting for data' in caplog.text and '8 steps were watched' in caplog.text
    names = {o.get('name') for o in json.loads(gzip.open(tmp_path/'profile'/'trace.json.gz').read())['traceEvents']}
    assert 'aten::convolution' in names
    found = {o['what']: o for o in t.callbacks[0].rows}
    assert any('conv' in k for k in found)

def test_two_averages_are_refused():
    with pytest.raises(ConfigError, match='both average'): trainer(EMA(), SWA()).train()

def test_profile_is_a_switch(tmp_path):
    t = trainer(profile=True, folder=tmp_path/'run'/'checkpoints')
    t.train()
    assert t.callbacks[0].rows and (tmp_path/'run'/'profile'/'trace.json.gz').is_file()
    assert len([o for o in trainer(Profile(3), profile=True).callbacks if isinstance(o, Profile)])==1

class Tower(nn.Module):
    "A net without batch norm, which is the same in one process and in two."
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body, self.head = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh()), nn.Linear(16, 3)
    def forward(self, x): return self.head(self.body(x))

TOGETHER = dict(ema=lambda: [EMA(0.9), Freeze('body', 2)], swa=lambda: [SWA(2)], kept=lambda: [KeepBest(2), KeepEvery(steps=7, last=1)])

def tower(strategy, name, folder=None):
    t = Trainer(Tower(), BaseDataLoader(data(54, 0), 12, seed=7), DataLoader(data(31, 1), 15), loss='cross_entropy', metrics=['accuracy'], epochs=EPOCHS, device='cpu', progress=False,
                callbacks=TOGETHER[name](), strategy=strategy, folder=folder, save_period=0)
    t.train()
    return rows(t)

@pytest.mark.parametrize('name', TOGETHER)
@pytest.mark.parametrize('strategy', ['ddp', 'fsdp'])
def test_the_same_in_two_processes(tmp_path, strategy, name):
    one, two = tower('auto', name, tmp_path/'one'), in_processes(tower, strategy, name, tmp_path/'two')
    assert two[0]==two[1]
    for a, b in zip(one, two[0]): assert a==pytest.approx(b, abs=1e-5)
    assert {o.name for o in (tmp_path/'one').iterdir()}=={o.name for o in (tmp_path/'two').iterdir()}
    a, b = (load_checkpoint(tmp_path/o/'last.pt')['averaged'] or {} for o in ('one', 'two'))
    assert a.keys()==b.keys() and all(torch.allclose(v, b[k], atol=1e-5) for k,v in a.items())

SPECS = ['[{type: EMA, args: {decay: 0.99, warmup: false}}]', '[{type: SWA, args: {start: 0.5}}]', '[{type: SWA, args: {start: 3}}]', '[Mixup, CutMix]', '[{type: Mixup, args: {alpha: 0.3, p: 0.5}}]',
         '[{type: KeepBest, args: {k: 2, pattern: "epoch_{epoch:03d}_{val_loss:.4f}"}}, {type: KeepEvery, args: {epochs: 2, last: 3}}]', '[Profile]', '[{type: Freeze, args: {parts: blocks, epochs: 2}}]',
         '[{type: Freeze, args: {parts: {blocks.0: null, blocks.1: 2}, but: ["*.1"]}}]']

@pytest.mark.parametrize('spec', SPECS)
def test_in_a_config(spec):
    learn_names()
    Config.load('configs/quickstart.yaml', f'callbacks={spec}').check()

def test_a_mistake_in_a_config_is_found():
    learn_names()
    with pytest.raises(ConfigError, match='did you mean `decay`'): Config.load('configs/quickstart.yaml', 'callbacks=[{type: EMA, args: {deacy: 0.99}}]').check()
    with pytest.raises(ConfigError, match='did you mean `Mixup`'): Config.load('configs/quickstart.yaml', 'callbacks=[MixUp]').check()
