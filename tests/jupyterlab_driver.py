"""A real JupyterLab in a headless Chromium, for tests of what a person sees and presses.

    from jupyterlab_driver import JupyterLab
    with JupyterLab(folder) as lab, lab.open('lesson.ipynb') as nb:
        nb.run_all()
        assert nb.errors()==[]
        nb.cell(3).locator('button').click()
        nb.wait_text(nb.cell(3), 'done')

Cells count from 1, every cell counts. What `cell` returns is a Playwright locator. The notebook's file is never written.
"""
import hashlib, json, os, re, secrets, shutil, signal, socket, subprocess, sys, tempfile, time, urllib.request
from contextlib import contextmanager
from pathlib import Path
from playwright.sync_api import Error, sync_playwright

PANEL = '.jp-NotebookPanel:not(.lm-mod-hidden)'
IDLE = '''() => { const w = window.jupyterapp.shell.currentWidget, s = w && w.sessionContext;
    return s && s.isReady && s.session && s.session.kernel && s.session.kernel.status === 'idle' }'''
NOTHING_RUNS = f"() => [...document.querySelectorAll('{PANEL} .jp-InputPrompt')].every(e => !e.textContent.includes('*'))"
ERRORS = '''() => { const found = [];
    window.jupyterapp.shell.currentWidget.content.widgets.forEach((cell, i) => { const outputs = cell.model.outputs;
        for (let j = 0; outputs && j < outputs.length; j++) { const o = outputs.get(j).toJSON();
            if (o.output_type === 'error') found.push([i + 1, o.ename + ': ' + o.evalue]) } });
    return found }'''
SETTINGS = {'notebook-extension/tracker': dict(windowingMode='none', kernelShutdown=True),   # cells off the screen stay in the page
            'docmanager-extension/plugin': dict(autosave=False),                             # the file stays as it is
            'apputils-extension/notification': dict(fetchNews='false', checkForUpdates=False, doNotDisturbMode=True)}

def chromium():
    "The browser: `CHROMIUM` if set, or the first one on the path, or None."
    return os.environ.get('CHROMIUM') or next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)

class JupyterLab:
    "`jupyter lab` over the folder `root`, with settings, workspaces and kernels' files in a temporary home, and a browser."
    def __init__(self, root, timeout=120, size=(1400, 1000), settings=None):
        self.root, self.timeout, self.size, self.settings = Path(root).resolve(), timeout, size, {**SETTINGS, **(settings or {})}

    def __enter__(self):
        self.home = Path(tempfile.mkdtemp(prefix='jupyterlab-'))
        try:
            self._start()
            self.playwright = sync_playwright().start()
            self.browser = self.playwright.chromium.launch(executable_path=chromium(), args=['--no-sandbox', '--disable-dev-shm-usage', '--disable-gpu'])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        if hasattr(self, 'browser'): self.browser.close()
        if hasattr(self, 'playwright'): self.playwright.stop()
        if hasattr(self, 'server') and self.server.poll() is None:
            os.killpg(self.server.pid, signal.SIGTERM)   # a session of its own: the server and its kernels
            try: self.server.wait(15)
            except subprocess.TimeoutExpired: os.killpg(self.server.pid, signal.SIGKILL)
        shutil.rmtree(self.home, ignore_errors=True)

    def _start(self):
        for name,values in self.settings.items():
            file = self.home/'settings/@jupyterlab'/f'{name}.jupyterlab-settings'
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(values))
        folders = dict(JUPYTERLAB_SETTINGS_DIR='settings', JUPYTERLAB_WORKSPACES_DIR='workspaces', JUPYTER_RUNTIME_DIR='runtime', JUPYTER_CONFIG_DIR='config',
                       JUPYTER_DATA_DIR='data', IPYTHONDIR='ipython')
        env = {**os.environ, **{k: str(self.home/v) for k,v in folders.items()}, 'PYTHONPATH': str(Path(__file__).parents[1])}
        for o in ('IN_TEST', 'OMP_NUM_THREADS', 'MPLBACKEND'): env.pop(o, None)   # a person's kernel knows nothing of the test
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        self.token, self.address = secrets.token_hex(16), f'http://127.0.0.1:{port}'
        root = ['--allow-root'] if os.geteuid()==0 else []
        with open(self.home/'server.log', 'w') as log:
            self.server = subprocess.Popen([sys.executable, '-m', 'jupyterlab', '--no-browser', '--ip=127.0.0.1', f'--port={port}', '--ServerApp.port_retries=0',
                f'--IdentityProvider.token={self.token}', f'--ServerApp.root_dir={self.root}', '--LabApp.expose_app_in_browser=True',
                '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate', '--LabApp.news_url=None', *root],
                env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=self.root)
        end = time.monotonic() + self.timeout
        while time.monotonic()<end and self.server.poll() is None:
            try: return urllib.request.urlopen(f'{self.address}/api/status?token={self.token}', timeout=2).close()
            except OSError: time.sleep(.1)
        raise RuntimeError('JupyterLab did not start:\n' + (self.home/'server.log').read_text()[-2000:])

    @contextmanager
    def open(self, path, shot=None):
        "The notebook at `path` below the root, open with an idle kernel; when the block fails a picture of the page goes to the file `shot`."
        if not (self.root/path).is_file(): raise FileNotFoundError(self.root/path)
        page = self.browser.new_page(viewport=dict(zip(('width', 'height'), self.size)))
        page.set_default_timeout(self.timeout*1000)
        nb = Notebook(page, self.timeout)
        try:
            page.goto(f'{self.address}/lab/tree/{path}?token={self.token}&reset')
            page.wait_for_function('() => window.jupyterapp && window.jupyterapp.shell.currentWidget && window.jupyterapp.shell.currentWidget.sessionContext')
            nb.panel.wait_for()
            nb.idle()
            yield nb
            nb.command('notebook:shutdown-kernel')
        except BaseException:
            if shot: page.screenshot(path=shot)
            raise
        finally:
            page.evaluate('() => { const w = window.jupyterapp && window.jupyterapp.shell.currentWidget; if (w && w.context) w.context.model.dirty = false }')
            page.close()

class Notebook:
    "An open notebook; see the module for an example."
    def __init__(self, page, timeout): self.page, self.timeout, self.panel = page, timeout, page.locator(PANEL).first

    def cell(self, n): return self.panel.locator('.jp-Cell').nth(n-1)

    def command(self, name, wait=True, **args):
        "Run a command of JupyterLab, and wait for its end."
        run = 'window.jupyterapp.commands.execute(name, args)'
        self.page.evaluate(f'([name, args]) => {run}.then(() => null)' if wait else f'([name, args]) => {{ {run} }}', [name, args])

    def idle(self): self.page.wait_for_function(IDLE)

    def run_all(self):
        "Run all cells, to the end or to the first error."
        self.command('notebook:run-all-cells')
        self.page.wait_for_function(NOTHING_RUNS)
        self.idle()

    def run(self, n, wait=True):
        "Run cell `n`; `wait=False` to act while it runs."
        self.page.evaluate('n => { window.jupyterapp.shell.currentWidget.content.activeCellIndex = n - 1 }', n)
        self.command('notebook:run-cell', wait=wait)

    def stop(self): self.panel.locator('[data-command="notebook:interrupt-kernel"]').first.click()

    def errors(self): return [tuple(o) for o in self.page.evaluate(ERRORS)]

    def text(self, n): return '\n'.join(self.cell(n).locator('.jp-OutputArea-output').all_inner_texts())

    def wait_text(self, place, pattern):
        "Wait until the text of the locator `place` matches."
        end, text = time.monotonic() + self.timeout, ''
        while time.monotonic()<end:
            if re.search(pattern, text := place.inner_text()): return text
            time.sleep(.05)
        raise AssertionError(f'never matched {pattern!r}; last text: {text[-300:]!r}')

    def pixels(self, place):
        "A hash of what the locator `place` looks like."
        end = time.monotonic() + self.timeout
        while True:   # an output that is drawn anew leaves the page for a moment
            try:
                place.scroll_into_view_if_needed()
                return hashlib.sha256(place.screenshot(timeout=5000)).hexdigest()
            except Error:
                if time.monotonic()>end: raise

    def wait_change(self, place, before):
        "Wait until `place` no longer looks like `before`, which `pixels` gave."
        end = time.monotonic() + self.timeout
        while time.monotonic()<end:
            if (now := self.pixels(place)) != before: return now
        raise AssertionError('looks the same still')

    def settle(self, place, seconds=.4):
        "Wait until the kernel is idle and `place` looks the same for a while; then a picture of it shows the end of what was going on."
        end, last = time.monotonic() + self.timeout, None
        while time.monotonic()<end:
            self.idle()
            if (now := self.pixels(place))==last: return now
            last = now
            time.sleep(seconds)
        raise AssertionError('never came to rest')
