"What pytest says about notebooks: the failing cell's number and source, deaths and timeouts; and that notebooks share nothing."
import json, re, shutil, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
pytest.importorskip('nbdev', reason='nbdev is missing: pip install -e ".[dev]"')

NOTEBOOKS = {
    '00_leaves_traces': ['import torch', 'torch.set_default_dtype(torch.float64)\ntorch.manual_seed(1)'],
    '01_finds_none': ['import torch', 'assert torch.get_default_dtype()==torch.float32'],
    '02_loads': ['from torch.utils.data import DataLoader, Dataset', '''class Squares(Dataset):
    def __len__(self): return 6
    def __getitem__(self, i): return i*i
assert sum(b.sum() for b in DataLoader(Squares(), batch_size=2, num_workers=2))==55'''],
    '03_skips': ['#| slow\n1/0', '#| eval: false\n1/0', 'x = 1'],
    '10_fails': ['x = 1', 'print("about to fail")\ndef f(x): return 1/x\nf(0)', 'y = 1'],
    '11_dies': ['import os', 'os._exit(3)'],
    '12_hangs': ['import time', 'time.sleep(600)'],
    '13_exits': ['import sys', 'sys.exit(0)'],
}

def run_pytest(here, *args):
    "What pytest prints in the tree `here`, where something must fail."
    done = subprocess.run([sys.executable, '-m', 'pytest', '-v', '-p', 'no:cacheprovider', '-p', 'no:xdist', *args], cwd=here, capture_output=True, text=True)
    assert done.returncode==1, done.stdout + done.stderr
    return done.stdout

@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    "A tree of its own that holds `NOTEBOOKS`."
    here = tmp_path_factory.mktemp('tree')
    for o in ('conftest.py', 'settings.ini'): shutil.copy(ROOT/o, here)
    for name,cells in NOTEBOOKS.items():
        made = [dict(cell_type='markdown', id='t', metadata={}, source=f'# {name}\n\n> test')]
        made += [dict(cell_type='code', id=f'c{i}', metadata={}, source=o, outputs=[], execution_count=None) for i,o in enumerate(cells)]
        path = here/'nbs'/('01_y' if 'hangs' in name else '00_x')/f'{name}.ipynb'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dict(cells=made, metadata={}, nbformat=4, nbformat_minor=5)))
    return here

@pytest.fixture(scope='module')
def told(tree): return run_pytest(tree, 'nbs/00_x')

def test_one_result_a_notebook(told):
    results = dict(re.findall(r'^nbs/00_x/(\w+)\.ipynb::\w+ (PASSED|FAILED)', told, re.M))
    assert results=={o: 'PASSED' if o<'10' else 'FAILED' for o in NOTEBOOKS if 'hangs' not in o}

def test_a_failure_shows_the_cell_and_what_it_printed(told):
    assert 'nbs/00_x/10_fails.ipynb, cell 3 (id c1):' in told
    assert '      3 f(0)\n' in told
    assert 'ZeroDivisionError: division by zero' in told
    assert 'printed by the cell:\nabout to fail' in told
    assert 'site-packages/execnb' not in told

def test_a_death_is_told_with_its_code(told): assert '11_dies.ipynb: its process died, exit code 3' in told

def test_an_exit_is_a_failure(told): assert 'SystemExit: 0' in told

def test_a_notebook_that_hangs_is_ended(tree):
    assert '12_hangs.ipynb: no result within 1 seconds' in run_pytest(tree, 'nbs/01_y', '--nb-timeout', '1')
