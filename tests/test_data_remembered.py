"What is remembered of files: looked at once, never trusted when it changed, never in the way."
import os
import signal
import sqlite3
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from deep_studio_nb.common.errors import DataError
from deep_studio_nb.data import bad_files
from deep_studio_nb.data.bad_files import cache_folder, file_hashes, find_bad, read_quarantine, remember_bad, remembered, write_quarantine
from deep_studio_nb.data.image_files import BadFile
from deep_studio_nb.data.image_folder import ImageFolder

LONG_AGO = 10**18


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('DEEP_STUDIO_CACHE', str(tmp_path/'cache'))
    return tmp_path/'cache'


@pytest.fixture
def files(tmp_path):
    "Five texts of different lengths, written long ago."
    (tmp_path/'글').mkdir()
    return [old(tmp_path/'글'/f'{i}.txt', b'x'*i) for i in range(5)]


def old(path, data, when=LONG_AGO):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    os.utime(path, ns=(when, when))
    return path


def photo(path, seed=0, when=LONG_AGO):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(path)
    os.utime(path, ns=(when, when))
    return path


class Reader:
    "Counts what it reads."
    def __init__(self): self.seen = []
    def __call__(self, path):
        self.seen.append(path.name)
        return path.stat().st_size


def reads(files, kind='size', **kwargs):
    "Names of the files that a pass reads, and what it gives."
    reader = Reader()
    values = remembered(kind, files, reader, **kwargs)
    return sorted(reader.seen), values


def test_a_second_pass_reads_nothing(files):
    assert reads(files) == (['0.txt', '1.txt', '2.txt', '3.txt', '4.txt'], [0, 1, 2, 3, 4])
    assert reads(files) == ([], [0, 1, 2, 3, 4])
    assert reads(files[::-1]) == ([], [4, 3, 2, 1, 0])
    assert reads(files, 'another kind')[0] != []


def test_a_path_is_the_same_however_it_is_written(files, tmp_path, monkeypatch):
    reads(files)
    monkeypatch.chdir(tmp_path)
    assert reads([o.relative_to(tmp_path) for o in files])[0] == []


@pytest.mark.parametrize('data,when', [(b'yy', LONG_AGO + 1), (b'yyy', LONG_AGO)])
def test_a_change_of_size_or_time_is_noticed(files, data, when):
    reads(files)
    old(files[2], data, when)
    assert reads(files) == (['2.txt'], [0, 1, len(data), 3, 4])
    assert reads(files)[0] == []


def test_a_file_written_a_moment_ago_is_not_trusted(files):
    files[2].write_bytes(b'abc')
    for _ in range(2): assert '2.txt' in reads(files)[0]


def test_a_file_from_the_future_is_not_trusted(files):
    os.utime(files[2], ns=(4*10**18, 4*10**18))
    for _ in range(2): assert '2.txt' in reads(files)[0]


def test_a_file_that_is_gone_is_asked_about_again(files):
    files[2].unlink()
    asked = []
    for _ in range(2): remembered('exists', files, lambda o: asked.append(o.name) or o.exists())
    assert sorted(asked) == ['0.txt', '1.txt', '2.txt', '2.txt', '3.txt', '4.txt']


def test_names_that_are_no_utf8(tmp_path):
    name = os.fsdecode(b'\xff\xfe.txt')
    try: path = old(tmp_path/name, b'abc')
    except (OSError, UnicodeError): pytest.skip('this file system takes UTF-8 names only')
    assert reads([path]) == ([name], [3])
    assert reads([path]) == ([], [3])


def test_order_and_progress(files):
    told = []
    assert reads(files, progress=lambda done, n: told.append((done, n)))[1] == [0, 1, 2, 3, 4]
    assert told[-1] == (5, 5)
    assert reads(files*3)[1] == [0, 1, 2, 3, 4]*3


# --- the store ---

STORE = 'files-1.sqlite'


def spoil(where, how):
    where.mkdir(parents=True, exist_ok=True)
    file = where/STORE
    if how == 'noise': file.write_bytes(np.random.default_rng(0).bytes(5000))
    if how == 'text': file.write_text('hello')
    if how == 'cut': file.write_bytes(file.read_bytes()[:6000])
    if how == 'other schema':
        file.unlink(missing_ok=True)
        db = sqlite3.connect(file)
        db.execute('CREATE TABLE facts (name TEXT)')
        db.close()
    if how == 'folder':
        file.unlink(missing_ok=True)
        file.mkdir()
    if how == 'values':
        db = sqlite3.connect(file)
        db.execute("UPDATE facts SET value='{'")
        db.commit()
        db.close()


@pytest.mark.parametrize('how', ['noise', 'text', 'cut', 'other schema', 'folder', 'values'])
def test_a_store_that_is_damaged_never_matters(files, cache, how):
    many = files + [old(files[0].parent/f'more{i}.txt', b'z') for i in range(200)]
    want = reads(many)[1]
    spoil(cache, how)
    for _ in range(2): assert reads(many)[1] == want
    if how not in ('folder', 'other schema'): assert reads(many)[0] == []


def test_a_cache_that_cannot_be_made(files, tmp_path, monkeypatch):
    (tmp_path/'file').write_text('')
    monkeypatch.setenv('DEEP_STUDIO_CACHE', str(tmp_path/'file'/'below'))
    for _ in range(2): assert reads(files) == (['0.txt', '1.txt', '2.txt', '3.txt', '4.txt'], [0, 1, 2, 3, 4])


def test_no_sqlite_at_all(files, monkeypatch):
    monkeypatch.setitem(sys.modules, 'sqlite3', None)
    for _ in range(2): assert reads(files)[1] == [0, 1, 2, 3, 4]


def test_a_store_that_somebody_else_locks(files, cache):
    reads(files[:2])
    other = sqlite3.connect(cache/STORE, isolation_level=None)
    other.execute('BEGIN EXCLUSIVE')
    assert reads(files)[1] == [0, 1, 2, 3, 4]
    other.execute('ROLLBACK')
    other.close()
    assert reads(files)[0] == ['2.txt', '3.txt', '4.txt']
    assert reads(files)[0] == []


LIMITED = """
import resource, signal, sys
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
from deep_studio_nb.data.bad_files import remembered
files = sorted(Path(sys.argv[1]).iterdir())
for _ in range(2): print(remembered('size', files, lambda o: o.stat().st_size))
"""


@pytest.mark.skipif(os.name != 'posix', reason='needs a limit on file sizes')
def test_a_full_disk_never_matters(files):
    done = subprocess.run([sys.executable, '-c', LIMITED, str(files[0].parent)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ['[0, 1, 2, 3, 4]']*2


WRITER = """
import sys
from pathlib import Path
from deep_studio_nb.data.bad_files import remembered
files = sorted(Path(sys.argv[1]).iterdir(), key=lambda o: int(o.stem))
print('ready', flush=True)
sys.stdin.readline()
for _ in range(int(sys.argv[2])):
    for k in range(0, len(files), 20):
        some = files[k:k+20]
        assert remembered('stem', some, lambda o: int(o.stem), n_threads=2) == [int(o.stem) for o in some]
        print(k, flush=True)
"""


def writers(folder, n, rounds):
    return [subprocess.Popen([sys.executable, '-c', WRITER, str(folder), str(rounds)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(n)]


def test_processes_that_write_at_once(tmp_path):
    many = [old(tmp_path/'many'/f'{i}.txt', b'') for i in range(200)]
    both = writers(tmp_path/'many', 2, 1)
    for o in both: assert o.stdout.readline() == 'ready\n'
    for o in both:
        o.stdin.write('go\n')
        o.stdin.flush()
    for o in both: assert o.wait() == 0, o.communicate()[1]
    asked = []
    assert remembered('stem', many, lambda o: asked.append(o) or int(o.stem)) == list(range(200))
    assert asked == []


@pytest.mark.skipif(os.name != 'posix', reason='needs SIGKILL')
def test_a_process_killed_while_it_writes_leaves_a_good_store(tmp_path):
    many = [old(tmp_path/'many'/f'{i}.txt', b'') for i in range(200)]
    for after in (1, 4, 7):
        [process] = writers(tmp_path/'many', 1, 1000)
        process.stdout.readline()
        process.stdin.write('go\n')
        process.stdin.flush()
        for _ in range(after): process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.communicate()
        asked = []
        assert remembered('stem', many, lambda o: asked.append(o) or int(o.stem)) == list(range(200))
        assert len(asked) <= 200 - 20*(after-1)
    assert remembered('stem', many, lambda o: asked.append('again') or int(o.stem)) == list(range(200)) and 'again' not in asked


def test_what_is_old_is_forgotten(files, monkeypatch):
    reads(files)
    today = bad_files._today()
    monkeypatch.setattr(bad_files, '_today', lambda: today + 200)
    assert reads(files[:1], 'another kind')[0] == ['0.txt']   # something new is computed, which clears up
    assert reads(files)[0] != []


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv('DEEP_STUDIO_CACHE')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'xdg'))
    assert cache_folder() == tmp_path/'xdg'/'deep_studio_nb'
    monkeypatch.setenv('DEEP_STUDIO_CACHE', '~/here')
    assert cache_folder().name == 'here' and '~' not in str(cache_folder())


# --- images ---

@pytest.fixture
def broken(tmp_path):
    "Class folders with good images, one cut and one that is a text."
    root = tmp_path/'사진'
    for k in range(6): photo(root/'ab'[k % 2]/f'{k}.png', k)
    data = (root/'a'/'0.png').read_bytes()
    old(root/'a'/'cut.png', data[:len(data)//2])
    old(root/'b'/'text.jpg', b'hello')
    return root


def test_bad_images_are_found_once(broken, monkeypatch):
    paths = sorted(broken.rglob('*.*'))
    found = find_bad(paths)
    assert [o.path.name for o in found] == ['cut.png', 'text.jpg']
    monkeypatch.setattr(bad_files, 'read_image', lambda *a, **k: pytest.fail('an image was decoded again'))
    assert find_bad(paths) == found


def test_a_file_that_was_mended_is_good_again(broken):
    paths = sorted(broken.rglob('*.*'))
    find_bad(paths)
    photo(broken/'a'/'cut.png', when=LONG_AGO + 5)
    assert [o.path.name for o in find_bad(paths)] == ['text.jpg']


def test_what_the_system_says_is_not_kept(broken, monkeypatch):
    from deep_studio_nb.data.samples import Unreadable
    path = broken/'a'/'0.png'

    def refused(path, **kwargs):
        e = Unreadable('no', path, 'no permission to read it')
        e.__cause__ = PermissionError(13, 'no')
        raise e
    with monkeypatch.context() as m:
        m.setattr(bad_files, 'read_image', refused)
        assert [o.reason for o in find_bad([path])] == ['no permission to read it']
    assert find_bad([path]) == []


def test_what_a_reader_met_is_remembered(broken, monkeypatch):
    remember_bad([BadFile(broken/'a'/'cut.png', 'it is damaged'), BadFile(broken/'a'/'gone.png', 'there is no such file')])
    monkeypatch.setattr(bad_files, 'read_image', lambda *a, **k: pytest.fail('decoded'))
    assert [o.reason for o in find_bad([broken/'a'/'cut.png'])] == ['it is damaged']


def test_a_file_that_vanishes_after_it_was_listed(broken):
    ds = ImageFolder(broken)
    (broken/'a'/'2.png').unlink()
    assert {o.path.name: o.reason for o in ds.check()}['2.png'] == 'there is no such file'
    assert len(ds) == 5
    assert ds.left_out['a/2.png'] == 'there is no such file'


def test_the_samples_do_not_depend_on_what_is_remembered(broken):
    "A large set starts unchecked, whatever an earlier pass knows: the order of a run that is resumed follows from the number of samples."
    def ids(limit):
        ds = ImageFolder(broken)
        ds.check(limit)
        return [ds.sample_id(i) for i in range(len(ds))]
    unchecked = ids(3)
    checked = ids(None)
    assert (len(unchecked), len(checked)) == (8, 6)
    assert ids(3) == unchecked
    assert ids(None) == checked


def test_hashes(files):
    first = file_hashes(files)
    assert len(set(first)) == 5
    assert file_hashes(files) == first
    with pytest.raises(DataError, match='gone.txt'): file_hashes([files[0], files[0].with_name('gone.txt')])
    assert file_hashes([files[0].with_name('gone.txt'), files[0]], on_bad='skip') == ['', first[0]]


# --- quarantine.csv ---

def test_the_list_of_bad_files(broken):
    paths = sorted(broken.rglob('*.*'))
    listing = write_quarantine(broken/'quarantine.csv', find_bad(paths), paths)
    rows = listing.read_text(encoding='utf-8').splitlines()
    assert rows[0] == 'path,reason' and rows[1].startswith('a/cut.png,it is damaged') and rows[2].startswith('b/text.jpg,')
    before = listing.stat().st_mtime_ns
    write_quarantine(listing, find_bad(paths), paths)
    assert listing.stat().st_mtime_ns == before
    write_quarantine(listing, [], [broken/'a'/'cut.png'])   # it was mended; the other was not looked at
    assert [o.path.name for o in read_quarantine(listing)] == ['text.jpg']


def test_the_list_is_no_class_and_no_image(broken):
    write_quarantine(broken/'quarantine.csv', [BadFile(broken/'a'/'cut.png', 'x')])
    assert ImageFolder(broken).classes == ['a', 'b']


@pytest.mark.parametrize('text', ['', 'x', 'path;reason\na;b\n', 'path,reason\nonly\n', '\ufeffpath,reason\r\na.png,"two\nlines"\r\n'])
def test_a_list_that_somebody_edited(tmp_path, text):
    (tmp_path/'q.csv').write_bytes(text.encode())
    kept = read_quarantine(tmp_path/'q.csv')
    assert [o.reason for o in kept] == (['two\nlines'] if 'two' in text else [])
    write_quarantine(tmp_path/'q.csv', [BadFile(tmp_path/'b.png', 'cut, and "quoted"')], [tmp_path/'b.png'])
    assert [o.path.name for o in read_quarantine(tmp_path/'q.csv')] == ['a.png']*len(kept) + ['b.png']


def test_a_list_that_cannot_be_written(tmp_path):
    (tmp_path/'q.csv').mkdir()
    assert write_quarantine(tmp_path/'q.csv', [BadFile(tmp_path/'b.png', 'x')]) is None
    (tmp_path/'cp949.csv').write_bytes('path,reason\n개.png,이유\n'.encode('cp949'))
    assert write_quarantine(tmp_path/'cp949.csv', [BadFile(tmp_path/'b.png', 'x')], []) is None
