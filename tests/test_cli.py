"""The command line as a person meets it: real processes where a process matters, `main` itself everywhere else."""
import json, os, shlex, subprocess, sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from deep_studio_nb.cli import main
from deep_studio_nb.training.checkpoints import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
STUDIO = [sys.executable, '-c', 'from deep_studio_nb.cli import main; main()']


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(digits, **changes):
    cfg = dict(name='tiny', seed=0, dataset=dict(type='ImageFolder', args=dict(data_dir=str(digits))),
               data_loader=dict(type='DataLoader', args=dict(batch_size=128)), arch=dict(type='MLP', args=dict(hidden=[16])),
               loss='cross_entropy', metrics=['accuracy'], optimizer=dict(type='AdamW', args=dict(lr=0.01)), trainer=dict(epochs=2))
    cfg.update(changes)
    Path('tiny.json').write_text(json.dumps(cfg, ensure_ascii=False))
    return 'tiny.json'


def studio(*words, capsys):
    "Run a command in this process; its exit code, and all that it printed."
    with pytest.raises(SystemExit) as e: main([str(o) for o in words])
    out = capsys.readouterr()
    assert 'Traceback' not in out.out+out.err
    return e.value.code, out.out+out.err


def process(*words, cwd, **kw):
    env = dict(os.environ, PYTHONPATH=str(ROOT), **kw)
    return subprocess.run([*STUDIO, *map(str, words)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def weights(run): return load_checkpoint(Path(run)/'checkpoints'/'last.pt')['model']


def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_train_leaves_a_whole_run_folder(here, digits, capsys):
    code, said = studio('train', config(digits), capsys=capsys)
    assert code == 0, said
    run = here/'experiments'/'tiny'
    for o in ('config.yaml', 'manifest.json', 'logs/training.log', 'metrics.csv', 'figures/loss_curve.png', 'checkpoints/last.pt',
              'checkpoints/best_model.pt', 'predictions/test.csv'): assert (run/o).stat().st_size > 0, o
    assert list((run/'images').glob('*.png'))
    record = json.loads((run/'manifest.json').read_text())
    assert record['status'] == 'finished' and record['epochs'] == 2
    assert record['data']['classes'] == [str(i) for i in range(10)] and record['data']['fingerprint']
    assert record['versions']['torch'] and record['parts']['arch.MLP']['code']
    assert record['seed'] == 0 and record['best']['epoch'] in (1, 2) and 0 < record['test']['accuracy'] <= 1
    listed = {o for o in record['files']}
    there = {o.relative_to(run).as_posix() for o in run.rglob('*') if o.is_file()}
    assert listed == there, listed ^ there
    assert len((run/'metrics.csv').read_text().splitlines()) == 3
    for word in ('experiments/tiny', 'deep-studio predict', 'best'): assert word in said


def test_same_seed_same_weights_other_seed_other_weights(here, digits, capsys):
    cfg = config(digits, transforms=dict(train=[dict(type='RandomAffine', args=dict(degrees=10, translate=[.1, .1]))]))
    for words in ((), ('--name', 'again'), ('--name', 'other', 'seed=1')):
        assert studio('train', cfg, *words, capsys=capsys)[0] == 0
    a, b, c = (weights(here/'experiments'/n) for n in ('tiny', 'again', 'other'))
    assert same(a, b) and not same(a, c)


def test_a_taken_name_gets_the_next_number(here, digits, capsys):
    cfg = config(digits, trainer=dict(epochs=1))
    studio('train', cfg, capsys=capsys)
    before = (here/'experiments/tiny/metrics.csv').read_bytes()
    code, said = studio('train', '-c', cfg, capsys=capsys)
    assert code == 0 and 'tiny-2' in said
    assert (here/'experiments/tiny/metrics.csv').read_bytes() == before


def test_resume_goes_on_exactly(here, digits, capsys):
    cfg = config(digits, trainer=dict(epochs=4))
    assert studio('train', cfg, '--name', 'whole', capsys=capsys)[0] == 0
    assert studio('train', cfg, '--name', 'cut', 'trainer.epochs=2', capsys=capsys)[0] == 0
    code, said = studio('train', '--resume', 'experiments/cut', 'trainer.epochs=4', capsys=capsys)
    assert code == 0, said
    assert same(weights('experiments/whole'), weights('experiments/cut'))
    assert (here/'experiments/cut/metrics.csv').read_text().count('\n') == 5
    assert not (here/'experiments/cut-2').exists()


def test_resume_from_an_early_checkpoint_makes_a_new_run(here, digits, capsys):
    cfg = config(digits, trainer=dict(epochs=3, save_period=1))
    studio('train', cfg, capsys=capsys)
    code, said = studio('train', '--resume', 'experiments/tiny/checkpoints/epoch_1.pt', capsys=capsys)
    assert code == 0, said
    assert same(weights('experiments/tiny'), weights('experiments/tiny-2'))
    assert 'epoch_1.pt' in json.loads((here/'experiments/tiny-2/manifest.json').read_text())['resumed_from']


def test_resume_of_a_finished_run_says_so(here, digits, capsys):
    studio('train', config(digits, trainer=dict(epochs=1)), capsys=capsys)
    code, said = studio('train', '--resume', 'tiny', capsys=capsys)
    assert code == 1 and 'trainer.epochs' in said


def test_the_advice_after_a_finished_run_works(here, digits, capsys):
    studio('train', config(digits, trainer=dict(epochs=1), lr_scheduler=dict(type='OneCycleLR', args=dict(max_lr=.01))), '--name', '한 번', capsys=capsys)
    code, said = studio('train', '--resume', '한 번', capsys=capsys)
    assert code == 1 and 'schedule' in said
    command = next(o for o in said.splitlines() if o.startswith('  deep-studio train'))
    code, said = studio(*shlex.split(command)[1:], capsys=capsys)
    assert code == 0, said
    assert json.loads((here/'experiments/한 번-2/manifest.json').read_text())['epochs'] == 2


def test_a_device_that_is_not_there(here, digits, capsys):
    code, said = studio('train', config(digits), '--device', 'cuda:99', capsys=capsys)
    assert code == 1 and 'cuda' in said and not (here/'experiments').exists()


# a model that sends the signal itself, so that it comes in the middle of an epoch and not by the clock
PATIENT = '''
import os, signal
from torch import nn
from deep_studio_nb.common.registry import MODELS
@MODELS.register
class Patient(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.net, self.calls = nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes)), 0
    def forward(self, x):
        self.calls += self.training
        if self.training and self.calls == int(os.environ.get('STOP_AT', 0)): os.kill(os.getpid(), getattr(signal, os.environ.get('STOP_BY', 'SIGINT')))
        return self.net(x)
'''


def test_ctrl_c_finishes_the_step_saves_and_can_be_resumed(here, digits):
    cfg = config(digits, trainer=dict(epochs=3), imports=['patient'])
    (here/'patient.py').write_text(PATIENT)
    whole = process('train', cfg, 'arch=Patient', 'name=whole', cwd=here)
    assert whole.returncode == 0, whole.stderr
    cut = process('train', cfg, 'arch=Patient', 'name=cut', cwd=here, STOP_AT='13')
    said = cut.stdout+cut.stderr
    assert cut.returncode == 130 and 'Traceback' not in said
    assert '--resume experiments/cut' in said
    assert json.loads((here/'experiments/cut/manifest.json').read_text())['status'] == 'stopped'
    state = load_checkpoint(here/'experiments/cut/checkpoints/last.pt')
    assert state['epoch'] == 1 and state['step'] > 0
    go_on = process('train', '--resume', 'experiments/cut', cwd=here)
    assert go_on.returncode == 0, go_on.stderr
    assert same(weights(here/'experiments/whole'), weights(here/'experiments/cut'))


@pytest.mark.skipif(os.name != 'posix', reason='SIGKILL')
def test_a_killed_run_is_seen_as_killed_and_goes_on_exactly(here, digits, capsys):
    cfg = config(digits, trainer=dict(epochs=3), imports=['patient'])
    (here/'patient.py').write_text(PATIENT)
    assert process('train', cfg, 'arch=Patient', 'name=whole', cwd=here).returncode == 0
    assert process('train', cfg, 'arch=Patient', 'name=cut', cwd=here, STOP_AT='17', STOP_BY='SIGKILL').returncode < 0
    assert 'killed' in studio('runs', capsys=capsys)[1]
    assert process('train', '--resume', 'cut', cwd=here).returncode == 0
    assert same(weights(here/'experiments/whole'), weights(here/'experiments/cut'))


@pytest.mark.slow
@pytest.mark.skipif(os.name != 'posix', reason='SIGKILL')
def test_the_same_command_goes_on_until_it_is_done(here, digits, capsys):
    "`--resume auto`: killed before the first checkpoint, killed later, stopped, finished; data are loaded by processes that outlive a kill by some seconds."
    loader = dict(type='DataLoader', args=dict(batch_size=128, num_workers=2, start='fork', cache='off'))
    cfg = config(digits, trainer=dict(epochs=3), imports=['patient'], data_loader=loader, callbacks=[dict(type='SaveSteps', args=dict(every=4))])
    (here/'patient.py').write_text(PATIENT)
    assert process('train', cfg, 'arch=Patient', 'name=whole', cwd=here).returncode == 0
    words = 'train', cfg, 'arch=Patient', 'name=cut', '--resume', 'auto'
    for at, by in (('3', 'SIGKILL'), ('15', 'SIGKILL'), ('7', 'SIGINT')):
        p = process(*words, cwd=here, STOP_AT=at, STOP_BY=by)
        assert p.returncode == (130 if by == 'SIGINT' else -9), p.stdout+p.stderr
    p = process(*words, cwd=here)
    assert p.returncode == 0, p.stdout+p.stderr
    assert same(weights(here/'experiments/whole'), weights(here/'experiments/cut'))
    assert sorted(o.name for o in (here/'experiments').iterdir()) == ['cut', 'whole']
    said = process(*words, 'trainer.verbosity=1', cwd=here).stdout
    assert '`experiments/cut` has had its 3 epochs' in said and 'A new run begins' in said and (here/'experiments/cut-2').exists()
    code, said = studio('train', '--resume', 'auto', capsys=capsys)
    assert code == 2 and 'What should be trained?' in said


def test_the_plain_command_tells_of_a_run_that_could_go_on(here, digits, capsys):
    cfg = config(digits, callbacks=[dict(type='StopAfter', args=dict(steps=3))])
    assert studio('train', cfg, capsys=capsys)[0] == 130
    code, said = studio('train', cfg, capsys=capsys)
    assert code == 130 and '`experiments/tiny` has the same config and was stopped' in said and 'deep-studio train --resume experiments/tiny,' in said
    assert 'has the same config' not in studio('train', cfg, 'seed=3', capsys=capsys)[1]


def test_two_cannot_train_into_one_folder(here, digits, capsys):
    from deep_studio_nb.experiments.run_folder import RunFolder
    studio('train', config(digits, trainer=dict(epochs=1)), capsys=capsys)
    before = (here/'experiments/tiny/checkpoints/last.pt').read_bytes()
    with RunFolder('experiments/tiny').claimed(): code, said = studio('train', '--resume', 'tiny', 'trainer.epochs=2', capsys=capsys)
    assert code == 1 and 'another process' in said
    assert (here/'experiments/tiny/checkpoints/last.pt').read_bytes() == before
    assert studio('train', '--resume', 'tiny', 'trainer.epochs=2', capsys=capsys)[0] == 0


TEMPLATE = {"name": "Mask_ResNet", "n_gpu": 1, "arch": {"type": "ResNet", "args": {"num_blocks": [3, 4, 6, 3]}},
            "data_loader": {"type": "IrisDataLoader", "args": {"batch_size": 3, "shuffle": False, "validation_split": 2, "num_workers": 2}},
            "dataset": {"type": "ImageDataset", "args": {"data_dir": "data/"}},
            "optimizer": {"type": "Adam", "args": {"lr": 0.001, "weight_decay": 0, "amsgrad": True}}, "loss": "nll_loss",
            "metrics": ["accuracy", "top_k_acc"], "lr_scheduler": {"type": "StepLR", "args": {"step_size": 50, "gamma": 0.1}},
            "trainer": {"epochs": 1, "save_dir": "saved/", "save_period": 1, "verbosity": 2, "monitor": "min val_loss", "early_stop": 10, "tensorboard": True}}

PARTS = '''
import torch
from pathlib import Path
from torchvision import transforms as T
from PIL import Image
from deep_studio_nb.common.registry import DATASETS, LOADERS
from deep_studio_nb.data.loaders import BaseDataLoader

@DATASETS.register
class ImageDataset(torch.utils.data.Dataset):
    "A dataset as such projects have them: nothing of the toolkit in it."
    def __init__(self, data_dir):
        self.files = sorted(Path(data_dir).rglob('*.png'))
        self.classes = sorted({o.parent.name for o in self.files})
    def __len__(self): return len(self.files)
    def __getitem__(self, i):
        return T.functional.to_tensor(Image.open(self.files[i]).convert('RGB')), self.classes.index(self.files[i].parent.name)

@LOADERS.register
class IrisDataLoader(BaseDataLoader):
    def __init__(self, dataset, batch_size, shuffle=True, validation_split=0.0, num_workers=1):
        super().__init__(dataset, batch_size, shuffle, validation_split, num_workers)
'''


def photos(folder, names=('iris', 'pupil', 'sclera'), n=3, size=(32, 32), suffix='.png'):
    for k, name in enumerate(names):
        (folder/name).mkdir(parents=True, exist_ok=True)
        for i in range(n): Image.new('RGB', size, (80*k, 40*i, 120)).save(folder/name/f'{i}{suffix}')


@pytest.mark.parametrize('how', ['imports', 'registry'])
def test_a_pytorch_template_config_runs_to_the_letter(here, how, capsys):
    photos(here/'data', size=(64, 64))
    Path('config.json').write_text(json.dumps(TEMPLATE))
    Path('iris_parts.py').write_text(PARTS)
    if how == 'imports': done = process('train', '-c', 'config.json', 'imports=[iris_parts]', cwd=here)
    else: done = subprocess.run([sys.executable, '-c', 'import iris_parts; from deep_studio_nb.cli import main; main(["train", "-c", "config.json"])'],
                                cwd=here, env=dict(os.environ, PYTHONPATH=f'{ROOT}{os.pathsep}{here}'), capture_output=True, text=True, timeout=300)
    said = done.stdout+done.stderr
    assert done.returncode == 0, said
    assert 'CPU' in said or torch.cuda.is_available()  # n_gpu: 1 on a machine without one says so
    assert 'cross_entropy' in said                     # nll_loss on a model that gives logits is pointed out
    record = json.loads((here/'saved/Mask_ResNet/manifest.json').read_text())
    assert record['epochs'] == 1 and record['data']['counts'] == dict(train=7, valid=2)
    assert (here/'saved/Mask_ResNet/metrics.csv').read_text().startswith('epoch,')
    assert list((here/'saved/Mask_ResNet/logs').glob('events.out.tfevents*'))


def test_photos_of_all_kinds_train(here, capsys):
    "Mixed sizes, JPEG, one grey image, one RGBA PNG, and a file that is no image; a path with blanks and Korean letters."
    data = here/'내 사진 data'
    for i, split in enumerate(('train', 'val')): photos(data/split, ('장미', 'tulip 2', 'tulip 10'), n=4, size=(90+20*i, 60), suffix='.jpg')
    Image.new('L', (50, 70), 99).save(data/'train'/'장미'/'grey.png')
    Image.new('RGBA', (70, 50), (9, 99, 9, 50)).save(data/'train'/'장미'/'clear.png')
    (data/'train'/'tulip 2'/'notes.jpg').write_text('not an image')
    (data/'train'/'tulip 2'/'readme.txt').write_text('not an image either')
    (data/'train'/'.ipynb_checkpoints').mkdir()
    code, said = studio('train', ROOT/'configs/flowers.yaml', f'dataset.args.data_dir={data}', 'trainer.epochs=1', 'data_loader.args.num_workers=0',
                        'arch={type: SimpleCNN, args: {width: 4}}', '--name', '꽃', capsys=capsys)
    assert code == 0, said
    assert 'notes.jpg' in said
    record = json.loads((here/'experiments/꽃/manifest.json').read_text())
    assert record['data']['classes'] == ['tulip 2', 'tulip 10', '장미']
    assert record['data']['counts'] == dict(train=14, valid=12)


def test_eval_predict_select_and_runs(here, digits, capsys):
    cfg = config(digits)
    studio('train', cfg, capsys=capsys)
    studio('train', cfg, '--name', 'wide', 'arch.args.hidden=[64]', capsys=capsys)
    code, said = studio('eval', 'experiments/wide', '--split', 'valid', capsys=capsys)
    assert code == 0 and 'accuracy' in said
    some = sorted((digits/'test'/'3').glob('*.png'))[:3]
    code, said = studio('predict', 'wide', *some, digits/'test'/'5', '--out', 'out.csv', capsys=capsys)
    assert code == 0, said
    rows = Path('out.csv').read_text(encoding='utf-8-sig').splitlines()
    assert rows[0].startswith('id,prediction,probability') and len(rows) == 4+len(list((digits/'test'/'5').glob('*.png')))
    code, said = studio('select-best', capsys=capsys)
    assert code == 0 and Path('checkpoints/final_model.pt').exists() and 'wide has the lowest val_loss of 2 runs' in said
    code, said = studio('predict', 'checkpoints/final_model.pt', some[0], capsys=capsys)
    assert code == 0 and '3' in said
    code, said = studio('eval', 'checkpoints/final_model.pt', capsys=capsys)
    assert code == 0 and 'accuracy' in said
    code, said = studio('runs', capsys=capsys)
    assert code == 0 and 'tiny' in said and 'wide' in said


def test_select_best_leaves_out_what_never_got_far(here, digits, capsys):
    cfg = config(digits, trainer=dict(epochs=1))
    studio('train', cfg, capsys=capsys)
    Path('own_parts.py').write_text('from torch import nn\nfrom deep_studio_nb.common.registry import MODELS\n@MODELS.register\nclass Late(nn.Module):\n'
                                    '    def __init__(self):\n        super().__init__()\n        self.w = nn.Linear(1, 1)\n    def forward(self, x): return x/0+self.w\n')
    assert studio('train', cfg, 'arch=Late', 'imports=[own_parts]', 'name=late', capsys=capsys)[0] == 1
    assert 'failed' in studio('runs', capsys=capsys)[1]
    code, said = studio('select-best', *sorted(map(str, (here/'experiments').iterdir())), capsys=capsys)
    assert code == 0 and 'late' in said and 'tiny is the only candidate' in said, said


def test_predict_names_files_it_cannot_read_and_does_the_others(here, digits, capsys):
    studio('train', config(digits, trainer=dict(epochs=1)), capsys=capsys)
    (here/'bad.png').write_text('no image')
    good = next((digits/'test'/'3').glob('*.png'))
    code, said = studio('predict', 'tiny', 'bad.png', good, '--out', 'o.csv', capsys=capsys)
    assert code == 1 and 'bad.png' in said and len(Path('o.csv').read_text().splitlines()) == 2
    code, said = studio('predict', 'tiny', 'nowhere.png', capsys=capsys)
    assert code == 1 and 'nowhere.png' in said
    (here/'empty folder').mkdir()
    code, said = studio('predict', 'tiny', 'empty folder', capsys=capsys)
    assert code == 1 and 'no image to predict in `empty folder`' in said


class _Evil:
    def __reduce__(self): return (os.mkdir, ('pwned',))


def test_checkpoints_that_must_be_refused(here, digits, capsys):
    studio('train', config(digits, trainer=dict(epochs=1)), capsys=capsys)
    last = here/'experiments/tiny/checkpoints/last.pt'
    (here/'torn.pt').write_bytes(last.read_bytes()[:2000])
    torch.save(_Evil(), here/'evil.pt')
    for name in ('torn.pt', 'evil.pt'):
        for words in (('eval', name), ('predict', name, 'x.png'), ('train', '--resume', name)):
            code, said = studio(*words, capsys=capsys)
            assert code == 1 and name in said, said
    assert not (here/'pwned').exists()
    code, said = studio('train', 'tiny.json', 'arch.args.hidden=[32]', 'trainer.epochs=3', '--resume', last, capsys=capsys)
    assert code == 1 and 'another architecture' in said, said


@pytest.mark.parametrize('change, wanted', [
    ('trainer.epoch=3', 'epochs'), ('arch=SimpleCCN', 'SimpleCNN'), ('optimizer.args.lrr=0.1', 'lr'), ('trainer.epochs=many', 'trainer.epochs'),
    ('trainer.monitor=min val_acuracy', 'val_accuracy'), ('trainer.epochs=0', 'epochs'), ('nonsense', 'key=value'),
    ('dataset.args.data_dir=nowhere', 'nowhere'), ('data_loader.args.validation_split=1.5', 'validation_split')])
def test_mistakes_are_told_before_anything_is_made(here, digits, change, wanted, capsys):
    code, said = studio('train', config(digits), change, capsys=capsys)
    assert code in (1, 2) and wanted in said, said
    assert not (here/'experiments').exists()


def test_a_folder_that_cannot_be_written(here, digits, capsys):
    (here/'experiments').write_text('a file where the folder should be')
    code, said = studio('train', config(digits), capsys=capsys)
    assert code == 1 and 'experiments' in said


def test_usage_names_the_command_however_it_was_started(here, capsys):
    code, said = studio('train', capsys=capsys)
    assert code == 2 and 'Usage: deep-studio train' in said and "Try 'deep-studio train -h'" in said


def test_debug_shows_the_traceback(here):
    done = process('train', 'missing.yaml', '--debug', cwd=here)
    assert done.returncode == 1 and 'Traceback' in done.stderr
    done = process('train', 'missing.yaml', cwd=here)
    assert done.returncode == 1 and 'missing.yaml' in done.stderr and 'Traceback' not in done.stderr


def test_users_own_code_that_fails_is_located(here, digits, capsys):
    Path('own_parts.py').write_text('from torch import nn\nfrom deep_studio_nb.common.registry import MODELS\n@MODELS.register\nclass Boom(nn.Module):\n'
                                    '    def __init__(self):\n        super().__init__()\n        self.w = 1/0\n')
    done = process('train', config(digits), 'arch=Boom', 'imports=[own_parts]', cwd=here)
    assert done.returncode == 1 and 'own_parts.py:7' in done.stderr and 'ZeroDivisionError' in done.stderr and 'Traceback' not in done.stderr


def test_quickstart_reaches_what_it_promises(here):
    "The README's command, as it stands: 0.98 on the test split."
    done = process('train', ROOT/'configs/quickstart.yaml', cwd=here)
    assert done.returncode == 0, done.stdout+done.stderr
    record = json.loads(next((here/'experiments').glob('*/manifest.json')).read_text())
    assert record['test']['accuracy'] >= 0.98
    splits = here/'data/digits'
    assert sorted(o.name for o in splits.iterdir() if o.is_dir()) == ['test', 'train', 'valid']
    assert len(list(splits.rglob('*.png'))) == 1797
