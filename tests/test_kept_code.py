"""Classes of a notebook: trained in a kernel, gone on with, scored and repeated in processes that do not know them."""
import os, shutil, subprocess, sys, textwrap
from pathlib import Path

import pytest
import torch

from deep_studio_nb.common.errors import ConfigError, RunError
from deep_studio_nb.common.registry import MODELS, REGISTRIES
from deep_studio_nb.experiments.run_folder import RunFolder
from deep_studio_nb.experiments.trained import load_trained
from deep_studio_nb.training.checkpoints import load_checkpoint

ROOT = Path(__file__).parents[1]
STUDIO = 'import sys; from deep_studio_nb.cli import main; main()'
REPRODUCE = 'import sys, typer; from deep_studio_nb.run_commands import reproduce; app = typer.Typer(); app.command()(reproduce); sys.exit(app(sys.argv[1:], standalone_mode=False) or 0)'

CELLS = ['''
    import math
    import torch
    import torch.nn.functional as F
    from torch import nn
    from fastcore.basics import patch
    from deep_studio_nb.all import *
''', '''
    WIDTH = 16
    def smooth(x): return F.softplus(x, beta=math.e)
''', '''
    @DATASETS.register
    class Points(Tensors):
        def __init__(self, n:int=160):
            x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
            super().__init__(x, (x[:,0]*x[:,1]>0).long(), ['no', 'yes'])

    @MODELS.register
    class Net(nn.Module):
        "A net of a notebook."
        def __init__(self, deep:bool=True):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(2, WIDTH), nn.Dropout(0.2), nn.Linear(WIDTH, 2))

    @LOSSES.register
    def sharp(preds, target, power:float=1.5): return F.cross_entropy(preds*power, target)
''', '''
    @patch
    def forward(self:Net, x):
        a,b,c = self.layers
        return c(b(smooth(a(x))))
''', '''
    config = dict(name='points', dataset='Points', data_loader=dict(type='DataLoader', args=dict(batch_size=32, validation_split=0.25)), arch='Net', loss=dict(type='sharp', args=dict(power=2.)),
                  metrics=['accuracy'], optimizer=dict(type='AdamW', args=dict(lr=0.02)), trainer=dict(epochs=3, verbosity=0), device='cpu')
''']


def notebook(here, *cells):
    "Run cells in a kernel of their own, whose folder is `here`."
    nbclient,nbformat = pytest.importorskip('nbclient'),pytest.importorskip('nbformat')
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(textwrap.dedent(o).strip()) for o in cells])
    nb.metadata['kernelspec'] = dict(name='python3', display_name='python3', language='python')
    kept = os.environ.get('PYTHONPATH'),os.environ.get('OMP_NUM_THREADS')
    os.environ.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    try: nbclient.NotebookClient(nb, timeout=300, kernel_name='python3', resources=dict(metadata=dict(path=str(here)))).execute()
    finally:
        for k,v in zip(('PYTHONPATH','OMP_NUM_THREADS'), kept): os.environ.pop(k) if v is None else os.environ.update({k: v})
    return [''.join(o.get('text', '') for o in c.outputs if o.output_type=='stream') for c in nb.cells]


def process(code, *words, cwd):
    return subprocess.run([sys.executable, '-c', code, *map(str, words)], cwd=cwd, env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'), capture_output=True, text=True, timeout=300)


@pytest.fixture(autouse=True)
def names_as_before(monkeypatch):
    "What a test registers in this process is gone after it."
    for o in REGISTRIES.values():
        for kept in ('_parts', '_homes'): monkeypatch.setattr(o, kept, dict(getattr(o, kept)))


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "Two runs of one notebook: `points` was left alone, `cut` was stopped in the middle of its second epoch."
    here = tmp_path_factory.mktemp('kernel')
    notebook(here, *CELLS, "Experiment(config).fit();", '''
        cut = Experiment(config, name='cut')
        cut.trainer.add(When(after_batch=lambda t: t.steps==6 and t.stop()))
        cut.fit();
    ''')
    return here


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    "A copy of them, to be mistreated, in a process that does not know the classes."
    shutil.copytree(trained, tmp_path/'here')
    monkeypatch.chdir(tmp_path/'here')
    return tmp_path/'here'


def weights(run): return load_checkpoint(Path(run)/'checkpoints'/'last.pt')['model']


def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_what_the_run_used_is_in_its_folder_and_on_record(here):
    record = RunFolder('experiments/points').read()
    text = Path('experiments/points/code/notebook.py').read_text()
    assert record['code']['parts'] == dict(dataset=['Points'], model=['Net'], loss=['sharp']) and record['code']['missing'] == []
    assert 'code/notebook.py' in record['files']
    for o in ('WIDTH = 16', 'def smooth', '@patch\ndef forward(self:Net, x)', 'import torch.nn.functional as F', 'import math'): assert o in text
    assert 'config = ' not in text and 'import *' not in text
    alone = process(text, cwd='/')       # it can be imported by itself
    assert alone.returncode == 0, alone.stderr


def test_without_a_word_nothing_is_run_and_the_error_says_what_to_type(here):
    Path('experiments/cut/code/notebook.py').write_text("open('was_run', 'w').write('')\n"+Path('experiments/cut/code/notebook.py').read_text())
    for words,command in ((['train', '--resume', 'experiments/cut'], 'deep-studio train --resume experiments/cut --trust-code'), (['eval', 'cut'], 'deep-studio eval cut --trust-code'),
                          (['train', 'experiments/cut/config.yaml'], 'deep-studio train experiments/cut/config.yaml --trust-code')):
        done = process(STUDIO, *words, cwd=here)
        assert done.returncode == 1 and command in done.stderr and '`Points`, `Net`, `sharp`' in done.stderr and 'experiments/cut/code/notebook.py' in done.stderr, done.stderr
        assert 'Traceback' not in done.stderr
    done = process(REPRODUCE, 'experiments/cut', cwd=here)
    assert 'deep-studio reproduce experiments/cut --trust-code' in done.stderr
    assert not Path('was_run').exists()
    with pytest.raises(RunError, match='was changed since the run kept it'): load_trained('cut', trust_code=True)
    assert not Path('was_run').exists()


def test_the_command_line_goes_on_scores_and_repeats_to_the_last_bit(here):
    done = process(STUDIO, 'train', '--resume', 'experiments/cut', '--trust-code', cwd=here)
    assert done.returncode == 0, done.stderr
    assert 'has changed' not in done.stdout+done.stderr
    assert same(weights('experiments/cut'), weights('experiments/points'))
    record = RunFolder('experiments/cut').read()
    assert record['status'] == 'finished' and record['code']['file'] == 'code/notebook.py'
    done = process(STUDIO, 'eval', 'points', '--split', 'valid', '--trust-code', cwd=here)
    assert done.returncode == 0 and f'{RunFolder("experiments/points").read()["valid"]["accuracy"]:.4g}'[:5] in done.stdout, done.stdout+done.stderr
    done = process(STUDIO, 'reproduce', 'points', '--trust-code', cwd=here)
    assert done.returncode == 0 and 'are equal to the last digit, and so are the weights' in done.stdout, done.stdout+done.stderr
    again = RunFolder('experiments/points-replay')      # which keeps the code as well
    assert (again.path/'code'/'notebook.py').read_bytes() == Path('experiments/points/code/notebook.py').read_bytes()
    assert not list(Path('experiments').rglob('__pycache__'))


RESUME = '''
exp = Experiment.resume(sys.argv[1], trust_code=True)
assert not exp.told, exp.told
exp.fit()
'''


def test_a_folder_that_was_moved_and_renamed_brings_its_code_along(here, tmp_path):
    there = tmp_path/'다른 곳'
    there.mkdir()
    shutil.move('experiments/cut', there/'renamed run')
    done = process('import sys\nfrom deep_studio_nb.experiments.experiment import Experiment\n'+RESUME, there/'renamed run', cwd=there)
    assert done.returncode == 0, done.stderr
    assert same(weights(there/'renamed run'), weights('experiments/points'))


def test_the_notebook_after_a_restart_needs_no_word(here):
    out = notebook(here, *CELLS, '''
        exp = Experiment.resume('cut')
        print(exp.told, [o.name for o in exp.folder.path.glob('code/*')])
        exp.fit();
    ''')
    assert "[] ['notebook.py']" in out[-1], out[-1]
    assert same(weights('experiments/cut'), weights('experiments/points'))


def test_a_class_that_was_changed_is_told_and_both_are_kept(here):
    cells = [o.replace('nn.Dropout(0.2)', 'nn.Dropout(0.1)') for o in CELLS]
    out = notebook(here, *cells, '''
        exp = Experiment.resume('cut')
        print(exp.told)
        exp.fit();
        print(sorted(o.name for o in exp.folder.path.glob('code/*')), exp.folder.read()['code']['file'])
    ''')
    assert 'The code of `Net` (arch) has changed since the run began' in out[-1]
    assert "['notebook-2.py', 'notebook.py'] code/notebook-2.py" in out[-1]


def test_two_classes_of_one_name_are_not_mixed_up(here):
    "A process that has another class under the name of a kept one is told, not given the wrong one."
    out = notebook(here, *CELLS[:1], '''
        @MODELS.register
        class Net(nn.Module):
            def forward(self, x): return x
    ''', '''
        try: load_trained('points', trust_code=True)
        except Exception as e: print(type(e).__name__, e)
    ''')
    assert out[-1].startswith('NameTaken `Net` is already a model, from a notebook cell') and 'code/notebook.py' in out[-1]


LACKS = '''
    shift = torch.ones(2)
    @LOSSES.register
    def moved(preds, target): return F.cross_entropy(preds+shift, target)
    def make():
        class Inner(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(2, 2)
            def forward(self, x): return self.layer(x)
        return Inner
    MODELS.register('inner')(make())
    LOSSES.register('short')(lambda preds, target: F.cross_entropy(preds, target))
'''


def test_what_cannot_be_kept_is_named_when_the_run_begins(here):
    out = notebook(here, *CELLS, LACKS, '''
        Experiment(config, 'loss=moved', 'trainer.epochs=1', 'trainer.verbosity=1', name='moved').fit();
        Experiment(config, 'arch=inner', 'loss=short', 'trainer.epochs=1', 'trainer.verbosity=1', name='inner').fit();
    ''')
    for o in ('`shift`, which `moved` uses, is a Tensor', '`Inner` was made inside `make`', '`<lambda>` is a lambda'): assert o in out[-1], out[-1]
    assert RunFolder('experiments/moved').read()['code']['missing'] and len(RunFolder('experiments/inner').read()['code']['missing']) == 2
    with MODELS.temporary(), pytest.raises((ConfigError, RunError), match='inner'): load_trained('inner', trust_code=True)


def test_a_script_is_kept_like_a_notebook(tmp_path):
    (tmp_path/'script.py').write_text('\n'.join(textwrap.dedent(o) for o in CELLS)+"\nExperiment(config).fit()\n")
    done = subprocess.run([sys.executable, 'script.py'], cwd=tmp_path, env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    done = process("import sys\nfrom deep_studio_nb.experiments.trained import load_trained\nprint(load_trained('points', trust_code=True).evaluate('valid').metrics)", cwd=tmp_path)
    assert done.returncode == 0 and 'accuracy' in done.stdout, done.stderr


# --- processes that the notebook starts ---

def test_processes_of_the_notebook_know_its_classes(tmp_path):
    "Folds side by side, and one training of two processes: they are told the source, and need no word."
    out = notebook(tmp_path, *CELLS, '''
        tiny = dict(config, trainer=dict(config['trainer'], epochs=1))
        kfold(tiny, folds=2, jobs=2, name='apart')
        kfold(tiny, folds=2, name='here')
        launch(dict(tiny, name='two'), nproc=2);
    ''', '''
        shift = torch.zeros(2)
        @LOSSES.register
        def moved(preds, target): return F.cross_entropy(preds+shift, target)
        for start in (lambda: kfold(tiny, 'loss=moved', folds=2, jobs=2, name='refused'), lambda: launch(tiny, 'loss=moved', nproc=2), lambda: sweep(tiny, dict(loss=['moved', 'sharp']), jobs=2, trials=1, name='never')):
            try: start()
            except RunError as e: print(e)
    ''')
    runs = tmp_path/'experiments'
    for k in range(2):
        apart, alone = runs/'apart'/f'fold-{k}', runs/'here'/f'fold-{k}'
        assert same(weights(apart), weights(alone)) and (apart/'code'/'notebook.py').read_bytes()==(alone/'code'/'notebook.py').read_bytes()
    record = RunFolder(runs/'two').read()
    assert (record['status'], record['processes'], record['code']['parts']['model'], record['config'].get('imports') or []) == ('finished', 2, ['Net'], [])
    assert out[-1].count('`shift`, which `moved` uses, is a Tensor') == out[-1].count('in this process alone') == 3, out[-1]
    assert not list(runs.glob('refused/*/manifest.json')) and not list(runs.glob('never/*/manifest.json'))


@pytest.mark.slow
def test_trials_and_the_proof_of_resuming_know_them_too(tmp_path):
    out = notebook(tmp_path, *CELLS, '''
        found = sweep(config, {'loss': ['sharp', 'cross_entropy'], 'optimizer.args.lr': [0.01, 0.02]}, jobs=2, sampler='grid', trials=4)
        print([o['status'] for o in found.table()])
        print('exact', verify_resume(config).exact)
    ''')
    assert "['finished', 'finished', 'finished', 'finished']" in out[-1] and 'exact True' in out[-1], out[-1]
    assert len(list((tmp_path/'experiments').glob('*-sweep/*/code/notebook.py'))) == 4
