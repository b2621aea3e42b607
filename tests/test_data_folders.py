"Image folders as they arrive: empty, broken, rotated, mixed, in Korean."
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from deep_studio_nb.common.errors import DataError
from deep_studio_nb.data.digits import Digits
from deep_studio_nb.data.bad_files import find_bad
from deep_studio_nb.data.image_files import read_image
from deep_studio_nb.data.image_folder import ImageFolder
from deep_studio_nb.data.loaders import BaseDataLoader


def draw(path, mode='RGB', size=(12, 8), seed=0, **kwargs):
    "Save noise, which compresses badly: a file cut anywhere lacks data."
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    Image.fromarray(pixels, 'RGBA').convert(mode).save(path, **kwargs)
    return path


def folder(root, layout, **kwargs):
    "Make class folders: {'train/cat': 2} has two images."
    for i, (name, n) in enumerate(layout.items()):
        (root/name).mkdir(parents=True, exist_ok=True)
        for k in range(n): draw(root/name/f'{k}.png', seed=100*i+k, **kwargs)
    return root


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match='not there'): ImageFolder(tmp_path/'nowhere')
    (tmp_path/'file').write_text('x')
    with pytest.raises(DataError, match='a file'): ImageFolder(tmp_path/'file')


@pytest.mark.parametrize('layout', [{}, {'train': 0}, {'train/cat': 0, 'train/dog': 0}, {'cat': 0}, {'.git': 0, 'train/.ipynb_checkpoints': 2}])
def test_an_empty_folder(tmp_path, layout):
    with pytest.raises(DataError, match='no images|no class folders'): ImageFolder(folder(tmp_path, layout))


def test_images_without_class_folders_are_named(tmp_path):
    with pytest.raises(DataError, match='2 images directly in it, for example `0.png`'): ImageFolder(folder(tmp_path, {'.': 2}))


def test_files_of_other_kinds_only(tmp_path):
    (tmp_path/'cat').mkdir()
    (tmp_path/'cat/list.csv').write_text('a,b')
    with pytest.raises(DataError, match='It holds `list.csv`'): ImageFolder(tmp_path)


def test_a_class_missing_in_valid_keeps_the_labels(tmp_path, caplog):
    ds = ImageFolder(folder(tmp_path, {'train/a': 2, 'train/b': 2, 'train/c': 2, 'valid/a': 1, 'valid/c': 1}))
    with caplog.at_level(logging.WARNING, 'deep_studio_nb'): valid = ds.split('valid')
    assert (valid.classes, valid.targets()) == (['a', 'b', 'c'], [0, 2])
    assert 'no images of `b`' in caplog.text


def test_a_class_that_only_valid_has(tmp_path):
    ds = ImageFolder(folder(tmp_path, {'train/a': 1, 'valid/z': 1}))
    with pytest.raises(DataError, match='training does not know'): ds.split('valid')


def test_a_class_folder_without_images_keeps_its_label(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, 'deep_studio_nb'): ds = ImageFolder(folder(tmp_path, {'a': 0, 'b': 1}))
    assert (ds.classes, ds.targets()) == (['a', 'b'], [1])
    assert 'no images of `a`' in caplog.text


@pytest.mark.parametrize('kwargs', [{}, {'progressive': True}, {'optimize': True}])
@pytest.mark.parametrize('share', [0.02, 0.5, 0.98])
def test_a_truncated_jpeg(tmp_path, share, kwargs, caplog):
    folder(tmp_path, {'a': 1})
    path = draw(tmp_path/'a/cut.jpg', size=(120, 90), quality=90, **kwargs)
    assert find_bad([path]) == []
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size*share)])
    ds = ImageFolder(tmp_path)
    with pytest.raises(DataError, match='cut.jpg'): ds[1]
    with caplog.at_level(logging.WARNING, 'deep_studio_nb'): bad = ds.check()
    assert [o.path for o in bad] == [path]
    assert 'a/cut.jpg' in caplog.text
    assert len(ds) == 1
    ds[0]


def test_a_text_file_named_jpg(tmp_path):
    folder(tmp_path, {'a': 2})
    (tmp_path/'a/letter.jpg').write_text('Dear all, this is not an image')
    ds = ImageFolder(tmp_path)
    assert [o.reason for o in ds.check()] == ["it is not an image, it begins with b'Dear all, th'"]
    assert len(ds) == len(ds.targets()) == 2


def test_on_bad_raise_stops(tmp_path):
    folder(tmp_path, {'a': 1})
    (tmp_path/'a/x.jpg').write_bytes(b'')
    with pytest.raises(DataError, match='`a/x.jpg`: it is empty'): ImageFolder(tmp_path, on_bad='raise').check()
    with pytest.raises(DataError, match='`on_bad`'): ImageFolder(tmp_path, on_bad='ignore')


def test_nothing_but_bad_files(tmp_path):
    (tmp_path/'a').mkdir()
    (tmp_path/'a/x.jpg').write_text('text')
    with pytest.raises(DataError, match='nothing left'): ImageFolder(tmp_path).check()


def test_splits_of_a_checked_folder_are_checked(tmp_path):
    folder(tmp_path, {'train/a': 2, 'val/a': 1})
    (tmp_path/'val/a/x.jpg').write_text('text')
    ds = ImageFolder(tmp_path)
    assert len(ds.split('valid')) == 2
    ds.check()
    assert len(ds.split('valid')) == 1
    assert len(BaseDataLoader(ds).split_validation().dataset) == 1


def test_a_split_is_decoded_once(tmp_path, monkeypatch):
    from deep_studio_nb.data import image_dataset
    ds, calls = ImageFolder(folder(tmp_path, {'train/a': 2, 'valid/a': 1})), []
    monkeypatch.setattr(image_dataset, 'find_bad', lambda files: calls.append(len(files)) or [])
    ds.check()
    loader = BaseDataLoader(ds, 2)
    for _ in range(3): loader.split_validation()
    assert calls == [2, 1]


def test_a_file_that_vanished(tmp_path):
    ds = ImageFolder(folder(tmp_path, {'a': 2}))
    ds.files[0].unlink()
    with pytest.raises(DataError, match='there is no such file'): ds[0]
    assert len(ds.check()) == 1


def test_one_image_only(tmp_path):
    ds = ImageFolder(folder(tmp_path, {'cat': 1}))
    loader = BaseDataLoader(ds, 8)
    (x, y), = loader
    assert (tuple(x.shape), y.tolist(), ds.facts()['num_classes']) == ((1, 3, 8, 12), [0], 1)
    assert loader.split_validation() is None
    for amount in (0.5, 1):
        with pytest.raises(DataError, match='validation_split'): BaseDataLoader(ds, 8, validation_split=amount)


def test_blanks_and_korean_in_paths_and_classes(tmp_path):
    root = folder(tmp_path/'내 사진 (1)', {'train/고양이 A': 2, 'train/강아지': 1, 'valid/강아지': 1})
    ds = ImageFolder(str(root))
    assert ds.classes == ['강아지', '고양이 A']
    assert ds.sample_id(1) == 'train/고양이 A/0.png'
    assert ds.split('valid').targets() == [0]
    assert BaseDataLoader(ds, 2).show_batch(3) is not None


def test_composed_and_decomposed_names_are_one_class(tmp_path):
    import unicodedata
    nfd = unicodedata.normalize('NFD', '사과')
    ds = ImageFolder(folder(tmp_path, {'train/사과': 1, f'valid/{nfd}': 1}))
    assert ds.split('valid').targets() == [0]


def test_grey_rgba_and_what_is_no_image_in_one_folder(tmp_path):
    draw(tmp_path/'a/grey.png', 'L')
    draw(tmp_path/'a/clear.png', 'RGBA')
    draw(tmp_path/'b/palette.gif', 'P')
    draw(tmp_path/'b/print.jpg', 'CMYK')
    (tmp_path/'b/notes.txt').write_text('notes')
    ds = ImageFolder(tmp_path)
    assert (ds.mode, ds.check(), [o.name for o in ds.others]) == ('RGB', [], ['notes.txt'])
    x, y = next(iter(BaseDataLoader(ds, 8)))
    assert (tuple(x.shape), x.dtype) == ((4, 3, 8, 12), torch.float32)
    assert 0 <= x.min() and x.max() <= 1


def test_grey_folders_stay_grey_and_can_be_made_colour(tmp_path):
    folder(tmp_path, {'train/a': 2, 'valid/a': 1}, mode='L')
    draw(tmp_path/'valid/a/colour.png')
    ds = ImageFolder(tmp_path)
    assert ds[0][0].shape[0] == 1
    assert {x.shape[0] for x, _ in ds.split('valid')} == {1}   # as in training
    assert ImageFolder(tmp_path, mode='RGB')[0][0].shape[0] == 3
    assert ImageFolder(tmp_path, split='valid').mode == 'L'


def test_hidden_folders_and_files_are_passed_over(tmp_path):
    ds = ImageFolder(folder(tmp_path, {'train/a': 1, 'train/.ipynb_checkpoints': 3, 'train/a/.ipynb_checkpoints': 2, '__MACOSX/a': 1, 'train/__MACOSX': 1}))
    draw(tmp_path/'train/a/._0.png')
    assert (ds.classes, len(ds), len(ImageFolder(tmp_path))) == (['a'], 1, 1)


def test_classes_and_files_in_natural_order(tmp_path):
    ds = ImageFolder(folder(tmp_path, {f'train/{i}': 1 for i in (10, 9, 1, 2)} | {'train/11': 12}))
    assert ds.classes == ['1', '2', '9', '10', '11']
    assert [o.stem for o in ds.subset(range(4, 16)).files] == [str(i) for i in range(12)]


@pytest.mark.parametrize('orientation,turn', [(1, None), (3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_270), (8, Image.Transpose.ROTATE_90), (2, Image.Transpose.FLIP_LEFT_RIGHT)])
@pytest.mark.parametrize('suffix', ['png', 'jpg'])
def test_exif_orientation(tmp_path, orientation, turn, suffix):
    plain = draw(tmp_path/f'plain.{suffix}', size=(32, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    draw(tmp_path/f'turned.{suffix}', size=(32, 16), exif=exif)
    want = read_image(plain) if turn is None else read_image(plain).transpose(turn)
    assert read_image(tmp_path/f'turned.{suffix}').tobytes() == want.tobytes()


def test_a_classes_list_fixes_the_labels(tmp_path):
    ds = ImageFolder(folder(tmp_path, {'test/b': 1, 'test/a': 1}), split='test', classes=['b', 'a'])
    assert (ds.targets(), ds.stage) == ([1, 0], 'test')


def test_digits_are_whole_or_not_there(tmp_path, monkeypatch):
    "What fails in the middle of writing leaves nothing behind."
    def fail(self, path): raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(Image.Image, 'save', fail)
        with pytest.raises(OSError): Digits(tmp_path/'digits')
    assert list(tmp_path.iterdir()) == []
    assert len(Digits(tmp_path/'digits')) == 1197
