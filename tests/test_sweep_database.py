"""A sweep whose trials are kept by a real PostgreSQL: shared by processes, the same as in a file, and gone on with after the server was away."""
import os, shutil, socket, subprocess
from pathlib import Path
import pytest

pytest.importorskip('optuna')
pytest.importorskip('psycopg', reason='pip install "psycopg[binary]"')
from test_sweep import TRIALS, facts, place, search  # noqa: F401 (a fixture)
from deep_studio_nb.common.errors import RunError
from deep_studio_nb.training.trainer import Trainer

PROGRAMS = sorted(Path('/usr/lib/postgresql').glob('*/bin')) or [Path(o).parent for o in [shutil.which('initdb')] if o]
pytestmark = pytest.mark.skipif(not PROGRAMS, reason='no PostgreSQL on this machine; Debian: apt-get install postgresql')

class Server:
    "A server of its own, which leaves nothing behind."
    def __init__(self, folder):
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            self.port = s.getsockname()[1]
        self.folder, self.user = folder, dict(user='postgres') if os.getuid()==0 else {}     # it refuses to run as root
        if self.user: shutil.chown(folder, 'postgres')
        self.call('initdb', '-D', folder, '-U', 'me', '--auth=trust', '--no-sync')
        self.start()
        self.call('createdb', '-h', '127.0.0.1', '-p', self.port, '-U', 'me', 'trials')
        self.url = f'postgresql://me@127.0.0.1:{self.port}/trials'
    def call(self, program, *words):
        subprocess.run([PROGRAMS[-1]/program, *map(str, words)], cwd='/', check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **self.user)
    def start(self): self.call('pg_ctl', '-D', self.folder, '-w', '-l', self.folder/'log', '-o', f'-p {self.port} -k "" -h 127.0.0.1', 'start')
    def stop(self): self.call('pg_ctl', '-D', self.folder, '-w', '-m', 'immediate', 'stop')

@pytest.fixture
def server(tmp_path_factory):
    import tempfile
    folder = Path(tempfile.mkdtemp(prefix='postgres-'))      # where another user may enter
    made = Server(folder)
    yield made
    if (folder/'postmaster.pid').exists(): made.stop()
    shutil.rmtree(folder)

def test_the_same_trials_as_in_a_file(place, server):  # noqa: F811
    search(storage=server.url, trials=2)
    assert facts(search(storage=server.url))==facts(search(name='whole'))

def test_processes_share_it(place, server):  # noqa: F811
    found = search(storage=server.url, jobs=2)
    assert [o.number for o in found.trials()]==list(range(TRIALS))
    assert all(o.state.is_finished() and o.state.name!='FAIL' for o in found.trials())
    assert len({o.user_attrs['run'] for o in found.trials()})==TRIALS

def test_the_server_goes_away(place, server, monkeypatch):  # noqa: F811
    "What it meant for the sweep is said in one line; the same command goes on when it is back, and nothing is lost."
    call, steps = Trainer._call, [0]
    def called(self, event):
        call(self, event)
        steps[0] += event=='after_batch'
        if event=='after_batch' and steps[0]==20: server.stop()      # in the second trial
    with monkeypatch.context() as m:
        m.setattr(Trainer, '_call', called)
        with pytest.raises(RunError, match=rf'postgresql://me@127.0.0.1:{server.port}/trials` (does not answer|cannot be used).*') as e: search(storage=server.url)
    assert 'same command' in str(e.value)
    with pytest.raises(RunError, match='does not answer'): search(storage=server.url)
    server.start()
    assert facts(search(storage=server.url))==facts(search(name='whole'))
