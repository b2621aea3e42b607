"""Folds that are killed, stopped, resumed by hand, moved and misused: every sample is predicted once, as if nothing had happened."""
import csv, gc, json, multiprocessing as mp, os, shutil, signal, sys
from collections import Counter
from pathlib import Path
import pytest
import torch
from PIL import Image
from deep_studio_nb.common.errors import ConfigError, DataError, RunError
from deep_studio_nb.data.split_files import load_split
from deep_studio_nb.experiments import kfold as kfold_module, recorder, scoring
from deep_studio_nb.experiments.experiment import Experiment
from deep_studio_nb.experiments.fold_views import FoldLines
from deep_studio_nb.experiments.kfold import kfold
from deep_studio_nb.experiments.run_folder import RunFolder
from deep_studio_nb.training.checkpoints import load_checkpoint

posix = pytest.mark.skipif(os.name!='posix', reason='SIGKILL')
PARTS = '''
import os
import torch
from deep_studio_nb.common.registry import CALLBACKS, DATASETS
from deep_studio_nb.data.tensors import Tensors
from deep_studio_nb.training.events import Callback

@DATASETS.register
class FoldDigits(Tensors):
    "The first handwritten digits, written by twenty people in turn."
    def __init__(self, n=120, width=0):
        from sklearn.datasets import load_digits
        x, y = load_digits(return_X_y=True)
        x = torch.tensor(x[:n], dtype=torch.float32)/16
        super().__init__(torch.cat([x, torch.zeros(n, width)], 1), torch.tensor(y[:n]).long(), [str(o) for o in range(10)])
    def column(self, name):
        if name=='writer': return [i*7%20 for i in range(len(self))]
        if name=='day': return [i//4 for i in range(len(self))]
        return super().column(name)

@CALLBACKS.register
class TripsInFold(Callback):
    "Fail in the second epoch of fold 1, as long as there is a file `trip`."
    def after_epoch(self, trainer):
        if os.path.exists('trip') and trainer.epoch==2 and trainer.meta['config']['name']=='fold-1': raise RuntimeError('tripped')
'''
CONFIG = dict(name='digits', seed=0, imports=['fold_parts'], dataset='FoldDigits', data_loader=dict(type='DataLoader', args=dict(batch_size=16, validation_split=0.25, test_split=20)),
              arch=dict(type='MLP', args=dict(hidden=[12], dropout=0.2)), loss='cross_entropy', metrics=['accuracy'], optimizer=dict(type='AdamW', args=dict(lr=0.02)),
              trainer=dict(epochs=3, monitor='min val_loss', threads=1, save_period=0, verbosity=0), device='cpu')

def draw_nothing():
    "Pictures take most of the time of a run as small as these."
    for o in (recorder, scoring, kfold_module): o.save_picture = lambda fig, path: path

@pytest.fixture
def pictures(monkeypatch):
    for o in (recorder, scoring, kfold_module): monkeypatch.setattr(o, 'save_picture', o.save_picture)

@pytest.fixture
def place(tmp_path, monkeypatch, pictures):
    "A folder with a config and what it imports."
    draw_nothing()
    (tmp_path/'fold_parts.py').write_text(PARTS)
    (tmp_path/'digits.json').write_text(json.dumps(CONFIG))
    monkeypatch.delitem(sys.modules, 'fold_parts', raising=False)      # that of another test
    monkeypatch.chdir(tmp_path)
    return tmp_path

def folds(*words, **options): return kfold('digits.json', *words, **dict(folds=3)|options)

def rows_of(found): return list(csv.DictReader(open(found.folder/'out_of_fold.csv', encoding='utf-8-sig')))

def weights(path): return load_checkpoint(Path(path)/'checkpoints'/'best_model.pt')['model']

def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def numbers(run): return [{k: o for k,o in row.items() if k!='seconds'} for row in csv.DictReader(open(Path(run)/'metrics.csv', encoding='utf-8-sig'))]

# --- who is held out ---

def test_every_sample_is_predicted_once(place):
    "By the model of the fold in which it was held out, and the test part by all of them together."
    found = folds()
    rows, held = rows_of(found), {str(i) for i in found.plan.made.held['test']}
    assert sorted(int(o['id']) for o in rows)==sorted({*range(120)}-set(map(int, held)))
    saved = load_split(found.plan.file).rows
    assert all(o['id'] in saved[int(o['fold'])]['valid'] for o in rows)
    for k in range(3):
        ev = found.held_out()[k]
        mine = {o['id']: o for o in rows if o['fold']==str(k)}
        assert [mine[i]['prediction'] for i in ev.ids]==[o['prediction'] for o in ev.rows()]
    assert {o['id'] for o in csv.DictReader(open(found.folder/'ensemble_test.csv', encoding='utf-8-sig'))}==held
    assert all(abs(sum(float(o[f'p({c})']) for c in range(10))-1)<1e-4 for o in rows)
    kept = json.loads((found.folder/'summary.json').read_text())
    assert kept['out_of_fold']['samples']==100 and kept['out_of_fold']['missing']==0
    assert kept['out_of_fold']['accuracy']['value']==pytest.approx(sum(o['correct']=='True' for o in rows)/100)
    assert kept['spread']['val_accuracy']['mean']==pytest.approx(sum(o['val_accuracy'] for o in kept['runs'])/3)

def test_classes_keep_their_proportions(place):
    found = folds(name='kept')
    y = found.plan.made.dataset.targets()
    counts = [Counter(y[found.plan.made.parts(k)['valid']].tolist()) for k in range(3)]
    for c in range(10): assert max(o[c] for o in counts)-min(o[c] for o in counts)<=1
    assert found.plan.how['by']=='stratified'

def test_groups_never_straddle(place):
    "Neither those of the option, nor those that the config keeps together."
    options, config = folds(groups='writer', name='a'), folds('data_loader.args.groups=writer', name='b')
    assert options.plan.made.blocks==config.plan.made.blocks
    writers = options.plan.made.dataset.column('writer')
    for k in range(3):
        parts = [{writers[i] for i in o} for o in options.plan.made.parts(k).values()]
        assert not parts[0]&parts[1] and not parts[0]&parts[2] and not parts[1]&parts[2]
    assert {o['group'] for o in rows_of(options)}=={str(writers[int(o['id'])]) for o in rows_of(options)}
    assert options.scores['accuracy'].n==len({o['group'] for o in rows_of(options)})       # drawn by writer

def test_repeats_average_other_folds(place):
    found = folds(folds=2, repeats=3)
    rows = rows_of(found)
    assert len(found.runs)==6 and len(rows)==100
    assert all([int(f)//2 for f in o['fold'].split()]==[0, 1, 2] for o in rows)
    parts, one = found.held_out(), rows[0]
    each = [ev.preds[ev.ids.index(one['id'])].softmax(0) for k,ev in parts.items() if one['id'] in ev.ids]
    assert float(one['p(3)'])==pytest.approx(sum(o[3].item() for o in each)/3, abs=1e-5)

def test_in_order_of_time(place):
    "Each fold is trained on what came before it; the first samples are in no fold."
    found = folds(times='day', folds=3)
    for k in range(3):
        o = found.plan.made.parts(k)
        assert max(o['train'])<min(o['valid'])<=max(o['valid'])<min(o['test'])
    assert len(rows_of(found))==100-len(found.plan.made.blocks[0][0]) and not found.out_of_fold.missing

# --- ordinary runs ---

def test_a_fold_is_what_train_makes_of_its_config(place):
    "Bit for bit, by its config alone."
    found = folds()
    for k in (0, 2):
        alone = Experiment(found.folder/f'fold-{k}'/'config.yaml', 'trainer.save_dir=alone')
        alone.fit()
        assert same(weights(alone.folder.path), weights(found.folder/f'fold-{k}'))
        assert numbers(alone.folder.path)==numbers(found.folder/f'fold-{k}')
        test = [(o/'predictions'/'test.csv').read_bytes() for o in (alone.folder.path, found.folder/f'fold-{k}')]
        assert test[0]==test[1]

def test_processes_give_the_same(place):
    found, beside = folds(folds=3), folds(folds=3, jobs=2, name='beside')
    assert (found.folder/'out_of_fold.csv').read_bytes()==(beside.folder/'out_of_fold.csv').read_bytes()
    assert 'epoch' in (beside.folder/'logs'/'fold-2.log').read_text()

# --- children that die ---

def arrange(kind, number):
    "Let this process die in a step of training, or when a file is written; or press Ctrl-C in it."
    from deep_studio_nb.experiments import fold_runs
    from deep_studio_nb.training.trainer import Trainer
    count, call, keep = [0], Trainer._call, fold_runs.keep_held_out
    now = lambda: os.kill(os.getpid(), signal.SIGINT if kind=='interrupted' else signal.SIGKILL)
    def counted():
        count[0] += 1
        if count[0]==number: now()
    def called(self, event):
        call(self, event)
        if event=='after_batch': counted()
    def kept(*args):
        counted()
        return keep(*args)
    if kind=='predictions': fold_runs.keep_held_out = kept
    else: Trainer._call = called

def child(folder, death, options):
    torch.set_num_threads(1)
    mp.set_start_method(None, force=True)
    os.chdir(folder)
    draw_nothing()
    if death: arrange(*death)
    sys.exit(130 if folds(**options).stopped else 0)

def ended(folder, death=None, **options):
    "How a child ends, forked from a server that has the libraries loaded."
    ctx = mp.get_context('forkserver')
    p = ctx.Process(target=child, args=(folder, death, options))
    p.start()
    p.join(120)
    assert p.exitcode is not None, 'the child does not end'
    return p.exitcode

STEPS = 3*5                # of a fold: three epochs of 66 or 67 samples in batches of 16

@posix
def test_killed_and_gone_on(place):
    "In the middle of the second fold, before its predictions are written, and in the third: the same command ends with the same table."
    for death in (('step', STEPS+7), ('predictions', 1), ('step', 8)): assert ended(place, death, name='killed')==-signal.SIGKILL
    assert ended(place, name='killed')==0
    whole, killed = folds(name='whole'), folds(name='killed')
    assert (whole.folder/'out_of_fold.csv').read_bytes()==(killed.folder/'out_of_fold.csv').read_bytes()
    assert sorted(o.name for o in killed.folder.glob('fold-*'))==[f'fold-{k}' for k in range(3)]
    for k in range(3): assert same(weights(whole.folder/f'fold-{k}'), weights(killed.folder/f'fold-{k}'))

@posix
def test_a_fold_is_resumed_by_itself(place):
    "After Ctrl-C the fold at work is resumed like any run; the command then has one fold less to train."
    assert ended(place, ('interrupted', STEPS+7), name='stopped')==130
    runs = {k: Path(f'experiments/stopped/fold-{k}') for k in range(3)}
    assert [o.exists() for o in runs.values()]==[True, True, False]
    assert RunFolder(runs[1]).status()=='stopped'
    Experiment.resume(runs[1]).fit()
    before = RunFolder(runs[1]).read()['ended']
    found, whole = folds(name='stopped'), folds(name='whole')
    assert RunFolder(runs[1]).read()['ended']==before
    assert (whole.folder/'out_of_fold.csv').read_bytes()==(found.folder/'out_of_fold.csv').read_bytes()

# --- folders that were touched ---

def test_a_deleted_fold_is_trained_again(place):
    found = folds()
    table, started = (found.folder/'out_of_fold.csv').read_bytes(), [o.read()['started'] for o in found.runs]
    shutil.rmtree(found.folder/'fold-2')
    again = folds()
    assert (again.folder/'out_of_fold.csv').read_bytes()==table
    assert [a==b for a,b in zip(started, [o.read()['started'] for o in again.runs])]==[True, True, False]

def test_the_folder_was_moved(place):
    "Under another name, with the predictions of one fold gone: nothing is trained, and the ensemble is still there."
    found = folds()
    table, test, started = (found.folder/'out_of_fold.csv').read_bytes(), found.test.preds, [o.read()['started'] for o in found.runs]
    os.rename(found.folder, 'experiments/moved')
    (Path('experiments/moved/fold-1')/'predictions'/'held_out.pt').unlink()
    moved = folds(name='moved')
    assert (moved.folder/'out_of_fold.csv').read_bytes()==table
    assert torch.equal(moved.test.preds, test)
    assert [o.read()['started'] for o in moved.runs]==started and len(list(moved.folder.glob('fold-*')))==3

def test_a_damaged_fold_is_no_obstacle(place):
    "A manifest that nobody can read is left alone, and the fold gets another folder."
    found = folds(folds=2)
    table = (found.folder/'out_of_fold.csv').read_bytes()
    (found.folder/'fold-0'/'manifest.json').write_text('{"half')
    again = folds(folds=2)
    assert (again.folder/'out_of_fold.csv').read_bytes()==table
    assert [o.name for o in again.runs]==['fold-0-2', 'fold-1']

def test_two_at_once(place):
    found = folds(folds=2)
    with RunFolder(found.folder).claimed(), pytest.raises(RunError, match='another process'): folds(folds=2)

# --- what goes wrong ---

@pytest.mark.parametrize('jobs', [1, 2])
def test_a_failed_fold_leaves_the_others(place, jobs, capsys):
    Path('trip').touch()
    found = folds('callbacks=[TripsInFold]', folds=3, jobs=jobs)
    assert [o['status'] for o in found.table()]==['finished', 'failed', 'finished']
    assert found.table()[1]['note']=='RuntimeError: tripped'
    assert 'fold 1 failed: RuntimeError: tripped' in capsys.readouterr().out
    assert 'after_epoch' in (found.folder/'logs'/'fold-1.log').read_text()
    assert len(found.out_of_fold)+len(found.out_of_fold.missing)==100 and found.out_of_fold.missing
    assert 'the same command tries' in found.summary()
    Path('trip').unlink()
    mended, whole = folds('callbacks=[TripsInFold]', folds=3), folds('callbacks=[TripsInFold]', folds=3, name='whole')
    assert (mended.folder/'out_of_fold.csv').read_bytes()==(whole.folder/'out_of_fold.csv').read_bytes()
    assert RunFolder(mended.folder/'fold-1').status()=='finished'

@pytest.mark.parametrize('options, words', [
    (dict(folds=101), 'more than there are samples (100)'), (dict(folds=101, by='random'), 'more than there are samples (100)'), (dict(folds=14), 'every fold needs one of each class'),
    (dict(folds=30, groups='writer'), 'more than there are groups'), (dict(folds=1), '`folds` is 1, wanted a whole number, 2 or more'), (dict(repeats=0), '`repeats` is 0'), (dict(folds=2.5), '`folds` is 2.5'),
    (dict(by='group'), '`groups` is not given'), (dict(by='tmie'), 'did you mean `time`?'), (dict(times='day', repeats=2), 'only one way'), (dict(how='meen'), 'did you mean `mean`?'), (dict(groups='(x'), 'no regular expression')])
def test_what_cannot_be_divided(place, options, words):
    with pytest.raises((ConfigError, DataError)) as e: folds(**options)
    assert words in str(e.value)
    assert not Path('experiments').exists()

@pytest.mark.parametrize('change, words', [
    ('data_loader.args.split=splits/a.json', 'says already who is held out'), ('data_loader.args.fold=1', '`fold: 1`'), ('trainer.fast_dev_run=true', 'keeps nothing'), ('trainer.epoch=3', 'did you mean')])
def test_configs_that_cannot_be_folded(place, change, words):
    with pytest.raises(ConfigError) as e: folds(change)
    assert words in str(e.value)
    assert not Path('experiments').exists()

def test_something_else_under_the_same_name(place, capsys):
    folds(folds=2)
    assert '`validation_split: 0.25` is not used' in capsys.readouterr().out
    with pytest.raises(RunError, match='folds: 2 then, 3 now'): folds(folds=3)
    with pytest.raises(RunError, match='trainer.epochs: 3 then, 9 now'): folds('trainer.epochs=9', folds=2)
    with pytest.raises(RunError, match='samples: 120 then, 130 now'): folds('dataset={type: FoldDigits, args: {n: 130}}', folds=2)
    with pytest.raises(RunError, match='is the folder of a run'): kfold('digits.json', 'trainer.save_dir=experiments/digits-kfold', name='fold-0')

# --- other kinds of data ---

def test_a_table_with_near_names(place):
    "Numbers to predict from rows, groups by a column, and a column that is misspelt."
    g = torch.Generator().manual_seed(0)
    lines = [f'{r},{a:.3f},{["old","new"][r%2]},{3*a+r%2:.3f}' for r,a in enumerate(torch.randn(60, generator=g).tolist())]
    Path('houses.csv').write_text('\n'.join(['street,size,kind,price', *(f'{int(o.split(",")[0])%9},' + o.partition(',')[2] for o in lines)]))
    data = dict(CONFIG, name='houses', imports=[], dataset=dict(type='Table', args=dict(file='houses.csv', target='price', drop=['street'])), loss='mse_loss', metrics=['mae'], data_loader=dict(type='DataLoader', args=dict(batch_size=16)))
    found = kfold(data, folds=3, groups='street')
    rows = rows_of(found)
    assert len(rows)==60 and list(rows[0])==['id', 'fold', 'group', 'target', 'prediction', 'error']
    assert len({(o['group'], o['fold']) for o in rows})==9
    assert found.test is None and found.scores['mae'].value==pytest.approx(sum(abs(float(o['error'])) for o in rows)/60, rel=1e-4)
    with pytest.raises(DataError, match='did you mean `street`'): kfold(data, folds=3, groups='stret', name='b')
    with pytest.raises(DataError, match='no classes'): kfold(data, folds=3, stratify=True, name='b')

def test_images_and_their_folders(place):
    "Photos with a test folder of their own, which no fold sees; and a validation folder, which takes no part."
    for part,n in (('train', 12), ('valid', 2), ('test', 4)):
        for c,name in enumerate(('고양이', '개')):
            Path(f'photos/{part}/{name}').mkdir(parents=True)
            for i in range(n): Image.new('RGB', (8, 8), (90+100*c, 10*i, 40)).save(f'photos/{part}/{name}/{i}.png')
    data = dict(CONFIG, name='photos', imports=[], dataset=dict(type='ImageFolder', args=dict(data_dir='photos')), data_loader=dict(type='DataLoader', args=dict(batch_size=8)))
    found = kfold(data, folds=3)
    assert 'validation samples that the data comes with take no part' in found.plan.notes[0]
    assert sorted(o['id'] for o in rows_of(found))==sorted(found.plan.made.dataset.sample_id(i) for i in range(24))
    assert len(found.test)==8 and all(len(o)==8 for o in found.held_out().values())

def test_texts(place):
    lines = [f'{"good great fine" if i%3 else "bad poor sad"} film {i},{int(bool(i%3))}' for i in range(36)]
    Path('films.csv').write_text('\n'.join(['text,label', *lines]))
    data = dict(CONFIG, name='films', imports=[], dataset=dict(type='TextFile', args=dict(file='films.csv', text='text', target='label')), arch='BagOfWords', data_loader=dict(type='DataLoader', args=dict(batch_size=8, validation_split=0.1)))
    found = kfold(data, folds=3)
    assert len(rows_of(found))==36
    assert [sum(o['target']=='0' for o in rows_of(found) if o['fold']==str(k)) for k in range(3)]==[4, 4, 4]

# --- memory ---

def resident(): return int(Path('/proc/self/statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE')/2**20

class Weigher(FoldLines):
    "Note the memory of this process after each fold."
    seen = ()
    def over(self, rows):
        gc.collect()
        self.seen = [*self.seen, resident()]

def weigh(folder, queue):
    torch.set_num_threads(1)
    mp.set_start_method(None, force=True)
    os.chdir(folder)
    draw_nothing()
    from deep_studio_nb.experiments.cross_validation import CrossValidation
    from deep_studio_nb.experiments.fold_plan import plan_folds
    view = Weigher(open(os.devnull, 'w'))
    CrossValidation(plan_folds('digits.json', 'dataset={type: FoldDigits, args: {n: 1000, width: 10000}}', 'trainer.epochs=1', 'data_loader.args.batch_size=128', folds=6)).train(view=view)
    queue.put(view.seen)

@pytest.mark.skipif(sys.platform!='linux', reason='/proc')
def test_memory_is_flat_over_folds(place):
    "A dataset of 40 MB is read anew for each fold, and let go."
    ctx = mp.get_context('forkserver')
    queue = ctx.Queue()
    p = ctx.Process(target=weigh, args=(place, queue))
    p.start()
    seen = queue.get(timeout=120)      # at the beginning, after each of six folds, at the end
    p.join(60)
    assert len(seen)==8 and seen[6]-seen[2]<40, seen      # less than one dataset in four folds; what the C library keeps comes and goes
