"""Lists and comparisons of runs over folders that people and machines have mistreated, and in a real browser."""
import json, os, random, shutil, socket, subprocess, sys, threading
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from deep_studio_nb.common.errors import ConfigError, RunError, UnknownName
from deep_studio_nb.experiments.compare import compare
from deep_studio_nb.experiments.run_folder import RunFolder, this_process
from deep_studio_nb.experiments.runs import run_of, runs
from deep_studio_nb.run_commands import reproduce, show_runs
from deep_studio_nb.training.history import History

ROOT = Path(__file__).parents[1]
GONE = 2**22+1   # no process has this number

app = typer.Typer()
app.command('runs')(show_runs)
app.command('reproduce')(reproduce)


def command(*words, error=None):
    "Run a command; all that it printed, or what it failed with."
    res = CliRunner().invoke(app, [str(o) for o in words])
    if error:
        assert isinstance(res.exception, error), (res.exception, res.output)
        return str(res.exception)
    assert res.exit_code==0, (res.output, res.exception)
    return res.output


def make(folder, name, loss=0.5, epochs=3, config=None, **more):
    "A run folder with all that the list and the comparison read."
    rows = [dict(epoch=i, loss=loss+epochs-i, accuracy=i/10, val_loss=loss+epochs-i, val_accuracy=i/10, lr=0.1, seconds=1.) for i in range(1, epochs+1)]
    whole = dict(name=name, seed=0, arch=dict(type='MLP', args=dict(hidden=[8])), optimizer=dict(type='SGD', args=dict(lr=0.1)), metrics=['accuracy'], trainer=dict(epochs=epochs, save_dir=str(folder)))
    record = dict(config=whole | (config or {}), seed=0, device='CPU, 1 thread', processes=1, monitor='min val_loss', epochs=epochs, steps=10*epochs,
                  versions=dict(python='3.11.7', torch='2.15.0'), git=dict(commit='a'*40, branch='main', diff=None), parts={'arch.MLP': dict(place='mlp.py:20', code='b'*64)},
                  data=dict(counts=dict(train=80, valid=20), classes=['cat', 'dog'], input='image', task='classes', folder='data', file=None, fingerprint=dict(train='c'*64, valid='d'*64)),
                  best=dict(epoch=epochs, value=loss), at_best=rows[-1], test=dict(loss=loss, accuracy=0.9), **this_process())
    run = RunFolder.create(folder, name, **(record | more))
    History(rows).save_csv(run.file('metrics.csv'))
    for o in ('best_model.pt', 'last.pt'): run.file('checkpoints', o).write_bytes(b'weights')
    run.update(status='finished')
    return run


def spoil(run, **changes):
    "Change a manifest behind the back of the toolkit; None takes an entry out."
    record = json.loads(run.manifest_path.read_text()) | changes
    run.manifest_path.write_text(json.dumps({k: v for k, v in record.items() if v != 'take out'}))


@pytest.fixture
def folder(tmp_path):
    "Three good runs; what is done to a fourth must not touch them."
    for name, loss in [('digits', 0.5), ('digits-2', 0.4), ('꽃 1', 0.3)]: make(tmp_path, name, loss)
    return tmp_path


GOOD = ['digits', 'digits-2', '꽃 1']


def check_others(folder):
    "The good runs are there as ever, and the table can be shown, sorted and filtered."
    table = runs(folder)
    good = table.where(status='finished', note='none')
    assert [o['run'] for o in good if o['run'] in GOOD] == GOOD
    assert str(table) and table._repr_html_()
    table.sorted_by('best', '-run').add('val_accuracy').only('run', 'status')
    return {o['run']: o for o in table}


# --- folders in a bad state ---

@pytest.mark.parametrize('share', [0, 0.1, 0.5, 0.9, 0.999])
def test_a_manifest_that_was_half_copied(folder, share):
    run = make(folder, 'half')
    whole = run.manifest_path.read_bytes()
    run.manifest_path.write_bytes(whole[:int(len(whole)*share)])
    row = check_others(folder)['half']
    assert row['status'] == 'damaged' and row['note'].startswith('manifest.json cannot be read')
    with pytest.raises(RunError, match='cannot be read'): compare('half', 'digits', save_dir=folder)


@pytest.mark.parametrize('content', [b'\x00'*900, b'\xff\xfe\x00', b'null', b'[]', b'"text"', b'7', b'{}', b'['*200_000, b'{"format": 1' + b'0'*5000 + b'}', '{"format": 1}'.encode('utf-16')])
def test_a_manifest_that_is_none(folder, content):
    make(folder, 'odd').manifest_path.write_bytes(content)
    row = check_others(folder)['odd']
    assert row['status'] == 'damaged' and 'manifest.json' in row['note'] and len(row['note']) < 200


def test_without_a_manifest(folder):
    make(folder, 'lost').manifest_path.unlink()
    bare = make(folder, 'bare')
    shutil.rmtree(bare.path/'checkpoints')
    bare.manifest_path.unlink()
    (folder/'empty').mkdir()
    (folder/'place').mkdir()
    (folder/'place'/'manifest.json').mkdir()
    rows = check_others(folder)
    assert rows['lost']['note'] == 'no manifest.json; use best_model.pt by its path'
    assert rows['bare']['note'] == 'no manifest.json' and rows['empty']['note'] == 'nothing in it'
    assert 'cannot be read' in rows['place']['note']
    assert {rows[o]['status'] for o in ('lost', 'bare', 'empty', 'place')} == {'damaged'}
    with pytest.raises(RunError, match='no `manifest.json`'): run_of('lost', folder)


@pytest.mark.parametrize('format', [0, 2, '1', None, [1]])
def test_a_manifest_of_another_version(folder, format):
    spoil(make(folder, 'other'), format=format)
    row = check_others(folder)['other']
    assert row['status'] == 'damaged' and row['note'] == f'manifest.json has format {format!r}; this version reads 1'
    assert row.value('config.seed') == 0     # what is in it can still be asked for


def test_a_manifest_from_before_an_entry_was_known(folder):
    run = make(folder, 'old')
    for o in ('processes', 'steps', 'at_best', 'versions', 'git', 'parts', 'host', 'device'): spoil(run, **{o: 'take out'})
    spoil(run, data=dict(counts=dict(train=80, valid=20), classes=None))
    assert check_others(folder)['old'].get('note') is None
    said = str(compare('old', 'digits', save_dir=folder))
    assert 'Data: ' in said and 'torch' in said


def test_renamed_moved_and_copied(folder, tmp_path_factory):
    run = make(folder, 'first')
    run.path.rename(folder/'second')
    archive = tmp_path_factory.mktemp('archive')
    shutil.copytree(folder/'digits', archive/'digits')
    shutil.move(folder/'second', archive/'third')
    check_others(folder)
    rows = {o['run']: o for o in runs(archive)}
    assert rows['digits']['note'] == f'moved, was in {folder}'
    assert rows['third']['note'] == f'renamed, was first; moved, was in {folder}'
    assert {o['status'] for o in rows.values()} == {'finished'}
    said = compare(archive/'digits', folder/'digits')
    assert len(set(said.names)) == 2 and not said.config and not said.code and not said.data


def test_killed_and_never_begun(folder):
    run, born = make(folder, 'killed'), make(folder, 'born')
    spoil(run, status='running', pid=GONE)
    spoil(born, status='created', pid=GONE, best=None, at_best=None, epochs=0, test=None)
    broken = make(folder, 'broken')
    spoil(broken, status='failed', error='ValueError: no\nsecond line')
    rows = check_others(folder)
    assert rows['killed']['status'] == 'killed'
    assert rows['born']['note'] == 'its process ended before it began to train'
    assert rows['broken']['note'] == 'ValueError: no'


def test_a_run_that_was_copied_from_another_machine_while_it_ran(folder):
    spoil(make(folder, 'guest'), status='running', host=socket.gethostname()+'-other', pid=1)
    assert check_others(folder)['guest']['status'] == 'killed'      # nobody here has its folder open


def test_files_that_are_gone(folder):
    run = make(folder, 'thin')
    (run.path/'checkpoints'/'best_model.pt').unlink()
    (run.path/'metrics.csv').unlink()
    assert check_others(folder)['thin']['note'] == 'checkpoints/best_model.pt, metrics.csv are gone'


def test_links_and_foreign_folders(folder, tmp_path_factory):
    (folder/'latest').symlink_to(folder/'digits-2')
    (folder/'nowhere').symlink_to(folder/'gone')
    (folder/'circle').symlink_to(folder)
    elsewhere = make(tmp_path_factory.mktemp('elsewhere'), 'far')
    (folder/'far').symlink_to(elsewhere.path)
    (folder/'notes'/'pictures').mkdir(parents=True)
    (folder/'notes'/'a.txt').touch()
    (folder/'.hidden').mkdir()
    make(folder/'sweep', 'trial-1')
    make(folder/'sweep', 'trial-10')
    make(folder/'sweep', 'trial-2')
    names = [o['run'] for o in runs(folder)]
    assert sorted(names) == sorted(['digits', 'digits-2', '꽃 1', 'far', 'sweep/trial-1', 'sweep/trial-10', 'sweep/trial-2'])
    assert run_of('sweep/trial-2', folder).name == 'trial-2'


@pytest.mark.parametrize('seed', range(2))
def test_whatever_a_manifest_holds_the_list_is_there(folder, seed):
    "Every entry, one after the other, replaced by something else."
    draw, run = random.Random(seed), make(folder, 'odd')
    whole = json.loads(run.manifest_path.read_text())
    values = [None, 0, -1.5, True, '', 'text', '2026-13-45', [], [1, [2]], {}, {'type': 5}, {'value': 'x'}, 10**30, 'take out', '\ud83d\ude00', {'trainer': 3}, ['a', None]]
    for key in whole:
        for value in draw.sample(values, 6):
            spoil(run, **(whole | {key: value}))
            rows = check_others(folder)
            assert rows['odd']['run'] == 'odd', (key, value)
            if rows['odd']['status'] == 'damaged':
                with pytest.raises(RunError): compare('odd', 'digits', save_dir=folder)
            else: assert str(compare('odd', 'digits', save_dir=folder)), (key, value)


def test_folders_that_come_and_go_while_they_are_listed(folder):
    stop = threading.Event()

    def busy():
        i = 0
        while not stop.is_set():
            run = make(folder, f'brief-{i}', epochs=1)
            shutil.rmtree(run.path)
            i += 1
    thread = threading.Thread(target=busy)
    thread.start()
    try:
        for _ in range(60): assert {'digits', 'digits-2', '꽃 1'} <= {o['run'] for o in runs(folder)}
    finally:
        stop.set()
        thread.join()


def test_an_unreadable_folder(folder):
    if os.geteuid() == 0: pytest.skip('root may read everything')
    run = make(folder, 'closed')
    run.path.chmod(0)
    try: assert check_others(folder)['closed']['status'] == 'damaged'
    finally: run.path.chmod(0o755)


# --- many ---

def test_a_thousand_runs_are_each_read_once(tmp_path, monkeypatch):
    "What makes the list quick: no torch, and one small file a run. How long it takes is in benchmarks/list_runs.md."
    template = make(tmp_path, 'run')
    for i in range(1, 1000): shutil.copytree(template.path, tmp_path/f'run-{i}', ignore=lambda *_: ['checkpoints'])
    seen = []
    loads = json.loads
    monkeypatch.setattr(json, 'loads', lambda *args, **kw: seen.append(1) or loads(*args, **kw))
    assert len(runs(tmp_path)) == 1000 and len(seen) == 1000


def test_listing_and_comparing_load_no_torch(folder):
    code = ('import sys, typer; from deep_studio_nb.run_commands import show_runs; app = typer.Typer(); app.command()(show_runs)\n'
            'for words in sys.argv[1:]: app(words.split("|"), standalone_mode=False)\nprint("torch" in sys.modules)')
    done = subprocess.run([sys.executable, '-c', code, str(folder), f'{folder}|--where|val_loss<0.45|--sort|-best', f'--compare|digits|digits-2|--dir|{folder}'],
                          capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert done.returncode == 0 and done.stdout.rstrip().endswith('False'), done.stdout+done.stderr


# --- sorting and filtering ---

def names(table): return [o['run'] for o in table]


def test_a_metric_that_one_run_does_not_have(folder):
    make(folder, 'richer', loss=0.2, at_best=dict(epoch=3, val_loss=0.2, val_f1=0.75), test=dict(f1=0.7))
    table = runs(folder)
    assert names(table.where('val_f1>0.5')) == ['richer'] and len(table.where('val_f1=none')) == 3
    assert names(table.sorted_by('val_f1'))[0] == names(table.sorted_by('-val_f1'))[0] == 'richer'
    assert names(table.sorted_by('-test_f1', 'best')) == ['richer', '꽃 1', 'digits-2', 'digits']
    with pytest.raises(UnknownName, match='did you mean `val_f1`'): table.where('val_f2>0.5')
    found = compare('richer', 'digits', save_dir=folder)
    assert 'There is no `val_f1` in `digits`.' in found.notes and 'There is no `val_accuracy` in `richer`.' in found.notes


def test_a_loss_that_is_no_number_comes_last(folder):
    make(folder, 'broken', best=dict(epoch=1, value=float('nan')))
    table = runs(folder)
    assert names(table.sorted_by('best'))[-1] == names(table.sorted_by('-best'))[-1] == 'broken'
    assert 'broken' not in names(table.where('best<1')) and 'broken' not in names(table.where('best>=0'))


@pytest.mark.parametrize('condition', ['', 'best', '<1', 'best <', 'best<good', '=', 'a b=1'])
def test_conditions_that_make_no_sense(folder, condition):
    with pytest.raises((ConfigError, UnknownName)): runs(folder).where(condition)


def test_the_terminal(folder):
    said = command('runs', folder, '--where', 'val_loss<0.45', '--where', 'status=finished', '--sort', '-best', '--columns', 'run,best')
    assert said.splitlines() == ['run       best', 'digits-2  0.4', '꽃 1      0.3']
    make(folder, 'small', config=dict(optimizer=dict(type='SGD', args=dict(lr=0.01))))
    said = command('runs', folder, '--columns', 'run', '--differences')
    assert 'optimizer.args.lr' in said and 'arch' not in said
    assert 'no runs in' in command('runs', folder/'nothing')
    assert 'is a file' in command('runs', folder/'digits'/'metrics.csv', error=RunError)
    assert 'did you mean `val_loss`' in command('runs', folder, '--sort', 'val_los', error=UnknownName)


def test_compare_in_the_terminal(folder, tmp_path):
    said = command('runs', '--compare', 'digits', folder/'digits-2', '꽃 1', '--dir', folder, '--out', tmp_path/'곡선.png')
    assert (tmp_path/'곡선.png').stat().st_size > 5000
    assert 'Config: no differences' in said and said.splitlines()[0].split() == ['digits', 'digits-2', '꽃', '1']
    assert 'two runs or more' in command('runs', '--compare', 'digits', '--dir', folder, error=RunError)
    assert 'did you mean `digits`' in command('runs', '--compare', 'digts', 'digits-2', '--dir', folder, error=RunError)
    assert CliRunner().invoke(app, ['runs', str(folder), 'digits']).exit_code == 2


@pytest.mark.parametrize('content', [b'', b'\x00\x01', b'epoch,loss\n1,two\n', b'epoch,loss\n1,0.5,7,8\n', b'\xff\xfe', b'loss\n0.5\n'])
def test_curves_of_a_damaged_table(folder, content):
    (folder/'digits'/'metrics.csv').write_bytes(content)
    found = compare('digits', 'digits-2', save_dir=folder)
    assert 'digits: none' in [o.get_text() for o in found.plot('accuracy').axes[0].get_legend().get_texts()]
    assert found._repr_html_().startswith('<img')


def test_ten_runs_side_by_side(tmp_path):
    all_of_them = [make(tmp_path, f'run-{i}', loss=i, config=dict(seed=i)) for i in range(12)]
    found = compare(*all_of_them)
    assert len(found.config[0]) == 13 and len(found.plot().axes) == 2
    assert compare(*runs(tmp_path).where('best<2')).names == ['run-0', 'run-1']


# --- in a browser ---

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    pytest.importorskip('jupyterlab', reason='JupyterLab is missing: pip install -e ".[dev]"')
    pytest.importorskip('playwright', reason='playwright is missing: pip install -e ".[dev]"')
    from jupyterlab_driver import JupyterLab, chromium
    if not chromium(): pytest.skip('no browser: apt-get install chromium, or name one in the variable CHROMIUM')
    with JupyterLab(tmp_path_factory.mktemp('lab')) as lab: yield lab


def test_a_click_sorts_and_words_filter(lab, tmp_path):
    page = lab.browser.new_page()      # without any Jupyter around the table
    for i, loss in enumerate([0.5, 0.12391, 0.12388, 12., None, 0.3, 0.7, 0.8, 0.9, 2., 0.6]): make(tmp_path, f'r-{i+1}', loss or 0, best=loss and dict(epoch=1, value=loss), config=dict(seed=i%2))
    page.set_content(runs(tmp_path).only('run', 'best', 'seed')._repr_html_())

    def shown(): return [o.inner_text() for o in page.locator('tbody tr:visible td:first-child').all()]
    assert shown() == [f'r-{i}' for i in range(1, 12)]
    page.click('th:has-text("best")')
    assert shown() == ['r-3', 'r-2', 'r-6', 'r-1', 'r-11', 'r-7', 'r-8', 'r-9', 'r-10', 'r-4', 'r-5']     # by the whole number, not as it is rounded
    page.click('th:has-text("best")')
    assert shown()[0] == 'r-4' and shown()[-1] == 'r-5'      # a run without the value is last either way
    page.click('th:has-text("run")')
    assert shown() == [f'r-{i}' for i in range(1, 12)] and '▲' not in page.inner_text('th:has-text("best")')
    page.fill('input', 'r-1')
    assert shown() == ['r-1', 'r-10', 'r-11']
    page.fill('input', '')
    assert len(shown()) == 11


def test_it_works_in_jupyterlab(lab):
    from test_jupyterlab import write_notebook
    for i in range(1, 12): make(lab.root/'experiments', f'r-{i}', loss=1/i)
    write_notebook(lab.root/'list.ipynb', 'from deep_studio_nb.experiments.runs import runs', 'runs()')
    with lab.open('list.ipynb', lab.root/'list.png') as nb:
        nb.run_all()
        assert nb.errors() == []
        first = nb.cell(2).locator('tbody tr:visible td:first-child')
        assert first.first.inner_text() == 'r-1'
        nb.cell(2).locator('th', has_text='best').click()
        assert first.first.inner_text() == 'r-11'
        nb.cell(2).locator('input').press_sequentially('r-1')      # no letter becomes a command of the notebook
        assert first.count() == 3 and nb.panel.locator('.jp-Cell').count() == 2
