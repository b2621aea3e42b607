"""A zoo of trainings that are broken on purpose, each to be named by the preflight, and healthy ones that it must let pass; and the preflight leaves no trace."""
import hashlib, json, os
from pathlib import Path
import pytest, torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from deep_studio_nb.cli import main
from deep_studio_nb.common.randomness import rng_state
from deep_studio_nb.experiments.build import learn_names
from deep_studio_nb.training import preflight  # noqa: F401  (gives trainers `preflight`)
from deep_studio_nb.training.trainer import Trainer
from training_toy import STEPS, loaders, stop_at

learn_names()

# --- what is trained ---

def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()

def table(n=160, k=3, scale=1., noise=0.):
    "Classes that follow from the first two of eight columns."
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 8, generator=g)
    return TensorDataset(x*scale, (x[:, 0]>0).long()+(x[:, 1]>0.5).long() if k==3 else (x[:, 0]>0).long())

def pictures(n=96, size=16, channels=3):
    "Classes by the side on which a picture is bright."
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n)%2
    x = torch.randn(n, channels, size, size, generator=g)*0.5
    for i in range(n): x[i, :, :, size//2*y[i]:size//2*(y[i]+1)] += 1
    return TensorDataset(x, y)

def mlp(*more, inputs=8, outputs=3): return seeded(lambda: nn.Sequential(nn.Linear(inputs, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, outputs), *more))

def training(net=None, ds=None, batch=16, valid=True, train=None, **settings):
    ds = ds if ds is not None else table()
    train = train if train is not None else DataLoader(ds, batch, shuffle=True)
    valid = DataLoader(ds, batch) if valid is True else valid
    return Trainer(net if net is not None else mlp(), train, valid or None, **dict(loss='cross_entropy', metrics=['accuracy'], optimizer=adamw(), epochs=10, device='cpu', progress=False)|settings)

def adamw(lr=0.003): return {'type': 'AdamW', 'args': {'lr': lr}}
def sgd(lr, **more): return {'type': 'SGD', 'args': {'lr': lr, **more}}

def report_of(t, **more): return t.preflight(progress=False, **{'seconds': 15, **more})
def alarms(report): return {o.kind for o in report if o.level!='note'}

# --- the zoo ---

class Body(nn.Module):
    "A network in two parts, to be broken between them."
    def __init__(self, inputs=8, hidden=32, outputs=3):
        super().__init__()
        self.first, self.last = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)
    def between(self, h): return h.relu()
    def forward(self, x): return self.last(self.between(self.first(x)))

class Detached(Body):
    def between(self, h): return h.relu().detach()
class Dead(Body):
    def between(self, h): return (h-100).relu()
class Logarithm(Body):
    def between(self, h): return self.log(h)
    def __init__(self):
        super().__init__()
        self.log = Log()
class Log(nn.Module):
    def forward(self, x): return x.log()
class Explodes(Body):
    def between(self, h): return 1e5*h.relu()
class Deaf(Body):
    def forward(self, x): return super().forward(torch.ones_like(x))
class Drops(Body):
    def between(self, h): return F.dropout(h.relu(), 0.3)
class Spare(Body):
    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(64, 64)
class Wrong(Body):
    "Its output is cut off from all weights, and follows from nothing."
    def forward(self, x): return super().forward(x).argmax(1, keepdim=True).float()*torch.ones(3)
class Breaks(Body):
    def forward(self, x):
        if not self.training: raise KeyError('only in evaluation')
        return super().forward(x)
class Noisy(TensorDataset):
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x+0.5*torch.randn(x.shape), y
class Slow(TensorDataset):
    def __getitem__(self, i):
        hashlib.pbkdf2_hmac('sha256', b'decode', b'', 8000)
        return super().__getitem__(i)
class Same(TensorDataset):
    def __getitem__(self, i): return super().__getitem__(0)[0], super().__getitem__(i)[1]
class Random(TensorDataset):
    "The same input again and again, with targets that contradict each other."
    def __getitem__(self, i): return super().__getitem__(i%2)[0], torch.tensor(i//2%2)

def frozen_by_hand(evaluating=False):
    net = seeded(lambda: nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3)))
    for o in net[:2].parameters(): o.requires_grad_(False)
    if evaluating: net[1].eval()
    return net

def new_head():
    t = training()
    t.model[3] = nn.Linear(32, 3)
    return t

def all_frozen():
    net = mlp()
    t = training(net)
    for o in net.parameters(): o.requires_grad_(False)
    return t

def big_head():
    net = mlp()
    nn.init.normal_(net[3].weight, std=30)
    return training(net)

def numbers(mean=0., spread=1., net=None, **settings):
    ds = table()
    y = (ds.tensors[0][:, :1]+ds.tensors[0][:, 1:2].square())*spread+mean
    return training(net or mlp(outputs=1), TensorDataset(ds.tensors[0], y), loss='mse', metrics=['mae'], **settings)

def holes():
    ds = table()
    ds.tensors[0][:, 3] = float('nan')
    return training(ds=ds)

def saturated():
    net = seeded(lambda: nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 3)))
    nn.init.constant_(net[0].bias, 50)
    return training(net)

def normed(): return seeded(lambda: nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3)))

BROKEN = {
    'the model does not fit the inputs': ('bad_batch', lambda: training(mlp(inputs=5))),
    'too many classes in the targets': ('bad_batch', lambda: training(mlp(outputs=2))),
    'NaN in a column': ('bad_batch', holes),
    'a generator as loader': ('bad_batch', lambda: training(train=(o for o in DataLoader(table(), 16)))),
    'validation breaks': ('bad_batch', lambda: training(Breaks())),
    'a metric breaks': ('bad_batch', lambda: training(metrics={'broken': lambda preds, target: preds.no_such_thing()})),
    'one sample left over': ('bad_batch', lambda: training(normed(), TensorDataset(*(o[:129] for o in table().tensors)))),
    'a wild last layer': ('initial_loss', big_head),
    'targets in the hundred thousands': ('initial_loss', lambda: numbers(2e5, 5e4)),
    'contradicting targets': ('cannot_overfit', lambda: training(ds=Random(*table().tensors))),
    'cut off in the middle': ('no_gradient', lambda: training(Detached())),
    'cut off at the end': ('no_gradient', lambda: training(Wrong())),
    'everything frozen': ('no_gradient', all_frozen),
    'a layer that is never called': ('unused_parameters', lambda: training(Spare())),
    'a new head that the optimizer does not know': ('foreign_parameters', new_head),
    'only the head in the optimizer': ('not_in_optimizer', lambda: (lambda net: training(net, optimizer=torch.optim.AdamW(net.last.parameters(), lr=0.01)))(Body())),
    'dead units': ('dead_activations', lambda: training(Dead())),
    'saturated units': ('dead_activations', saturated),
    'a logarithm of what is below 0': ('nan_activations', lambda: training(Logarithm())),
    'numbers that explode': ('exploding_activations', lambda: training(nn.Sequential(nn.Linear(8, 32), Body(32, 32, 32), Explodes(32), nn.Identity()))),
    'noise in the validation data': ('random_validation', lambda: training(valid=DataLoader(Noisy(*table().tensors), 16))),
    'dropout in evaluation': ('random_validation', lambda: training(Drops())),
    'norms in a frozen part': ('frozen_norm', lambda: training(frozen_by_hand())),
    'a schedule for ten times the epochs': ('schedule_length', lambda: training(scheduler={'type': 'CosineAnnealingLR', 'args': {'T_max': 100}})),
    'a schedule that counts epochs as steps': ('schedule_length', lambda: training(scheduler={'type': 'StepLR', 'args': {'step_size': 30}})),
    'data that is slow to decode': ('workers', lambda: training(ds=Slow(*table().tensors))),
    'pixels up to 255': ('unnormalised_inputs', lambda: training(mlp(), table(scale=255.))),
    'scaled twice': ('unnormalised_inputs', lambda: training(mlp(), table(scale=1/255**2*100))),
    'a softmax before cross entropy': ('softmax_before_loss', lambda: training(mlp(nn.Softmax(1)))),
    'a sigmoid before bce': ('softmax_before_loss', lambda: training(mlp(nn.Sigmoid(), outputs=1), (lambda ds: TensorDataset(ds.tensors[0], ds.tensors[1][:, None].float()))(table(k=2)), loss='bce', metrics=[])),
    'nll of logits': ('no_log_softmax', lambda: training(loss='nll')),
    'a model that does not look': ('constant_predictions', lambda: training(Deaf())),
    'inputs that are all the same': ('constant_inputs', lambda: training(ds=Same(*table().tensors))),
    'a rate that is far too high': ('lr_too_high', lambda: training(optimizer=sgd(300.))),
    'a schedule that is far too high': ('lr_too_high', lambda: training(scheduler={'type': 'OneCycleLR', 'args': {'max_lr': 20.}})),
    'a rate that is far too low': ('lr_too_low', lambda: training(optimizer=sgd(1e-6))),
    'a train split in its own order': ('not_shuffled', lambda: training(train=DataLoader(table(), 16))),
    'an architecture that gives nan in half precision': ('nan_activations', lambda: training(Explodes(), table(scale=100.), precision='fp16')),
}

@pytest.mark.parametrize('name', BROKEN)
def test_what_is_broken_is_named(name):
    kind, make = BROKEN[name]
    report = report_of(make())
    assert kind in alarms(report), report
    found = report.find(kind)[0]
    assert found.what and found.where and not report.find('not_judged'), report

# --- the healthy ones ---

def conv(i, o, **more): return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, **more), nn.BatchNorm2d(o), nn.ReLU())

def resnet_frozen():
    "A trained backbone that is frozen as it should be, and a new head."
    from deep_studio_nb.models.interface import create_model
    net = seeded(lambda: create_model('ResNet18', facts=dict(num_classes=2, in_channels=3)))
    head = next(k for k in reversed([k for k, _ in net.named_children()]))
    return training(net, pictures(32, 32), batch=16, optimizer=adamw(0.003), callbacks=[{'type': 'Freeze', 'args': {'parts': [k for k, _ in net.named_children() if k!=head and any(True for _ in getattr(net, k).parameters())]}}])

def masks():
    "A class for every pixel."
    from deep_studio_nb.models.interface import create_model
    g = torch.Generator().manual_seed(0)
    x = torch.randn(24, 3, 32, 32, generator=g)
    y = (F.avg_pool2d(x[:, :1], 5, 1, 2)[:, 0]>0).long()
    y[:, :2] = -100
    net = seeded(lambda: create_model({'type': 'UNet', 'args': {'width': 8}}, facts=dict(num_classes=2, in_channels=3)))
    return training(net, TensorDataset(x, y), batch=8, optimizer=adamw(0.002), scheduler={'type': 'OneCycleLR', 'args': {'max_lr': 0.002}}, metrics=['accuracy', {'type': 'iou', 'args': {'num_classes': 2}}])

class Words(nn.Module):
    def __init__(self, n=50, d=16, k=2):
        super().__init__()
        self.words, self.out = nn.Embedding(n, d, padding_idx=0), nn.Sequential(nn.Linear(d, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, k))
    def forward(self, x): return self.out(self.words(x).mean(1))

class Units(nn.Module):
    def forward(self, x): return 5e4*x+2e5

def texts():
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 50, (160, 12), generator=g)
    return training(Words(), TensorDataset(x, (x<10).sum(1).gt(2).long()), optimizer=adamw(0.005))

HEALTHY = {
    'mlp': lambda: training(),
    'mlp with sgd': lambda: training(optimizer=sgd(0.1, momentum=0.9), scheduler={'type': 'CosineAnnealingLR', 'args': {'warmup_epochs': 1}}),
    'mlp in bf16, clipped, accumulating': lambda: training(precision='bf16', clip_norm=1., accumulate=2),
    'cnn': lambda: training(seeded(lambda: nn.Sequential(conv(3, 8), nn.MaxPool2d(2), conv(8, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2))), pictures(), optimizer=adamw(0.001), scheduler={'type': 'OneCycleLR', 'args': {'max_lr': 0.01}}),
    'resnet with a frozen backbone': resnet_frozen,
    'frozen by hand, norms in evaluation mode': lambda: training(frozen_by_hand(evaluating=True), optimizer=adamw(0.01)),
    'unet': masks,
    'text': texts,
    'regression': lambda: numbers(optimizer=adamw(0.01)),
    'prices, by a model that ends in their unit': lambda: numbers(2e5, 5e4, net=mlp(Units(), outputs=1), optimizer=adamw(0.01)),
    'mixup and averaged weights': lambda: training(callbacks=[{'type': 'Mixup', 'args': {'alpha': 0.2}}, {'type': 'EMA', 'args': {'decay': 0.99}}], loss={'type': 'cross_entropy', 'args': {'label_smoothing': 0.1}}),
    'yes or no': lambda: training(mlp(outputs=1), (lambda ds: TensorDataset(ds.tensors[0], ds.tensors[1][:, None].float()))(table(k=2)), loss='bce', metrics=[]),
    'a sum of losses': lambda: training(loss={'type': 'sum', 'args': {'losses': ['cross_entropy', {'type': 'focal', 'weight': 0.5}]}}),
    'a head of zeros': lambda: (lambda net: (nn.init.zeros_(net[3].weight), nn.init.zeros_(net[3].bias), training(net))[-1])(mlp()),
    'shifting and a small rate, in a long run': lambda: training(optimizer=adamw(1e-4), epochs=300),
    'no validation': lambda: training(valid=False, metrics=[]),
    'a norm layer in front of raw pixels': lambda: training(seeded(lambda: nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))), table(scale=255.)),
}

@pytest.mark.parametrize('name', HEALTHY)
def test_what_is_healthy_passes(name):
    report = report_of(HEALTHY[name]())
    assert alarms(report)==set() and not report.find('not_judged'), report

# --- no trace ---

def plain(o):
    if isinstance(o, torch.Tensor): return str((o.dtype, tuple(o.shape))).encode()+o.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(o, torch.Generator): return plain(o.get_state())
    if isinstance(o, dict): return b'{'+b','.join(plain(k)+b':'+plain(v) for k, v in o.items())+b'}'
    if isinstance(o, (list, tuple)): return b'['+b','.join(map(plain, o))+b']'
    return repr(o).encode()

def everything(t):
    "A hash over a trainer, its loaders, and the random numbers of the process."
    state = {k: v for k, v in t.state_dict().items() if k!='rng'}
    own = {k: v for k, v in vars(t).items() if isinstance(v, (int, float, str, bool, type(None), list))}
    parts = [p for o in (t.train_loader, t.valid_loader) for p in (o, getattr(o, 'sampler', None)) if p is not None]
    movers = [[(k, v) for k, v in vars(o).items() if isinstance(v, (int, float, str, bool, type(None), torch.Generator))] for o in parts]
    module = [[(k, p, p.grad, p.requires_grad) for k, p in t.model.named_parameters()], list(t.model.named_buffers()), [o.training for o in t.model.modules()], [len(o._forward_hooks) for o in t.model.modules()]]
    return hashlib.sha256(plain([module, state, own, movers, rng_state(), [id(p) for p in t.model.parameters()]])).hexdigest()

@pytest.mark.parametrize('kind', ['plain', 'plain generator', 'ours', 'ours samples'])
@pytest.mark.parametrize('at', [0, 3, STEPS])
def test_everything_is_as_it_was(kind, at):
    net = seeded(lambda: nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2)))
    t = Trainer(net, *loaders(kind), loss='cross_entropy', metrics=['accuracy'], scheduler={'type': 'OneCycleLR', 'args': {'max_lr': 0.05}}, epochs=4, device='cpu', progress=False)
    if at:
        t.add(stop_at(at))
        t.train()
    before = everything(t)
    report_of(t, seconds=5)
    assert everything(t)==before

@pytest.mark.parametrize('name', ['validation breaks', 'cut off at the end', 'norms in a frozen part', 'a rate that is far too high', 'NaN in a column'])
def test_a_broken_training_is_left_as_it_was(name):
    t = BROKEN[name][1]()
    before = everything(t)
    report_of(t, seconds=5)
    assert everything(t)==before

class Interrupted(Body):
    "Somebody presses Ctrl-C in the midst of its forward pass."
    def forward(self, x):
        if torch.is_grad_enabled(): torch.rand(3)
        self.calls = getattr(self, 'calls', 0)+1
        if self.calls>4: raise KeyboardInterrupt
        return super().forward(x)

def test_ctrl_c_leaves_it_as_it_was():
    t = training(Interrupted())
    before = everything(t)
    with pytest.raises(KeyboardInterrupt): report_of(t)
    assert everything(t)==before and not hasattr(t.model, 'calls')

def test_a_training_with_a_preflight_ends_with_the_same_bits():
    def trained(look):
        t = HEALTHY['mixup and averaged weights']()
        if look: report_of(t, seconds=5)
        t.train()
        return t.model.state_dict()
    one, two = trained(False), trained(True)
    assert all(torch.equal(v, two[k]) for k, v in one.items())

# --- the command ---

CONFIG = """name: looked_at
dataset: {type: Digits, args: {data_dir: digits}}
data_loader: {type: DataLoader, args: {batch_size: 64, num_workers: 0}}
arch: {type: MLP, args: {hidden: [32]}}
loss: cross_entropy
metrics: [accuracy]
optimizer: {type: AdamW, args: {lr: 0.003}}
trainer: {epochs: 3, threads: 1}
"""

def doctor(*words):
    with pytest.raises(SystemExit) as e: main(['doctor', *words])
    return e.value.code

def test_doctor(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path('config.yaml').write_text(CONFIG)
    assert doctor('config.yaml', '--json', 'report.json')==0
    out = capsys.readouterr()
    assert 'no errors' in out.out and 'preflight: learning' in out.err
    report = json.loads(Path('report.json').read_text())
    assert report['ok'] and report['errors']==0 and {'time', 'disk', 'memory'}<=set(report['facts']) and [o['check'] for o in report['table']][0]=='one batch'
    assert not Path('experiments').exists()

@pytest.mark.parametrize('override, kind', [('loss=nll', 'no_log_softmax'), ('optimizer.args.lr=50', 'lr_too_high')])
def test_doctor_ends_with_one(tmp_path, monkeypatch, capsys, override, kind):
    monkeypatch.chdir(tmp_path)
    Path('config.yaml').write_text(CONFIG)
    code = doctor('config.yaml', override, '--json', 'report.json')
    kinds = {o['kind'] for o in json.loads(Path('report.json').read_text())['findings']}
    assert kind in kinds and code==1

def test_random_transforms_in_validation_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from deep_studio_nb.experiments import preflight as _  # noqa: F401
    from deep_studio_nb.experiments.experiment import Experiment
    config = dict(name='x', dataset={'type': 'Digits', 'args': {'data_dir': str(tmp_path/'digits')}}, data_loader={'type': 'DataLoader', 'args': {'batch_size': 64, 'num_workers': 0}}, arch={'type': 'MLP', 'args': {'hidden': [32]}}, loss='cross_entropy',
                  optimizer={'type': 'AdamW', 'args': {'lr': 0.003}}, transforms={'valid': [{'type': 'RandomHorizontalFlip', 'args': {'p': 0.5}}]}, trainer={'epochs': 3, 'threads': 1})
    found = Experiment(config).preflight(seconds=10, progress=False).find('random_validation')
    assert [o.where for o in found]==['valid'] and 'RandomHorizontalFlip' in found[0].what
    assert os.listdir(tmp_path)==['digits']
