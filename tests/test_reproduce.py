"""Runs repeated from their manifests, in processes of their own, with everything changed that can change in between."""
import json, os, re, shutil, subprocess, sys
from pathlib import Path

import pytest

from deep_studio_nb.common.errors import ConfigError, RunError, StudioError
from deep_studio_nb.experiments.experiment import Experiment
from deep_studio_nb.experiments.reproduce import replay
from deep_studio_nb.experiments.run_folder import RunFolder
from deep_studio_nb.training.events import When

ROOT = Path(__file__).parents[1]
STUDIO = 'import sys, typer; from deep_studio_nb.run_commands import reproduce; app = typer.Typer(); app.command()(reproduce); sys.exit(app(sys.argv[1:], standalone_mode=False) or 0)'
TRAIN = 'import sys; from deep_studio_nb.cli import main; main()'

PARTS = '''
import json
from pathlib import Path
import torch
from torch import nn
from deep_studio_nb.common.registry import DATASETS, MODELS
from deep_studio_nb.data.tensors import Tensors

@DATASETS.register
class Points(Tensors):
    def __init__(self, file:str):
        x = torch.tensor(json.loads(Path(file).read_text()))
        super().__init__(x, (x[:,0]*x[:,1]>0).long(), ['no', 'yes'])

@MODELS.register
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2))
    def forward(self, x): return self.layers(x)
'''


def process(code, *words, cwd, **env):
    return subprocess.run([sys.executable, '-c', code, *map(str, words)], cwd=cwd, env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1') | env, capture_output=True, text=True, timeout=300)


def write_points(folder, seed=0):
    import torch
    x = torch.randn(160, 2, generator=torch.Generator().manual_seed(seed))
    (folder/'points.json').write_text(json.dumps(x.tolist()))


CONFIG = dict(name='points', imports=['parts'], dataset=dict(type='Points', args=dict(file='points.json')), data_loader=dict(type='DataLoader', args=dict(batch_size=32, validation_split=0.25)),
              arch='Net', loss='cross_entropy', metrics=['accuracy'], optimizer=dict(type='AdamW', args=dict(lr=0.02)), lr_scheduler=dict(type='OneCycleLR', args=dict(max_lr=0.05)),
              trainer=dict(epochs=3, verbosity=0))


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A run that the command line left, once for all tests of this process."
    here = tmp_path_factory.mktemp('trained')
    (here/'parts.py').write_text(PARTS)
    write_points(here)
    (here/'config.json').write_text(json.dumps(CONFIG))
    done = process(TRAIN, 'train', 'config.json', '-d', 'cpu', cwd=here)
    assert done.returncode == 0, done.stderr
    return here


@pytest.fixture
def here(trained, tmp_path):
    "A copy of it, to be mistreated."
    shutil.copytree(trained, tmp_path/'here')
    return tmp_path/'here'


@pytest.fixture
def inside(here, monkeypatch):
    "The same for what is done in this process."
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(str(here))
    sys.modules.pop('parts', None)      # of another test, from another folder
    yield here
    sys.modules.pop('parts', None)


def again(here, *words, code=0, **env):
    done = process(STUDIO, 'points', *words, cwd=here, **env)
    assert done.returncode == code, done.stdout+done.stderr
    return done.stdout


def test_the_same_in_another_process(here):
    before = {o: o.read_bytes() for o in (here/'experiments'/'points').rglob('*') if o.is_file()}
    said = again(here)
    assert 'points came out the same: 18 numbers of 3 epochs are equal to the last digit, and so are the weights.' in said
    assert 'What is not as it was' not in said and said.rstrip().endswith('experiments/points-replay')
    assert {o: o.read_bytes() for o in (here/'experiments'/'points').rglob('*') if o.is_file()} == before     # the run itself is not touched
    record = RunFolder(here/'experiments'/'points-replay').read()
    assert record['status'] == 'finished' and record['replay_of'] == 'experiments/points'
    assert 'points-replay-2' in again(here, '--epochs', 1)


def test_as_many_threads_as_it_had(here):
    said = again(here, OMP_NUM_THREADS='2')
    assert 'came out the same' in said


def test_the_config_file_may_have_been_edited_or_lost(here):
    (here/'config.json').unlink()
    assert 'came out the same' in again(here)


def test_other_data(here):
    write_points(here, 1)
    said = again(here, code=1)
    assert 'did not come out the same' in said and 'first in epoch 1' in said
    assert 'Data:' in said and 'train samples' in said and 'Code:' not in said and 'Config:' not in said


def test_other_code(here):
    (here/'parts.py').write_text(PARTS.replace('Dropout(0.2)', 'Dropout(0.6)'))
    said = again(here, '--epochs', 2, code=1)
    assert 'Code:' in said and 'arch.Net' in said and 'Data:' not in said


def test_code_that_changed_without_an_effect_is_told_as_well(here):
    (here/'parts.py').write_text(PARTS.replace('def forward(self, x): return self.layers(x)', 'def forward(self, x): return self.layers(x)  # as ever'))
    said = again(here)
    assert 'came out the same' in said and 'arch.Net' in said


def test_another_version_is_told_before_and_after(here):
    file = here/'experiments'/'points'/'manifest.json'
    record = json.loads(file.read_text())
    record['versions']['torch'] = '1.0.0'
    file.write_text(json.dumps(record))
    done = process(STUDIO, 'points', '--epochs', '1', cwd=here)
    assert 'torch was 1.0.0' in done.stdout+done.stderr and 'came out the same' in done.stdout
    assert re.search(r'torch +1\.0\.0', done.stdout)


def test_a_number_that_is_not_as_it_was_written(here):
    file = here/'experiments'/'points'/'metrics.csv'
    lines = file.read_text().splitlines()
    cells = lines[2].split(',')
    cells[1] = repr(float(cells[1])*(1+1e-6))
    file.write_text('\n'.join([*lines[:2], ','.join(cells), *lines[3:], '']))
    said = again(here, code=1)
    assert '1 of 18 numbers of 3 epochs differ, first in epoch 2' in said and 'Nothing that is recorded differs' in said
    assert 'came out the same within 1e-05' in again(here, '--tolerance', '1e-5')


def test_a_run_that_was_stopped_is_repeated_as_far_as_it_got(inside):
    exp = Experiment(CONFIG, 'trainer.epochs=4', name='cut', device='cpu')
    exp.trainer.add(When(after_epoch=lambda t: t.stop() if t.epoch == 2 else None))
    exp.fit()
    assert exp.folder.status() == 'stopped'
    found = replay('cut')
    assert found.same and found.epochs == 2 and len(found.again.read()['config']) and found.again.status() == 'stopped'
    exp = Experiment.resume('cut')
    exp.fit()
    found = replay('cut', name='once more')
    assert found.same and found.epochs == 4 and found.weights      # resumed or in one go: the same


def test_a_run_that_began_from_a_checkpoint(inside):
    plain = {**CONFIG, 'lr_scheduler': None}
    Experiment(plain, name='base', device='cpu').fit()
    Experiment.resume('base', 'trainer.epochs=5', name='longer', device='cpu').fit()
    found = replay('longer')
    assert found.same and found.epochs == 5 and found.weights
    shutil.rmtree('experiments/base')
    with pytest.raises(RunError, match='cannot be repeated'): replay('longer')


def test_what_cannot_be_repeated(inside):
    before = sorted(os.listdir('experiments'))
    for words in ('nothing', 'point'):
        with pytest.raises(RunError, match='neither a run folder'): replay(words)
    for n in (0, -1, 4):
        with pytest.raises(RunError, match='1 to 3'): replay('points', epochs=n)
    manifest = Path('experiments/points/manifest.json')
    record = json.loads(manifest.read_text())
    for change, match in [(dict(config=None), 'holds no config'), (dict(processes=2, status='stopped'), 'as a whole')]:
        manifest.write_text(json.dumps(record | change))
        with pytest.raises(RunError, match=match): replay('points')
    manifest.write_text(json.dumps(record | dict(config=record['config'] | dict(arch='Vanished'))))
    with pytest.raises(ConfigError, match='Vanished'): replay('points')
    manifest.write_text(json.dumps(record))
    Path('experiments/points/metrics.csv').unlink()
    with pytest.raises(RunError, match='nothing to compare with'): replay('points')
    assert sorted(os.listdir('experiments')) == before      # nothing was begun


def test_data_that_is_gone(inside):
    Path('points.json').unlink()
    with pytest.raises((StudioError, OSError)): replay('points')
    assert not Path('experiments/points-replay').exists()


def test_a_run_that_is_at_work_is_left_alone(inside):
    run = RunFolder('experiments/points')
    with run.claimed():
        record = json.loads(run.manifest_path.read_text())
        run.manifest_path.write_text(json.dumps(record | dict(status='running', pid=os.getpid())))
        with pytest.raises(RunError, match='still being trained'): replay('points')


def test_a_run_of_two_processes_is_repeated_in_two(here):
    done = process(TRAIN, 'train', 'config.json', '-d', 'cpu', '--name', 'pair', '--nproc', '2', 'trainer.epochs=2', cwd=here)
    assert done.returncode == 0, done.stdout+done.stderr
    done = process(STUDIO, 'pair', cwd=here)
    assert 'pair came out the same' in done.stdout and done.returncode == 0, done.stdout+done.stderr
    assert RunFolder(here/'experiments'/'pair-replay').read()['processes'] == 2
