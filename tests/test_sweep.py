"""Sweeps that are killed, stopped, shared and misused: the trials come out as if nothing had happened."""
import json, multiprocessing as mp, os, signal, socket, subprocess, sys
from pathlib import Path
import pytest
import torch

optuna = pytest.importorskip('optuna')

from toy_data import write_dots
from waiting import wait_for
from deep_studio_nb.common.errors import ConfigError, RunError
from deep_studio_nb.common.registry import CALLBACKS
from deep_studio_nb.experiments.build import learn_names
from deep_studio_nb.experiments.runs import runs
from deep_studio_nb.experiments.space import read_space
from deep_studio_nb.experiments.storage import open_storage
from deep_studio_nb.experiments.sweeps import sweep
from deep_studio_nb.experiments.trials import Sweep
from deep_studio_nb.experiments.variants import Variants, check_space
from deep_studio_nb.training.events import Callback

ROOT = Path(__file__).parents[1]
posix = pytest.mark.skipif(os.name!='posix', reason='SIGKILL')
TRIALS = 5
SPACE = {'optimizer.args.lr': {'log': [1e-3, 1.]}, 'arch.args.hidden': [[4], [8]], 'optimizer': ['AdamW', {'type': 'SGD', 'args': {'momentum': {'range': [0., 0.9]}}}]}
PRUNER = {'type': 'PercentilePruner', 'args': {'percentile': 50., 'n_startup_trials': 1}}     # ends about half of the trials after the first

@pytest.fixture
def place(tmp_path, monkeypatch):
    "A folder with a config and what it imports."
    write_dots(tmp_path, dropout=0.2)
    monkeypatch.delitem(sys.modules, 'toy_dots', raising=False)      # that of another test
    monkeypatch.chdir(tmp_path)
    return tmp_path

def search(**kwargs): return sweep('dots.json', SPACE, **{'trials': TRIALS, 'pruner': PRUNER} | kwargs)

def facts(found): return [(o.number, o.state.name, o.params, o.value, o.intermediate_values) for o in found.trials()]

# --- children that die ---

def now(): os.kill(os.getpid(), signal.SIGKILL)

def arrange(kind, number):
    "Let this process die at a write into the journal (before it, in the middle of the line, after it), or in a step of training; or press Ctrl-C in it."
    from deep_studio_nb.training.trainer import Trainer
    count = [0]
    backend = optuna.storages.journal.JournalFileBackend
    append, call = backend.append_logs, Trainer._call
    def written(self, logs):
        count[0] += 1
        if count[0]==number and kind=='before': now()
        if count[0]==number and kind=='half':
            with open(self._file_path, 'ab') as f: f.write(json.dumps(logs[0]).encode()[:20])
            now()
        append(self, logs)
        if count[0]==number and kind=='after': now()
    def called(self, event):
        call(self, event)
        if event!='after_batch': return
        count[0] += 1
        if count[0]==number: os.kill(os.getpid(), signal.SIGINT) if kind=='interrupted' else now()
    if kind in ('before', 'half', 'after'): backend.append_logs = written
    else: Trainer._call = called

def child(folder, death, options):
    torch.set_num_threads(1)
    mp.set_start_method(None, force=True)
    os.chdir(folder)
    if death: arrange(*death)
    search(**options)

def begin(*args):
    "A child, forked from a server that has the large libraries loaded."
    ctx = mp.get_context('forkserver')
    p = ctx.Process(target=child, args=args)
    p.start()
    return p

def ended(p):
    p.join(120)
    assert p.exitcode is not None, 'the child does not end'
    return p.exitcode

STEPS = 5                  # of an epoch: 72 of 96 points in batches of 16
DEATHS = {'first write': [('before', 1)], 'first lines': [('half', 2), ('after', 3), ('before', 2)], 'between values': [('after', 5), ('half', 4)], 'late': [('before', 25), ('after', 12)],
          'in a step': [('step', 2), ('step', 3*STEPS+2)], 'epoch told': [('after', 8), ('after', 9), ('after', 10)], 'end of a trial': [('before', 11), ('before', 12), ('before', 13)],
          'stopped': [('interrupted', 7), ('step', 11), ('half', 9)]}

@posix
@pytest.mark.parametrize('name', [pytest.param(o, marks=pytest.mark.slow) if o in ('first write', 'first lines', 'between values', 'late', 'epoch told') else o for o in DEATHS])     # `killed_at_every_write` has these, too
def test_killed_and_gone_on(place, name):
    "However often it dies, the same command ends with the trials of a sweep that nobody disturbed."
    for death in DEATHS[name]: assert ended(begin(place, death, {}))==(0 if death[0]=='interrupted' else -signal.SIGKILL), death
    assert ended(begin(place, None, {}))==0
    killed = Sweep('dots.json', SPACE, pruner=PRUNER)
    assert facts(killed)==facts(search(name='whole'))
    assert {o[1] for o in facts(killed)}>={'COMPLETE', 'PRUNED'}
    assert all(o.user_attrs['run'] for o in killed.trials())

@posix
@pytest.mark.slow
@pytest.mark.parametrize('kind', ['before', 'half', 'after'])
def test_killed_at_every_write(place, kind):
    "Each write of a sweep is one to die at; the same command then ends it with the same trials."
    whole = facts(search(name='whole'))
    for number in range(1, 60):
        options = dict(name=f'killed-{number}')
        survived = ended(begin(place, (kind, number), options))==0
        if not survived: assert ended(begin(place, None, options))==0
        assert facts(Sweep('dots.json', SPACE, pruner=PRUNER, **options))==whole, number
        if survived: break      # a sweep has no more writes than that
    assert survived and number>30

def test_same_seed_same_trials(place):
    first, second, other = search(name='a'), search(name='b'), search(name='c', seed=1)
    assert facts(first)==facts(second)
    assert [o[2] for o in facts(first)]!=[o[2] for o in facts(other)]

def test_more_trials_go_on_where_it_ended(place):
    search(trials=2)
    assert facts(search(trials=TRIALS))==facts(search(name='whole'))

# --- several processes ---

@posix
def test_two_commands_at_once(place):
    "Two processes with the same command share the trials; none is missing, none is there twice."
    both = [begin(place, None, dict(trials=8)) for _ in range(2)]
    assert [ended(o) for o in both]==[0, 0]
    found = Sweep('dots.json', SPACE, pruner=PRUNER)
    assert [o['trial'] for o in found.table()]==list(range(8))
    assert {o['status'] for o in found.table()}<={'finished', 'pruned'}
    assert len(runs(found.folder))==8

def test_two_take_the_last_one(place, monkeypatch):
    "Without a common disk two processes may both see one trial too few."
    one, two = (Sweep('dots.json', SPACE, storage='sqlite:///trials.db') for _ in range(2))
    seen = two.trials()
    assert one.claim(1).number==0
    one.note(0, owner=dict(host='elsewhere', pid=1, born=''))
    real, calls = Sweep.trials, []
    monkeypatch.setattr(Sweep, 'trials', lambda self: calls.append(1) or (seen if len(calls)<3 else real(self)))
    assert two.claim(1) is None
    assert [o['trial'] for o in two.table()]==[0]

def workers_of(pid):
    "The processes that a process has started."
    return [int(o) for o in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]

LONG = 'from deep_studio_nb.experiments.sweeps import sweep; sweep("dots.json", {"optimizer.args.lr": {"log": [1e-3, 1]}}, "trainer.epochs=400", trials=3, jobs=2, pruner="none", name="long")'

def command(place):
    return subprocess.Popen([sys.executable, '-c', LONG], cwd=place, env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

def owners(place):
    "Processes that have a trial and have told an epoch of it."
    try: study = optuna.load_study(study_name='long', storage=open_storage(place/'experiments/long/trials.jsonl'))
    except KeyError: return []     # it has not begun
    return [o.user_attrs['owner']['pid'] for o in study.trials if o.state.name=='RUNNING' and o.intermediate_values]

@pytest.mark.slow
@pytest.mark.skipif(sys.platform!='linux', reason='/proc')
def test_a_process_of_a_sweep_is_killed(place):
    "Another one takes its place and its trial."
    parent = command(place)
    pid = wait_for(lambda: owners(place))[0]
    os.kill(pid, signal.SIGKILL)
    assert parent.wait(300)==0
    study = optuna.load_study(study_name='long', storage=open_storage(place/'experiments/long/trials.jsonl'))
    assert [o.state.name for o in study.trials]==['COMPLETE']*3
    assert [len(o.user_attrs.get('deaths', ())) for o in study.trials].count(1)==1
    assert [max(o.intermediate_values) for o in study.trials]==[400]*3

@pytest.mark.slow
@pytest.mark.skipif(sys.platform!='linux', reason='/proc')
def test_the_parent_is_killed(place):
    "Its processes stop by themselves, with their trials saved."
    parent = command(place)
    wait_for(lambda: len(owners(place))==2)
    children = workers_of(parent.pid)
    assert len(children)==2
    parent.kill()
    parent.wait()
    wait_for(lambda: not any(Path(f'/proc/{o}').exists() for o in children))
    study = optuna.load_study(study_name='long', storage=open_storage(place/'experiments/long/trials.jsonl'))
    assert [(o.state.name, o.user_attrs['owner']) for o in study.trials]==[('RUNNING', None)]*2

# --- what goes wrong ---

@CALLBACKS.register
class Trips(Callback):
    "Fail in the second epoch of a narrow net."
    def after_epoch(self, trainer):
        if trainer.epoch==2 and sum(o.numel() for o in trainer.model.parameters())<35: raise RuntimeError('tripped\nover something')

def test_a_failed_trial_is_a_row(place):
    found = sweep('dots.json', {'arch.args.hidden': [[4], [8]], 'seed': [0, 1]}, 'callbacks=[Trips]', sampler='grid', pruner='none')
    table = found.table()
    assert [o['status'] for o in table]==['failed', 'failed', 'finished', 'finished']
    assert table[0]['note']=='RuntimeError: tripped'
    assert 'after_epoch' in found.trials()[0].user_attrs['traceback']
    assert runs(found.folder)[0]['status']=='failed'
    assert 'tripped' in (found.folder/'trials.csv').read_text()

@pytest.mark.parametrize('key, values, words', [
    ('optimizer.args.learning_rate', [1, 2], 'did you mean `optimizer.args.lr`?'), ('optimiser.args.lr', [0.1, 0.2], 'did you mean `optimizer.args.lr`?'), ('lr', [0.1, 0.2], 'did you mean `optimizer.args.lr`?'),
    ('trainer.epoch', [1, 2], 'did you mean `trainer.epochs`?'), ('vars.nothing', [1, 2], 'not in the config'), ('폭', [1, 2], 'not in the config'),
    ('optimizer.args.lr', {'logs': [0.1, 0.2]}, '{log: ...}'), ('arch.type', ['MLP', 'MPL'], 'did you mean `MLP`?'), ('trainer.save_dir', ['a', 'b'], 'cannot change'), ('name', ['a', 'b'], 'cannot change')])
def test_a_space_that_does_not_fit(place, key, values, words):
    with pytest.raises(ConfigError) as e: sweep('dots.json', {key: values}, trials=1)
    assert words in str(e.value) and key in str(e.value)
    assert not Path('experiments').exists()

def test_the_ready_space_fits_its_config():
    learn_names()
    space = read_space(ROOT/'configs'/'sweep.yaml')
    check_space(space, Variants(ROOT/'configs'/'quickstart.yaml'))
    assert len(list(space))==4

def test_a_space_in_a_file_knows_its_lines(place):
    Path('space.yaml').write_text('arch.args.hidden: [[4], [8]]\noptimizer.args.lrr: {log: [1e-3, 1]}\n')
    with pytest.raises(ConfigError, match='space.yaml:2:1  optimizer.args.lrr'): check_space(read_space('space.yaml'), Variants('dots.json'))

def test_a_database_that_does_not_answer(place):
    "Neither one that is off nor one that says nothing keeps anybody waiting."
    with socket.socket() as silent:
        silent.bind(('127.0.0.1', 0))
        port = silent.getsockname()[1]
        with pytest.raises(RunError, match=r'postgresql://me:\*\*\*@127.0.0.1:\d+/trials` does not answer'): search(storage=f'postgresql://me:secret@127.0.0.1:{port}/trials')
        silent.listen()
        with pytest.raises((RunError, ImportError), match='says nothing|needs the driver'): open_storage(f'postgresql://me:secret@127.0.0.1:{port}/trials', seconds=1)

def test_a_database_is_as_good_as_a_file(place):
    first = search(storage='sqlite:///trials.db', trials=2)
    second = search(storage='sqlite:///trials.db')
    assert facts(second)==facts(search(name='whole'))
    assert first.study.study_name==second.study.study_name

def test_a_disk_that_was_full(place):
    "Half a line at the end of the journal is cut off; a file that was never one is refused."
    search(trials=2)
    with open('experiments/dots-sweep/trials.jsonl', 'a') as f: f.write('{"op_code": 5, "work')
    assert facts(search())==facts(search(name='whole'))
    Path('other.jsonl').write_text('these are\nmy notes\n')
    with pytest.raises(RunError, match='is no journal of a sweep'): search(storage='other.jsonl', name='other')
    assert Path('other.jsonl').read_text()=='these are\nmy notes\n'

def test_something_else_under_the_same_name(place):
    search(trials=1)
    config = json.loads(Path('dots.json').read_text())
    config['trainer']['epochs'] = 9
    Path('dots.json').write_text(json.dumps(config))
    with pytest.raises(RunError, match='trainer.epochs: 3 then, 9 now'): search(trials=2)

def test_the_config_is_read_once(place):
    "What is edited while a sweep runs does not change the trials that are to come."
    found = Sweep('dots.json', SPACE)
    Path('dots.json').write_text('{"broken')
    found.run(1)
    assert found.table()[0]['status']=='finished'

def test_minutes(place):
    assert len(sweep('dots.json', SPACE, minutes=1e-9).trials())==0
    with pytest.raises(ConfigError, match='How long?'): sweep('dots.json', SPACE)
