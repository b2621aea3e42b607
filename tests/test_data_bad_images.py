"Images that are odd, broken, dangerous or gone: what is read of them, and that none of them ends a run."
import logging
import os
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from deep_studio_nb.common.errors import DataError
from deep_studio_nb.data import image_files
from deep_studio_nb.data.image_files import read_image
from deep_studio_nb.data.image_folder import ImageFolder
from deep_studio_nb.data.image_pixels import picture_pixels, read_pixels
from deep_studio_nb.data.loaders import BaseDataLoader
from deep_studio_nb.data.samples import Unreadable
from deep_studio_nb.data.transforms import build_transforms

WAYS = [(0, 'auto'), (2, 'threads'), (2, 'fork')]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv('DEEP_STUDIO_CACHE', str(tmp_path/'.remembered'))


def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind+data))


def bomb(w, h):
    "A PNG of some kilobytes that unpacks to w*h*3 bytes of zeros."
    rows = zlib.compress(b'\0'*min(10**7, h*(3*w+1)), 9)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 8, 2, 0, 0, 0)) + chunk(b'IDAT', rows) + chunk(b'IEND', b'')


def folder(root, n=12):
    "Images of two classes, each of one grey value."
    for i in range(n):
        (root/'ab'[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (20, 16), (10*i, 10*i, 10*i)).save(root/'ab'[i % 2]/f'{i}.png')
    return root


def values(batches): return [round(float(x[0, 0, 0])*25.5) for b in batches for x in b[0]]


@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_16_bit_grey_keeps_its_shades(tmp_path, suffix):
    shades = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(shades).save(tmp_path/f'a.{suffix}')
    want = (shades >> 8).astype(np.uint8)
    assert np.array_equal(np.asarray(read_image(tmp_path/f'a.{suffix}', 'L')), want)
    for mode, c in (('L', 1), ('RGB', 3)):
        x = read_pixels(tmp_path/f'a.{suffix}', mode)
        assert x.dtype == torch.uint8 and torch.equal(x, torch.from_numpy(want).expand(c, 16, 16))


def test_16_bit_colour_and_floats(tmp_path):
    raw = np.zeros((4, 1+4*6), np.uint8)
    raw[:, 1::2] = np.arange(12)*20   # the high bytes of 12 values a row
    data = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 4, 4, 16, 2, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(raw.tobytes())) + chunk(b'IEND', b'')
    (tmp_path/'a.png').write_bytes(data)
    assert np.asarray(read_image(tmp_path/'a.png')).reshape(4, 12).tolist() == [(np.arange(12)*20).tolist()]*4
    assert torch.equal(read_pixels(tmp_path/'a.png'), picture_pixels(read_image(tmp_path/'a.png')))
    Image.fromarray(np.array([[0., .5, 1.]], np.float32)).save(tmp_path/'f.tif')
    assert np.asarray(read_image(tmp_path/'f.tif', 'L')).tolist() == [[0, 127, 255]]


@pytest.mark.parametrize('name', ['a.jpg', 'a.tif'])
def test_cmyk_has_the_colours_of_rgb(tmp_path, name):
    Image.new('RGB', (16, 16), (200, 60, 20)).convert('CMYK').save(tmp_path/name)
    assert Image.open(tmp_path/name).mode == 'CMYK'
    x = read_pixels(tmp_path/name)
    assert (x.float().mean((1, 2)) - torch.tensor([200., 60., 20.])).abs().max() < 4
    assert torch.equal(x, picture_pixels(read_image(tmp_path/name)))


def test_all_kinds_in_one_folder_make_one_batch(tmp_path):
    (tmp_path/'a').mkdir()
    colour = Image.new('RGB', (16, 16), (200, 60, 20))
    for name, im in {'rgb.png': colour, 'grey.png': colour.convert('L'), 'cmyk.jpg': colour.convert('CMYK'), 'palette.gif': colour.convert('P'), '16.png': Image.fromarray(np.full((16, 16), 30000, np.uint16)),
                     'clear.png': Image.new('RGBA', (16, 16), (0, 0, 0, 0)), 'bits.png': colour.convert('1')}.items(): im.save(tmp_path/'a'/name)
    x, y = next(iter(BaseDataLoader(ImageFolder(tmp_path).with_transforms(build_transforms({})), 7, False)))
    assert x.shape == (7, 3, 16, 16) and x.min() >= 0 and x.max() <= 1


def test_an_animation_gives_its_first_frame_and_is_told_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(image_files, '_told', set())
    (tmp_path/'a').mkdir()
    frames = [Image.new('RGB', (8, 8), o) for o in ('red', 'green', 'blue')]
    for i in range(3): frames[0].save(tmp_path/f'a/{i}.gif', save_all=True, append_images=frames[1:], duration=50)
    with caplog.at_level(logging.INFO, 'deep_studio_nb.data'):
        x, _ = next(iter(BaseDataLoader(ImageFolder(tmp_path).with_transforms(build_transforms({})), 3, False, num_workers=0)))
    assert x[:, 0].min() > .9 and x[:, 1:].max() < .1
    said = [o.message for o in caplog.records if 'pictures' in o.message]
    assert len(said) == 1 and '3 pictures' in said[0] and 'first one' in said[0]


def test_a_bomb_is_refused_in_words_at_once(tmp_path):
    before = Image.MAX_IMAGE_PIXELS
    (tmp_path/'bomb.png').write_bytes(bomb(60_000, 50_000))
    (tmp_path/'wide.png').write_bytes(bomb(5_000, 5_000))
    began = time.monotonic()
    for read in (read_image, read_pixels):
        with pytest.raises(Unreadable, match='claims 3,000,000,000 pixels, more than the [0-9,]+ that are unpacked') as e: read(tmp_path/'bomb.png')
        assert str(tmp_path) in str(e.value)
        with pytest.raises(Unreadable, match='5,000 x 5,000 pixels, more than the 1,000,000'): read(tmp_path/'wide.png', max_pixels=10**6)
    assert time.monotonic()-began < 5
    assert Image.MAX_IMAGE_PIXELS == before


def test_a_text_chunk_that_unpacks_without_end_is_refused(tmp_path):
    text = chunk(b'zTXt', b'a\0\0' + zlib.compress(b'\0'*200_000_000, 9))
    data = bomb(4, 4)
    (tmp_path/'a.png').write_bytes(data[:33] + text + data[33:])
    try: assert read_pixels(tmp_path/'a.png').shape == (3, 4, 4)   # not looked at
    except Unreadable as e: assert 'a.png' in str(e)


@pytest.mark.parametrize('workers,start', WAYS)
@pytest.mark.parametrize('cache', ['off', 'memory'])
def test_bad_files_cost_their_own_place_only(tmp_path, workers, start, cache, caplog):
    root = folder(tmp_path/'d')
    (root/'a/2.png').write_bytes(b'')
    (root/'b/5.png').write_bytes(bomb(60_000, 50_000))
    (root/'a/10.png').write_bytes((root/'a/10.png').read_bytes()[:40])
    loader = BaseDataLoader(ImageFolder(root, mode='RGB').with_transforms(build_transforms({})), 4, False, num_workers=workers, start=start, cache=cache)
    for _ in range(2):
        batches = list(loader)
        assert sorted(values(batches)) == [0, 1, 3, 4, 6, 7, 8, 9, 11]
        assert [len(b[0]) for b in batches] == [3, 3, 3]
    bad = {o.path.name: o.reason for o in loader.quarantine}
    assert set(bad) == {'2.png', '5.png', '10.png'} and 'empty' in bad['2.png'] and 'claims' in bad['5.png'] and 'damaged' in bad['10.png']
    assert len([o for o in caplog.records if 'left out' in o.message]) == 3   # once a file, not once an epoch
    assert sorted(loader.sample_ids()) == sorted(f'{"ab"[i % 2]}/{i}.png' for i in range(12) if i not in (2, 5, 10))


@pytest.mark.parametrize('workers,start', WAYS)
def test_a_file_that_vanishes_between_listing_and_reading(tmp_path, workers, start, caplog):
    loader = BaseDataLoader(ImageFolder(folder(tmp_path/'d'), mode='RGB').with_transforms(build_transforms({})), 4, False, num_workers=workers, start=start, cache='off')
    assert len(values(loader)) == 12 and not loader.quarantine
    os.remove(tmp_path/'d/a/6.png')
    assert sorted(values(loader)) == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11]
    assert [(o.path.name, o.reason) for o in loader.quarantine] == [('6.png', 'there is no such file')]
    assert 'a/6.png' not in loader.sample_ids() and len(loader.sample_ids()) == 11


@pytest.mark.parametrize('workers,start', WAYS)
def test_who_wants_an_error_gets_it(tmp_path, workers, start):
    loader = BaseDataLoader(ImageFolder(folder(tmp_path/'d'), on_bad='raise').with_transforms(build_transforms({})), 4, False, num_workers=workers, start=start, cache='off')
    os.remove(tmp_path/'d/a/6.png')
    with pytest.raises(DataError, match='6.png` cannot be read: there is no such file') as e: list(loader)
    assert 'Traceback' not in str(e.value)


@pytest.mark.parametrize('workers,start', WAYS)
def test_a_batch_with_nothing_left_is_passed_over(tmp_path, workers, start):
    root = folder(tmp_path/'d', 8)
    loader = BaseDataLoader(ImageFolder(root, mode='RGB').with_transforms(build_transforms({})), 2, False, num_workers=workers, start=start, cache='off')
    names = loader.sample_ids()
    for o in names[2:4]: (root/o).write_bytes(b'no image')
    batches = list(loader)
    assert [len(b[0]) for b in batches] == [2, 2, 2]
    assert loader.sample_ids() == names[:2] + names[4:]


def test_the_order_does_not_depend_on_what_turned_out_bad(tmp_path):
    "A run that goes on after a file went bad sees the others in the same batches, with the same draws."
    ds = ImageFolder(folder(tmp_path/'d', 16), mode='RGB').with_transforms(build_transforms({'train': [{'type': 'RandomCrop', 'args': {'size': 8, 'padding': 4, 'pad_if_needed': True}}]}))
    whole = list(BaseDataLoader(ds, 4, seed=1))
    loader = BaseDataLoader(ds, 4, seed=1)
    gone = loader.sample_ids()[5]
    os.remove(tmp_path/'d'/gone)
    part = list(loader)
    assert [len(b[0]) for b in part] == [4, 3, 4, 4]
    for a, b in zip(whole, part): assert all(any(torch.equal(x, o) for o in a[0]) for x in b[0])
