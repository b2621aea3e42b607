"""What a trainer is given and should not be: each mistake has words of its own."""
import math, os, pickle, zipfile
from types import SimpleNamespace
import pytest, torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from deep_studio_nb.common.errors import CheckpointError, ConfigError, DataError, StudioError, UnknownName
from deep_studio_nb.common.types import Loss, Metrics
from deep_studio_nb.data.loaders import BaseDataLoader
from deep_studio_nb.data.tensors import Tensors
from deep_studio_nb.training.base_trainer import BaseTrainer
from deep_studio_nb.training.checkpoints import FORMAT, load_checkpoint
from deep_studio_nb.training.trainer import Trainer, validate
from training_toy import assert_same, data, loaders, model, stop_at, trainer

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    trainer(folder=folder, epochs=1).train()
    return folder/'last.pt'

# --- checkpoints ---

@pytest.mark.parametrize('share', [0, 0.01, 0.3, 0.6, 0.9, 0.999])
def test_truncated(saved, tmp_path, share):
    whole, cut = saved.read_bytes(), tmp_path/'cut 파일.pt'
    cut.write_bytes(whole[:int(len(whole)*share)])
    with pytest.raises(CheckpointError, match='is empty|truncated or damaged|no checkpoint'): trainer(epochs=1).load(cut)

def test_a_byte_turned_over(saved, tmp_path):
    "Wherever it is: an error, or the file is as good as before. Never a crash."
    whole, n = saved.read_bytes(), 0
    for i in range(0, len(whole), max(len(whole)//60, 1)):
        bad = tmp_path/'bad.pt'
        bad.write_bytes(whole[:i] + bytes([whole[i]^0xff]) + whole[i+1:])
        try: load_checkpoint(bad)
        except CheckpointError: n += 1
    assert n>5

class Trap:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (self.path,)

@pytest.mark.parametrize('way', ['torch', 'old torch', 'pickle', 'within'])
def test_a_pickle_with_code_is_refused_and_not_run(saved, tmp_path, way):
    trap, bad = tmp_path/'trapped', tmp_path/'bad.pt'
    if way=='pickle': bad.write_bytes(pickle.dumps(Trap(str(trap))))
    elif way=='within': torch.save({**load_checkpoint(saved), 'meta': {'config': Trap(str(trap))}}, bad)
    else: torch.save({'format': FORMAT, 'version': 1, 'model': Trap(str(trap))}, bad, _use_new_zipfile_serialization=way=='torch')
    with pytest.raises(CheckpointError, match='refused and nothing was run'): trainer(epochs=1).load(bad)
    assert not trap.exists()

def test_other_files(tmp_path):
    bad = tmp_path/'x.pt'
    with zipfile.ZipFile(bad, 'w') as z: z.writestr('readme.txt', 'hello')
    with pytest.raises(CheckpointError, match='damaged'): load_checkpoint(bad)
    bad.write_text('text')
    with pytest.raises(CheckpointError, match='is no checkpoint'): load_checkpoint(bad)
    with pytest.raises(CheckpointError, match='There is no checkpoint'): trainer(epochs=1).load(tmp_path/'y.pt')
    with pytest.raises(CheckpointError, match='has no `last.pt`'): trainer(epochs=1).load(tmp_path)

def test_another_architecture_leaves_the_model_alone(saved):
    t = trainer(epochs=1)
    t.model[0] = nn.Linear(4, 8)
    before = t.model[4].weight.clone()
    with pytest.raises(CheckpointError, match=r'`0.weight` is \(16, 4\) in the checkpoint and \(8, 4\) in the model'): t.load(saved)
    assert torch.equal(t.model[4].weight, before)

def test_other_parts(saved):
    with pytest.raises(CheckpointError, match='optimizer `AdamW`, this run has `SGD`'): trainer(epochs=1, optimizer={'type': 'SGD', 'args': {'lr': 0.1}}).load(saved)
    with pytest.raises(CheckpointError, match='scheduler `OneCycleLR`, this run has none'): trainer(epochs=1, scheduler=None).load(saved)
    with pytest.raises(CheckpointError, match='ends after 6 steps, but this run has 18'): trainer(epochs=3).load(saved)

def test_meta_must_be_plain(tmp_path):
    with pytest.raises(CheckpointError, match=r"`state\['meta'\]\['path'\]`"): trainer(folder=tmp_path, epochs=1, meta={'path': tmp_path}).train()
    assert list(tmp_path.iterdir())==[]
    trainer(folder=tmp_path, epochs=1, meta={'classes': ['가', '나'], 'mean': torch.ones(3), 'nothing': None}).train()
    assert load_checkpoint(tmp_path/'last.pt')['meta']['classes']==['가', '나']

# --- settings ---

@pytest.mark.parametrize('wrong,text', [({'epochs': 0}, '`epochs` is 0'), ({'epochs': '3'}, "`epochs` is '3'"), ({'early_stop': -2}, '`early_stop` is -2'), ({'save_period': 0.5}, '`save_period` is 0.5'),
    ({'monitor': 'val_loss'}, 'min val_loss'), ({'monitor': 'off', 'early_stop': 2}, 'needs something to watch'), ({'log_step': 0}, '`log_step` is 0'), ({'loss': None}, 'needs a `loss`'),
    ({'callbacks': ['NoSuchThing']}, 'NoSuchThing'), ({'optimizer': 'Adamm'}, 'Adam'), ({'loss': 'cross_entropi'}, 'cross_entropy'), ({'metrics': ['acuracy']}, 'accuracy'), ({'device': 'gpu'}, 'cuda')])
def test_settings(wrong, text):
    with pytest.raises(StudioError) as e: trainer(**wrong)
    assert text in str(e.value)

@pytest.mark.parametrize('monitor,text', [('max val_acc', 'did you mean `val_accuracy`'), ('min lossy', 'did you mean `loss`'), ('min f1', 'It has `loss`, `accuracy`, `val_loss`, `val_accuracy`')])
def test_an_unknown_monitor_is_found_before_training(monitor, text):
    t = trainer(monitor=monitor)
    with pytest.raises(ConfigError) as e: t.train()
    assert text in str(e.value) and t.steps==0

def test_a_validated_monitor_needs_a_valid_loader():
    t = Trainer(model(), loaders()[0], loss='cross_entropy', monitor='min val_loss', device='cpu', progress=False)
    with pytest.raises(ConfigError, match='no validation split'): t.train()

class Endless(IterableDataset):
    "A stream that does not know its length."
    def __iter__(self): yield from zip(*data())

def test_loaders_without_batches():
    x, y = data()
    empty, short = DataLoader(TensorDataset(x[:0], y[:0]), 4), DataLoader(TensorDataset(x[:3], y[:3]), 4, drop_last=True)
    for pair,text in (((empty, None), '`train_loader` has no batches: its dataset is empty'), ((short, None), '3 samples, `batch_size` 4'), ((loaders()[0], empty), '`valid_loader` has no batches'),
                      ((iter([]), None), '`train_loader` gave no batches'), ((loaders()[0], iter([])), '`valid_loader` gave no batches')):
        with pytest.raises(DataError) as e: Trainer(model(), *pair, loss='cross_entropy', device='cpu', progress=False).train()
        assert text in str(e.value)

def test_a_loader_without_length(tmp_path):
    "Streams train, stop and go on; they only have to be passed over."
    def t(**kwargs): return Trainer(model(), DataLoader(Endless(), 16), loss='cross_entropy', device='cpu', epochs=2, **dict(progress=False) | kwargs)
    whole, first = t(progress=True), t(folder=tmp_path, callbacks=[stop_at(8)])
    whole.train()
    first.train()
    second = t(folder=tmp_path).load(tmp_path)
    assert second.step==2
    second.train()
    assert_same(second, whole)

def test_nan_is_reported_once_and_never_best(tmp_path, caplog):
    t = trainer(folder=tmp_path, optimizer={'type': 'SGD', 'args': {'lr': math.inf}}, scheduler=None, epochs=3, on_nan='warn')
    with caplog.at_level('WARNING', logger='deep_studio_nb'):
        import logging
        logging.getLogger('deep_studio_nb').addHandler(caplog.handler)
        try: t.train()
        finally: logging.getLogger('deep_studio_nb').removeHandler(caplog.handler)
    texts = {o.getMessage() for o in caplog.records}
    assert len([o for o in texts if 'is nan in epoch' in o])==1
    assert len(t.history)==3 and not (tmp_path/'best_model.pt').exists() and (tmp_path/'last.pt').exists()

# --- other trainers and models ---

class Own(BaseTrainer):
    "A person's own training: one method."
    def _train_epoch(self, epoch):
        total = 0.
        for x,y in self.train_loader:
            loss = nn.functional.cross_entropy(self.model(x), y)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            total += loss.item()
        return {'loss': total/len(self.train_loader), 'noise': torch.rand(1)}

def test_own_trainer_with_one_method(tmp_path):
    def own(n, **kwargs): return Own(model(), loaders()[0], optimizer={'type': 'SGD', 'args': {'lr': 0.1}}, epochs=n, device='cpu', progress=False, **kwargs)
    whole = own(4)
    assert whole.fit().columns==['epoch', 'loss', 'noise', 'lr', 'seconds']
    own(2, folder=tmp_path).train()
    second = own(4, folder=tmp_path).load(tmp_path)
    second.train()
    assert_same(second, whole)
    assert sorted(o.name for o in tmp_path.iterdir())==['best_model.pt', *(f'epoch_{i}.pt' for i in range(1, 5)), 'last.pt']

class Two(nn.Module):
    "A module with its own losses, values and answers, with no base class."
    def __init__(self):
        super().__init__()
        self.net, self.judge = model(), nn.Linear(4, 1)
        self.seen = []
    def forward_train(self, batch):
        preds = self.net(batch['x'])
        self.seen.append(self.training)
        losses = Loss({'class': nn.functional.cross_entropy(preds, batch['y']), 'judge': self.judge(batch['x']).square().mean()}, weights={'judge': 0.1})
        return preds, losses, Metrics(size=preds.norm(), n=len(preds))
    def forward_test(self, batch): return self.net(batch['x']).argmax(1)

def named():
    x, y = data()
    return [{'x': x[i:i+20], 'y': y[i:i+20]} for i in range(0, 90, 20)]

def test_a_module_with_forward_train(tmp_path):
    def two(**kwargs): return Trainer(Two(), named(), named(), epochs=2, device='cpu', optimizer={'type': 'SGD', 'args': {'lr': 0.1}}, **dict(progress=False, monitor='min val_judge') | kwargs)
    with torch.random.fork_rng(): torch.manual_seed(0); whole = two()
    whole.train()
    assert whole.history.columns[:8]==['epoch', 'loss', 'class', 'judge', 'size', 'n', 'val_loss', 'val_class']
    assert whole.model.seen==([True]*5 + [False]*5)*2
    assert math.isclose(whole.history[0]['n'], (20*20*4+10*10)/90, rel_tol=1e-6)          # weighted by items, the short batch less
    with torch.random.fork_rng(): torch.manual_seed(0); first = two(folder=tmp_path, callbacks=[stop_at(7)])
    first.train()
    second = two(folder=tmp_path).load(tmp_path)
    second.train()
    assert_same(second, whole)

def test_a_misspelt_value_of_such_a_module_stops_after_one_step():
    t = Trainer(Two(), named(), named(), device='cpu', monitor='min val_jugde', progress=False)
    with pytest.raises(ConfigError, match='did you mean `val_judge`'): t.train()
    assert t.steps==1

def test_validate_at_any_time():
    t = trainer(epochs=1)
    before = validate(t.model, t.valid_loader, 'cross_entropy', ['accuracy'])
    t.train()
    after = validate(t.model, t.valid_loader, 'cross_entropy', ['accuracy'])
    assert before!=after and after['loss']==pytest.approx(t.history[-1]['val_loss']) and t.model.training

def test_history_of_an_unknown_column():
    t = trainer(epochs=1)
    with pytest.raises(UnknownName, match='did you mean `val_loss`'): t.train()['val_los']

def test_memory_is_let_go():
    t = trainer(epochs=1)
    t.train()
    assert [t.batch, t.preds, t.losses, t.values]==[None]*4 and not t.loss.requires_grad

def test_progress_only_reads(capsys):
    t, quiet = trainer(epochs=2, progress=True), trainer(epochs=2)
    t.train(), quiet.train()
    assert_same(t, quiet)
    lines = capsys.readouterr().out.splitlines()
    assert [o.split('  ')[0] for o in lines]==['epoch 1/2', 'epoch 2/2'] and 'val_accuracy' in lines[0]

def test_hand_made_callback_needs_only_what_it_reads():
    from deep_studio_nb.training.callbacks import StopAfter
    stopped = []
    StopAfter(steps=3).after_batch(SimpleNamespace(steps=3, stop=lambda: stopped.append(1)))
    assert stopped==[1]

def test_one_sample_left_over_for_a_batch_norm():
    x, y = torch.randn(7, 4), torch.arange(7)%2
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    t = Trainer(model, BaseDataLoader(Tensors(x, y), 3), loss='cross_entropy', device='cpu', progress=False)
    with pytest.raises(DataError, match='step 3 has a single sample.*drop_last'): t.train()
    kept = Trainer(model, BaseDataLoader(Tensors(x, y), 3, drop_last=True), loss='cross_entropy', device='cpu', progress=False)
    assert len(kept.train()) == 1

def test_validate_takes_a_device_by_name():
    batches = [(torch.randn(4, 3), torch.arange(4)%3)]
    assert validate(torch.nn.Identity(), batches, 'cross_entropy', device='cpu') == validate(torch.nn.Identity(), batches, 'cross_entropy')
