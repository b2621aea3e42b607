"""Optimizers and schedules in whole trainings: stopped within a warm-up, with several groups, counted in steps of the optimizer, gone on with in a longer run."""
import copy, math
import pytest, torch
from torch import nn
from deep_studio_nb.common.errors import CheckpointError, ConfigError
from deep_studio_nb.training.optimizers import build_optimizer, group_rows
from deep_studio_nb.training.schedule_plot import lr_path
from training_toy import EPOCHS, STEPS, assert_same, stop_at

def spec(type, **args): return {'type': type, 'args': args}

SCHEDULES = [spec('CosineAnnealingLR', warmup_epochs=1.5), spec('StepLR', step_size=1, gamma=0.5, warmup_steps=4), spec('OneCycleLR', warmup_steps=5, warmup_from=0.3),
             spec('ReduceLROnPlateau', patience=0, warmup_epochs=1), spec('LambdaLR', lr_lambda='flat_then_fall', per='batch', warmup_steps=7),
             spec('SequentialLR', schedulers=['LinearLR', 'CosineAnnealingLR'], milestones=[9], per='batch'), spec('ChainedScheduler', schedulers=['ConstantLR', spec('ExponentialLR', gamma=0.9)]),
             spec('CyclicLR', base_lr=0.001, max_lr=0.02, step_size_up=4), spec('MultiStepLR', milestones=[2, 3]), spec('CosineAnnealingWarmRestarts', T_0=2), spec('PolynomialLR', per='batch')]
OPTIMIZERS = [spec('AdamW', lr=0.02, no_decay=True, groups={'4.*': {'lr_scale': 3.}}), spec('SGD', lr=0.05, momentum=0.9, layer_decay=0.7), spec('Muon', lr=0.01, no_decay=['norm', 'bias'], groups={'0.weight': {'muon': True}}),
              spec('RMSprop', lr=0.003, momentum=0.5), spec('Adagrad', lr=0.05)]

def deep():
    "A model with a hidden matrix."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 2))

def run(optimizer, scheduler, **kwargs):
    from deep_studio_nb.training.trainer import Trainer
    from training_toy import loaders
    return Trainer(deep(), *loaders(), **dict(loss='cross_entropy', optimizer=optimizer, scheduler=scheduler, epochs=EPOCHS, device='cpu', progress=False, monitor='min val_loss') | kwargs)

# --- exactly on ---

@pytest.mark.parametrize('i', range(len(SCHEDULES)))
def test_goes_on_within_and_behind_the_warm_up(i):
    optimizer, scheduler = OPTIMIZERS[i%2] if i%3 else OPTIMIZERS[0], SCHEDULES[i]
    if scheduler['type']=='CyclicLR': optimizer = OPTIMIZERS[1]
    optimizer = copy.deepcopy(optimizer)
    if 'groups' in optimizer['args']: optimizer['args']['groups'] = {'5.*': {'lr_scale': 3.}}
    straight = run(optimizer, scheduler)
    straight.train()
    cut = run(optimizer, scheduler)
    for at in (2, 4, STEPS, STEPS+3, 3*STEPS+1):
        cut.add(stop_at(at))
        cut.train()
        assert cut.stopped and cut.steps==at
        cut = run(optimizer, scheduler).load(cut.state_dict())
    cut.train()
    assert_same(straight, cut)

@pytest.mark.parametrize('optimizer', OPTIMIZERS[1:], ids=lambda o: o['type'])
def test_optimizers_go_on(optimizer):
    straight = run(optimizer, SCHEDULES[0])
    straight.train()
    cut = run(optimizer, SCHEDULES[0], callbacks=[stop_at(8)])
    cut.train()
    again = run(optimizer, SCHEDULES[0]).load(cut.state_dict())
    again.train()
    assert_same(straight, again)

# --- what a step is ---

@pytest.mark.parametrize('accumulate', [1, 2, 4])
def test_a_schedule_counts_steps_of_the_optimizer(accumulate):
    from deep_studio_nb.training.events import When
    seen, scheduler = [], spec('CosineAnnealingLR', per='batch', warmup_epochs=1)
    t = run(spec('SGD', lr=0.1), scheduler, accumulate=accumulate, callbacks=[When(before_batch=lambda t: seen.append((t.updates, t.optimizer.param_groups[0]['lr'])))])
    t.train()
    updates = math.ceil(STEPS/accumulate)
    path = lr_path(scheduler, 0.1, EPOCHS, updates)
    assert t.updates==updates*EPOCHS==len(path) and [path[i] for i,_ in seen]==[lr for _,lr in seen]

@pytest.mark.parametrize('scheduler', [spec('OneCycleLR', warmup_steps=5), spec('OneCycleLR', max_lr=0.1), spec('CosineAnnealingLR', warmup_epochs=1), spec('CyclicLR', base_lr=0.001, max_lr=0.1, step_size_up=4, cycle_momentum=False)], ids=str)
def test_groups_keep_their_ratios(scheduler):
    from deep_studio_nb.training.events import When
    ratios = []
    def note(t):
        lrs = [g['lr'] for g in t.optimizer.param_groups]
        ratios.append([o/lrs[-1] for o in lrs])
    t = run(spec('AdamW', lr=0.01, layer_decay=0.5), scheduler, callbacks=[When(before_batch=note)])
    t.train()
    assert len(ratios)==STEPS*EPOCHS and all(o==pytest.approx([0.25, 0.5, 1.]) for o in ratios)

# --- a longer run ---

@pytest.mark.parametrize('args,text', [({}, 'ends after 24 steps, but this run has 30'), ({'warmup_steps': 4}, 'ends after 20 steps, but this run has 26 after its warm-up'), ({'per': 'epoch'}, 'ends after 4 epochs, but this run has 5')])
def test_a_schedule_of_fixed_length_cannot_go_on_longer(args, text):
    t = run('SGD', spec('OneCycleLR', max_lr=0.1, **args))
    t.train()
    with pytest.raises(CheckpointError, match=text): run('SGD', spec('OneCycleLR', max_lr=0.1, **args), epochs=5).load(t.state_dict())
    run('SGD', spec('OneCycleLR', max_lr=0.1, **args)).load(t.state_dict())

def test_another_schedule_is_refused():
    t = run('SGD', SCHEDULES[5])
    with pytest.raises(CheckpointError, match=r'SequentialLR\(LinearLR, CosineAnnealingLR\)`, this run has `SequentialLR\(CosineAnnealingLR, LinearLR\)'):
        run('SGD', spec('SequentialLR', schedulers=['CosineAnnealingLR', 'LinearLR'], milestones=[9], per='batch')).load(t.state_dict())
    with pytest.raises(CheckpointError, match='this run has none'): run('SGD', None).load(t.state_dict())

def test_a_warm_up_needs_a_length():
    from deep_studio_nb.training.trainer import Trainer
    from training_toy import loaders
    class Stream:
        def __init__(self, loader): self.loader = loader
        def __iter__(self): return iter(self.loader)
    settings = dict(loss='cross_entropy', optimizer='SGD', epochs=2, device='cpu', progress=False)
    with pytest.raises(ConfigError, match='Give `warmup_steps`'): Trainer(deep(), Stream(loaders()[0]), scheduler=spec('StepLR', step_size=1, warmup_epochs=1), **settings)
    t = Trainer(deep(), Stream(loaders()[0]), scheduler=spec('StepLR', step_size=1, warmup_steps=STEPS), **settings)
    t.train()
    assert t.scheduler.warmed==STEPS and not t.scheduler.warming

# --- models of the toolkit ---

def test_layers_and_matrices_of_real_models():
    from deep_studio_nb.models.resnet import ResNet18
    from deep_studio_nb.models.cnn import SimpleCNN
    from deep_studio_nb.training.muon import hidden_matrices
    from deep_studio_nb.training.parameter_groups import layers_of
    assert list(layers_of(ResNet18()))==['conv1', *(f'layer{i}.{j}' for i in range(1, 5) for j in range(2)), 'fc']
    for net in (ResNet18(num_classes=10), SimpleCNN()):
        params = dict(net.named_parameters())
        assert sorted(sum(layers_of(net).values(), []))==sorted(params)
        hidden = hidden_matrices(net)
        assert hidden and all(params[o].ndim>1 for o in hidden) and not {list(params)[0], 'fc.weight'}&set(hidden)
        opt = build_optimizer(spec('AdamW', lr=0.001, weight_decay=0.05, no_decay=True, layer_decay=0.8), net)
        assert sum(o['parameters'] for o in group_rows(opt))==sum(p.numel() for p in params.values())
        assert all(g['weight_decay']==0 for g in opt.param_groups if all(p.ndim<2 for p in g['params']))
        assert all(g['weight_decay']==0.05 for g in opt.param_groups if any(p.ndim>1 for p in g['params']))
        net.train()
        torch.nn.functional.cross_entropy(net(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
        build_optimizer(spec('Muon', no_decay=True), net).step()

def test_sparse_gradients_go_with_the_optimizers_that_take_them():
    net = nn.Embedding(10, 3, sparse=True)
    for name in ('SparseAdam', 'SGD', 'Adagrad'):
        opt = build_optimizer(spec(name, lr=0.1), net)
        before = net.weight.detach().clone()
        net(torch.tensor([1, 2])).sum().backward()
        opt.step()
        opt.zero_grad()
        assert (net.weight!=before).any(1).tolist()==[i in (1, 2) for i in range(10)]
