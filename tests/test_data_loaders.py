"Batches: the same with any number of workers and from any step; errors that name the sample; no global state."
import logging
import os
import random
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

from deep_studio_nb.common.errors import DataError
from deep_studio_nb.data.image_folder import ImageFolder
from deep_studio_nb.data.loaders import BaseDataLoader, DataLoader
from deep_studio_nb.data.samples import BaseDataset
from deep_studio_nb.data.tensors import Tensors
from deep_studio_nb.data.transforms import build_transforms

pytestmark = pytest.mark.filterwarnings('ignore:This DataLoader will create')
AUGMENT = [{'type': 'RandomCrop', 'args': {'size': [8, 8]}}, 'RandomHorizontalFlip', {'type': 'ColorJitter', 'args': {'brightness': 0.5}}]


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "22 noisy images of two classes, augmented in training."
    root = tmp_path_factory.mktemp('사진 폴더')
    rng = np.random.default_rng(0)
    for i in range(22):
        (root/'ab'[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(root/'ab'[i % 2]/f'{i}.png')
    return ImageFolder(root).with_transforms(build_transforms({'train': AUGMENT, 'valid': [{'type': 'CenterCrop', 'args': {'size': 8}}]}))


class AllRandom(Dataset):
    "A plain dataset that draws from all three global generators."
    def __len__(self): return 10
    def __getitem__(self, i): return torch.tensor([torch.rand(()).item(), np.random.rand(), random.random()]), i


class NamedPairs(BaseDataset):
    def __init__(self, items): self.items = items
    def __len__(self): return len(self.items)
    def load(self, i): return self.items[i]
    def sample_id(self, i): return f'pair-{i}'


def same(a, b):
    a, b = list(a), list(b)
    return len(a) == len(b) and all(torch.equal(p, q) for x, y in zip(a, b) for p, q in zip(x, y, strict=True))


def epochs(loader, n=2):
    return [b for _ in range(n) for b in loader]


def test_the_same_batches_with_any_number_of_workers(photos):
    want = epochs(BaseDataLoader(photos, 4, seed=5))
    assert not same(want[:6], want[6:])
    for start in ('threads', 'fork'):
        for n in (1, 3): assert same(epochs(BaseDataLoader(photos, 4, num_workers=n, seed=5, start=start)), want)
    assert not same(epochs(BaseDataLoader(photos, 4, seed=6)), want)


def test_the_same_batches_from_spawned_workers(photos):
    loader = BaseDataLoader(photos, 4, num_workers=1, seed=5, start='spawn')
    assert same(loader, BaseDataLoader(photos, 4, seed=5))
    assert loader.multiprocessing_context.get_start_method() == 'spawn'


@pytest.mark.parametrize('workers', [0, 2])
def test_draws_inside_a_plain_dataset_repeat(workers):
    want = epochs(BaseDataLoader(AllRandom(), 3, num_workers=1, seed=1))
    assert same(epochs(BaseDataLoader(AllRandom(), 3, num_workers=workers, seed=1)), want)
    assert len(torch.cat([b[0] for b in want]).unique()) == 60


@pytest.mark.parametrize('workers', [0, 1, 3])
def test_starting_at_a_step_gives_the_rest_of_the_epoch(photos, workers):
    whole = BaseDataLoader(photos, 4, seed=5)
    whole.set_epoch(3)
    want = list(whole)
    loader = BaseDataLoader(photos, 4, num_workers=workers, seed=5)
    for k in (4, 0, 6):
        loader.set_epoch(3)
        loader.start_at(k)
        assert len(loader) == 6
        assert same(loader, want[k:])
    loader.set_epoch(3)
    assert same(loader, want)
    for bad in (-1, 7):
        with pytest.raises(DataError, match='6 batches'): loader.start_at(bad)


@pytest.mark.parametrize('workers', [0, 2])
def test_an_iteration_left_in_the_middle_leaves_no_trace(photos, workers):
    loader = BaseDataLoader(photos, 4, num_workers=workers, seed=5)
    want = list(BaseDataLoader(photos, 4, seed=5))
    for batch in loader: break
    loader.set_epoch(0)
    assert same(loader, want)
    loader.set_epoch(0)
    loader.start_at(2)
    for batch in loader: break
    loader.set_epoch(0)
    assert same(loader, want)


def test_skipped_samples_are_not_loaded():
    class Counting(NamedPairs):
        loaded = 0
        def load(self, i):
            Counting.loaded += 1
            return super().load(i)
    loader = BaseDataLoader(Counting([(torch.zeros(1), 0)]*100), 5, num_workers=0)   # "auto" would look at some samples
    loader.start_at(18)
    assert len(list(loader)) == 2
    assert Counting.loaded == 10


def test_gathered_and_loaded_batches_agree():
    x, y = torch.randn(23, 3), torch.arange(23)
    pairs = NamedPairs(list(zip(x, y)))
    for kwargs in ({}, {'shuffle': False}, {'drop_last': True}, {'validation_split': 5}):
        fast, slow = (BaseDataLoader(d, 4, seed=2, **kwargs) for d in (Tensors(x, y), pairs))
        assert fast.gathers and not slow.gathers
        if 'validation_split' not in kwargs: assert same(epochs(fast), epochs(slow))
        assert len(fast) == len(slow) == len(list(fast))
    plain = BaseDataLoader(TensorDataset(x, y), 4, seed=2)
    assert plain.gathers and same(plain, BaseDataLoader(pairs, 4, seed=2))


def test_gathered_batches_are_copies():
    x = torch.ones(6, 2)
    for batch in BaseDataLoader(Tensors(x), 3, shuffle=False): batch[0].zero_()
    assert x.min() == 1


def test_no_global_generator_is_touched(photos):
    def states(): return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]
    before = states()
    for dataset, kwargs in ((photos, {}), (photos, {'num_workers': 1}), (AllRandom(), {}), (Tensors(torch.zeros(9, 2)), {})):
        loader = BaseDataLoader(dataset, 4, validation_split=0.3, **kwargs)
        epochs(loader)
        list(loader.split_validation())
        loader.peek(3)
        loader.facts()
        assert states() == before


def test_batches_do_not_depend_on_the_global_seed(photos):
    loader = BaseDataLoader(photos, 4, seed=5)
    want = list(loader)
    with torch.random.fork_rng():
        torch.manual_seed(123)
        loader.set_epoch(0)
        assert same(loader, want)


def test_validation_is_not_augmented(photos):
    loader = BaseDataLoader(photos, 4, validation_split=6, seed=1)
    valid = loader.split_validation()
    assert (len(loader.dataset), len(valid.dataset)) == (16, 6)
    assert not set(loader.sample_ids()) & set(valid.sample_ids())
    assert same(valid, valid)
    held = photos.using('valid')
    by_name = {held.sample_id(i): held[i][0] for i in range(len(held))}
    for x, name in zip(torch.cat([b[0] for b in valid]), valid.sample_ids()): assert torch.equal(x, by_name[name])


def test_a_transform_inside_a_plain_dataset_is_mentioned(caplog):
    class Augmented(AllRandom):
        transform = staticmethod(abs)
    BaseDataLoader(Augmented(), 2, validation_split=2)
    assert 'applies its own `transform`' in caplog.text
    assert BaseDataLoader(Augmented(), 2).split_validation() is None


def test_the_split_is_stratified_and_belongs_to_the_seed():
    y = torch.tensor([0]*80+[1]*20)
    def held(**kwargs): return sorted(BaseDataLoader(Tensors(torch.zeros(100, 1), y), 10, validation_split=0.2, **kwargs).split_validation().sample_ids())
    assert held() == held() != held(seed=1)
    assert sum(int(y[int(i)]) for i in held()) == 4


@pytest.mark.parametrize('amount', [1.5, -1, -0.5, 1.0, 10, 11, float('nan'), '0.2', True])
def test_a_validation_split_that_cannot_be_meant(amount):
    with pytest.raises(DataError, match='`validation_split` is'): BaseDataLoader(Tensors(torch.zeros(10, 1)), 2, validation_split=amount)


@pytest.mark.parametrize('amount,n', [(0, None), (0.0, None), (None, None), (1, 1), (9, 9), (0.25, 2), (1e-9, 1), (0.999, 9)])
def test_a_validation_split_that_can(amount, n):
    valid = BaseDataLoader(Tensors(torch.zeros(10, 1)), 2, validation_split=amount).split_validation()
    assert (None if valid is None else len(valid.dataset)) == n


def test_the_split_that_was_asked_for_counts_and_the_log_says_so(tmp_path, caplog, monkeypatch):
    for name in ('train/a', 'valid/a'):
        (tmp_path/name).mkdir(parents=True)
        for i in range(3): Image.new('L', (4, 4), 50*i).save(tmp_path/name/f'{i}.png')
    ds = ImageFolder(tmp_path)
    monkeypatch.setattr(logging.getLogger('deep_studio_nb'), 'propagate', True)
    asked = BaseDataLoader(ds, validation_split=1)
    assert (len(asked.dataset), len(asked.split_validation().dataset)) == (2, 1)
    assert 'the validation split that the data comes with is not used' in caplog.text
    assert len(BaseDataLoader(ds).split_validation().dataset) == 3
    assert BaseDataLoader(ds).split_test() is None


def test_the_positional_order_of_pytorch_template():
    class IrisDataLoader(DataLoader):
        def __init__(self, dataset, batch_size, shuffle=True, validation_split=0.0, num_workers=1):
            self.dataset = dataset
            super().__init__(self.dataset, batch_size, shuffle, validation_split, num_workers)
    loader = IrisDataLoader(Tensors(torch.zeros(9, 4), torch.arange(9) % 3), batch_size=3, shuffle=False, validation_split=2, num_workers=2)
    assert (len(loader), len(loader.split_validation()), loader.batch_size) == (3, 1, 3)
    assert torch.utils.data.DataLoader in type(loader).__mro__


@pytest.mark.parametrize('workers', [0, 2])
def test_pictures_of_two_sizes_name_the_samples(workers):
    items = [(torch.zeros(3, 4, 4), 0)]*3 + [(torch.zeros(3, 5, 4), 1)]
    with pytest.raises(DataError) as e: list(BaseDataLoader(NamedPairs(items), 4, shuffle=False, num_workers=workers))
    assert str(e.value).startswith('The inputs of samples `pair-0` and `pair-3` have shapes (3, 4, 4) and (3, 5, 4): add `Resize`')
    assert 'Traceback' not in str(e.value)


def test_targets_of_two_sizes_and_pictures_that_are_no_tensors():
    with pytest.raises(DataError, match='targets of samples `pair-0` and `pair-1`'): list(BaseDataLoader(NamedPairs([(0, torch.zeros(2)), (0, torch.zeros(3))]), 2, False))
    with pytest.raises(DataError, match='`pair-0` is a picture'): list(BaseDataLoader(NamedPairs([(Image.new('L', (2, 2)), 0)]), 2))


@pytest.mark.parametrize('workers', [0, 1])
def test_a_bad_file_in_an_epoch_is_named(tmp_path, workers):
    (tmp_path/'a').mkdir()
    (tmp_path/'a/글.jpg').write_text('text')
    with pytest.raises(DataError) as e: list(BaseDataLoader(ImageFolder(tmp_path, on_bad='raise'), num_workers=workers, start='fork'))
    assert '글.jpg' in str(e.value) and 'Traceback' not in str(e.value)


def test_an_error_of_the_users_own_code_keeps_its_place():
    class Wrong(NamedPairs):
        def load(self, i): return {}['nothing']
    with pytest.raises(KeyError, match='nothing'): list(BaseDataLoader(Wrong([1])))
    with pytest.raises(KeyError, match='in load'): list(BaseDataLoader(Wrong([1]), num_workers=1))


def test_workers_leave_ctrl_c_to_the_main_process(photos):
    loader = BaseDataLoader(photos, 2, num_workers=2, seed=5, start='fork')
    want = list(BaseDataLoader(photos, 2, seed=5))
    got = []
    for batch in loader:
        got.append(batch)
        for o in loader._iterator._workers: os.kill(o.pid, signal.SIGINT)
    assert same(got, want)


@pytest.mark.parametrize('context', ['fork', 'spawn'])
def test_ctrl_c_never_reaches_a_worker_that_is_just_starting(photos, context):
    "The signal comes right after the start, long before the worker runs any code of ours."
    loader = BaseDataLoader(photos, 2, num_workers=2, seed=5, start=context)
    batches = iter(loader)
    for o in loader._iterator._workers: os.kill(o.pid, signal.SIGINT)
    assert same(list(batches), list(BaseDataLoader(photos, 2, seed=5)))


def test_a_custom_collate_sees_the_samples(photos):
    loader = BaseDataLoader(photos, 4, collate_fn=lambda samples: [y for _, y in samples], validation_split=4)
    assert sorted(sum(map(list, loader), [])) == [0]*9 + [1]*9
    assert [len(b) for b in loader.split_validation()] == [4]


def test_an_epoch_goes_on_after_an_error(tmp_path):
    (tmp_path/'a').mkdir()
    for i in range(4): Image.new('L', (4, 4), i).save(tmp_path/'a'/f'{i}.png')
    ds = ImageFolder(tmp_path, on_bad='raise')
    for workers in (0, 1):
        (tmp_path/'a/2.png').write_bytes(b'')
        loader = BaseDataLoader(ds, 2, False, num_workers=workers, cache='off')
        with pytest.raises(DataError): list(loader)
        Image.new('L', (4, 4), 2).save(tmp_path/'a/2.png')
        assert len(list(loader)) == 2


def test_streams_are_refused():
    with pytest.raises(DataError, match='Streams go into'): BaseDataLoader(iter([1, 2]))


def test_labels_keep_their_names_in_a_subset(photos):
    loader = BaseDataLoader(photos, 4, validation_split=0.5)
    assert loader.classes == loader.split_validation().classes == ['a', 'b']
    assert loader.facts() == dict(input='image', in_features=192, in_channels=3, image_size=[8, 8], num_classes=2, mode='RGB', task='classes', class_counts=[5, 6])
