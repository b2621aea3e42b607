"Transforms by name on inputs and targets that move together, whatever the step, and what is refused."
import pickle

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torchvision import transforms as v1
from torchvision.transforms import v2
from torchvision.tv_tensors import Mask

from deep_studio_nb.common.errors import ConfigError, DataError
from deep_studio_nb.common.randomness import seeded
from deep_studio_nb.data.image_dataset import ImageDataset
from deep_studio_nb.data.presets import PRESETS, transforms_for
from deep_studio_nb.data.samples import Index
from deep_studio_nb.data.tensors import Tensors
from deep_studio_nb.data.transforms import IGNORED, InputOnly, Transforms, build_transform, build_transforms

FILL = {'image': 0, 'mask': IGNORED}
MOVING = [{'type': 'Resize', 'args': {'size': 20}}, {'type': 'CenterCrop', 'args': {'size': [20, 30]}}, {'type': 'RandomCrop', 'args': {'size': 24}},
          {'type': 'Pad', 'args': {'padding': 3, 'fill': FILL}}, {'type': 'RandomResizedCrop', 'args': {'size': [24, 24], 'scale': [0.3, 1.0]}},
          {'type': 'RandomHorizontalFlip', 'args': {'p': 1.0}}, {'type': 'RandomVerticalFlip', 'args': {'p': 1.0}}, {'type': 'RandomRotation', 'args': {'degrees': 45, 'fill': FILL}},
          {'type': 'RandomAffine', 'args': {'degrees': 20, 'translate': [0.2, 0.2], 'shear': 20, 'fill': FILL}}, {'type': 'RandomPerspective', 'args': {'p': 1.0, 'fill': FILL}},
          {'type': 'ElasticTransform', 'args': {'alpha': 20.0, 'fill': FILL}}, {'type': 'RandomZoomOut', 'args': {'p': 1.0, 'side_range': [1.1, 2.0]}}, {'type': 'ScaleJitter', 'args': {'target_size': [32, 48], 'scale_range': [0.7, 1.5]}},
          {'type': 'RandomShortestSize', 'args': {'min_size': 20}}, {'type': 'RandomResize', 'args': {'min_size': 20, 'max_size': 40}}]
STAYING = ['RandomPhotometricDistort', {'type': 'ColorJitter', 'args': {'brightness': 0.5, 'hue': 0.2}}, 'Grayscale', {'type': 'RandomGrayscale', 'args': {'p': 1.0}},
           'RandomChannelPermutation', {'type': 'RandomInvert', 'args': {'p': 1.0}}, {'type': 'RandomPosterize', 'args': {'bits': 2, 'p': 1.0}}, {'type': 'RandomSolarize', 'args': {'threshold': 99, 'p': 1.0}},
           {'type': 'RandomAutocontrast', 'args': {'p': 1.0}}, {'type': 'RandomEqualize', 'args': {'p': 1.0}}, {'type': 'RandomAdjustSharpness', 'args': {'sharpness_factor': 3, 'p': 1.0}},
           {'type': 'GaussianBlur', 'args': {'kernel_size': 5}}, {'type': 'JPEG', 'args': {'quality': 10}}, 'GaussianNoise', {'type': 'RandomErasing', 'args': {'p': 1.0}},
           {'type': 'Normalize', 'args': {'mean': [0.5]*3, 'std': [0.2]*3}}, 'ToImage', 'RGB', 'Identity', 'PILToTensor', {'type': 'ToDtype', 'args': {'dtype': 'float32', 'scale': True}}]


def name(spec): return spec if isinstance(spec, str) else spec['type']


def both():
    "A white disc on black, and the mask that says so."
    mask = Image.new('L', (48, 32), 0)
    ImageDraw.Draw(mask).ellipse((6, 6, 30, 26), fill=1)
    a = np.array(mask)
    return Image.fromarray((a[..., None]*np.uint8([255, 255, 255]))), Mask(torch.from_numpy(a))


@pytest.mark.parametrize('spec', MOVING, ids=name)
@pytest.mark.parametrize('tensor_first', [False, True])
def test_what_moves_pixels_moves_the_mask(spec, tensor_first):
    step = build_transforms({'train': ['ToTensor', spec] if tensor_first else [spec]})['train']
    for draw in range(4):
        with seeded(draw): x, y = step(*both())
        assert (type(x), type(y), y.dtype, x.dtype)==(torch.Tensor, torch.Tensor, torch.int64, torch.float32)
        assert x.shape[1:]==y.shape and set(y.unique().tolist())<={-100, 0, 1}
        white, counts = x.mean(0)>0.5, y!=-100
        assert (white==(y==1))[counts].float().mean()>0.9, name(spec)   # but for pixels at the border, interpolated in the picture


@pytest.mark.parametrize('spec', STAYING, ids=name)
def test_what_changes_colours_leaves_the_mask(spec):
    im, mask = both()
    with seeded(0): x, y = build_transforms({'train': [spec]})['train'](im, mask)
    assert torch.equal(y, mask.long().as_subclass(torch.Tensor)) and x.dtype==torch.float32 and x.shape[1:]==y.shape


@pytest.mark.parametrize('spec', MOVING, ids=name)
def test_two_pictures_move_alike(spec):
    im, _ = both()
    step = build_transforms({'train': [spec]})['train']
    with seeded(1): x, y = step(im, im.copy())
    assert torch.equal(x, y)


def test_only_the_input_gets_what_is_for_the_model():
    im, _ = both()
    for spec in ('GaussianNoise', {'type': 'RandomErasing', 'args': {'p': 1.0}}, {'type': 'Normalize', 'args': {'mean': [0.1]*3, 'std': [0.2]*3}}, {'type': 'InputOnly', 'args': {'transforms': ['RandomInvert', 'GaussianNoise']}}):
        with seeded(2): x, y = build_transforms({'train': [spec]})['train'](im, im.copy())
        assert torch.equal(y, build_transforms(None)['train'](im)) and not torch.equal(x, y)


@pytest.mark.parametrize('outer', ['RandomApply', 'RandomChoice', 'RandomOrder', 'Compose'])
def test_inside_of_another_transform_nothing_changes(outer):
    im, mask = both()
    inner = [{'type': 'RandomHorizontalFlip', 'args': {'p': 1.0}}, {'type': 'Normalize', 'args': {'mean': [0.5]*3, 'std': [0.5]*3}}, 'InputOnly']
    inner[2] = {'type': 'InputOnly', 'args': {'transforms': 'RandomInvert'}}
    step = build_transforms({'train': ['ToTensor', {'type': outer, 'args': {'transforms': inner}}]})['train']
    for draw in range(6):
        with seeded(draw): x, y = step(im, mask)
        assert y.dtype==torch.int64 and x.shape[1:]==y.shape and set(y.unique().tolist())=={0, 1}
    assert pickle.loads(pickle.dumps(step)).steps[0].joint


def test_own_steps_get_the_input_unless_they_say_otherwise():
    im, mask = both()
    def darker(x): return x.point(lambda o: o//2)
    def smaller(x): return x.resize((24, 16))
    def turned(x, y): return x.transpose(Image.Transpose.ROTATE_180), y.flip(0, 1)
    turned.joint = True
    assert torch.equal(Transforms([darker])(im, mask)[1], mask)
    x, y = Transforms([turned, darker, build_transform('ToTensor')])(im, mask)
    assert torch.equal(x[0]>0.2, y==1)
    with pytest.raises(DataError, match='`smaller` makes .*InputOnly'): Transforms([smaller])(im, mask)
    assert Transforms([InputOnly(smaller)])(im, mask)[0].size==(24, 16)
    with pytest.raises(DataError, match='torchvision.transforms.v2'): Transforms([v1.RandomCrop(8)])(im, mask)
    with pytest.raises(DataError, match='cannot move a mask'): Transforms([v2.AutoAugment()])(im, mask)


class Quarter(v2.Transform):
    "A quarter turn, written the way torchvision wants it."
    def transform(self, inpt, params): return v2.functional.rotate(inpt, 90, expand=True)


def test_an_own_transform_of_torchvision_moves_both():
    x, y = Transforms([Quarter(), build_transform('ToTensor')])(*both())
    assert x.shape==(3, 48, 32) and torch.equal(x[0]>0.5, y==1)


@pytest.mark.parametrize('spec,error,word', [
    ({'type': 'RandomRotation', 'args': {'degrees': 9, 'fill': {'maks': 1}}}, ConfigError, 'did you mean `mask`'),
    ({'type': 'Resize', 'args': {'size': 9, 'interpolation': 'bicubik'}}, ConfigError, 'did you mean `bicubic`'),
    ({'type': 'InputOnly', 'args': {'transforms': ['Rezise']}}, LookupError, 'Resize'), ({'type': 'InputOnly', 'args': {}}, ConfigError, 'transforms')])
def test_mistakes_in_a_list(spec, error, word):
    with pytest.raises(error) as e: build_transforms({'train': [spec]})
    assert word in str(e.value)


# --- presets ---

def pictures(root, sizes):
    for i, size in enumerate(sizes): Image.new('RGB', size, (40*i, 90, 120)).save(root/f'{i}.png')
    return ImageDataset(sorted(root.glob('*.png')), [0]*len(sizes), ['a'], root)


@pytest.mark.parametrize('preset', PRESETS)
@pytest.mark.parametrize('size', [24, [16, 40]])
def test_a_preset_makes_one_size_of_all(tmp_path, preset, size):
    ds = pictures(tmp_path, [(30, 20), (20, 60), (8, 8), (64, 64)])
    ds = ds.with_transforms(transforms_for(ds, dict(preset=preset, size=size, normalize='imagenet')))
    wanted = (3, 24, 24) if size==24 else (3, 16, 40)
    assert {tuple(ds.using(stage)[Index(i, draw=i)][0].shape) for stage in ('train', 'valid', 'test') for i in range(4)}=={wanted}
    a, b = (ds.using('valid')[Index(1, draw=k)][0] for k in range(2))
    assert torch.equal(a, b)


def test_nothing_said_and_one_size_changes_nothing(tmp_path, caplog):
    ds = pictures(tmp_path, [(30, 20)]*3)
    assert [type(o).__name__ for o in transforms_for(ds)['train'].steps]==['ToTensor'] and not caplog.records


@pytest.mark.parametrize('specs,word', [(dict(preset='foto'), 'It is one of'), (dict(preset=['photos']), 'It is one of'), (dict(size=0), '`size` is 0'), (dict(size=[3]), 'height, width'), (dict(size='big'), '`size`'), (dict(size=True), '`size`'),
                                        (dict(normalize='zero'), '`normalize` is'), (dict(normalize={'mean': [1]}), '`normalize` is'), (dict(tran=[]), 'did you mean `train`')])
def test_words_that_cannot_be(tmp_path, specs, word):
    with pytest.raises(ConfigError) as e: transforms_for(pictures(tmp_path, [(8, 8)]), specs)
    assert word in str(e.value)


def test_presets_are_for_images():
    with pytest.raises(ConfigError, match='is for images'): transforms_for(Tensors(torch.rand(3, 2)), dict(preset='photos'))
