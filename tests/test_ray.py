"""Jobs, sweeps and training on a Ray of two cores are what they are here; workers die, and nothing is lost."""
import csv, os, secrets, signal, socket, subprocess, sys
from pathlib import Path
from unittest import mock
import pytest

ray = pytest.importorskip('ray')
optuna = pytest.importorskip('optuna')

from toy_data import write_dots
from waiting import wait_for
from deep_studio_nb.common.errors import ConfigError, MissingLibrary, RunError
from deep_studio_nb.experiments.job import Job
from deep_studio_nb.experiments.jobs import run_jobs
from deep_studio_nb.experiments.kfold import kfold
from deep_studio_nb.experiments.launch import run_workers
from deep_studio_nb.experiments.ray_connection import check_answers, ray_connected
from deep_studio_nb.experiments.ray_ranks import run_ranks
from deep_studio_nb.experiments.run_folder import RunFolder
from deep_studio_nb.experiments.sweeps import sweep

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(sys.platform!='linux', reason='/proc')
CHORES = '''
import os, signal, time
from pathlib import Path
from deep_studio_nb.common.errors import RunError

def count(name, to, seconds=0.):
    "Write numbers below each other, from the one that comes next; at Ctrl-C write down that it was stopped."
    path = Path(f'{name}.txt')
    try:
        for i in range(len(path.read_text().splitlines()) if path.exists() else 0, to):
            with open(path, 'a') as f: print(i, file=f)
            Path(f'{name}.draft').write_text(f'{os.getpid()} {os.getppid()}')
            os.replace(f'{name}.draft', f'{name}.pid')
            time.sleep(seconds)
    except KeyboardInterrupt:
        Path(f'{name}.stopped').touch()
        return False
    print('counted to', to)

def stumble(why):
    print('on my way')
    if why: raise RunError(why)
    return 1/0
'''

TOKEN = secrets.token_hex(32)      # one a process, where Ray keeps the first that it has seen

@pytest.fixture(scope='module')
def cluster():
    "A Ray of two cores with a token of its own, and its address."
    token = {} if 'RAY_ADDRESS' in os.environ else dict(RAY_AUTH_TOKEN=TOKEN)
    with mock.patch.dict('os.environ', token), mock.patch('deep_studio_nb.data.workers.usable_cores', lambda: 2), ray_connected('ray'): yield ray.get_runtime_context().gcs_address
    assert not ray.is_initialized()

@pytest.fixture
def place(tmp_path, monkeypatch):
    "A folder with chores, and with a config and what it imports."
    (tmp_path/'ray_chores.py').write_text(CHORES)
    write_dots(tmp_path)
    monkeypatch.delitem(sys.modules, 'toy_dots', raising=False)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.chdir(tmp_path)
    return tmp_path

def job(label, function, **args): return Job(f'ray_chores:{function}', args, Path(f'logs/{label}.log'), label)

def pids_of(name):
    "The process that counts, and the one of Ray that looks after it."
    path = Path(f'{name}.pid')
    return path.exists() and [int(o) for o in path.read_text().split()]

def gone(pid):
    path = Path(f'/proc/{pid}/stat')
    return not path.exists() or path.read_text().rpartition(')')[2].split()[0]=='Z'

def driver(code, *words):
    "Another process that uses the cluster."
    return subprocess.Popen([sys.executable, '-c', code, *words], env=os.environ | dict(PYTHONPATH=str(ROOT)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

# --- the address ---

def test_an_address_that_does_not_answer(monkeypatch):
    "It is said soon, whether nobody is there or somebody says nothing."
    monkeypatch.setattr(ray, 'is_initialized', lambda: False)
    with socket.socket() as silent:
        silent.bind(('127.0.0.1', 0))
        port = silent.getsockname()[1]
        for on in (f'ray://127.0.0.1:{port}', f'ray:127.0.0.1:{port}', f'ray://no-such-host.invalid:{port}', 'ray://127.0.0.1:99999'):
            with pytest.raises(RunError, match='No cluster of Ray answers'): run_jobs([], on=on)
        silent.listen()
        with pytest.raises(RunError, match='said nothing in 1 seconds'): check_answers(f'127.0.0.1:{port}', seconds=1)

def test_an_address_that_is_none(monkeypatch):
    for on in ('ray:', 'ray://', 'ray://host:port'):
        with pytest.raises(ConfigError, match='wanted `ray` for this machine'): run_jobs([], on=on)
    with pytest.raises(ConfigError, match='did you mean `ray`'): run_jobs([], on='rays')
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(MissingLibrary, match=r'deep_studio_nb\[ray\]'): run_jobs([], on='ray')

def test_a_ray_that_is_there_stays(cluster):
    before = signal.getsignal(signal.SIGTERM)
    with ray_connected('ray'): pass
    assert ray.is_initialized() and signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(RunError, match='uses Ray already'), ray_connected(f'ray:{cluster}'): pass

# --- jobs ---

def test_jobs_end_as_they_do_here(cluster, place):
    def jobs(where): return [job(f'{where}-{n}', *o[:1], **o[1]) for n,o in enumerate([('count', dict(name=where, to=3)), ('stumble', dict(why='There is a stone.')), ('stumble', dict(why=''))])]
    here, there = run_jobs(jobs('here'), at_once=2), run_jobs(jobs('there'), at_once=2, on='ray')
    assert [(o.code, o.error) for o in there]==[(o.code, o.error) for o in here]
    assert [o.code for o in there]==[0, 1, 1]
    for i in range(3): assert Path(f'logs/there-{i}.log').read_text()==Path(f'logs/here-{i}.log').read_text()

@pytest.mark.parametrize('which', ['the process', 'the worker of Ray'])
def test_a_killed_one_goes_on(cluster, place, which):
    killed = []
    def kill(_):
        if not killed and (pids := pids_of('a')): os.kill(killed.append(pids) or pids[which!='the process'], signal.SIGKILL)
    assert [o.code for o in run_jobs([job('a', 'count', name='a', to=40, seconds=0.05)], on='ray', seen=kill)]==[0]
    assert killed and pids_of('a')[0]!=killed[0][0] and gone(killed[0][0])
    assert Path('a.txt').read_text().split()==[str(i) for i in range(40)]

def test_a_machine_with_other_files(cluster, place, monkeypatch):
    monkeypatch.setattr('os.getcwd', lambda: '/gone/here')
    ended = run_jobs([job('a', 'count', name='a', to=1)], on='ray')[0]
    assert ended.code==1 and f'`/gone/here` is not there on `{socket.gethostname()}`' in ended.error

PARENT = '''
import sys
from pathlib import Path
from deep_studio_nb.experiments.job import Job
from deep_studio_nb.experiments.jobs import run_jobs
if __name__=='__main__': sys.exit(max(o.code for o in run_jobs([Job('ray_chores:count', dict(name=o, to=int(sys.argv[2]), seconds=0.05), Path(f'logs/{o}.log'), o) for o in 'abc'], at_once=3, on=sys.argv[1])))
'''

def test_ctrl_c(cluster, place):
    "Those at work save what they have; the third, for which there is no core, does not begin."
    parent = driver(PARENT, f'ray:{cluster}', '2000')
    wait_for(lambda: sum(bool(pids_of(o)) for o in 'abc')==2)
    parent.send_signal(signal.SIGINT)
    assert parent.wait(60)==130, parent.stdout.read()
    assert [sum(Path(f'{o}.{end}').exists() for o in 'abc') for end in ('stopped', 'txt')]==[2, 2]

def test_the_parent_is_killed(cluster, place):
    parent = driver(PARENT, f'ray:{cluster}', '2000')
    wait_for(lambda: sum(bool(pids_of(o)) for o in 'abc')==2)
    parent.kill()
    parent.wait()
    wait_for(lambda: all(gone(pids_of(o)[0]) for o in 'abc' if pids_of(o)))

@pytest.fixture
def client_port(cluster):
    "A client port of the cluster, for those who are outside of it."
    pytest.importorskip('grpc', reason='the client port of Ray needs grpcio. Run: pip install "deep_studio_nb[ray]"')
    from ray.util.client.server.server import serve, shutdown_with_server
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    server = serve('127.0.0.1', port)
    yield f'ray://127.0.0.1:{port}'
    shutdown_with_server(server.grpc_server, False)

def test_from_outside(client_port, place):
    parent = driver(PARENT, client_port, '3')
    assert parent.wait(120)==0, parent.stdout.read()
    assert [Path(f'{o}.txt').read_text().split() for o in 'abc']==[['0', '1', '2']]*3
    assert all(Path(f'logs/{o}.log').read_text()=='counted to 3\n' for o in 'abc')

@pytest.mark.slow
def test_from_outside_without_the_token(client_port, place, monkeypatch):
    monkeypatch.delenv('RAY_AUTH_TOKEN')
    monkeypatch.delenv('RAY_AUTH_MODE', raising=False)
    monkeypatch.setenv('HOME', str(place))       # where Ray looks for a token, too
    parent = driver(PARENT, client_port, '3')
    assert parent.wait(120)==1
    said = parent.stdout.read()
    assert 'No cluster of Ray answers' in said and 'RAY_AUTH_TOKEN' in said and not Path('a.txt').exists()

# --- sweeps ---

SPACE = {'optimizer.args.lr': {'log': [1e-3, 1.]}, 'arch.args.hidden': [[4], [8]]}

def facts(found): return [(o.number, o.state.name, o.params, o.value, o.intermediate_values) for o in found.trials()]

def test_a_sweep_is_the_same(cluster, place):
    here, there = (sweep('dots.json', SPACE, trials=4, name=name, on=on) for name,on in (('here', None), ('there', 'ray')))
    assert facts(here)==facts(there)

def test_a_worker_is_killed_in_a_trial(cluster, place):
    "Its trial is taken up again, and all trials come out as if nothing had happened."
    options = dict(trials=3, sampler='random', pruner='none')
    whole = sweep('dots.json', SPACE, 'trainer.epochs=60', name='whole', **options)
    killed = []
    class View:
        def begin(self, _): pass
        def done(self, _): pass
        def now(self, found, _):
            at_work = [o.user_attrs['owner'] for o in found.trials() if o.state.name=='RUNNING' and o.intermediate_values and o.user_attrs.get('owner')]
            if killed or not at_work: return
            killed.append(int(Path(f'/proc/{at_work[0]["pid"]}/stat').read_text().rpartition(')')[2].split()[1]))
            os.kill(killed[0], signal.SIGKILL)
    from deep_studio_nb.experiments.trials import Sweep
    found = Sweep('dots.json', SPACE, 'trainer.epochs=60', name='killed', sampler='random', pruner='none').run(3, jobs=2, view=View(), on='ray')
    assert killed
    assert facts(found)==facts(whole)

# --- folds ---

def test_folds_are_the_same(cluster, place):
    here, there = (kfold('dots.json', folds=2, name=name, on=on) for name,on in (('here', None), ('there', 'ray')))
    assert (here.folder/'out_of_fold.csv').read_text()==(there.folder/'out_of_fold.csv').read_text()

# --- training together ---

def rows(name): return [{k: v for k,v in o.items() if k!='seconds'} for o in csv.DictReader((Path('experiments')/name/'metrics.csv').open())]

def test_training_together_is_the_same(cluster, place):
    assert run_workers(['train', 'dots.json', '--name', 'here'], 2)==0
    assert run_ranks(['train', 'dots.json', '--name', 'there'], 2)==0
    assert rows('here')==rows('there')
    record = RunFolder('experiments/there').read()
    assert (record['status'], record['processes'])==('finished', 2)

RANKS = 'import sys; from deep_studio_nb.experiments.ray_ranks import run_ranks; sys.exit(run_ranks(["train", "dots.json", "trainer.epochs=300", "--resume", "auto"], 2, sys.argv[1]))'

def epochs():
    path = Path('experiments/dots/metrics.csv')
    return len(path.read_text().splitlines())-1 if path.exists() else 0

def ranks_of(folder):
    "The processes that train in a folder, by rank."
    res = {}
    for o in Path('/proc').glob('[0-9]*'):
        try: words, env, cwd = (o/'cmdline').read_bytes().split(b'\0'), (o/'environ').read_bytes().split(b'\0'), os.readlink(o/'cwd')
        except OSError: continue
        if cwd==str(folder) and b'train' in words: res |= {int(e[5:]): int(o.name) for e in env if e.startswith(b'RANK=')}
    return res

@pytest.mark.slow
def test_a_rank_is_killed(cluster, place):
    "All end with an error that says so; the same command goes on."
    first = driver(RANKS, f'ray:{cluster}')
    wait_for(lambda: epochs()>=2)
    os.kill(ranks_of(place)[1], signal.SIGKILL)
    said = first.communicate(timeout=120)[0]
    assert first.returncode==1 and 'Error: Process 1 of 2 was killed (SIGKILL)' in said and 'Traceback' not in said
    assert not ranks_of(place)
    again = driver(RANKS, f'ray:{cluster}')
    before = epochs()
    wait_for(lambda: epochs()>before+2)
    again.send_signal(signal.SIGINT)
    assert again.wait(120)==130, again.stdout.read()
    assert RunFolder('experiments/dots').status()=='stopped'
    assert [o.name for o in Path('experiments').iterdir()]==['dots']

def test_more_ranks_than_cores(cluster, place):
    with pytest.raises(RunError, match='3 processes that train together need 3 CPUs at once, and the cluster has 2'): run_ranks(['train', 'dots.json'], 3)
