"The data report finds every fault that is planted, is silent about clean data, and never falls over what it should report."
import json, os, shutil, signal, subprocess, sys, time, unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageEnhance

from deep_studio_nb.cli import main
from deep_studio_nb.data.image_folder import ImageFolder
from deep_studio_nb.data.image_list import ImageList
from deep_studio_nb.data.loaders import DataLoader
from deep_studio_nb.data.report import check_data
from deep_studio_nb.data.table import TableData
from deep_studio_nb.data.text import TextFile

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch): monkeypatch.setenv('DEEP_STUDIO_CACHE', str(tmp_path_factory.mktemp('cache')))


def scene(rng, size=48):
    "A picture like no other: waves of random direction and colour with a few discs."
    y, x = np.mgrid[:size, :size]/size
    im = sum(rng.uniform(30, 90, 3)*np.sin(rng.uniform(3, 15)*x + rng.uniform(3, 15)*y + rng.uniform(0, 6))[..., None] for _ in range(3)) + rng.uniform(90, 150, 3)
    for _ in range(4): im[(x-rng.random())**2 + (y-rng.random())**2 < rng.uniform(.01, .06)] = rng.uniform(0, 255, 3)
    return Image.fromarray(im.clip(0, 255).astype('uint8'))


def folder(root, classes=('고양이', '강아지', 'fox'), train=14, valid=6, seed=0):
    rng = np.random.default_rng(seed)
    for split, n in dict(train=train, valid=valid).items():
        for name in classes:
            (root/split/name).mkdir(parents=True)
            for _ in range(n): scene(rng).save(root/split/name/f'{rng.integers(10**9)}.png')
    return root


@pytest.fixture
def clean(tmp_path): return folder(tmp_path/'동물')


def pictures(where): return sorted(where.iterdir())


def kinds(report, *levels): return {o.kind for o in report if not levels or o.level in levels}


def check(path, **kw): return check_data(path, show=False, **kw)


# --- pictures ---

@pytest.mark.parametrize('seed', range(4))
def test_nothing_is_said_about_clean_pictures(tmp_path, seed):
    rep = check(folder(tmp_path/'clean', seed=seed))
    assert rep.findings == []
    assert rep.facts['pictures'] == dict(train=42, valid=18)


def broken(root): pictures(root/'train/fox')[-1].write_bytes(b'no picture at all')
def zero(root): pictures(root/'train/fox')[0].write_bytes(b'')
def cut(root): (p := pictures(root/'train/fox')[0]).write_bytes(p.read_bytes()[:900])
def leak(root): shutil.copy(pictures(root/'train/fox')[0], root/'valid/fox/again.png')
def twice(root): shutil.copy(pictures(root/'train/fox')[0], root/'train/fox/again.png')
def two_labels(root): shutil.copy(pictures(root/'train/fox')[0], root/'train/고양이/again.png')
def brighter(root): ImageEnhance.Brightness(Image.open(pictures(root/'train/fox')[0])).enhance(1.1).save(root/'valid/fox/bright.png')
def saved_again(root): Image.open(pictures(root/'train/fox')[0]).save(root/'valid/fox/jpeg.jpg', quality=60)
def enlarged(root): Image.open(pictures(root/'train/fox')[0]).resize((96, 96)).save(root/'train/fox/large.png')
def icon(root): Image.new('RGB', (6, 6)).save(root/'train/fox/icon.png'); Image.fromarray(np.arange(108, dtype='uint8').reshape(6, 6, 3)).save(root/'train/fox/icon.png')
def ribbon(root): scene(np.random.default_rng(99)).resize((900, 30)).save(root/'train/fox/ribbon.png')
def blank(root): Image.new('RGB', (48, 48), 'navy').save(root/'train/fox/blank.png')
def unseen(root): (root/'valid/wolf').mkdir(); scene(np.random.default_rng(98)).save(root/'valid/wolf/1.png')
def gone(root): shutil.rmtree(root/'valid/fox')
def empty_class(root): (root/'train/bear').mkdir()
def unequal(root): [scene(np.random.default_rng(1000+i)).save(root/'train/고양이'/f'more{i}x.png') for i in range(60)]
def rare(root): [o.unlink() for o in pictures(root/'train/fox')[3:]]
def hidden(root): (root/'train/.old').mkdir(); scene(np.random.default_rng(97)).save(root/'train/.old/1.png')
def macosx(root): (root/'__MACOSX/train').mkdir(parents=True); (root/'__MACOSX/train/._1.png').write_bytes(b'x')
def loose(root): scene(np.random.default_rng(96)).save(root/'train/lost.png')
def notes(root): (root/'train/fox/notes.txt').write_text('x')
def phone(root): (root/'train/fox/1.heic').write_bytes(b'x')
def spelling(root): [(root/s/'Fox').mkdir(exist_ok=True) or scene(np.random.default_rng(k)).save(root/s/'Fox'/f'{i}.png') for s in ('train', 'valid') for i, k in enumerate(range(200 if s=='train' else 300, 206 if s=='train' else 306))]
def jamo(root): [(root/s/unicodedata.normalize('NFD', 'fox ')).mkdir() or [scene(np.random.default_rng(k+i)).save(root/s/'fox '/f'{i}.png') for i in range(6)] for s, k in (('train', 400), ('valid', 500))]
def patients(root): [scene(np.random.default_rng(600+10*i+j)).save(root/s/c/f'case{i:02}_{o}.png') for i in range(12) for c in ('fox', '고양이', '강아지') for j, (s, o) in enumerate((('train', 'a'), ('valid', 'b'))) if not _clear(root, i, c)]
def _clear(root, i, c): return i==0 and [o.unlink() for s in ('train', 'valid') for o in pictures(root/s/c) if not o.name.startswith('case')] and False
def twin_splits(root): (root/'val').mkdir()
def ink(root): scene(np.random.default_rng(95)).convert('CMYK').save(root/'train/fox/ink.jpg')
def moving(root): scene(np.random.default_rng(94)).convert('P').save(root/'train/fox/wave.gif', save_all=True, append_images=[scene(np.random.default_rng(93)).convert('P')])
def deep(root): Image.fromarray((np.random.default_rng(92).random((48, 48))*65535).astype('uint16')).save(root/'train/fox/deep.png')


FAULTS = [(broken, 'error', 'unreadable'), (zero, 'error', 'unreadable'), (cut, 'error', 'unreadable'), (leak, 'error', 'leak'), (twice, 'warning', 'duplicates'), (two_labels, 'error', 'contradiction'),
          (brighter, 'warning', 'look_alike_leak'), (saved_again, 'warning', 'look_alike_leak'), (enlarged, 'note', 'look_alikes'), (icon, 'warning', 'small'), (ribbon, 'warning', 'long'), (blank, 'warning', 'blank'),
          (unseen, 'error', 'unseen_class'), (gone, 'warning', 'missing_class'), (empty_class, 'warning', 'empty_class'), (unequal, 'warning', 'imbalance'), (rare, 'warning', 'rare_class'), (hidden, 'note', 'hidden'),
          (macosx, 'note', 'hidden'), (loose, 'warning', 'loose_files'), (notes, 'note', 'other_files'), (phone, 'warning', 'unread_pictures'), (spelling, 'warning', 'class_names'), (jamo, 'warning', 'class_names'),
          (patients, 'warning', 'group_leak'), (twin_splits, 'error', 'splits'), (ink, 'note', 'modes'), (deep, 'note', 'modes'), (moving, 'note', 'animated')]


@pytest.mark.parametrize('plant,level,kind', FAULTS, ids=[o[0].__name__ for o in FAULTS])
def test_each_fault_of_a_folder_is_found(clean, plant, level, kind):
    plant(clean)
    rep = check(clean)
    found = [o for o in rep if o.kind==kind]
    assert [o.level for o in found] == [level], str(rep)
    assert found[0].what and (found[0].advice or level=='note') and found[0].count >= 1
    if kind not in ('splits', 'imbalance'): assert found[0].examples
    json.loads(rep.to_json())


def test_all_faults_together_are_found_and_named(clean):
    for plant in (broken, leak, two_labels, brighter, icon, blank, unseen, empty_class, hidden, loose): plant(clean)
    rep = check(clean)
    assert kinds(rep) >= {'unreadable', 'leak', 'contradiction', 'look_alike_leak', 'small', 'blank', 'unseen_class', 'empty_class', 'hidden', 'loose_files'}
    assert rep.find('leak')[0].examples[0].startswith('train/fox/') and 'valid/fox/again.png' in rep.find('leak')[0].examples[0]
    assert not rep.ok and len(str(rep).splitlines()) < 75


def test_numbers_as_class_names(tmp_path):
    rep = check(folder(tmp_path/'d', [str(i) for i in range(1, 12)], 8, 3))
    assert kinds(rep) == {'label_order', 'label_shift'} and kinds(rep, 'error', 'warning') == set()
    assert check(folder(tmp_path/'e', [str(i) for i in range(3)])).findings == []


def test_one_class_is_no_classification(tmp_path): assert 'one_class' in kinds(check(folder(tmp_path/'d', ['pets'])), 'error')


def test_the_size_gives_the_class_away(tmp_path):
    root = folder(tmp_path/'d', train=12, valid=4)
    for o in root.glob('*/fox/*.png'): Image.open(o).resize((56, 48)).save(o)
    for o in root.glob('*/강아지/*.png'): Image.open(o).resize((60, 48)).save(o)
    assert kinds(check(root)) == {'shortcut'}


def test_groups_that_are_given(tmp_path):
    root = folder(tmp_path/'d', train=8, valid=4)
    for i, o in enumerate(sorted(root.rglob('*.png'))): o.rename(o.parent/f'{i%5}c{i}.png')
    assert kinds(check(root, group=r'(\d+)c\d+\.png')) == {'group_leak'}
    assert not check(root, group=r'(\d+)c\d+\.png').ok
    with pytest.raises(Exception, match='no pattern'): check(root, group='(')


def test_a_decompression_bomb_and_a_file_that_vanishes(clean, monkeypatch):
    import struct, zlib
    def part(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind+data))
    head = struct.pack('>IIBBBBB', 60000, 60000, 8, 2, 0, 0, 0)
    (clean/'train/fox/bomb.png').write_bytes(b'\x89PNG\r\n\x1a\n' + part(b'IHDR', head) + part(b'IDAT', zlib.compress(b'\0'*100)) + part(b'IEND', b''))
    from deep_studio_nb.data import picture_facts
    victim, look = pictures(clean/'valid/fox')[0], picture_facts.look_at
    def vanishing(path):
        if Path(path)==victim and victim.exists(): victim.unlink()
        return look(path)
    monkeypatch.setattr(picture_facts, 'look_at', vanishing)
    found = check(clean).find('unreadable')[0]
    assert found.count==2 and any('pixels' in o for o in found.examples) and any('no such file' in o for o in found.examples)


def test_ways_to_the_same_report(clean):
    "A path, a dataset, a loader and a list of images say the same."
    leak(clean)
    rows = [dict(file=str(o.relative_to(clean)), kind=o.parent.name, part=o.parent.parent.name) for o in clean.rglob('*.png')]
    pd.DataFrame(rows).to_csv(clean/'list.csv', index=False)
    reports = [check(clean), ImageFolder(clean).report(show=False), DataLoader(ImageFolder(clean)).report(show=False), check(clean/'list.csv', split_column='part', target='kind'),
               ImageList(clean/'list.csv', path='file', target='kind', split_column='part').report(show=False)]
    for o in reports:
        assert kinds(o, 'error', 'warning') == {'leak'}, str(o)
        assert o.facts['pictures'] == dict(train=42, valid=19)


def test_the_second_look_is_remembered_and_a_changed_file_is_seen(clean, monkeypatch):
    old = time.time()-60
    for o in clean.rglob('*.png'): os.utime(o, (old, old))
    check(clean)
    from deep_studio_nb.data import picture_facts
    seen, look = [], picture_facts.look_at
    monkeypatch.setattr(picture_facts, 'look_at', lambda p: seen.append(p) or look(p))
    assert check(clean).findings == [] and not seen
    broken(clean)
    assert kinds(check(clean)) == {'unreadable'} and len(seen)==1


def test_masks_and_pairs(tmp_path):
    rng = np.random.default_rng(0)
    for side in ('images', 'masks'): (tmp_path/side).mkdir()
    for i in range(6):
        scene(rng).save(tmp_path/'images'/f'{i}.png')
        Image.fromarray((rng.random((48, 48))>.5).astype('uint8')).save(tmp_path/'masks'/f'{i}.png')
    assert kinds(check(tmp_path)) == {'paired_folders'}
    (tmp_path/'masks/0.png').unlink()
    Image.new('L', (20, 20)).save(tmp_path/'masks/1.png')
    found = check(tmp_path).find('pairs')
    assert [o.level for o in found] == ['error'] and found[0].count==2 and '20x20' in str(found[0].examples)


# --- tables ---

def people(n=300, seed=0):
    rng = np.random.default_rng(seed)
    age = rng.integers(18, 80, n)
    return pd.DataFrame(dict(age=age, weight=rng.normal(70, 12, n).round(3), height=rng.normal(170, 9, n).round(3), city=rng.choice(['서울', '부산', '대구'], n), sick=np.where(age+rng.normal(0, 15, n)>50, 'yes', 'no')))


def written(tmp_path, frame, name='people.csv', **kw):
    frame.to_csv(tmp_path/name, index=False, **kw)
    return tmp_path/name


@pytest.mark.parametrize('seed', range(4))
def test_nothing_is_said_about_a_clean_table(tmp_path, seed):
    path = written(tmp_path, people(seed=seed))
    valid = written(tmp_path, people(80, seed+100), 'valid.csv')
    for o in (check(path, target='sick'), check(path, target='weight'), check(path), check(path, target='sick', valid_file=valid), TableData(path, 'sick', valid_file=valid).report()): assert o.findings == [], str(o)


def _set(frame, column, rows, value): frame[column] = frame[column].astype(object); frame.loc[rows, column] = value; return frame


TABLE_FAULTS = dict(
    gaps=(lambda f: _set(f, 'age', slice(0, 30), None), 'note', 'missing'),
    most=(lambda f: _set(f, 'age', slice(0, 200), None), 'warning', 'mostly_missing'),
    constant=(lambda f: f.assign(unit='kg'), 'warning', 'constant'),
    empty=(lambda f: f.assign(unit=''), 'warning', 'constant'),
    ids=(lambda f: f.assign(no=range(len(f))), 'note', 'id_like'),
    names=(lambda f: f.assign(key=[f'k{i:05}' for i in range(len(f))]), 'note', 'id_like'),
    copy=(lambda f: f.assign(code=f.sick.map(dict(yes='R17', no='Z00'))), 'error', 'target_leak'),
    knows=(lambda f: f.assign(ward=np.where(f.sick=='yes', f.age%3, 7)), 'error', 'target_leak'),
    score=(lambda f: f.assign(score=np.where(f.sick=='yes', 1, -1)*(f.weight+1)), 'error', 'target_leak'),
    mixed=(lambda f: _set(f, 'age', 7, '많음'), 'error', 'mixed_types'),
    stand_in=(lambda f: _set(f, 'weight', slice(0, 9), -999), 'warning', 'stand_in'),
    spelling=(lambda f: _set(f, 'city', 4, '서울 '), 'warning', 'category_names'),
    holes=(lambda f: _set(f, 'city', slice(0, 9), '미상'), 'note', 'holes'),
    outlier=(lambda f: _set(f, 'height', 5, 17300), 'note', 'outliers'),
    twice=(lambda f: pd.concat([f, f.iloc[[3]]]), 'warning', 'duplicates'),
    two_labels=(lambda f: pd.concat([f, f.iloc[[3]].assign(sick=dict(yes='no', no='yes')[f.sick[3]])]), 'warning', 'contradiction'),
    no_target=(lambda f: _set(f, 'sick', [3, 4], None), 'error', 'missing_target'),
    unequal=(lambda f: f[(f.sick=='yes') | (f.index%8==0)], 'warning', 'imbalance'),
    label_spelling=(lambda f: _set(f, 'sick', slice(0, 20), 'Yes'), 'warning', 'class_names'))


@pytest.mark.parametrize('fault', TABLE_FAULTS)
def test_each_fault_of_a_table_is_found(tmp_path, fault):
    plant, level, kind = TABLE_FAULTS[fault]
    rep = check(written(tmp_path, plant(people())), target='sick')
    found = [o for o in rep if o.kind==kind]
    assert found and {o.level for o in found} == {level}, str(rep)
    assert found[0].what and found[0].advice
    assert kinds(rep, 'error', 'warning') <= {kind, 'imbalance', 'duplicates'}, str(rep)


def test_faults_between_the_files_of_a_table(tmp_path):
    train = written(tmp_path, people())
    for frame, level, kind in ((pd.concat([people(60, 9), people().iloc[[5]]]), 'error', 'leak'), (people(60, 9).drop(columns='city'), 'error', 'columns'), (people(60, 9).assign(sick=lambda f: f.sick.where(f.index>9, 'maybe')), 'error', 'unseen_class'),
                               (_set(people(60, 9), 'age', 3, 'old'), 'error', 'other_type'), (_set(people(60, 9), 'city', 3, '제주'), 'note', 'unseen_category')):
        rep = check(train, target='sick', valid_file=written(tmp_path, frame, 'valid.csv'))
        assert level in {o.level for o in rep.find(kind)}, (kind, str(rep))


def test_groups_of_a_table(tmp_path):
    rep = check(written(tmp_path, people().assign(who=np.arange(300)//3, part=np.where(np.arange(300)%10<8, 'train', 'valid'))), target='sick', group='who', split_column='part')
    assert rep.find('group_leak')[0].level=='error'


@pytest.mark.parametrize('data,kind', [(b'a,a,b\n1,2,3\n4,5,6\n', 'file_header'), (b'a,b\n1,2\n1,2,3\n4,5\n', 'file_ragged'), ('a,b\n1,x\n'.encode() + b'2,\xff\xfe\xfa\n', 'file_encoding'), (b'a,b\n', 'file_empty'), (b'', 'file'), (b'\n\n', 'file'), (b'PK\x03\x04xxxx', 'file')])
def test_files_that_a_dataset_refuses(tmp_path, data, kind):
    (tmp_path/'bad.csv').write_bytes(data)
    rep = check(tmp_path/'bad.csv')
    assert kind in kinds(rep, 'error'), str(rep)


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'cp949', 'utf-16'])
def test_korean_files_of_any_encoding(tmp_path, encoding):
    path = written(tmp_path, people().rename(columns=dict(age='나이', sick='병')).map(lambda o: f'{o}\n"둘째, 줄"' if o=='서울' else o), '한글 표.csv', encoding=encoding)
    rep = check(path, target='병')
    assert rep.findings == [] and '한글 표.csv' in str(rep), str(rep)


def test_a_file_without_a_header(tmp_path):
    people().to_csv(tmp_path/'bare.csv', index=False, header=False)
    assert kinds(check(tmp_path/'bare.csv')) == {'no_header'}
    assert check(tmp_path/'bare.csv', header=False).findings == []


# --- texts ---

def reviews(n=120, seed=0):
    rng = np.random.default_rng(seed)
    words = '정말 재미있는 영화 지루한 배우 연기가 좋았다 별로였다 음악도 다시 보고 싶다 great film dull story actors music ending slow fine again'.split()
    return pd.DataFrame(dict(review=[' '.join(rng.choice(words, rng.integers(6, 14))) for _ in range(n)], mood=['good', 'bad']*(n//2)))


@pytest.mark.parametrize('seed', range(4))
def test_nothing_is_said_about_clean_texts(tmp_path, seed):
    path, valid = written(tmp_path, reviews(seed=seed), 'a.tsv', sep='\t'), written(tmp_path, reviews(40, seed+50), 'b.tsv', sep='\t')
    for o in (check(path), check(path, text='review', target='mood', valid_file=valid), TextFile(path, 'review', 'mood', valid_file=valid).report()): assert o.findings == [], str(o)
    assert 'text `review`' in check(path).facts['columns']


def _text(f, i, text): f.loc[i, 'review'] = text; return f


TEXT_FAULTS = dict(
    empty=(lambda f: _text(f, 3, None), 'warning', 'empty_text'),
    blanks=(lambda f: _text(f, 3, '  \u3000 '), 'warning', 'empty_text'),
    twice=(lambda f: pd.concat([f, f.iloc[[4]]]), 'warning', 'duplicates'),
    case=(lambda f: _text(f, 6, f.review[4].upper() + '  '), 'warning', 'duplicates'),
    jamo=(lambda f: _text(f, 6, unicodedata.normalize('NFD', f.review[4])), 'warning', 'duplicates'),
    two_labels=(lambda f: _text(f, 5, f.review[4]), 'warning', 'contradiction'),
    utf8_as_latin1=(lambda f: _text(f, 3, '정말 재미있다'.encode().decode('latin1')), 'warning', 'mojibake'),
    cp949_as_latin1=(lambda f: _text(f, 3, '정말 재미있다 안녕하세요'.encode('cp949').decode('latin1')), 'warning', 'mojibake'),
    quotes=(lambda f: _text(f, 3, 'it isnâ€™t so bad at all'), 'warning', 'mojibake'),
    replaced=(lambda f: _text(f, 3, 'half a \ufffd word'), 'warning', 'mojibake'),
    html=(lambda f: _text(f, 3, 'so bad<br /><br />never &amp; never'), 'note', 'markup'),
    long=(lambda f: _text(f, 3, 'again and again '*400), 'note', 'long_text'),
    no_label=(lambda f: f.assign(mood=f.mood.where(f.index!=3)), 'error', 'missing_target'),
    unequal=(lambda f: f[(f.mood=='good') | (f.index%10==1)], 'warning', 'imbalance'))


@pytest.mark.parametrize('fault', TEXT_FAULTS)
def test_each_fault_of_texts_is_found(tmp_path, fault):
    plant, level, kind = TEXT_FAULTS[fault]
    rep = check(written(tmp_path, plant(reviews()), 'a.tsv', sep='\t'), text='review', target='mood')
    assert [o.level for o in rep.find(kind)] == [level], str(rep)
    assert kinds(rep) == {kind}, str(rep)
    assert rep.find(kind)[0].advice


def test_texts_in_two_splits_and_unseen_labels(tmp_path):
    train, other = written(tmp_path, reviews(), 'train.tsv', sep='\t'), reviews(40, 7)
    other.loc[0, 'review'], other.loc[5, 'mood'] = reviews().review[0], 'so so'
    written(tmp_path, other, 'test.tsv', sep='\t')
    rep = check(tmp_path)   # the folder: its files are the splits
    assert kinds(rep, 'error') == {'leak', 'unseen_class'} and rep.facts['texts'] == dict(train=120, test=40)
    assert 'train.tsv:2' in rep.find('leak')[0].examples[0] and train.is_file()


# --- reports and the command ---

def studio(*words, capsys):
    with pytest.raises(SystemExit) as e: main(['data', *map(str, words)])
    out = capsys.readouterr()
    assert 'Traceback' not in out.out+out.err
    return e.value.code, out.out, out.err


def test_exit_codes(clean, capsys, tmp_path):
    assert studio('check', clean, '--strict', capsys=capsys)[0]==0
    leak(clean)
    assert studio('check', clean, capsys=capsys)[0]==0
    code, out, _ = studio('check', clean, '--strict', '--json', tmp_path/'보고.json', '--save', tmp_path/'out', capsys=capsys)
    assert code==1 and 'ERROR' in out and '1 picture is in more than one split' in out
    saved = json.loads((tmp_path/'보고.json').read_text(encoding='utf-8'))
    assert saved['errors']==1 and not saved['ok'] and saved['findings'][0]['kind']=='leak' and saved['table'][0]['class'] in ('fox', '강아지', '고양이')
    assert {'report.html', 'report.json', 'report.txt', 'samples by class.png'} <= {o.name for o in (tmp_path/'out').iterdir()}
    code, out, _ = studio('check', clean, '-q', capsys=capsys)
    assert code==0 and len(out.splitlines())==1 and '1 error' in out


def test_warnings_alone_are_no_failure(clean, capsys):
    twice(clean)
    assert studio('check', clean, '--strict', capsys=capsys)[0]==0


def test_paths_that_are_not_there_and_empty_ones(tmp_path, capsys):
    code, _, err = studio('check', tmp_path/'nowhere', capsys=capsys)
    assert code==1 and 'is not there' in err
    (tmp_path/'empty').mkdir()
    code, out, _ = studio('check', tmp_path/'empty', capsys=capsys)
    assert code==0 and 'There are no pictures here' in out
    assert studio('check', tmp_path/'empty', '--strict', capsys=capsys)[0]==1
    (tmp_path/'a.zip').write_bytes(b'x')
    code, _, err = studio('check', tmp_path/'a.zip', capsys=capsys)
    assert code==1 and 'no data that can be checked' in err
    code, _, err = studio('check', written(tmp_path, people()), '--target', 'sik', capsys=capsys)
    assert code==1 and 'no column `sik`' in err
    assert studio('check', capsys=capsys)[0]==2


def test_a_config_is_checked_even_when_its_dataset_refuses(clean, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = dict(name='a', dataset=dict(type='ImageFolder', args=dict(data_dir=str(clean))), data_loader=dict(type='DataLoader', args={}), arch='MLP', loss='cross_entropy', optimizer='AdamW', trainer=dict(epochs=1))
    Path('run.json').write_text(json.dumps(cfg, ensure_ascii=False), encoding='utf-8')
    code, out, _ = studio('check', 'run.json', '--strict', capsys=capsys)
    assert code==0 and 'train 42, valid 18' in out
    (clean/'val').mkdir()   # two folders for validation: refused
    code, out, _ = studio('check', 'run.json', '--strict', capsys=capsys)
    assert code==1 and 'two folders for the valid split' in out


def test_a_label_is_corrected_and_the_report_is_content(clean, capsys):
    two_labels(clean)
    name = check(clean).find('contradiction')[0].examples[0]
    assert 'again.png' in name
    assert studio('drop', clean, 'train/고양이/again.png', '--copies', 'this', '--note', '여우다', capsys=capsys)[0]==0
    assert kinds(ImageFolder(clean).report(show=False)) == set()
    assert studio('undo', clean, capsys=capsys)[0]==0
    assert 'contradiction' in kinds(ImageFolder(clean).report(show=False))
    assert studio('relabel', clean, 'train/고양이/again.png', 'foks', capsys=capsys)[0]==1


@pytest.mark.skipif(os.name!='posix', reason='signals')
def test_ctrl_c_stops_a_check_without_harm(clean, tmp_path):
    "Reading is slow here, so that the signal comes in the middle; the next check is whole."
    slow = ('import sys, time\nfrom deep_studio_nb.data import picture_facts as p\nlook = p.look_at\n'
            'def slowly(path):\n    print("reading", flush=True)\n    time.sleep(.2)\n    return look(path)\np.look_at = slowly\n'
            'from deep_studio_nb.cli import main\nmain(sys.argv[1:])')
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    run = subprocess.Popen([sys.executable, '-c', slow, 'data', 'check', str(clean)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout.readline().startswith('reading')      # several threads read
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode==130 and 'Stopped' in err and 'Traceback' not in err, err
    assert check(clean).findings == []


def test_ten_thousand_thumbs_are_compared():
    from deep_studio_nb.data.duplicates import look_alikes
    rng = np.random.default_rng(0)
    thumbs = rng.integers(0, 256, (10_000, 16, 16, 3), dtype=np.uint8)
    thumbs[9_000:9_010] = (thumbs[:10]*0.95).astype('uint8')
    assert {o[:2] for o in look_alikes(thumbs)} == {(i, 9_000+i) for i in range(10)}
