"Masks as they arrive: of another size, with values that are no class, in colours, without a photo, turned, in Korean."
import logging, shutil

import numpy as np
import pytest
import torch
from PIL import Image

from deep_studio_nb.common.errors import DataError
from deep_studio_nb.data.image_masks import ImageMasks
from deep_studio_nb.data.loaders import BaseDataLoader
from deep_studio_nb.data.presets import transforms_for
from deep_studio_nb.data.samples import Index, Unreadable
from deep_studio_nb.data.transforms import build_transforms

MOVES = {'train': [{'type': 'RandomResizedCrop', 'args': {'size': [16, 16], 'scale': [0.4, 1.0]}}, 'RandomHorizontalFlip',
                   {'type': 'ColorJitter', 'args': {'brightness': 0.3}}, {'type': 'Normalize', 'args': {'mean': [0.5]*3, 'std': [0.5]*3}}]}


def pixels(i, size=(24, 18)):
    "Class numbers 0, 1, 2 and 255 in blocks that differ by `i`."
    w, h = size
    a = np.zeros((h, w), np.uint8)
    a[2:h//2, 1+i:w//2], a[h//2:-2, w//2:-2], a[-2:] = 1, 2, 255
    return a


def photo(a):
    "A picture whose colour says the class of each pixel of mask `a`."
    table = np.zeros((256, 3), np.uint8)
    table[1], table[2], table[255] = (200, 60, 60), (60, 60, 200), (120, 120, 120)
    return Image.fromarray(table[a])


def data(root, n=6, images='images', masks='masks', suffix='.png', size=(24, 18)):
    "Make a folder of photos and one of masks."
    for i in range(n):
        a = pixels(i, size)
        for folder, im in ((images, photo(a)), (masks, Image.fromarray(a))):
            (root/folder).mkdir(parents=True, exist_ok=True)
            im.save(root/folder/f'{i}{".png" if folder==masks else suffix}')
    return root


def mask_of(root, i): return root/f'masks/{i}.png'


# --- bad input ---

def test_a_mask_of_another_size_is_left_out_and_named(tmp_path, caplog):
    Image.fromarray(pixels(0, (12, 9))).save(mask_of(data(tmp_path), 3))
    ds = ImageMasks(tmp_path)
    with pytest.raises(Unreadable, match='has 12x9 pixels where `3.png` asks for 24x18'): ds.load(3)
    with caplog.at_level(logging.WARNING, 'deep_studio_nb'): bad = ds.check()
    assert [o.path for o in bad]==[mask_of(tmp_path, 3)] and len(ds)==5
    assert '1 of 6 masks cannot be used: `3.png`: it has 12x9 pixels' in caplog.text
    assert 'asks for 24x18' in ds.left_out['images/3.png']
    assert len(torch.cat([y for _, y in BaseDataLoader(ds, 2)]))==5


def test_a_mask_of_another_size_stops_when_asked_to(tmp_path):
    Image.fromarray(pixels(0, (12, 9))).save(mask_of(data(tmp_path), 3))
    with pytest.raises(DataError, match='12x9 pixels.*set `on_bad` to "skip"'): ImageMasks(tmp_path, on_bad='raise').check()


def test_a_mask_of_another_size_is_left_out_of_its_batch_without_a_check(tmp_path):
    Image.fromarray(pixels(0, (12, 9))).save(mask_of(data(tmp_path), 3))
    loader = BaseDataLoader(ImageMasks(tmp_path), batch_size=3, shuffle=False)
    assert [len(y) for _, y in loader]==[3, 2]
    with pytest.raises(DataError, match='12x9'): list(BaseDataLoader(ImageMasks(tmp_path, on_bad='raise'), batch_size=3))


def test_a_value_outside_the_classes(tmp_path, caplog):
    a = pixels(2)
    a[0, :5] = 9
    Image.fromarray(a).save(mask_of(data(tmp_path), 2))
    ds = ImageMasks(tmp_path, classes=['ground', 'disc', 'box'])
    with pytest.raises(Unreadable, match='5 of its 432 pixels have values outside the classes: 9'): ds.load(2)
    with caplog.at_level(logging.WARNING, 'deep_studio_nb'): ds.check()
    assert len(ds)==5 and 'outside the classes: 9' in caplog.text


@pytest.mark.parametrize('gone,word', [('masks/1.png', 'of the images has no partner among the masks'), ('images/1.png', 'of the masks has no partner among the images')])
def test_one_without_the_other(tmp_path, caplog, gone, word):
    (data(tmp_path)/gone).unlink()
    with caplog.at_level(logging.WARNING, 'deep_studio_nb'): ds = ImageMasks(tmp_path)
    assert len(ds)==5 and f'1 {word}, for example `1.png`' in caplog.text
    assert len(ds.left_out)==1
    with pytest.raises(DataError, match=f'1 {word}'): ImageMasks(tmp_path, on_bad='raise')


def test_no_pair_at_all_names_both_sides_and_a_pattern(tmp_path):
    for o in (data(tmp_path)/'masks').iterdir(): o.rename(o.with_stem(o.stem+'_seg'))
    with pytest.raises(DataError, match=r"No two files go together.*set `pattern` to '\{stem\}_seg'"): ImageMasks(tmp_path)
    assert len(ImageMasks(tmp_path, pattern='{stem}_seg'))==6


@pytest.mark.parametrize('content', [b'', b'no picture', b'\x89PNG\r\n\x1a\n....'])
def test_a_mask_that_is_no_picture(tmp_path, content):
    mask_of(data(tmp_path), 0).write_bytes(content)
    ds = ImageMasks(tmp_path)
    assert len(ds.check())==1 and len(ds)==5


def test_a_mask_that_vanishes(tmp_path):
    ds = ImageMasks(data(tmp_path))
    mask_of(tmp_path, 4).unlink()
    with pytest.raises(Unreadable, match='there is no such file'): ds.load(4)
    assert len(torch.cat([y for _, y in BaseDataLoader(ds, 2)]))==5


def test_a_mask_saved_as_jpeg_says_so(tmp_path):
    data(tmp_path)
    for o in list((tmp_path/'masks').iterdir()):
        Image.open(o).point(lambda v: v*60).save(o.with_suffix('.jpg'), quality=40)
        o.unlink()
    with pytest.raises(DataError, match='saved as JPEG|Say which is what'): ImageMasks(tmp_path)
    ds = ImageMasks(tmp_path, classes={'ground': 0, 'disc': 60, 'box': 120})
    with pytest.raises(DataError, match='saved as JPEG'): ds.load(0)


def test_a_mask_of_an_unturned_photo(tmp_path):
    data(tmp_path, suffix='.jpg')
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(tmp_path/'images/1.jpg').save(tmp_path/'images/1.jpg', exif=exif)
    with pytest.raises(Unreadable, match='made from the unturned photo'): ImageMasks(tmp_path).load(1)


@pytest.mark.parametrize('args,word', [
    (dict(masks='labels'), 'no folder `labels` of the masks. Its folders are `images`, `masks`'),
    (dict(split='valid'), 'no valid split'), (dict(split='training'), 'no training split'), (dict(mode='grey'), '`mode` is'), (dict(on_bad='ignore'), '`on_bad` is'),
    (dict(pattern='_mask'), 'holds {stem}'), (dict(images='images', masks='images'), 'say with `pattern`'),
    (dict(classes=[]), 'is empty'), (dict(classes=['one', 'two']), 'hold the value 2, but `classes` names 2'),
    (dict(classes={'a': 0, 'b': 0}), 'more than one class'), (dict(classes={'a': 'red'}), 'a whole number, or a colour'), (dict(classes={'a': [1, 2]}), 'a whole number, or a colour')])
def test_arguments_that_cannot_be(tmp_path, args, word):
    with pytest.raises(DataError) as e: ImageMasks(data(tmp_path), **args)
    assert word in str(e.value)


def test_folders_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match='not there'): ImageMasks(tmp_path/'nowhere')
    (tmp_path/'photos').mkdir()
    with pytest.raises(DataError, match='known to hold the masks'): ImageMasks(tmp_path)


# --- ways of writing masks ---

def test_ways_of_writing_the_same_mask(tmp_path):
    data(tmp_path/'grey')
    wanted = [y for _, y in (ImageMasks(tmp_path/'grey', classes=['g', 'd', 'b'])[i] for i in range(6))]
    colours = {0: (0, 0, 0), 1: (255, 0, 0), 2: (0, 0, 255), 255: (128, 128, 128)}
    ways = {'palette': None, 'rgb': None, 'grey-rgb': None, 'sixteen': None}
    for way in ways:
        shutil.copytree(tmp_path/'grey', tmp_path/way)
        for o in (tmp_path/way/'masks').iterdir():
            im = Image.open(o)
            a = np.array(im)
            if way=='palette':
                im = Image.fromarray(a, 'P')
                im.putpalette([v for i in range(256) for v in colours.get(i, (9, 9, 9))])
            if way=='rgb': im = Image.fromarray(np.array([colours.get(i, (9, 9, 9)) for i in range(256)], np.uint8)[a])
            if way=='grey-rgb': im = im.convert('RGB')
            if way=='sixteen': im = Image.fromarray(a.astype(np.uint16))
            im.save(o)
        names = {'g': [0, 0, 0], 'd': [255, 0, 0], 'b': [0, 0, 255]} if way=='rgb' else ['g', 'd', 'b']
        ds = ImageMasks(tmp_path/way, classes=names, ignore=[128, 128, 128] if way=='rgb' else 'auto')
        assert ds.classes==['g', 'd', 'b']
        assert all(torch.equal(ds[i][1], y) for i, y in enumerate(wanted)), way
    by_colour = ImageMasks(tmp_path/'palette', classes={'g': [0, 0, 0], 'd': [255, 0, 0], 'b': [0, 0, 255]}, ignore=[128, 128, 128])
    assert torch.equal(by_colour[3][1], wanted[3])
    with pytest.raises(DataError, match=r'has 4 colours: .*\[255, 0, 0\]'): ImageMasks(tmp_path/'rgb')


@pytest.mark.parametrize('on,ignore,found', [(255, 'auto', {0, 1}), (1, 'auto', {0, 1}), (255, 255, {0, -100})])
def test_binary_masks(tmp_path, on, ignore, found):
    data(tmp_path)
    for o in (tmp_path/'masks').iterdir(): Image.fromarray(((np.array(Image.open(o))==1)*on).astype(np.uint8)).save(o)
    assert set(ImageMasks(tmp_path, ignore=ignore)[0][1].unique().tolist())==found


def test_one_file_an_object(tmp_path):
    for i in range(3):
        a = pixels(i)
        for name, im in {'images/p.png': photo(a), 'masks/a.png': Image.fromarray(((a==1)*255).astype(np.uint8)), 'masks/b.png': Image.fromarray(((a==2)*255).astype(np.uint8))}.items():
            (tmp_path/f'pic{i}'/name).parent.mkdir(parents=True, exist_ok=True)
            im.save(tmp_path/f'pic{i}'/name)
    ds = ImageMasks(tmp_path)
    assert (len(ds), ds.classes, ds.sample_id(2))==(3, ['background', 'object'], 'pic2/images/p.png')
    assert torch.equal(ds[1][1], torch.from_numpy(np.isin(pixels(1), (1, 2))).long())
    assert ds.check()==[] and len(ds)==3
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(tmp_path/'pic0/masks/b.png')
    shutil.rmtree(tmp_path/'pic2/masks')
    ds = ImageMasks(tmp_path)
    assert len(ds)==2 and len(ds.check())==1 and ds.sample_id(0)=='pic1/images/p.png'
    with pytest.raises(DataError, match='do not hold one image'): ImageMasks(tmp_path, on_bad='raise')
    with pytest.raises(DataError, match='makes two classes'): ImageMasks(tmp_path, classes=['a', 'b', 'c'])


# --- splits, names, journal ---

def test_predefined_splits_and_what_training_decides(tmp_path):
    for split in ('train', 'val'): data(tmp_path/split, 3 if split=='val' else 6)
    (tmp_path/'test/images').mkdir(parents=True)
    photo(pixels(0)).save(tmp_path/'test/images/x.png')
    for o in (tmp_path/'val/masks').iterdir(): Image.fromarray(np.minimum(np.array(Image.open(o)), 1)).save(o)   # fewer classes than training
    ds = ImageMasks(tmp_path)
    valid = ds.split('valid')
    assert (len(ds), len(valid), valid.stage, valid.classes, ds.split('test'))==(6, 3, 'valid', ['0', '1', '2'], None)
    assert ImageMasks(tmp_path, split='valid').classes==['0', '1', '2']
    assert valid.sample_id(0)=='val/images/0.png'


def test_korean_folders_and_names(tmp_path):
    root = data(tmp_path/'데이터', images='사진', masks='마스크')
    ds = ImageMasks(root, images='사진', masks='마스크', classes=['배경', '원', '상자'])
    assert ds.sample_id(0)=='사진/0.png' and '원' in ds.target_name(ds[0][1])
    assert [o.get_text() for o in ds.show([ds[i] for i in range(3)]).legends[0].get_texts()]==['원', '상자', 'ignored']


def test_an_image_dropped_in_the_journal_stays_out(tmp_path):
    ds = ImageMasks(data(tmp_path))
    ds.drop(1)
    kept = ImageMasks(tmp_path)
    assert [kept.sample_id(i) for i in range(len(kept))]==[f'images/{i}.png' for i in (0, 2, 3, 4, 5)]
    assert len(ImageMasks(tmp_path, journal='off'))==6
    with pytest.raises(DataError): kept.relabel(0, '1')


# --- together ---

def test_image_and_mask_move_alike(tmp_path):
    ds = ImageMasks(data(tmp_path, size=(48, 36))).with_transforms(build_transforms({'train': [
        {'type': 'RandomResizedCrop', 'args': {'size': [32, 32], 'scale': [0.4, 1.0]}}, 'RandomHorizontalFlip', 'RandomVerticalFlip',
        {'type': 'RandomRotation', 'args': {'degrees': [90, 90]}}]}))
    for i in range(6):
        for draw in range(5):
            x, y = ds[Index(i, draw=draw)]
            red, blue = x[0]-x[2]>0.25, x[2]-x[0]>0.25   # the colours of classes 1 and 2, away from the borders
            assert (y[red]==1).float().mean()>0.85 if red.sum()>20 else True
            assert (y[blue]==2).float().mean()>0.85 if blue.sum()>20 else True
            assert y.dtype==torch.int64 and x.shape[1:]==y.shape==(32, 32)


@pytest.mark.parametrize('workers', [1, 3])
def test_workers_change_nothing(tmp_path, workers):
    ds = ImageMasks(data(tmp_path)).with_transforms(build_transforms(MOVES))
    alone, many = (list(BaseDataLoader(ds, 2, num_workers=n, seed=3)) for n in (0, workers))
    assert all(torch.equal(a, b) for one, two in zip(alone, many, strict=True) for a, b in zip(one, two))
    loader = BaseDataLoader(ds, 2, seed=3)
    loader.start_at(2)
    assert all(torch.equal(a, b) for one, two in zip(alone[2:], loader, strict=True) for a, b in zip(one, two))


def test_a_cache_changes_nothing(tmp_path):
    ds = ImageMasks(data(tmp_path)).with_transforms(build_transforms(MOVES))
    kept, plain = (BaseDataLoader(ds, 2, cache=o, num_workers=0) for o in ('memory', 'off'))
    for _ in range(2): assert all(torch.equal(a, b) for one, two in zip(kept, plain, strict=True) for a, b in zip(one, two))


def test_validation_is_held_out_and_not_augmented(tmp_path):
    loader = BaseDataLoader(ImageMasks(data(tmp_path)).with_transforms(transforms_for(ImageMasks(tmp_path), dict(preset='photos', size=16))), 4, validation_split=2)
    valid = loader.split_validation()
    assert (len(loader.dataset), len(valid.dataset))==(4, 2)
    (a, b), (c, d) = list(valid)[0], list(valid)[0]
    assert torch.equal(a, c) and torch.equal(b, d) and a.shape==(2, 3, 16, 16) and b.shape==(2, 16, 16)
    facts = loader.facts()
    assert (facts['task'], facts['num_classes'], facts['ignore_index'], facts['in_channels'])==('mask', 3, -100, 3)


def test_masks_of_many_sizes_become_one_batch_by_default(tmp_path, caplog):
    data(tmp_path, 3)
    a = pixels(0, (40, 20))
    photo(a).save(tmp_path/'images/2.png')
    Image.fromarray(a).save(tmp_path/'masks/2.png')
    ds = ImageMasks(tmp_path)
    with caplog.at_level(logging.INFO, 'deep_studio_nb'): ds = ds.with_transforms(transforms_for(ds))
    assert sum('differ in size' in o.getMessage() for o in caplog.records)==1
    x, y = next(iter(BaseDataLoader(ds, 3)))
    assert x.shape[2:]==y.shape[1:]
    assert set(y.unique().tolist())<={-100, 0, 1, 2}


def test_no_global_generator_is_touched(tmp_path):
    ds = ImageMasks(data(tmp_path)).with_transforms(build_transforms(MOVES))
    before = torch.get_rng_state()
    list(BaseDataLoader(ds, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_loading_and_drawing_work_from_the_loader(tmp_path):
    loader = BaseDataLoader(ImageMasks(data(tmp_path)).with_transforms(build_transforms(MOVES)), 4, validation_split=2)
    assert len(loader.show_batch(4).legends)==1
    assert [o.name for o in loader.save_samples(tmp_path/'out')]==['train_batch.png', 'valid_batch.png']
