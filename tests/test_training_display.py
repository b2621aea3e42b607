"""What a kernel sends while a model is trained: one output, updated now and then, and in the end a table and a picture that stay."""
import os, re
from pathlib import Path
import pytest

nbclient = pytest.importorskip('nbclient', reason='nbclient is missing: pip install -e ".[dev]"')
from nbformat.v4 import new_code_cell, new_notebook

HERE = Path(__file__).parent
START = f'''import sys
sys.path[:0] = {[str(HERE.parent), str(HERE)]!r}
import torch
from deep_studio_nb.training.progress import Progress
from deep_studio_nb.training.trainer import validate
from training_toy import trainer'''

class Listening(nbclient.NotebookClient):
    "Keeps all messages that show something, each with the cell that it belongs to."
    def process_message(self, msg, cell, cell_index):
        if msg['msg_type'] in ('display_data', 'update_display_data', 'stream', 'error'): self.heard.append((cell_index, msg['msg_type'], msg['content']))
        return super().process_message(msg, cell, cell_index)

def run(*cells):
    "Run `cells` in a kernel; the cells with their outputs, and what was sent."
    nb = new_notebook(cells=[new_code_cell(o) for o in (START, *cells)])
    client = Listening(nb, timeout=120, kernel_name='python3')
    client.heard = []
    with pytest.MonkeyPatch.context() as patch:
        for o in ('IN_TEST', 'MPLBACKEND'): patch.delenv(o, raising=False)
        client.execute()
    return nb.cells[1:], client.heard

def shown(cell): return [o for o in cell.outputs if 'data' in o]

def is_kept(output):
    "A table and a picture in plain HTML, and text for whoever shows no HTML."
    html = output['data']['text/html']
    return '<table>' in html and 'data:image/png;base64,' in html and '<svg' not in html and 'loss' in output['data']['text/plain'] and set(output['data'])=={'text/html', 'text/plain'}

def test_one_output_however_many_epochs():
    cells, heard = run('t = trainer(epochs=300, scheduler=None, progress=True, restore_best=False)\nt.train();')
    kinds = [o[1] for o in heard]
    assert kinds.count('display_data')==1 and 'error' not in kinds
    updates = [o[2] for o in heard if o[1]=='update_display_data']
    assert 1<=len(updates)<120                                             # 300 epochs of 6 steps
    ids = {o[2]['transient']['display_id'] for o in heard if 'display' in o[1]}
    assert len(ids)==1
    assert max(len(str(o['data'])) for o in updates[:-1])<60_000           # curves while it works are small
    assert len(shown(cells[0]))==1 and is_kept(shown(cells[0])[0])
    assert '<td>300</td>' in shown(cells[0])[0]['data']['text/html'] and '200 earlier epochs' in shown(cells[0])[0]['data']['text/html']

def test_validation_at_any_time():
    cells, _ = run('t = trainer(epochs=3, scheduler=None, progress=True)\nprint(validate(t.model, t.valid_loader, "cross_entropy"), t._valid_epoch(1)["val_loss"]>0)',
                   'from deep_studio_nb.training.events import When\nt.add(When(after_batch=lambda t: validate(t.model, t.valid_loader)))\nt.train();',
                   'print(validate(t.model, t.valid_loader, "cross_entropy"), t._valid_epoch(1)["val_loss"]>0)', 't.epochs = 4\nt.train();')
    assert [len(shown(o)) for o in cells]==[0, 1, 0, 1]
    assert is_kept(shown(cells[1])[0]) and '<td>3</td>' in shown(cells[1])[0]['data']['text/html'] and '<td>4</td>' not in shown(cells[1])[0]['data']['text/html']
    assert '<td>4</td>' in shown(cells[3])[0]['data']['text/html']         # the second training has an output of its own

def test_the_background_writes_into_the_cell_that_began_it():
    cells, heard = run('t = trainer(epochs=4, progress=True)\nrun = t.train(background=True)', 'print(torch.rand(1).shape)', 'history = run.wait()', 'print(run.status)')
    assert [len(shown(o)) for o in cells]==[1, 0, 0, 0]
    assert is_kept(shown(cells[0])[0]) and '<td>4</td>' in shown(cells[0])[0]['data']['text/html']
    assert cells[3].outputs[0]['text']=='finished\n' and not any(o[1]=='error' for o in heard)

def test_the_error_of_the_background_stands_below_the_table():
    cells, _ = run('from deep_studio_nb.training.events import When\ndef fail(t):\n    if t.steps==15: raise ValueError("no batch today")\nt = trainer(progress=True, callbacks=[When(after_batch=fail)])\nrun = t.train(background=True)',
                   'try: run.wait()\nexcept ValueError as e: print("told:", e)')
    html = shown(cells[0])[0]['data']['text/html']
    assert 'failed: ValueError: no batch today' in html and '<td>2</td>' in html and 'data:image/png' in html
    assert 'told: no batch today' in cells[1].outputs[-1]['text']

def test_plain_lines_where_there_is_no_terminal(tmp_path):
    import subprocess, sys
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(HERE.parent), str(HERE)]), 'OMP_NUM_THREADS': '1'}
    code = 'from training_toy import trainer\ntrainer(epochs=3, progress=True).train()\ntrainer(epochs=2, progress=True).train(background=True).wait()'
    p = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, timeout=120)
    assert p.returncode==0, p.stderr
    assert '\x1b' not in p.stdout and '\r' not in p.stdout
    assert [re.match(r'epoch (\d/\d)  loss ', o)[1] for o in p.stdout.splitlines() if o.startswith('epoch')]==['1/3', '2/3', '3/3', '1/2', '2/2']
