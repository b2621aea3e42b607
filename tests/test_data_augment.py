"Batched augmentation: equal to torchvision's given the parameters, drawn like torchvision's, and each sample's own."
import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import Mask

from deep_studio_nb.common.errors import DataError
from deep_studio_nb.common.randomness import derive, seeded
from deep_studio_nb.data.augment import batch_step
from deep_studio_nb.data.batch_steps import sizes_of
from deep_studio_nb.data.batch_warps import BatchJitter
from deep_studio_nb.data.draws import sample_draws, uniforms
from deep_studio_nb.data.image_folder import ImageFolder
from deep_studio_nb.data.loaders import BaseDataLoader
from deep_studio_nb.data.plan import plan_of
from deep_studio_nb.data.samples import Index
from deep_studio_nb.data.tensors import Tensors
from deep_studio_nb.data.transforms import ToTensor, Transforms, build_transforms


def chosen(name): return lambda p: None if not p[name] else {}
def window(p): return {k: p[k] for k in ('top', 'left', 'height', 'width')}
def jitter(p): return dict(fn_idx=torch.tensor(p['order']), **{f'{k}_factor': None if getattr(jitter.step, k) is None else f for k, f in zip(BatchJitter.KINDS, p['factors'], strict=True)})


def crop(p):
    return dict(needs_crop=True, needs_pad=any(p['padding']), top=p['top'], left=p['left'], height=8, width=6, padding=p['padding'])


def erase(p):
    return dict(i=p['top'], j=p['left'], h=p['height'], w=p['width'], v=torch.tensor([[[0.3]]])) if p['erase'] else None


# transform, how its parameters are called by torchvision (None: it does nothing with them)
RANDOM = {
    'flip': (v2.RandomHorizontalFlip(0.4), chosen('flip')),
    'vertical flip': (v2.RandomVerticalFlip(0.6), chosen('flip')),
    'crop': (v2.RandomCrop((8, 6)), crop),
    'padded crop': (v2.RandomCrop((8, 6), padding=(1, 2, 3, 0), padding_mode='reflect'), crop),
    'crop, colour around': (v2.RandomCrop((8, 6), padding=4, fill=9), crop),
    'crop, padded as needed': (v2.RandomCrop((8, 6), padding=1, pad_if_needed=True), crop),
    'resized crop': (v2.RandomResizedCrop(12), window),
    'resized crop, bicubic': (v2.RandomResizedCrop((9, 12), (0.3, 0.7), (0.5, 2), interpolation='bicubic'), window),
    'resized crop, no antialias': (v2.RandomResizedCrop(12, antialias=False), window),
    'resized crop, nearest': (v2.RandomResizedCrop(12, interpolation='nearest'), window),
    'erasing': (v2.RandomErasing(0.7, value=0.3), erase),
    'affine': (v2.RandomAffine(20, (0.2, 0.1), (0.7, 1.4), 8), dict),
    'affine, bilinear': (v2.RandomAffine((-5, 30), (0.2, 0.3), None, (-5, 5, -8, 0), interpolation='bilinear', fill=3), dict),
    'rotation': (v2.RandomRotation(45), dict),
    'rotation, bilinear': (v2.RandomRotation((10, 350), interpolation='bilinear', center=(3, 4), fill=1), dict),
    'rotation, right angles': (v2.RandomRotation((90, 90)), dict),
    'jitter': (v2.ColorJitter(0.5, 0.5, 0.5, 0.2), jitter),
    'jitter, some': (v2.ColorJitter(contrast=0.3, hue=(0, 0.4)), jitter),
    'blur': (v2.GaussianBlur((3, 5), (0.5, 1.5)), lambda p: dict(sigma=[p['sigma']]*2)),
    'greyscale': (v2.RandomGrayscale(0.5), lambda p: dict(num_input_channels=3) if p['chosen'] else None),
    'invert': (v2.RandomInvert(0.5), chosen('chosen')),
    'autocontrast': (v2.RandomAutocontrast(0.5), chosen('chosen')),
    'equalize': (v2.RandomEqualize(0.5), chosen('chosen')),
    'solarize': (v2.RandomSolarize(100., 0.5), chosen('chosen')),
    'posterize': (v2.RandomPosterize(3, 0.5), chosen('chosen')),
    'sharpness': (v2.RandomAdjustSharpness(2., 0.5), chosen('chosen')),
}
BYTES_ONLY = {'equalize', 'posterize', 'solarize'}
TYPES = [(name, dtype) for name in RANDOM for dtype in (torch.uint8, torch.float32) if not (name in BYTES_ONLY and dtype.is_floating_point or name=='erasing' and dtype==torch.uint8)]


def params_of(name, sizes, key=0):
    "The parameters that a batch with pictures of `sizes` draws, and what torchvision calls them, picture by picture."
    transform, to_v2 = RANDOM[name]
    step = batch_step(transform)
    jitter.step = transform
    drawn = step.params(uniforms(sample_draws(key, torch.arange(len(sizes))), step.n), sizes)
    singles = [{k: v[i].tolist() for k, v in drawn.items()} for i in range(len(sizes))]
    return step, drawn, [to_v2(o) for o in singles]


def pictures(h=13, w=17, b=9, dtype=torch.uint8):
    x = torch.randint(0, 256, (b, 3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(h*w))
    return x if dtype==torch.uint8 else x/255


@pytest.mark.parametrize('name, dtype', TYPES)
def test_given_the_parameters_a_batch_is_what_torchvision_makes(name, dtype):
    x = pictures(dtype=dtype)
    kept = x.clone()
    step, drawn, v2_params = params_of(name, sizes_of(x))
    got = step.apply(x, **drawn)
    for i, p in enumerate(v2_params):
        want = x[i] if p is None else RANDOM[name][0].transform(x[i], p)
        assert torch.equal(got[i], want), f'picture {i} with {p}'
    assert torch.equal(x, kept)


@pytest.mark.parametrize('name', [o for o in RANDOM if o!='erasing'])
def test_pictures_of_any_size_are_what_torchvision_makes(name):
    xs = [pictures(h, w, 1)[0] for h, w in ((13, 17), (30, 9), (12, 12), (9, 30))]
    hwc = [o.permute(1, 2, 0).contiguous().permute(2, 0, 1) for o in xs]
    step, drawn, v2_params = params_of(name, sizes_of(xs))
    for lying in (xs, hwc):
        got = step.apply(lying, **drawn)
        for i, p in enumerate(v2_params):
            assert torch.equal(got[i], xs[i] if p is None else RANDOM[name][0].transform(xs[i], p))


# --- the same distributions ---

N = 4000
SIZE = 24, 40
CONTINUOUS = {   # torchvision's parameters as numbers
    'crop': lambda p: [p['top'], p['left']],
    'padded crop': lambda p: [p['top'], p['left']],
    'resized crop': lambda p: [p['top'], p['left'], p['height'], p['width']],
    'resized crop, bicubic': lambda p: [p['top'], p['left'], p['height'], p['width'], p['height']*p['width'], p['height']/p['width']],
    'affine': lambda p: [p['angle'], *p['translate'], p['scale'], *p['shear']],
    'affine, bilinear': lambda p: [p['angle'], *p['translate'], p['scale'], *p['shear']],
    'rotation': lambda p: [p['angle']],
    'blur': lambda p: [p['sigma'][0]],
    'jitter': lambda p: [*(p[f'{k}_factor'] for k in BatchJitter.KINDS), *torch.as_tensor(p['fn_idx']).argsort().tolist()],
    'erasing': lambda p: [p['i'], p['j'], p['h'], p['w']],
}


def distance(a, b):
    "How far two samples' distribution functions are apart (Kolmogorov and Smirnov)."
    at = np.sort(np.concatenate([a, b]))
    return np.abs(np.searchsorted(np.sort(a), at, 'right')/len(a) - np.searchsorted(np.sort(b), at, 'right')/len(b)).max()


@pytest.mark.parametrize('name', CONTINUOUS)
def test_parameters_are_distributed_like_torchvisions(name):
    numbers = CONTINUOUS[name]
    transform = RANDOM[name][0]
    _, drawn, ours = params_of(name, torch.tensor([SIZE]).expand(N, 2), key=1)
    with seeded(1): theirs = [transform.make_params([torch.empty(3, *SIZE, dtype=torch.uint8)]) for _ in range(N)]
    if name=='erasing':   # the choice whether to erase is drawn apart
        share = drawn['erase'].float().mean().item()
        assert abs(share-transform.p*np.mean([o['v'] is not None for o in theirs])) < 0.03
        theirs = [o for o in theirs if o['v'] is not None]
    a, b = (np.array([numbers(o) for o in some if o is not None], dtype=float) for some in (ours, theirs))
    limit = 1.73*math.sqrt(1/len(a)+1/len(b))   # one comparison in 200 of equal distributions is further apart
    for k, (x, y) in enumerate(zip(a.T, b.T, strict=True)): assert distance(x, y) < limit, f'number {k}'
    moves = b.std(0)>0
    assert np.abs(np.corrcoef(a.T[moves])-np.corrcoef(b.T[moves])).max() < 0.08


@pytest.mark.parametrize('name', ['flip', 'vertical flip', 'greyscale', 'invert'])
def test_choices_are_as_frequent_as_asked(name):
    transform = RANDOM[name][0]
    _, drawn, _ = params_of(name, torch.tensor([SIZE]).expand(N, 2), key=2)
    share = next(iter(drawn.values())).float().mean().item()
    assert abs(share-transform.p) < 3*math.sqrt(transform.p*(1-transform.p)/N)


def test_every_order_of_colours_comes():
    _, drawn, _ = params_of('jitter', torch.tensor([SIZE]).expand(N, 2), key=3)
    orders, counts = drawn['order'].unique(dim=0, return_counts=True)
    assert len(orders)==24 and (counts-N/24).abs().max() < 50


def test_a_batch_has_the_statistics_of_torchvisions():
    "Pixels, not parameters: mean, spread and sharpness of a whole list of transforms over many draws of some photos."
    smooth = F.gaussian_blur(pictures(48, 64, 4).float(), [9, 9]).round().to(torch.uint8)
    augment = [v2.RandomResizedCrop(16, (0.3, 1)), v2.RandomHorizontalFlip(), v2.ColorJitter(0.3, 0.3)]
    steps = Transforms([*augment, ToTensor(), v2.Normalize([0.5]*3, [0.25]*3)])
    draws = sample_draws(derive('statistics'), torch.arange(800))
    ours = plan_of(steps).batch(smooth.repeat(200, 1, 1, 1), draws)
    with seeded(0): theirs = torch.stack([steps(o) for o in smooth.repeat(200, 1, 1, 1)])
    for fn in (lambda x: x.mean((2, 3)), lambda x: x.std((2, 3)), lambda x: x.diff(dim=3).abs().mean((2, 3)), lambda x: x[..., :8].mean((2, 3))-x[..., 8:].mean((2, 3))):
        a, b = fn(ours), fn(theirs)
        assert ((a.mean(0)-b.mean(0)).abs() < 4*(a.var(0)/800+b.var(0)/800).sqrt()).all()
        assert (a.std(0)/b.std(0)-1).abs().max() < 0.1


# --- each sample's own draw ---

EVERYTHING = [v2.RandomResizedCrop(16), v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), v2.RandomRotation(20), v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
              v2.RandomGrayscale(0.3), v2.GaussianBlur(3), ToTensor(), v2.Normalize([0.5]*3, [0.2]*3), v2.RandomErasing(0.5)]


def mixed(n=23):
    return [pictures(20+i % 7, 40-i, 1)[0] for i in range(n)]


def test_a_draw_does_not_depend_on_batch_mates():
    plan = plan_of(Transforms(EVERYTHING))
    xs, draws = mixed(), sample_draws(5, torch.arange(23))
    whole = plan.batch(xs, draws)
    assert whole.shape==(23, 3, 16, 16) and whole.dtype==torch.float32
    for size in (1, 2, 7, 22):
        parts = [plan.batch(xs[i:i+size], draws[i:i+size]) for i in range(0, 23, size)]
        assert torch.equal(torch.cat(parts), whole), size
    mates = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    assert torch.equal(plan.batch([xs[i] for i in mates], draws[mates]), whole[mates])
    assert not torch.equal(plan.batch(xs, sample_draws(6, torch.arange(23))), whole)


def test_a_batch_in_one_tensor_is_the_same_as_a_list():
    plan = plan_of(Transforms(EVERYTHING))
    x, draws = pictures(30, 40, 11), sample_draws(5, torch.arange(11))
    kept = x.clone()
    want = plan.batch(x, draws)
    assert torch.equal(plan.batch(list(x), draws), want)
    assert torch.equal(plan.batch([o.permute(1, 2, 0).contiguous().permute(2, 0, 1) for o in x], draws), want)
    assert torch.equal(plan.batch(x.contiguous(memory_format=torch.channels_last), draws), want)
    assert torch.equal(x, kept)


def test_draws_use_no_generator():
    plan = plan_of(Transforms(EVERYTHING))
    before = torch.get_rng_state()
    a = plan.batch(mixed(5), sample_draws(0, torch.arange(5)))
    torch.rand(3)
    b = plan.batch(mixed(5), sample_draws(0, torch.arange(5)))
    torch.set_rng_state(before)
    assert torch.equal(a, b)
    plan.batch(mixed(5), sample_draws(0, torch.arange(5)))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_plan_goes_to_another_process():
    steps = Transforms([v2.Resize(20), *EVERYTHING])
    plan = steps.plan()
    again = pickle.loads(pickle.dumps(steps)).plan()
    xs, draws = [plan.prepare(o) for o in mixed(4)], sample_draws(0, torch.arange(4))
    assert torch.equal(again.batch(xs, draws), plan.batch(xs, draws))
    assert again.key==plan.key


# --- without randomness ---

VALID = {
    'resize, crop': [v2.Resize(20), v2.CenterCrop(16)],
    'to one size': [v2.Resize((16, 20), interpolation='bicubic')],
    'grey': [v2.Grayscale(3), v2.Resize((9, 9))],
    'grey, one channel': [v2.Resize((9, 9)), v2.Grayscale(1)],
    'pad': [v2.CenterCrop(16), v2.Pad((1, 2), fill=4)],
    'wrapped': [v2.Compose([v2.Resize(18), v2.Compose([v2.CenterCrop(16)])])],
    'floats first': [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Resize((12, 12)), v2.Normalize([0.4]*3, [0.3]*3)],
}


@pytest.mark.parametrize('name', VALID)
@pytest.mark.parametrize('kind', ['picture', 'tensor'])
def test_without_randomness_a_batch_is_exactly_torchvision(name, kind):
    steps = build_transforms({'valid': VALID[name]})['valid']
    plan = steps.plan()
    assert not plan.random and plan.at_least is None
    xs = [Image.fromarray(o.permute(1, 2, 0).numpy()) for o in mixed(6)] if kind=='picture' else mixed(6)
    want = torch.stack([steps(o).as_subclass(torch.Tensor) for o in xs])
    assert torch.equal(plan.batch([plan.prepare(o) for o in xs]), want)
    for i, o in enumerate(xs): assert torch.equal(plan.batch([plan.prepare(o)])[0], want[i])


def test_sizes_that_differ_come_as_a_list():
    plan = plan_of(Transforms([v2.Resize(10), v2.RandomHorizontalFlip(), ToTensor()]))
    got = plan.batch([plan.prepare(o) for o in mixed(3)], sample_draws(0, torch.arange(3)))
    assert isinstance(got, list) and len({o.shape for o in got})==3


# --- what is done when ---

def own(x): return x


@pytest.mark.parametrize('steps, before, batched', [
    ([v2.Resize(8), v2.RandomCrop(4)], 1, True),
    ([v2.RandomCrop(4), v2.Resize(8)], 0, True),
    ([v2.Resize(8), own, v2.CenterCrop(4)], 1, False),
    ([v2.Resize(8), v2.RandomCrop(4), v2.RandomPerspective()], 1, False),
    ([v2.Resize(8), v2.RandomApply([v2.RandomRotation(5)])], 1, False),
    ([v2.RandomErasing(value='random')], 0, False),
    ([v2.RandomCrop(4, fill={torch.Tensor: 1})], 0, False),
    ([v2.RandomRotation(5, expand=True)], 0, False),
    ([], 0, True),
])
def test_a_list_is_done_by_batch_as_a_whole_or_not_at_all(steps, before, batched):
    plan = plan_of(build_transforms({'train': steps})['train'])
    assert len(plan.before)==before and (plan.batch is not None)==batched


def test_a_list_that_is_not_batched_gives_what_it_always_gave():
    steps = build_transforms({'train': [v2.Resize(20), v2.RandomPerspective(p=1.), own]})['train']
    plan = steps.plan()
    pic = Image.fromarray(mixed(1)[0].permute(1, 2, 0).numpy())
    with seeded(3): want = steps(pic)
    with seeded(3): got = plan.finish(plan.prepare(pic))
    assert torch.equal(got, want)
    grey = pic.convert('L')
    with seeded(3): want = steps(grey)
    with seeded(3): got = plan.finish(plan.prepare(grey))
    assert torch.equal(got, want) and got.shape[0]==1


@pytest.mark.parametrize('steps, pixels', [
    ([v2.RandomResizedCrop(100, (0.25, 1), (1, 1))], 200),
    ([v2.RandomResizedCrop((60, 100), (0.25, 1), (0.5, 2))], 100/math.sqrt(0.125)),
    ([v2.Resize(64), v2.RandomCrop(60)], 128),
    ([v2.Resize((64, 90)), v2.RandomHorizontalFlip()], 180),
    ([v2.RandomCrop(60)], None),
    ([v2.CenterCrop(100), v2.RandomHorizontalFlip()], None),
    ([v2.Resize(64), v2.CenterCrop(60)], None),
    ([own, v2.RandomResizedCrop(100)], None),
])
def test_how_small_a_picture_may_be_decoded(steps, pixels):
    got = plan_of(Transforms([*steps, ToTensor()])).at_least
    assert got is None if pixels is None else pixels <= got <= pixels+1


def test_the_smallest_window_keeps_the_pixels_it_is_resized_to():
    step = v2.RandomResizedCrop((24, 32), (0.1, 0.5))
    side = plan_of(Transforms([step])).at_least
    batch = batch_step(step)
    for size in ((side, side), (side, 2*side), (3*side, side)):
        p = batch.params(uniforms(sample_draws(0, torch.arange(3000)), batch.n), torch.tensor([size]).expand(3000, 2))
        assert min(p['height'].min(), p['width'].min()) >= 31   # the sides are rounded


def test_a_crop_that_is_too_large_is_explained():
    plan = plan_of(Transforms([v2.RandomCrop(50), ToTensor()]))
    with pytest.raises(DataError, match='`RandomCrop` cuts 50 by 50 pixels, but a picture has only 21 by 39'):
        plan.batch([pictures(60, 60, 1)[0], pictures(21, 39, 1)[0]], sample_draws(0, torch.arange(2)))


# --- input and target together ---

JOINT = {
    'resized, flipped': [v2.Resize(20), v2.RandomHorizontalFlip(), v2.RandomResizedCrop(16)],
    'to one size': [v2.Resize((16, 18)), v2.ColorJitter(0.5)],
    'nothing first': [v2.RandomRotation(30)],
    'tensors first': [v2.ToImage(), v2.Resize((16, 18)), v2.RandomCrop(12), v2.ToDtype(torch.float32, scale=True)],
}


@pytest.mark.parametrize('target', ['mask', 'picture', 'grey picture'])
@pytest.mark.parametrize('name', JOINT)
def test_what_is_kept_of_a_pair_changes_nothing(name, target):
    steps = build_transforms({'train': [*JOINT[name], v2.Normalize([0.5]*3, [0.2]*3)]})['train']
    plan = steps.plan(joint=True)
    x = Image.fromarray(mixed(3)[2].permute(1, 2, 0).numpy())
    y = Mask(torch.randint(0, 4, (x.height, x.width), dtype=torch.uint8)) if target=='mask' else x.convert('L' if target=='grey picture' else 'RGB')
    with seeded(4): want = steps(x, y)
    kept = plan.prepare(x, y)
    assert all(type(o) is torch.Tensor and o.dtype==torch.uint8 for o in kept)
    with seeded(4): got = plan.finish(*kept)
    for a, b in zip(got, want, strict=True): assert torch.equal(a, b) and a.dtype==b.dtype


def test_an_own_function_sees_what_it_always_saw():
    seen = []
    def note(x):
        seen.append((type(x).__name__, getattr(x, 'dtype', None)))
        return x
    steps = build_transforms({'train': [note]})
    Tensors(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)).with_transforms(steps)[0]
    Tensors(torch.zeros(2, 3, 8, 8)).with_transforms(steps)[0]
    assert seen==[('Tensor', torch.float32)]*2


@pytest.mark.parametrize('raw', [np.arange(6*7*3, dtype=np.uint8).reshape(6, 7, 3), np.arange(6*7, dtype=np.uint8).reshape(6, 7), np.random.default_rng(0).random((6, 7, 3)).astype(np.float32),
                                 np.arange(42, dtype=np.uint16).reshape(6, 7)*999, Image.new('P', (7, 6), 3), Image.new('RGBA', (7, 6), (1, 2, 3, 4))], ids=lambda o: f'{type(o).__name__} {getattr(o, "dtype", None) or o.mode}')
def test_inputs_that_are_no_plain_pictures(raw):
    steps = build_transforms({'train': [v2.CenterCrop(4) if isinstance(raw, Image.Image) else (v2.Identity())]})['train']
    plan = steps.plan()
    assert torch.equal(plan.batch([plan.prepare(raw)])[0], steps(raw))


# --- through a loader ---

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "20 photos of different sizes, augmented in training."
    root = tmp_path_factory.mktemp('photos')
    for i, x in enumerate(mixed(20)):
        (root/'ab'[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(root/'ab'[i % 2]/f'{i:02}.png')
    return ImageFolder(root).with_transforms(build_transforms({'train': EVERYTHING[:7], 'valid': [v2.Resize(20), v2.CenterCrop(16)]}))


def by_sample(loader, epochs=2):
    "What each sample became in each epoch."
    res = []
    for _ in range(epochs):
        order = loader.sampler.upcoming()[0].tolist()
        res.append(dict(zip(order, torch.cat([x for x, _ in loader]), strict=True)))
    return res


@pytest.mark.parametrize('how', [dict(batch_size=7), dict(batch_size=20), dict(batch_size=4, num_workers=2), dict(batch_size=3, num_workers=1, start='fork'), dict(batch_size=4, cache='memory'), dict(batch_size=6, cache='disk', num_workers=2)], ids=str)
@pytest.mark.filterwarnings('ignore:This DataLoader will create')
def test_a_sample_becomes_the_same_whatever_loads_it(photos, how):
    want = by_sample(BaseDataLoader(photos, 4, num_workers=0, cache='off', seed=3))
    assert not torch.equal(want[0][5], want[1][5])
    got = by_sample(BaseDataLoader(photos, **how, seed=3))
    for a, b in zip(want, got, strict=True):
        assert a.keys()==b.keys() and all(torch.equal(a[i], b[i]) for i in a)
    first = dict(zip(*(o.tolist() for o in BaseDataLoader(photos, 4, seed=3).sampler.upcoming())))
    assert all(torch.equal(photos[Index(i, first[i])][0], want[0][i]) for i in (0, 7, 19))


def test_bytes_in_memory_are_augmented_like_files(photos):
    x = pictures(24, 24, 20)
    steps = build_transforms({'train': [v2.RandomCrop(20, padding=2), v2.RandomHorizontalFlip(), v2.Normalize([0.5]*3, [0.2]*3)]})
    ds = Tensors(x, torch.arange(20)).with_transforms(steps)
    got = by_sample(BaseDataLoader(ds, 6, seed=1))
    order, draws = BaseDataLoader(ds, 6, seed=1).sampler.upcoming()
    for i, draw in zip(order.tolist(), draws.tolist()): assert torch.equal(steps['train'].plan().batch([x[i]], torch.tensor([draw]))[0], got[0][i])
