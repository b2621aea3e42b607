"""Training in two processes is training in one: the same numbers, stops, checkpoints and errors."""
import math, os, shutil, subprocess, sys
from pathlib import Path
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset
from deep_studio_nb.common.errors import ConfigError, RunError
from deep_studio_nb.common.processes import in_processes, rank
from deep_studio_nb.common.types import Loss, Metrics
from deep_studio_nb.data.base_loader import BaseDataLoader
from deep_studio_nb.data.samples import BaseDataset, Unreadable
from deep_studio_nb.data.tensors import Tensors
from deep_studio_nb.training import averaging, keeping, mixing  # noqa: F401 (registers their names)
from deep_studio_nb.training.checkpoints import load_checkpoint
from deep_studio_nb.training.events import When
from deep_studio_nb.training.peers import Peers
from deep_studio_nb.training.sharded import whole
from deep_studio_nb.training.trainer import Trainer

pytestmark = pytest.mark.skipif(sys.platform!="linux", reason="processes are copied")
SECONDS = 120       # after which a process that hangs is ended

@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

X = torch.randn(77, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0]>0).long() + (X[:, 1]>0.5).long()
TRAIN,VALID = (X[:61], Y[:61]), (X[61:], Y[61:])    # 61 in batches of 12: the last one has a single sample

class Stream(IterableDataset):
    def __init__(self, x, y): self.x,self.y = x,y
    def __iter__(self): return iter(zip(self.x, self.y))

class Holes(BaseDataset):
    "Samples of which some cannot be read, a whole batch of them among those."
    classes = ["a", "b", "c"]
    def __init__(self, x, y): self.x,self.y = x,y
    def __len__(self): return len(self.x)
    def load(self, i):
        if i in (3, 5) or 24<=i<36: raise Unreadable(f"Number {i} is gone.", reason="gone")
        return self.x[i],int(self.y[i])

def batches(x, y, n): return [(x[i:i+n], y[i:i+n]) for i in range(0, len(x), n)]

LOADERS = {
    "ours": lambda x,y,n,train: BaseDataLoader(Tensors(x, y), n, shuffle=train, seed=1),
    "torch": lambda x,y,n,train: DataLoader(TensorDataset(x, y), n, shuffle=train),
    "list": lambda x,y,n,train: batches(x, y, n),
    "stream": lambda x,y,n,train: DataLoader(Stream(x, y), n),
    "holes": lambda x,y,n,train: BaseDataLoader(Holes(x, y), n, shuffle=False, num_workers=0),
}

class Twofold(nn.Module):
    "A model with losses of its own; the second part is not used in the first epoch."
    def __init__(self):
        super().__init__()
        self.first,self.second,self.epoch = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)),nn.Linear(6, 3),1

    def forward(self, x): return self.first(x)
    def forward_test(self, batch): return self(batch[0])
    def forward_train(self, batch):
        x,y = batch
        preds = self(x)
        losses = {"ce": nn.functional.cross_entropy(preds, y)}
        if self.epoch>1: losses["aside"] = nn.functional.cross_entropy(self.second(x), y)
        return preds, Loss(losses, weights={"aside": 0.5} if self.epoch>1 else {}), Metrics(right=(preds.argmax(1)==y).float().mean())

def model_of(kind):
    torch.manual_seed(0)
    if kind=="own": return Twofold()
    body = [nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)]
    return nn.Sequential(nn.Linear(6, 6), *body) if kind=="deep" else nn.Sequential(*body)

def trainer_of(loader="ours", model="plain", epochs=3, **kw):
    make = LOADERS[loader]
    opts = dict(optimizer={"type": "AdamW", "args": {"lr": 0.02}}, device="cpu", progress=False, monitor="min val_loss", metrics=["accuracy", {"type": "F1Score", "args": {"task": "multiclass", "num_classes": 3, "average": "macro"}}])
    if model=="own":
        opts["metrics"],opts["callbacks"] = [],[When(before_epoch=note_epoch)]
    else: opts["loss"] = "cross_entropy"
    return Trainer(model_of(model), make(*TRAIN, 12, True), make(*VALID, 5, False), epochs=epochs, **(opts | kw))

def note_epoch(trainer): trainer.model.epoch = trainer.epoch

def result(trainer): return [dict(o) for o in trainer.history.rows], whole(trainer.raw_weights())

def train(**kw):
    trainer = trainer_of(**kw)
    trainer.train()
    return result(trainer)

def apart(a, b):
    "By how much two results differ: their numbers, and their weights."
    assert len(a[0])==len(b[0])
    for x,y in zip(a[0], b[0]): assert x.keys()==y.keys()
    numbers = max(abs(x[k]-y[k]) for x,y in zip(a[0], b[0]) for k in x if k!="seconds")
    return numbers, max(float((a[1][k]-b[1][k]).abs().max()) for k in a[1])

EMA = {"type": "EMA", "args": {"decay": 0.9}}
CASES = {
    "ours": {}, "torch": dict(loader="torch"), "list": dict(loader="list"), "stream": dict(loader="stream"), "holes": dict(loader="holes"),
    "own losses": dict(model="own"), "own losses, fsdp": dict(model="own", strategy="fsdp"),
    "accumulate": dict(accumulate=4, clip_norm=0.3, callbacks=[EMA]), "accumulate a stream": dict(loader="stream", accumulate=4),
    "schedule": dict(loader="torch", scheduler={"type": "OneCycleLR", "args": {"max_lr": 0.05}}, accumulate=2, clip_value=0.01),
    "plateau": dict(epochs=4, scheduler={"type": "ReduceLROnPlateau", "args": {"patience": 0, "factor": 0.1, "threshold": 0.5}}),
    "fsdp": dict(strategy="fsdp"), "fsdp with all": dict(strategy="fsdp", accumulate=3, clip_norm=0.3, callbacks=[EMA]),
    "bf16": dict(precision="bf16"),
}

def test_two_processes_are_one():
    "Validation and weights agree with those of one process on the same global batches, uneven last batches included."
    alone = {k: train(**v) for k,v in CASES.items()}
    first,second = in_processes(lambda: {k: train(**v) for k,v in CASES.items()}, seconds=SECONDS)
    for k in CASES:
        numbers,weights = apart(alone[k], first[k])
        rough = k=="bf16"       # half precision rounds sums of other lengths differently
        assert weights<=(5e-3 if rough else 1e-5) and (rough or numbers<=1e-5), (k, numbers, weights)
        assert [{n: o[n] for n in o if n!="seconds"} for o in first[k][0]]==[{n: o[n] for n in o if n!="seconds"} for o in second[k][0]], k

def seen(loader):
    "Which samples a process trains and validates on, by batch."
    trainer,found = trainer_of(loader, epochs=1, restore_best=False), {"train": [], "valid": []}
    trainer.add(When(after_batch=lambda t: found["train"].append([] if t.peers and not t.peers.mine else t.batch[0][:, 0].tolist())))
    trainer.model.register_forward_hook(lambda m, x, y: None if m.training else found["valid"].append(x[0][:, 0].tolist()))
    trainer.train()
    return found

def test_every_sample_counts_once():
    "Together two processes see each sample once, in training and in validation."
    for found in zip(*in_processes(lambda: [seen(o) for o in ("ours", "torch", "list")], seconds=SECONDS)):
        train_seen = sorted(sum((sum(o["train"], []) for o in found), []))
        assert train_seen==sorted(TRAIN[0][:, 0].tolist())
        valid_seen = sorted(sum((sum(o["valid"][1:], []) for o in found), []))    # the first look is the check of the first batch
        assert valid_seen==sorted(VALID[0][:, 0].tolist())

def stop_after(steps): return When(after_batch=lambda t: t.stop() if t.steps==steps and rank()==t.world_that_stops else None)

def begun(folder, steps, who=0, **kw):
    "Train until one process asks to stop."
    trainer = trainer_of(folder=folder, **kw)
    trainer.world_that_stops = who
    trainer.add(stop_after(steps))
    trainer.train()
    assert trainer.stopped and trainer.steps==steps
    return True

def gone_on(folder, **kw):
    trainer = trainer_of(folder=folder, **kw).load(folder)
    trainer.train()
    return result(trainer)

PLANS = {"ours": {}, "torch": dict(loader="torch"), "accumulate, ema": dict(accumulate=4, callbacks=[EMA]), "fsdp": dict(strategy="fsdp", accumulate=4, callbacks=[EMA]), "own": dict(model="own", loader="torch")}

def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    "Stopped in the middle of an epoch in one or two processes, by either of them, a run goes on in two or one."
    straight = {k: train(**v) for k,v in PLANS.items()}
    def first_halves(): return [begun(tmp_path/"2"/k, 8, who=1, **v) for k,v in PLANS.items()]
    in_processes(first_halves, seconds=SECONDS)
    for k,v in PLANS.items(): begun(tmp_path/"1"/k, 8, **v)
    for k in PLANS: assert sorted(o.name for o in (tmp_path/"2"/k).iterdir())==sorted(o.name for o in (tmp_path/"1"/k).iterdir())
    states = [load_checkpoint(tmp_path/n/"accumulate, ema"/"last.pt") for n in "12"]
    torch.testing.assert_close(*(o["grads"] for o in states), atol=1e-6, rtol=1e-5)
    def second_halves(): return {(n,k): gone_on(tmp_path/n/k, **v) for n in "12" for k,v in PLANS.items()}
    for k,v in PLANS.items():
        numbers,weights = apart(straight[k], gone_on(_copy(tmp_path/"2"/k, tmp_path/"2to1"/k), **v))
        assert numbers<=1e-5 and weights<=1e-5, (k, numbers, weights)
    for (n,k),found in in_processes(second_halves, seconds=SECONDS)[0].items():
        numbers,weights = apart(straight[k], found)
        assert numbers<=1e-5 and weights<=1e-5, (n, k, numbers, weights)

def _copy(a, b):
    return Path(shutil.copytree(a, b))

class Dropped(nn.Module):
    "Draws random numbers in each step."
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 3))
    def forward(self, x): return self.net(x)

def dropped(folder, stop=0):
    torch.manual_seed(0)
    trainer = Trainer(Dropped(), LOADERS["torch"](*TRAIN, 12, True), LOADERS["torch"](*VALID, 5, False), loss="cross_entropy", epochs=2, device="cpu", progress=False, folder=folder, optimizer={"type": "SGD", "args": {"lr": 0.1}})
    noise = []
    trainer.model.net[1].register_forward_hook(lambda m, x, y: noise.append(y.detach()) if m.training else None)
    if stop==1:
        trainer.world_that_stops = 0
        trainer.add(stop_after(4))
    if stop==2: trainer.load(folder)
    trainer.train()
    return result(trainer)[1], float(noise[-1].sum())

def test_random_numbers_are_kept_for_each_process(tmp_path):
    "With as many processes as before a run goes on bit for bit; processes draw different numbers."
    def work(): return dropped(None), dropped(tmp_path, 1), dropped(tmp_path, 2)
    first,second = in_processes(work, seconds=SECONDS)
    assert all(torch.equal(first[0][0][k], first[2][0][k]) for k in first[0][0])
    assert first[0][1]!=second[0][1] and first[0][1]==first[2][1] and second[0][1]==second[2][1]

def test_saving_is_agreed(tmp_path):
    "A wish to save that one process has is met by all; files are written once; early stopping is the same everywhere."
    def work():
        trainer = trainer_of(folder=tmp_path/"run", epochs=20, early_stop=2, optimizer={"type": "SGD", "args": {"lr": 20.}}, monitor="min val_loss", callbacks=[{"type": "KeepBest", "args": {"k": 1}}])
        trainer.add(When(after_batch=lambda t: t.ask_save("asked.pt") if t.steps==3 and rank()==1 else t.ask_save("all.pt") if t.steps==4 else None))
        writes = []
        trainer.saver.save,kept = lambda folder, names, state: (writes.append(list(names)), kept(folder, names, state))[1], trainer.saver.save
        trainer.train()
        return writes, len(trainer.history), trainer.history.best()["epoch"]
    first,second = in_processes(work, seconds=SECONDS)
    assert second[0]==[] and first[1:]==second[1:] and first[1]<20
    states = {n: load_checkpoint(tmp_path/"run"/n) for n in ("all.pt", "last.pt")}
    assert states["all.pt"]["steps"]==4 and len(states["all.pt"]["rngs"])==2 and states["last.pt"]["rngs"] is None
    assert ["asked.pt"] in first[0] and ["all.pt"] in first[0] and sum(o[-1]=="last.pt" for o in first[0])==first[1]

def test_what_fails_ends_all(tmp_path):
    "An error in one process ends the others with a word, and nothing hangs."
    def work():
        trainer = trainer_of(folder=tmp_path)
        trainer.add(When(after_batch=lambda t: 1/0 if t.steps==3 and rank()==1 else None))
        trainer.train()
    with pytest.raises(RunError, match="failed: ZeroDivisionError"): in_processes(work, seconds=SECONDS)

def test_other_loops_and_settings():
    "What several processes cannot do is refused in words, not done wrongly."
    class Mine(Trainer):
        def _train_epoch(self, epoch): return {"loss": 0.}
    def work():
        said = []
        for make in (lambda: Mine(model_of("plain"), batches(*TRAIN, 12), loss="cross_entropy", device="cpu"), lambda: trainer_of(strategy="fsdp", precision="fp16"), lambda: trainer_of(strategy="dp")):
            try: make()
            except (RunError, ConfigError) as e: said.append(str(e))
        return said
    for said in in_processes(work, seconds=SECONDS):
        assert "`Mine` trains in a way of its own" in said[0] and "Take `bf16`" in said[1] and "`strategy` is 'dp'" in said[2]

def test_loaders_that_are_divided_already():
    "A loader that gives each process its own samples is left alone, even if one is longer than the other."
    def work():
        own = batches(*TRAIN, 12)[:4] if rank()==0 else batches(*TRAIN, 12)[4:]
        trainer = trainer_of(epochs=1)
        trainer.train_loader = type("Own", (list,), {"sharded": True})(own)
        sizes = []
        trainer.add(When(after_batch=lambda t: sizes.append((t.peers.mine, t.peers.size))))
        trainer.train()
        loader = DataLoader(TensorDataset(*VALID), 4, sampler=DistributedSampler(VALID[0], shuffle=False))
        return sizes, trainer.history[-1]["loss"], Peers().share(loader) is loader
    (first,loss,same),(second,other,_) = in_processes(work, seconds=SECONDS)
    assert first==[(12,24), (12,13), (12,12), (12,12)] and second==[(12,24), (1,13), (0,12), (0,12)]
    assert loss==other and math.isfinite(loss) and same

MODULE = '''
import os, signal
import torch
from torch import nn
from deep_studio_nb.common.registry import CALLBACKS, DATASETS, MODELS
from deep_studio_nb.data.tensors import Tensors
from deep_studio_nb.training.events import Callback

@DATASETS.register
class Toys(Tensors):
    def __init__(self):
        x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
        super().__init__(x, (x[:, 0]>0).long(), classes=["no", "yes"])

@MODELS.register
class Small(nn.Sequential):
    def __init__(self): super().__init__(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))

@CALLBACKS.register
class Accident(Callback):
    "Something happens to the second process."
    def after_batch(self, trainer):
        what = os.environ.get("ACCIDENT", "")
        if trainer.steps!=9 or os.environ.get("RANK", "1")!="1": return
        if what=="error": raise ValueError("the second process has had enough")
        if what=="kill": os.kill(os.getpid(), signal.SIGKILL)
        if what=="stop": os.kill(os.getppid(), signal.SIGINT)
'''
CONFIG = '''
name: toys
imports: [toys_of_test]
device: cpu
dataset: Toys
data_loader: {type: DataLoader, args: {batch_size: 33, validation_split: 41}}
arch: Small
loss: cross_entropy
metrics: [accuracy]
optimizer: {type: AdamW, args: {lr: 0.01}}
trainer: {epochs: 3}
callbacks: [Accident]
'''

def deep_studio(folder, *words, accident="", seconds=SECONDS):
    env = {k: v for k,v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"ACCIDENT": accident, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.run([sys.executable, "-c", "from deep_studio_nb.cli import main; main()", *words], cwd=folder, env=env, capture_output=True, text=True, timeout=seconds)

@pytest.fixture
def project(tmp_path):
    (tmp_path/"toys_of_test.py").write_text(MODULE)
    (tmp_path/"toys.yaml").write_text(CONFIG)
    return tmp_path

def weights(folder, name): return load_checkpoint(folder/"experiments"/name/"checkpoints"/"last.pt")["model"]

def goes_on(project):
    "Let the run go on in one process, and compare it with one that was never disturbed."
    for words in (["--name", "alone"], ["--resume", "auto"]):
        done = deep_studio(project, "train", "toys.yaml", *words)
        assert done.returncode==0, done.stderr
    assert sorted(o.name for o in (project/"experiments").iterdir())==["alone", "toys"]
    for k,v in weights(project, "alone").items(): torch.testing.assert_close(v, weights(project, "toys")[k], atol=1e-5, rtol=1e-5)

def test_the_command_in_two_processes(project):
    "--nproc 2: one folder; an error in one process ends both with one message; the run goes on in one process."
    wrong = deep_studio(project, "train", "toys.yaml", "--nproc", "2", accident="error")
    assert wrong.returncode==1 and (wrong.stdout+wrong.stderr).count("the second process has had enough")==1 and "Traceback" not in wrong.stderr, wrong.stderr
    goes_on(project)

@pytest.mark.slow
def test_two_processes_that_are_killed_and_stopped(project):
    "A process that is killed, and Ctrl-C, end the run with one message; it goes on in two processes, then in one."
    killed = deep_studio(project, "train", "toys.yaml", "--nproc", "2", accident="kill")
    assert killed.returncode==1 and killed.stderr.count("Error:")==1 and "Process 1 of 2 was killed (SIGKILL)" in killed.stderr, killed.stderr
    stopped = deep_studio(project, "train", "toys.yaml", "--nproc", "2", "--resume", "auto", accident="stop")
    assert stopped.returncode==130, stopped.stdout+stopped.stderr
    goes_on(project)
