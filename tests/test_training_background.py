"""Training in the background gives the bits of training in the foreground, whatever the notebook does meanwhile."""
import os, random, subprocess, sys, threading
from contextlib import contextmanager
from pathlib import Path
import numpy as np
import pytest, torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from deep_studio_nb.common.errors import RunError
from deep_studio_nb.common.randomness import rng_state, seed_all, set_rng_state
from deep_studio_nb.training.averaging import EMA
from deep_studio_nb.training.checkpoints import load_checkpoint
from deep_studio_nb.training.events import When
from deep_studio_nb.training.mixing import Mixup
from deep_studio_nb.training.trainer import Trainer, validate
from training_toy import EPOCHS, STEPS, assert_same, rows, stop_at, trainer

KINDS = ['plain', 'plain generator', 'plain workers', 'ours', 'ours samples', 'ours workers']

@contextmanager
def drawing():
    "Draw from every global generator, and seed them, in another thread as long as the block runs."
    done = threading.Event()
    def draw():
        while not done.wait(0.001):
            torch.rand(3), np.random.rand(), random.random(), random.shuffle([1, 2, 3]), torch.randperm(4)
            torch.default_generator.manual_seed(0), np.random.seed(0), random.seed(0)
    thread = threading.Thread(target=draw)
    thread.start()
    try: yield
    finally:
        done.set()
        thread.join()

@pytest.fixture(autouse=True)
def same_numbers_after():
    kept = rng_state()
    yield
    set_rng_state(kept)

def whole(kind='plain', **kwargs):
    t = trainer(kind, **kwargs)
    t.train()
    return t

@pytest.mark.parametrize('kind', KINDS)
def test_the_background_gives_the_same_bits_while_others_draw(kind):
    want, t = whole(kind), trainer(kind)
    with drawing(): history = t.train(background=True).wait()
    assert history is t.history
    assert_same(t, want)

@pytest.mark.parametrize('step', [1, STEPS-1, STEPS, 2*STEPS+3])
@pytest.mark.parametrize('then', ['background', 'foreground', 'fresh'])
def test_stopped_and_gone_on(tmp_path, step, then):
    want = whole()
    t = trainer(folder=tmp_path, callbacks=[stop_at(step)])
    with drawing(): t.train(background=True).wait()
    assert t.stopped and t.steps==step
    if then=='fresh': t = trainer(folder=tmp_path, callbacks=[stop_at(step)]).load(tmp_path)
    if then=='foreground': t.train()
    else:
        with drawing(): t.train(background=True).wait()
    assert not t.stopped
    assert_same(t, want)

def at(step, what):
    "A callback that calls `what` in the middle of step `step`, in the training's thread."
    return When(after_loss=lambda t: what() if t.steps+1==step else None)

def test_stop_from_a_cell_saves_and_goes_on(tmp_path):
    reached = threading.Event()
    t = trainer(folder=tmp_path, epochs=10**6, scheduler=None, save_period=0, callbacks=[at(10, reached.set)])
    run = t.train(background=True)
    assert reached.wait(60)
    run.stop()
    assert (run.status, t.stopped, run.alive)==('stopped', True, False)
    steps, state = t.steps, load_checkpoint(tmp_path/'last.pt')
    assert state['steps']==steps>=9
    want = trainer(epochs=10**6, scheduler=None, callbacks=[stop_at(steps)])
    want.train()
    assert_same(t, want)
    t.epochs = want.epochs = len(t.history)+2
    t.train(background=True).wait()
    want.train()
    assert_same(t, want)

def test_pauses_and_validation_in_a_cell_change_nothing():
    want, reached = whole(), threading.Event()
    t = trainer(callbacks=[at(3, reached.set)])
    run = t.train(background=True)
    reached.wait(60)
    seen = []
    for _ in range(5):
        seen.append(validate(t.model, t.valid_loader, 'cross_entropy', ['accuracy'])['loss'])   # in evaluation mode, while it trains
        run.pause()
        steps, weights = t.steps, {k: v.clone() for k,v in t.model.state_dict().items()}
        assert run.status in ('paused', 'finished') and t.model.training
        t.model(torch.randn(2, 4)) if not run.alive else None
        assert t.steps==steps and all(torch.equal(v, weights[k]) for k,v in t.model.state_dict().items())
        run.resume()
    run.wait()
    assert_same(t, want)
    assert all(np.isfinite(seen))

def test_a_pause_rests_until_it_is_resumed_or_stopped():
    reached = threading.Event()
    t = trainer(epochs=10**6, scheduler=None, callbacks=[at(3, reached.set)])
    run = t.train(background=True)
    reached.wait(60)
    assert run.pause() is run and run.status=='paused'
    steps = t.steps
    assert run.wait(0.05) is None and t.steps==steps
    with run.paused(): assert t.steps==steps
    assert run.status=='paused' and 'paused' in repr(run)
    assert run.resume() is run and run.status=='running'
    with run.paused(): assert t.steps>=steps
    run.pause()
    assert run.stop() is t.history and run.status=='stopped'

def test_a_second_training_is_refused_in_words():
    reached = threading.Event()
    t = trainer(epochs=10**6, scheduler=None, callbacks=[at(3, reached.set)])
    run = t.train(background=True)
    try:
        reached.wait(60)
        for again in (t.train, lambda: t.train(background=True), lambda: t.load({})):
            with pytest.raises(RunError, match=r'in the background already: Running\(running, epoch .*\.stop\(\)'): again()
        other, want = trainer(), whole()
        other.train()                                    # another one may train beside it
        assert_same(other, want)
    finally: run.stop()
    assert t.train(background=True).stop() is t.history

def test_two_at_once():
    want, a, b = whole(), trainer(), trainer('ours')
    runs = [a.train(background=True), b.train(background=True)]
    with drawing():
        for o in runs: o.wait()
    assert_same(a, want)
    assert_same(b, whole('ours'))

def fail(): raise ZeroDivisionError('no batch today')

def test_errors_come_back_and_the_run_can_go_on(caplog, capsys):
    t = trainer(callbacks=[at(9, fail)], progress=True)
    run = t.train(background=True)
    with pytest.raises(ZeroDivisionError, match='no batch today'): run.wait()
    with pytest.raises(ZeroDivisionError): run.wait()
    assert run.status=='failed' and 'ZeroDivisionError: no batch today' in repr(run)
    assert 'failed: ZeroDivisionError: no batch today' in capsys.readouterr().out and not caplog.text      # said once
    t.callbacks = []
    t.train(background=True).wait()
    assert len(t.history)==EPOCHS
    with pytest.raises(ZeroDivisionError): trainer(callbacks=[at(9, fail)]).train(background=True).wait()
    assert 'failed: ZeroDivisionError: no batch today' in caplog.text

def test_what_cannot_begin_fails_in_the_cell():
    t = trainer()
    t.train_loader = []
    with pytest.raises(ValueError, match='`train_loader` has no batches'): t.train(background=True)
    assert t.apart is None

def test_a_callback_that_waits_for_its_own_training_is_told():
    t = trainer(callbacks=[When(after_batch=lambda t: t.apart.stop())])
    with pytest.raises(RunError, match='cannot wait for itself'): t.train(background=True).wait()

def test_threads_and_random_numbers_are_those_of_the_caller():
    kept, seen = torch.get_num_threads(), []
    try:
        torch.set_num_threads(kept+1)
        before = rng_state()
        trainer(epochs=1, callbacks=[When(after_batch=lambda t: seen.append(torch.get_num_threads()))]).train(background=True).wait()
    finally: torch.set_num_threads(kept)
    assert set(seen)=={kept+1}
    fresh = trainer(epochs=1)
    set_rng_state(before)
    fresh.train(background=True).wait()
    for k,v in rng_state().items(): assert torch.equal(v, before[k]) if k=='torch' else v==before[k]

class Noisy(Dataset):
    "Samples that draw from every global generator, as many people's do."
    def __len__(self): return 24
    def __getitem__(self, i): return torch.rand(4)+np.random.rand()+random.gauss(0, 1)+np.random.default_rng(0).random(), i%2

class Checkpointed(nn.Module):
    "Runs its first part again in the backward pass, with the same dropout."
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.4)), nn.Linear(16, 2)
    def forward(self, x): return self.last(torch.utils.checkpoint.checkpoint(self.first, x, use_reentrant=False))

class Sequence(nn.Module):
    "Dropout within torch's own LSTM and transformer."
    def __init__(self):
        super().__init__()
        self.up, self.lstm, self.attend, self.last = nn.Linear(1, 8), nn.LSTM(8, 8, 2, dropout=0.3, batch_first=True), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 2)
    def forward(self, x): return self.last(self.attend(self.lstm(self.up(x[..., None]))[0])[:, -1])

@pytest.mark.parametrize('make', [Checkpointed, Sequence, lambda: nn.Sequential(nn.Linear(4, 8), nn.AlphaDropout(0.3), nn.RReLU(), nn.Linear(8, 2))], ids=['checkpointed', 'sequence', 'plain'])
@pytest.mark.parametrize('read', ['sample by sample', 'seeded', 'workers'])
def test_samples_and_models_that_draw_in_every_way(make, read):
    from deep_studio_nb.data.loaders import BaseDataLoader
    def build():
        seed_all(5)
        loader = BaseDataLoader(Noisy(), 5, seed=4) if read=='seeded' else DataLoader(Noisy(), 5, shuffle=True, num_workers=2*(read=='workers'))
        return Trainer(make(), loader, DataLoader(Noisy(), 5), loss='cross_entropy', epochs=2, device='cpu', progress=False)
    want, t = build(), build()
    want.train()
    with drawing(): t.train(background=True).wait()
    assert_same(t, want)

CHILD = """
import sys, torch
from training_toy import trainer
t = trainer(folder=sys.argv[1], epochs=10**6, scheduler=None, save_period=0)
run = t.train(background=True)
while len(t.history)<2: run.wait(0.01)
{}
"""
def child(folder, last, **kwargs):
    here = Path(__file__).parent
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(here.parent), str(here)]), 'OMP_NUM_THREADS': '1'}
    return subprocess.Popen([sys.executable, '-c', CHILD.format(last), str(folder)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)

def goes_on(folder, add=2):
    "Go on from `folder` for `add` epochs, and compare with a training in one go."
    t = trainer(folder=folder, epochs=10**6, scheduler=None, save_period=0).load(folder)
    t.epochs = len(t.history)+add
    t.train()
    want = trainer(epochs=t.epochs, scheduler=None)
    want.train()
    assert_same(t, want)

def test_the_end_of_the_process_stops_and_saves(tmp_path):
    p = child(tmp_path, "print('end of the script', flush=True)")
    out, err = p.communicate(timeout=120)
    assert p.returncode==0 and out=='end of the script\n' and 'Stopped ' in err and 'Traceback' not in err, err
    goes_on(tmp_path)

@pytest.mark.skipif(os.name!='posix', reason='signals of POSIX')
def test_interrupting_the_wait_leaves_the_training_at_work(tmp_path):
    p = child(tmp_path, """
import os, signal, threading
threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try: run.wait()
except KeyboardInterrupt: print(run.status, flush=True)
n = t.steps
while t.steps<n+10: run.wait(0.01)
run.stop()
print(run.status, flush=True)
""")
    out, err = p.communicate(timeout=120)
    assert p.returncode==0 and out.split()==['running', 'stopped'] and 'Only the waiting has ended' in err, err
    goes_on(tmp_path)

@pytest.mark.skipif(os.name!='posix', reason='signals of POSIX')
def test_a_kill_in_the_background(tmp_path):
    p = child(tmp_path, "print('ready', flush=True)\nrun.wait()")
    assert p.stdout.readline()=='ready\n'
    p.kill()
    p.communicate(timeout=60)
    goes_on(tmp_path)

def test_rows_come_as_they_are_made():
    reached, go = threading.Event(), threading.Event()
    def hold(t):
        if t.epoch==2: reached.set(), go.wait(60)
    t = trainer(callbacks=[When(before_validate=hold)])
    run = t.train(background=True)
    reached.wait(60)
    assert len(run.history)==1 and run.status=='running' and 'epoch 2 of 4' in repr(run)
    go.set()
    assert rows(t)[0]['epoch']==1 and len(run.wait())==EPOCHS

@pytest.mark.parametrize('more', [dict(accumulate=4, clip_norm=0.5, callbacks=[EMA.__name__]), dict(precision='bf16', callbacks=[Mixup.__name__]), dict(scheduler={'type': 'ReduceLROnPlateau'}, optimizer={'type': 'SGD', 'args': {'lr': 0.1, 'momentum': 0.9}})],
                         ids=['accumulate', 'bf16', 'plateau'])
def test_techniques_in_the_background(tmp_path, more):
    want = trainer(**more)
    want.train()
    cut = dict(more, callbacks=[*more.get('callbacks', ()), stop_at(STEPS+2)])
    t = trainer(folder=tmp_path, **cut)
    with drawing():
        t.train(background=True).wait()
        assert t.stopped
        t.train(background=True).wait()
    assert_same(t, want)

def test_a_model_is_free_after_its_training():
    import gc, weakref
    t = trainer()
    t.train(background=True).wait()
    gone = weakref.ref(t.model)
    del t
    for _ in range(3): gc.collect()
    assert gone() is None
