"Tables in files: every encoding, separator and quote, the line of every fault, bounded memory."
import csv
import io
import pickle
import random
import subprocess
import sys
import textwrap

import numpy as np
import pandas as pd
import pytest

from deep_studio_nb.common.errors import DataError, MissingLibrary
from deep_studio_nb.data.csv_files import csv_format
from deep_studio_nb.data.encodings import find_encoding, first_bad_byte
from deep_studio_nb.data.table_files import TableFile

PEOPLE = '이름,나이,도시\n김하나,31,서울\n박둘,28,"부산, 해운대"\n최셋,,대구\n'


def wrote(folder, text, encoding='utf-8', name='표.csv'):
    (folder/name).write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return folder/name


# --- encodings ---

@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le', 'utf-16-be', 'utf-32', 'cp949'])
def test_every_encoding_gives_the_same_table(tmp_path, encoding):
    t = TableFile(wrote(tmp_path, PEOPLE, encoding))
    chunk = t.read()
    assert t.columns == ['이름', '나이', '도시']       # a mark at the beginning is no part of the first name
    assert chunk['도시'] == ['서울', '부산, 해운대', '대구'] and chunk.texts('나이') == ['31', '28', None]
    assert t.format.encoding == encoding


def test_cp949_is_said_in_the_log(tmp_path, caplog):
    caplog.set_level('INFO', 'deep_studio_nb')
    TableFile(wrote(tmp_path, PEOPLE, 'cp949'))
    assert '`표.csv` is comma-separated, cp949' in caplog.text


@pytest.mark.parametrize('given', ['utf-8', 'utf-8-sig', 'ascii', 'utf-16'])
def test_a_wrong_encoding_names_byte_line_and_what_fits(tmp_path, given):
    with pytest.raises(DataError, match=r'byte 0x') as e: TableFile(wrote(tmp_path, 'a,b\n1,2\n3,서울\n', 'cp949'), encoding=given)
    if given != 'utf-16': assert 'in line 3' in str(e.value) and '"cp949" reads it as `3,서울`' in str(e.value)


def test_a_right_encoding_may_be_given(tmp_path):
    assert TableFile(wrote(tmp_path, PEOPLE, 'cp949'), encoding='euc-kr').read()['이름'][0] == '김하나'
    with pytest.raises(DataError, match='Python does not know, did you mean `utf-8`'): TableFile(wrote(tmp_path, PEOPLE), encoding='utf_8x')


def test_a_bad_byte_far_down_is_found_before_reading(tmp_path):
    lines = 200_000
    path = wrote(tmp_path, b'name,n\n' + '가나다,1\n'.encode()*lines + b'\xff\xfe,2\n')
    bad = first_bad_byte(path, 'utf-8')
    assert (bad.line, bad.byte) == (lines+2, 0xff)
    with pytest.raises(DataError, match=f'is UTF-8, but byte 0xff in line {lines+2} is damaged'): TableFile(path)


def test_ascii_at_first_and_cp949_at_the_end(tmp_path):
    path = wrote(tmp_path, b'a,b\n' + b'1,2\n'*500_000 + '3,서울\n'.encode('cp949'))
    assert find_encoding(path) == 'cp949'


def test_western_letters_are_not_taken_for_korean(tmp_path):
    with pytest.raises(DataError, match='"cp1252" reads it as `1,café crème`'): TableFile(wrote(tmp_path, 'a,b\n1,café crème\n', 'cp1252'))


def test_names_are_composed_whatever_wrote_them(tmp_path):
    import unicodedata
    t = TableFile(wrote(tmp_path, unicodedata.normalize('NFD', PEOPLE)))
    assert t.columns == ['이름', '나이', '도시'] and t.check_columns([unicodedata.normalize('NFD', '도시')]) == ['도시']


# --- separators, quotes, lines ---

SOUP = ['a', 'b c', '서울', '1', '2.5', ',', ';', '\t', '|', '"', '\n', '\r\n', "'", ' ', '""', 'x"y', '#', '\\']

@pytest.mark.parametrize('seed', range(12))
def test_what_csv_writes_is_read_back_with_its_lines(tmp_path, seed):
    "Random cells with separators, quotes and line ends, in several dialects and chunks."
    rng = random.Random(seed)
    n_cols, n_rows = rng.randint(2, 5), rng.randint(1, 40)
    rows = [[''.join(rng.choices(SOUP, k=rng.randint(0, 4))) for _ in range(n_cols)] for _ in range(n_rows)]
    sep, end = rng.choice(',;\t|'), rng.choice(['\n', '\r\n'])
    out, lines = io.StringIO(newline=''), []
    writer = csv.writer(out, delimiter=sep, lineterminator=end, quoting=rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    writer.writerow([f'c{k}' for k in range(n_cols)])
    for row in rows:
        lines.append(len(out.getvalue().splitlines()) + 1)
        writer.writerow(row)
        if rng.random() < .2: out.write(end)   # blank lines are nothing
    path = wrote(tmp_path, out.getvalue(), rng.choice(['utf-8', 'utf-8-sig', 'utf-16', 'cp949']))
    t = TableFile(path, sep=sep, quoting='on', chunk_rows=rng.choice([1, 3, 1000]))
    chunk = t.read()
    assert [list(o) for o in zip(*chunk.cells.values())] == rows
    assert list(chunk.lines) == lines


@pytest.mark.parametrize('sep', [',', ';', '\t', '|'])
def test_the_separator_is_found(tmp_path, sep):
    text = sep.join(['id', 'text', 'price']) + '\n' + ''.join(f'{i}{sep}some words{", and more" if sep != "," else ""}{sep}{i}{".5" if sep == "," else ",5"}\n' for i in range(5))
    t = TableFile(wrote(tmp_path, text))
    assert t.format.sep == sep and t.read()['price'][1] == ('1.5' if sep == ',' else '1,5')


def test_stray_quotes_in_a_tsv_are_letters(tmp_path):
    text = 'id\tdocument\tlabel\n1\t"무야호\t1\n2\t그냥 "그저\t0\n3\t"따옴표" 영화\t1\n'
    t = TableFile(wrote(tmp_path, text, name='r.tsv'))
    assert not t.format.quotes and t.read()['document'] == ['"무야호', '그냥 "그저', '"따옴표" 영화']
    assert TableFile(wrote(tmp_path, text, name='r.tsv'), quoting=False).read()['label'] == ['1', '0', '1']
    with pytest.raises(DataError, match='set `quoting` to "off"'): TableFile(wrote(tmp_path, text, name='r.tsv'), quoting='on').read()


def test_real_quotes_in_a_tsv_hold_cells_together(tmp_path):
    t = TableFile(wrote(tmp_path, 'id\ttext\n1\t"a\tb\nc"\n2\tplain\n'))
    assert t.format.quotes and t.read()['text'] == ['a\tb\nc', 'plain'] and list(t.read().lines) == [2, 4]


@pytest.mark.parametrize('text,line,words', [
    ('a,b\n1,2\n3,4,5\n', 3, 'has 3 cells, the table has 2 columns: `3,4,5`'),
    ('a,b\n1,"2\n2"\n3\n', 4, 'has 1 cell, '),
    ('a,b\n1,2\n3,"open\n4,5\n', 3, 'opens a quote that is never closed'),
    ('a,b\n1,2\n3,"x" y\n', 3, 'quote that ends in the middle'),
    ('a,b\n1,2\n3,"' + 'long\n'*40_000, 3, 'more than 131,072 characters'),
    ('age,name,age\n1,2,3\n', 1, 'names `age` twice, in columns 1 and 3'),
])
@pytest.mark.parametrize('chunk_rows', [1, 1000])
def test_a_fault_names_its_line(tmp_path, text, line, words, chunk_rows):
    with pytest.raises(DataError) as e: TableFile(wrote(tmp_path, text, name='t.csv'), chunk_rows=chunk_rows).read()
    assert f'line {line} of `t.csv`' in str(e.value) and words in str(e.value)
    t = TableFile(tmp_path/'t.csv', strict=False, chunk_rows=chunk_rows)   # a report sees all of it, and never fails
    list(t.chunks())
    assert line in [o.line for o in t.problems]


def test_columns_without_names_and_files_without_header(tmp_path):
    assert TableFile(wrote(tmp_path, ',a,b\n0,1,2\n')).columns == ['column 1', 'a', 'b']
    t = TableFile(wrote(tmp_path, 'ham\tOk lar\nspam\tWin\n'), header=False, names=['label', 'text'])
    assert t.read().cells == {'label': ['ham', 'spam'], 'text': ['Ok lar', 'Win']} and list(t.read().lines) == [1, 2]


def test_a_missing_column_is_named_with_the_nearest(tmp_path):
    with pytest.raises(DataError, match='no column `citty`, did you mean `city`') as e: TableFile(wrote(tmp_path, 'city,age\na,1\n')).read(['citty'])
    assert '`city`, `age`' in str(e.value) and 'set `header` to false' in str(e.value)


@pytest.mark.parametrize('content,words', [
    (b'', 'is empty (0 bytes)'), (b'\n\n', 'nothing but blank lines'), (b'a,b\n', 'a header, but no rows'), (b'PK\x03\x04xx', 'a spreadsheet or a zip file'),
    (b'\x1f\x8bxxx', 'compressed'), (b'PAR1xx', 'give it the suffix .parquet')])
def test_files_that_are_no_tables(tmp_path, content, words):
    with pytest.raises(DataError) as e: TableFile(wrote(tmp_path, content)).read()
    assert words in str(e.value)


def test_paths_that_are_no_files(tmp_path):
    wrote(tmp_path, PEOPLE, name='train.csv')
    with pytest.raises(DataError, match='There is `train.csv`'): TableFile(tmp_path/'trian.csv')
    with pytest.raises(DataError, match='is a folder'): TableFile(tmp_path)
    with pytest.raises(DataError, match='is not there'): TableFile(tmp_path/'no.parquet')
    with pytest.raises(DataError, match='pandas data frame'): TableFile({'a': [1]})


def test_options_that_make_no_sense(tmp_path):
    path = wrote(tmp_path, PEOPLE)
    with pytest.raises(DataError, match='`sep` is'): TableFile(path, sep=', ')
    with pytest.raises(DataError, match='`quoting` is'): TableFile(path, quoting='maybe')
    with pytest.raises(DataError, match='`names` has 2 entries'): TableFile(path, names=['a', 'b'])


def test_a_lenient_reading_collects_everything(tmp_path):
    path = wrote(tmp_path, 'age,name,age\n1,김,2\n3,박\n4,이,5,6\n'.encode() + b'7,\xff,8\n9,"x,10\n')
    t = TableFile(path, strict=False)
    chunk = t.read()
    assert {(o.line, o.kind) for o in t.problems} == {(5, 'encoding'), (1, 'header'), (3, 'ragged'), (4, 'ragged'), (6, 'quotes')}
    assert chunk.cells == {'age': ['1', '7'], 'name': ['김', '\ufffd'], 'age (2)': ['2', '8']}
    clean = TableFile(wrote(tmp_path, PEOPLE, name='clean.csv'), strict=False)
    clean.read()
    assert clean.problems == []


# --- parquet and frames ---

@pytest.fixture
def frame():
    return pd.DataFrame({'이름': ['김', None, '최', '박'], 'n': pd.array([1, None, 3, 4], dtype='Int64'), 'x': [1.5, np.nan, 2, 3], 'on': [True, False, None, True],
                         'day': pd.to_datetime(['2024-01-01', None, '2024-01-03', '2024-01-04']), 'kind': pd.Categorical(['a', 'b', None, 'a'])})


def test_parquet_and_frames_give_the_same(tmp_path, frame):
    frame.to_parquet(tmp_path/'f.parquet')
    a, b = TableFile(frame, chunk_rows=3).read(), TableFile(tmp_path/'f.parquet', chunk_rows=2).read()
    for o in frame.columns: assert a.texts(o) == b.texts(o)
    assert a.texts('이름') == ['김', None, '최', '박'] and a.texts('n') == ['1.0', None, '3.0', '4.0'] and a.texts('on') == ['True', 'False', None, 'True']
    assert list(b.lines) == [1, 2, 3, 4] and TableFile(tmp_path/'f.parquet').where(2) == 'row 2 of `f.parquet`'
    assert list(TableFile(tmp_path/'f.parquet').read(['x', 'n']).cells) == ['x', 'n']


def test_broken_parquet_and_duplicated_columns(tmp_path, frame):
    with pytest.raises(DataError, match='cannot be read as parquet'): TableFile(wrote(tmp_path, b'PAR1 and more', name='b.parquet'))
    with pytest.raises(DataError, match='names `x` twice'): TableFile(pd.concat([frame[['x']], frame[['x']]], axis=1))


def test_parquet_without_its_library_names_the_extra(tmp_path, frame, monkeypatch):
    frame.to_parquet(tmp_path/'f.parquet')
    for o in ('pyarrow', 'pyarrow.parquet'): monkeypatch.setitem(sys.modules, o, None)
    with pytest.raises(MissingLibrary, match=r'deep_studio_nb\[table\]'): TableFile(tmp_path/'f.parquet')


def test_tables_travel_to_other_processes(tmp_path, frame):
    frame.to_parquet(tmp_path/'f.parquet')
    for source in (tmp_path/'f.parquet', wrote(tmp_path, PEOPLE), frame):
        t = TableFile(source)
        assert pickle.loads(pickle.dumps(t)).read().texts(t.columns[0]) == t.read().texts(t.columns[0])


# --- a million rows ---

MILLION = textwrap.dedent('''
    import sys, torch, pandas
    from deep_studio_nb.data.table_files import TableFile
    from deep_studio_nb.data.table import TableData

    def peak():
        "Megabytes of memory in use at the worst moment so far."
        try: return int(next(o for o in open('/proc/self/status') if o.startswith('VmHWM')).split()[1])/1024
        except OSError:
            import resource
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(1<<20 if sys.platform=='darwin' else 1024)

    list(TableFile(sys.argv[2]).chunks()), TableData(sys.argv[2], 'y').gather(torch.arange(2))   # what any table costs
    before = peak()
    print(sum(len(o) for o in TableFile(sys.argv[1]).chunks()))
    print(peak()-before)
    ds = TableData(sys.argv[1], 'y').fit(torch.arange(800_000))
    print(len(ds), ds.gather(torch.tensor([999_999]))[0].shape[1])
    print(peak()-before)
''')

def test_a_million_rows_need_little_memory(tmp_path):
    "As Python texts they would take more than 400 MB."
    n = 1_000_000
    with open(tmp_path/'big.csv', 'w') as f:
        f.write('id,a,b,city,note,y\n')
        for i in range(0, n, 1000): f.write(''.join(f'{k},{k*.37:.2f},{k%97},city{k%12},"a, {k%5}",{"no yes"[k%2*3:][:3].strip()}\n' for k in range(i, i+1000)))
    wrote(tmp_path, 'id,a,b,city,note,y\n' + ''.join(f'{k},1.5,2,x{k%2},n,{k%2}\n' for k in range(20)), name='small.csv')
    r = subprocess.run([sys.executable, '-c', MILLION, tmp_path/'big.csv', tmp_path/'small.csv'], capture_output=True, text=True, check=False)
    assert r.returncode == 0, r.stderr
    rows, chunks_mb, made, table_mb = r.stdout.splitlines()
    assert rows == '1000000' and made == '1000000 19'   # a, b, 12 cities, 5 notes
    assert float(chunks_mb) < 60, f'reading took {chunks_mb} MB'
    assert float(table_mb) < 220, f'the dataset took {table_mb} MB'


def test_format_is_found_in_the_first_lines_of_a_long_file(tmp_path):
    path = wrote(tmp_path, 'a;b\n' + '1,5;x\n'*50_000)
    assert csv_format(path).sep == ';'
