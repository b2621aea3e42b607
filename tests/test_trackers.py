"""Trackers, read back with the libraries that they write for; runs that are killed, networks that are gone, disks that are full.

A library that is not installed skips its tests and says which extra installs it.
"""
import ctypes, errno, json, logging, os, signal, socket, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
import psutil, pytest, torch
from PIL import Image
from torch import nn
from deep_studio_nb.common.registry import TRACKERS
from deep_studio_nb.experiments import mlflow as _mlflow, tensorboard as _tensorboard, wandb as _wandb  # noqa: F401 (they register themselves)
from deep_studio_nb.experiments.experiment import Experiment
from deep_studio_nb.experiments.local_values import tracked_values
from deep_studio_nb.experiments.tracker import Tracker
from deep_studio_nb.experiments.trackers import Trackers
from deep_studio_nb.training.events import Callback
from training_kills import in_a_child
from waiting import wait_for

def library(name):
    "Skip unless the library is there."
    try: version(name)
    except PackageNotFoundError: pytest.skip(f'{name} is not installed. Run: pip install "deep_studio_nb[track]"')

@pytest.fixture
def said():
    "What the trackers say."
    lines, logger = [], logging.getLogger('deep_studio_nb.trackers')
    class Heard(logging.Handler):
        def emit(self, record): lines.append(record.getMessage())
    handler, level = Heard(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)

@pytest.fixture
def alone(tmp_path, monkeypatch):
    "A machine without logins, settings and proxies, whose files are thrown away."
    for k in [o for o in os.environ if o.startswith(('WANDB_', 'MLFLOW_')) or o.lower().endswith('_proxy')]: monkeypatch.delenv(k)
    for k,v in dict(HOME='home', WANDB_CONFIG_DIR='config', WANDB_CACHE_DIR='cache', WANDB_DATA_DIR='data', NETRC='home/.netrc').items(): monkeypatch.setenv(k, str(tmp_path/v))
    (tmp_path/'home').mkdir()
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    if 'wandb' in sys.modules: sys.modules['wandb'].teardown()

def heard():
    "What the trackers say in this process from here on."
    lines = []
    class Heard(logging.Handler):
        def emit(self, record): lines.append(record.getMessage())
    logging.getLogger('deep_studio_nb.trackers').addHandler(Heard())
    return lines

@pytest.fixture(autouse=True)
def patient(monkeypatch):
    "Trackers have time to finish, however busy the machine is."
    monkeypatch.setattr(Trackers.__init__, '__defaults__', (2., 180., 10_000))

def net(): return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Dropout(0.5))

def track(folder, tracker, steps, since=0, status='finished', **start):
    "One process of a run, as `tracker` sees it."
    run = Trackers([tracker], pause=0)
    run.start(folder, dict(name='꽃', seed=0, optimizer=dict(type='SGD', args=dict(lr=0.1)), metrics=['accuracy']) | start)
    run.at(since)
    if not since:
        run.text('config', 'name: 꽃\nseed: 0')
        run.image('images/train', torch.rand(3, 4, 6))
        run.graph(net(), (torch.ones(2, 4), torch.zeros(2)))
    for step in steps: run.log(step, dict(loss=1/step, val_loss=2/step, lr=0.1))
    if status: run.finish(status)
    else: run.flush()
    return run

# --- TensorBoard ---

def event_folder(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    return EventAccumulator(str(folder/'logs'), size_guidance=dict(tensors=0, scalars=0, images=0)).Reload()

def test_tensorboard_reads_all_that_was_told(tmp_path):
    library('tensorboard')
    track(tmp_path, TRACKERS.build('tensorboard'), [10, 20])
    seen = event_folder(tmp_path)
    assert sorted(seen.Tags()['scalars']) == ['loss/train', 'loss/valid', 'lr']
    assert [(o.step, round(o.value, 6)) for o in seen.Scalars('loss/valid')] == [(10, 0.2), (20, 0.1)]
    assert [(o.step, o.width, o.height) for o in seen.Images('images/train')] == [(0, 6, 4)]
    assert 'name: 꽃' in seen.Tensors('config/text_summary')[0].tensor_proto.string_val[0].decode()
    assert 'Linear' in str(seen.Graph())

def test_tensorboard_compares_runs_by_their_settings(tmp_path):
    library('tensorboard')
    from tensorboard.plugins.hparams.api_pb2 import Status
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    track(tmp_path, TRACKERS.build('tensorboard'), [10], status='stopped')
    assert '_hparams_/session_end_info' not in event_folder(tmp_path).PluginTagToContent('hparams')
    track(tmp_path, TRACKERS.build('tensorboard'), [20], since=10)
    told = {k: HParamsPluginData.FromString(v) for k,v in event_folder(tmp_path).PluginTagToContent('hparams').items()}
    settings = told['_hparams_/session_start_info'].session_start_info.hparams
    assert settings['optimizer.args.lr'].number_value==0.1 and settings['optimizer.type'].string_value=='SGD' and settings['metrics'].string_value=='["accuracy"]'
    assert [o.name.tag for o in told['_hparams_/experiment'].experiment.metric_infos] == ['loss/train', 'loss/valid']
    assert told['_hparams_/session_end_info'].session_end_info.status==Status.Value('STATUS_SUCCESS')

def test_a_model_that_cannot_be_followed_goes_without_a_graph(tmp_path, said, capsys):
    library('tensorboard')
    class Odd(nn.Module):
        def forward(self, x): raise RuntimeError('not this way')
    run = Trackers([TRACKERS.build('tensorboard')], pause=0)
    run.start(tmp_path, {})
    run.graph(Odd(), (torch.ones(2, 4), torch.zeros(2)))
    run.graph(net(), {'x': torch.ones(2, 4)})
    run.log(1, dict(loss=1))
    run.finish('finished')
    assert len(said)==1 and 'not this way' in said[0] and len(run.alive)==1
    assert event_folder(tmp_path).Scalars('loss/train')[0].value==1
    assert capsys.readouterr().out==''

# --- Weights & Biases ---

def wandb_files(folder): return sorted((Path(folder)/'logs'/'wandb').glob('*run-*/*.wandb'))

def records(path, kind):
    "The records of a kind that W&B has kept in a file, as its own program prints them."
    res = subprocess.run([sys.executable, '-m', 'wandb', 'leet', 'inspect', '--json', str(path)], capture_output=True, text=True, check=True, timeout=300)
    return [o[kind] for o in map(json.loads, res.stdout.splitlines()) if o['type']==kind]

def values(path):
    "The rows that W&B has kept, without what it adds itself."
    return [{k: v for k,v in o['item'].items() if k[0]!='_'} for o in records(path, 'history')]

def test_wandb_keeps_all_that_was_told(alone, said):
    library('wandb')
    folder = alone/'digits'
    track(folder, TRACKERS.build(dict(type='wandb', args=dict(project='flowers', tags=['baseline'], group='folds', mode='offline'))), [10, 20])
    path, = wandb_files(folder)
    rows = values(path)
    assert [o for o in rows if 'loss/train' in o] == [{'step': s, 'loss/train': 1/s, 'loss/valid': 2/s, 'lr': 0.1} for s in (10, 20)]
    assert (rows[0]['step'], rows[0]['config._type'])==(0, 'html-file')
    assert (rows[1]['images/train._type'], rows[1]['images/train.width'], rows[1]['images/train.height'])==('image-file', 6, 4)
    assert Image.open(path.parent/'files'/rows[1]['images/train.path']).size==(6, 4)
    assert 'name: 꽃' in (path.parent/'files'/rows[0]['config.path']).read_text(encoding='utf-8')
    run = records(path, 'run')[0]
    assert (run['project'], run['display_name'], run['tags'], run['run_group'])==('flowers', 'digits', ['baseline'], 'folds')
    assert run['config']['update']['optimizer']['args']['lr']==0.1
    assert any('wandb sync' in o for o in said)

def test_wandb_goes_on_with_the_same_run(alone):
    library('wandb')
    for steps,since,status in (([10, 20], 0, 'stopped'), ([20, 30], 10, 'finished')):
        track(alone/'run', TRACKERS.build(dict(type='wandb', args=dict(mode='offline'))), steps, since, status)
    first, second = wandb_files(alone/'run')
    assert len({r['run_id'] for o in (first, second) for r in records(o, 'run')})==1
    assert [o['step'] for p in (first, second) for o in values(p) if 'loss/train' in o]==[10, 20, 30]
    calls = [o['item']['_step'] for p in (first, second) for o in records(p, 'history')]
    assert calls==list(range(len(calls)))       # so that the pieces fit together when they are sent

def told_and_killed(out, folder, env):
    "Tell W&B some steps, note them, and die before its program has written them."
    os.chdir(folder)
    os.environ.update(env)
    track(Path(folder)/'run', TRACKERS.build(dict(type='wandb', args=dict(mode='offline'))), [10, 20, 30], status=None)
    os.kill(os.getpid(), signal.SIGKILL)

def test_what_the_program_of_wandb_loses_with_a_kill_is_told_again(alone):
    library('wandb')
    with pytest.raises(EOFError): in_a_child(told_and_killed, str(alone), dict(os.environ))
    assert json.loads((alone/'run'/'logs'/'WandB.json').read_text())['rows']==3
    track(alone/'run', TRACKERS.build(dict(type='wandb', args=dict(mode='offline'))), [30, 40], since=20)
    assert [o['step'] for p in wandb_files(alone/'run') for o in values(p) if 'loss/train' in o]==[10, 20, 30, 40]
    calls = [o['item']['_step'] for p in wandb_files(alone/'run') for o in records(p, 'history')]
    assert calls==sorted(set(calls))

def programs(name):
    "The processes that this one has started with `name` among their words."
    return [o for o in psutil.Process().children() if any(name in w for w in o.cmdline())]

def dies_in_the_middle(out, folder, env):
    "Track with W&B, whose program is killed; then track another run."
    os.chdir(folder)
    os.environ.update(env)
    lines, tracker = heard(), dict(type='wandb', args=dict(mode='offline'))
    run = track(Path(folder)/'run', TRACKERS.build(tracker), [10], status=None)
    for o in programs('wandb-core'): o.kill()
    for step in range(20, 60, 10):
        run.log(step, dict(loss=1))
        run.flush()
    run.finish('finished')
    told = list(lines)
    again = track(Path(folder)/'again', TRACKERS.build(tracker), [10])
    out.send((run.alive==[], told, len(again.alive)))

def test_the_program_of_wandb_dies_in_the_middle(alone):
    library('wandb')
    silent, told, left = in_a_child(dies_in_the_middle, str(alone), dict(os.environ))
    assert silent and len([o for o in told if 'silent from here on' in o])==1
    assert [o['step'] for o in tracked_values(alone/'run')]==[10, 20, 30, 40, 50]
    assert left==1 and [o['step'] for o in values(wandb_files(alone/'again')[0]) if 'loss/train' in o]==[10]       # a new program for the next run

def test_two_runs_at_once_are_two_runs_of_wandb(alone):
    library('wandb')
    runs = [Trackers([TRACKERS.build(dict(type='wandb', args=dict(mode='offline')))], pause=0) for _ in range(2)]
    for i,o in enumerate(runs): o.start(alone/f'run{i}', {})
    for step in (1, 2):
        for i,o in enumerate(runs): o.log(step, dict(loss=i))
    for o in runs: o.finish('finished')
    assert [[o['loss/train'] for o in values(wandb_files(alone/f'run{i}')[0]) if 'loss/train' in o] for i in range(2)]==[[0, 0], [1, 1]]

def test_without_a_login_wandb_stays_on_this_machine(alone, said):
    library('wandb')
    track(alone/'run', TRACKERS.build('wandb'), [10])
    assert len(values(wandb_files(alone/'run')[0]))==3
    assert any('nobody is logged in' in o and 'wandb login' in o for o in said)

def test_wanted_online_without_a_login_is_told_once(alone, said):
    library('wandb')
    run = track(alone/'run', TRACKERS.build(dict(type='wandb', args=dict(mode='online'))), range(1, 20))
    assert run.alive==[] and len([o for o in said if 'silent from here on' in o])==1
    assert 'wandb login' in said[0] and 'mode: offline' in said[0]
    assert len(tracked_values(alone/'run'))==19

def test_without_a_network_wandb_stays_on_this_machine(alone, said, monkeypatch):
    library('wandb')
    monkeypatch.setenv('WANDB_API_KEY', '0'*40)
    monkeypatch.setenv('WANDB_BASE_URL', 'http://127.0.0.1:9')
    track(alone/'run', TRACKERS.build('wandb'), [10])
    assert len(values(wandb_files(alone/'run')[0]))==3
    assert any('does not answer' in o for o in said)

def test_a_server_that_only_listens_does_not_hold_wandb_up(alone, said, monkeypatch):
    library('wandb')
    with socket.create_server(('127.0.0.1', 0)) as door:
        monkeypatch.setenv('WANDB_API_KEY', '0'*40)
        monkeypatch.setenv('WANDB_BASE_URL', f'http://127.0.0.1:{door.getsockname()[1]}')
        track(alone/'run', TRACKERS.build(dict(type='wandb', args=dict(wait=2.))), [10])
    kept = [o for p in wandb_files(alone/'run') if 'offline-run' in str(p) for o in values(p)]
    assert len(kept)==3
    assert any('cannot be used online' in o for o in said)

# --- MLflow ---

def client(uri):
    import mlflow
    return mlflow.MlflowClient(tracking_uri=uri)

def only_run(uri, experiment='deep_studio_nb'):
    c = client(uri)
    run, = c.search_runs([c.get_experiment_by_name(experiment).experiment_id])
    return c, run

@pytest.fixture
def store(alone):
    library('mlflow')
    return f'sqlite:///{alone}/store.db'

def test_mlflow_keeps_all_that_was_told(alone, store):
    track(alone/'digits', TRACKERS.build(dict(type='mlflow', args=dict(uri=store, tags=dict(team='vision')))), [10, 20])
    c, run = only_run(store)
    assert [(o.step, o.value) for o in c.get_metric_history(run.info.run_id, 'loss/valid')]==[(10, 0.2), (20, 0.1)]
    assert (run.info.run_name, run.info.status, run.data.tags['team'])==('digits', 'FINISHED', 'vision')
    assert run.data.params=={'name': '꽃', 'seed': '0', 'optimizer.type': 'SGD', 'optimizer.args.lr': '0.1', 'metrics': '["accuracy"]'}
    assert {o.path for o in c.list_artifacts(run.info.run_id)}=={'config-0.txt', 'images'}
    text = c.download_artifacts(run.info.run_id, 'config-0.txt', str(alone))
    assert Path(text).read_text(encoding='utf-8')=='name: 꽃\nseed: 0'
    picture, = c.list_artifacts(run.info.run_id, 'images')
    assert Image.open(c.download_artifacts(run.info.run_id, picture.path, str(alone))).size==(6, 4)

def test_mlflow_uses_its_own_store_by_default(alone):
    library('mlflow')
    import mlflow
    track(alone/'run', TRACKERS.build('mlflow'), [10])
    _, run = only_run(mlflow.get_tracking_uri())
    assert run.data.metrics['loss/train']==0.1

def test_mlflow_goes_on_with_the_same_run(alone, store):
    args = dict(type='mlflow', args=dict(uri=store))
    track(alone/'run', TRACKERS.build(args), [10, 20], status=None)
    track(alone/'run', TRACKERS.build(args), [20, 30], since=10, seed=1, device='cpu')
    c, run = only_run(store)
    assert [o.step for o in c.get_metric_history(run.info.run_id, 'loss/train')]==[10, 20, 30]
    assert run.info.status=='FINISHED' and run.data.params['seed']=='0' and run.data.params['device']=='cpu'

def test_a_run_that_mlflow_has_lost_is_told_from_the_beginning(alone, store, said):
    args = dict(type='mlflow', args=dict(uri=store))
    track(alone/'run', TRACKERS.build(args), [10, 20], status='stopped')
    c, run = only_run(store)
    c.delete_run(run.info.run_id)
    track(alone/'run', TRACKERS.build(args), [30], since=20)
    c, new = only_run(store)
    assert new.info.run_id!=run.info.run_id and any('no run' in o for o in said)
    assert [o.step for o in c.get_metric_history(new.info.run_id, 'loss/train')]==[10, 20, 30]

MAKES = """
from pathlib import Path
from deep_studio_nb.experiments.mlflow import MLflow
tracker = MLflow(uri='sqlite:///store.db')
tracker.start(Path('first'), {})
"""

def test_a_kill_while_mlflow_makes_its_store_leaves_no_half_of_it(alone):
    library('mlflow')
    with subprocess.Popen([sys.executable, '-c', MAKES]) as child:
        wait_for(lambda: child.poll() is not None or any(o.stat().st_size for o in alone.glob('.mlflow-*/new.db')))
        assert child.poll() is None
        child.kill()
    assert not (alone/'store.db').exists()
    track(alone/'second', TRACKERS.build(dict(type='mlflow', args=dict(uri='sqlite:///store.db'))), [10])
    assert only_run('sqlite:///store.db')[1].info.run_name=='second'

def test_values_that_are_no_numbers_reach_mlflow(alone, store):
    run = Trackers([TRACKERS.build(dict(type='mlflow', args=dict(uri=store)))], pause=0)
    run.start(alone/'run', {})
    for step,loss in ((1, float('nan')), (2, float('inf')), (3, 0.5)): run.log(step, dict(loss=loss))
    run.finish('failed')
    c, seen = only_run(store)
    assert len(c.get_metric_history(seen.info.run_id, 'loss/train'))==3 and seen.info.status=='FAILED'

def test_a_server_that_is_not_there_is_told_once(alone, said):
    library('mlflow')
    run = track(alone/'run', TRACKERS.build(dict(type='mlflow', args=dict(uri='http://127.0.0.1:9'))), range(1, 20))
    assert run.alive==[] and len(said)==1 and 'Start the server' in said[0]

def test_a_server_that_only_listens_does_not_hold_mlflow_up(alone, said):
    library('mlflow')
    with socket.create_server(('127.0.0.1', 0)) as door:
        run = track(alone/'run', TRACKERS.build(dict(type='mlflow', args=dict(uri=f'http://127.0.0.1:{door.getsockname()[1]}', wait=0.5))), range(1, 20))
    assert run.alive==[] and len(said)==1 and 'does not answer' in said[0]

class Store(BaseHTTPRequestHandler):
    "As much of a server of MLflow as a run needs; counts the batches of numbers."
    batches = 0
    def answer(self):
        self.rfile.read(int(self.headers.get('Content-Length') or 0))
        name = self.path.partition('?')[0].partition('/mlflow/')[2]
        if name=='runs/log-batch': Store.batches += 1
        info = dict(run_id='a1', experiment_id='7', status='RUNNING', lifecycle_stage='active')
        body = {'experiments/get-by-name': dict(experiment=dict(experiment_id='7', name='deep_studio_nb')), 'runs/create': dict(run=dict(info=info)),
                'runs/get': dict(run=dict(info=info, data={})), 'runs/log-batch': {}, 'runs/update': dict(run_info=info)}.get(name)
        self.send_response(404 if body is None else 200)
        self.end_headers()
        self.wfile.write(json.dumps(body or {}).encode())
    do_GET = do_POST = answer
    def log_message(self, *args): "Say nothing."

def test_a_server_that_dies_in_the_middle(alone, said, monkeypatch):
    library('mlflow')
    monkeypatch.setenv('MLFLOW_HTTP_REQUEST_MAX_RETRIES', '0')
    server = ThreadingHTTPServer(('127.0.0.1', 0), Store)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    run = Trackers([TRACKERS.build(dict(type='mlflow', args=dict(uri=f'http://127.0.0.1:{server.server_port}')))], pause=0)
    run.start(alone/'run', dict(seed=0))
    run.log(1, dict(loss=1))
    run.flush()
    assert len(run.alive)==1 and Store.batches==2      # settings, numbers
    server.shutdown()
    server.server_close()
    for step in range(2, 6):
        run.log(step, dict(loss=1))
        run.flush()
    run.finish('finished')
    assert run.alive==[] and len(said)==1 and 'silent from here on' in said[0]
    assert [o['step'] for o in tracked_values(alone/'run')]==[1, 2, 3, 4, 5]

# --- whatever the library ---

def test_a_library_that_is_not_installed(tmp_path, said, monkeypatch):
    for name in ('wandb', 'mlflow', 'tensorboard'): monkeypatch.setitem(sys.modules, name, None)
    run = Trackers([TRACKERS.build(o) for o in ('wandb', 'mlflow', 'tensorboard')], pause=0)
    run.start(tmp_path, {})
    run.log(1, dict(loss=1))
    run.finish('finished')
    assert run.alive==[] and len(said)==3 and all('pip install "deep_studio_nb[track]"' in o for o in said)
    assert tracked_values(tmp_path)==[dict(step=1, loss=1)]

@TRACKERS.register
class Slow(Tracker):
    "Waits for an answer that does not come, as a login does."
    answer = threading.Event()
    def log(self, step, values): self.answer.wait()

@TRACKERS.register
class Raises(Tracker):
    "Breaks when it is told something."
    def log(self, step, values): raise ValueError('not like this')

@TRACKERS.register
class Leaves(Tracker):
    "Ends the process, as some libraries do."
    def start(self, folder, config): sys.exit('no license')

def config(name, trackers, epochs=3, **more):
    return dict(name=name, dataset=dict(type='Digits', args=dict(data_dir='data/digits')), data_loader=dict(type='DataLoader', args=dict(batch_size=256)),
                arch=dict(type='MLP', args=dict(hidden=[8], dropout=0.2)), loss='cross_entropy', optimizer='AdamW', device='cpu', trackers=trackers,
                trainer=dict(epochs=epochs, threads=1, monitor='min val_loss') | more)

def rows(exp): return [{k: v for k,v in o.items() if k!='seconds'} for o in exp.trainer.history]

def fit(cfg, *extra):
    exp = Experiment(cfg)
    exp.data
    for o in extra: exp.trainer.add(o)
    exp.fit()
    return exp

def there(folder):
    "Specs of the trackers whose libraries are installed."
    specs = dict(tensorboard='tensorboard', wandb=dict(type='wandb', args=dict(mode='offline')), mlflow=dict(type='mlflow', args=dict(uri=f'sqlite:///{folder}/store.db')))
    return [spec for o,spec in specs.items() if _has(o)]

def _has(name):
    try: return bool(version(name))
    except PackageNotFoundError: return False

def test_trackers_change_nothing_and_stop_nothing(alone, monkeypatch):
    "Weights are the same bits with trackers that draw the model, hang, raise or leave."
    library('tensorboard')
    with_none = fit(config('none', []))
    monkeypatch.setattr(Trackers, '_await', lambda self: None)
    with_all = fit(config('all', [*there(alone), 'Slow', 'Raises', 'Leaves'], log_step=2))
    Slow.answer.set()
    for o in [o.thread for o in with_all.recorder.trackers.posts if o.thread]: o.join(60)
    assert {o.name for o in with_all.recorder.trackers.posts if o.error}=={'Raises', 'Leaves'}
    assert rows(with_all)==rows(with_none)
    for k,v in with_all.model.state_dict().items(): assert torch.equal(v, with_none.model.state_dict()[k])
    assert with_all.folder.status()=='finished'

def test_an_experiment_is_tracked_in_all_its_parts(alone):
    library('tensorboard')
    class Noise(Callback):
        def after_epoch(self, trainer): trainer.trackers.image('noise', torch.rand(3, 4, 4))
    exp = fit(config('digits', ['tensorboard'], log_step=2), Noise())
    seen = event_folder(exp.folder.path)
    n = len(exp.data.train)
    assert [o.step for o in seen.Scalars('loss/valid')]==[n, 2*n, 3*n]
    assert [o.step for o in seen.Scalars('loss/step')]==[e*n+s for e in range(3) for s in range(2, n+1, 2)]
    assert [o.step for o in seen.Images('noise')]==[n, 2*n, 3*n]
    assert {'images/train_batch', 'figures/loss_curve'} <= set(seen.Tags()['images'])
    assert seen.Scalars('loss/test')[0].value==pytest.approx(exp.folder.read()['test']['loss'])
    assert [o['val_loss'] for o in tracked_values(exp.folder.path) if 'val_loss' in o]==list(exp.trainer.history['val_loss'])

def dies(out, folder, env, trackers):
    "Train, and be killed when the third epoch has been told but not saved."
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ.update(env)
    def die(t):
        if t.epoch==3: os.kill(os.getpid(), signal.SIGKILL)
    fit(config('killed', trackers, 5, log_step=2), Last(die))

class Last(Callback):
    after = 'Recorder',
    def __init__(self, fn): self.fn = fn
    def after_epoch(self, trainer): self.fn(trainer)

def test_each_step_is_told_once_after_a_kill(alone):
    trackers = there(alone)
    if not trackers: library('tensorboard')
    with pytest.raises(EOFError): in_a_child(dies, str(alone), dict(os.environ), trackers)
    exp = Experiment.resume('killed')
    assert len(exp.trainer.history)==2
    exp.fit()
    n, folder = len(exp.data.train), exp.folder.path
    epochs, steps = [n*o for o in range(1, 6)], [e*n+s for e in range(5) for s in range(2, n+1, 2)]
    assert [o['step'] for o in tracked_values(folder) if 'val_loss' in o]==epochs
    if _has('tensorboard'):
        seen = event_folder(folder)
        assert [o.step for o in seen.Scalars('loss/valid')]==epochs and [o.value for o in seen.Scalars('loss/valid')]==pytest.approx(exp.trainer.history['val_loss'])
        assert [o.step for o in seen.Scalars('loss/step')]==steps
    if _has('wandb'):
        rows = [o for p in wandb_files(folder) for o in values(p)]
        assert [[o['step'] for o in rows if k in o] for k in ('loss/valid', 'loss/step')]==[epochs, steps]
    if _has('mlflow'):
        c, run = only_run(f'sqlite:///{alone}/store.db')
        assert [[o.step for o in c.get_metric_history(run.info.run_id, k)] for k in ('loss/valid', 'loss/step')]==[epochs, steps]
    left = {o.relative_to(folder).as_posix() for o in folder.rglob('*') if o.is_file()}
    assert left==set(exp.folder.read()['files']) and (not _has('wandb') or any(o.endswith('.wandb') for o in left))

def test_all_that_was_told_is_out_when_a_run_fails(alone):
    library('tensorboard')
    def breaks(t):
        if t.epoch==2: raise ValueError('in the middle')
    with pytest.raises(ValueError): fit(config('failed', there(alone)), Last(breaks))
    folder = alone/'experiments'/'failed'
    want = [o['step'] for o in tracked_values(folder) if 'val_loss' in o]
    assert len(want)==2 and [o.step for o in event_folder(folder).Scalars('loss/valid')]==want
    if _has('wandb'): assert [o['step'] for p in wandb_files(folder) for o in values(p) if 'loss/valid' in o]==want
    if _has('mlflow'):
        c, run = only_run(f'sqlite:///{alone}/store.db')
        assert [o.step for o in c.get_metric_history(run.info.run_id, 'loss/valid')]==want and run.info.status=='FAILED'

QUIET = """
import gc, threading
from deep_studio_nb.all import Experiment
def others(): return [o for o in threading.enumerate() if not o.daemon and o is not threading.main_thread()]
def left(found):
    for o in found: o.join(60)     # one that is about to end may
    return sorted(o.name for o in found if o.is_alive())
exp = Experiment('config.json')
exp.fit()
print('left:', left([o for o in others() if not o.name.startswith('loader_')]))
found = others()
print('with the experiment:', sorted(o.name for o in found))
del exp
gc.collect()
print('without it:', left(found))
"""

def session(pid):
    "The session that a process belongs to; None if it has ended."
    try: return os.getsid(pid)
    except ProcessLookupError: return None

def test_trackers_keep_quiet_and_tidy(alone):
    "Nothing is printed by the libraries, nothing lies about, and nobody stays."
    if len(there(alone))<3: pytest.skip('not all libraries are installed. Run: pip install "deep_studio_nb[track]"')
    cfg = config('quiet', there(alone))
    cfg['data_loader']['args']['num_workers'] = 2     # threads that load live as long as their loader; "auto" has some where loading is slow
    (alone/'config.json').write_text(json.dumps(cfg))
    env = {k: v for k,v in os.environ.items() if not k.startswith(('WANDB_', 'PYTEST_', 'CI'))}
    with subprocess.Popen([sys.executable, '-c', QUIET], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True) as child: said = child.communicate(timeout=300)[0]
    assert child.returncode==0 and "left: []\nwith the experiment: ['loader_0', 'loader_1']\nwithout it: []\n" in said, said
    for word in ('wandb: ', 'mlflow', 'alembic', 'sqlalchemy', 'Warning', 'Traceback', 'TensorFlow'): assert word not in said.replace('wandb sync', ''), said
    own = {'config.json', 'data', 'experiments', 'home', 'store.db', 'mlruns'}       # the store was asked for, and keeps its files in `mlruns`
    assert {o.name for o in alone.iterdir()}<=own
    assert {o.relative_to(alone/'home').parts[:2] for o in (alone/'home').rglob('*') if o.is_file()}<={('.cache', 'wandb'), ('.cache', 'matplotlib'), ('.config', 'matplotlib')}
    wait_for(lambda: not [o for o in psutil.pids() if session(o)==child.pid])

def on_a_small_disk(out, folder, kinds):
    "Track on a disk of its own, of which others take the rest on the way."
    torch.set_num_threads(1)
    folder, libc = Path(folder), ctypes.CDLL(None, use_errno=True)
    folder.mkdir()
    if libc.unshare(0x00020000) or libc.mount(None, b'/', None, 0x4000 | 0x40000, None): return out.send('no')       # a mount namespace of one's own, seen by nobody else
    if libc.mount(b'none', str(folder).encode(), b'tmpfs', 0, b'size=8m'): return out.send('no')
    said = heard()
    run = Trackers([TRACKERS.build(o) for o in kinds], pause=0, patience=20.)
    run.start(folder/'run', {})
    run.log(1, dict(loss=1))
    run.flush()
    with open(folder/'of others', 'wb', buffering=0) as f:
        try:
            while True: f.write(b'x'*4096)
        except OSError as e: assert e.errno==errno.ENOSPC
    for step in range(2, 3000): run.log(step, {f'value{i}': i for i in range(20)})
    run.image('noise', torch.rand(3, 99, 99))
    run.finish('finished')
    out.send((said, len(run.alive)))

@pytest.mark.skipif(sys.platform!='linux', reason='namespaces')
@pytest.mark.parametrize('kind', ['tensorboard', 'wandb', 'mlflow'])
def test_a_disk_that_is_really_full(alone, kind):
    library(kind)
    args = dict(mlflow=dict(uri=f'sqlite:///{alone}/disk/store.db'), wandb=dict(mode='offline')).get(kind, {})
    kinds = [dict(type=kind, args=args)]
    res = in_a_child(on_a_small_disk, str(alone/'disk'), kinds)
    if res=='no': pytest.skip('may not mount here')
    said, left = res
    assert left==0 and len([o for o in said if 'silent from here on' in o and 'Free some space' in o])==1
    assert len([o for o in said if 'The values in the run folder' in o])==1 and len(said)<=4
