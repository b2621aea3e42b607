"Pairs of pictures as they arrive: without a partner, of two sizes, made of their targets, damaged alike in every process."
import logging

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from deep_studio_nb.common.errors import ConfigError, DataError
from deep_studio_nb.data.image_pairs import ImagePairs
from deep_studio_nb.data.loaders import BaseDataLoader
from deep_studio_nb.data.presets import transforms_for
from deep_studio_nb.data.samples import Index, Unreadable
from deep_studio_nb.data.transforms import build_transforms

DAMAGE = [{'type': 'GaussianBlur', 'args': {'kernel_size': 5, 'sigma': [0.5, 2.0]}}, {'type': 'GaussianNoise', 'args': {'sigma': 0.1}},
          {'type': 'JPEG', 'args': {'quality': [20, 60]}}]
CUT = {'train': [{'type': 'RandomCrop', 'args': {'size': 16}}, 'RandomHorizontalFlip', {'type': 'ColorJitter', 'args': {'brightness': 0.4}}]}


def picture(seed, size=(24, 18)):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.NEAREST)


def data(root, n=6, inputs='input', targets='target', shrink=1):
    "Make a folder of blurred pictures, perhaps smaller, and one of sharp ones."
    for i in range(n):
        im = picture(i)
        small = im.filter(ImageFilter.GaussianBlur(1))
        for folder, o in ((inputs, small.resize((24//shrink, 18//shrink))), (targets, im)):
            (root/folder).mkdir(parents=True, exist_ok=True)
            o.save(root/folder/f'{i}.png')
    return root


# --- bad input ---

@pytest.mark.parametrize('gone,word', [('input/2.png', '1 of the targets has no partner among the inputs'), ('target/2.png', '1 of the inputs has no partner among the targets')])
def test_a_pair_without_a_partner(tmp_path, caplog, gone, word):
    (data(tmp_path)/gone).unlink()
    with caplog.at_level(logging.WARNING, 'deep_studio_nb'): ds = ImagePairs(tmp_path)
    assert len(ds)==5 and f'{word}, for example `2.png`. They are left out.' in caplog.text
    assert list(ds.left_out.values())==[word.removeprefix('1 of the targets has ').removeprefix('1 of the inputs has ').replace('no partner', 'it has no partner')]
    with pytest.raises(DataError, match=f'{word}.*Complete the pairs'): ImagePairs(tmp_path, on_bad='raise')


def test_no_partner_at_all(tmp_path):
    for o in (data(tmp_path)/'target').iterdir(): o.rename(o.with_stem(f'clean-{o.stem}'))
    with pytest.raises(DataError, match=r"No two files go together.*set `pattern` to 'clean-\{stem\}'"): ImagePairs(tmp_path)
    assert len(ImagePairs(tmp_path, pattern='clean-{stem}'))==6
    for o in (tmp_path/'target').iterdir(): o.unlink()
    with pytest.raises(DataError, match='No two files go together'): ImagePairs(tmp_path)


def test_two_inputs_of_one_name(tmp_path):
    picture(0).save(data(tmp_path)/'input/0.jpg')
    with pytest.raises(DataError, match='`0.jpg` and `0.png`: it is not clear'): ImagePairs(tmp_path)


def test_a_pair_of_two_sizes(tmp_path, caplog):
    picture(0, (20, 18)).save(data(tmp_path)/'target/3.png')
    ds = ImagePairs(tmp_path)
    with pytest.raises(Unreadable, match='has 20x18 pixels where `3.png` asks for 24x18'): ds.load(3)
    with caplog.at_level(logging.WARNING, 'deep_studio_nb'): bad = ds.check()
    assert len(ds)==5 and bad[0].path==tmp_path/'target/3.png' and '1 of 6 pairs cannot be used' in caplog.text
    with pytest.raises(DataError, match='20x18'): ImagePairs(tmp_path, on_bad='raise').check()
    assert [len(y) for _, y in BaseDataLoader(ImagePairs(tmp_path), 3, shuffle=False)]==[3, 2]   # unchecked: left out of its batch


def test_larger_targets_have_to_be_declared(tmp_path):
    data(tmp_path, shrink=3)
    with pytest.raises(Unreadable, match='3 times larger: if that is meant, set `scale` to 3'): ImagePairs(tmp_path).load(0)
    with pytest.raises(DataError, match='nothing left'): ImagePairs(tmp_path).check()
    ds = ImagePairs(tmp_path, scale=3)
    assert ds.check()==[] and [o.size for o in ds.load(0)]==[(24, 18)]*2
    assert ds.fingerprint()!=ImagePairs(tmp_path).fingerprint()
    with pytest.raises(Unreadable, match='asks for 16x12'): ImagePairs(tmp_path, scale=2).load(0)


@pytest.mark.parametrize('scale', [0, -1, 1.5, '2', True])
def test_scales_that_cannot_be(tmp_path, scale):
    with pytest.raises(DataError, match='`scale` is'): ImagePairs(data(tmp_path), scale=scale)


@pytest.mark.parametrize('args,error,word', [
    (dict(make_input='gray'), DataError, 'It is "grey"'), (dict(make_input='grey', mode='L'), DataError, 'leave `mode` out'),
    (dict(make_input=['GausianBlur']), LookupError, 'GaussianBlur'), (dict(make_input=[{'type': 'GaussianNoise', 'args': {'sigmma': 1}}]), ConfigError, 'did you mean `sigma`'),
    (dict(inputs='noisy'), DataError, 'no folder `noisy` of the inputs. Its folders are `input`, `target`'), (dict(split='test'), DataError, 'no test split')])
def test_arguments_that_cannot_be(tmp_path, args, error, word):
    with pytest.raises(error) as e: ImagePairs(data(tmp_path), **args)
    assert word in str(e.value)


def test_a_partner_that_is_no_picture_or_vanishes(tmp_path):
    (data(tmp_path)/'target/1.png').write_bytes(b'')
    ds = ImagePairs(tmp_path)
    (tmp_path/'input/2.png').unlink()
    assert len(torch.cat([y for _, y in BaseDataLoader(ds, 2)]))==4
    assert {o.path.name for o in ds.check()}=={'1.png', '2.png'} and len(ds)==4


# --- inputs made of targets ---

def test_damage_is_for_the_input_alone_and_follows_from_the_draw(tmp_path):
    ds = ImagePairs(data(tmp_path)/'target', make_input=DAMAGE).with_transforms(build_transforms(CUT))
    plain = ImagePairs(tmp_path/'target', make_input=[]).with_transforms(build_transforms(CUT))
    x, y = ds[Index(1, draw=5)]
    assert 0.01<(x-y).abs().mean()<0.5
    assert torch.equal(ds[Index(1, draw=5)][0], x) and not torch.equal(ds[Index(1, draw=6)][0], x)
    same, target = plain[Index(1, draw=5)]
    assert torch.equal(same, target) and torch.equal(target, y)   # moved alike, coloured alike, whatever the damage draws


def test_validation_is_damaged_the_same_way_each_time(tmp_path):
    loader = BaseDataLoader(ImagePairs(data(tmp_path)/'target', make_input=DAMAGE), 2, validation_split=4)
    valid = loader.split_validation()
    one, two = list(valid), list(valid)
    assert all(torch.equal(a, b) for o, t in zip(one, two) for a, b in zip(o, t))
    assert all((x-y).abs().mean()>0.01 for x, y in one)
    first, second = list(loader), list(loader)
    assert not torch.equal(first[0][0].sort(0).values, second[0][0].sort(0).values)   # training anew each epoch


@pytest.mark.parametrize('workers', [1, 3])
def test_workers_change_nothing(tmp_path, workers):
    ds = ImagePairs(data(tmp_path)/'target', make_input=DAMAGE).with_transforms(build_transforms(CUT))
    alone, many = (list(BaseDataLoader(ds, 2, num_workers=n, seed=1)) for n in (0, workers))
    assert all(torch.equal(a, b) for one, two in zip(alone, many, strict=True) for a, b in zip(one, two))
    loader = BaseDataLoader(ds, 2, seed=1)
    loader.start_at(1)
    assert all(torch.equal(a, b) for one, two in zip(alone[1:], loader, strict=True) for a, b in zip(one, two))


@pytest.mark.parametrize('make_input', [None, 'grey', DAMAGE])
def test_a_cache_changes_nothing(tmp_path, make_input):
    data(tmp_path)
    ds = ImagePairs(tmp_path if make_input is None else tmp_path/'target', make_input=make_input).with_transforms(build_transforms(CUT))
    kept, plain = (BaseDataLoader(ds, 2, cache=o, num_workers=0) for o in ('memory', 'off'))
    for _ in range(2): assert all(torch.equal(a, b) for one, two in zip(kept, plain, strict=True) for a, b in zip(one, two))


def test_colourisation(tmp_path):
    for i in range(4):
        (tmp_path/f'train/class{i%2}').mkdir(parents=True, exist_ok=True)
        picture(i).save(tmp_path/f'train/class{i%2}/{i}.jpg')
    (tmp_path/'val').mkdir()
    picture(9).convert('L').save(tmp_path/'val/9.png')
    ds = ImagePairs(tmp_path, make_input='grey')
    facts = ds.facts()
    assert (len(ds), facts['in_channels'], facts['out_channels'], facts['task'], facts['mode'])==(4, 1, 3, 'image', 'L')
    assert [tuple(o.shape) for o in ds.split('valid')[0]]==[(1, 18, 24), (3, 18, 24)]
    x, y = ds.load(0)
    assert x.tobytes()==y.convert('L').tobytes()


def test_a_small_input_for_a_model_that_enlarges(tmp_path):
    ds = ImagePairs(data(tmp_path)/'target', make_input=[{'type': 'Resize', 'args': {'size': [4, 4]}}]).with_transforms(build_transforms(CUT))
    x, y = next(iter(BaseDataLoader(ds, 3)))
    assert (x.shape, y.shape)==((3, 3, 4, 4), (3, 3, 16, 16))


# --- together ---

def test_pictures_move_alike_and_only_the_input_is_normalised(tmp_path):
    (tmp_path/'d').mkdir()
    data(tmp_path/'d')
    for o in (tmp_path/'d/input').iterdir(): Image.open(tmp_path/'d/target'/o.name).save(o)   # input and target are the same picture
    lists = {'train': [{'type': 'RandomResizedCrop', 'args': {'size': [16, 16]}}, {'type': 'RandomAffine', 'args': {'degrees': 30}}, {'type': 'ColorJitter', 'args': {'hue': 0.3}},
                       'RandomVerticalFlip', {'type': 'Normalize', 'args': {'mean': [0.4]*3, 'std': [0.2]*3}}]}
    ds = ImagePairs(tmp_path/'d').with_transforms(build_transforms(lists))
    for i in range(6):
        x, y = ds[Index(i, draw=i)]
        torch.testing.assert_close(x*0.2+0.4, y)
        torch.testing.assert_close(ds.decode(x), y)


def test_patches_and_many_sizes(tmp_path):
    data(tmp_path)
    for folder in ('input', 'target'): picture(0, (40, 12)).save(tmp_path/folder/'0.png')
    ds = ImagePairs(tmp_path)
    x, y = next(iter(BaseDataLoader(ds.with_transforms(transforms_for(ds, dict(preset='patches', size=16))), 6)))
    assert x.shape==y.shape==(6, 3, 16, 16)
    x, y = next(iter(BaseDataLoader(ds.with_transforms(transforms_for(ds)), 6)))
    assert x.shape==y.shape


def test_loading_and_drawing_work_from_the_loader(tmp_path):
    loader = BaseDataLoader(ImagePairs(data(tmp_path, inputs='흐림', targets='선명'), inputs='흐림', targets='선명').with_transforms(build_transforms(CUT)), 4, validation_split=2)
    assert [o.get_text() for o in loader.show_batch(3).axes[0].texts]==['input']*3+['target']*3
    assert [o.name for o in loader.save_samples(tmp_path/'out')]==['train_batch.png', 'valid_batch.png']
    assert loader.sample_ids()[0].startswith('흐림/')


def test_a_dropped_pair_stays_out(tmp_path):
    ds = ImagePairs(data(tmp_path))
    ds.drop(2)
    kept = ImagePairs(tmp_path)
    assert [kept.sample_id(i) for i in range(len(kept))]==[f'input/{i}.png' for i in (0, 1, 3, 4, 5)]
    assert len(ImagePairs(tmp_path, journal='off'))==6
