"Tidying, archives and exports: killed at every step, on full disks, with links and files of others, and runs that are at work or needed."
import errno, json, multiprocessing, os, random, resource, shutil, signal, subprocess, sys, zipfile
from contextlib import suppress
from pathlib import Path
import pytest
from deep_studio_nb.common.errors import RunError, StudioError
from deep_studio_nb.common.files import write_json
from deep_studio_nb.experiments import archive as archive_module, tidy
from deep_studio_nb.experiments.archive import archive
from deep_studio_nb.experiments.opening import open_run_zip
from deep_studio_nb.experiments.removing import leftovers, own_files, remove_run
from deep_studio_nb.experiments.run_folder import RunFolder, this_process
from deep_studio_nb.experiments.run_zip import export_run
from deep_studio_nb.experiments.runs import runs
from deep_studio_nb.experiments.tidy import prune

ROOT = Path(__file__).parents[1]
posix = pytest.mark.skipif(os.name!='posix', reason='signals and locks of POSIX')

def make(name, value=0.5, folder='experiments', status='finished', size=3000, **more):
    "A run folder as training leaves it."
    record = dict(monitor='min val_loss', epochs=3, best=dict(epoch=1, value=value), at_best=dict(epoch=1, val_loss=value), seed=0,
                  config=dict(name=name, arch='MLP', loss='cross_entropy', trainer=dict(save_dir=str(folder))), data=dict(fingerprint=dict(valid='aa')), **this_process())
    run = RunFolder.create(folder, name, **(record | more))
    draw = random.Random(name)
    for o in ('best_model.pt', 'last.pt', 'epoch_002.pt'): run.file('checkpoints', o).write_bytes(draw.randbytes(size))
    run.file('metrics.csv').write_text('epoch,loss\n1,0.5\n')
    run.file('logs', 'training.log').write_text('로그\n'*100)
    run.update(status=status)
    return run

def content(folder):
    "Every file below a folder, by name."
    return {o.relative_to(folder).as_posix(): o.read_bytes() for o in sorted(Path(folder).rglob('*')) if o.is_file() and not o.is_symlink()}

def weights(run): return {k: v for k, v in content(run).items() if not k.endswith('.json')}
def hidden(folder='.'): return [str(o) for o in Path(folder).rglob('.*')]

@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path

# --- a process that is killed at every step ---

STEPS = {'open', 'os.remove', 'os.rename', 'os.rmdir', 'os.mkdir', 'os.listdir', 'os.scandir'}

def killed_at(step, act):
    "Fork, do something, and be killed at one of its steps in the file system; whether it came so far."
    sys.stdout.flush()
    child = os.fork()
    if not child:
        left = [step]
        def count(event, args):
            if event not in STEPS: return
            if not left[0]: os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
        try:
            sys.addaudithook(count)
            act()
        except BaseException as e:
            print(repr(e), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code!=0

def every_step(begin, act, check):
    "Kill at the first step, the second, and so on, until nothing is killed any more; how many steps there were."
    for step in range(2000):
        shutil.rmtree('place', ignore_errors=True)
        os.mkdir('place')
        begin()
        killed = killed_at(step, act)
        check()
        if not killed: return step
    raise AssertionError('it has no end')

@posix
def test_a_prune_that_is_killed_at_every_step(here):
    def begin():
        for i in range(3):
            run = make(f'꽃-{i}', i, 'place')
            (run.path/'checkpoints'/'mine.txt').write_text('mine') if i==1 else None
    def check():
        for row in runs('place'):
            whole = row['status']=='finished'
            if whole: assert len(own_files(row.run.path, row.record).own)==5      # listed, and with all it had
            else: assert row['status']=='damaged' and (row.run.path in list(leftovers('place')) or list(content(row.run.path))==['checkpoints/mine.txt'])
        prune('keep best 1', 'place', do=True)
        assert [o['run'] for o in runs('place') if o['status']=='finished']==['꽃-0'] and not list(leftovers('place')) and not hidden('place')
        assert set(content('place'))-set(content('place/꽃-0'))=={f'꽃-0/{o}' for o in content('place/꽃-0')} | {'꽃-1/checkpoints/mine.txt'}
    assert every_step(begin, lambda: prune('keep best 1', 'place', do=True), check)>30

@posix
def test_thinning_that_is_killed_at_every_step(here):
    def begin(): make('꽃', folder='place')
    def check():
        assert runs('place')[0]['status']=='finished'
        prune('keep checkpoints best', 'place', do=True)
        row = runs('place')[0]
        assert row.get('note') is None and sorted(weights('place/꽃'))==['checkpoints/best_model.pt', 'logs/training.log', 'metrics.csv'] and len(row.record['files'])==4
    assert every_step(begin, lambda: prune('keep checkpoints best', 'place', do=True), check)>5

@posix
def test_an_archive_that_is_killed_at_every_step(here):
    def begin():
        make('꽃', folder='place')
        Path('place/꽃/notes.txt').write_text('mine')
    def act(): archive('place/꽃', to='place/archive', show=False)
    def check():
        there = Path('place/꽃/manifest.json').exists()
        zips = list(Path('place').glob('archive/*.zip'))
        assert there or zips, 'nothing is lost'
        if there:
            assert len(own_files('place/꽃', runs('place')['꽃'].record).own)==5
            act()
        prune('drop failed', 'place', do=True)              # finishes what is half removed
        assert content('place/꽃')=={'notes.txt': b'mine'} and [o.name for o in Path('place/archive').iterdir() if not o.name.startswith('.unfinished')]==['꽃.zip']
        opened = open_run_zip('place/archive/꽃.zip', 'place/opened', show=False)
        assert weights(opened.path)==weights(make('꽃', folder='place/again').path)
    assert every_step(begin, act, check)>40

@posix
def test_an_export_that_is_killed_at_every_step(here):
    def begin(): make('꽃', folder='place')
    def act(): export_run('place/꽃', 'place/out/꽃.zip', show=False)
    def check():
        if not Path('place/out/꽃.zip').exists(): act()
        else: export_run('place/꽃', 'place/out/other.zip', show=False)
        assert not hidden('place')                           # what the dead have left is gone
        assert weights(open_run_zip('place/out/꽃.zip', 'place/opened', show=False).path)==weights('place/꽃')
    assert every_step(begin, act, check)>20

@posix
def test_opening_that_is_killed_at_every_step(here):
    make('꽃', folder='made')
    export_run('made/꽃', '꽃.zip', show=False)
    def act(): open_run_zip('꽃.zip', 'place/runs', show=False)
    def check():
        for row in runs('place/runs'): assert row['status']=='finished' and weights(row.run.path)==weights('made/꽃') or row['note']=='nothing in it'
        act()
        assert not hidden('place') and any(weights(o.run.path)==weights('made/꽃') for o in runs('place/runs'))
    assert every_step(lambda: None, act, check)>20

SLOW = '''
import sys, time
from deep_studio_nb.experiments import run_zip
from deep_studio_nb.experiments.archive import archive
from deep_studio_nb.experiments.opening import open_run_zip
real, said = run_zip.copy_hashed, []
def slow(source, target, seen=lambda n: None):
    def told(n):
        seen(n)
        said.append(n)
        if len(said)==3: print('at work', flush=True); time.sleep(60)
    return real(source, target, told)
run_zip.copy_hashed = slow
import deep_studio_nb.experiments.opening as opening
opening.copy_hashed = slow
try: {act}
except KeyboardInterrupt: sys.exit(130)
'''

@posix
@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize('act', ["run_zip.export_run('꽃', 'out/꽃.zip')", "archive('꽃', to='out')", "open_run_zip('꽃.zip', 'out')"])
def test_stopped_in_the_middle_of_a_large_file(here, act, how):
    run = make('꽃', size=8_000_000)
    before = content(run.path)
    export_run(run, '꽃.zip', show=False)
    with subprocess.Popen([sys.executable, '-c', SLOW.format(act=act)], env=dict(os.environ, PYTHONPATH=str(ROOT)), stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline()=='at work\n'
        with pytest.raises(RunError, match='another process') if 'open' not in act else pytest.raises(ZeroDivisionError):
            remove_run(run) if 'open' not in act else 1/0          # while it is packed nobody may take it away
        child.send_signal(how)
        assert child.wait(60)==(130 if how==signal.SIGINT else -how)
    assert [o for o in Path('out').iterdir() if not o.name.startswith('.')]==[] and content(run.path)==before
    if how==signal.SIGINT: assert not list(Path('out').iterdir())
    open_run_zip('꽃.zip', 'out', show=False)
    assert os.listdir('out')==['꽃']

# --- files of others ---

def test_what_no_manifest_lists_survives_everything(here):
    run = make('꽃')
    mine = {'notes.txt': b'1', 'checkpoints/mine.pt': b'2', '.hidden': b'3', 'logs/deep/er/log.txt': b'4', 'predictions/메모.csv': b'5'}
    for k, v in mine.items():
        (run.path/k).parent.mkdir(parents=True, exist_ok=True)
        (run.path/k).write_bytes(v)
    (run.path/'empty of mine').mkdir()
    said = prune('drop 꽃')
    assert '5 files in experiments/꽃 will stay' in str(said) and run.manifest_path.exists()
    said = prune('drop 꽃', do=True)
    assert content(run.path)==mine and 'is still in experiments/꽃' in str(said) and (run.path/'empty of mine').is_dir()
    assert runs()[0]['status']=='damaged' and not prune('keep best 1', do=True).going and content(run.path)==mine

def test_links_are_never_followed(here):
    outside, other = here/'outside', make('other')
    (outside/'deep').mkdir(parents=True)
    (outside/'deep'/'precious.pt').write_bytes(b'precious')
    before, run = content(other.path), make('linked')
    shutil.rmtree(run.path/'logs')
    (run.path/'logs').symlink_to(outside/'deep')
    (run.path/'checkpoints'/'last.pt').unlink()
    (run.path/'checkpoints'/'last.pt').symlink_to(outside/'deep'/'precious.pt')
    (run.path/'to other').symlink_to(other.path)
    run.update(files=[*run.read()['files'], 'logs/precious.pt', '../other/metrics.csv', str(other.path.resolve()/'metrics.csv'), 'to other/metrics.csv', '..', '', 'checkpoints', 7, None])
    said = export_run(run, 'linked.zip', show=False)
    assert 'checkpoints/last.pt' in said.left_out and not any('precious' in o for o in zipfile.ZipFile('linked.zip').namelist())
    prune('drop linked', do=True)
    assert content(outside)=={'deep/precious.pt': b'precious'} and content(other.path)==before
    assert sorted(o.name for o in run.path.rglob('*'))==['checkpoints', 'last.pt', 'logs', 'to other']

def test_a_run_that_is_a_link_stays(here):
    run = make('far', 0.9, 'elsewhere')
    make('near', 0.1)
    Path('experiments/far').symlink_to(run.path.resolve())
    said = prune('keep best 1', do=True)
    assert not said.going and 'a link to' in str(said) and run.manifest_path.exists()
    for act in (lambda: archive('far'), lambda: remove_run(RunFolder('experiments/far'))):
        with pytest.raises(RunError, match='is a link'): act()

def test_hard_links_free_what_they_free(here):
    run = make('a')
    os.remove(run.path/'checkpoints'/'last.pt')
    os.link(run.path/'checkpoints'/'best_model.pt', run.path/'checkpoints'/'last.pt')
    assert own_files(run.path, run.read()).size==2*3000+len('epoch,loss\n1,0.5\n')+len('로그\n'.encode())*100

# --- who is at work, and who is needed ---

HOLD = '''
import sys
from deep_studio_nb.experiments.run_folder import RunFolder, this_process
run = RunFolder(sys.argv[1])
with run.claimed():
    run.update(status='running', **this_process())
    print('at work', flush=True)
    sys.stdin.readline()
'''

@posix
def test_a_run_that_a_live_process_trains(here):
    run = make('worst', 9.)
    make('best', 0.1)
    before = weights(run.path)
    child = subprocess.Popen([sys.executable, '-c', HOLD, str(run.path)], env=dict(os.environ, PYTHONPATH=str(ROOT)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline()=='at work\n'
        for rule in ('keep best 1', 'keep newest 1', 'drop worst', 'drop killed', 'keep checkpoints best'):
            said = prune(rule, do=True)
            assert 'it is being trained' in str(said) and 'worst' not in [o['run'] for o in said.going]
        for act in (lambda: archive('worst'), lambda: export_run('worst'), lambda: remove_run(run)):
            with pytest.raises(RunError, match='another process'): act()
    finally:
        child.kill()
        child.wait()
    assert weights(run.path)==before
    assert runs()['worst']['status']=='killed'
    assert [o['run'] for o in prune('drop killed', do=True).going]==['worst'] and not run.path.exists()

def test_a_run_that_is_taken_up_between_plan_and_deed(here, monkeypatch):
    run, real = make('a', 9.), tidy._remove
    make('b')
    def late(*args):
        with run.claimed(): return real(*args)
    monkeypatch.setattr(tidy, '_remove', late)
    said = prune('keep best 1', do=True)
    assert not said.going and 'another process' in str(said) and run.manifest_path.exists()

@pytest.mark.parametrize('status, host', [('running', 'far-away'), ('created', 'far-away'), ('running', None)])
def test_runs_of_other_machines(here, status, host):
    run = make('guest')
    write_json(run.manifest_path, run.read() | dict(status=status, host=host))
    said = prune('drop guest', do=True)
    assert not said.going and run.manifest_path.exists() and ('cannot be seen from here' if host else 'nobody knows') in str(said)

def test_who_is_needed_stays_and_may_be_named(here):
    make('a', 0.9)
    make('b', 0.8, resumed_from='experiments/a/checkpoints/last.pt')
    make('c', 0.7, resumed_from=str(here/'experiments/b/checkpoints/best_model.pt'))
    make('d', 0.6, config=dict(arch=dict(type='MLP', args=dict(weights='experiments/a/checkpoints/best_model.pt')), loss='cross_entropy'))
    make('e', 0.1)
    going = lambda rule: sorted(o['run'] for o in prune(rule).going)
    assert going('keep best 1')==['a', 'b', 'c', 'd']              # who is needed by nobody that stays may go as well
    assert going('keep newest 2')==['b', 'c']                      # d began with the weights of a
    assert going('keep newest 3')==[]                              # c went on from b
    assert going('drop a')==['a']
    Path('checkpoints').mkdir()
    Path('checkpoints/final_model.pt').touch()
    write_json('checkpoints/final_model.json', dict(run=str(here/'experiments/c')))
    assert going('keep best 1')==['d'] and 'final_model.json' in str(prune('keep best 1'))
    assert [o['files'] for o in prune('keep checkpoints best').going if o['run']=='a']==[1]      # b began from its last.pt

def test_a_project_that_was_moved_knows_its_final_model(here):
    make('a', 0.9), make('b', 0.1)
    Path('checkpoints').mkdir()
    Path('checkpoints/final_model.pt').touch()
    write_json('checkpoints/final_model.json', dict(run='/nowhere/project/experiments/a'))
    assert not prune('keep best 1').going
    before = os.getcwd()
    os.chdir('/')
    try: assert not prune('keep best 1', f'{before}/experiments').going       # the record beside the folder counts as well
    finally: os.chdir(before)

def test_runs_of_a_whole_are_tidied_by_name_of_the_whole(here):
    for i in range(4): make(f's-{i:03}', i, 'experiments/s', sweep=dict(name='s', trial=i))
    for i in range(3): make(f'fold-{i}', i, 'experiments/k', data=dict(fingerprint=dict(valid=str(i))))
    Path('experiments/k/folds.json').touch()
    make('plain', 9.), make('worse', 10.)
    said = prune('keep best 1')
    assert [o['run'] for o in said.going]==['worse'] and 'number 2 of 2' in str(said)
    assert '4     s/s-000, s/s-001, s/s-002 and 1 more' in str(said)
    assert [o['run'] for o in prune('keep best 1', 'experiments/s').going]==['s-003', 's-002', 's-001']
    assert not prune('keep best 1', 'experiments/k').going          # every fold has its own samples

def test_two_at_once(here):
    for i in range(12): make(f'run-{i}', i)
    words = [sys.executable, '-c', "from deep_studio_nb.experiments.tidy import prune; print(len(prune('keep best 2', do=True).going))"]
    children = [subprocess.Popen(words, env=dict(os.environ, PYTHONPATH=str(ROOT)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [o.communicate() for o in children]
    assert [o.returncode for o in children]==[0]*3, said
    prune('keep best 2', do=True)
    assert sorted(os.listdir('experiments'))==['run-0', 'run-1'] and sum(int(o) for o, _ in said)<=10

# --- a disk that is full, and files that nobody may remove ---

def full(*_, **__): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

@pytest.mark.parametrize('where', ['copy', 'sync', 'rename'])
def test_a_full_disk(here, monkeypatch, where):
    run = make('꽃')
    before = content(run.path)
    export_run(run, 'whole.zip', show=False)
    for what in (lambda: export_run(run, 'out/꽃.zip', show=False), lambda: archive(run, to='out', show=False), lambda: open_run_zip('whole.zip', 'out', show=False)):
        with monkeypatch.context() as patched:
            if where=='copy':
                patched.setattr(zipfile.ZipExtFile, 'read', full)
                patched.setattr(zipfile.ZipFile, 'open', full)
            if where=='sync': patched.setattr(os, 'fsync', full)
            if where=='rename': patched.setattr(os, 'replace', full)
            with pytest.raises(RunError, match='No space left|is full|was not removed'): what()
        assert not list(Path('out').iterdir()) and content(run.path)==before

@posix
def test_a_write_that_the_system_really_cuts_off(here):
    run = make('꽃', size=300_000)
    before = content(run.path)
    def limited(out):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try: archive(run, to='out', show=False)
        except RunError as e: out.send(str(e))
        else: out.send('no error')
    mine, yours = multiprocessing.Pipe()
    child = multiprocessing.get_context('fork').Process(target=limited, args=(yours,))
    child.start()
    assert 'could not be written' in mine.recv()
    child.join()
    assert not list(Path('out').iterdir()) and content(run.path)==before

def test_more_than_the_disk_holds(here, monkeypatch):
    export_run(make('꽃'), '꽃.zip', show=False)
    usage = shutil.disk_usage('.')
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=100))
    with pytest.raises(RunError, match='has room for 100 bytes'): open_run_zip('꽃.zip', 'out', show=False)
    assert not list(Path('out').iterdir())

def test_a_file_that_nobody_may_remove(here, monkeypatch):
    run, real = make('a', 9.), Path.unlink
    make('b')
    def refuse(self, **kw):
        if self.name=='last.pt': raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        real(self, **kw)
    with monkeypatch.context() as patched:
        patched.setattr(Path, 'unlink', refuse)
        said = prune('keep best 1', do=True)
    assert not said.going and 'Permission denied' in str(said) and 'last.pt' in str(said)
    assert runs()['a']['note'].startswith('half removed')
    assert 'is half removed; that will be finished' in str(prune('keep best 1'))
    assert 'that is finished now' in str(prune('keep best 1', do=True)) and not run.path.exists()

# --- damaged records ---

@pytest.mark.parametrize('seed', range(3))
def test_whatever_a_manifest_holds_only_its_own_run_is_concerned(here, seed):
    draw, run, good = random.Random(seed), make('odd', 5.), make('good', 0.1)
    whole, before = json.loads(run.manifest_path.read_text()), content(good.path)
    values = [None, 0, -1.5, True, '', 'text', '2026-13-45', [], [1, [2]], {}, {'type': 5}, {'value': 'x'}, 10**30, '\ud83d\ude00', {'trainer': 3}, ['a', None], ['../good/metrics.csv']]
    for key in whole:
        for value in draw.sample(values, 5):
            run.manifest_path.write_text(json.dumps(whole | {key: value}))
            for rule in ('keep best 1', 'keep best 1 per seed', 'keep newest 1', 'drop failed older than 1 day', 'keep checkpoints best', 'drop odd'):
                assert isinstance(str(prune(rule)), str), (key, value)
            with suppress(StudioError): export_run('odd', 'odd.zip', show=False)      # refused in words, or written
            Path('odd.zip').unlink(missing_ok=True)
    run.manifest_path.write_text(json.dumps(whole))
    assert content(good.path)==before

@pytest.mark.parametrize('spoil', [lambda p: p.write_text('{'), lambda p: p.unlink(), lambda p: p.write_text('{"format": 7}'), lambda p: p.write_bytes(b'\0'*500), lambda p: p.write_text('{"format": 1}')])
def test_a_damaged_run_is_never_touched(here, spoil):
    run = make('hurt', 9.)
    make('good')
    spoil(run.manifest_path)
    before = content(run.path)
    for rule in ('keep best 1', 'keep newest 1', 'keep checkpoints best', 'drop hurt', 'drop killed', 'drop failed'):
        said = prune(rule, do=True)
        assert 'hurt' not in [o['run'] for o in said.going] and 'hurt' in str(said)
    for act in (lambda: archive('hurt'), lambda: export_run('hurt'), lambda: remove_run(run)):
        with pytest.raises(RunError): act()
    assert content(run.path)==before and not list(here.glob('*.zip'))

# --- zips from anywhere ---

def test_a_zip_that_was_damaged_anywhere(here):
    "Whatever happens to it on its way, it is refused or it is the run."
    run, draw = make('꽃', size=500), random.Random(0)
    export_run(run, '꽃.zip', show=False)
    whole, expected, refused = Path('꽃.zip').read_bytes(), weights(run.path), 0
    for i in range(150):
        data = bytearray(whole)
        if i%3: data[draw.randrange(len(data))] ^= 1<<draw.randrange(8)
        else: del data[draw.randrange(len(data)):]
        Path('bad.zip').write_bytes(data)
        try: opened = open_run_zip('bad.zip', 'out', show=False)
        except RunError: refused += 1
        else:
            assert weights(opened.path)==expected
            shutil.rmtree(opened.path)
        assert not list(Path('out').iterdir()) if Path('out').exists() else True
    assert refused>120

def repacked(change, name='evil.zip'):
    "An export, with one change made to its entries: name to content."
    with zipfile.ZipFile('꽃.zip') as pack: entries = {o: pack.read(o) for o in pack.namelist()}
    with zipfile.ZipFile(name, 'w', zipfile.ZIP_DEFLATED) as out:
        for k, v in change(entries): out.writestr(k, v)
    return name

def linked(entries):
    link = zipfile.ZipInfo('꽃/logs')
    link.external_attr = 0o120777<<16
    return [(link, '/etc'), *entries.items()]

@pytest.mark.filterwarnings('ignore:Duplicate name')
@pytest.mark.parametrize('change, said', [
    (lambda e: [*e.items(), ('../evil.txt', 'x')], 'leads out'), (lambda e: [*e.items(), ('꽃/../../evil.txt', 'x')], 'leads out'), (lambda e: [*e.items(), ('/tmp/evil.txt', 'x')], 'no plain name'),
    (lambda e: [*e.items(), ('꽃\\evil.txt', 'x')], 'no plain name|does not hold the files'), (linked, 'is a link'), (lambda e: [*e.items(), *e.items()], 'two entries of one name'),
    (lambda e: [*e.items(), ('꽃/METRICS.CSV', 'x')], 'two entries of one name'), (lambda e: [*e.items(), ('꽃/more.txt', 'x')], 'does not hold the files'),
    (lambda e: [(k, v) for k, v in e.items() if not k.endswith('metrics.csv')], 'does not hold the files'), (lambda e: [(k, b'other') if k.endswith('metrics.csv') else (k, v) for k, v in e.items()], 'is damaged'),
    (lambda e: [(k, v) for k, v in e.items() if not k.endswith('hashes.json')], 'no run was exported'), (lambda e: [(k, b'{') if k.endswith('hashes.json') else (k, v) for k, v in e.items()], 'cannot be read'),
    (lambda e: [(k, v.replace(b'"format": 1', b'"format": 2')) if k.endswith('hashes.json') else (k, v) for k, v in e.items()], 'another version'),
    (lambda e: [*e.items(), ('꽃/zeros.txt', bytes(2*10**9//100))], 'does not hold the files'), (lambda e: [], 'no run was exported')])
def test_a_zip_of_ill_will(here, change, said):
    export_run(make('꽃'), '꽃.zip', show=False)
    with pytest.raises(RunError, match=said): open_run_zip(repacked(change), 'deep/er/out', show=False)
    assert not list(here.rglob('evil.txt')) and not Path('/tmp/evil.txt').exists() and (not Path('deep').exists() or not list(Path('deep/er/out').iterdir()))

def test_a_bomb_is_not_unpacked(here):
    export_run(make('꽃'), '꽃.zip', show=False)
    with zipfile.ZipFile('bomb.zip', 'w', zipfile.ZIP_DEFLATED) as out, out.open('꽃/zeros', 'w') as f:
        for _ in range(1100): f.write(bytes(10**6))
    with pytest.raises(RunError, match=r'1\.1 GB would come out of 1\.1 MB, and the limit is 1\.0 GB.*most=2'): open_run_zip('bomb.zip', 'out')
    assert not Path('out').exists()

def test_a_name_that_is_taken(here):
    export_run(make('꽃'), '꽃.zip', show=False)
    Path('out/꽃').mkdir(parents=True)
    Path('out/꽃/mine.txt').write_text('mine')
    names = [open_run_zip('꽃.zip', 'out', show=False).name for _ in range(3)]
    assert names==['꽃-2', '꽃-3', '꽃-4'] and content('out/꽃')=={'mine.txt': b'mine'}
    assert [o['run'] for o in runs('out') if o['status']=='finished']==names

def test_the_archive_keeps_two_runs_of_one_name_apart(here):
    first, second = make('꽃', folder='a'), make('꽃', folder='b')
    (second.path/'metrics.csv').write_text('epoch,loss\n1,0.1\n')
    kept = [o.zip.path.name for o in archive(first, second, show=False)]
    assert kept==['꽃.zip', '꽃-2.zip'] and not first.path.exists() and not second.path.exists()
    assert (open_run_zip('archive/꽃-2.zip', show=False).path/'metrics.csv').read_text().endswith('0.1\n')

def test_an_archive_that_cannot_be_read_back_removes_nothing(here, monkeypatch):
    run = make('꽃')
    before, real = content(run.path), archive_module.pack_into
    def rotten(run, path, show):
        res = real(run, path, show)
        data = bytearray(path.read_bytes())
        data[1500] ^= 255
        path.write_bytes(data)
        return res
    monkeypatch.setattr(archive_module, 'pack_into', rotten)
    with pytest.raises(RunError, match='was not removed'): archive(run, show=False)
    assert content(run.path)==before

def test_a_file_that_changes_while_it_is_archived(here, monkeypatch):
    run, real = make('꽃'), archive_module.pack_into
    def later(run, path, show):
        res = real(run, path, show)
        (run.path/'metrics.csv').write_text('epoch,loss\n1,0.4\n')
        return res
    monkeypatch.setattr(archive_module, 'pack_into', later)
    with pytest.raises(RunError, match='`metrics.csv` is not the same'): archive(run, show=False)
    assert (run.path/'metrics.csv').read_text().endswith('0.4\n') and run.manifest_path.exists()
