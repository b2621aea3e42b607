"""Memory stays where it is: over 200 epochs of one run, and over ten runs in one process. Nothing here looks at the clock."""
import gc, multiprocessing as mp, os, sys, threading
from pathlib import Path
import pytest, torch
import training_kills
from training_kills import in_a_child
from training_toy import STEPS, trainer
from deep_studio_nb.training.events import When

pytestmark = pytest.mark.skipif(sys.platform!='linux', reason='/proc')
MIB = 2**20

def held():
    "What this process holds now: tensors and their bytes, objects that the collector knows, threads, open files, resident memory."
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    return dict(tensors=len(tensors), bytes=sum(o.numel()*o.element_size() for o in tensors), objects=len(gc.get_objects()), threads=threading.active_count(),
                files=len(os.listdir('/proc/self/fd')), memory=pages*os.sysconf('SC_PAGE_SIZE'))

def long_run(out, folder, loader):
    "200 epochs with history, metrics, validation, averaging, accumulation and checkpoints; what is held every 40 epochs."
    torch.set_num_threads(1)
    mp.set_start_method(None, force=True)      # workers are started as in a process of one's own
    seen = []
    look = When(after_epoch=lambda t: t.epoch%40==0 and seen.append(held()))
    plan = dict(loader=loader, epochs=200, callbacks=[{'type': 'EMA', 'args': {'decay': 0.9}}], accumulate=2, metrics=['accuracy', {'type': 'F1Score', 'args': {'task': 'multiclass', 'num_classes': 2}}], save_period=0)
    training_kills.build(plan, Path(folder), [look]).train()
    out.send(seen)

@pytest.mark.parametrize('loader', ['gathered', pytest.param('threads', marks=pytest.mark.slow), pytest.param('processes', marks=pytest.mark.slow)])
def test_two_hundred_epochs(tmp_path, loader):
    seen = in_a_child(long_run, tmp_path, loader)
    assert len(seen)==5
    first, last = seen[1], seen[-1]
    for k in ('tensors', 'bytes', 'threads', 'files'): assert last[k]==first[k], (k, seen)
    assert last['objects']-first['objects'] <= 3*120, seen          # a row of the history each
    assert last['memory']-first['memory'] < 3*MIB, seen

def ten_runs(out, folder):
    "Ten runs in one process, each with a trainer, a model and a folder of its own."
    torch.set_num_threads(1)
    seen = []
    for i in range(10):
        for kind in ('gathered', 'threads'):
            plan = dict(loader=kind, callbacks=[{'type': 'EMA', 'args': {'decay': 0.9}}])
            t = training_kills.build(plan, Path(folder)/f'{kind}-{i}')
            t.train()
            del t
        seen.append(held())
    out.send(seen)

def ten_experiments(out, folder):
    "Ten runs of a config in one process, with run folders, logs and pictures, as in a notebook."
    from deep_studio_nb.experiments.experiment import Experiment
    torch.set_num_threads(1)
    os.chdir(folder)
    config = dict(name='digits', dataset=dict(type='Digits', args=dict(data_dir='data/digits')), data_loader=dict(type='DataLoader', args=dict(batch_size=64, num_workers=2, start='threads')),
                  transforms=dict(train=[dict(type='RandomRotation', args=dict(degrees=10))]), arch=dict(type='MLP', args=dict(hidden=[32])), loss='cross_entropy', metrics=['accuracy'],
                  optimizer=dict(type='AdamW', args=dict(lr=0.01)), trainer=dict(epochs=2, threads=1, verbosity=0))
    seen = []
    for i in range(10):
        Experiment(config, device='cpu').fit()
        seen.append(held())
    out.send(seen)

@pytest.mark.parametrize('target', [ten_runs, pytest.param(ten_experiments, marks=pytest.mark.slow)])
def test_ten_runs_in_one_process(tmp_path, target):
    seen = in_a_child(target, tmp_path)
    first, last = seen[3], seen[-1]
    for k in ('tensors', 'bytes', 'threads', 'files'): assert last[k]<=first[k], (k, seen)
    assert last['objects']-first['objects'] < 600, seen
    assert last['memory']-first['memory'] < 12*MIB, seen

def same_trainer(out, folder):
    "One trainer that is stopped and goes on, forty times."
    torch.set_num_threads(1)
    t, seen = trainer('ours', folder=Path(folder)/'run', epochs=100, save_period=0, scheduler=None), []
    t.add(When(after_batch=lambda t: t.stop() if t.steps%(2*STEPS)==3 else None))
    while t.left:
        t.train()
        seen.append(held())
    out.send(seen)

@pytest.mark.slow
def test_one_trainer_stopped_again_and_again(tmp_path):
    seen = in_a_child(same_trainer, tmp_path)
    assert len(seen)>=40
    first, last = seen[10], seen[-2]
    for k in ('tensors', 'bytes', 'threads', 'files'): assert last[k]==first[k], (k, first, last)
    assert last['memory']-first['memory'] < 3*MIB
