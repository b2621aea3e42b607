"Images from lists, arrays and named sets: what people have, and what is wrong with it."
import gzip
import hashlib
import io
import logging
import pickle
import shutil
import struct
import subprocess
import sys
import unicodedata
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torchvision import datasets

from deep_studio_nb.common.errors import DataError
from deep_studio_nb.common.registry import DATASETS
from deep_studio_nb.data import arrays
from deep_studio_nb.data.array_files import read_array
from deep_studio_nb.data.arrays import Arrays
from deep_studio_nb.data.image_dataset import ImageDataset
from deep_studio_nb.data.image_folder import ImageFolder
from deep_studio_nb.data.image_list import ImageList
from deep_studio_nb.data.loaders import BaseDataLoader
from deep_studio_nb.data.named_files import DTD, Flowers102, OxfordIIITPet
from deep_studio_nb.data.named_sets import CIFAR10, MNIST, STL10, SVHN, FashionMNIST
from deep_studio_nb.data.named_sources import NamedSource, wanted_files
from deep_studio_nb.data.transforms import build_transforms


def draw(path, seed=0, size=(12, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def photos(tmp_path):
    for i in range(8): draw(tmp_path/f'photos/{i}.png', i)
    return tmp_path


def listed(root, text, name='list.csv', encoding='utf-8', **args):
    (root/name).write_bytes(text.encode(encoding))
    return ImageList(root/name, **args)


def rows(labels='abababab'): return 'image,label\n' + ''.join(f'photos/{i}.png,{o}\n' for i, o in enumerate(labels))


# ---- lists of images: how they are written

@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'cp949', 'utf-16'])
@pytest.mark.parametrize('sep', [',', '\t', ';'])
def test_encodings_and_separators(photos, encoding, sep):
    ds = listed(photos, rows(['고양이', '강아지']*4).replace(',', sep), encoding=encoding)
    assert (ds.classes, ds.targets()) == (['강아지', '고양이'], [1, 0]*4)


def test_quotes_and_newlines_in_cells(photos):
    draw(photos/'photos/a, b.png')
    ds = listed(photos, 'image,note,label\nphotos/0.png,"two\nlines, ""quoted""",a\n"photos/a, b.png",x,b\n')
    assert ([ds.sample_id(i) for i in range(2)], ds.lines) == (['photos/0.png', 'photos/a, b.png'], [2, 4])
    assert ds.column('note')[0] == 'two\nlines, "quoted"'


def test_a_wrong_encoding_is_named(photos):
    listed(photos, rows(['고양이', '강아지']*4), encoding='cp949')
    with pytest.raises(DataError, match='(?i)line 2'): ImageList(photos/'list.csv', encoding='utf-8')


def test_a_duplicated_header(photos):
    with pytest.raises(DataError, match='names `label` twice'): listed(photos, 'image,label,label\nphotos/0.png,a,b\n')


def test_a_ragged_row(photos):
    with pytest.raises(DataError, match='line 3'): listed(photos, 'image,label\nphotos/0.png,a\nphotos/1.png,b,c\n')


@pytest.mark.parametrize('text', ['', 'image,label\n', '\n\n'])
def test_nothing_in_the_list(photos, text):
    with pytest.raises(DataError, match='empty|no rows|blank'): listed(photos, text)


def test_a_list_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match='not there'): ImageList(tmp_path/'none.csv')


def test_a_missing_column(photos):
    with pytest.raises(DataError, match='did you mean `label`'): listed(photos, rows(), target='labels_')
    with pytest.raises(DataError, match='no column `file`'): listed(photos, rows(), path='file')
    with pytest.raises(DataError, match='no column `part`'): listed(photos, rows(), split_column='part')


def test_parquet_and_frames(photos):
    frame = pd.DataFrame(dict(image=[f'photos/{i}.png' for i in range(4)], label=[1, 2, 1, 2]))
    frame.to_parquet(photos/'list.parquet')
    a, b = ImageList(photos/'list.parquet'), ImageList(frame, data_dir=photos)
    assert a.classes == b.classes == ['1', '2']
    assert a.fingerprint() == b.fingerprint() == ImageList(photos/'list.parquet').fingerprint()
    frame['label'] = [1, None, 1, 2]
    with pytest.raises(DataError, match='row 2 of the data frame has no label'): ImageList(frame, data_dir=photos)
    assert ImageList(frame.drop(index=1), data_dir=photos).classes == ['1', '2']   # floats because of what was missing


# ---- labels

def test_classes_in_natural_order_or_as_given(photos):
    assert listed(photos, rows(['10', '9', '1', '9', '10', '1', '1', '9'])).classes == ['1', '9', '10']
    ds = listed(photos, rows('abababab'), classes=['b', 'c', 'a'])
    assert (ds.classes, ds.targets()[:2], ds.facts()['class_counts']) == (['b', 'c', 'a'], [2, 0], [4, 0, 4])


def test_a_label_unseen_in_training(photos):
    with pytest.raises(DataError, match='line 9 of `list.csv` has the label `c`, which training does not know'): listed(photos, rows('abababac'), classes=['a', 'b'])
    (photos/'valid.csv').write_text('image,label\nphotos/7.png,b\nphotos/6.png,z\n')
    ds = listed(photos, rows('ababab'), valid_file=photos/'valid.csv')
    with pytest.raises(DataError, match='line 3 of `valid.csv` has the label `z`, which training does not know'): ds.split('valid')


def test_words_that_look_like_nothing_are_labels(photos):
    assert listed(photos, rows(['none', 'NA', 'null', 'nan']*2)).classes == ['NA', 'nan', 'none', 'null']


def test_several_labels(photos):
    ds = listed(photos, rows(['cat;dog', 'dog', '', 'cat; cow ', 'dog', 'cow', '', 'cat']), label_sep=';')
    assert (ds.classes, ds.targets()[3].tolist(), ds.facts()['class_counts'], ds.facts()['task']) == (['cat', 'cow', 'dog'], [1, 1, 0], [3, 2, 3], 'labels')
    x, y = next(iter(BaseDataLoader(ds, 8, shuffle=False)))
    assert (y.shape, y.dtype, y[2].tolist(), ds.target_name(y[2]), ds.target_name(y[3])) == ((8, 3), torch.float32, [0, 0, 0], 'none', 'cat, cow')
    assert BaseDataLoader(ds, 4).show_batch(4) is not None
    held = BaseDataLoader(ds, 4, validation_split=0.25)
    assert (len(held.dataset), len(held.split_validation().dataset)) == (6, 2)


def test_one_hot_columns(photos):
    text = 'image,cat,dog\n' + ''.join(f'photos/{i}.png,{i%2},{1-i%2}\n' for i in range(4))
    ds = listed(photos, text, target=['cat', 'dog'])
    assert (ds.classes, ds.targets(), ds.facts()['task']) == (['cat', 'dog'], [1, 0, 1, 0], 'classes')
    assert listed(photos, text, target=['cat', 'dog'], task='labels').facts()['class_counts'] == [2, 2]
    assert listed(photos, text).classes == ['cat', 'dog']   # what is left is all zeros and ones
    with pytest.raises(DataError, match="line 2 of `list.csv` holds '2' in `cat`"): listed(photos, text.replace('0.png,0', '0.png,2'), target=['cat', 'dog'])
    with pytest.raises(DataError, match='line 2 of `list.csv` has 0 classes'): listed(photos, text.replace('0.png,0,1', '0.png,0,0'), target=['cat', 'dog'], task='classes')


def test_a_number_as_target(photos):
    ds = listed(photos, rows([f'{i}.5' for i in range(8)]), task='number')
    x, y = next(iter(BaseDataLoader(ds, 8, shuffle=False)))
    assert (y.shape, y[2].item(), ds.classes, ds.facts()['target_mean']) == ((8, 1), 2.5, None, [4.])
    loader = BaseDataLoader(ds, 4, validation_split=0.5)
    assert loader.facts()['target_mean'] == [pytest.approx(loader.dataset.targets().mean().item())]
    with pytest.raises(DataError, match="line 4 of `list.csv` holds 'many'"): listed(photos, rows(['1', '2', 'many', '4', '5', '6', '7', '8']), task='number')
    with pytest.raises(DataError, match="'inf'"): listed(photos, rows(['1', 'inf', '3', '4', '5', '6', '7', '8']), task='number')


def test_mixed_types_in_the_label_column(photos):
    "Text is text: what reads as a number in one line and as a word in the next is a class all the same."
    assert listed(photos, rows(['1', 'two', '3.0', '1', 'two', '1', '1', '1'])).classes == ['1', '3.0', 'two']


# ---- files of a list

def test_files_that_are_not_there(photos, caplog):
    text = rows() + 'photos/90.png,a\nphotos/91.png,b\n'
    with caplog.at_level(logging.WARNING, 'deep_studio_nb'): ds = listed(photos, text)
    assert 'line 10 of `list.csv` (and 1 more, such as 11) names `photos/90.png`' in caplog.text
    assert (len(ds), list(ds.left_out)) == (8, ['photos/90.png', 'photos/91.png'])
    with pytest.raises(DataError, match='line 10.*2 of 10 are missing'): listed(photos, text, on_bad='raise')
    with pytest.raises(DataError, match='8 of 8 are missing'): listed(photos, rows(), data_dir=photos/'photos')
    with pytest.raises(DataError, match='which is not there'): listed(photos, rows(), data_dir=photos/'nowhere')


def test_a_path_twice(photos):
    with pytest.raises(DataError, match='line 10 of `list.csv` names `photos/3.png` again, which is in line 5'): listed(photos, rows()+'photos/3.png,b\n')
    with pytest.raises(DataError, match='again'): listed(photos, rows()+'photos/../photos/3.png,b\n')
    text = 'image,label,part\nphotos/0.png,a,train\nphotos/1.png,b,train\nphotos/0.png,a,test\n'
    with pytest.raises(DataError, match='line 4 of `list.csv` names `photos/0.png` again'): listed(photos, text, split_column='part')


def test_decomposed_names_and_backslashes(photos):
    draw(photos/unicodedata.normalize('NFD', '사진')/'강.png')
    draw(photos/'사진 2'/unicodedata.normalize('NFD', '산.png'))
    ds = listed(photos, 'image,label\n사진\\강.png,a\n사진 2/산.png,b\n')
    assert ([ds.sample_id(i) for i in range(2)], ds[1][0].shape) == (['사진/강.png', '사진 2/산.png'], (3, 8, 12))


def test_bad_files_of_a_list(photos):
    (photos/'photos/0.png').write_bytes(b'')
    (photos/'photos/1.png').write_text('no image')
    ds = listed(photos, rows())
    assert [o.path.name for o in ds.check()] == ['0.png', '1.png']
    assert (len(ds), ds.lines, ds.left_out['photos/0.png']) == (6, [4, 5, 6, 7, 8, 9], 'it is empty (0 bytes)')
    assert ds.column('label') == list('ababab')


def test_splits_of_a_list(photos):
    text = 'image,label,part\n' + ''.join(f'photos/{i}.png,{"ab"[i%2]},{p}\n' for i, p in enumerate('Train train train train val dev test testing'.split()))
    ds = listed(photos, text, split_column='part')
    assert [len(ds), len(ds.split('valid')), len(ds.split('test'))] == [4, 2, 2]
    loader = BaseDataLoader(ds, 2)
    assert (len(loader.split_validation().dataset), loader.split_test().dataset.sample_id(1)) == (2, 'photos/7.png')
    with pytest.raises(DataError, match="line 3 of `list.csv` has 'later' in `part`"): listed(photos, text.replace('1.png,b,train', '1.png,b,later'), split_column='part')
    with pytest.raises(DataError, match="has '' in `part`"): listed(photos, text.replace('1.png,b,train', '1.png,b,'), split_column='part')
    only = listed(photos, text.replace('rain', 'est'), split_column='part', split='test', classes=['a', 'b'])
    assert len(only) == 6


def test_groups_of_a_list_stay_together(photos):
    text = 'image,label,patient\n' + ''.join(f'photos/{i}.png,{"ab"[i%2]},p{i//2}\n' for i in range(8))
    loader = BaseDataLoader(listed(photos, text, target='label'), 2, validation_split=0.25, by='group', groups='patient')
    held = loader.split_validation().dataset
    assert set(held.column('patient')).isdisjoint(loader.dataset.column('patient'))


def test_the_same_images_have_the_same_names_in_folders_and_lists(tmp_path):
    for i in range(3): draw(tmp_path/f'train/a/{i}.png', i)
    folder = ImageFolder(tmp_path)
    ds = listed(tmp_path, 'image,label\n' + ''.join(f'train/a/{i}.png,a\n' for i in range(3)))
    assert [ds.sample_id(i) for i in range(3)] == [folder.sample_id(i) for i in range(3)]
    assert ds.content_ids() == folder.content_ids()


def test_a_config_builds_a_list(photos):
    listed(photos, rows())
    ds = DATASETS.build(dict(type='ImageList', args=dict(file=str(photos/'list.csv'), target='label')))
    assert len(ds) == 8


def test_a_long_list_in_bounded_memory(tmp_path):
    "A hundred thousand lines are read, and every folder is listed once, before the first image would be opened."
    script = f'''
import resource
from pathlib import Path
from deep_studio_nb.data.image_list import ImageList
root = Path({str(tmp_path)!r})
(root/'a').mkdir()
for i in range(100): (root/f'a/{{i}}.jpg').touch()
with open(root/'l.csv', 'w') as f:
    f.write('image,label\\n')
    f.writelines(f'a/{{i}}.jpg,{{i%7}}\\n' for i in range(100_000))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try: ImageList(root/'l.csv', mode='RGB')
except Exception as e: print(type(e).__name__, str(e)[:60])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before)/1024)
'''
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True)
    said, took = done.stdout.splitlines()
    assert said.startswith('DataError line 102') and float(took) < 150   # megabytes


# ---- the journal

@pytest.mark.parametrize('kind', ['folder', 'list', 'files'])
def test_labels_follow_the_journal(tmp_path, kind):
    for i in range(4): draw(tmp_path/f'{"ab"[i%2]}/{i}.png', i)
    (tmp_path/'list.csv').write_text('image,label\n' + ''.join(f'{"ab"[i%2]}/{i}.png,{"ab"[i%2]}\n' for i in range(4)))
    def make():
        if kind == 'folder': return ImageFolder(tmp_path)
        if kind == 'list': return ImageList(tmp_path/'list.csv')
        return ImageDataset([tmp_path/f'{"ab"[i%2]}/{i}.png' for i in range(4)], [0, 1, 0, 1], ['a', 'b'], tmp_path)
    ds = make()
    names = [ds.sample_id(i) for i in range(4)]
    ds.relabel(names.index('a/0.png'), 'b')
    ds.drop(names.index('b/3.png'), note='blurred')
    now = make()
    assert {now.sample_id(i): now.classes[y] for i, y in enumerate(now.targets())} == {'a/0.png': 'b', 'a/2.png': 'a', 'b/1.png': 'b'}
    assert 'blurred' in now.left_out['b/3.png']
    assert now.fingerprint() != ds.fingerprint()
    shutil.move(tmp_path/'a/0.png', tmp_path/'a/renamed.png')   # by content, not by name
    if kind == 'folder': assert make().classes[make().targets()[make().files.index(tmp_path/'a/renamed.png')]] == 'b'
    assert all((tmp_path/o).exists() for o in ('a/2.png', 'b/3.png'))


def test_several_labels_and_numbers_follow_the_journal(photos):
    ds = listed(photos, rows(['x|y', 'x', '', 'y']*2), label_sep='|')
    ds.relabel(1, ['y', 'x'])
    ds.relabel(0, [])
    assert [ImageList(photos/'list.csv', label_sep='|').targets()[i].tolist() for i in (0, 1)] == [[0, 0], [1, 1]]
    with pytest.raises(DataError, match='no class `z`'): ds.relabel(2, ['z'])
    (photos/'labels_journal.jsonl').unlink()
    ages = listed(photos, rows([f'{i}.5' for i in range(8)]), task='number')
    ages.relabel(3, 7.25)
    assert listed(photos, rows([f'{i}.5' for i in range(8)]), task='number').targets()[3].item() == 7.25


def test_arrays_and_named_sets_follow_the_journal(tmp_path):
    x = np.arange(5*6).reshape(5, 6).astype('f4')
    np.savez(tmp_path/'a.npz', x=x, y=np.array(['cat', 'dog', 'cat', 'dog', 'dog']))
    ds = Arrays(tmp_path/'a.npz')
    ds.relabel(2, 'dog')
    ds.drop(0)
    now = Arrays(tmp_path/'a.npz')
    assert (now.x[:, 0].tolist(), now.y.tolist(), [now.sample_id(i) for i in range(4)], list(now.left_out)) == ([6, 12, 18, 24], [1, 1, 1, 1], ['1', '2', '3', '4'], ['0'])
    assert len(Arrays(tmp_path/'a.npz', journal='off')) == 5
    again = pickle.loads(pickle.dumps(now))
    assert torch.equal(again.x, now.x)


# ---- arrays

def test_arrays_in_a_loader(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path/'a.npz', x_train=x, y_train=np.arange(40)%4, x_test=x[:8], y_test=np.arange(8)%4)
    ds = Arrays(tmp_path/'a.npz')
    loader = BaseDataLoader(ds, 8, validation_split=0.25)
    xb, yb = next(iter(loader))
    assert (xb.shape, xb.dtype, loader.num_workers in (0, 'auto')) == ((8, 3, 8, 8), torch.float32, True)
    assert len(loader.split_test().dataset) == 8
    assert (sorted(loader.facts()['class_counts']), loader.facts()['mode']) == ([7, 7, 8, 8], 'RGB')
    flipped = ds.with_transforms(build_transforms(dict(train=['RandomHorizontalFlip']), 'image'))
    xb, yb = next(iter(BaseDataLoader(flipped, 40, shuffle=False)))
    want = torch.from_numpy(x).permute(0, 3, 1, 2)/255
    same = (xb == want).flatten(1).all(1) | (xb == want.flip(3)).flatten(1).all(1)
    assert same.all() and 5 < (xb == want).flatten(1).all(1).sum() < 35


def test_mapped_and_read_arrays_give_the_same(tmp_path, monkeypatch):
    x, y = np.random.default_rng(0).standard_normal((50, 7)), np.arange(50)%3
    np.savez(tmp_path/'a.npz', x=x, y=y)
    read = Arrays(tmp_path/'a.npz')
    monkeypatch.setattr(arrays, 'read_array', lambda files, name: read_array(files, name, 0))
    mapped = Arrays(tmp_path/'a.npz')
    i = torch.tensor([3, 49, 0])
    assert torch.equal(read.gather(i)[0], mapped.gather(i)[0]) and torch.equal(read.gather(i)[1], mapped.gather(i)[1])
    assert read.fingerprint() == mapped.fingerprint() and mapped.gather(i)[0].dtype == torch.float32


def test_pickles_are_never_read(tmp_path):
    class Bomb:
        def __reduce__(self): return open, (str(tmp_path/'ran'), 'w')
    np.save(tmp_path/'x.npy', np.array([Bomb(), 1], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match='unpickled'): Arrays(tmp_path/'x.npy')
    np.savez(tmp_path/'a.npz', x=np.zeros((2, 2)), y=np.array([Bomb(), 1], dtype=object))
    with pytest.raises(DataError, match='unpickled'): Arrays(tmp_path/'a.npz')
    assert not (tmp_path/'ran').exists()
    with pytest.raises(Exception, match='allow_pickle'): DATASETS.build(dict(type='Arrays', args=dict(file=str(tmp_path/'a.npz'), allow_pickle=True)))


def test_a_compressed_array_that_is_damaged(tmp_path):
    np.savez_compressed(tmp_path/'a.npz', x=np.random.default_rng(0).standard_normal((500, 8)))
    data = bytearray((tmp_path/'a.npz').read_bytes())
    data[len(data)//2] ^= 255
    (tmp_path/'a.npz').write_bytes(data)
    with pytest.raises(DataError, match='damaged|cannot be read'): Arrays(tmp_path/'a.npz')


def test_a_compressed_array_larger_than_memory(tmp_path):
    "The header claims a petabyte; nothing may be allocated for it."
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, dict(descr='<f8', fortran_order=False, shape=(1 << 47,)))
    with zipfile.ZipFile(tmp_path/'a.npz', 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('x.npy', head.getvalue()+bytes(100))
    with pytest.raises(DataError, match='cut off'): Arrays(tmp_path/'a.npz')


@pytest.mark.parametrize('y,classes,coded', [
    ([1, 2, 3, 1], ['1', '2', '3'], [0, 1, 2, 0]), ([-1, 1, 1, -1], ['-1', '1'], [0, 1, 1, 0]), ([True, False, True, True], ['False', 'True'], [1, 0, 1, 1]),
    (['나', '가', '나', '가'], ['가', '나'], [1, 0, 1, 0]), ([[1, 0], [0, 1], [1, 0], [1, 0]], ['0', '1'], [0, 1, 0, 0]), ([[7], [8], [7], [7]], ['7', '8'], [0, 1, 0, 0])])
def test_labels_of_arrays(tmp_path, y, classes, coded):
    np.savez(tmp_path/'a.npz', x=np.zeros((4, 2)), y=np.array(y))
    ds = Arrays(tmp_path/'a.npz')
    assert (ds.classes, ds.y.tolist(), ds.facts()['task']) == (classes, coded, 'classes')


def test_arrays_in_a_spawned_worker(tmp_path):
    np.savez(tmp_path/'a.npz', x=np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8), y=np.arange(12)%2)
    ds = Arrays(tmp_path/'a.npz')
    loader = torch.utils.data.DataLoader(ds, 4, num_workers=1, multiprocessing_context='spawn')
    assert torch.equal(torch.cat([x for x, _ in loader]), ds.gather(torch.arange(12))[0])


# ---- named sets

def idx(a): return b'\0\0\x08' + bytes([a.dim()]) + struct.pack(f'>{a.dim()}I', *a.shape) + a.numpy().tobytes()


def mnist(where, n=10, packed=True):
    where.mkdir(parents=True)
    for part in ('train', 't10k'):
        for what, a in (('images-idx3', torch.arange(n*784).view(n, 28, 28).to(torch.uint8)), ('labels-idx1', (torch.arange(n)%10).to(torch.uint8))):
            (where/f'{part}-{what}-ubyte{".gz"*packed}').write_bytes(gzip.compress(idx(a)) if packed else idx(a))


@pytest.mark.parametrize('place', ['MNIST/raw', 'MNIST', 'raw', '.'])
@pytest.mark.parametrize('packed', [True, False])
def test_mnist_where_people_put_it(tmp_path, place, packed):
    mnist(tmp_path/'data'/place if place != '.' else tmp_path/'data', packed=packed)
    ds = MNIST(str(tmp_path/'data'), download=False)
    assert (len(ds), ds.classes[3], len(ds.split('test')), ds.x.dtype) == (10, '3', 10, torch.uint8)


def test_mnist_equals_torchvision(tmp_path):
    mnist(tmp_path/'MNIST/raw', packed=False)
    ours, theirs = MNIST(tmp_path), datasets.MNIST(tmp_path)
    assert torch.equal(ours.x[:, 0], theirs.data) and torch.equal(ours.y, theirs.targets)


def test_a_named_set_in_a_config_and_a_loader(tmp_path):
    mnist(tmp_path/'MNIST/raw', n=60)
    ds = DATASETS.build(dict(type='MNIST', args=dict(data_dir=str(tmp_path))))
    loader = BaseDataLoader(ds.with_transforms(build_transforms({}, 'image')), 16, validation_split=0.2)
    x, y = next(iter(loader))
    assert (x.shape, x.dtype, x.max() <= 1, len(loader.split_validation().dataset), len(loader.split_test().dataset)) == ((16, 1, 28, 28), torch.float32, True, 12, 60)
    assert loader.show_batch(4) is not None
    assert loader.facts()['class_counts'] and sum(loader.facts()['class_counts']) == 48


def test_without_a_network_the_files_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.MNIST, 'mirrors', ['http://127.0.0.1:9/'])
    monkeypatch.setattr(datasets.CIFAR10, 'url', 'http://127.0.0.1:9/cifar-10-python.tar.gz')
    with pytest.raises(DataError, match=r'127.0.0.1:9` cannot be reached(.|\n)*MNIST/raw/t10k-labels-idx1-ubyte.gz'): MNIST(tmp_path/'new')
    with pytest.raises(DataError, match=r'cannot be reached(.|\n)*-> .*cifar-10-python.tar.gz'): CIFAR10(tmp_path/'new')
    assert not (tmp_path/'new').exists()


def test_a_download_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    from deep_studio_nb.data import named_sources
    def half(self, *args, **kwargs):
        path = tmp_path/'data'
        next(path.glob('.MNIST-*')).joinpath('half').write_text('x')
        raise RuntimeError('the line was cut')
    monkeypatch.setattr(named_sources, 'why_unreachable', lambda url: None)
    monkeypatch.setattr(datasets.MNIST, 'download', half)
    with pytest.raises(DataError, match='the line was cut'): MNIST(tmp_path/'data')
    assert list((tmp_path/'data').iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    from deep_studio_nb.data import named_sources
    monkeypatch.setattr(named_sources, 'why_unreachable', lambda url: None)
    (tmp_path/'data').write_text('a file')
    with pytest.raises(DataError, match='nothing can be written'): MNIST(tmp_path/'data')


def test_damaged_and_foreign_files(tmp_path):
    mnist(tmp_path/'MNIST/raw')
    path = tmp_path/'MNIST/raw/train-images-idx3-ubyte.gz'
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(DataError, match='cannot be read'): MNIST(tmp_path)
    path.write_bytes(gzip.compress(gzip.decompress(whole)[:-1]))
    with pytest.raises(DataError, match='cut off'): MNIST(tmp_path)
    path.write_bytes(b'')
    with pytest.raises(DataError, match='no IDX file'): MNIST(tmp_path)
    path.write_bytes(whole)
    (tmp_path/'MNIST/raw/train-labels-idx1-ubyte.gz').write_bytes(gzip.compress(idx(torch.full((10,), 77, dtype=torch.uint8))))
    with pytest.raises(DataError, match='files of another set'): FashionMNIST(tmp_path/'MNIST')


def test_svhn_and_stl10(tmp_path, monkeypatch):
    sio = pytest.importorskip('scipy.io')
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    sio.savemat(tmp_path/'train_32x32.mat', dict(X=pixels, y=np.array([[1], [10], [3], [9]], dtype=np.uint8)))
    md5 = hashlib.md5((tmp_path/'train_32x32.mat').read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.SVHN, 'split_list', {k: [v[0], v[1], md5] for k, v in datasets.SVHN.split_list.items()})
    ds = SVHN(tmp_path)
    assert (ds.y.tolist(), np.array_equal(ds.x[1].permute(1, 2, 0).numpy(), pixels[..., 1])) == ([1, 0, 3, 9], True)
    base = tmp_path/'stl10_binary'
    base.mkdir()
    x = np.random.default_rng(1).integers(0, 256, (3, 3, 96, 96), dtype=np.uint8)
    x.transpose(0, 1, 3, 2).tofile(base/'train_X.bin')
    np.array([1, 2, 10], dtype=np.uint8).tofile(base/'train_y.bin')
    monkeypatch.setattr(datasets.STL10, '_check_integrity', lambda self: True)
    ds = STL10(tmp_path)
    assert (ds.y.tolist(), ds.classes[9], np.array_equal(ds.x.numpy(), x)) == ([0, 1, 9], 'truck', True)


def test_photos_of_a_named_set_are_images_in_files(tmp_path):
    where = tmp_path/'oxford-iiit-pet'
    (where/'annotations').mkdir(parents=True)
    for part, n in dict(trainval=4, test=2).items():
        (where/f'annotations/{part}.txt').write_text(''.join(f'{part}_{"ab"[i%2]}_{i} {1+i%2} 1 1\n' for i in range(n)))
        for i in range(n): draw(where/f'images/{part}_{"ab"[i%2]}_{i}.jpg', i)
    (where/'images/trainval_a_2.jpg').write_bytes(b'')
    ds = OxfordIIITPet(tmp_path)
    assert (len(ds.check()), ds.targets(), ds.sample_id(0)) == (1, [0, 1, 1], 'oxford-iiit-pet/images/trainval_a_0.jpg')
    assert BaseDataLoader(ds, 2).split_test().dataset.targets() == [0, 1]


def test_what_to_bring_for_sets_of_photos(tmp_path):
    for cls, file in ((Flowers102, '102flowers.tgz'), (DTD, 'dtd/dtd-r1.0.1.tar.gz')):
        with pytest.raises(DataError, match=file): cls(tmp_path, download=False)
    source = NamedSource('Flowers102', tmp_path, False).source
    for url, path, md5 in wanted_files(source):
        (tmp_path/path).parent.mkdir(exist_ok=True)
        (tmp_path/path).write_text('not the published one')
    with pytest.raises(DataError, match='is not the file that was published'): Flowers102(tmp_path)
