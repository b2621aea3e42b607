"""Files are whole or absent, whatever happens to the process that writes them."""
import errno, hashlib, json, os, signal, subprocess, sys
from pathlib import Path
import pytest
from deep_studio_nb.common import files
from deep_studio_nb.common.errors import RunError
from deep_studio_nb.common.files import atomic_path, new_folder, safe_name, write_bytes, write_json, write_text

ROOT = Path(__file__).parents[1]
AS_ROOT = hasattr(os, 'geteuid') and os.geteuid()==0

def start(code, *args):
    "Run `code` in another process, with pipes to talk to it."
    env = os.environ | {'PYTHONPATH': str(ROOT), 'PYTHONIOENCODING': 'utf-8'}
    return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

def kill(process):
    process.kill()
    process.communicate()

def drafts(folder): return [o.name for o in folder.iterdir() if o.name.startswith('.')]

# Killed

HALF = """
import sys
from deep_studio_nb.common.files import atomic_path
with atomic_path(sys.argv[1]) as draft:
    with draft.open('w') as f:
        f.write('half of the new')
        f.flush()
        print('written', flush=True)
        sys.stdin.readline()
"""

@pytest.mark.parametrize('old', ['the old content', None])
def test_killed_in_the_middle_of_a_write(tmp_path, old):
    target = tmp_path/'last.pt'
    if old: target.write_text(old)
    process = start(HALF, target)
    assert process.stdout.readline()=='written\n'
    kill(process)
    assert (target.read_text() if target.exists() else None)==old
    assert len(drafts(tmp_path))==1   # nobody could remove it, and it is hidden
    write_text(target, 'the next run')
    assert target.read_text()=='the next run'

BUSY = """
import hashlib, itertools, sys
from deep_studio_nb.common.files import write_bytes
for i in itertools.count():
    body = str(i).encode()*50_000
    write_bytes(sys.argv[1], hashlib.sha256(body).hexdigest().encode() + body)
    print(i, flush=True)
"""

@pytest.mark.parametrize('after', [1, 2, 5, 9])
def test_killed_at_any_moment(tmp_path, after):
    target = tmp_path/'best_model.pt'
    process = start(BUSY, target)
    for _ in range(after): process.stdout.readline()
    kill(process)
    data = target.read_bytes()
    assert hashlib.sha256(data[64:]).hexdigest().encode()==data[:64]

@pytest.mark.skipif(not hasattr(signal, 'SIGINT') or os.name!='posix', reason='needs POSIX signals')
def test_interrupted_write_leaves_nothing(tmp_path):
    target = tmp_path/'last.pt'
    process = start(HALF, target)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode!=0 and list(tmp_path.iterdir())==[]

# Full disk

FULL = [errno.ENOSPC, pytest.param(getattr(errno, 'EDQUOT', None), marks=pytest.mark.skipif(not hasattr(errno, 'EDQUOT'), reason='no quotas here'))]

@pytest.mark.parametrize('code', FULL)
def test_full_disk_when_syncing(tmp_path, monkeypatch, code):
    target = write_text(tmp_path/'last.pt', 'old')
    def full(handle): raise OSError(code, os.strerror(code))
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(RunError, match='is full .*MiB are free.*Free some space') as e: write_text(target, 'new')
    assert str(target) in str(e.value)
    assert target.read_text()=='old' and drafts(tmp_path)==[]

def test_file_systems_that_cannot_sync(tmp_path, monkeypatch):
    def cannot(handle): raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    monkeypatch.setattr(os, 'fsync', cannot)
    assert write_text(tmp_path/'last.pt', 'new').read_text()=='new'

def test_full_disk_when_writing(tmp_path):
    target = write_text(tmp_path/'last.pt', 'old')
    with pytest.raises(RunError, match='is full'):
        with atomic_path(target) as draft:
            draft.write_text('ne')
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert target.read_text()=='old' and drafts(tmp_path)==[]

LIMITED = """
import resource, signal, sys
from deep_studio_nb.common.files import write_bytes
from deep_studio_nb.common.errors import RunError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try: write_bytes(sys.argv[1], b'x'*5000)
except RunError as e: print(e)
"""

@pytest.mark.skipif(os.name!='posix', reason='needs POSIX limits')
def test_write_that_the_system_really_cuts_off(tmp_path):
    target = write_text(tmp_path/'last.pt', 'old')
    out = start(LIMITED, target).communicate()[0]
    assert 'could not be written' in out and 'last.pt' in out
    assert target.read_text()=='old' and drafts(tmp_path)==[]

# Folders that cannot be written to

@pytest.mark.parametrize('code', [errno.EACCES, errno.EPERM, errno.EROFS])
def test_refused_by_the_system(tmp_path, monkeypatch, code):
    def refuse(self, *args, **kwargs): raise OSError(code, os.strerror(code), str(self))
    monkeypatch.setattr(Path, 'mkdir', refuse)
    with pytest.raises(RunError, match='you may not write in .*Choose another folder'): write_text(tmp_path/'new'/'a.txt', 'x')
    with pytest.raises(RunError, match='you may not write in'): new_folder(tmp_path/'new', 'digits')

@pytest.mark.skipif(AS_ROOT or os.name!='posix', reason='root may write everywhere')
def test_folder_without_permission(tmp_path):
    closed = tmp_path/'closed'
    closed.mkdir(mode=0o500)
    for action in (lambda: write_text(closed/'a.txt', 'x'), lambda: new_folder(closed, 'digits'), lambda: write_text(closed/'b'/'a.txt', 'x')):
        with pytest.raises(RunError, match='you may not write in'): action()
    assert list(closed.iterdir())==[]

def test_a_file_where_a_folder_should_be(tmp_path):
    file = write_text(tmp_path/'experiments', '')
    for action in (lambda: write_text(file/'a.txt', 'x'), lambda: new_folder(file, 'digits'), lambda: new_folder(file/'deeper', 'digits')):
        with pytest.raises(RunError, match='is a file, not a folder'): action()

def test_a_folder_where_the_file_should_be(tmp_path):
    (tmp_path/'last.pt').mkdir()
    with pytest.raises(RunError, match='there is a folder of that name'): write_text(tmp_path/'last.pt', 'x')
    assert drafts(tmp_path)==[]

def test_name_that_is_too_long(tmp_path):
    with pytest.raises(RunError, match='the name is too long'): write_text(tmp_path/('x'*300), 'x')
    assert list(tmp_path.iterdir())==[]

@pytest.mark.parametrize('error', [ValueError('mine'), FileNotFoundError(errno.ENOENT, 'mine', '/no/such/file'), KeyboardInterrupt('mine')])
def test_errors_of_the_block_are_its_own(tmp_path, error):
    with pytest.raises(type(error), match='mine'):
        with atomic_path(tmp_path/'a.txt') as draft:
            draft.write_text('x')
            raise error
    assert list(tmp_path.iterdir())==[]

# Races

RACE = """
import sys
from deep_studio_nb.common.files import new_folder
print('ready', flush=True)
sys.stdin.readline()
for _ in range(50): print(new_folder(sys.argv[1], '실험'))
"""

def test_two_processes_never_get_the_same_folder(tmp_path):
    racers = [start(RACE, tmp_path) for _ in range(2)]
    for o in racers: assert o.stdout.readline()=='ready\n'
    for o in racers:
        o.stdin.write('go\n')
        o.stdin.flush()
    made = [line for o in racers for line in o.communicate()[0].split('\n') if line]
    assert len(made)==len(set(made))==100
    assert {Path(o).name for o in made}=={'실험', *(f'실험-{i}' for i in range(2, 101))}

WRITER = """
import sys
from deep_studio_nb.common.files import write_text
for i in range(100): write_text(sys.argv[1], sys.argv[2]*20_000)
"""

def test_two_writers_and_a_reader(tmp_path):
    target = write_text(tmp_path/'manifest.json', 'a'*20_000)
    writers = [start(WRITER, target, o) for o in 'ab']
    while any(o.poll() is None for o in writers): assert target.read_text() in ('a'*20_000, 'b'*20_000)
    assert [o.wait() for o in writers]==[0, 0] and drafts(tmp_path)==[]
    for o in writers: o.communicate()

# Names and content

@pytest.mark.parametrize('name', ['with blanks', '한글 이름', 'dots.in.it', "it's", '-x', '#1 100%'])
def test_names_people_use(tmp_path, name):
    assert write_text(tmp_path/name/f"{name}.txt", '가나다').read_text(encoding='utf-8')=='가나다'
    assert new_folder(tmp_path, name).parent==tmp_path

@pytest.mark.parametrize('text', ['', '.', '..', '/', '../../etc/passwd', 'a/b\\c', 'con', 'COM1.txt', 'x\0y', '한'*500, '🙂'*99, ' . '])
def test_any_text_becomes_one_folder(tmp_path, text):
    name = safe_name(text)
    assert safe_name(name)==name and len(name.encode())<=121
    made = new_folder(tmp_path, text)
    assert made.parent==tmp_path and made.name==name and made.is_dir()

def test_relative_paths_and_the_draft_beside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with atomic_path('sub/curve.png') as draft:
        assert draft.parent==(tmp_path/'sub').resolve() and draft.suffix=='.png' and draft.name.startswith('.')
        draft.write_bytes(b'x')
    assert Path('sub/curve.png').read_bytes()==b'x'

def test_a_draft_may_be_replaced_by_the_block(tmp_path):
    "Libraries that write atomically themselves put another file under the name that they were given."
    with atomic_path(tmp_path/'a.bin') as draft:
        (tmp_path/'other').write_bytes(b'final')
        os.replace(tmp_path/'other', draft)
    assert (tmp_path/'a.bin').read_bytes()==b'final'

def test_files_get_the_usual_permissions(tmp_path):
    usual = tmp_path/'usual'
    usual.write_text('x')
    assert write_bytes(tmp_path/'ours', b'x').stat().st_mode==usual.stat().st_mode

def test_everything_is_synced_before_the_rename(tmp_path, monkeypatch):
    calls,sync,replace = [], files._sync, os.replace
    monkeypatch.setattr(files, '_sync', lambda path: (calls.append(('sync', path.name)), sync(path)))
    monkeypatch.setattr(os, 'replace', lambda a,b: (calls.append(('rename', Path(b).name)), replace(a, b)))
    write_text(tmp_path/'a.txt', 'x')
    assert [o[0] for o in calls]==(['sync', 'rename', 'sync'] if os.name=='posix' else ['sync', 'rename'])
    assert calls[0][1].startswith('.a.') and calls[-1][1] in (tmp_path.name, 'a.txt')

def test_json_is_read_back(tmp_path):
    data = {'이름': '한글', 'list': [1, 2.5, None, True], 'nested': {'path': Path('a')/'b'}}
    assert json.loads(write_json(tmp_path/'a.json', data).read_text(encoding='utf-8'))==data|{'nested': {'path': str(Path('a')/'b')}}
    assert '한글' in (tmp_path/'a.json').read_text(encoding='utf-8')
    assert write_json(tmp_path/'b.json', [1, 2], indent=None).read_text()=='[1, 2]\n'
    with pytest.raises(TypeError, match='JSON cannot hold'): write_json(tmp_path/'a.json', {'x': object()})
    assert json.loads((tmp_path/'a.json').read_text(encoding='utf-8'))['이름']=='한글'

LIGHT = """
import sys, importlib
for o in ('errors', 'files', 'sources', 'arguments', 'registry', 'logs'): importlib.import_module('deep_studio_nb.common.'+o)
print([o for o in ('torch', 'numpy', 'matplotlib', 'torchvision') if o in sys.modules])
"""

def test_nothing_heavy_is_imported(): assert start(LIGHT).communicate()[0]=='[]\n'
