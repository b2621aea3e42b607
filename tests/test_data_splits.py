"Splits and folds: who is held out, that groups and the future stay apart, and that a saved split means the same samples."
import json
import logging
import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from deep_studio_nb.common.errors import DataError
from deep_studio_nb.data.division import divide, values_of
from deep_studio_nb.data.folds import folds, write_split
from deep_studio_nb.data.image_folder import ImageFolder
from deep_studio_nb.data.loaders import BaseDataLoader
from deep_studio_nb.data.samples import BaseDataset
from deep_studio_nb.data.split_files import divide_or_load, load_split, save_split
from deep_studio_nb.data.splits import hold_out, hold_out_groups, hold_out_latest, strata
from deep_studio_nb.data.tensors import Tensors


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('DEEP_STUDIO_CACHE', str(tmp_path/'cache'))
    monkeypatch.chdir(tmp_path)


def labelled(*counts, classes=None):
    y = torch.tensor([k for k, n in enumerate(counts) for _ in range(n)])
    return Tensors(torch.arange(len(y)).float()[:, None], y, classes or [f'klasse {k}' for k in range(len(counts))])


class Named(Tensors):
    "Labels with names that are given."
    def __init__(self, names, labels=None):
        super().__init__(torch.arange(len(names)).float()[:, None], torch.tensor(labels or [0]*len(names)), ['a', 'b'])
        self.names = list(names)
    def sample_id(self, i): return self.names[int(i)]


@pytest.fixture
def photos(tmp_path):
    root = tmp_path/'사진'
    for k in range(24):
        path = root/('고양이', '강아지')[k % 2]/f'patient{k//4}_{k}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(path)
    return root


def names(ds):
    return [ds.sample_id(i) for i in range(len(ds))]


# --- amounts that cannot be meant ---

WRONG = [1.5, -1, -0.5, 1.0, 10, 11, 10**9, float('nan'), float('inf'), '0.2', True, [0.2]]


@pytest.mark.parametrize('amount', WRONG)
def test_an_amount_that_cannot_be_meant(amount):
    with pytest.raises(DataError, match='`validation_split` is'): divide(labelled(5, 5), amount)
    with pytest.raises(DataError, match='`test_split` is'): divide(labelled(5, 5), 0.2, amount)


@pytest.mark.parametrize('amount,n', [(0, 0), (0.0, 0), (None, 0), (1, 1), (9, 9), (0.25, 2), (1e-9, 1), (0.999, 9)])
def test_an_amount_that_can(amount, n):
    parts = divide(labelled(5, 5), amount)
    assert len(parts.train) == 10 - n
    assert (parts.valid is None) == (n == 0) and (not n or len(parts.valid) == n)


@pytest.mark.parametrize('both', [(5, 5), (0.5, 0.5), (9, 0.1), (0.9, 9)])
def test_amounts_that_leave_nothing(both):
    with pytest.raises(DataError, match='nothing would be left for training'): divide(labelled(5, 5), *both)


def test_a_single_sample_and_none():
    with pytest.raises(DataError, match='only 1 sample'): divide(labelled(1), 0.5)
    with pytest.raises(DataError, match='no samples'): divide(Tensors(torch.zeros(0, 1)), 0.5)
    assert len(divide(labelled(1)).train) == 1


@pytest.mark.parametrize('kwargs,why', [
    (dict(by='stratifed'), 'did you mean `stratified`'), (dict(by='group'), '`groups` is not given'), (dict(by='time'), '`times` is not given'),
    (dict(by='random', times=range(10)), 'leave one of them out'), (dict(groups=[1]*10, times=range(10)), 'both given'), (dict(groups='patient'), 'patient'),
    (dict(groups=[1, 2]), '2 values for 10'), (dict(groups=[None]*10), 'says nothing about 10'), (dict(times=['x']*10), 'is no time'), (dict(groups=[1]*10), 'one group, `1`'),
    (dict(times=[1]*10), 'same time')])
def test_words_that_cannot_be_meant(kwargs, why):
    with pytest.raises(DataError, match=why): divide(labelled(5, 5), 0.2, **kwargs)


# --- who is held out ---

@pytest.mark.parametrize('seed', range(5))
def test_classes_keep_their_proportions(seed):
    ds = labelled(60, 30, 10)
    parts = divide(ds, 0.2, 0.1, seed=seed)
    counts = {k: Counter(ds.y[v].tolist()) for k, v in parts.numbers.items()}
    assert counts['valid'] == {0: 12, 1: 6, 2: 2} and counts['test'] == {0: 6, 1: 3, 2: 1}
    assert sorted(sum(parts.numbers.values(), [])) == list(range(100))


def test_what_a_seed_held_out_before_is_held_out_still():
    "Numbers of the first version: a run that is resumed has to find its split again."
    assert hold_out(20, 5, [0]*12 + [1]*8)[1] == divide(labelled(12, 8), 5).numbers['valid'] == FIRST
    assert BaseDataLoader(labelled(12, 8), 4, validation_split=5).split_validation().sample_ids() == [str(i) for i in FIRST]


FIRST = [2, 10, 11, 16, 17]


def test_no_global_generator_is_touched(photos):
    def states(): return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]
    before, ds = states(), labelled(20, 20)
    for kwargs in (dict(), dict(by='random'), dict(groups=[i//4 for i in range(40)]), dict(times=range(40))):
        divide(ds, 0.2, 0.1, **kwargs)
        folds(ds, 4, **kwargs)[0]
    assert states() == before
    np.random.seed(7)
    assert folds(ds, 4).parts(0) == folds(ds, 4).parts(0)


@pytest.mark.parametrize('seed', range(20))
def test_no_group_is_on_two_sides(seed):
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, rng.integers(3, 40), 120).tolist()
    ds = Tensors(torch.zeros(120, 1), torch.tensor(rng.integers(0, 3, 120)), ['a', 'b', 'c'])
    parts = divide(ds, 0.2, 0.2, groups=groups, seed=seed)
    sides = [{groups[i] for i in o} for o in parts.numbers.values()]
    assert len(sides) == 3 and all(sides) and sum(map(len, sides)) == len(set(groups))
    for fold in folds(ds, 3, groups=groups, seed=seed): assert not {groups[i] for i in fold.numbers['train']} & {groups[i] for i in fold.numbers['valid']}


def test_groups_come_near_the_share_and_the_classes():
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(300), rng.integers(1, 9, 300)).tolist()
    ill = [int(g % 10 == 0) for g in groups]
    for seed in range(5):
        _, out = hold_out_groups(groups, len(groups)//5, ill, seed)
        assert abs(len(out) - len(groups)//5) < 0.02*len(groups)
        assert abs(np.mean([ill[i] for i in out]) - np.mean(ill)) < 0.02


def test_two_groups_of_very_different_size():
    train, out = hold_out_groups(['big']*99 + ['small'], 50)
    assert {len(train), len(out)} == {99, 1}


def test_folders_and_patterns_as_groups(photos):
    ds = ImageFolder(photos)
    assert set(values_of(ds, 'folder')) == {'고양이', '강아지'}
    parts = divide(ds, 0.3, groups=r'patient(\d+)_')
    def patients(part): return {o.split('patient')[1].split('_')[0] for o in names(part)}
    assert not patients(parts.train) & patients(parts.valid) and len(patients(parts.train) | patients(parts.valid)) == 6
    assert names(divide(ds, 0.3, groups=lambda o: o.split('patient')[1].split('_')[0]).valid) == names(parts.valid)


def test_the_future_stays_in_the_future():
    when = np.random.default_rng(0).integers(0, 30, 100).tolist()
    parts = divide(labelled(50, 50), 0.2, 0.2, times=when)
    days = {k: [when[i] for i in o] for k, o in parts.numbers.items()}
    assert max(days['train']) < min(days['valid']) and max(days['valid']) < min(days['test'])
    assert 10 <= len(days['test']) <= 30


def test_dates_as_people_write_them():
    assert hold_out_latest(['2024-02-01', '2023-12-31', '2024-01-15T10:00', '2024-01-15'], 2) == ([1, 3], [0, 2])
    assert hold_out_latest(np.array(['2024-02-01', '2023-12-31'], 'datetime64[D]'), 1) == ([1], [0])
    with pytest.raises(DataError, match='sample 1'): hold_out_latest(['2024-01-01', '31.12.2023'], 1)
    with pytest.raises(DataError, match='numbers'): hold_out_latest([2024, '2023-12-31'], 1)


def test_several_labels_are_kept_in_proportion_by_the_rarest():
    y = torch.zeros(200, 4)
    y[:, 0], y[:100, 1], y[:20, 2], y[10:14, 3] = 1, 1, 1, 1
    ds = Tensors(torch.zeros(200, 1), y, list('abcd'))
    _, out = hold_out(200, 100, y)
    assert y[out].sum(0).tolist() == [100, 50, 10, 2]
    assert len(folds(ds, 5)) == 5
    assert strata(torch.zeros(3, 2)) == [-1, -1, -1]


def test_numbers_are_held_out_at_random():
    assert hold_out(50, 10, torch.randn(50)) == hold_out(50, 10)


# --- data that comes divided, plain data, learning from training alone ---

def test_splits_that_the_data_comes_with(tmp_path, caplog):
    for split, n in (('train', 6), ('valid', 2), ('test', 3)):
        for k in range(n):
            (tmp_path/'d'/split/'a').mkdir(parents=True, exist_ok=True)
            Image.new('L', (4, 4), 9*k).save(tmp_path/'d'/split/'a'/f'{k}.png')
    ds = ImageFolder(tmp_path/'d')
    parts = divide(ds)
    assert parts.train is ds and [len(parts.part(o)) for o in ('train', 'valid', 'test')] == [6, 2, 3]
    assert (parts.valid.stage, parts.test.stage) == ('valid', 'test')
    with caplog.at_level(logging.WARNING, 'deep_studio_nb'): held = divide(ds, 2)
    assert 'the validation split that the data comes with is not used' in caplog.text
    assert [len(held.part(o)) for o in ('train', 'valid', 'test')] == [4, 2, 3]
    with caplog.at_level(logging.WARNING, 'deep_studio_nb'): divide(ds, test_split=2)
    assert 'the test split that the data comes with is not used' in caplog.text


def test_plain_datasets():
    parts = divide(TensorDataset(torch.arange(10.), torch.arange(10)), 0.3)
    assert (len(parts.train), len(parts.valid)) == (7, 3)
    assert divide([(torch.zeros(1), 0)]*10, 4).how['validation_split'] == 4
    with pytest.raises(DataError, match='Streams'): divide(iter([1]), 0.1)


def test_learning_sees_training_samples_only():
    from deep_studio_nb.data.table import TableData
    rows = 'area,town,price\n' + ''.join(f'{k%10 if k < 30 else 1000 + k},{"서울" if k < 30 else "부산"},{k % 3}\n' for k in range(40))
    with open('houses.csv', 'w', encoding='utf-8') as f: f.write(rows)
    ds = TableData('houses.csv', target='price', task='classes', numbers=['area'], categories=['town'])
    parts = divide(ds, 10, times=range(40))
    fitted = json.dumps(parts.train.fitted(), ensure_ascii=False)
    assert '서울' in fitted and '부산' not in fitted
    assert parts.train.fitted() == parts.valid.fitted()
    assert parts.train.fitted() != ds.fit(None).fitted()
    assert '부산' in json.dumps(folds(ds, 4)[0].train.fitted(), ensure_ascii=False)


def test_columns_of_a_table_as_groups_and_times():
    from deep_studio_nb.data.table import TableData
    with open('visits.csv', 'w', encoding='utf-8') as f: f.write('patient,day,value,ill\n' + ''.join(f'p{k//5},2024-{1 + k%12:02}-{1 + k%28:02},{k*7%11},{"yes" if k%3 else "no"}\n' for k in range(60)))
    ds = TableData('visits.csv', target='ill', drop=['patient', 'day'])
    parts = divide(ds, 0.25, groups='patient')
    sides = [set(values_of(parts.part(o), 'patient')) for o in ('train', 'valid')]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 12
    late = divide(ds, 0.25, times='day')
    assert max(values_of(late.train, 'day')) < min(values_of(late.valid, 'day'))
    with pytest.raises(DataError, match='did you mean `patient`'): divide(ds, 0.25, groups='pateint')


# --- folds ---

@pytest.mark.parametrize('k', [0, 1, -3, 2.5, '5', True, None])
def test_a_number_of_folds_that_is_none(k):
    with pytest.raises(DataError, match='whole number, at least 2'): folds(labelled(10, 10), k)


def test_more_folds_than_samples_of_a_class():
    ds = labelled(20, 3, 4, classes=['고양이', '강아지', '여우'])
    with pytest.raises(DataError, match=r'5 folds are more than there are samples of `강아지 \(3\)`, `여우 \(4\)`.*at most 3 folds'): folds(ds, 5)
    with pytest.raises(DataError, match='강아지'): folds(ds, 5, groups=list(range(27)))
    assert len(folds(ds, 3)) == 3 and len(folds(ds, 5, by='random')) == 5


def test_more_folds_than_samples_groups_or_days():
    with pytest.raises(DataError, match='more than there are samples'): folds(labelled(3), 4)
    with pytest.raises(DataError, match=r'more than there are groups \(2: `1`, `2`\)'): folds(labelled(10, 10), 3, groups=[1, 2]*10)
    with pytest.raises(DataError, match='4 different times'): folds(labelled(10, 10), 3, times=[1, 2]*10)
    with pytest.raises(DataError, match='only one way'): folds(labelled(10, 10), 3, repeats=2, times=range(20))


@pytest.mark.parametrize('kwargs', [dict(), dict(by='random'), dict(groups=[i//3 for i in range(60)])])
def test_every_sample_is_held_out_once_in_each_repetition(kwargs):
    ds = labelled(30, 20, 10)
    some = folds(ds, 4, repeats=3, seed=5, **kwargs)
    for r in range(3): assert sorted(sum((some.parts(4*r + j)['valid'] for j in range(4)), [])) == list(range(60))
    for j in range(12): assert sorted(sum(some.parts(j).values(), [])) == list(range(60))
    assert some.parts(0) != some.parts(4)
    assert folds(ds, 4, repeats=3, seed=5, **kwargs).blocks == some.blocks != folds(ds, 4, repeats=3, seed=6, **kwargs).blocks
    assert folds(ds, 4, seed=5, **kwargs).blocks == some.blocks[:1]


def test_folds_by_class_are_even():
    ds = labelled(40, 12, 5)
    for fold in folds(ds, 5): assert Counter(ds.y[fold.numbers['valid']].tolist()) in ({0: 8, 1: 2, 2: 1}, {0: 8, 1: 3, 2: 1})


def test_folds_in_time_never_look_ahead():
    when = np.random.default_rng(0).integers(0, 20, 60).tolist()
    some = folds(labelled(30, 30), 4, times=when)
    for fold in some: assert max(when[i] for i in fold.numbers['train']) < min(when[i] for i in fold.numbers['valid'])
    assert len(some) == 4


# --- saved splits ---

def test_two_runs_compare_on_the_same_samples(photos):
    divide(ImageFolder(photos), 0.25, 0.25, groups=r'patient(\d+)_').save('splits/a.json')
    loaders = [BaseDataLoader(ImageFolder(photos), 4, split='splits/a.json', seed=seed) for seed in (0, 1)]
    def parts(loader): return [sorted(names(o.dataset)) for o in (loader, loader.split_validation(), loader.split_test())]
    assert parts(loaders[0]) == parts(loaders[1])
    assert sorted(sum(parts(loaders[0]), [])) == sorted(names(ImageFolder(photos)))
    assert loaders[0].sample_ids() != loaders[1].sample_ids()


def test_each_fold_by_its_number(photos):
    ds = ImageFolder(photos)
    some = folds(ds, 4, repeats=2)
    some.save('splits/folds.json')
    for j in (0, 3, 7): assert names(BaseDataLoader(ds, 4, split='splits/folds.json', fold=j).split_validation().dataset) == names(some[j].valid)
    for fold, why in ((None, 'holds 8 folds'), (8, 'from 0 to 7'), (-1, 'from 0 to 7'), (1.0, 'from 0 to 7'), (True, 'from 0 to 7')):
        with pytest.raises(DataError, match=why): divide_or_load(ds, split='splits/folds.json', fold=fold)


def test_a_split_and_other_words_together(photos):
    ds = ImageFolder(photos)
    divide(ds, 0.25).save('a.json')
    for kwargs in (dict(validation_split=0.2), dict(test_split=3), dict(groups='folder'), dict(times='day'), dict(by='random')):
        with pytest.raises(DataError, match=f'`{next(iter(kwargs))}` is given too'): divide_or_load(ds, split='a.json', **kwargs)
    with pytest.raises(DataError, match='no folds'): divide_or_load(ds, split='a.json', fold=0)
    with pytest.raises(DataError, match='no `split` is given'): divide_or_load(ds, fold=0)


def test_a_split_of_other_data(photos):
    ds = ImageFolder(photos)
    divide(ds, 0.25).save('a.json')
    gone = photos/names(ds)[3]
    gone.rename(gone.with_name('new name.png'))
    with pytest.raises(DataError) as e: load_split('a.json').apply(ImageFolder(photos))
    assert '1 of its 24 samples are not in the data' in str(e.value) and gone.name in str(e.value)
    assert '1 of 24 samples of the data are not in it' in str(e.value) and 'new name.png' in str(e.value)
    with pytest.raises(DataError, match='24 of its 24'): load_split('a.json').apply(labelled(12, 12))


def test_samples_that_were_left_out_since(photos, caplog):
    ds = ImageFolder(photos)
    divide(ds, 0.25).save('a.json')
    folds(ds, 3).save('f.json')
    ds.drop(0, note='blurred')
    after = ImageFolder(photos)
    with caplog.at_level(logging.INFO, 'deep_studio_nb'): parts = load_split('a.json').apply(after)
    assert 'have been left out' in caplog.text
    assert sum(map(len, parts.numbers.values())) == 23
    (photos/names(after)[0]).write_bytes(b'')
    after.check()
    assert len(after) == 22 and sum(map(len, load_split('f.json').apply(after, fold=1).numbers.values())) == 22


def test_a_changed_label_is_mentioned(photos, caplog):
    ds = ImageFolder(photos)
    divide(ds, 0.25).save('a.json')
    ds.relabel(0, '강아지' if ds.classes[ds.targets()[0]] == '고양이' else '고양이')
    with caplog.at_level(logging.INFO, 'deep_studio_nb'): load_split('a.json').apply(ImageFolder(photos))
    assert 'labels or contents have changed' in caplog.text


def test_names_that_are_there_twice():
    ds = Named(['a', 'b', 'a', 'c', 'c'])
    with pytest.raises(DataError, match='`a` is the name of two samples, number 0 and 2.*2 are there more than once'): divide(ds, 2).save('a.json')
    divide(Named('abcde'), 2).save('a.json')
    with pytest.raises(DataError, match='name of two'): load_split('a.json').apply(ds)


def test_splits_of_the_data_itself_are_compared():
    class WithTest(Named):
        tests = 'xyz'
        def split(self, name): return self if name == 'train' else Named(self.tests) if name == 'test' else None
    ds = WithTest('abcdef')
    divide(ds, 2).save('a.json')
    assert len(load_split('a.json').apply(ds).test) == 3
    ds.tests = 'xyw'
    with pytest.raises(DataError, match='in the test split of the data .`z`'): load_split('a.json').apply(ds)
    with pytest.raises(DataError, match='test split of its own'): load_split('a.json').apply(Named('abcdef'))


def saved():
    divide(Named([f'{k}.png' for k in range(6)], [0, 1]*3), 2).save('a.json')
    return json.loads(open('a.json', encoding='utf-8').read())


def write(o):
    with open('b.json', 'w', encoding='utf-8') as f: f.write(o if isinstance(o, str) else json.dumps(o, indent=1, ensure_ascii=False))
    return 'b.json'


def test_a_file_that_is_no_json_is_told_with_its_line():
    text = json.dumps(saved(), indent=1)
    for broken, line in ((text[:-30], None), (text.replace('"train": [', '"train": ['.replace('[', '')), None), ('', 1), ('{\n "a": 1,\n}', 3)):
        with pytest.raises(DataError, match='line' if line is None else f'line {line}, column') as e: load_split(write(broken))
        assert 'b.json' in str(e.value)


def test_a_name_that_is_there_twice_is_told_with_its_line():
    o = saved()
    o['parts']['valid'][0] = o['parts']['train'][0]
    lines = json.dumps(o, indent=1).splitlines()
    at = [k for k, x in enumerate(lines, 1) if x.strip().rstrip(',') == json.dumps(o['parts']['train'][0])][1]
    with pytest.raises(DataError, match=f'line {at} cannot be used: .* is there twice'): load_split(write(o))


@pytest.mark.parametrize('change,why', [
    (dict(format='else'), 'no split that this version reads'), (dict(parts=3), 'has to hold either'), (dict(parts={'valid': []}), 'no samples for training'),
    (dict(parts={'train': [1]}), 'instead of a name'), (dict(parts={'train': 'a'}), 'instead of a list'), (dict(parts={'train': ['a'], 'vaild': []}), 'did you mean `valid`'),
    (dict(blocks=[[['a'], ['b']]]), 'has to hold either'), (dict(parts={'train': ['a', None]}), 'instead of a name')])
def test_a_file_that_was_edited_badly(change, why):
    with pytest.raises(DataError, match=why): load_split(write({**saved(), **change}))


def test_blocks_that_were_edited_badly():
    folds(Named('abcdef'), 3, by='random').save('f.json')
    o = json.loads(open('f.json').read())
    for blocks, why in (([[['a'], ['a']]], 'there twice'), ([3], 'instead of a list'), ([[['a'], 'b']], 'instead of a list'), (3, 'has to hold either')):
        with pytest.raises(DataError, match=why): load_split(write({**o, 'blocks': blocks}))


def test_no_such_file_and_a_folder():
    saved()
    with pytest.raises(DataError, match='did you mean `a.json`'): load_split('a.jsn')
    with pytest.raises(DataError, match='cannot be read'): load_split('.')
    for o in ('[]', '3', 'null'):
        with pytest.raises(DataError, match='no split that this version reads'): load_split(write(o))


def test_a_saved_file_is_readable_and_complete(photos):
    path = save_split('a.json', divide(ImageFolder(photos), 0.25, groups=r'patient(\d+)_', seed=3))
    o = json.loads(path.read_text(encoding='utf-8'))
    assert o['how'] == dict(by='group', validation_split=0.25, test_split=0, seed=3, groups=r'patient(\d+)_')
    assert (o['data']['samples'], o['data']['classes']) == (24, ['강아지', '고양이'])
    assert '"고양이/' in path.read_text(encoding='utf-8')


# --- the command line's function ---

def test_writing_a_split_from_the_command_line(photos):
    ds = ImageFolder(photos)
    text = write_split(ds, 'splits/a.json', 0.25, groups='folder')
    assert 'valid %' in text and 'split: splits/a.json' in text
    with pytest.raises(DataError, match='there already'): write_split(ds, 'splits/a.json', 0.25)
    assert 'fold: 0 (to 2)' in write_split(ds, 'splits/f.json', k=3)
    for kwargs, why in ((dict(), 'Nothing would be held out'), (dict(k=3, validation_split=0.2), 'are left out'), (dict(validation_split=30), '`validation_split` is 30')):
        with pytest.raises(DataError, match=why): write_split(ds, 'splits/x.json', **kwargs)


# --- size ---

def test_a_hundred_thousand_samples_are_divided():
    class Many(BaseDataset):
        classes = ['a', 'b']
        def __len__(self): return 100_000
        def load(self, i): return torch.zeros(1), i % 2
        def targets(self): return [i % 2 for i in range(100_000)]
        def sample_id(self, i): return f'{i % 2}/{i}.png'
    parts = divide(Many(), 0.1, 0.1, groups=[i//7 for i in range(100_000)])
    parts.save('many.json')
    again = load_split('many.json').apply(Many())
    assert {k: list(v) for k,v in again.numbers.items()} == {k: list(v) for k,v in parts.numbers.items()}
    assert sorted(i for v in parts.numbers.values() for i in v) == list(range(100_000))
    assert sum(map(len, folds(Many(), 5)[0].numbers.values())) == 100_000
