"The journal of labels: two writers, killed writers, full disks, hands that edit it; every kind of data follows it."
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from deep_studio_nb.common.errors import DataError, RunError
from deep_studio_nb.data import label_journal
from deep_studio_nb.data.corrections import drop_sample, find_sample, relabel_sample, replay_edits, undo_edit
from deep_studio_nb.data.image_folder import ImageFolder
from deep_studio_nb.data.label_journal import LabelJournal
from deep_studio_nb.data.loaders import BaseDataLoader
from deep_studio_nb.data.tensors import Tensors

A, B = (hashlib.sha256(o).hexdigest() for o in (b'a', b'b'))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('DEEP_STUDIO_CACHE', str(tmp_path/'cache'))


@pytest.fixture
def journal(tmp_path):
    return LabelJournal(tmp_path/'labels_journal.jsonl')


def line(**o):
    if 'was' in o: o['from'] = o.pop('was')
    return json.dumps(o, ensure_ascii=False) + '\n'


# --- writing: races, kills, full disks ---

WRITER = """
import hashlib, sys
from deep_studio_nb.data.label_journal import LabelJournal
journal, name = LabelJournal(sys.argv[1]), sys.argv[2]
print('ready', flush=True)
sys.stdin.readline()
for i in range(int(sys.argv[3])):
    content = hashlib.sha256(f'{name}{i}'.encode()).hexdigest()
    print(journal.relabel(content, '개', was='고양이', id=f'{name}/{i}.jpg', note='long '*(i%50), by=name).entry, flush=True)
"""


def writer(journal, name, n):
    return subprocess.Popen([sys.executable, '-c', WRITER, str(journal.path), name, str(n)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def go(process):
    assert process.stdout.readline() == 'ready\n', process.communicate()[1]
    process.stdin.write('go\n')
    process.stdin.flush()


def test_two_processes_that_write_at_once_lose_nothing(journal):
    both = [writer(journal, o, 60) for o in ('min', 'ann')]
    for o in both: go(o)
    told = [o.communicate()[0].split() for o in both]
    assert [o.returncode for o in both] == [0, 0]
    entries = journal.entries()
    assert [len(o) for o in told] == [60, 60]
    for name, names in zip(('min', 'ann'), told): assert [o.entry for o in entries if o.by == name] == names


@pytest.mark.skipif(os.name != 'posix', reason='needs SIGKILL')
@pytest.mark.parametrize('after', [1, 5, 20])
def test_a_writer_that_is_killed_loses_nothing_that_it_confirmed(journal, after):
    process = writer(journal, 'min', 10_000)
    go(process)
    told = [process.stdout.readline().strip() for _ in range(after)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.communicate()
    assert [o.entry for o in journal.entries()][:after] == told
    last = journal.drop(A, by='ann')
    assert journal.entries()[-1].entry == last.entry


def test_half_a_line_at_the_end(journal, caplog):
    journal.relabel(A, '개', was='고양이', by='min')
    whole = journal.path.read_bytes()
    torn = line(entry='x', op='drop', content=B, note='글').encode()
    for n in range(1, len(torn)-1):   # cut anywhere, inside a letter of several bytes too
        journal.path.write_bytes(whole + torn[:n])
        with caplog.at_level(logging.WARNING, 'deep_studio_nb'): assert [o.op for o in journal.entries()] == ['relabel']
        assert 'not written to its end' in caplog.text
    journal.drop(B, by='min')
    assert journal.path.read_bytes().startswith(whole + b'{')
    assert [o.op for o in journal.entries()] == ['relabel', 'drop']


def test_an_editor_that_ends_without_a_new_line(journal):
    journal.path.write_bytes(line(entry='x', op='drop', content=B).encode().rstrip())
    journal.drop(A, by='min')
    assert [o.content for o in journal.entries()] == [B, A]


def test_a_line_that_is_cut_short_by_a_full_disk_is_taken_back(journal, monkeypatch):
    journal.drop(A, by='min')
    before, write = journal.path.read_bytes(), os.write
    monkeypatch.setattr(label_journal.os, 'write', lambda handle, data: write(handle, data[:10]))
    with pytest.raises(RunError, match='not kept.*No space left'): journal.drop(B, by='min')
    assert journal.path.read_bytes() == before


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from deep_studio_nb.data.label_journal import LabelJournal
journal = LabelJournal(sys.argv[1])
size = journal.path.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, size + 40))
try: journal.drop('0'*64, by='min')
except Exception as e: print(type(e).__name__, e)
"""


@pytest.mark.skipif(os.name != 'posix', reason='needs a limit on file sizes')
def test_a_disk_that_is_really_full(journal):
    journal.drop(A, by='min')
    before = journal.path.read_bytes()
    done = subprocess.run([sys.executable, '-c', FULL, str(journal.path)], capture_output=True, text=True)
    assert done.stdout.startswith('RunError The correction was not kept'), done.stdout + done.stderr
    assert journal.path.read_bytes() == before


def test_a_folder_that_takes_no_files(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(RunError, match='Give a `journal` in another folder'): LabelJournal(tmp_path/'file'/'j.jsonl').drop(A)


def test_a_journal_that_git_replaced_while_it_was_waited_for(journal, monkeypatch):
    journal.drop(A, by='min')
    lock, done = label_journal._lock, []

    def replaced(handle):
        lock(handle)
        if done: return
        done.append(1)
        new = journal.path.with_name('new')
        new.write_text(line(entry='theirs', op='drop', content=B))
        os.replace(new, journal.path)
    monkeypatch.setattr(label_journal, '_lock', replaced)
    mine = journal.drop(A, by='min')
    assert [o.entry for o in journal.entries()] == ['theirs', mine.entry]


def test_what_fails_leaves_no_trace(journal):
    journal.drop(A, by='min')
    before = journal.path.read_bytes()
    with pytest.raises(DataError): journal.undo('nothing')
    with pytest.raises(DataError): journal.drop(A, copies='two')
    assert journal.path.read_bytes() == before


# --- reading what hands have touched ---

GOOD = line(entry='one', op='relabel', content=A, id='고양이/1.jpg', was='고양이', to='개')
BAD = {
    'text': ('hello\n', 'not JSON'),
    'cut': (GOOD[:-20] + '\n', 'not JSON'),
    'list': ('[1, 2]\n', 'instead of an object'),
    'number': ('3\n', 'instead of an object'),
    'operation': (line(op='relable', content=B, to='개'), 'did you mean `relabel`'),
    'no operation': (line(content=B), '`op` is None'),
    'key': (line(op='drop', contnt=B), 'did you mean `content`'),
    'other key': (line(op='drop', content=B, colour='red'), 'key `colour`, which no line has'),
    'no content': (line(op='drop'), '64 hexadecimal'),
    'short content': (line(op='drop', content=B[:-1]), '64 hexadecimal'),
    'name as content': (line(op='drop', content='cat/1.jpg'), '64 hexadecimal'),
    'no label': (line(op='relabel', content=B), '`to` is None'),
    'label': (line(op='relabel', content=B, to={'a': 1}), '`to` is'),
    'number for text': (line(op='drop', content=B, note=3), '`note` is 3'),
    'copies': (line(op='drop', content=B, copies='both'), '`copies` is'),
    'undo of nothing': (line(op='undo'), '`undoes` is missing'),
    'undo of a stranger': (line(op='undo', undoes='two'), "takes back 'two'"),
    'twice': (GOOD, "same `entry` 'one' as line 1"),
    'key twice': ('{"op": "drop", "op": "undo"}\n', 'given twice'),
    'merge': ('<<<<<<< HEAD\n', 'unfinished'),
    'merge, middle': ('=======\n', 'unfinished'),
    'latin': ('{"note": "\udcb0"}\n', 'not UTF-8'),
    'conflict': (line(entry='two', op='relabel', content=A, was='고양이', to='여우'), 'line 1 had made it 개'),
}


@pytest.mark.parametrize('what', BAD)
def test_a_line_that_cannot_be_used_is_named(journal, what):
    text, why = BAD[what]
    journal.path.write_bytes((GOOD + '\r\n' + text).encode(errors='surrogateescape'))
    with pytest.raises(DataError) as e: journal.entries()
    assert 'line 3: ' in str(e.value) and why in str(e.value)
    before = journal.path.read_bytes()
    with pytest.raises(DataError): journal.drop(B, by='min')
    assert journal.path.read_bytes() == before


def test_all_problems_at_once(journal):
    journal.path.write_text('x\n'*8)
    with pytest.raises(DataError, match=r'(?s)line 1: .*line 5: .*and 3 more'): journal.entries()


def test_a_byte_order_mark_and_windows_line_ends(journal):
    journal.path.write_bytes(b'\xef\xbb\xbf' + GOOD.replace('\n', '\r\n').encode())
    assert [o.to for o in journal.entries()] == ['개']
    assert journal.drop(A, by='min').entry == journal.entries()[-1].entry


def test_undo_and_the_undo_of_an_undo(journal):
    first = journal.relabel(A, 'b', was='a', by='min')
    second = journal.relabel(A, 'c', by='min')
    assert second.was == 'b'
    def now(): return [o.to for o in journal.in_force()]
    undo = journal.undo(by='ann')
    assert now() == ['b']
    again = journal.undo(undo.entry, by='min')
    assert now() == ['b', 'c']
    journal.undo(again.entry, by='ann')
    assert now() == ['b']
    journal.undo(by='ann')
    assert now() == []
    with pytest.raises(DataError, match='nothing to take back'): journal.undo()
    with pytest.raises(DataError, match='already'): journal.undo(first.entry)
    assert len(journal.entries()) == 6
    assert [o['counts'] for o in journal.table()] == ['taken back', 'taken back', 'yes', 'taken back', 'yes', 'yes']


def test_a_conflict_is_settled_by_undoing_one_side(journal):
    journal.path.write_text(GOOD + BAD['conflict'][0])
    with pytest.raises(DataError): journal.in_force()
    journal.path.write_text(GOOD + BAD['conflict'][0] + line(entry='three', op='undo', undoes='two'))
    assert [o.to for o in journal.in_force()] == ['개']


# --- data that follows it ---

def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def photos(tmp_path):
    root = tmp_path/'사진'
    for k in range(8): picture(root/'train'/('고양이', '강아지')[k % 2]/f'{k}.png', k)
    for k in range(8, 12): picture(root/'valid'/('고양이', '강아지')[k % 2]/f'{k}.png', k)
    return root


def labels(ds):
    return {ds.sample_id(i): ds.classes[ds.targets()[i]] for i in range(len(ds))}


def files_of(root):
    return {o: (o.read_bytes(), o.stat().st_mtime_ns) for o in root.rglob('*.png')}


def test_relabel_and_drop_photos_without_touching_them(photos, caplog):
    before, ds = files_of(photos), ImageFolder(photos)
    plain = ds.fingerprint()
    was = labels(ds)
    i, j = (next(i for i in range(len(ds)) if ds.sample_id(i).endswith(o)) for o in ('/2.png', '/3.png'))
    entry = ds.relabel(i, '강아지', note='a dog after all', by='min')
    ds.drop(j, note='blurred', by='min')
    assert (entry.was, entry.to, entry.id) == ('고양이', '강아지', 'train/고양이/2.png')
    assert labels(ds) == was
    with caplog.at_level(logging.INFO, 'deep_studio_nb'): after = ImageFolder(photos)
    assert '1 labels are changed, 1 samples are left out' in caplog.text
    assert labels(after) == {k: '강아지' if k.endswith('/2.png') else v for k, v in was.items() if not k.endswith('/3.png')}
    assert after.left_out == {'train/강아지/3.png': 'dropped in the journal of labels: blurred'}
    assert after.fingerprint() != plain
    assert files_of(photos) == before
    undo_edit(after)
    undo_edit(after)
    assert ImageFolder(photos).fingerprint() == plain


def test_a_renamed_photo_is_known(photos):
    ds = ImageFolder(photos)
    ds.relabel(0, '고양이' if ds.classes[ds.targets()[0]] == '강아지' else '강아지')
    name, old = ds.sample_id(0), ds.classes[ds.targets()[0]]
    (photos/name).rename(photos/name.replace('.png', ' copy.png'))
    after = labels(ImageFolder(photos))
    assert after[name.replace('.png', ' copy.png')] != old


def test_other_splits_follow_too(photos):
    name = ImageFolder(photos).split('valid').sample_id(0)
    drop_sample(ImageFolder(photos), name.rpartition('/')[2], note='twice')
    valid = ImageFolder(photos).split('valid')
    assert (len(valid), list(valid.left_out)) == (3, [name])
    assert len(ImageFolder(photos)) == 8


def test_a_loader_that_holds_out_follows(photos):
    ds = ImageFolder(photos)
    ds.drop(0)
    loader = BaseDataLoader(ImageFolder(photos), 2, validation_split=0.25)
    assert len(loader.dataset) + len(loader.split_validation().dataset) == 7
    part = loader.split_validation().dataset   # a part of the data writes to the same journal
    part.drop(0)
    assert len(ImageFolder(photos)) == 6


def test_two_copies_of_one_photo(photos):
    (photos/'train/강아지/copy.png').write_bytes((photos/'train/고양이/2.png').read_bytes())
    ds = ImageFolder(photos)
    assert len(ds) == 9
    drop_sample(ds, 'copy.png', note='there twice', copies='this')
    assert len(ImageFolder(photos)) == 8 and labels(ImageFolder(photos))['train/고양이/2.png'] == '고양이'
    drop_sample(ImageFolder(photos), 'train/고양이/2.png')
    assert len(ImageFolder(photos)) == 7


def test_a_relabelled_copy_takes_its_twin_along(photos):
    (photos/'train/강아지/copy.png').write_bytes((photos/'train/고양이/2.png').read_bytes())
    relabel_sample(ImageFolder(photos), 'train/고양이/2.png', '강아지')
    assert {v for k, v in labels(ImageFolder(photos)).items() if k.endswith(('copy.png', '/2.png'))} == {'강아지'}


@pytest.mark.parametrize('to,why', [('강이지', 'did you mean `강아지`'), ('', 'no class'), (1, 'no class name'), (['강아지'], 'no class name'), (None, 'no class name')])
def test_a_label_that_cannot_be_meant(photos, to, why):
    with pytest.raises(DataError, match=why): ImageFolder(photos).relabel(0, to)
    assert not (photos/'labels_journal.jsonl').exists()


def test_a_class_that_is_gone_since(photos):
    ds = ImageFolder(photos)
    ds.relabel(0, '강아지' if ds.classes[ds.targets()[0]] == '고양이' else '고양이')
    to = LabelJournal(photos/'labels_journal.jsonl').entries()[0].to
    for split in ('train', 'valid'): (photos/split/to).rename(photos/split/(to + '들'))
    with pytest.raises(DataError, match=rf'line 1: there is no class `{to}`, did you mean `{to}들`'): ImageFolder(photos)
    assert len(ImageFolder(photos, journal='off')) == 8


def test_a_journal_elsewhere_and_none(photos, tmp_path, caplog):
    elsewhere = tmp_path/'fixes'/'mine.jsonl'
    with caplog.at_level(logging.WARNING, 'deep_studio_nb'): ds = ImageFolder(photos, journal=str(elsewhere))
    assert 'There is no journal of labels' in caplog.text
    ds.drop(0)
    assert elsewhere.exists() and not (photos/'labels_journal.jsonl').exists()
    assert (len(ImageFolder(photos, journal=str(elsewhere))), len(ImageFolder(photos)), len(ImageFolder(photos, journal='off'))) == (7, 8, 8)
    with pytest.raises(DataError, match='"off"'): ImageFolder(photos, journal='off').drop(0)


def test_a_broken_journal_stops_with_the_line(photos):
    (photos/'labels_journal.jsonl').write_text(GOOD + 'x\n')
    with pytest.raises(DataError, match='line 2: it is not JSON'): ImageFolder(photos)


def test_everything_dropped(photos):
    ds = ImageFolder(photos)
    for i in range(len(ds)): ds.drop(i)
    with pytest.raises(DataError, match='drops all 8 samples'): ImageFolder(photos)


def test_only_files_of_a_size_that_the_journal_names_are_read(photos, monkeypatch):
    ds = ImageFolder(photos)
    for k in range(20): (photos/'train/고양이'/f'large{k}.png').write_bytes((photos/'train/고양이/0.png').read_bytes() + b'\0'*(k + 1))
    ds.drop(0)
    read = []
    monkeypatch.setattr(ImageFolder, 'content_ids', lambda self, some=None: read.extend(some) or ['']*len(list(some)))
    ImageFolder(photos)
    assert 1 <= len(read) <= 8


def test_a_file_that_cannot_be_read_does_not_stop_the_journal(photos):
    ds = ImageFolder(photos)
    ds.drop(0)
    lost = photos/'train/고양이/lost.png'
    lost.symlink_to(photos/'nowhere.png')
    after = ImageFolder(photos)
    assert len(after) == 8 and 'train/고양이/lost.png' in [after.sample_id(i) for i in range(8)]


def test_finding_a_sample(photos):
    ds = ImageFolder(photos)
    part, i = find_sample(ds, str(photos/'valid/고양이/8.png'))
    assert part.sample_id(i) == 'valid/고양이/8.png'
    with pytest.raises(DataError, match='did you mean `valid/고양이/8.png`'): find_sample(ds, '8.pgn')
    (photos/'valid/고양이/2.png').write_bytes((photos/'valid/고양이/8.png').read_bytes())
    with pytest.raises(DataError, match='Give more of the path'): find_sample(ImageFolder(photos), '2.png')


def test_data_without_a_folder():
    with pytest.raises(DataError, match='comes from no folder'): Tensors(torch.zeros(2, 1), torch.tensor([0, 1]), ['a', 'b']).drop(0)


# --- other kinds ---

def test_rows_of_a_table(tmp_path):
    from deep_studio_nb.data.table import TableData
    file = tmp_path/'집.csv'
    file.write_text('rooms,town,kind\n' + ''.join(f'{k},{"서울" if k%2 else "부산"},{"house" if k%3 else "flat"}\n' for k in range(12)), encoding='utf-8')
    before = file.read_bytes()
    ds = TableData(str(file), target='kind')
    assert ds.classes == ['flat', 'house']
    was = ds.labels()
    entry = ds.relabel(1, 'flat' if was[1] == 'house' else 'house')
    ds.drop(4)
    assert entry.was == was[1]
    after = TableData(str(file), target='kind')
    assert len(after) == 11 and after.labels()[1] == entry.to and list(after.left_out) == [ds.sample_id(4)]
    file.write_text('rooms,town,kind\n' + ''.join(before.decode().splitlines(keepends=True)[:0:-1]), encoding='utf-8')   # the rows in another order
    turned = TableData(str(file), target='kind')
    assert len(turned) == 11 and turned.labels().count('flat') == after.labels().count('flat')
    with pytest.raises(DataError, match='no class'): ds.relabel(0, 'castle')


def test_numbers_in_their_own_unit(tmp_path):
    from deep_studio_nb.data.table import TableData
    file = tmp_path/'prices.csv'
    file.write_text('rooms,price\n' + ''.join(f'{k%7},{1000.5+100*k}\n' for k in range(30)))
    ds = TableData(str(file), target='price', task='number')
    entry = ds.relabel(3, 5000)
    assert entry.was == pytest.approx(1300.5)
    assert TableData(str(file), target='price', task='number').labels()[3] == pytest.approx(5000)
    assert relabel_sample(ds, ds.sample_id(5), '700').to == 700
    with pytest.raises(DataError, match='no number'): relabel_sample(ds, ds.sample_id(5), 'cheap')


def test_texts(tmp_path):
    from deep_studio_nb.data.text import TextFile
    file = tmp_path/'글.tsv'
    file.write_text('text\tlabel\n' + ''.join(f'말 {k} 마디\t{"ham" if k%2 else "spam"}\n' for k in range(10)), encoding='utf-8')
    ds = TextFile(str(file), 'text', 'label')
    entry = ds.relabel(0, 'ham')
    ds.drop(5)
    after = TextFile(str(file), 'text', 'label')
    assert entry.was == 'spam'
    assert (len(after), after.classes[int(after.targets()[0])]) == (9, 'ham')
    undo_edit(after, entry.entry)
    assert TextFile(str(file), 'text', 'label').classes[int(TextFile(str(file), 'text', 'label').targets()[0])] == 'spam'


def test_several_labels(tmp_path):
    from deep_studio_nb.data.image_list import ImageList
    for k in range(4): picture(tmp_path/f'{k}.png', k)
    (tmp_path/'list.csv').write_text('file,labels\n0.png,sky;sea\n1.png,sea\n2.png,sky\n3.png,sea;sky\n')
    make = lambda: ImageList(str(tmp_path/'list.csv'), target='labels', label_sep=';')
    ds = make()
    entry = relabel_sample(ds, '1.png', 'sky, sea')
    assert (entry.was, entry.to) == (['sea'], ['sky', 'sea'])
    after = make()
    assert torch.as_tensor(after.targets()[1]).sum() == 2
    with pytest.raises(DataError, match='no class `se`'): ds.relabel(0, ['se'])
    with pytest.raises(DataError, match='no list of class names'): ds.relabel(0, 'sea')


def test_masks_can_be_dropped_and_not_relabelled(tmp_path):
    from deep_studio_nb.data.image_masks import ImageMasks
    for k in range(4):
        picture(tmp_path/'images'/f'{k}.png', k)
        mask = np.zeros((9, 9), np.uint8)
        mask[:, :k + 1] = 1
        (tmp_path/'masks').mkdir(exist_ok=True)
        Image.fromarray(mask).save(tmp_path/'masks'/f'{k}.png')
    ds = ImageMasks(str(tmp_path))
    with pytest.raises(DataError, match='targets of `ImageMasks` are files'): ds.relabel(0, '1')
    ds.drop(0)
    assert len(ImageMasks(str(tmp_path))) == 3


def test_replay_without_a_journal_hashes_nothing(photos):
    class Silent(ImageFolder):
        def content_ids(self, indices=None): pytest.fail('hashed')
        def content_id(self, i): pytest.fail('hashed')
    assert not replay_edits(Silent(photos), None, photos)
