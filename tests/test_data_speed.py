"Fast loading that changes nothing: the same batches with any cache and any workers, budgets that hold, large folders that start at once."
import logging
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deep_studio_nb.common.errors import DataError
from deep_studio_nb.data import image_dataset, keeping
from deep_studio_nb.data.cache import PixelCache
from deep_studio_nb.data.image_folder import ImageFolder
from deep_studio_nb.data.loaders import BaseDataLoader
from deep_studio_nb.data.transforms import build_transforms

CROPS = [{'type': 'RandomResizedCrop', 'args': {'size': 24}}, 'RandomHorizontalFlip', {'type': 'Normalize', 'args': {'mean': [.5]*3, 'std': [.25]*3}}]
WHOLE = [{'type': 'Resize', 'args': {'size': [30, 40]}}, {'type': 'CenterCrop', 'args': {'size': 24}}, {'type': 'Normalize', 'args': {'mean': [.5]*3, 'std': [.25]*3}}]
ODD = [{'type': 'Resize', 'args': {'size': [30, 40]}}, {'type': 'ElasticTransform', 'args': {'alpha': 20.0}}, {'type': 'CenterCrop', 'args': {'size': 24}}]   # has no version by batch
N = 22


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv('DEEP_STUDIO_CACHE', str(tmp_path/'.kept'))


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "Smooth pictures of several sizes, as JPEG and PNG."
    root, rng = tmp_path_factory.mktemp('사진'), np.random.default_rng(0)
    for i in range(N):
        (root/'ab'[i % 2]).mkdir(exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        small.resize((60+i, 50+i//2), Image.BICUBIC).save(root/'ab'[i % 2]/f'{i}.{"jpg" if i % 3 else "png"}')
    return root


def data(root, train=CROPS): return ImageFolder(root, mode='RGB').with_transforms(build_transforms({'train': train, 'valid': WHOLE}))


def same(a, b):
    a, b = list(a), list(b)
    return len(a) == len(b) and all(torch.equal(p, q) for x, y in zip(a, b) for p, q in zip(x, y, strict=True))


def epochs(loader, n=2): return [b for _ in range(n) for b in loader]


# --- the same batches ---

@pytest.mark.parametrize('train', [CROPS, ODD], ids=['by batch', 'by sample'])
@pytest.mark.parametrize('cache', ['off', 'memory', 'disk'])
def test_batches_do_not_depend_on_cache_or_workers(root, cache, train):
    ds = data(root, train)
    want = epochs(BaseDataLoader(ds, 5, seed=3, num_workers=0, cache='off'))
    assert not same(want[:5], want[5:])
    for workers, start in ((0, 'auto'), (1, 'auto'), (3, 'auto'), (3, 'fork')):
        loader = BaseDataLoader(ds, 5, seed=3, num_workers=workers, start=start, cache=cache)
        assert same(epochs(loader), want), (workers, start)
        if cache != 'off': assert len(loader.dataset.cache) == N


@pytest.mark.parametrize('cache', ['off', 'memory'])
def test_batches_of_spawned_workers(root, cache):
    ds = data(root)
    loader = BaseDataLoader(ds, 5, seed=3, num_workers=1, start='spawn', cache=cache)
    assert same(epochs(loader), epochs(BaseDataLoader(ds, 5, seed=3, num_workers=0, cache='off')))
    if cache == 'memory': assert len(loader.dataset.cache) == N   # written by the worker, seen here


@pytest.mark.parametrize('workers,start', [(0, 'auto'), (1, 'threads'), (3, 'threads'), (3, 'fork')])
def test_from_step_k_straight_with_a_cache(root, workers, start):
    ds = data(root)
    whole = BaseDataLoader(ds, 4, seed=3, num_workers=0, cache='off')
    whole.set_epoch(5)
    want = list(whole)
    loader = BaseDataLoader(ds, 4, seed=3, num_workers=workers, start=start, cache='memory')
    for k in (4, 0, 2, 6):
        loader.set_epoch(5)
        loader.start_at(k)
        assert same(loader, want[k:]), k


def test_a_sample_alone_is_the_sample_of_the_batch(root):
    loader = BaseDataLoader(data(root), 6, seed=1, num_workers=0, cache='memory')
    seen = loader.peek(6)
    x, y = next(iter(loader))
    assert all(torch.equal(a, b) and p == q for (a, p), b, q in zip(seen, x, y.tolist()))
    order, draws = loader.sampler.upcoming()
    again = [loader.dataset[i] for i in loader.sampler.named(order[:3], draws[:3])]
    assert all(torch.equal(a, b) for (a, _), b in zip(again, next(iter(loader))[0]))


def test_no_global_generator_is_touched_with_a_cache(root):
    def states(): return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(), torch.get_num_threads()
    before = states()
    for cache in ('memory', 'disk', 'auto'):
        for workers, start in ((0, 'auto'), (2, 'threads'), (2, 'fork'), ('auto', 'auto')):
            loader = BaseDataLoader(data(root), 4, validation_split=.3, cache=cache, num_workers=workers, start=start)
            epochs(loader)
            list(loader.split_validation())
            assert states() == before


# --- the same as torchvision ---

def test_without_randomness_batches_equal_torchvision_on_the_picture(root):
    from torchvision.transforms import v2
    steps = v2.Compose([v2.Resize([30, 40]), v2.CenterCrop(24), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([.5]*3, [.25]*3)])
    ready = ['ToImage', {'type': 'ToDtype', 'args': {'dtype': 'float32', 'scale': True}}]
    ds = data(root).using('valid')
    want = torch.stack([steps(Image.open(o).convert('RGB')) for o in ds.files]).as_subclass(torch.Tensor)
    for cache in ('off', 'memory'):
        for lists in ({'valid': WHOLE[:2] + ready + WHOLE[2:]}, {'valid': WHOLE}):
            loader = BaseDataLoader(ds.with_transforms(build_transforms(lists)), 5, False, num_workers=2, cache=cache)
            for _ in range(2):
                got = torch.cat([x for x, _ in loader])
                if len(lists['valid']) > 3: assert torch.equal(got, want)
                else: assert (got-want).abs().max() < 1e-6   # ToTensor divides by 255, as torchvision's own did; v2 multiplies by its inverse


def test_augmented_batches_have_the_distribution_of_torchvision(root):
    "Mean, spread and edges of many epochs, ours with a cache against v2 on PIL pictures."
    from torchvision.transforms import v2
    steps = v2.Compose([v2.RandomResizedCrop(24), v2.RandomHorizontalFlip(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([.5]*3, [.25]*3)])
    ds = data(root)
    loader = BaseDataLoader(ds, 11, num_workers=2, cache='memory', seed=4)
    ours = torch.cat([x for _ in range(40) for x, _ in loader])
    pictures = [Image.open(o).convert('RGB') for o in ds.files]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = torch.stack([steps(o) for _ in range(40) for o in pictures])
    def look(x):   # (n, 24) statistics of each sample
        flat = x.flatten(2)
        return torch.cat([flat.mean(2), flat.std(2), (x[..., 1:]-x[..., :-1]).abs().mean((2, 3)), (x[:, :, 1:]-x[:, :, :-1]).abs().mean((2, 3)), x[:, :, 0, 0], x[:, :, -1, -1]], 1)
    a, b = look(ours), look(theirs)
    off = (a.mean(0)-b.mean(0)).abs() / (a.var(0)/len(a) + b.var(0)/len(b)).sqrt()
    assert off.max() < 4, off
    assert ((a.std(0)/b.std(0)).log().abs() < .15).all()


# --- the cache ---

def test_later_epochs_read_no_files(root, tmp_path):
    copy = shutil.copytree(root, tmp_path/'copy')
    want = epochs(BaseDataLoader(data(root), 4, seed=2, num_workers=0, cache='off'), 3)
    loader = BaseDataLoader(data(copy), 4, seed=2, num_workers=2, cache='memory')
    assert same(loader, want[:6])
    shutil.rmtree(copy)
    assert same(epochs(loader), want[6:])


@pytest.mark.parametrize('where', ['memory', 'disk'])
@pytest.mark.parametrize('workers,start', [(0, 'auto'), (3, 'threads'), (3, 'fork')])
def test_the_budget_is_never_exceeded(root, where, workers, start):
    budget = 60_000   # a pictures takes about 11,000
    loader = BaseDataLoader(data(root), 4, seed=2, num_workers=workers, start=start, cache=where, cache_budget=f'{budget/1000}kB')
    assert same(epochs(loader, 3), epochs(BaseDataLoader(data(root), 4, seed=2, num_workers=0, cache='off'), 3))
    cache = loader.dataset.cache
    assert 0 < len(cache) < N
    taken = os.fstat(cache.fd)
    assert taken.st_size <= budget and taken.st_blocks*512 <= budget + 4096   # whole pages are taken


def test_training_and_validation_share_the_budget(root):
    loader = BaseDataLoader(data(root), 4, validation_split=.5, num_workers=0, cache='memory', cache_budget='100kB')
    valid = loader.split_validation()
    epochs(loader), epochs(valid)
    caches = [o.dataset.cache for o in (loader, valid)]
    assert sum(0 if o is None else o.capacity for o in caches) <= 100_000 and len(caches[0])


def test_memory_of_the_process_stays_within_the_budget(tmp_path):
    "Resident memory of a process that loads 60 MB of pixels with 20 MB allowed, without and with a cache."
    for i in range(40):
        (tmp_path/'d/a').mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (800, 640), (i, 2*i, 3*i)).save(tmp_path/f'd/a/{i}.png')
    code = '''
import sys, resource, torch
torch.set_num_threads(1)
from deep_studio_nb.data.image_folder import ImageFolder
from deep_studio_nb.data.loaders import BaseDataLoader
from deep_studio_nb.data.transforms import build_transforms
ds = ImageFolder(sys.argv[1], mode='RGB').with_transforms(build_transforms({'train': [{'type': 'RandomResizedCrop', 'args': {'size': 32}}]}))
loader = BaseDataLoader(ds, 8, num_workers=2, cache=sys.argv[2], cache_budget='20MB')
for _ in range(3):
    for b in loader: pass
kept = 0 if loader.dataset.cache is None else len(loader.dataset.cache)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024)
'''
    run = lambda cache: [int(o) for o in subprocess.run([sys.executable, '-c', code, str(tmp_path/'d'), cache], capture_output=True, text=True, check=True).stdout.split()]
    (none, without), (kept, with_cache) = run('off'), run('memory')
    assert none == 0 and 10 <= kept <= 13
    assert with_cache - without < 20 + 12   # MB; allocators vary by some


def test_auto_chooses_by_what_fits(root, caplog):
    def chosen(**left):
        loader = BaseDataLoader(data(root), 4, num_workers=0)
        loader._shared.room.left.update(left)
        next(iter(loader))
        return getattr(loader.dataset.cache, 'where', 'off')
    assert chosen(memory=10**7, disk=10**7) == 'memory'
    assert chosen(memory=10**5, disk=10**7) == 'disk'
    with caplog.at_level(logging.INFO, 'deep_studio_nb.data'): assert chosen(memory=10**5, disk=10**5) == 'off'
    assert len([o for o in caplog.records if 'not kept' in o.message]) == 1


def test_a_disk_that_cannot_be_written_or_fills_up_costs_nothing_but_time(root, monkeypatch, tmp_path):
    want = epochs(BaseDataLoader(data(root), 4, seed=2, num_workers=0, cache='off'))
    def full(*_): raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(os, 'pwrite', full)
        loader = BaseDataLoader(data(root), 4, seed=2, num_workers=0, cache='disk')
        assert same(epochs(loader), want) and len(loader.dataset.cache) == 0
    (tmp_path/'file').write_text('')
    monkeypatch.setenv('DEEP_STUDIO_CACHE', str(tmp_path/'file'))
    with pytest.raises(DataError, match='cannot be written'): next(iter(BaseDataLoader(data(root), 4, num_workers=0, cache='disk')))
    loader = BaseDataLoader(data(root), 4, seed=2, num_workers=0)
    loader._shared.room.left.update(memory=0, disk=10**9)
    assert same(epochs(loader), want) and loader.dataset.cache is None


def test_a_disk_cache_leaves_nothing_behind(root, tmp_path):
    loader = BaseDataLoader(data(root), 4, num_workers=2, cache='disk')
    epochs(loader)
    assert len(loader.dataset.cache) == N
    assert [o for o in (tmp_path/'.kept').rglob('pixels-*')] == []


@pytest.mark.skipif('fork' not in multiprocessing.get_all_start_methods(), reason='no fork')
def test_nobody_reads_half_a_record_of_a_killed_writer():
    fork = multiprocessing.get_context('fork')
    cache = PixelCache(4000, 4000*9000, method='fork')
    def write(begin):
        for i in range(begin, 4000): cache.put(i, (torch.full((80, 100), i % 251, dtype=torch.uint8), i))
    for k in range(5):
        p = fork.Process(target=write, args=(k*300,))
        p.start()
        while cache.get(k*300+50) is None and p.is_alive(): pass
        p.kill()
        p.join()
    found = [cache.get(i) for i in range(4000)]
    assert sum(o is not None for o in found) > 50
    for i, o in enumerate(found): assert o is None or o[1] == i and bool((o[0] == i % 251).all())


def test_changed_transforms_do_not_meet_old_pixels(root):
    ds = data(root).using('valid')
    ds.cache = PixelCache(N, 10**7, key=ds.plan.key)
    first = [ds[i][0] for i in range(N)]
    ds.transforms = build_transforms({'valid': [{'type': 'Resize', 'args': {'size': [12, 12]}}]})
    assert ds[0][0].shape == (3, 12, 12) and first[0].shape == (3, 24, 24)


def test_what_a_step_writes_into_does_not_reach_the_cache(root):
    ds = data(root, [{'type': 'Resize', 'args': {'size': [30, 40]}}, lambda x: torch.from_numpy(np.asarray(x).copy()).permute(2, 0, 1).mul_(0)])
    loader = BaseDataLoader(ds, 4, num_workers=0, cache='memory', shuffle=False)
    for _ in range(2): assert all((x == 0).all() for x, _ in loader)
    assert len(loader.dataset.cache) == N and loader.dataset.fetch(0)[0].max() > 0


# --- workers ---

def test_what_was_written_in_a_session_is_named_and_loading_goes_on(root):
    code = f'''
import logging, sys
logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format='%(message)s')
from deep_studio_nb.data.loaders import BaseDataLoader
from deep_studio_nb.data.image_folder import ImageFolder
from deep_studio_nb.data.transforms import build_transforms
class Invert:
    def __call__(self, x): return x.point(lambda v: 255-v).resize((16,16))
ds = ImageFolder({str(root)!r}, mode='RGB').with_transforms(build_transforms({{'train': [Invert()]}}))
n = sum(len(y) for x,y in BaseDataLoader(ds, 4, num_workers=2, start='spawn'))
print('samples', n)
n = sum(len(y) for x,y in BaseDataLoader(ds, 4, num_workers=2, start='fork')) if sys.platform=='linux' else n
print('samples', n)
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=240)
    lines = done.stdout.strip().splitlines()
    assert done.returncode == 0, done.stderr
    assert lines[1:] == [f'samples {N}']*2 and 'class `Invert`' in lines[0] and "transforms['train']" in lines[0] and 'without workers' in lines[0], lines


def test_auto_takes_no_workers_for_small_data_and_data_in_memory(root, monkeypatch):
    from deep_studio_nb.data.tensors import Tensors
    monkeypatch.setattr(keeping, 'usable_cores', lambda: 4)
    loader = BaseDataLoader(data(root), 4)
    epochs(loader, 1)
    assert loader.num_workers == 0
    gathered = BaseDataLoader(Tensors(torch.zeros(1000, 3), torch.zeros(1000).long()), 10)
    epochs(gathered, 1)
    assert gathered.gathers
    pixels = BaseDataLoader(Tensors(torch.zeros(50, 3, 40, 40, dtype=torch.uint8), torch.arange(50) % 2).with_transforms(build_transforms({'train': CROPS})), 10)
    epochs(pixels, 1)
    assert pixels.num_workers == 0 and pixels.dataset.cache is None

    class Slow(ImageFolder):
        def load_pixels(self, i, at_least=None):
            time.sleep(.06)
            return super().load_pixels(i, at_least)
    slow = BaseDataLoader(Slow(root, mode='RGB').with_transforms(build_transforms({'train': CROPS})), 4, cache='off')
    assert same(slow, BaseDataLoader(data(root), 4, num_workers=0)) and slow.num_workers == 4


# --- large folders ---

def test_a_hundred_thousand_files_are_listed_and_started_without_reading_them(tmp_path, monkeypatch):
    Image.new('RGB', (32, 32), 'red').save(tmp_path/'one.jpg')
    for c in range(20):
        (tmp_path/f'd/{c}').mkdir(parents=True)
        for i in range(5000): (tmp_path/f'd/{c}/{i}.jpg').touch()
    ds = ImageFolder(tmp_path/'d', mode='RGB')
    assert len(ds) == 100_000
    reads = []
    def read(path, mode, at_least=None):
        reads.append(Path(path))
        return torch.zeros(3, 32, 32, dtype=torch.uint8)
    monkeypatch.setattr(image_dataset, 'read_pixels', read)
    assert ds.check() == []
    loader = BaseDataLoader(ds.with_transforms(build_transforms({'train': CROPS})), 32, validation_split=.1, cache='memory', cache_budget='1GB', num_workers=2)
    x, y = next(iter(loader))
    assert x.shape == (32, 3, 24, 24)
    assert len(reads) < 300
