"""What the tests share, and how pytest collects the notebooks: each is one test, run by nbdev's `test_nb` in a process of its own.

The processes are forked from a server that has loaded what most notebooks use, though nothing of ours, so a notebook starts in a moment and
still shares no state with any other. A failure shows the cell's number, id and source, the notebook's own frames and what the cell printed.
"""
import multiprocessing as mp, os, re, shutil, signal, sys, tempfile, traceback
from pathlib import Path
import pytest

ROOT = Path(__file__).parent
PRELOAD = ['torch', 'torchvision.transforms.v2', 'sklearn.datasets', 'pandas', 'matplotlib.figure', 'pydantic', 'omegaconf', 'pytest', 'nbdev.test', 'matplotlib_inline.backend_inline']
NOT_OURS = ('site-packages/execnb', 'site-packages/nbdev', 'site-packages/IPython')

if 'PYTEST_XDIST_WORKER' in os.environ:
    # Workers share the cores: without this each of them, and each process it starts, would begin a thread for every core.
    os.environ.setdefault('OMP_NUM_THREADS', '1')

def pytest_configure(config):
    "Say what processes begin with, and keep what is remembered of files out of the user's own cache."
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell in the background has its children ignore Ctrl-C
    mp.get_context('forkserver').set_forkserver_preload(PRELOAD)   # before the first test that wants the server, whichever that is
    if 'DEEP_STUDIO_CACHE' in os.environ: return   # set by the user, or by the process that started this worker
    os.environ['DEEP_STUDIO_CACHE'] = folder = tempfile.mkdtemp(prefix='deep-studio-cache-')
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))

def pytest_addoption(parser):
    parser.addoption('--nb-flags', default='', help='cells to run that `tst_flags` of settings.ini leaves out, e.g. "slow cuda"')
    parser.addoption('--nb-timeout', type=float, default=600, help='seconds that a notebook may take')

def pytest_collect_file(parent, file_path):
    "Collect every notebook below nbs/."
    if file_path.suffix != '.ipynb' or not file_path.is_relative_to(ROOT/'nbs'): return None
    if any(o[0] in '._' for o in file_path.relative_to(ROOT).parts): return None
    return NotebookFile.from_parent(parent, path=file_path)

@pytest.fixture(scope='session')
def digits(tmp_path_factory):
    "The digits as class folders, written once for all tests of this process; no test changes them."
    from deep_studio_nb.data.digits import write_digits
    return write_digits(tmp_path_factory.mktemp('data')/'digits')

class NotebookFailed(Exception):
    "A notebook that failed; the message is the whole report."

class NotebookFile(pytest.File):
    "A notebook, which holds one test."
    def collect(self): yield Notebook.from_parent(self, name=self.path.stem)

class Notebook(pytest.Item):
    "Run a notebook in a process of its own and report the cell that fails."
    def runtest(self):
        ctx, limit = mp.get_context('forkserver'), self.config.getoption('--nb-timeout')
        receive, send = ctx.Pipe(duplex=False)
        process = ctx.Process(target=run_notebook, args=(send, self.path, self.config.getoption('--nb-flags').split()))
        process.start()
        send.close()
        try:
            if not receive.poll(limit): raise NotebookFailed(f'{self.path.name}: no result within {limit:g} seconds')
            report = receive.recv()
        except EOFError:
            process.join(5)
            raise NotebookFailed(f'{self.path.name}: its process died, exit code {process.exitcode}') from None
        finally:
            process.join(2)
            if process.is_alive():
                process.kill()
                process.join()
        if report: raise NotebookFailed(report)

    def repr_failure(self, excinfo):
        return str(excinfo.value) if excinfo.errisinstance(NotebookFailed) else super().repr_failure(excinfo)

    def reportinfo(self): return self.path, None, self.path.relative_to(ROOT).as_posix()

def run_notebook(send, path, flags):
    "In the new process: run the notebook at `path` and send a report of its failure, or nothing."
    mp.set_start_method(None, force=True)   # the child of a forkserver inherits 'forkserver': give loaders the platform's default back
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    import nbdev.test
    from nbdev.config import get_config
    shells = []
    class Shell(nbdev.test.CaptureShell):
        "Remembers the cell that it ran last."
        def __init__(self, *args, **kwargs):
            shells.append(self)
            super().__init__(*args, **kwargs)
        def cell(self, cell, *args, **kwargs):
            self.last = cell
            return super().cell(cell, *args, **kwargs)
    nbdev.test.CaptureShell = Shell
    try:
        passed, _ = nbdev.test.test_nb(path, get_config().tst_flags.split(), flags, showerr=False, basepath=ROOT)
        report = None if passed else describe(path, shells[-1].last, shells[-1].exc)
    except Exception: report = f'{path.name} could not be run:\n{traceback.format_exc()}'   # no notebook, or gone by now
    send.send(report)
    send.close()

def describe(path, cell, error):
    "What a person needs to know about `cell`, in which `error` was raised."
    source = '\n'.join(f'    {i:3} {line}' for i,line in enumerate(cell.source.splitlines(), 1))
    frames = [o for o in traceback.extract_tb(error.__traceback__) if not any(x in o.filename for x in NOT_OURS)]
    printed = ''.join(''.join(o.get('text', '')) for o in cell.get('outputs') or [] if o.get('output_type') == 'stream')
    printed = re.split(r'^-{60,}$', re.sub(r'\x1b\[[0-9;]*m', '', printed), maxsplit=1, flags=re.M)[0].strip()   # IPython prints the traceback too
    return ''.join([f'{path.relative_to(ROOT).as_posix()}, cell {cell.idx_ + 1} (id {cell.id}):\n{source}\n', *traceback.format_list(frames),
                    *traceback.format_exception_only(error), f'\nprinted by the cell:\n{printed[-2000:]}' if printed else ''])
