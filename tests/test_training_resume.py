"""A run that was stopped anywhere and goes on ends with the same bits as one that was not."""
import random
import numpy as np
import pytest, torch
from torch import nn
from deep_studio_nb.common.errors import CheckpointError
from deep_studio_nb.training.base_trainer import BaseTrainer
from deep_studio_nb.training.checkpoints import load_checkpoint
from training_toy import EPOCHS, STEPS, assert_same, loaders, rows, stop_at, trainer, weights

def run(t):
    t.train()
    return t

@pytest.mark.parametrize('kind', ['plain', 'plain generator', 'ours', 'ours each'])
@pytest.mark.parametrize('step', [1, 5, STEPS, STEPS+1, 3*STEPS-1])
def test_from_any_step(tmp_path, kind, step):
    whole = run(trainer(kind))
    first = run(trainer(kind, folder=tmp_path, callbacks=[stop_at(step)]))
    assert first.stopped and first.steps==step
    torch.rand(7), np.random.rand(3), random.random()
    second = run(trainer(kind, folder=tmp_path).load(tmp_path))
    assert not second.stopped
    assert_same(second, whole)
    assert_same(run(first), whole)                     # the same trainer, trained on

@pytest.mark.parametrize('kind', ['plain workers', 'ours workers'])
def test_with_workers(tmp_path, kind):
    whole = run(trainer(kind))
    run(trainer(kind, folder=tmp_path, callbacks=[stop_at(STEPS+2)]))
    assert_same(run(trainer(kind, folder=tmp_path).load(tmp_path)), whole)

PARTS = [('SGD', {'lr': 0.1, 'momentum': 0.9}, None, {}), ('AdamW', {'lr': 0.01}, 'StepLR', {'step_size': 2}), ('Adam', {'lr': 0.01, 'amsgrad': True}, 'CosineAnnealingLR', {}),
         ('RMSprop', {'lr': 0.01}, 'ReduceLROnPlateau', {'patience': 0}), ('Adagrad', {'lr': 0.05}, 'MultiStepLR', {'milestones': [1, 3]}), ('NAdam', {'lr': 0.01}, 'ExponentialLR', {'gamma': 0.7}),
         ('SGD', {'lr': 0.1}, 'CyclicLR', {'base_lr': 0.01, 'max_lr': 0.1, 'step_size_up': 4})]
@pytest.mark.parametrize('optimizer,args,scheduler,sargs', PARTS, ids=[f'{a}-{c}' for a,_,c,_ in PARTS])
def test_optimizers_and_schedules(tmp_path, optimizer, args, scheduler, sargs):
    parts = dict(optimizer={'type': optimizer, 'args': args}, scheduler=scheduler and {'type': scheduler, 'args': sargs})
    whole = run(trainer(**parts))
    run(trainer(folder=tmp_path, callbacks=[stop_at(STEPS+3)], **parts))
    assert_same(run(trainer(folder=tmp_path, **parts).load(tmp_path)), whole)

@pytest.mark.parametrize('name', ['best_model.pt', 'epoch_1.pt', 'epoch_3.pt'])
def test_from_every_file(tmp_path, name):
    whole = run(trainer(folder=tmp_path))
    before = {o.name: load_checkpoint(o) for o in tmp_path.glob('*.pt')}
    again = run(trainer(folder=tmp_path).load(tmp_path/name))
    assert_same(again, whole)
    for k,v in before.items():                         # the later files were written once more, the same
        now = load_checkpoint(tmp_path/k)
        assert now['epoch']==v['epoch'] and now['best']==v['best']
        assert all(torch.equal(a, b) for a,b in zip(now['model'].values(), v['model'].values()))

def test_best_and_last_have_the_same_content(tmp_path):
    run(trainer(folder=tmp_path, epochs=1))
    a, b = load_checkpoint(tmp_path/'best_model.pt'), load_checkpoint(tmp_path/'last.pt')
    assert a.keys()==b.keys() and a['optimizer'] is not None and a['scheduler'] is not None and a['history']==b['history']

class Scripted(BaseTrainer):
    "Take results from a list."
    def __init__(self, losses, **kwargs):
        super().__init__(nn.Linear(1, 1), [1], epochs=len(losses), progress=False, device='cpu', **kwargs)
        self.losses = losses
    def _train_epoch(self, epoch):
        if epoch==self.halt: self.stop()
        return {'loss': self.losses[epoch-1]}
    halt = None

LOSSES = [0.9, 0.5, 0.7, 0.5, 0.6, 0.6, 0.1]
@pytest.mark.parametrize('halt', [1, 2, 3, 4])
@pytest.mark.parametrize('patience,last', [(1, 3), (2, 4), (3, 5), (4, 6), (5, 7)])
def test_early_stop_after_exactly_n_epochs_also_across_a_resume(tmp_path, halt, patience, last):
    first = Scripted(LOSSES, early_stop=patience, folder=tmp_path)
    first.halt = halt
    first.train()
    second = Scripted(LOSSES, early_stop=patience, folder=tmp_path).load(tmp_path)
    assert len(second.train())==last
    assert second.history['loss']==LOSSES[:last]
    assert load_checkpoint(tmp_path/'best_model.pt')['epoch']==(7 if last==7 else 2)      # a tie at epoch 4 is no improvement
    assert len(Scripted(LOSSES, early_stop=patience, folder=tmp_path).load(tmp_path).train())==last      # stopped early stays stopped

def test_the_best_between_two_periodic_files_is_kept(tmp_path):
    t = Scripted([0.9, 0.2, 0.8, 0.7, 0.3], save_period=2, folder=tmp_path)
    t.train()
    assert sorted(o.name for o in tmp_path.iterdir())==['best_model.pt', 'epoch_2.pt', 'epoch_4.pt', 'last.pt']
    t = Scripted([0.9, 0.8, 0.2, 0.7, 0.3], save_period=2, folder=tmp_path/'b')
    t.train()
    assert load_checkpoint(tmp_path/'b'/'best_model.pt')['epoch']==3 and load_checkpoint(tmp_path/'b'/'best_model.pt')['best']=={'epoch': 3, 'value': 0.2}

@pytest.mark.parametrize('losses,best', [([float('nan')]*3, None), ([float('nan'), 0.5, float('nan')], 2), ([0.5, 0.5, 0.5], 1), ([float('inf'), float('-inf'), 0.3], 3)])
def test_ties_and_nan_are_never_best(tmp_path, losses, best):
    Scripted(losses, folder=tmp_path).train()
    file = tmp_path/'best_model.pt'
    assert (load_checkpoint(file)['epoch'] if file.exists() else None)==best

def test_more_epochs_after_the_end(tmp_path):
    parts = dict(scheduler={'type': 'StepLR', 'args': {'step_size': 2}}, folder=tmp_path)
    run(trainer(epochs=2, **parts))
    longer = trainer(epochs=4, **parts).load(tmp_path)
    assert longer.left==2
    assert_same(run(longer), run(trainer(epochs=4, **parts | {'folder': None})))

def test_random_numbers_of_the_user_are_untouched():
    t = trainer()
    def draws(): return torch.rand(4).tolist(), np.random.rand(4).tolist(), np.random.randn(), random.random()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = draws(), draws()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    first = draws()
    t.train()
    assert (first, draws())==expected

def test_the_order_of_batches_goes_on_by_index(tmp_path):
    "The toolkit's loader is not asked for batches that were done."
    asked = []
    def watch(t):
        gather = t.train_loader.dataset.gather
        t.train_loader.dataset.gather = lambda idx: asked.append(len(idx)) or gather(idx)
        return t
    run(trainer('ours', folder=tmp_path, callbacks=[stop_at(4)]))
    run(watch(trainer('ours', folder=tmp_path, epochs=1, scheduler=None).load({**load_checkpoint(tmp_path/'last.pt'), 'scheduler': None})))
    assert asked==[12, 6]

def test_a_place_within_an_epoch_needs_the_same_batches(tmp_path):
    run(trainer(folder=tmp_path, callbacks=[stop_at(2)]))
    t = trainer(folder=tmp_path)
    t.train_loader = [1]*9
    with pytest.raises(CheckpointError, match='step 2 of 6 in an epoch, but the train loader has 9'): t.load(tmp_path)

def test_stopping_twice_and_validating_in_between(tmp_path):
    whole, t = run(trainer()), trainer()
    for step in (2, 3, STEPS, STEPS+4):
        t.callbacks = [stop_at(step)]
        t.train()
        assert t.stopped and t.steps==step
        from deep_studio_nb.training.trainer import validate
        before = weights(t)
        validate(t.model, loaders()[1], 'cross_entropy')
        assert all(torch.equal(v, before[k]) for k,v in weights(t).items())
    t.callbacks = []
    assert_same(run(t), whole)
    assert len(rows(t))==EPOCHS
