"""Texts from files: however they are written, whatever is in them, fitted on training rows alone and in bounded memory."""
import json
import pickle
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pandas as pd
import pytest
import torch

from deep_studio_nb.common.errors import DataError
from deep_studio_nb.common.registry import TRANSFORMS
from deep_studio_nb.data.loaders import BaseDataLoader
from deep_studio_nb.data.text import TextFile
from deep_studio_nb.data.tokens import TOKENS, from_jamo, normalize_text, to_jamo
from deep_studio_nb.models.text import BagOfWords, TextCNN
from deep_studio_nb.training.trainer import Trainer

ROWS = [('정말 재밌는 영화예요 ㅋㅋㅋㅋㅋ', 'pos'), ('배우들 연기가 최고!!', 'pos'), ('지루하고 돈 아까움 ㅠㅠ', 'neg'), ('최악의 각본, 비추', 'neg'), ('음악은 좋은데 결말이 별로', 'neg'), ('또 보고 싶다', 'pos')]


def write(path, rows=ROWS, head=('review', 'label'), sep='\t', encoding='utf-8'):
    path.write_bytes(''.join(sep.join(o)+'\n' for o in [head, *rows]).encode(encoding))
    return path


def texts(ds): return [ds.load(i)[0] for i in range(len(ds))]


# --- how files are written ---

@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'cp949', 'utf-16', 'euc-kr'])
@pytest.mark.parametrize('sep', ['\t', ';'])
def test_encodings_and_separators_are_found(encoding, sep, tmp_path):
    ds = TextFile(write(tmp_path/'리뷰.csv', sep=sep, encoding=encoding), 'review', 'label')
    assert texts(ds) == [t for t,_ in ROWS]
    assert ds.classes == ['neg', 'pos'] and ds.targets().tolist() == [1,1,0,0,0,1]


def test_quotes_and_newlines_within_cells(tmp_path):
    path = tmp_path/'a.csv'
    path.write_text('review,label\n"그는 ""최고""라고,\n말했다",pos\n"한 줄",neg\n', encoding='utf-8')
    ds = TextFile(path, 'review', 'label', min_count=1)
    assert texts(ds) == ['그는 "최고"라고,\n말했다', '한 줄']
    assert ds.decode(ds[0][0]) == '그는 "최고"라고, 말했다'
    assert ds.sample_id(1) == 'a.csv:4'


def test_stray_quotes_are_letters(tmp_path):
    rows = [('"이게 영화냐', 'neg'), ('그 "명작', 'pos'), ("'좋다\"", 'pos')]
    assert texts(TextFile(write(tmp_path/'a.tsv', rows), 'review', 'label')) == [t for t,_ in rows]


def test_no_header(tmp_path):
    path = tmp_path/'sms.tsv'
    path.write_text('ham\tSee you at 5\nspam\tFREE prize!! call 0800\nham\tok\n')
    ds = TextFile(path, 'text', 'label', header=False, names=['label', 'text'], min_count=1)
    assert ds.tokens.name == 'words' and ds.classes == ['ham', 'spam']
    assert ds.decode(ds[1][0]) == 'free prize!! call 0800'


def test_parquet_and_data_frames_are_read_alike(tmp_path):
    pytest.importorskip('pyarrow')
    frame = pd.DataFrame(ROWS, columns=['review', 'label'])
    frame.to_parquet(tmp_path/'a.parquet')
    one,two = TextFile(tmp_path/'a.parquet', 'review', 'label'), TextFile(frame, 'review', 'label')
    assert texts(one) == texts(two) and torch.equal(one.gather(torch.arange(6))[0], two.gather(torch.arange(6))[0])


@pytest.mark.parametrize('content, says', [
    (b'review,label\n', 'no rows'),
    (b'', 'empty'),
    (b'review,review\na,b\n', 'names `review` twice'),
    (b'reviews,label\na,b\n', 'did you mean `reviews`'),
    (b'review,label\na,b\nc\n', 'line 3 of `a.csv` has 1 cell'),
    ('review,label\n좋은 영화,1\n나쁜 영화,0\n'.encode()+b'\xed\x95,1\n', 'is damaged'),
    (b'review,label\n"open,1\n', 'never closed'),
])
def test_files_that_cannot_be_used(content, says, tmp_path):
    (tmp_path/'a.csv').write_bytes(content)
    with pytest.raises(DataError, match=says): TextFile(tmp_path/'a.csv', 'review', 'label')


# --- what is in them ---

@pytest.mark.parametrize('how', ['file', 'column'])
def test_labels_unseen_in_train_are_named_with_their_line(how, tmp_path):
    extra = [('그저 그렇다', 'neutrl'), ('좋다', 'pos')]
    if how=='file': ds = TextFile(write(tmp_path/'a.tsv'), 'review', 'label', valid_file=write(tmp_path/'v.tsv', extra))
    else: ds = TextFile(write(tmp_path/'v.tsv', [(*extra[0], 'valid'), *((*o, 'train') for o in ROWS)], ('review', 'label', 'part')), 'review', 'label', split_column='part')
    assert ds.classes == ['neg', 'pos']
    with pytest.raises(DataError, match='line 2 of `v.tsv` has the label `neutrl`, which is not among those of the training data'): ds.split('valid')


def test_rows_without_text_or_target_are_left_out_by_name(tmp_path, caplog):
    rows = [*ROWS, ('', 'pos'), (' \u200b\u3164 ', 'pos'), ('라벨이 없다', '')]
    path = write(tmp_path/'a.tsv', rows)
    ds = TextFile(path, 'review', 'label')
    assert len(ds)==6 and ds.left_out == {'a.tsv:8': 'the text is empty', 'a.tsv:9': 'the text is empty', 'a.tsv:10': 'the target is missing'}
    assert '3 of 9 rows of `a.tsv` are left out' in caplog.text
    assert [o.reason for o in ds.check()] == list(ds.left_out.values())
    with pytest.raises(DataError, match='3 of 9 rows cannot be used. line 8 of `a.tsv`: the text is empty'): TextFile(path, 'review', 'label', on_bad='raise')
    with pytest.raises(DataError, match='None of the 1 rows can be used'): TextFile(write(tmp_path/'b.tsv', [('', 'pos')]), 'review', 'label')


def test_without_a_target_every_row_stays(tmp_path):
    ds = TextFile(write(tmp_path/'a.tsv', [*ROWS, ('', 'x')]), 'review')
    assert len(ds)==7 and ds.targets() is None and len(ds[0])==1
    ids, = ds.gather(torch.tensor([6]))
    assert ids.tolist() == [[0]]
    for model in (TextCNN(len(ds.vocabulary), 2), BagOfWords(len(ds.vocabulary), 2)): assert model.eval()(ids).isfinite().all()


def test_odd_texts_survive(tmp_path):
    odd = ['👨‍👩‍👧🇰🇷👍🏽', '漢字와 かな', '쩔닼ㅋㅋㅋㅋ', unicodedata.normalize('NFD', '자모 분리'), 'ᄏᄏᄏ ㅠㅠ ㄳ', 'a'*5000, 'ＦＵＬＬ　ｗｉｄｔｈ', '\u202eabc', 'é'*3, '0'*300]
    frame = pd.DataFrame(dict(t=odd, y=['a', 'b']*5))
    for kind in TOKENS:
        ds = TextFile(frame, 't', 'y', tokens=kind, min_count=1, max_length=None)
        assert [ds.load(i)[0] for i in range(10)] == odd
        if kind!='words': assert [ds.decode(ds[i][0]) for i in range(10)] == [normalize_text(o) for o in odd]
    assert '<unk>' not in ''.join(ds.decode(ds[i][0]) for i in range(10))


def test_jamo_are_reversible_for_any_text():
    rng = random.Random(1)
    planes = [(0x20, 0x7f), (0xac00, 0xd7a4), (0x1100, 0x1200), (0x3130, 0x3190), (0xa960, 0xa980), (0xd7b0, 0xd7fc), (0x300, 0x370), (0xff00, 0xffef), (0x4e00, 0x5000), (0x1f300, 0x1f700)]
    for _ in range(3000):
        text = ''.join(chr(rng.randrange(*rng.choice(planes))) for _ in range(12))
        clean = normalize_text(text)
        assert normalize_text(clean) == clean
        assert from_jamo(to_jamo(clean)) == clean, ascii(text)
        for kind in ('chars', 'syllables', 'jamo'): assert TOKENS[kind].join(TOKENS[kind].split(clean)) == clean


@pytest.mark.parametrize('cells, kw, task', [
    (['0', '1', '0', '1'], {}, 'classes'),
    (['5', '3', '1', '4'], dict(task='number'), 'number'),
    (['1.5', '2', '3.25', '1e2'], {}, 'number'),
    (['a|b', 'b', 'c|a', 'b|c'], dict(label_sep='|'), 'labels'),
])
def test_the_target_is_understood(cells, kw, task):
    ds = TextFile(pd.DataFrame(dict(t=['하나 둘', '둘 셋', '셋 넷', '하나 넷'], y=cells)), 't', 'y', min_count=1, **kw)
    ids,y = ds.gather(torch.arange(4))
    assert ds.task==ds.facts()['task']==task
    assert (y.dtype,y.shape) == {'classes': (torch.int64,(4,)), 'number': (torch.float32,(4,1)), 'labels': (torch.float32,(4,3))}[task]
    if task=='labels': assert [ds.target_name(o) for o in y] == ['a, b', 'b', 'a, c', 'b, c']
    if task=='number': assert set(ds.facts()) >= {'target_mean', 'target_std', 'out_features'} and ds.facts()['target_mean']==[sum(map(float, cells))/4]


def test_a_cell_that_is_no_number_is_named(tmp_path):
    with pytest.raises(DataError, match='line 4 of `a.tsv` has `many` where a number is wanted'):
        TextFile(write(tmp_path/'a.tsv', [('a', '1'), ('b', '2.5'), ('c', 'many')]), 'review', 'label', task='number')


# --- fitted on training rows alone ---

def test_only_training_rows_are_learned_from():
    frame = pd.DataFrame(dict(t=[f'공통 낱말{i}' for i in range(40)], y=['a', 'b']*20))
    ds = TextFile(frame, 't', 'y', tokens='words', min_count=1)
    loader = BaseDataLoader(ds, 8, validation_split=0.25)
    valid = loader.split_validation()
    known,cut = set(loader.dataset.vocabulary.words), TOKENS['words'].split
    assert len(loader.dataset)==30 and len(valid.dataset)==10
    assert known == {o for t in texts(loader.dataset) for o in cut(t)}
    assert not any(o in known for t in texts(valid.dataset) for o in cut(t) if o.isdigit())
    assert all((b[0]==1).any() for b in valid)
    assert valid.dataset.vocabulary is loader.dataset.vocabulary
    assert loader.facts()['vocab_size'] == len(known)+2 and loader.facts()['class_counts'] == [15, 15]


def test_held_out_texts_are_seen_with_the_vocabulary_of_training_however_a_loader_gets_them(tmp_path):
    ds = TextFile(write(tmp_path/'a.tsv'), 'review', 'label', valid_file=write(tmp_path/'v.tsv', ROWS[3:]), min_count=1)
    by_hand = [BaseDataLoader(ds.split('valid'), 3, shuffle=False), BaseDataLoader(ds.subset([3,4,5]), 3, shuffle=False), BaseDataLoader(ds, 3).split_validation()]
    for loader in by_hand: assert torch.equal(next(iter(loader))[0], ds.gather(torch.tensor([3,4,5]))[0])


def test_what_was_fitted_is_plain_and_makes_the_same_batches(tmp_path):
    train,new = write(tmp_path/'a.tsv'), write(tmp_path/'n.tsv', [('1', t) for t,_ in ROWS[::-1]], ('id', 'review'))
    ds = TextFile(train, 'review', 'label', tokens='jamo', lower=False, squeeze=2, max_length=20)
    kept = json.loads(json.dumps(ds.fitted()))
    again = TextFile(new, 'review', 'label', fitted=kept, journal='off')
    assert torch.equal(again.gather(torch.arange(6))[0].flip(0), ds.gather(torch.arange(6))[0])
    assert again.classes==ds.classes and again.tokens.name=='jamo' and again.fitted()==kept
    assert {k: again.facts()[k] for k in ('vocab_size', 'num_classes', 'task')} == {k: ds.facts()[k] for k in ('vocab_size', 'num_classes', 'task')}


# --- batches ---

@pytest.mark.parametrize('kind', TOKENS)
def test_gathered_batches_are_those_of_single_samples(kind):
    ds = TextFile(pd.DataFrame(ROWS, columns=['t', 'y']), 't', 'y', tokens=kind, min_count=1, max_length=15)
    idx = torch.tensor([3,0,5,0])
    for a,b in zip(ds.gather(idx), ds.collate([ds[int(i)] for i in idx])): assert torch.equal(a, b)
    ids,_ = ds.gather(idx)
    assert ids.shape[1]==ds.lengths()[idx].max()<=15 and torch.equal((ids!=0).sum(1), ds.lengths()[idx])
    for a,b in zip(ds.subset([5,3]).gather(torch.tensor([1])), ds.gather(torch.tensor([3]))): assert torch.equal(a, b)
    other = pickle.loads(pickle.dumps(ds))
    assert torch.equal(other.gather(idx)[0], ids)


def test_order_and_padding_depend_on_seed_and_epoch_alone():
    ds = TextFile(pd.DataFrame(ROWS*4, columns=['t', 'y']), 't', 'y')
    one,two = BaseDataLoader(ds, 5, seed=3), BaseDataLoader(ds, 5, seed=3, num_workers=1)
    for _ in range(2):
        for (a,y),(b,z) in zip(one, two): assert torch.equal(a, b) and torch.equal(y, z)
    one.set_epoch(1), two.set_epoch(1), two.start_at(2)
    for (a,_),(b,_) in zip(list(one)[2:], two): assert torch.equal(a, b)


def test_batches_by_length_hold_little_padding():
    rng = random.Random(0)
    ds = TextFile(pd.DataFrame(dict(t=[' '.join(['말']*rng.randrange(1, 60)) for _ in range(640)], y=[0, 1]*320)), 't', 'y', tokens='words')
    def share(**kw): return sum(int((x!=0).sum()) for x,_ in BaseDataLoader(ds, 32, **kw))/sum(x.numel() for x,_ in BaseDataLoader(ds, 32, **kw))
    assert share(sampling='by_length')>0.9 and share()<0.7


def test_a_transform_of_the_text_is_padded_by_the_loader():
    ds = TextFile(pd.DataFrame(ROWS, columns=['t', 'y']), 't', 'y', min_count=1).with_transforms(dict(train=str.upper, valid=lambda o: o[:2]))
    loader = BaseDataLoader(ds, 4, validation_split=2)
    assert [o.shape[0] for o,_ in loader]==[4] and next(iter(loader.split_validation()))[0].shape==(2,2)


def test_authors_are_not_divided(tmp_path):
    rows = [(f'글 {i}', 'ab'[i%2], f'작가{i//4}') for i in range(40)]
    ds = TextFile(write(tmp_path/'a.tsv', rows, ('t', 'y', 'author')), 't', 'y')
    loader = BaseDataLoader(ds, 4, validation_split=0.3, by='group', groups='author')
    parts = [set(o.dataset.column('author')) for o in (loader, loader.split_validation())]
    assert not parts[0]&parts[1] and len(parts[0]|parts[1])==10


def test_a_column_of_ids_is_no_target(tmp_path, caplog):
    TextFile(write(tmp_path/'a.tsv', [(f'글 {i}', f'id{i}') for i in range(40)]), 'review', 'label')
    assert '`label` has 40 different values in 40 rows: is it the target?' in caplog.text


def test_a_tokenizer_of_ones_own_by_name():
    with TRANSFORMS.temporary():
        @TRANSFORMS.register
        def halves(text): return text.split('영화')
        ds = TextFile(pd.DataFrame(dict(t=['그 영화 이 영화', '영화'], y=[0, 1])), 't', 'y', tokens='halves', min_count=1)
        assert ds.vocabulary.words[0]=='' and ds.fitted()['tokens']=='halves'
        @TRANSFORMS.register
        def tagged(text): return [(o, 'NNG') for o in text.split()]
        with pytest.raises(DataError, match='list of tuple'): TextFile(pd.DataFrame(dict(t=['a b'], y=[0])), 't', 'y', tokens='tagged')


def test_a_journal_changes_labels_of_each_split(tmp_path):
    args = dict(file=write(tmp_path/'a.tsv'), text='review', target='label', valid_file=write(tmp_path/'v.tsv', ROWS[:2]))
    ds = TextFile(**args)
    ds.relabel(0, 'neg', note='sarcasm')
    ds.drop(5)
    after = TextFile(**args)
    assert after.targets().tolist() == [0,1,0,0,0] and list(after.left_out) == ['a.tsv:7']
    assert after.split('valid').targets().tolist() == [0,1]
    assert TextFile(**args, journal='off').targets().tolist() == ds.targets().tolist()
    assert after.fingerprint() != ds.fingerprint()


# --- models ---

def sentences(n, seed):
    "Made-up reviews: the ending says what is meant, so syllables and order matter."
    rng = random.Random(seed)
    good,bad = ['재밌어요', '최고예요', '좋네요', '안 지루해요'], ['재미없어요', '별로예요', '나쁘네요', '지루해요']
    rows = [(f"{rng.choice(['영화', '배우', '음악', '결말', '각본'])}{rng.choice(['가', '는', '도'])} {rng.choice(['정말', '너무', '아주', '그냥'])} {rng.choice((bad, good)[k])}{rng.choice(['', ' ㅋㅋ', '!', ' ㅠㅠ'])}", str(k)) for k in (rng.randrange(2) for _ in range(n))]
    return pd.DataFrame(rows, columns=['t', 'y'])


@pytest.mark.parametrize('model', [TextCNN, BagOfWords])
@pytest.mark.parametrize('kind', ['syllables', 'jamo', 'words'])
def test_reviews_are_learned(model, kind):
    ds = TextFile(sentences(600, 0), 't', 'y', tokens=kind)
    new = BaseDataLoader(TextFile(sentences(200, 1), 't', 'y', fitted=ds.fitted()), 100, shuffle=False)
    torch.manual_seed(0)
    small = dict(channels=16, dim=32, dropout=0.) if model is TextCNN else dict(buckets=2000, dropout=0.)
    net = model(len(ds.vocabulary), 2, **small)
    history = Trainer(net, BaseDataLoader(ds, 32), new, loss='cross_entropy', metrics=['accuracy'], optimizer={'type': 'Adam', 'args': {'lr': 0.01}}, epochs=4, progress=False).train()
    assert history.rows[-1]['val_accuracy'] > 0.95


def test_a_batch_is_shown_in_words(tmp_path):
    loader = BaseDataLoader(TextFile(write(tmp_path/'a.tsv'), 'review', 'label', valid_file=write(tmp_path/'v.tsv', [('뷁 영화', 'pos')]), min_count=1), 4)
    path = loader.split_validation().save_samples(tmp_path/'images')[0]
    assert path.stat().st_size > 1000
    shown = [o.get_text() for ax in loader.split_validation().show_batch().axes for o in ax.texts]
    assert '<unk> 영화' in shown and 'pos' in shown


# --- memory ---

PEAK = """
import sys, torch
from deep_studio_nb.data.text import TextFile
def kilobytes(what): return int(next(o for o in open('/proc/self/status') if o.startswith(what)).split()[1])
with open('/proc/self/clear_refs', 'w') as f: f.write('5')   # the peak begins anew
base = kilobytes('VmRSS')
ds = TextFile(sys.argv[1], 'review', 'label', tokens=sys.argv[2])
ids, y = ds.fit(torch.arange(0, len(ds), 2)).gather(torch.arange(64))
print(len(ds), (kilobytes('VmHWM')-base)//1024)
"""


@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='the peak of a process cannot be measured here')
@pytest.mark.parametrize('kind, megabytes', [('syllables', 120), ('words', 100)])
def test_many_texts_load_in_bounded_memory(kind, megabytes, tmp_path):
    "100,000 reviews of 35 letters, as bytes 9 MB: tokens, texts, lines and targets, and what is needed while reading."
    rng = random.Random(0)
    syllables = [chr(rng.randrange(0xac00, 0xd7a4)) for _ in range(1500)]
    words = [''.join(rng.choices(syllables, k=rng.randrange(1, 5))) for _ in range(50_000)]
    with (tmp_path/'a.tsv').open('w', encoding='utf-8') as f:
        f.write('review\tlabel\n')
        for i in range(100_000): f.write(f"{' '.join(rng.choices(words, k=10))}\t{i%2}\n")
    r = subprocess.run([sys.executable, '-c', PEAK, str(tmp_path/'a.tsv'), kind], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert r.returncode==0, r.stderr
    n,used = map(int, r.stdout.split())
    assert n==100_000 and used<megabytes, f'{used} MB'
