"""Signals, kills and full disks: a step is never cut in two, a checkpoint is whole or the old one, and a run goes on to the same bits."""
import os, random, signal, subprocess, sys, threading
from pathlib import Path
import pytest, torch
from deep_studio_nb.common.errors import RunError
from deep_studio_nb.training.checkpoints import load_checkpoint, save_checkpoint
from training_toy import EPOCHS, STEPS, assert_same, stop_at, trainer

HERE = Path(__file__).parent
posix = pytest.mark.skipif(os.name!='posix', reason='signals of POSIX')

def child(folder, *args, **kwargs):
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get('PYTHONPATH', '')]), 'OMP_NUM_THREADS': '1'}
    return subprocess.Popen([sys.executable, str(HERE/'training_toy.py'), str(folder), *map(str, args)], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **kwargs)

def finish(folder):
    "Go on from `folder` in this process, to the end; compare with a run that was never stopped."
    t = trainer(folder=folder)
    if readable(folder): t.load(folder)
    t.train()
    whole = trainer()
    whole.train()
    assert_same(t, whole)
    return t

def readable(folder):
    "Every checkpoint of `folder` can be loaded; how many there are."
    return len([load_checkpoint(o) for o in folder.glob('*.pt') if not o.name.startswith('.')])

@posix
@pytest.mark.parametrize('sig', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_finish_and_saves(tmp_path, sig):
    step = STEPS+3
    p = child(tmp_path, 'wait', step)
    assert p.stdout.readline()=='ready\n' and p.stdout.readline()=='waiting\n'      # in the middle of a step
    p.send_signal(sig)
    out, err = p.communicate('go on\n', timeout=120)
    assert p.returncode==0 and out==f'stopped {step}\n', err
    assert f'Stopped in epoch 2 after step 3 of {STEPS}' in err and 'last.pt' in err and 'Traceback' not in err
    state = load_checkpoint(tmp_path/'last.pt')
    assert (state['epoch'], state['step'])==(1, 3)
    finish(tmp_path)

@posix
def test_a_second_signal_interrupts(tmp_path):
    p = child(tmp_path, 'wait', 8)
    assert p.stdout.readline()=='ready\n' and p.stdout.readline()=='waiting\n'
    p.send_signal(signal.SIGINT)
    p.send_signal(signal.SIGTERM)
    _, err = p.communicate(timeout=120)
    assert p.returncode!=0 and 'KeyboardInterrupt' in err
    assert load_checkpoint(tmp_path/'last.pt')['epoch']==1
    finish(tmp_path)

@posix
@pytest.mark.parametrize('what,when', [('die-half', 1), ('die-half', 3), ('die-written', 2), ('die-linked', 4)])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_old_ones_whole(tmp_path, what, when):
    p = child(tmp_path, what, when)
    p.communicate(timeout=120)
    assert p.returncode==-signal.SIGKILL
    n = readable(tmp_path)
    assert n or when==1
    t = finish(tmp_path)
    assert load_checkpoint(tmp_path/'best_model.pt')['best']==t.state_dict()['best']

@posix
@pytest.mark.parametrize('seed', range(3))
def test_a_kill_at_any_moment(tmp_path, seed):
    p = child(tmp_path)
    assert p.stdout.readline()=='ready\n'
    timer = threading.Timer(random.Random(seed).uniform(0, 0.3), p.kill)
    timer.start()
    p.communicate(timeout=120)
    timer.cancel()
    readable(tmp_path)
    finish(tmp_path)

def test_another_process_ends_with_the_same_bits(tmp_path):
    p = child(tmp_path)
    out, err = p.communicate(timeout=120)
    assert p.returncode==0 and out==f'ready\nfinished {STEPS*EPOCHS}\n', err
    finish(tmp_path)

def test_stop_from_another_thread(tmp_path):
    at, told = threading.Event(), threading.Event()
    def pause(t):
        if t.steps==3:
            at.set()
            assert told.wait(60)
    from deep_studio_nb.training.events import When
    t = trainer(folder=tmp_path, callbacks=[When(after_step=pause)])
    def ask():
        at.wait(60)
        t.stop()
        told.set()
    thread = threading.Thread(target=ask)
    thread.start()
    t.train()
    thread.join()
    assert t.stopped and t.steps==4
    finish(tmp_path)

def test_training_in_a_thread_leaves_signals_alone():
    before, t = signal.getsignal(signal.SIGINT), trainer(epochs=1)
    thread = threading.Thread(target=t.train)
    thread.start()
    thread.join()
    assert len(t.history)==1 and signal.getsignal(signal.SIGINT) is before

LIMITED = """
import resource, signal, sys, torch
from pathlib import Path
from deep_studio_nb.common.errors import RunError
from deep_studio_nb.training.checkpoints import load_checkpoint, save_checkpoint
path = Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
save_checkpoint(path, {'x': torch.ones(10)})
try: save_checkpoint(path, {'x': torch.ones(1_000_000)})
except RunError as e: print('refused:', e)
assert len(load_checkpoint(path)['x'])==10
print(sorted(o.name for o in path.parent.iterdir()))
"""
@posix
def test_a_full_disk_is_loud_and_leaves_the_old_file(tmp_path):
    p = subprocess.run([sys.executable, '-c', LIMITED, str(tmp_path/'last.pt')], capture_output=True, text=True, timeout=120, env={**os.environ, 'PYTHONPATH': str(HERE.parent)})
    assert p.returncode==0, p.stderr
    assert 'refused:' in p.stdout and 'last.pt` could not be written' in p.stdout and p.stdout.splitlines()[-1]=="['last.pt']"

def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path/'file').write_text('I am a file')
    with pytest.raises(RunError, match='could not be written'): save_checkpoint(tmp_path/'file'/'last.pt', {'x': torch.ones(1)})
    with pytest.raises(RunError, match='could not be written'): trainer(folder=tmp_path/'file'/'checkpoints').train()

def test_a_run_does_not_overwrite_another(tmp_path, caplog):
    trainer(folder=tmp_path/'한 run', epochs=1).train()
    before = {o.name: o.read_bytes() for o in (tmp_path/'한 run').iterdir()}
    t = trainer(folder=tmp_path/'한 run', epochs=1, seed=5)
    t.train()
    assert t.folder==tmp_path/'한 run-2' and (t.folder/'last.pt').exists()
    assert {o.name: o.read_bytes() for o in (tmp_path/'한 run').iterdir()}==before

def test_handlers_are_put_back_when_a_callback_fails():
    def fail(t): raise ZeroDivisionError
    from deep_studio_nb.training.events import When
    before, state = signal.getsignal(signal.SIGINT), torch.get_rng_state()
    with pytest.raises(ZeroDivisionError): trainer(callbacks=[When(after_step=fail)]).train()
    assert signal.getsignal(signal.SIGINT) is before
    assert trainer(callbacks=[stop_at(2)]).train() is not None
    assert state.shape==torch.get_rng_state().shape
