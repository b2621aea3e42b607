"""`speed: auto`: it measures on copies, refuses what changes too much, keeps its choice in the checkpoint, and never decides by noise."""
import hashlib
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from deep_studio_nb.common.errors import ConfigError
from deep_studio_nb.data.loaders import BaseDataLoader
from deep_studio_nb.data.tensors import Tensors
from deep_studio_nb.training import speed as speed_module
from deep_studio_nb.training.checkpoints import load_checkpoint
from deep_studio_nb.training.speed import Speed, measure_speed
from deep_studio_nb.training.switches import Switches, combinations, compare_numerics, fast_bf16
from deep_studio_nb.training.trainer import Trainer

CPU = torch.device("cpu")


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(8*36, 4))


def pictures(n=48):
    draws = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, 8, 8, generator=draws), torch.arange(n)%4


def hash_of(*parts):
    res = hashlib.sha256()
    def add(o):
        if isinstance(o, torch.Tensor): res.update(o.detach().contiguous().numpy().tobytes() + str((o.dtype, tuple(o.shape), o.stride())).encode())
        elif isinstance(o, dict): [(res.update(repr(k).encode()), add(v)) for k,v in o.items()]
        elif isinstance(o, (list, tuple)): [add(v) for v in o]
        else: res.update(repr(o).encode())
    add(parts)
    return res.hexdigest()


def test_measuring_leaves_model_optimizer_and_random_numbers_alone():
    from deep_studio_nb.common.randomness import rng_state
    model,(x,y) = small_net(),pictures()
    opt = torch.optim.AdamW(model.parameters())
    F.cross_entropy(model(x), y).backward()
    opt.step()                                                  # an optimizer with a state, gradients that wait
    def all_there_is(): return hash_of(model.state_dict(), opt.state_dict(), [p.grad for p in model.parameters()], rng_state(), torch.get_num_threads(), [o.training for o in model.modules()])
    before = all_there_is()
    found = measure_speed(model, (x, y), F.cross_entropy, opt, seconds=0.5)
    assert found.trials and all_there_is()==before


@pytest.mark.parametrize("make", [lambda x, y: DataLoader(TensorDataset(x, y), 8, shuffle=True), lambda x, y: BaseDataLoader(Tensors(x, y), 8),
                                  lambda x, y: DataLoader(TensorDataset(x, y), 8, shuffle=True, generator=torch.Generator().manual_seed(3))], ids=["torch", "ours", "own-generator"])
def test_measuring_changes_neither_order_nor_draws_of_the_run(make, monkeypatch):
    "A run that measured and stayed with fp32 eager ends bit for bit as one that did not measure."
    def weights(speed):
        x,y = pictures()
        trainer = Trainer(small_net(), make(x, y), loss="cross_entropy", optimizer="AdamW", epochs=2, device="cpu", progress=False, speed=speed)
        trainer.train()
        return trainer
    monkeypatch.setattr(speed_module, "too_short", lambda *_: None)
    monkeypatch.setattr(speed_module, "pick", lambda trials, otherwise=Switches(): otherwise)
    plain,measured = weights(None),weights("auto")
    assert measured.chosen["table"] and plain.chosen is None
    for a,b in zip(plain.model.state_dict().values(), measured.model.state_dict().values()): assert torch.equal(a, b)


def chosen_as(monkeypatch, switches, count=None):
    "Let the measuring come to this choice, and count how often it is asked."
    def measured(*_, **__):
        if count is not None: count.append(1)
        return Speed(switches, "It was said so.", [])
    monkeypatch.setattr(speed_module, "measure_speed", measured)


def new_trainer(epochs=3, folder=None, **kwargs):
    x,y = pictures()
    return Trainer(small_net(), BaseDataLoader(Tensors(x, y), 8), loss="cross_entropy", optimizer="AdamW", epochs=epochs, device="cpu", progress=False, folder=folder,
                   **{"speed": "auto", **kwargs})


def test_the_choice_is_used_and_recorded(monkeypatch, tmp_path):
    chosen_as(monkeypatch, Switches("bf16", True, 1))
    trainer = new_trainer(folder=tmp_path)
    seen = []
    forward = trainer.model[0].forward
    def watching(x):
        res = forward(x)
        seen.append((res.dtype, x.is_contiguous(memory_format=torch.channels_last), torch.get_num_threads()))
        return res
    trainer.model[0].forward = watching
    threads = torch.get_num_threads()
    trainer.train()
    assert set(seen)=={(torch.bfloat16, True, 1)} and torch.get_num_threads()==threads
    state = load_checkpoint(tmp_path/"last.pt")
    assert state["speed"]["switches"]==Switches("bf16", True, 1).as_dict() and state["speed"]["why"]=="It was said so."
    assert all(p.dtype==torch.float32 for p in trainer.model.parameters())


def test_going_on_uses_the_same_switches_without_measuring(monkeypatch, tmp_path):
    "Stopped within an epoch, loaded elsewhere: the same weights as in one go, whatever a second measurement would say."
    from deep_studio_nb.training.callbacks import StopAfter
    count = []
    chosen_as(monkeypatch, Switches("bf16", True), count)
    whole = new_trainer()
    whole.train()
    new_trainer(folder=tmp_path, callbacks=[StopAfter(steps=8)]).train()
    assert len(count)==2
    chosen_as(monkeypatch, Switches(), count)
    rest = new_trainer()
    rest.load(tmp_path/"last.pt").train()
    assert len(count)==2 and (rest.precision, rest.channels_last)==("bf16", True)
    for (k,a),b in zip(whole.model.state_dict().items(), rest.model.state_dict().values()): assert torch.equal(a, b), k
    rest.epochs = 4
    rest.train()
    assert len(count)==2


def test_what_was_asked_for_stays_on(monkeypatch):
    given = []
    monkeypatch.setattr(speed_module, "measure_speed", lambda *_, given, **__: Speed(given, "Asked.", []) if not given_to(given) else None)
    def given_to(o): given.append(o)
    trainer = new_trainer(precision="bf16", channels_last=True, threads=1)
    trainer.train()
    assert given==[Switches("bf16", True, 1)] and (trainer.precision, trainer.channels_last, trainer.threads)==("bf16", True, 1)


def test_a_run_that_cannot_be_measured_goes_on_as_it_is(caplog):
    trainer = new_trainer()                                     # 18 steps
    with caplog.at_level(logging.INFO, "deep_studio_nb"): trainer.train()
    assert trainer.precision=="fp32" and len(trainer.history)==3
    assert trainer.chosen["why"]=="Not measured: this run has 18 steps."
    assert "Not measured" in caplog.text


def test_a_loader_that_gives_its_batches_once_is_not_touched():
    x,y = pictures()
    loader = iter([(x[:8], y[:8])]*6)
    trainer = Trainer(small_net(), loader, loss="cross_entropy", epochs=1, device="cpu", progress=False, speed="auto")
    trainer.train()
    assert trainer.steps==6 and "only once" in trainer.chosen["why"]


class Uncopied(nn.Module):
    "A model that cannot be copied."
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)
    def forward(self, x): return self.fc(x)
    def __deepcopy__(self, memo): raise TypeError("I am the only one")


class Differences(nn.Module):
    "A model of small differences of large numbers, which bf16 does not have."
    def __init__(self):
        super().__init__()
        self.up,self.down = nn.Linear(5, 16),nn.Linear(16, 4)
        nn.init.constant_(self.up.bias, 3000.)
    def forward(self, x): return self.down(self.up(x)-3000)


def test_a_model_that_cannot_be_copied_is_trained_in_fp32():
    found = measure_speed(Uncopied(), (torch.randn(8, 4), torch.arange(8)%2), F.cross_entropy, seconds=0.2)
    assert found.choice==Switches() and "I am the only one" in found.why and not found.trials


def test_a_batch_that_fails_is_left_to_the_run():
    x,y = pictures()
    found = measure_speed(small_net(), (x[:,:2], y), F.cross_entropy, seconds=0.2)
    assert found.choice==Switches() and found.why.startswith("Not measured, as a step fails")


def test_bf16_is_refused_where_it_changes_too_much(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("deep_studio_nb.training.switches.fast_bf16", lambda device: True)
    found = measure_speed(Differences(), (torch.randn(8, 5), torch.arange(8)%4), F.cross_entropy, seconds=0.3)
    assert found.choice.precision=="fp32" and not found.numerics.ok
    assert [o.note for o in found.trials if o.switches.precision=="bf16"][0]=="refused: bf16 changes too much"
    assert "bf16 on this batch" in str(found)


def test_bf16_is_not_tried_where_the_hardware_is_slow_at_it(monkeypatch):
    monkeypatch.setattr("deep_studio_nb.training.switches.fast_bf16", lambda device: False)
    assert all(o.precision=="fp32" for o in combinations(small_net(), pictures(), CPU))
    assert fast_bf16(torch.device("mps")) is False


def test_numerics_with_dropout_compare_the_same_draws():
    x,y = pictures()
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.Dropout(0.5), nn.Linear(64, 4))
    assert compare_numerics(model, (x, y), F.cross_entropy).cosine>0.99


def test_a_switch_that_fails_is_out_of_the_race(monkeypatch):
    "Here channels_last cannot be done."
    class Strict(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()
        def forward(self, x):
            if not x.is_contiguous(): raise RuntimeError("wants rows")
            return self.net(x)
    found = measure_speed(Strict(), pictures(), F.cross_entropy, seconds=0.3)
    bad = [o for o in found.trials if o.switches.channels_last]
    assert bad and all(o.note=="failed: wants rows" for o in bad) and not found.choice.channels_last


def test_models_that_score_themselves_are_measured():
    from deep_studio_nb.common.types import Loss, Metrics
    from deep_studio_nb.models.interface import BaseModel
    class Own(BaseModel):
        def __init__(self):
            super().__init__()
            self.net = small_net()
        def forward_train(self, batch):
            preds = self.net(batch["image"])
            return preds, Loss({"ce": F.cross_entropy(preds, batch["label"])}), Metrics()
        def forward_test(self, batch): return self.net(batch["image"])
    x,y = pictures()
    found = measure_speed(Own(), {"image": x, "label": y}, seconds=0.3)
    assert found.trials and any(o.switches.channels_last for o in found.trials) and found.samples==48


def test_speed_takes_auto_only():
    with pytest.raises(ConfigError, match="`speed`"): new_trainer(speed="fast")


def test_the_table_is_shown_and_kept(capsys, monkeypatch):
    monkeypatch.setattr(speed_module, "too_short", lambda *_: None)
    x,y = pictures()
    trainer = Trainer(small_net(), BaseDataLoader(Tensors(x, y), 8), loss="cross_entropy", epochs=1, device="cpu", speed="auto")
    trainer.train()
    out = capsys.readouterr().out
    assert "times as fast" in out and "fp32 eager" in out and trainer.chosen["table"][0]["switches"]=="fp32 eager"


@pytest.mark.slow
def test_compiling_is_tried_in_a_long_run():
    "The choice may be either; what counts is that it was tried, timed, and left nothing behind."
    model,(x,y) = small_net(),pictures()
    before = hash_of(model.state_dict())
    found = measure_speed(model, (x, y), F.cross_entropy, steps=10**7, seconds=1, compile_from=1)
    tried = [o for o in found.trials if o.switches.compile]
    assert len(tried)==1 and (tried[0].ratios or tried[0].note) and hash_of(model.state_dict())==before
