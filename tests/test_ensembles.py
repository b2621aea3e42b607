"Ensembles: arithmetic against brute force, weights, members that do not fit, samples that were seen, memory."
import json, os, random, shutil, subprocess, sys, textwrap, weakref
from itertools import permutations
from pathlib import Path
import pytest
import torch
import torch.nn.functional as F
from toy_data import write_masks
from deep_studio_nb.common.errors import CheckpointError, DataError, RunError
from deep_studio_nb.data.digits import Digits
from deep_studio_nb.data.folds import folds
from deep_studio_nb.evaluation.averages import AVERAGED, Average
from deep_studio_nb.evaluation.ensembles import HOWS, check_weights, combine, fit_weights, score_weights
from deep_studio_nb.experiments import ensemble, members
from deep_studio_nb.experiments.ensemble import Ensemble
from deep_studio_nb.experiments.experiment import Experiment
from deep_studio_nb.experiments.trained import load_trained

SHAPES = dict(classes=(5, 3), labels=(5, 3), mask=(2, 3, 4, 4), number=(5, 1), image=(2, 1, 4, 4))
MEANING = dict(classes=lambda o: o.softmax(1), labels=lambda o: o.sigmoid(), mask=lambda o: o.softmax(1), number=lambda o: o, image=lambda o: o)

def outputs(task, m=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [3*torch.randn(SHAPES[task], generator=g) for _ in range(m)]

# --- arithmetic ---

@pytest.mark.parametrize('task', AVERAGED)
def test_the_mean_is_that_of_what_the_outputs_mean(task):
    preds, w = outputs(task), [0.5, 0.2, 0.3]
    torch.testing.assert_close(MEANING[task](combine(preds, 'mean', task)), torch.stack([MEANING[task](o) for o in preds]).mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(MEANING[task](combine(preds, 'weighted', task, w)), sum(a*MEANING[task](o) for a,o in zip(w, preds)), atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize('task', AVERAGED)
@pytest.mark.parametrize('how', HOWS)
def test_one_is_itself_and_order_does_not_matter(task, how):
    if how=='vote' and task in ('number', 'image'): return
    preds, w = outputs(task), [0.5, 0.2, 0.3] if how!='mean' else None
    assert torch.equal(combine(preds[:1], how, task, w and [1]), preds[0])
    for p in permutations(range(3)):
        torch.testing.assert_close(combine([preds[i] for i in p], how, task, w and [w[i] for i in p]), combine(preds, how, task, w), atol=1e-4, rtol=1e-4)

@pytest.mark.parametrize('task', AVERAGED)
def test_weights_are_shares(task):
    "Only their proportions count, a weight of 0 is as if the member were not there, and equal ones are the mean."
    preds, same = outputs(task), MEANING[task]
    close = lambda a, b: torch.testing.assert_close(same(a), same(b), atol=1e-5, rtol=1e-4)
    close(combine(preds, 'weighted', task, [2, 4, 6]), combine(preds, 'weighted', task, [1, 2, 3]))
    close(combine(preds, 'weighted', task, [7, 7, 7]), combine(preds, 'mean', task))
    close(combine(preds, 'weighted', task, [1, 0, 1]), combine([preds[0], preds[2]], 'mean', task))
    close(combine([preds[0]]*3, 'mean', task), preds[0])

@pytest.mark.parametrize('m', [2, 3, 4, 7])
@pytest.mark.parametrize('weighted', [False, True])
def test_a_vote_is_the_majority_and_draws_go_to_the_surer(m, weighted):
    rng = random.Random(m)
    preds = [torch.randn(200, 4, generator=torch.Generator().manual_seed(10*m+i)) for i in range(m)]
    w = [rng.choice([1, 2, 3]) for _ in range(m)] if weighted else [1]*m
    p = torch.stack([o.softmax(1) for o in preds]).double()
    mean = (p*torch.tensor(w)[:, None, None]).sum(0)/sum(w)
    got = combine(preds, 'vote', 'classes', w if weighted else None)
    for i in range(200):
        votes = [sum(a for a,o in zip(w, preds) if o[i].argmax()==c) for c in range(4)]
        first = [c for c in range(4) if votes[c]==max(votes)]
        assert got[i].argmax()==max(first, key=lambda c: mean[i, c]), (votes, mean[i])
    torch.testing.assert_close(got.exp().sum(1), torch.ones(200))
    assert got.isfinite().all()

def test_votes_on_labels_and_pixels_are_those_of_each():
    for task in ('labels', 'mask'):
        preds = outputs(task, 5)
        got = combine(preds, 'vote', task)
        if task=='labels': assert torch.equal(got>0, sum((o>0).int() for o in preds)>=3)
        else:
            rows = [o.permute(0, 2, 3, 1).reshape(-1, 3) for o in preds]
            assert torch.equal(got.argmax(1).flatten(), combine(rows, 'vote').argmax(1))

def test_sure_models_keep_a_finite_loss():
    sure = torch.tensor([[300., 0., 0.], [0., 300., 0.]])
    y = torch.tensor([1, 1])
    for how in ('mean', 'vote'): assert F.cross_entropy(combine([sure, sure+1], how), y).isfinite()
    big = torch.tensor([[200., -200.]])
    torch.testing.assert_close(combine([big, big], 'mean', 'labels'), big)

def test_half_precision_is_averaged_in_full():
    a, b = outputs('classes', 2)
    assert combine([a.half(), b.half()]).dtype==torch.float32
    torch.testing.assert_close(combine([a.bfloat16(), b.bfloat16()]).exp(), combine([a, b]).exp(), atol=0.03, rtol=0.1)

def test_sums_need_one_answer_however_many_come():
    kept = []
    def many():
        for i in range(20):
            o = torch.randn(4, 3)
            kept.append(weakref.ref(o))
            assert sum(r() is not None for r in kept)<=3
            yield o
    combine(many())

def test_answers_are_not_written_into():
    for task in AVERAGED:
        preds = outputs(task)
        before = [o.clone() for o in preds]
        combine(preds, 'mean', task)
        for a,b in zip(preds, before): assert torch.equal(a, b)

# --- weights ---

@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('task', AVERAGED)
def test_fitted_weights_are_shares_and_no_worse_than_any_member(task, seed):
    preds, g = outputs(task, 4, seed), torch.Generator().manual_seed(seed+100)
    shape = SHAPES[task]
    y = torch.randint(0, 3, (shape[0], *shape[2:]), generator=g) if task in ('classes', 'mask') else (torch.rand(shape, generator=g)>0.5).float() if task=='labels' else torch.randn(shape, generator=g)
    loss = dict(classes=F.cross_entropy, mask=F.cross_entropy, labels=F.binary_cross_entropy_with_logits).get(task, F.mse_loss)
    w = fit_weights(preds, y, task)
    assert (w>=0).all() and w.sum().item()==pytest.approx(1, abs=1e-9) and torch.equal(w, fit_weights(preds, y, task))
    best = loss(combine(preds, 'weighted', task, w), y).item()
    for other in (*torch.eye(4), torch.full((4,), 0.25), torch.tensor([0.4, 0.3, 0.2, 0.1])): assert best<=loss(combine(preds, 'weighted', task, other), y).item()+1e-4

def test_unknown_pixels_do_not_count():
    preds, y = outputs('mask', 2), torch.randint(0, 3, (2, 4, 4))
    hidden = y.clone()
    hidden[:, 2:] = -100
    torch.testing.assert_close(fit_weights(preds, hidden, 'mask'), fit_weights([o[:, :, :2] for o in preds], y[:, :2], 'mask'), atol=1e-6, rtol=0)
    with pytest.raises(DataError, match='None of the targets is known'): fit_weights(preds, torch.full((2, 4, 4), -100), 'mask')

def test_scores_weigh_each_model_by_its_own_samples():
    good, bad = torch.tensor([[4., 0.]]), torch.tensor([[0., 4.]])
    w = score_weights([good, bad], [torch.tensor([0]), torch.tensor([0])])
    assert w[0]>0.9 and w.sum()==pytest.approx(1)

@pytest.mark.parametrize('weights, m, words', [([1], 2, '1 `weights` for 2 members'), ([1, -1], 2, 'at least 0'), ([0, 0], 2, 'not all 0'), ([float('inf'), 1], 2, 'at least 0'), ([], 0, 'at least one member')])
def test_bad_weights_are_refused(weights, m, words):
    with pytest.raises(DataError, match=words): check_weights(weights, m)

def test_predictions_that_do_not_go_together_are_refused():
    a, b = outputs('classes', 2)
    with pytest.raises(DataError, match=r'Answer 2 has the shape \(4, 3\)'): combine([a, b[:4]])
    with pytest.raises(DataError, match='one tensor'): combine([[a, b]])
    with pytest.raises(DataError, match='hardly ever the same number'): combine([a, b], 'vote', 'number')
    with pytest.raises(DataError, match='did you mean `classes`'): combine([a, b], 'mean', 'class')
    with pytest.raises(DataError, match='one of `mean`'): combine([a, b], 'best')
    with pytest.raises(DataError, match='Take "weighted"'): combine([a, b], 'mean', 'classes', [1, 2])
    with pytest.raises(DataError, match='no answer'): Average('mask').value()

# --- runs ---

def train(name, **parts):
    cfg = dict(dict(name=name, seed=0, data_loader=dict(type='DataLoader', args=dict(batch_size=64)), loss='cross_entropy', metrics=['accuracy'],
                    optimizer=dict(type='AdamW', args=dict(lr=0.01)), trainer=dict(epochs=1, save_dir='experiments')), **parts)
    exp = Experiment(cfg, device='cpu')
    exp.fit()
    return exp

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Three runs of digits, and two folds."
    folder, before = tmp_path_factory.mktemp('ensembles'), Path.cwd()
    os.chdir(folder)
    try:
        Digits('digits')
        data = dict(type='ImageFolder', args=dict(data_dir='digits'))
        for name,width,size in (('a', 8, 64), ('b', 12, 100), ('c', 16, 64)):
            train(name, dataset=data, arch=dict(type='MLP', args=dict(hidden=[width])), data_loader=dict(type='DataLoader', args=dict(batch_size=size)))
        folds(Digits('digits'), 2).save('two.json')
        for k in range(2): train(f'fold-{k}', dataset=data, arch=dict(type='MLP', args=dict(hidden=[16])), trainer=dict(epochs=1, save_dir='experiments/x-kfold'),
                                 data_loader=dict(type='DataLoader', args=dict(split='two.json', fold=k)))
    finally: os.chdir(before)
    return folder

@pytest.fixture
def here(home, monkeypatch):
    monkeypatch.chdir(home)
    return home

def test_an_ensemble_of_one_is_its_member(here):
    for how in HOWS:
        ev, own = Ensemble('a', how, device='cpu').evaluate('test'), load_trained('a', device='cpu').evaluate('test')
        assert torch.equal(ev.preds, own.preds) and ev.ids==own.ids and dict(ev.metrics)==pytest.approx(dict(own.metrics), abs=1e-6)
        assert [o['prediction'] for o in ev.rows()]==[o['prediction'] for o in own.rows()]

def test_members_with_other_batches_answer_the_same_samples(here):
    singles = {o: load_trained(o, device='cpu').evaluate('test') for o in 'abc'}
    for order in ('abc', 'cba', 'bca'):
        ev = Ensemble(list(order), device='cpu').evaluate('test')
        torch.testing.assert_close(ev.preds, combine([o.preds for o in singles.values()]), atol=1e-4, rtol=1e-4)
        assert ev.ids==singles['a'].ids and torch.equal(ev.targets, singles['a'].targets)
        assert ev.metrics['accuracy']==pytest.approx((ev.preds.argmax(1)==ev.targets).float().mean().item())
        assert ev.metrics['loss']==pytest.approx(F.cross_entropy(ev.preds, ev.targets).item(), abs=1e-4)

def test_runs_checkpoints_folders_and_models_may_be_mixed(here):
    some = Ensemble(['a', Path('experiments/b'), 'experiments/c/checkpoints/last.pt', load_trained('c', device='cpu'), 'x-kfold'], device='cpu')
    assert [o.run.name for o in some.members]==['a', 'b', 'c', 'c', 'fold-0', 'fold-1']
    assert len(some.evaluate('test'))==300

@pytest.mark.parametrize('members, words, kind', [([], 'at least one member', RunError), (['a', 'zzz'], '`zzz` is neither', RunError), (['a', 'a'], 'twice', RunError), ('nowhere', 'neither a run', RunError)])
def test_members_that_are_not_there_are_named(here, members, words, kind):
    with pytest.raises(kind, match=words): Ensemble(members)

def test_a_fold_that_has_not_been_trained_is_named(here, tmp_path):
    shutil.copytree('experiments/x-kfold', tmp_path/'y-kfold')
    shutil.rmtree(tmp_path/'y-kfold'/'fold-1'/'checkpoints')
    with pytest.raises(RunError, match='fold-1` has no checkpoint'): Ensemble(tmp_path/'y-kfold')

def test_a_damaged_member_is_named(here, tmp_path):
    shutil.copytree('experiments/a', tmp_path/'a')
    path = tmp_path/'a'/'checkpoints'/'best_model.pt'
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CheckpointError, match='best_model.pt'): Ensemble(['b', tmp_path/'a'])

def test_weights_and_ways_are_checked_at_once(here, monkeypatch):
    for args, words in ((('weighted', [1, 2, 3]), '3 `weights` for 2'), (('weighted', [1, -2]), 'at least 0'), (('mean', [1, 1]), 'Take "weighted"'), (('median',), 'one of `mean`')):
        with pytest.raises(DataError, match=words): Ensemble(['a', 'b'], *args, device='cpu')
    with pytest.raises(DataError, match='did you mean `flip`'): Ensemble(['a'], tta='flp', device='cpu')

def test_other_classes_and_tasks_are_refused(here):
    shutil.copytree('digits', 'fewer', dirs_exist_ok=True)
    for split in ('train', 'valid', 'test'): shutil.rmtree(f'fewer/{split}/9', ignore_errors=True)
    if not Path('experiments/nine').exists(): train('nine', dataset=dict(type='ImageFolder', args=dict(data_dir='fewer')), arch='MLP')
    with pytest.raises(RunError, match='`a` and `nine` cannot answer together: the classes of one are'): Ensemble(['a', 'nine'], device='cpu')
    Path('n.csv').write_text('x,y\n'+'\n'.join(f'{i%7},{3*(i%7)+1}' for i in range(60)))
    if not Path('experiments/price').exists(): train('price', dataset=dict(type='Table', args=dict(file='n.csv', target='y', numbers=['x'], task='number')), arch='MLP', loss='mse_loss', metrics=['mae'])
    with pytest.raises(RunError, match='cannot answer together'): Ensemble(['a', 'price'], device='cpu')
    with pytest.raises(DataError, match='Take the mean'): Ensemble('price', 'vote', device='cpu')

# --- samples that were seen ---

def test_folds_are_not_scored_on_what_they_learned(here):
    both = Ensemble('x-kfold', device='cpu')
    with pytest.raises(RunError, match='in the valid split of `fold-0` were training samples of `fold-1`'): both.evaluate('valid')
    with pytest.raises(RunError, match='not scored on training samples'): both.evaluate('train')
    single = [load_trained(f'experiments/x-kfold/fold-{k}', device='cpu').evaluate('test').preds for k in range(2)]
    torch.testing.assert_close(both.evaluate('test').preds, combine(single), atol=1e-5, rtol=1e-4)

def test_a_checkpoint_outside_its_run_is_known_too(here, tmp_path):
    shutil.copy('experiments/x-kfold/fold-1/checkpoints/best_model.pt', tmp_path/'alone.pt')
    both = Ensemble(['experiments/x-kfold/fold-0', tmp_path/'alone.pt'], device='cpu')
    with pytest.raises(RunError, match='training samples of `alone`'): both.evaluate('valid')
    assert len(both.evaluate('test'))==300

def test_the_split_of_the_folder_counts_not_what_the_data_would_give_now(here, tmp_path):
    "What a run was trained on is written in its folder."
    shutil.copytree('experiments/c', tmp_path/'c')
    kept = json.loads((tmp_path/'c'/'split.json').read_text())
    kept['parts']['train'] += load_trained('a', device='cpu').splits().ids('test')[:4]
    (tmp_path/'c'/'split.json').write_text(json.dumps(kept))
    both = Ensemble(['experiments/x-kfold/fold-0', tmp_path/'c'], device='cpu')
    both.members[1].config['dataset'] = dict(type='ImageFolder', args=dict(data_dir='./digits'))
    with pytest.raises(RunError, match='4 of 300 samples in the test split of `fold-0` were training samples of `c`'): both.evaluate('test')

# --- weights of runs ---

def test_weights_of_runs_come_from_what_they_held_out(here, caplog):
    some = Ensemble(['a', 'b', 'c'], 'weighted', device='cpu')
    valid = [load_trained(o, device='cpu').evaluate('valid') for o in 'abc']
    torch.testing.assert_close(torch.tensor(some.weights), fit_weights([o.preds for o in valid], valid[0].targets).float(), atol=1e-3, rtol=1e-3)
    assert sum(some.weights)==pytest.approx(1)
    some.evaluate('valid')
    assert 'somewhat too good' in caplog.text

def test_weights_of_folds_come_from_each_of_them(here):
    w = Ensemble('x-kfold', 'weighted', device='cpu').weights
    own = torch.tensor([-load_trained(f'experiments/x-kfold/fold-{k}', device='cpu').evaluate('valid').metrics['loss'] for k in range(2)]).exp()
    torch.testing.assert_close(torch.tensor(w), own/own.sum(), atol=1e-4, rtol=1e-4)

def test_given_weights_are_used(here):
    preds = [load_trained(o, device='cpu').evaluate('test').preds for o in 'ab']
    for how in ('weighted', 'vote'):
        torch.testing.assert_close(Ensemble(['a', 'b'], how, [3, 1], device='cpu').evaluate('test').preds, combine(preds, how, weights=[3, 1]), atol=1e-4, rtol=1e-4)

# --- memory ---

def test_one_model_at_a_time(here, monkeypatch):
    alive, load = weakref.WeakSet(), members.load_trained
    def watched(*args, **kw):
        assert not len(alive), 'another model is still there'
        res = load(*args, **kw)
        alive.add(res.model)
        return res
    monkeypatch.setattr(members, 'load_trained', watched)
    some = Ensemble(['a', 'b', 'c'], 'weighted', tta='flip', device='cpu')
    some.evaluate('test')
    some.predict_files(['digits/test/3'])
    Ensemble(['a', 'b', 'c'], 'weighted', device='cpu').predict_files(['digits/test/3'])   # weights are found first
    assert not len(alive)

def test_memory_does_not_grow_with_the_members(here):
    "The most that a process ever held, with 2 members and with 6, of 37 MB each."
    if sys.platform!='linux': pytest.skip('VmHWM is Linux')
    if not Path('experiments/large').exists():
        train('large', dataset=dict(type='ImageFolder', args=dict(data_dir='digits')), arch=dict(type='MLP', args=dict(hidden=[3000, 3000])), optimizer=dict(type='SGD', args=dict(lr=0.01)))
    for k in range(6):
        if not Path(f'experiments/many/{k}').exists(): shutil.copytree('experiments/large', f'experiments/many/{k}', copy_function=os.link)
    code = textwrap.dedent('''
        import sys
        from deep_studio_nb.experiments.ensemble import Ensemble
        ev = Ensemble([f'experiments/many/{k}' for k in range(int(sys.argv[1]))], device='cpu').evaluate('test')
        print(ev.metrics['accuracy'], next(o for o in open('/proc/self/status') if o.startswith('VmHWM')).split()[1])
    ''')
    got = {}
    for n in (2, 6):
        out = subprocess.run([sys.executable, '-c', code, str(n)], capture_output=True, text=True, check=True).stdout.split()[-2:]
        got[n] = float(out[0]), int(out[1])/1024
    assert got[2][0]==got[6][0]
    assert got[6][1]-got[2][1]<30, got

# --- masks and tables ---

@pytest.fixture(scope='module')
def masks(tmp_path_factory):
    "Two runs that find the bright part of pictures, one of them from grey ones."
    folder, before = tmp_path_factory.mktemp('masks'), Path.cwd()
    write_masks(folder/'data', train=6, test=5)
    os.chdir(folder)
    try:
        for name,mode in (('colour', 'RGB'), ('grey', 'L')):
            train(name, dataset=dict(type='ImageMasks', args=dict(data_dir='data', classes=['dark', 'bright'], mode=mode)), arch=dict(type='UNet', args=dict(width=4, depth=2)),
                  metrics=['dice'], data_loader=dict(type='DataLoader', args=dict(batch_size=2)))
    finally: os.chdir(before)
    return folder

@pytest.mark.parametrize('room', [1, 10**9])
@pytest.mark.parametrize('how', ['mean', 'vote'])
def test_masks_are_put_together_stretch_by_stretch(masks, monkeypatch, room, how):
    "A stretch of one batch gives what one of all gives; members may see the pictures in other colours."
    monkeypatch.chdir(masks)
    monkeypatch.setattr(ensemble, '_ROOM', room)
    asked, out = [load_trained(o, device='cpu') for o in ('colour', 'grey')], []
    with torch.no_grad():
        for o in asked: out.append(torch.cat([o.model(x) for x,_ in o.splits().in_order('test')]))
    ev = Ensemble(['colour', 'grey'], how, device='cpu').evaluate('test')
    wanted = combine(out, how, 'mask')
    assert ev.task=='mask' and torch.equal(ev.preds.long(), wanted.argmax(1))
    assert ev.metrics['loss']==pytest.approx(F.cross_entropy(wanted, torch.cat([y for _,y in asked[0].splits().in_order('test')])).item(), abs=1e-4)
    files = sorted(Path('data/test/images').iterdir())
    got, bad = Ensemble(['colour', 'grey'], how, device='cpu').predict_files([*files[:2], 'no.png', *files[2:]])
    assert torch.equal(got.preds.long(), wanted.argmax(1)) and got.ids==[str(o) for o in files] and [o.path.name for o in bad]==['no.png']

def test_masks_from_all_sides(masks, monkeypatch):
    monkeypatch.chdir(masks)
    with pytest.raises(DataError, match='exact way back'): Ensemble(['colour', 'grey'], tta='crops', device='cpu')
    one = Ensemble('grey', tta='d4', device='cpu').evaluate('test')
    assert torch.equal(one.preds, load_trained('grey', device='cpu').evaluate('test', tta='d4').preds)

def test_numbers_of_folds_that_scale_in_their_own_way(tmp_path, monkeypatch):
    "Each fold measures by the mean of its own training rows; what they predict is in the unit of the file."
    monkeypatch.chdir(tmp_path)
    rows = [f'{i%11},{i%7},{2*(i%11)-(i%7)+50}' for i in range(120)]
    Path('t.csv').write_text('x,z,y\n'+'\n'.join(rows[:90]))
    Path('new.csv').write_text('x,z,y\n'+'\n'.join(rows[90:]))
    data = dict(type='Table', args=dict(file='t.csv', test_file='new.csv', target='y', numbers=['x', 'z'], task='number'))
    for k in range(2): train(f'fold-{k}', seed=k, dataset=data, arch='MLP', loss='mse_loss', metrics=['mae'], trainer=dict(epochs=3, save_dir='experiments/y-kfold'),
                             data_loader=dict(type='DataLoader', args=dict(batch_size=16, validation_split=0.3)))
    one, two = (load_trained(f'experiments/y-kfold/fold-{k}', device='cpu') for k in range(2))
    assert one.fitted!=two.fitted
    both = Ensemble('y-kfold', device='cpu')
    torch.testing.assert_close(both.evaluate('test').preds, (one.evaluate('test').preds+two.evaluate('test').preds)/2)
    torch.testing.assert_close(both.predict_files(['new.csv'])[0].preds, (one.predict_files(['new.csv'])[0].preds+two.predict_files(['new.csv'])[0].preds)/2)
    w = Ensemble('y-kfold', 'weighted', device='cpu').weights
    errors = [((o.evaluate('valid').preds-o.evaluate('valid').targets)**2).mean().item() for o in (one, two)]
    assert w[0]/w[1]==pytest.approx(errors[1]/errors[0], rel=1e-3)
    with pytest.raises(DataError, match='rows of a table'): Ensemble('y-kfold', tta='flip', device='cpu')
    assert [o['prediction'] for o in both.predict_files(['new.csv'])[0].rows()][0]==pytest.approx(both.evaluate('test').preds[0].item(), rel=1e-4)
