"""Jobs in processes of their own: killed ones go on, Ctrl-C stops all, and none outlives its parent."""
import os, signal, subprocess, sys
from pathlib import Path
import pytest
from waiting import wait_for
from deep_studio_nb.common.errors import ConfigError, RunError
from deep_studio_nb.experiments.job import Job
from deep_studio_nb.experiments.jobs import run_jobs

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(os.name!='posix', reason='SIGKILL')
CHORES = '''
import os, signal, sys, time
from pathlib import Path
from deep_studio_nb.common.errors import RunError

def ready(name):
    Path(f'{name}.draft').write_text(str(os.getpid()))
    os.replace(f'{name}.draft', f'{name}.pid')

def count(name, to, seconds=0.):
    "Write numbers below each other, from the one that comes next; at Ctrl-C write down that it was stopped."
    path = Path(f'{name}.txt')
    try:
        for i in range(len(path.read_text().splitlines()) if path.exists() else 0, to):
            with open(path, 'a') as f: print(i, file=f)
            ready(name)
            time.sleep(seconds)
    except KeyboardInterrupt:
        Path(f'{name}.stopped').touch()
        return False

def stumble(why):
    if why: raise RunError(why)
    raise ValueError('second line\\nof two')

def die(): os.kill(os.getpid(), signal.SIGKILL)

def leave(): sys.exit(5)

def overlap(name):
    "Note how many are at work."
    Path(f'{name}.here').touch()
    time.sleep(0.3)
    Path(f'{name}.seen').write_text(str(len(list(Path().glob('*.here')))))
    Path(f'{name}.here').unlink()

def key(name):
    with open(f'{name}.keys', 'a') as f: print(os.environ['DEEP_STUDIO_NB_JOB'], file=f)
    if len(Path(f'{name}.keys').read_text().splitlines())<3: die()
'''

@pytest.fixture
def place(tmp_path, monkeypatch):
    "A folder with chores."
    (tmp_path/'chores.py').write_text(CHORES)
    monkeypatch.chdir(tmp_path)
    return tmp_path

def job(label, function, **args): return Job(f'chores:{function}', args, Path(f'logs/{label}.log'), label)

def pid_of(name):
    "The process that has written its number, once it has."
    path = Path(f'{name}.pid')
    return path.exists() and int(path.read_text())

def test_more_jobs_than_places(place):
    jobs = [job(str(i), 'overlap', name=str(i)) for i in range(5)]
    seen = []
    assert [(o.job.name, o.code) for o in run_jobs(jobs, at_once=2, seen=seen.append)]==[(str(i), 0) for i in range(5)]
    assert max(int(Path(f'{i}.seen').read_text()) for i in range(5))<=2
    assert max(seen)==2 and seen[-1]==0
    assert run_jobs([])==[]

def test_a_killed_process_goes_on(place):
    "With the number that comes next, and under the same key."
    found = []
    def kill(_):
        if not found and (pid := pid_of('a')):
            found.append(pid)
            os.kill(pid, signal.SIGKILL)
    assert run_jobs([job('a', 'count', name='a', to=30, seconds=0.05)], seen=kill)[0].code==0
    assert found and pid_of('a')!=found[0]
    assert Path('a.txt').read_text().split()==[str(i) for i in range(30)]
    assert run_jobs([job('k', 'key', name='k')])[0].code==0
    assert len(set(Path('k.keys').read_text().split()))==1

def test_one_that_cannot_live(place):
    died, fine = run_jobs([job('die', 'die'), job('b', 'count', name='b', to=2)])
    assert (died.code, fine.code)==(-signal.SIGKILL, 0)
    assert died.error=='It was killed 3 times (SIGKILL); is there enough memory?'

def test_errors(place):
    jobs = [job('own', 'stumble', why='There is a stone.'), job('other', 'stumble', why=''), job('gone', 'nothing'), job('leave', 'leave'), job('fine', 'count', name='c', to=1)]
    own, other, gone, leave, fine = run_jobs(jobs, at_once=2)
    assert [o.code for o in (own, other, gone, fine)]==[1, 1, 1, 0]
    assert own.error=='There is a stone.'
    assert other.error=='ValueError: second line\nof two'
    assert "no attribute 'nothing'" in gone.error
    assert leave.code==5 and 'logs/leave.log' in leave.error
    assert 'Traceback' in Path('logs/other.log').read_text()
    assert Path('logs/own.log').read_text()=='Error: There is a stone.\n'

def test_a_log_that_cannot_be_written(place):
    Path('logs').touch()
    with pytest.raises(RunError, match='the log of a, cannot be written'): run_jobs([job('a', 'count', name='a', to=1)])

def test_what_makes_no_sense(place, monkeypatch):
    for n in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match='`jobs` is'): run_jobs([], n)
    with pytest.raises(ConfigError, match='did you mean `ray`'): run_jobs([], on='rey')
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(RunError, match='train together'): run_jobs([])

PARENT = '''
import sys
from pathlib import Path
from deep_studio_nb.experiments.job import Job
from deep_studio_nb.experiments.jobs import run_jobs
ended = run_jobs([Job('chores:count', dict(name=o, to=2000, seconds=0.05), Path(f'logs/{o}.log'), o) for o in 'abc'], at_once=2)
sys.exit(max(o.code for o in ended))
'''

def begin():
    "A process with three jobs, two of which are at work."
    parent = subprocess.Popen([sys.executable, '-c', PARENT], env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'))
    wait_for(lambda: pid_of('a') and pid_of('b'))
    return parent

def gone(pid):
    try: os.kill(pid, 0)
    except ProcessLookupError: return True
    return Path(f'/proc/{pid}/stat').exists() and Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]=='Z'

def test_ctrl_c(place):
    "Both save their work, and the third does not begin."
    parent = begin()
    parent.send_signal(signal.SIGINT)
    assert parent.wait(60)==130
    assert Path('a.stopped').exists() and Path('b.stopped').exists() and not Path('c.txt').exists()

def test_the_parent_is_killed(place):
    parent = begin()
    parent.kill()
    parent.wait()
    wait_for(lambda: gone(pid_of('a')) and gone(pid_of('b')))
    assert Path('a.stopped').exists() and Path('b.stopped').exists()

@pytest.mark.skipif(sys.platform!='linux', reason='/proc')
def test_ctrl_c_is_heard_where_it_was_ignored(place):
    "A shell in the background, and some libraries, keep Ctrl-C from those whom they start."
    script = f'import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGINT}})\n{PARENT}'
    parent = subprocess.Popen([sys.executable, '-c', script], env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'))
    pid = wait_for(lambda: pid_of('a'))
    parent.kill()
    parent.wait()
    wait_for(lambda: gone(pid))
    assert Path('a.stopped').exists()

def test_jobs_load_light():
    "What looks after jobs on another machine does without the heavy libraries."
    code = "import sys, deep_studio_nb.experiments.on_ray; print([o for o in ('torch', 'numpy', 'ray') if o in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], env=os.environ | dict(PYTHONPATH=str(ROOT)), capture_output=True, text=True, check=True).stdout.strip()=='[]'
