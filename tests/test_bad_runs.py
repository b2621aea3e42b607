"Run folders that people and machines have mistreated, and every command that reads them; runs that were opened on another machine; many processes that want one name."
import json, os, re, shutil, subprocess, sys
from pathlib import Path
import pytest
import torch
from deep_studio_nb.cli import main
from deep_studio_nb.experiments.opening import open_run_zip
from deep_studio_nb.experiments.run_folder import RunFolder
from deep_studio_nb.experiments.run_zip import export_run
from deep_studio_nb.experiments.runs import runs
from deep_studio_nb.experiments.trained import load_trained
from deep_studio_nb.training.checkpoints import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
STUDIO = [sys.executable, '-c', 'from deep_studio_nb.cli import main; main()']

def studio(*words, capsys):
    "Run a command in this process; its exit code, and all that it printed."
    with pytest.raises(SystemExit) as e: main([str(o) for o in words])
    out = capsys.readouterr()
    assert 'Traceback' not in out.out+out.err, out.out+out.err
    return e.value.code, out.out+out.err

def process(*words, cwd):
    return subprocess.run([*STUDIO, *map(str, words)], cwd=cwd, env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'), capture_output=True, text=True, timeout=300)

def config(digits, **changes):
    cfg = dict(name='꽃', seed=0, dataset=dict(type='ImageFolder', args=dict(data_dir=str(digits))), data_loader=dict(type='DataLoader', args=dict(batch_size=256)),
               arch=dict(type='MLP', args=dict(hidden=[8])), loss='cross_entropy', metrics=['accuracy'], optimizer=dict(type='AdamW', args=dict(lr=0.01)),
               trainer=dict(epochs=2, threads=1, verbosity=0, save_dir='experiments'), device='cpu')
    return cfg | changes

def fit(cfg, *overrides, **kw):
    from deep_studio_nb.experiments.experiment import Experiment
    exp = Experiment(cfg, *overrides, **kw)
    exp.fit()
    return exp.folder

@pytest.fixture(scope='module')
def trained(digits, tmp_path_factory):
    "Three runs: one that will be mistreated, one that is well, and one within the folder of a sweep."
    place, before = tmp_path_factory.mktemp('trained'), Path.cwd()
    os.chdir(place)
    try:
        fit(config(digits))
        fit(config(digits, name='well', seed=1))
        fit(config(digits, name='s-000', seed=2, trainer=dict(config(digits)['trainer'], save_dir='experiments/s')))
        Path('experiments/s/trials.csv').write_text('trial,status\n0,finished\n')
    finally: os.chdir(before)
    return place/'experiments'

@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path/'experiments')
    return tmp_path

def commands(digits, run):
    "Every command that reads run folders, as it is typed for one run."
    return {'runs': ('runs',), 'compare': ('runs', '--compare', run, 'well'), 'prune': ('runs', '--prune', 'keep best 1'), 'archive': ('runs', '--archive', run), 'export': ('runs', '--export', run),
            'select-best': ('select-best', '-d', 'cpu'), 'reproduce': ('reproduce', run, '--epochs', '1'), 'eval': ('eval', run, '--split', 'valid', '-d', 'cpu'), 'predict': ('predict', run, digits/'train'/'3', '-d', 'cpu'),
            'resume': ('train', '--resume', run, 'trainer.epochs=3')}

LISTS = 'runs', 'prune', 'select-best'       # read all folders, and leave out those that are not well
BY_CHECKPOINT = 'eval', 'predict', 'resume'  # need no more than a checkpoint

def half(path): path.write_bytes(path.read_bytes()[:len(path.read_bytes())//2])
def older(path): path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k!='format'}))

SPOILT = {'half written': (half, 'cannot be read'), 'empty': (lambda p: p.write_bytes(b''), 'cannot be read'), 'zeros': (lambda p: p.write_bytes(b'\0'*2000), 'cannot be read'),
          'without manifest': (lambda p: p.unlink(), 'manifest.json'), 'of a later version': (lambda p: p.write_text(json.dumps(json.loads(p.read_text()) | dict(format=99))), 'format 99'), 'from before there was a format': (older, 'format None'),
          'a list': (lambda p: p.write_text('[1, 2]'), 'manifest.json'), 'half removed': (lambda p: p.rename(p.with_name('manifest.removing.json')), 'manifest')}

@pytest.mark.parametrize('state', SPOILT)
def test_every_command_says_what_is_wrong_with_a_run(here, digits, capsys, state):
    spoil, said = SPOILT[state]
    spoil(here/'experiments'/'꽃'/'manifest.json')
    before = {o: o.read_bytes() for o in (here/'experiments'/'꽃').rglob('*') if o.is_file()}
    for name, words in commands(digits, '꽃').items():
        code, text = studio(*words, capsys=capsys)
        if name in LISTS:
            assert code==0 and ('well' in text or name=='prune'), (name, text)
            if name!='select-best' or state not in ('without manifest', 'half removed'): assert '꽃' in text, (name, text)
        else: assert code==1 and 'Error: ' in text and '꽃' in text and re.search(said+'|no run folder|neither a run folder', text), (name, text)
        assert 'Error: ' not in text.partition('Error: ')[2], (name, text)
    for o, data in before.items(): assert o.read_bytes()==data, o
    assert not list(here.glob('*.zip'))

@pytest.mark.parametrize('state', ['half written', 'without manifest', 'of a later version'])
def test_the_weights_of_a_damaged_run_can_still_be_used(here, digits, capsys, state):
    "As the error says: by the path of the checkpoint."
    SPOILT[state][0](here/'experiments'/'꽃'/'manifest.json')
    path = 'experiments/꽃/checkpoints/best_model.pt'
    for words in (('eval', path, '--split', 'valid', '-d', 'cpu'), ('predict', path, digits/'train'/'3', '-d', 'cpu'), ('train', '--resume', path, 'trainer.epochs=3', '--name', 'rescued')):
        code, text = studio(*words, capsys=capsys)
        assert code==0, (words, text)
    assert runs()['rescued']['status']=='finished'

@pytest.mark.parametrize('how', ['renamed and moved', *(pytest.param(o, marks=pytest.mark.slow) for o in ('renamed', 'moved', 'copied', 'within a sweep'))])
def test_a_run_that_is_somewhere_else_works_with_every_command(here, digits, capsys, how):
    run = Path({'renamed': 'experiments/새 이름', 'moved': 'elsewhere/꽃', 'renamed and moved': 'else where/장미', 'copied': 'experiments/copy', 'within a sweep': 'experiments/s/s-000'}[how])
    run.parent.mkdir(exist_ok=True)
    if how=='copied': shutil.copytree('experiments/꽃', run)
    elif how!='within a sweep': shutil.move('experiments/꽃', run)
    for name, words in commands(digits, run).items():
        if name=='archive': continue
        code, text = studio(*words, capsys=capsys)
        assert code==0, (name, text)
    code, text = studio('select-best', run, 'well', '-d', 'cpu', '--to', 'checkpoints/other.pt', capsys=capsys)
    assert code==0 and (run.name in text), text
    assert RunFolder(run).read()['epochs']==3 and 'came out the same' in studio('reproduce', run, capsys=capsys)[1]
    assert studio('runs', '--archive', run, capsys=capsys)[0]==0 and not (run/'manifest.json').exists()

@pytest.mark.parametrize('lost', ['checkpoints', 'checkpoints/best_model.pt', 'metrics.csv', 'config.yaml', 'split.json', 'logs'])
def test_files_that_are_gone(here, digits, capsys, lost):
    path = Path('experiments/꽃')/lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, words in commands(digits, '꽃').items():
        if name=='resume': continue
        code, text = studio(*words, capsys=capsys)
        broken = lost=='checkpoints' and name in ('eval', 'predict') or lost=='metrics.csv' and name=='reproduce' or name in ('eval', 'predict', 'reproduce', 'export', 'compare') and not Path('experiments/꽃').exists()
        assert code==broken, (name, text)
        if name=='archive': open_run_zip('archive/꽃.zip', show=False)

def test_a_metric_that_one_run_does_not_have(here, digits, capsys):
    fit(config(digits, name='other', metrics=['f1']))
    said = studio('runs', '--where', 'val_f1>0', capsys=capsys)
    assert said[0]==0 and 'other' in said[1] and '꽃' not in said[1]
    assert studio('runs', '--sort', '-val_accuracy', '--columns', 'run,val_accuracy', capsys=capsys)[1].split()[-1]=='other'
    assert 'There is no `val_f1` in `꽃`' in studio('runs', '--compare', '꽃', 'other', capsys=capsys)[1]
    code, text = studio('select-best', '--monitor', 'max val_accuracy', '-d', 'cpu', capsys=capsys)
    assert code==0 and 'Left out: other: it has no `val_accuracy`' in text
    code, text = studio('runs', '--prune', 'keep best 1', capsys=capsys)
    assert code==0 and 'of 3 by val_loss' in text             # the loss is the monitor of all, and means the same
    assert studio('runs', '--prune', 'keep best 1', '--where', 'val_f1>0', capsys=capsys)[0]==0

def test_folders_of_folds_and_sweeps_that_are_half_written(here, digits, capsys):
    "A trial or fold that never began, one without a manifest, and a table that was cut off."
    for o in ('s-001', 's-002'): (here/'experiments/s'/o/'checkpoints').mkdir(parents=True)
    (here/'experiments/s/s-001/manifest.json').write_text('{"format": 1')
    (here/'experiments/s/trials.csv').write_text('trial,sta')
    shutil.copytree('experiments/well', 'experiments/k/fold-0')
    (here/'experiments/k/folds.json').write_text('{')
    said = studio('runs', capsys=capsys)[1]
    assert [o in said for o in ('s/s-000', 's/s-001', 's/s-002', 'k/fold-0')]==[True]*4 and said.count('damaged')==2
    for words in (('runs', 'experiments/s'), ('runs', '--prune', 'keep best 1'), ('runs', '--prune', 'keep best 1', 'experiments/s'), ('runs', '--prune', 'drop s-001', 'experiments/s', '--yes')):
        code, text = studio(*words, capsys=capsys)
        assert code==0 and 'manifest.json' in text, text
    assert (here/'experiments/s/s-001/manifest.json').exists()
    code, text = studio('select-best', 's/s-000', 's/s-001', '-d', 'cpu', capsys=capsys)
    assert code==0 and 's-001: ' in text, text
    assert studio('select-best', '-d', 'cpu', '--dir', 'experiments/s', capsys=capsys)[0]==0
    assert 's/s-002' in studio('eval', 's/s-002', capsys=capsys)[1]
    assert studio('eval', 'k/fold-0', '--split', 'valid', '-d', 'cpu', capsys=capsys)[0]==0

# --- another machine ---

@pytest.fixture
def elsewhere(trained, digits, tmp_path, monkeypatch):
    "A run as a zip, and the data under another name, in a place that has nothing else."
    there = tmp_path/'다른 컴퓨터'
    there.mkdir()
    monkeypatch.chdir(there)
    original = shutil.copytree(trained/'꽃', tmp_path/'experiments'/'꽃')
    export_run(original, there/'꽃.zip', show=False)
    shutil.rmtree(original)
    return there

def without_old_data(digits):
    "The config names data of the machine that it comes from, which is not here."
    for o in Path('experiments').glob('*/manifest.json'): o.write_text(o.read_text().replace(str(digits), '/nowhere/digits'))
    return f'dataset.args.data_dir={digits}'

def test_a_run_is_at_home_on_another_machine(elsewhere, digits, capsys):
    assert studio('runs', '--open', '꽃.zip', capsys=capsys)==(0, '꽃: finished, in experiments/꽃\n')
    assert studio('runs', capsys=capsys)[1].count('finished')==1
    assert studio('predict', '꽃', digits/'train'/'3', '-d', 'cpu', capsys=capsys)[0]==0
    data = without_old_data(digits)
    code, text = studio('eval', '꽃', data, '--split', 'valid', '-d', 'cpu', capsys=capsys)
    assert code==0, text
    ev = load_trained('꽃', device='cpu', overrides=[data]).evaluate('valid')
    assert ev.metrics['loss']==pytest.approx(RunFolder('experiments/꽃').read()['at_best']['val_loss'], rel=1e-5)
    code, text = studio('reproduce', '꽃', data, capsys=capsys)
    assert 'came out the same' in text and code==0, text
    assert studio('train', '--resume', '꽃', data, 'trainer.epochs=3', capsys=capsys)[0]==0
    assert RunFolder('experiments/꽃').read()['epochs']==3 and not list(Path('experiments').rglob('.*'))

def test_a_fold_is_at_home_on_another_machine_too(digits, tmp_path, monkeypatch, capsys):
    "The file of all folds is not in the zip of one; the run has the names of its own samples."
    from deep_studio_nb.data.folds import folds
    from deep_studio_nb.data.image_folder import ImageFolder
    from deep_studio_nb.data.split_files import save_split
    monkeypatch.chdir(tmp_path)
    save_split('k/folds.json', folds(ImageFolder(digits), 3))
    run = fit(config(digits, data_loader=dict(type='DataLoader', args=dict(batch_size=256, split='k/folds.json', fold=1))))
    before = run.read()['at_best']['val_loss']
    export_run(run, show=False)
    shutil.rmtree('experiments')
    shutil.rmtree('k')
    text = studio('runs', '--open', '꽃.zip', capsys=capsys)[1]
    changes = re.search(r'data_loader\.args\.split=.*', text)[0].replace("'", '').split()
    assert load_trained('꽃', device='cpu', overrides=changes).evaluate('valid').metrics['loss']==pytest.approx(before, rel=1e-5)
    assert 'came out the same' in studio('reproduce', '꽃', *changes, capsys=capsys)[1]

def weights(run): return load_checkpoint(Path(run)/'checkpoints'/'last.pt')['model']

def test_a_run_that_was_stopped_goes_on_exactly_after_it_was_opened(digits, tmp_path, monkeypatch, capsys):
    from deep_studio_nb.experiments.experiment import Experiment
    from deep_studio_nb.training.events import When
    monkeypatch.chdir(tmp_path)
    cfg = config(digits, trainer=dict(config(digits)['trainer'], epochs=4), lr_scheduler=dict(type='OneCycleLR', args=dict(max_lr=0.02)))
    whole = fit(cfg, name='whole').path.resolve()
    exp = Experiment(cfg, name='cut')
    exp.trainer.add(When(after_batch=lambda t: t.stop() if t.steps==7 else None))
    exp.fit()
    assert exp.folder.status()=='stopped'
    export_run('cut', show=False)
    shutil.rmtree('experiments/cut')
    (tmp_path/'other'/'deep').mkdir(parents=True)
    monkeypatch.chdir(tmp_path/'other'/'deep')
    open_run_zip(tmp_path/'cut.zip', '실험', show=False)
    assert studio('train', '--resume', '실험/cut', capsys=capsys)[0]==0
    a, b = weights(whole), weights('실험/cut')
    assert all(torch.equal(a[k], b[k]) for k in a) and (whole/'metrics.csv').read_text().count('\n')==Path('실험/cut/metrics.csv').read_text().count('\n')

def test_what_a_real_run_leaves_is_all_its_own(here, digits, capsys):
    "Figures, predictions, logs of a tracker, checkpoints of callbacks: a run that goes leaves nothing."
    fit(config(digits, name='rich', callbacks=[dict(type='KeepEvery', args=dict(epochs=1))], trainer=dict(config(digits)['trainer'], tensorboard=True)))
    assert studio('eval', 'rich', '--split', 'valid', '-d', 'cpu', capsys=capsys)[0]==0
    assert not export_run('rich', 'rich.zip', show=False).left_out
    assert studio('runs', '--prune', 'drop rich', '--yes', capsys=capsys)[0]==0 and not Path('experiments/rich').exists()

DIES = '''
import os, signal, sys, json
from deep_studio_nb.experiments.experiment import Experiment
from deep_studio_nb.training.events import When
exp = Experiment(json.loads(sys.argv[1]), name='dead')
exp.trainer.add(When(after_batch=lambda t: os.kill(os.getpid(), signal.SIGKILL) if len(t.history)==2 else None))
exp.fit()
'''

@pytest.mark.skipif(os.name!='posix', reason='SIGKILL')
def test_what_a_killed_run_leaves_is_its_own_as_well(here, digits, capsys):
    cfg = config(digits, trainer=dict(config(digits)['trainer'], epochs=4, save_period=0))      # one of each epoch is listed with the table, which may be seconds later
    done = subprocess.run([sys.executable, '-c', DIES, json.dumps(cfg)], env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True, text=True)
    assert done.returncode==-9, done.stderr
    assert 'checkpoints/last.pt' in RunFolder('experiments/dead').read()['files']
    text = studio('runs', '--prune', 'drop killed', '--yes', capsys=capsys)[1]
    assert '1 run removed' in text and not Path('experiments/dead').exists(), text

# --- one name ---

RACE = '''
import sys
from deep_studio_nb.experiments.run_folder import RunFolder, this_process
print('ready', flush=True)
sys.stdin.readline()
for i in range(20):
    run = RunFolder.create('experiments', '꽃', mine=[int(sys.argv[1]), i], **this_process())
    run.file('logs', 'training.log').write_text(sys.argv[1])
    run.update(status='finished')
'''

def test_eight_processes_want_one_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    racers = [subprocess.Popen([sys.executable, '-c', RACE, str(i)], env=dict(os.environ, PYTHONPATH=str(ROOT)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for i in range(8)]
    for o in racers: assert o.stdout.readline()=='ready\n'
    for o in racers:
        o.stdin.write('go\n')
        o.stdin.flush()
    for o in racers:
        o.communicate()
        assert o.returncode==0
    table = runs()
    assert sorted(o['run'] for o in table)==sorted(['꽃', *(f'꽃-{i}' for i in range(2, 161))]) and not any('note' in o for o in table)
    assert sorted(o.record['mine'] for o in table)==[[k, i] for k in range(8) for i in range(20)]
    for o in table: assert (o.run.path/'logs'/'training.log').read_text()==str(o.record['mine'][0]) and o.record['name']==o['run'] and 'logs/training.log' in o.record['files']

@pytest.mark.slow
def test_one_command_many_times_at_once(tmp_path, digits):
    "Trainings of one config that start together are runs of their own, and come out the same."
    (tmp_path/'꽃.json').write_text(json.dumps(config(digits)))
    words = [*STUDIO, 'train', '꽃.json', 'trainer.epochs=1']
    children = [subprocess.Popen(words, cwd=tmp_path, env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(8)]
    said = [o.communicate()[0] for o in children]
    assert [o.returncode for o in children]==[0]*8, said
    table = runs(tmp_path/'experiments')
    assert [sorted(o['run'] for o in table), {o['status'] for o in table}]==[['꽃', *(f'꽃-{i}' for i in range(2, 9))], {'finished'}]
    assert len({o.record['pid'] for o in table})==8 and len({o['best'] for o in table})==1
