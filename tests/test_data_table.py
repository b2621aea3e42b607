"Tables as datasets: roles, splits, nothing learned from held-out rows, unseen words and labels, rows back in their own words."
import io
import json
import logging
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from deep_studio_nb.common.errors import DataError
from deep_studio_nb.common.registry import DATASETS
from deep_studio_nb.data.division import divide
from deep_studio_nb.data.loaders import DataLoader
from deep_studio_nb.data.table import TableData


def table(n=120, seed=0):
    "Numbers, words, dates, keys, sentences, a constant, gaps; a class and a number to predict."
    rng = np.random.default_rng(seed)
    df = pd.DataFrame({
        '번호': rng.permutation(n)+1000, 'age': rng.integers(18, 90, n).astype(float), 'income': rng.lognormal(8, .7, n).round(2), 'city': rng.choice(['서울', '부산', '대구'], n, p=[.6, .3, .1]),
        'joined': pd.to_datetime('2023-01-01') + pd.to_timedelta(rng.integers(0, 700, n), 'D'), 'note': [f'wrote "{i}, thanks" and\nleft again' for i in range(n)], 'country': 'KR'})
    df['left'] = np.where((df.age > 50) ^ (rng.random(n) < .1), 'yes', 'no')
    df.loc[rng.choice(n, n//8, replace=False), 'age'] = np.nan
    df.loc[rng.choice(n, n//10, replace=False), 'city'] = None
    return df


@pytest.fixture
def files(tmp_path):
    df = table()
    df.to_csv(tmp_path/'all.csv', index=False)
    df.iloc[:90].to_csv(tmp_path/'train.csv', index=False)
    df.iloc[90:].to_csv(tmp_path/'valid.csv', index=False)
    return tmp_path, df


def whole(ds): return ds.gather(torch.arange(len(ds)))


# --- what the columns are ---

def test_roles_are_guessed_shown_and_said(files, caplog):
    folder, _ = files
    caplog.set_level('INFO', 'deep_studio_nb')
    ds = TableData(folder/'all.csv', 'left')
    assert {o['column']: o['role'] for o in ds.columns} == {'번호': 'id', 'age': 'number', 'income': 'number', 'city': 'category', 'joined': 'date', 'note': 'text', 'country': 'constant', 'left': 'target'}
    assert '`left` is taken for 2 classes' in caplog.text and 'Left out: `번호` (names or keys of rows), `note` (text), `country` (constant)' in caplog.text
    assert '<table>' in ds.columns._repr_html_()


def test_what_the_user_says_counts(files):
    folder, _ = files
    ds = TableData(folder/'all.csv', 'left', drop=['income'], categories=['country'], numbers=['번호'])
    assert [o['column'] for o in ds.columns if o['used']] == ['번호', 'age', 'city', 'joined', 'country']


@pytest.mark.parametrize('args,words', [
    (dict(target='lefft'), 'no column `lefft`, did you mean `left`'), (dict(), '`target` is not given'), (dict(target='left', drop=['agee']), 'did you mean `age`'),
    (dict(target='left', numbers=['city']), 'Column `city` shall be numbers, but line 2 of `all.csv`'), (dict(target='left', drop='age'), '`drop` is \'age\'. It is a list'),
    (dict(target='left', drop=['age'], numbers=['age']), 'given twice'), (dict(target='left', task='number'), 'the target `left` holds'), (dict(target='left', encode='one'), '`encode` is'),
    (dict(target='left', task='regression'), '`task` is'), (dict(target='left', dates=['age']), 'in no format that is known'), (dict(target='left', split_column='prt'), 'no column `prt`'),
    (dict(target='left', split='valid'), 'no file or column gives such rows'), (dict(target='left', missing='-'), '`missing` is'), (dict(target='left', id_column='idd'), 'no column `idd`'),
    (dict(target='left', drop=['age', 'income', 'city', 'joined']), 'no column that a model could learn from'), (dict(target='country', classes=['US']), 'has the label `KR`, which is none of the classes')])
def test_mistakes_are_told_at_once(files, args, words):
    with pytest.raises(DataError) as e: TableData(files[0]/'all.csv', **args)
    assert words in str(e.value)


def test_mixed_types_name_the_line_and_the_ways_out(tmp_path):
    (tmp_path/'m.csv').write_text('age,y\n' + ''.join(f'{20+i},{"ab"[i%2]}\n' for i in range(18)) + 'unknown,a\n"a\nb",b\n')
    with pytest.raises(DataError) as e: TableData(tmp_path/'m.csv', 'y')
    for o in ('Column `age` is mixed', 'line 20 of `m.csv` holds `unknown`', '`missing: ["unknown"]`', '`categories: [age]`', '`drop: [age]`'): assert o in str(e.value)
    ds = TableData(tmp_path/'m.csv', 'y', missing=['unknown', 'a\nb'])
    assert torch.isfinite(whole(ds)[0]).all() and ds.decode(ds[18][0]) == 'age –'
    assert TableData(tmp_path/'m.csv', 'y', categories=['age']).facts()['in_features'] == 20


def test_numbers_with_commas_are_not_dropped_in_silence(tmp_path):
    (tmp_path/'m.csv').write_text('price,y\n' + ''.join(f'"{i+1},{i:03}",{"ab"[i%2]}\n' for i in range(20)))
    with pytest.raises(DataError, match='line 2 of `m.csv` holds `1,000`.*A number is written without commas for thousands'): TableData(tmp_path/'m.csv', 'y')


@pytest.mark.parametrize('values,task,classes', [(['u', 'v'], 'classes', ['u', 'v']), ([0, 1], 'classes', ['0', '1']), ([10, 9, 2], 'classes', ['2', '9', '10']), ([True, False], 'classes', ['False', 'True']),
                                               ([0.5, 1.5], 'number', None), (list(range(30)), 'number', None)])
def test_the_target_says_what_it_is(tmp_path, values, task, classes):
    df = pd.DataFrame({'x': np.random.default_rng(0).normal(size=60), 'y': (values*60)[:60]})
    ds = TableData(df, 'y')
    assert ds.facts()['task'] == task and ds.classes == classes


def test_rows_without_a_target_are_left_out_and_counted(files, caplog):
    folder, df = files
    df = df.assign(left=[None, *df.left[1:100], *['NA']*20])
    df.to_csv(folder/'gaps.csv', index=False)
    ds = TableData(folder/'gaps.csv', 'left')
    assert len(ds) == 99 and '21 of 120 rows of `gaps.csv` have no value in the target column' in caplog.text and ds.sample_id(0) == 'gaps.csv:4'


# --- learned from training rows only ---

def test_nothing_is_learned_from_held_out_rows():
    "Whatever stands in the rows that are held out, training sees the same."
    df = table()
    a = divide(TableData(df, 'left'), 0.25, seed=3)
    held = a.numbers['valid']
    other = df.copy()
    other.loc[held, ['age', 'income']] = 1e6
    other.loc[held, 'city'] = '여수'
    other.loc[held, 'joined'] = pd.Timestamp('1960-05-05 10:30')
    b = divide(TableData(other, 'left'), 0.25, seed=3)
    assert b.numbers == a.numbers
    assert all(torch.equal(x, y) for x, y in zip(whole(a.train), whole(b.train)))
    assert a.train.fitted()['table'] == b.train.fitted()['table']
    assert not torch.equal(whole(a.valid)[0], whole(b.valid)[0])


def test_a_file_for_validation_is_seen_through_the_training_file(files):
    folder, df = files
    two = TableData(folder/'train.csv', 'left', valid_file=folder/'valid.csv')
    marked = TableData(df.assign(part=['training']*90 + ['val']*30), 'left', split_column='part')
    one = TableData(folder/'all.csv', 'left').fit(torch.arange(90))
    for ds in (two, marked):
        assert torch.equal(whole(ds)[0], whole(one.subset(range(90)))[0])
        assert torch.equal(whole(ds.split('valid'))[0], whole(one.subset(range(90, 120)))[0])
    assert two.split('valid').sample_id(0) == 'valid.csv:2' and two.split('test') is None


def test_the_loader_fits_on_what_it_trains_on(files):
    folder, _ = files
    dl = DataLoader(TableData(folder/'all.csv', 'left'), batch_size=90, validation_split=30, seed=1)
    (x, y), = dl
    assert dl.gathers and x.shape[0] == 90 and abs(x[:, 2].mean()) < 1e-5     # income, scaled by these rows
    assert dl.facts()['samples'] == 90 and sum(dl.facts()['class_counts']) == 90
    assert len(dl.split_validation().dataset) == 30


def test_batches_follow_from_the_seed_with_any_number_of_workers(files):
    folder, _ = files
    def batches(n, start=0):
        dl = DataLoader(TableData(folder/'all.csv', 'left'), batch_size=16, validation_split=0.2, num_workers=n, seed=5)
        if start: dl.start_at(start)
        return list(dl)
    a = batches(0)
    for b, n in ((batches(1), 0), (batches(3), 0), (batches(0, 2), 2)):
        assert all(torch.equal(x, y) for p, q in zip(a[n:], b, strict=True) for x, y in zip(p, q))


# --- words and labels that training does not know ---

def test_unseen_words_are_other_counted_and_told(files, caplog):
    folder, df = files
    df.iloc[90:].assign(city=['여수']*20 + ['서울']*10).to_csv(folder/'valid.csv', index=False)
    for encode in ('onehot', 'codes'):
        caplog.clear()
        valid = TableData(folder/'train.csv', 'left', valid_file=folder/'valid.csv', encode=encode).split('valid')
        row, known = valid[0], valid[25]
        assert '20 of 30 rows have a value of `city` that training does not know (`여수`)' in caplog.text
        assert valid.code.decode(*row[:-1])['city'] == '(other)' and valid.code.decode(*known[:-1])['city'] == '서울'
        assert (row[1].tolist() == [0]) if encode == 'codes' else (row[0][-4:].sum() == 0)


def test_rare_words_share_other(files):
    ds = TableData(files[0]/'all.csv', 'left', max_categories=1)
    assert {ds.code.decode(ds[i][0])['city'] for i in range(120)} == {'서울', '(other)', ''}


@pytest.mark.parametrize('where', ['file', 'column'])
def test_labels_unseen_in_train_name_their_line(files, where):
    folder, df = files
    df.loc[100, 'left'] = 'Yes'
    df.iloc[90:].to_csv(folder/'valid.csv', index=False)
    df.assign(part=['train']*90 + ['valid']*30).to_csv(folder/'all.csv', index=False)
    ds = TableData(folder/'train.csv', 'left', valid_file=folder/'valid.csv') if where == 'file' else TableData(folder/'all.csv', 'left', split_column='part')
    with pytest.raises(DataError) as e: ds.split('valid')
    line = 2 + 2*10 if where == 'file' else 2 + 2*100       # each row has two lines
    assert f'line {line} of `{"valid" if where == "file" else "all"}.csv` has the label `Yes`, which is none of the classes, did you mean `yes`?' in str(e.value)


def test_a_class_that_only_the_held_out_rows_have_is_told(caplog):
    df = table()
    df.loc[0, 'left'] = 'maybe'
    TableData(df, 'left').fit(torch.arange(1, 120))
    assert 'No training row has `maybe`' in caplog.text


def test_a_word_among_the_numbers_of_another_file(files):
    folder, df = files
    df.iloc[90:].assign(age=['unknown', *df.age[91:]]).to_csv(folder/'valid.csv', index=False)
    with pytest.raises(DataError, match='`age` is a column of numbers, but line 2 of `valid.csv` holds `unknown`'): TableData(folder/'train.csv', 'left', valid_file=folder/'valid.csv').split('valid')
    df.iloc[90:].drop(columns='age').to_csv(folder/'valid.csv', index=False)
    with pytest.raises(DataError, match='`valid.csv` has no column `age`'): TableData(folder/'train.csv', 'left', valid_file=folder/'valid.csv').split('valid')


def test_split_words_that_are_none(files):
    folder, df = files
    df.assign(part=['train']*119 + ['trian']).to_csv(folder/'all.csv', index=False)
    with pytest.raises(DataError, match=r'line 240 of `all.csv` has `trian` in the column `part`'): TableData(folder/'all.csv', 'left', split_column='part')
    with pytest.raises(DataError, match='both given'): TableData(folder/'all.csv', 'left', split_column='part', valid_file=folder/'valid.csv')


# --- one table, any file ---

def test_csv_parquet_and_frame_are_one_dataset(files):
    folder, df = files
    df.to_parquet(folder/'all.parquet')
    df.to_csv(folder/'k.csv', index=False, encoding='cp949', sep=';')
    sets = [TableData(o, 'left') for o in (folder/'all.csv', folder/'all.parquet', folder/'k.csv', df)]
    for ds in sets[1:]:
        assert all(torch.equal(a, b) for a, b in zip(whole(ds), whole(sets[0])))
        assert [ds.content_id(i) for i in (0, 50)] == [sets[0].content_id(i) for i in (0, 50)]
        assert ds.fingerprint() == sets[0].fingerprint()


@pytest.mark.parametrize('encode', ['onehot', 'codes'])
@pytest.mark.parametrize('seed', range(3))
def test_every_row_comes_back_in_its_own_words(seed, encode):
    df = table(60, seed)
    ds = TableData(df, 'left', encode=encode)
    for i in range(60):
        *x, y = ds[i]
        row = ds.code.decode(*x)
        assert row['city'] == (df.city[i] if isinstance(df.city[i], str) else '') and row['joined'] == f'{df.joined[i]:%Y-%m-%d}'
        assert row['age'] == ('' if np.isnan(df.age[i]) else f'{df.age[i]:.0f}') and float(row['income']) == pytest.approx(df.income[i], rel=1e-4)
        assert ds.target_name(y) == df.left[i]


def test_single_samples_and_batches_agree(files):
    for encode in ('onehot', 'codes'):
        ds = TableData(files[0]/'all.csv', 'left', encode=encode)
        for a, b in zip(ds.gather(torch.tensor([7, 3])), zip(ds[7], ds[3])): assert torch.equal(a, torch.stack(b))
        assert ds.facts().get('in_features') == (len(ds[0][0]) if encode == 'onehot' else None)
        assert torch.isfinite(whole(ds)[0]).all()


def test_numbers_as_targets_stay_in_their_unit(files):
    ds = TableData(files[0]/'all.csv', 'income', unit='원').fit(torch.arange(60))
    x, y = whole(ds)
    df = files[1]
    assert y.shape == (120, 1) and y.dtype == torch.float32 and y[:, 0].tolist() == pytest.approx(df.income.tolist())
    facts = ds.facts()
    assert facts['target_mean'] == pytest.approx([df.income[:60].mean()]) and facts['target_std'] == pytest.approx([df.income[:60].std(ddof=0)])
    assert facts['out_features'] == 1 and facts['unit'] == '원' and ds.target_name(y[0]) == f'{df.income[0]:g} 원'


@pytest.mark.parametrize('case', ['gaps only in training', 'gaps only later', 'all gaps in training', 'equal in training', 'one row'])
def test_odd_columns_still_give_finite_inputs(case):
    x = {'gaps only in training': [1, None, 3, 4, 5, 6], 'gaps only later': [1, 2, 3, None, 5, 6], 'all gaps in training': [None, None, None, 4, 5, 6.5], 'equal in training': [7, 7, 7, 8, 9, 9.5], 'one row': [1, 2, 3, 4, 5, 6.5]}[case]
    df = pd.DataFrame({'x': x, 'w': [None if o is None else f'w{o}' for o in x], 'd': [pd.NaT if o is None else pd.Timestamp('2024-01-01') + pd.Timedelta(days=o) for o in x], 'y': list('ababab')})
    for encode in ('onehot', 'codes'):
        ds = TableData(df, 'y', encode=encode).fit(torch.tensor([0] if case == 'one row' else [0, 1, 2]))
        assert all(torch.isfinite(o.float()).all() for o in whole(ds))
        ds.show([ds[i] for i in range(6)])


def test_dates_in_any_format(tmp_path):
    days = pd.to_datetime('2024-03-05') + pd.to_timedelta(range(0, 40), 'D')
    want = None
    for fmt in ('%Y-%m-%d', '%Y/%m/%d', '%Y.%m.%d', '%Y년 %m월 %d일', '%d/%m/%Y', '%Y%m%d'):
        df = pd.DataFrame({'d': days.strftime(fmt), 'y': list('ab')*20})
        df.to_csv(tmp_path/'d.csv', index=False)
        ds = TableData(tmp_path/'d.csv', 'y', dates={'d': '%Y%m%d'} if fmt == '%Y%m%d' else ())
        x = whole(ds)[0]
        want = x if want is None else want
        assert torch.equal(x, want) and ds.decode(ds[0][0]) == 'd 2024-03-05'


# --- what was learned goes elsewhere ---

@pytest.mark.parametrize('encode', ['onehot', 'codes'])
def test_fitted_is_plain_data_and_enough_for_new_rows(files, encode):
    folder, df = files
    ds = divide(TableData(folder/'all.csv', 'left', encode=encode, unit='x'), 0.25).train
    learned = ds.fitted()
    assert json.loads(json.dumps(learned)) == learned
    torch.save(learned, file := io.BytesIO())
    file.seek(0)
    learned = torch.load(file, weights_only=True)
    new = TableData(df[['city', 'joined', 'age', 'income']], target='left', encode=encode, journal='off', fitted=learned)
    held = ds.subset([0]).rows
    for a, b in zip(new.gather(held), ds.subset([0]).gather(torch.tensor([0]))): assert torch.equal(a, b)
    assert new.targets() is None and len(new.gather(held)) == (1 if encode == 'onehot' else 2) and new.classes == ['no', 'yes']
    assert new.fit(torch.arange(5)).fitted() == ds.fitted() and new.facts()['num_classes'] == 2
    assert TableData(folder/'valid.csv', fitted=learned).targets().shape == (30,)
    with pytest.raises(DataError, match='no column `age`'): TableData(df.drop(columns='age'), fitted=learned)
    with pytest.raises(DataError, match='is not what `fitted'): TableData(df, fitted={'x': 1})


def test_new_rows_with_unseen_words_are_told(files, caplog):
    folder, df = files
    learned = TableData(folder/'all.csv', 'left').fitted()
    df.assign(city='여수').iloc[:7].to_csv(folder/'new.csv', index=False)
    whole(TableData(folder/'new.csv', fitted=learned))
    assert '`new.csv`: 7 of 7 rows have a value of `city` that training does not know (`여수`)' in caplog.text


def test_a_test_file_may_lack_the_target(files):
    folder, df = files
    df.iloc[90:].drop(columns='left').to_csv(folder/'test.csv', index=False)
    ds = TableData(folder/'train.csv', 'left', test_file=folder/'test.csv', id_column='번호')
    test = ds.split('test')
    assert len(test) == 30 and test.targets() is None and len(test[0]) == 1 and test.sample_id(0) == str(df['번호'][90])


def test_datasets_travel_to_other_processes(files):
    ds = TableData(files[0]/'all.csv', 'left').fit(torch.arange(50))
    assert all(torch.equal(a, b) for a, b in zip(whole(pickle.loads(pickle.dumps(ds))), whole(ds)))


# --- labels corrected, columns asked for ---

def test_the_journal_is_followed_by_files_of_the_same_content(files):
    folder, df = files
    ds = TableData(folder/'all.csv', 'left')
    ds.relabel(3, 'no' if df.left[3] == 'yes' else 'yes', note='seen by hand')
    ds.drop(5)
    after = TableData(folder/'all.csv', 'left')
    assert len(after) == 119 and after.labels()[3] != df.left[3] and list(after.left_out) == [ds.sample_id(5)]
    assert after.targets()[3] != ds.targets()[3] and whole(after)[1][3] == after.targets()[3]
    df.sample(frac=1, random_state=0).to_parquet(folder/'moved.parquet')
    assert sorted(TableData(folder/'moved.parquet', 'left').labels()) == sorted(after.labels())
    assert len(TableData(folder/'all.csv', 'left', journal='off')) == 120
    split = TableData(folder/'train.csv', 'left', valid_file=folder/'valid.csv')
    assert len(split) == 89 and len(split.split('valid')) == 30


def test_rows_are_held_out_by_a_column(files):
    folder, df = files
    by_city = divide(TableData(df.assign(city=df.city.fillna('서울')), 'left'), 0.3, by='group', groups='city')
    assert not set(by_city.train.column('city')) & set(by_city.valid.column('city'))
    by_time = divide(TableData(folder/'all.csv', 'left'), 0.2, by='time', times='joined')
    assert max(by_time.train.column('joined')) <= min(by_time.valid.column('joined'))


# --- into a model ---

def test_a_network_learns_from_the_facts_alone(tmp_path):
    table(400).to_csv(tmp_path/'big.csv', index=False)
    dl = DATASETS.get('Table')(str(tmp_path/'big.csv'), 'left')
    dl = DataLoader(dl, batch_size=32, validation_split=0.25, seed=0)
    facts = dl.facts()
    torch.manual_seed(0)
    model = nn.Linear(facts['in_features'], facts['num_classes'])
    opt = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(15):
        for x, y in dl:
            nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
            opt.zero_grad()
    right = torch.cat([model(x).argmax(1) == y for x, y in dl.split_validation()]).float().mean()
    assert right > 0.75       # one in ten labels is wrong by design, one age in eight is missing


def test_the_picture_shows_the_words_of_the_file(files):
    ds = TableData(files[0]/'all.csv', 'left')
    fig = DataLoader(ds, batch_size=8).show_batch(6)
    texts = {o.get_text() for o in fig.findobj(lambda o: hasattr(o, 'get_text'))}
    assert {'age', 'income', 'city', 'joined', 'left'} <= texts and texts & {'서울', '부산'} and 'note' not in texts


def test_the_log_says_nothing_when_all_is_known(files, caplog):
    caplog.set_level(logging.WARNING)
    folder, _ = files
    list(DataLoader(TableData(folder/'train.csv', 'left', valid_file=folder/'valid.csv')).split_validation())
    assert not caplog.records
