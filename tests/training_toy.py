"""A small training in which everything is random: shuffled data, dropout, batch norm; run as a script it is the child that other tests stop and kill.

    python tests/training_toy.py FOLDER [what] [when]

what: `wait` (at step `when` print a line and wait for one), `die-half`, `die-written`, `die-linked` (be killed in the `when`-th checkpoint write:
half-way through, before it takes its name, before the second name), `run`. It goes on from FOLDER/last.pt if that is there.
"""
import os, signal, sys
from pathlib import Path
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from deep_studio_nb.training.events import Callback, When
from deep_studio_nb.training.trainer import Trainer

STEPS, EPOCHS = 6, 4       # of the whole run; the last batch of an epoch is short

def data():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(90, 4, generator=g)
    return x, (x[:, 0]*x[:, 1] > 0).long()

def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))

def loaders(kind='plain'):
    "Loaders of `STEPS` batches: torch's own, torch's with a generator, torch's with workers, the toolkit's, the toolkit's sample by sample, with worker processes, with threads."
    x, y = data()
    train, valid = TensorDataset(x[:66], y[:66]), TensorDataset(x[66:], y[66:])
    if kind.startswith('plain'):
        extra = {'plain': {}, 'plain generator': dict(generator=torch.Generator().manual_seed(5)), 'plain workers': dict(num_workers=2)}[kind]
        return DataLoader(train, 12, shuffle=True, **extra), DataLoader(valid, 12)
    from deep_studio_nb.data.loaders import BaseDataLoader
    from deep_studio_nb.data.tensors import Tensors
    ours = Tensors(x[:66], y[:66]) if kind=='ours' else train
    more = {'ours workers': dict(num_workers=2, start='fork'), 'ours threads': dict(num_workers=2, start='threads')}.get(kind, dict(num_workers=0))
    return BaseDataLoader(ours, 12, **more, seed=4), DataLoader(valid, 12)

def trainer(kind='plain', **kwargs):
    settings = dict(loss='cross_entropy', metrics=['accuracy'], optimizer={'type': 'AdamW', 'args': {'lr': 0.02}}, scheduler={'type': 'OneCycleLR', 'args': {'max_lr': 0.05}},
                    epochs=EPOCHS, device='cpu', progress=False)
    return Trainer(model(), *loaders(kind), **settings | kwargs)

def stop_at(step):
    "A callback that asks for a stop when the whole run has done `step` steps."
    return When(after_batch=lambda t: t.stop() if t.steps==step else None)

def weights(t): return {k: v.clone() for k,v in t.model.state_dict().items()}

def rows(t): return [{k: v for k,v in o.items() if k!='seconds'} for o in t.history]

def assert_same(a, b):
    "Two trainers ended with the same bits: weights, buffers, optimizer, schedule, history."
    for k,v in a.model.state_dict().items(): assert torch.equal(v, b.model.state_dict()[k]), k
    assert rows(a)==rows(b)
    one, two = a.state_dict(), b.state_dict()
    for i,part in one['optimizer']['state']['state'].items():
        for k,v in part.items(): assert torch.equal(torch.as_tensor(v), torch.as_tensor(two['optimizer']['state']['state'][i][k])), (i, k)
    assert one['scheduler']==two['scheduler'] and one['steps']==two['steps']

class Wait(Callback):
    "At a step, say so and wait for a line on stdin."
    def __init__(self, step): self.step = step
    def after_loss(self, trainer):
        if trainer.steps+1==self.step:
            print('waiting', flush=True)
            sys.stdin.readline()

def die(what, when):
    "Have the process killed in the `when`-th checkpoint write."
    def killer(fn, before):
        count = [0]
        def run(*args, **kwargs):
            count[0] += 1
            if count[0]==when:
                before(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            return fn(*args, **kwargs)
        return run
    def half(state, file):
        save(state, file)
        os.truncate(file, Path(file).stat().st_size//2)
    save = torch.save
    if what=='die-half': torch.save = killer(save, half)
    if what=='die-written': os.replace = killer(os.replace, lambda *_: None)
    if what=='die-linked': os.link = killer(os.link, lambda *_: None)

if __name__=='__main__':
    folder, what, when = Path(sys.argv[1]), (sys.argv+['run'])[2], int((sys.argv+['', '', '0'])[3] or 0)
    t = trainer(folder=folder, callbacks=[Wait(when)] if what=='wait' else [])
    if (folder/'last.pt').exists(): t.load(folder)
    if what.startswith('die'): die(what, when)
    print('ready', flush=True)
    t.train()
    print('stopped' if t.stopped else 'finished', t.steps, flush=True)
