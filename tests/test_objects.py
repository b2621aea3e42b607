"""Experiments of objects built by hand: the config that is read off them, and what is named because nobody can write it."""
import os, subprocess, sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler as L

from deep_studio_nb.common.errors import CheckpointError, ConfigError, RunError
from deep_studio_nb.common.registry import LOSSES, REGISTRIES
from deep_studio_nb.data.digits import Digits
from deep_studio_nb.data.loaders import DataLoader
from deep_studio_nb.data.tensors import Tensors
from deep_studio_nb.experiments.build import learn_names
from deep_studio_nb.experiments.compare import compare
from deep_studio_nb.experiments.described import unlike_at
from deep_studio_nb.experiments.described_models import described_model
from deep_studio_nb.experiments.described_training import described_loss, described_optimizer, described_scheduler
from deep_studio_nb.experiments.experiment import Experiment
from deep_studio_nb.experiments.reproduce import replay
from deep_studio_nb.experiments.trained import load_trained
from deep_studio_nb.models.cnn import SimpleCNN
from deep_studio_nb.models.interface import create_model
from deep_studio_nb.models.mlp import MLP
from deep_studio_nb.models.resnet import ResNet18, ResNet50
from deep_studio_nb.models.unet import UNet
from deep_studio_nb.training.checkpoints import load_checkpoint
from deep_studio_nb.training.events import When
from deep_studio_nb.training.metric_functions import accuracy, top_k_acc

ROOT = Path(__file__).parents[1]
TRAIN = 'import sys; from deep_studio_nb.cli import main; main()'
learn_names()


def process(code, *words, cwd):
    return subprocess.run([sys.executable, '-c', code, *map(str, words)], cwd=cwd, env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'), capture_output=True, text=True, timeout=300)


def weights(run, name='last'): return load_checkpoint(Path(run)/'checkpoints'/f'{name}.pt')['model']


def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def numbers(run): return [line.rsplit(',', 1)[0] for line in (Path(run)/'metrics.csv').read_text().splitlines()]      # without the seconds


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


TINY = dict(name='digits', seed=3, dataset=dict(type='Digits', args=dict(data_dir='digits')), data_loader=dict(type='DataLoader', args=dict(batch_size=64)), transforms=dict(train=[dict(type='RandomRotation', args=dict(degrees=5))]),
            arch=dict(type='MLP', args=dict(hidden=[32], dropout=0.2)), loss='cross_entropy', metrics=['accuracy'], optimizer=dict(type='AdamW', args=dict(lr=0.01)), device='cpu', trainer=dict(epochs=2, verbosity=0, threads=1))


def test_a_notebook_and_the_command_line_make_the_same_run(here):
    exp = Experiment(TINY, 'trainer.epochs=3', name='cell')
    exp.fit()
    exp.config.save('digits.yaml')
    done = process(TRAIN, 'train', 'digits.yaml', '--name', 'line', cwd=here)
    assert done.returncode == 0, done.stderr
    assert same(weights('experiments/cell'), weights('experiments/line')) and numbers('experiments/cell') == numbers('experiments/line')
    assert (exp.folder.path/'predictions'/'test.csv').read_text() == Path('experiments/line/predictions/test.csv').read_text()
    files = sorted(Path('digits/test/3').glob('*.png'))[:5]
    assert torch.equal(exp.predict(files)[0].preds, load_trained('line', device='cpu').predict_files(files)[0].preds)


def test_objects_and_the_config_read_off_them_make_the_same_run(here):
    "Model, optimizer, schedule and loss as objects; the model with the weights of the seed."
    from deep_studio_nb.common.randomness import seeded
    with seeded(3, 'model'): model = MLP(64, 10, (32,), dropout=0.2)
    opt = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=1e-3)
    exp = Experiment.from_objects(model, Digits('digits'), dict(batch_size=64), loss=nn.CrossEntropyLoss(label_smoothing=0.1), metrics=[accuracy,partial(top_k_acc, k=2)], optimizer=opt,
                                  scheduler=L.OneCycleLR(opt, 0.02, total_steps=38), epochs=2, seed=3, name='hand', device='cpu', threads=1, verbosity=0)
    assert exp.unwritten == [] and exp.config.notes == []
    exp.fit()
    exp.config.save('hand.yaml')
    done = process(TRAIN, 'train', 'hand.yaml', '--name', 'line', cwd=here)
    assert done.returncode == 0, done.stderr
    assert same(weights('experiments/hand'), weights('experiments/line')) and numbers('experiments/hand') == numbers('experiments/line')
    found = replay('hand', device='cpu')
    assert found.same and found.weights


def test_such_a_run_is_resumed_scored_and_asked_like_any_other(here):
    exp = Experiment.from_objects(SimpleCNN(10, 1, 8), Digits('digits'), dict(batch_size=64), loss=F.cross_entropy, metrics=['accuracy'], optimizer=lambda p: torch.optim.SGD(p, lr=0.05), epochs=2, name='cnn', device='cpu', verbosity=0)
    exp.trainer.add(When(after_batch=lambda t: t.steps==22 and t.stop()))
    exp.fit()
    assert exp.folder.status() == 'stopped'
    done = process(TRAIN, 'train', '--resume', 'cnn', cwd=here)
    assert done.returncode == 0, done.stderr
    trained = load_trained('cnn', device='cpu')
    assert trained.evaluate('test').metrics['accuracy'] == pytest.approx(exp.folder.read()['test']['accuracy'])
    assert len(trained.predict_files(['digits/test/4'])[0]) == len(list(Path('digits/test/4').glob('*.png')))


MODELS_BUILT = [lambda: MLP(4, 2), lambda: MLP(4, 3, (), 0.), lambda: MLP(9, 1, (8,8,8), 0.5), lambda: SimpleCNN(5, 1, 6, 4), lambda: ResNet18(num_classes=7), lambda: ResNet50(num_classes=3, in_channels=1, stem='small'),
                lambda: UNet(3, 2), lambda: create_model('resnet34', num_classes=4), lambda: create_model('vgg11'), lambda: create_model('efficientnet_b0', num_classes=2)]

@pytest.mark.parametrize('make', MODELS_BUILT, ids=range(len(MODELS_BUILT)))
def test_models_are_described_so_that_the_same_is_built(make):
    model = make()
    spec = described_model(model)
    assert unlike_at(model, create_model(spec), weights=False) is None
    create_model(spec).load_state_dict(model.state_dict())


def opt(**more): return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9, **more)

SCHEDULERS = [lambda o: L.StepLR(o, 2), lambda o: L.ExponentialLR(o, 0.9), lambda o: L.CosineAnnealingLR(o, 10, eta_min=1e-4), lambda o: L.CosineAnnealingWarmRestarts(o, 3, T_mult=2), lambda o: L.LinearLR(o, 0.1, total_iters=4),
              lambda o: L.PolynomialLR(o, 6, power=2.), lambda o: L.ConstantLR(o, 0.5, 3), lambda o: L.ReduceLROnPlateau(o, factor=0.3, min_lr=1e-5), lambda o: L.MultiStepLR(o, [3,3,7], 0.2),
              lambda o: L.OneCycleLR(o, 0.7, total_steps=50, pct_start=0.25, div_factor=10), lambda o: L.OneCycleLR(o, 0.3, total_steps=40, three_phase=True, anneal_strategy='linear')]

@pytest.mark.parametrize('make', SCHEDULERS, ids=range(len(SCHEDULERS)))
def test_schedulers_are_described_so_that_they_go_the_same_way(make):
    def rates(s):
        found = []
        for _ in range(30):
            s.optimizer.step()
            s.step(*[1.]*isinstance(s, L.ReduceLROnPlateau))
            found.append(s.optimizer.param_groups[0]['lr'])
        return found
    spec = described_scheduler(make(opt()))
    assert rates(make(opt())) == rates(REGISTRIES['scheduler'].build(spec, opt()))


OPTIMIZERS = [lambda p: torch.optim.SGD(p, 0.1, nesterov=True, momentum=0.8), lambda p: torch.optim.AdamW(p, 1e-4, amsgrad=True), lambda p: torch.optim.Adagrad(p, lr=0.2), lambda p: torch.optim.RMSprop(p, centered=True),
              lambda p: torch.optim.NAdam(p), lambda p: torch.optim.Adamax(p, eps=1e-5), lambda p: torch.optim.Rprop(p, etas=(0.4,1.3))]

@pytest.mark.parametrize('make', OPTIMIZERS, ids=range(len(OPTIMIZERS)))
def test_optimizers_are_described_with_all_that_they_were_told(make):
    model = nn.Linear(3, 3)
    given = make(model.parameters())
    from deep_studio_nb.training.optimizers import build_optimizer
    again = build_optimizer(described_optimizer(given, model), model)
    assert type(again) is type(given) and unlike_at(*({k: v for k,v in o.defaults.items() if k not in ('fused','foreach')} for o in (again,given))) is None
    assert bool(again.defaults.get('fused')) == bool(given.defaults.get('fused'))


class Keeps(nn.Module):
    def __init__(self, power:float=2., table=None):
        super().__init__()
        self.power,self.table = power,table
    def forward(self, preds, target): return (preds-target).abs().pow(self.power).mean()

class Forgets(nn.Module):
    def __init__(self, power:float=2.):
        super().__init__()
        self.exponent = power
    def forward(self, preds, target): return (preds-target).abs().pow(self.exponent).mean()

def test_own_classes_are_described_by_what_they_keep():
    with LOSSES.temporary():
        LOSSES.register(Keeps)
        LOSSES.register('forgets')(Forgets)
        assert described_loss(Keeps(3.)) == dict(type='Keeps', args=dict(power=3.)) and described_loss(Forgets()) == 'forgets'
        with pytest.raises(ConfigError, match=r'differs in `exponent`. Let the class keep it, as in `self.power = power`'): described_loss(Forgets(3.))
        with pytest.raises(ConfigError, match='`table` is a Tensor, which no config can hold'): described_loss(Keeps(table=torch.zeros(3, 3)))
        changed = Keeps(3.)
        changed.extra = 1
        with pytest.raises(ConfigError, match='cannot be made again'): described_loss(changed)
    with pytest.raises(ConfigError, match='no registered loss. Write `@LOSSES.register` above it there'): described_loss(Keeps())


def test_what_cannot_be_written_is_named_each_with_what_to_do(here):
    x,y = torch.randn(40, 4),torch.randint(0, 2, (40,))
    model = MLP(4, 2)
    model.layers[1] = nn.Tanh()          # changed in place
    loss = lambda p, t: F.cross_entropy(p, t)
    groups = torch.optim.SGD([dict(params=model.layers[0].parameters(), lr=0.1),dict(params=model.layers[2].parameters())], lr=0.2)
    exp = Experiment.from_objects(model, Tensors(x, y), dict(batch_size=8), loss=loss, metrics=dict(odd=lambda p, t: p.mean()), optimizer=groups, scheduler=L.LambdaLR(groups, lambda i: 0.9**i),
                                  callbacks=[When(after_epoch=lambda t: None)], name='odd', device='cpu', epochs=1, verbosity=0)
    said = {o.section: o.why for o in exp.unwritten}
    words = dict(dataset='take `Arrays`', arch='or it was changed after it was made', loss='Write it with `def`', metrics='Write it with `def`', optimizer='groups: {pattern', lr_scheduler='whose function no config can hold', callbacks='When')
    assert said.keys() == words.keys()
    for k,v in words.items(): assert v in said[k], (k, said[k])
    with pytest.raises(ConfigError) as e: exp.config.save('odd.yaml')
    assert all(f'`{k}` ' in str(e.value) for k in words) and not Path('odd.yaml').exists()
    assert exp.config.save('odd.yaml', partly=True).exists()
    exp.fit()
    record = exp.folder.read()
    assert record['status'] == 'finished' and len(record['unwritten']) == 7
    with pytest.raises(CheckpointError, match='object of a notebook'): load_trained('odd')
    with pytest.raises(RunError, match='cannot be repeated from its manifest'): replay('odd')
    with pytest.raises(RunError, match='from_objects'): Experiment.resume('odd', 'trainer.epochs=2')


def test_a_model_that_can_be_written_is_loaded_though_its_data_cannot(here):
    x,y = torch.randn(40, 4),torch.randint(0, 2, (40,))
    exp = Experiment.from_objects(MLP(4, 2), Tensors(x, y), dict(batch_size=8, validation_split=0.25), loss='cross_entropy', name='half', device='cpu', verbosity=0)
    exp.fit()
    trained = load_trained('half', device='cpu')
    assert torch.equal(trained.model(x), exp.model.eval()(x))
    with pytest.raises(ConfigError, match='does not say where its data comes from|objects of a notebook'): trained.evaluate('valid')


def test_a_loader_of_ours_is_described_and_one_beside_it_is_named(here):
    digits = Digits('digits')
    exp = Experiment.from_objects('MLP', loader=DataLoader(digits, 16, validation_split=0.1, seed=5), loss='cross_entropy', device='cpu')
    assert exp.config['data_loader'] == dict(type='DataLoader', args=dict(batch_size=16, validation_split=0.1, seed=5)) and exp.unwritten == []
    beside = Experiment.from_objects('MLP', loader=DataLoader(digits, 32), valid_loader=DataLoader(digits, 32), loss='cross_entropy', device='cpu')
    assert [o.section for o in beside.unwritten] == ['data_loader']


def test_weights_that_no_config_has_are_told_where_runs_are_compared_and_repeated(here):
    model = MLP(64, 10, (8,))
    Experiment.from_objects(model, DataLoader(Digits('digits'), 64, validation_split=0.2), loss='cross_entropy', device='cpu', name='by-hand', threads=1, verbosity=0).fit()
    Experiment('experiments/by-hand/config.yaml', name='again').fit()
    assert '`by-hand` began with weights that a model of a notebook had' in str(compare('by-hand', 'again'))
    with pytest.raises(RunError, match='a repetition would begin with others'): replay('by-hand')
    assert replay('again').same


def test_parts_of_a_module_bring_their_module_along(here, monkeypatch):
    (here/'own_nets.py').write_text('from torch import nn\nfrom deep_studio_nb.common.registry import MODELS\n@MODELS.register\nclass OwnNet(nn.Module):\n    def __init__(self, width:int=4):\n        super().__init__()\n        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, 10))\n    def forward(self, x): return self.layers(x)\n')
    monkeypatch.syspath_prepend(str(here))
    import own_nets
    exp = Experiment.from_objects(own_nets.OwnNet(6), Digits('digits'), dict(batch_size=64), loss='cross_entropy', device='cpu', verbosity=0, name='own')
    assert exp.config['imports'] == ['own_nets'] and exp.config['arch'] == dict(type='OwnNet', args=dict(width=6))
    exp.config.save('own.yaml')
    done = process(TRAIN, 'train', 'own.yaml', cwd=here)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('given,words', [(dict(), 'The data is missing'), (dict(dataset='Digits', loader=[(1,2)]), 'Leave one of them out'), (dict(dataset='Digits', epoch=3), 'trainer.epoch'), (dict(dataset='Digits', monitor='max val_acuracy'), 'val_acuracy')])
def test_mistakes_are_told_before_anything_is_trained(here, given, words):
    with pytest.raises(ConfigError, match=words): Experiment.from_objects('MLP', loss='cross_entropy', metrics=['accuracy'], device='cpu', **given)
    assert not Path('experiments').exists()
