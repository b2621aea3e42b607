"""The lessons as a person runs them, and training that is stopped by the button, in a real JupyterLab."""
import json, shutil
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


BESIDE = '''import random, torch
import numpy as np
before = exp.trainer.steps
for _ in range(200): torch.rand(10), np.random.rand(), random.random()
print(run.status, torch.rand(1).shape)'''

def test_training_in_the_background(lab):
    "The notebook is free, the curves move, pause and stop are heard; all in the output of the cell that began."
    cells = [TINY.replace("name='tiny'", "name='apart'"), 'run = exp.fit(background=True)', BESIDE, 'run.pause()', 'run.resume();', 'ev = exp.evaluate("valid")\nprint("scored", len(ev.metrics) > 0)',
             'exp.fit()', 'history = run.stop()\nprint(exp.folder.read()["status"], len(history)>0)', 'exp.trainer.epochs = len(history)+2\nagain = exp.fit(background=True).wait()',
             '''straight = Experiment(dict(exp.config.data, name='straight'), device='cpu')
straight.trainer.epochs = exp.trainer.epochs
straight.fit()
print("same", all(torch.equal(v, straight.model.state_dict()[k]) for k,v in exp.model.state_dict().items()))''']
    write_notebook(lab.root/'apart.ipynb', *cells)
    with lab.open('apart.ipynb', lab.root/'apart.png') as nb:
        nb.run(1)
        nb.run(2)
        nb.wait_text(nb.cell(2), r'epoch\s+\d+/100000')
        nb.cell(2).locator('svg[role="img"]').first.wait_for()
        nb.run(3)
        assert nb.text(3).startswith('running')
        nb.run(4)
        nb.wait_text(nb.cell(2), 'paused')
        still = nb.settle(nb.cell(2))
        assert 'paused' in nb.text(4)
        nb.run(5)
        nb.wait_change(nb.cell(2), still)
        nb.run(6)
        assert nb.text(6).strip()=='scored True'
        nb.run(7)
        assert [o[0] for o in nb.errors()]==[7] and 'in the background already' in nb.errors()[0][1]
        nb.run(8)
        assert nb.text(8).strip()=='stopped True'
        nb.wait_text(nb.cell(2), 'Stopped')
        assert nb.cell(2).locator('svg[role="img"]').count()==0 and nb.cell(2).locator('img[src^="data:image/png"]').count()==1
        nb.run(9)
        nb.run(10)
        assert nb.text(10).strip().splitlines()[-1]=='same True'
        assert len(nb.errors())==1
        nb.settle(nb.cell(9))
        nb.command('docmanager:save')
    saved = json.loads((lab.root/'apart.ipynb').read_text())
    for n in (2, 9):
        shown = [o for o in saved['cells'][n-1]['outputs'] if 'data' in o]
        assert len(shown)==1                                                        # one output, however often it was updated
        html = ''.join(shown[0]['data']['text/html'])
        assert '<table>' in html and 'data:image/png' in html and '<svg' not in html and 'widget' not in html
        assert 'epoch' in ''.join(shown[0]['data']['text/plain'])
