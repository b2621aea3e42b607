"""What happens when a checkpoint cannot be written: the one before is whole, the failure is loud, and the run goes on or stops as configured."""
import ctypes, errno, logging, os, shutil, sys
from pathlib import Path
import pytest, torch
from deep_studio_nb.common.errors import RunError
from deep_studio_nb.training.checkpoints import load_checkpoint
from deep_studio_nb.training.events import When
from training_kills import differences, in_a_child
from training_toy import EPOCHS, STEPS, assert_same, trainer

SAVE = torch.save

def full_disk(when):
    "`torch.save`, but while `when()` holds it writes a part and then finds the disk full."
    def save(state, file):
        SAVE(state, file)
        if not when(): return
        os.truncate(file, 100)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return save

def whole(folder):
    "The epochs of the checkpoints in a folder, all of which can be read."
    return {o.name: load_checkpoint(o)['epoch'] for o in sorted(Path(folder).glob('*.pt'))}

def test_stop_then_go_on_in_the_same_process(tmp_path, monkeypatch):
    t, full = trainer(folder=tmp_path/'run', save_period=0), [False]
    monkeypatch.setattr(torch, 'save', full_disk(lambda: full[0]))
    t.add(When(before_epoch=lambda t: full.__setitem__(0, t.epoch==3)))
    with pytest.raises(RunError, match='disk, or your share of it, is full.*mend the cause, then call `train\\(\\)` again.*on_save_error: continue'): t.train()
    assert len(t.history)==3 and max(whole(tmp_path/'run').values())==2 and not [o for o in (tmp_path/'run').iterdir() if o.name.startswith('.')]
    full[0] = False
    t.train()
    other = trainer()
    other.train()
    assert_same(t, other)
    assert whole(tmp_path/'run')=={'best_model.pt': t.history.best()['epoch'], 'last.pt': EPOCHS}

def test_stop_within_an_epoch_keeps_the_place(tmp_path, monkeypatch):
    full = [False]
    monkeypatch.setattr(torch, 'save', full_disk(lambda: full[0]))
    t = trainer(folder=tmp_path/'run', callbacks=[{'type': 'SaveSteps', 'args': {'every': 4}}, When(before_batch=lambda t: full.__setitem__(0, t.steps+1==STEPS+2))])
    with pytest.raises(RunError, match='The run stops here'): t.train()
    assert (len(t.history), t.step)==(1, 2)
    torch.rand(5)                                        # its user goes on living
    full[0] = False
    t.train()
    other = trainer()
    other.train()
    assert_same(t, other)

def test_continue_is_loud_and_makes_up_for_it(tmp_path, monkeypatch, caplog):
    full, t = [False], trainer(folder=tmp_path/'run', on_save_error='continue', save_period=1)
    monkeypatch.setattr(torch, 'save', full_disk(lambda: full[0]))
    t.add(When(before_epoch=lambda t: full.__setitem__(0, t.epoch in (2, 3))))
    with caplog.at_level(logging.WARNING): t.train()
    errors = [o.getMessage() for o in caplog.records if o.levelno>=logging.ERROR]
    assert len(errors)==2 and all('full' in o and 'the run goes on' in o for o in errors) and 'epoch_2.pt' in errors[0]
    assert any('Saving works again' in o.getMessage() for o in caplog.records)
    other = trainer(folder=tmp_path/'other')
    other.train()
    assert_same(t, other)
    assert whole(tmp_path/'run')=={k: v for k,v in whole(tmp_path/'other').items() if k not in ('epoch_2.pt', 'epoch_3.pt')}
    for name in whole(tmp_path/'run'): assert differences(load_checkpoint(tmp_path/'run'/name), load_checkpoint(tmp_path/'other'/name), name)==[]

def test_full_until_the_end(tmp_path, monkeypatch, caplog):
    t = trainer(folder=tmp_path/'run', on_save_error='continue')
    monkeypatch.setattr(torch, 'save', full_disk(lambda: len(t.history)>=2))
    with caplog.at_level(logging.ERROR): t.train()
    assert len(t.history)==EPOCHS and not t.stopped
    assert sum('could not be written' in o.getMessage() for o in caplog.records)==EPOCHS-1+1      # once an epoch, and once at the end
    assert max(whole(tmp_path/'run').values())==1
    other = trainer()
    other.train()
    assert_same(t, other)
    for k,v in t.model.state_dict().items(): assert torch.equal(v, other.model.state_dict()[k]), k      # the best weights, from memory

@pytest.mark.parametrize('how', ['stop', 'continue'])
def test_the_folder_is_gone(tmp_path, caplog, how):
    t = trainer(folder=tmp_path/'run', on_save_error=how)
    t.add(When(before_epoch=lambda t: shutil.rmtree(tmp_path/'run') if t.epoch==3 else None))
    if how=='stop':
        with pytest.raises(RunError, match='is gone, with the checkpoints that were in it'): t.train()
        assert len(t.history)==3
    else:
        with caplog.at_level(logging.ERROR): t.train()
        assert len(t.history)==EPOCHS and 'is gone' in caplog.text
    assert not (tmp_path/'run').exists()                 # nothing is made anew in the place of a disk that was taken out
    (tmp_path/'run').mkdir()
    t.train()
    assert whole(tmp_path/'run')['last.pt']==EPOCHS

def obey_permissions():
    "Take from root what lets it write where it may not."
    if os.getuid()!=0: return
    header, sets = (ctypes.c_uint32*2)(0x20080522, 0), (ctypes.c_uint32*6)()      # effective, permitted, inheritable; twice
    libc = ctypes.CDLL(None)
    assert libc.capget(header, sets)==0
    sets[0] &= ~0b110                                                             # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(header, sets)==0

def without_permission(out, folder):
    "Train as a user who may no longer write into the folder after two epochs."
    torch.set_num_threads(1)
    folder = Path(folder)
    obey_permissions()
    t = trainer(folder=folder, save_period=0)
    t.add(When(before_epoch=lambda t: os.chmod(folder, 0o500) if t.epoch==3 else None))
    try: t.train()
    except RunError as e: said = str(e)
    os.chmod(folder, 0o700)
    state = load_checkpoint(folder/'last.pt')['epoch']
    t.train()
    out.send((said, state, t.state_dict()['steps'], load_checkpoint(folder/'last.pt')['epoch']))

@pytest.mark.skipif(sys.platform!='linux', reason='root must be held back')
def test_permission_is_lost(tmp_path):
    said, before, steps, after = in_a_child(without_permission, tmp_path/'run')
    assert 'you may not write in' in said and 'The run stops here' in said
    assert (before, steps, after)==(2, STEPS*EPOCHS, EPOCHS)

def on_a_small_disk(out, folder, how):
    "Train on a disk of 300 kB of its own, on which others leave no room after the first epoch, and some again later."
    torch.set_num_threads(1)
    libc = ctypes.CDLL(None, use_errno=True)
    os.makedirs(folder)
    if libc.unshare(0x00020000) or libc.mount(None, b'/', None, 0x4000 | 0x40000, None): return out.send('no')       # a mount namespace of one's own, seen by nobody else
    if libc.mount(b'none', str(folder).encode(), b'tmpfs', 0, b'size=300k'): return out.send('no')
    filler = Path(folder)/'of others'
    def crowd(t):
        if t.epoch==2: filler.write_bytes(b'x'*(shutil.disk_usage(folder).free-4096))
        if t.epoch==4: filler.unlink()
    t = trainer(folder=Path(folder)/'run', save_period=0, on_save_error=how, callbacks=[When(before_epoch=crowd)])
    said = ''
    try: t.train()
    except RunError as e: said = str(e)
    out.send((said, len(t.history), whole(Path(folder)/'run'), t.history.best()['epoch'], [o.name for o in (Path(folder)/'run').iterdir() if o.name.startswith('.')]))

@pytest.mark.skipif(sys.platform!='linux', reason='namespaces')
@pytest.mark.parametrize('how', ['stop', 'continue'])
def test_a_disk_that_is_really_full(tmp_path, how):
    res = in_a_child(on_a_small_disk, tmp_path/'disk', how)
    if res=='no': pytest.skip('may not mount here')
    said, epochs, files, best, drafts = res
    assert drafts==[]
    if how=='stop': assert ('full' in said or 'could not be written' in said) and epochs==2 and set(files.values())=={1}
    else: assert said=='' and epochs==EPOCHS and files=={'best_model.pt': best, 'last.pt': EPOCHS}

def test_an_experiment_on_a_full_disk(tmp_path, monkeypatch):
    "Tables, pictures and the manifest obey as well; the first error is the one that is raised."
    from deep_studio_nb.common import files
    from deep_studio_nb.experiments.experiment import Experiment
    monkeypatch.chdir(tmp_path)
    config = dict(name='digits', dataset=dict(type='Digits', args=dict(data_dir='data/digits')), data_loader=dict(type='DataLoader', args=dict(batch_size=128)), arch=dict(type='MLP', args=dict(hidden=[8])),
                  loss='cross_entropy', optimizer='AdamW', trainer=dict(epochs=3, threads=1), device='cpu')
    real, full = os.replace, [False]
    def replace(a, b):
        if full[0]: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(a, b)
    monkeypatch.setattr(files.os, 'replace', replace)
    ends = {}
    for how in ('stop', 'continue'):
        exp = Experiment(config, f'trainer.on_save_error={how}', name=how)
        exp.trainer.add(When(before_epoch=lambda t: full.__setitem__(0, t.epoch==2 and how not in ends)))
        try: exp.fit()
        except RunError as e: ends[how] = str(e)
        full[0] = False
        assert load_checkpoint(exp.folder.path/'checkpoints'/'last.pt')['epoch']==(1 if how=='stop' else 3)
        if how=='stop': exp.fit()                         # there is room again
        assert exp.folder.read()['status']=='finished' and exp.folder.read()['epochs']==3 and len((exp.folder.path/'metrics.csv').read_text().splitlines())==4
    assert list(ends)==['stop'] and 'full' in ends['stop']

def test_a_batch_that_never_came_is_not_trained_twice(tmp_path):
    "All samples of the second batch are unreadable; a stop behind it goes on with the right batch."
    from deep_studio_nb.data.samples import Unreadable
    from deep_studio_nb.data.loaders import BaseDataLoader
    from deep_studio_nb.data.samples import BaseDataset
    from training_toy import data, stop_at
    class Torn(BaseDataset):
        def __init__(self, x, y, bad): self.x, self.y, self.bad = x, y, set(bad)
        def __len__(self): return len(self.x)
        def load(self, i):
            if i in self.bad: raise Unreadable(f'{i} is gone', reason='gone')
            return self.x[i], self.y[i]
    x, y = data()
    order = BaseDataLoader(Torn(x[:66], y[:66], []), 12, seed=4, num_workers=0).sampler
    order.epoch = 1
    bad = order.upcoming()[0][12:24].tolist()
    def make(**kwargs):
        t = trainer(epochs=1, scheduler=None, **kwargs)
        t.train_loader = BaseDataLoader(Torn(x[:66], y[:66], bad), 12, seed=4, num_workers=0)
        return t
    whole_run = make()
    whole_run.train()
    assert whole_run.steps==STEPS-1
    make(folder=tmp_path/'run', callbacks=[stop_at(2)]).train()
    assert load_checkpoint(tmp_path/'run'/'last.pt')['skipped']==1
    again = make(folder=tmp_path/'run').load(tmp_path/'run')
    again.train()
    assert_same(again, whole_run)
