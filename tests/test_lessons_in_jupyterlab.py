"""The lessons as a person runs them, and training that is stopped by the button, in a real JupyterLab."""
import shutil
from pathlib import Path
import pytest

pytest.importorskip('jupyterlab', reason='JupyterLab is missing: pip install -e ".[dev]"')
pytest.importorskip('playwright', reason='playwright is missing: pip install -e ".[dev]"')
from jupyterlab_driver import JupyterLab, chromium
from test_jupyterlab import write_notebook

pytestmark = pytest.mark.skipif(not chromium(), reason='no browser: apt-get install chromium, or name one in the variable CHROMIUM')
ROOT = Path(__file__).resolve().parent.parent
TINY = '''from deep_studio_nb.all import *
exp = Experiment(dict(name='tiny', dataset='Digits', data_loader=dict(type='DataLoader', args=dict(batch_size=64)), arch='MLP', loss='cross_entropy',
                      metrics=['accuracy'], optimizer=dict(type='SGD', args=dict(lr=1e-4)), trainer=dict(epochs=100000, save_period=100000, threads=1)), device='cpu')'''


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "JupyterLab over a folder with the lessons and the configs, as in a checkout, and the package of this one."
    root = tmp_path_factory.mktemp('studio')
    shutil.copytree(ROOT/'nbs'/'tutorials', root/'nbs'/'tutorials', ignore=shutil.ignore_patterns('.*'))
    shutil.copytree(ROOT/'configs', root/'configs')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', str(ROOT))
        patch.delenv('IN_TEST', raising=False)
        with JupyterLab(root, timeout=300) as lab: yield lab


def test_the_first_lesson(lab):
    with lab.open('nbs/tutorials/01_first_run.ipynb', lab.root/'first_run.png') as nb:
        nb.run_all()
        assert nb.errors() == []
    run = lab.root/'experiments'/'quickstart'
    assert (run/'figures'/'loss_curve.png').exists() and (run/'checkpoints'/'best_model.pt').exists()


def test_stop_finishes_the_step_saves_and_goes_on(lab):
    write_notebook(lab.root/'stop.ipynb', TINY, 'history = exp.fit()', 'print("stopped", exp.trainer.stopped, exp.folder.read()["status"], len(history) > 0)',
                   'done = len(history)\nexp.trainer.epochs = done+2\nhistory = exp.fit()', 'print("went on", len(history) == done+2, exp.folder.read()["status"])')
    with lab.open('stop.ipynb', lab.root/'stop.png') as nb:
        nb.run(1)
        nb.run(2, wait=False)
        nb.wait_text(nb.cell(2), r'epoch\s+3/100000|epoch\s+\d\d+/100000')
        nb.stop()
        nb.wait_text(nb.cell(2), 'Stopped')
        nb.run(3)
        assert nb.text(3).strip() == 'stopped True stopped True'
        nb.run(4)
        nb.run(5)
        assert nb.errors() == []
        assert nb.text(5).strip() == 'went on True finished'
    assert (lab.root/'experiments'/'tiny'/'checkpoints'/'last.pt').exists() and not (lab.root/'experiments'/'tiny-2').exists()
