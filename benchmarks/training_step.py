"""What one training step costs beyond the arithmetic: a tiny MLP on tensors in memory, against the hand-written loop and the peers.

    python benchmarks/training_step.py [--rounds 9] [--steps 400] [--threads 1] [--pixels 128] [--picture-rounds 11] [--write]

Every round runs each contestant once, in turn, for one epoch of --steps steps of 64 samples; a ratio is taken within a round, so that a busy
machine slows both sides, and the median over the rounds is reported. All use the same model, SGD and cross entropy. Peers that are not installed
are left out. The hand-written loop keeps nothing; ours keeps a history, shows progress and, in the second row, computes the accuracy as well.

A second table does the same where the arithmetic is all: ResNet-18 on batches of 32 pictures, against a hand-written loop with the same switches,
on all cores, with the accuracy, progress and history on.
Exit code 1 if ours costs more than 0.75 of the first hand-written loop, or more than 1.02 of the second.
"""
import argparse, contextlib, importlib.util, io, logging, os, platform, statistics, sys, tempfile, warnings
from pathlib import Path
from time import perf_counter
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

BATCH, FEATURES, CLASSES, LIMIT = 64, 20, 5, 0.75
PICTURES, SHARE = 32, 1.02      # in a batch; what a step on them may cost of the hand-written one

def problem(steps):
    "Tensors for `steps` batches, and a new model with its optimizer."
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(steps*BATCH, FEATURES, generator=g), torch.randint(0, CLASSES, (steps*BATCH,), generator=g)
    torch.manual_seed(0)
    return x, y, nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, CLASSES))

def sgd(model): return torch.optim.SGD(model.parameters(), lr=0.1)

def hand(steps):
    x, y, model = problem(steps)
    opt = sgd(model)
    def run():
        model.train()
        for xb, yb in DataLoader(TensorDataset(x, y), BATCH, shuffle=True):
            loss = cross_entropy(model(xb), yb)
            loss.backward()
            opt.step()
            opt.zero_grad()
    return run

def floor(steps):
    "The same with batches gathered by index: what is left when nothing is wasted."
    x, y, model = problem(steps)
    opt = sgd(model)
    def run():
        model.train()
        for idx in torch.randperm(len(x)).split(BATCH):
            loss = cross_entropy(model(x.index_select(0, idx)), y.index_select(0, idx))
            loss.backward()
            opt.step()
            opt.zero_grad()
    return run

def ours(steps, metrics=(), plain=False, folder=None):
    from deep_studio_nb.data.loaders import BaseDataLoader
    from deep_studio_nb.data.tensors import Tensors
    from deep_studio_nb.training.trainer import Trainer
    x, y, model = problem(steps)
    loader = DataLoader(TensorDataset(x, y), BATCH, shuffle=True) if plain else BaseDataLoader(Tensors(x, y), BATCH)
    trainer = Trainer(model, loader, loss='cross_entropy', metrics=metrics, optimizer=sgd(model), device='cpu', epochs=10**6, folder=folder, save_period=0)
    def run():
        trainer.epochs = len(trainer.history) + 1
        trainer.train()
    return run

def ignite(steps):
    from ignite.engine import Events, create_supervised_trainer
    from ignite.metrics import RunningAverage
    x, y, model = problem(steps)
    engine = create_supervised_trainer(model, sgd(model), cross_entropy)
    RunningAverage(output_transform=lambda o: o).attach(engine, 'loss')
    history = []
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: history.append(e.state.metrics['loss']))
    loader = DataLoader(TensorDataset(x, y), BATCH, shuffle=True)
    return lambda: engine.run(loader, max_epochs=1)

def skorch(steps):
    from skorch import NeuralNet
    x, y, model = problem(steps)
    net = NeuralNet(model, nn.CrossEntropyLoss, lr=0.1, optimizer=torch.optim.SGD, batch_size=BATCH, iterator_train__shuffle=True, train_split=None, max_epochs=1)
    net.initialize()
    return lambda: net.partial_fit(x, y)

def fastai(steps):
    from fastai.learner import Learner
    from fastai.data.core import DataLoaders
    from fastai.optimizer import SGD
    import fastai.callback.progress  # noqa: F401 (importing it turns the progress bar on)
    x, y, model = problem(steps)
    learn = Learner(DataLoaders(DataLoader(TensorDataset(x, y), BATCH, shuffle=True), [], device=torch.device('cpu')), model, loss_func=cross_entropy, opt_func=SGD, lr=0.1)
    return lambda: learn.fit(1)

def lightning(steps):
    import lightning as L
    for o in ('lightning', 'lightning.pytorch'): logging.getLogger(o).setLevel(logging.ERROR)
    x, y, net = problem(steps)
    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net
        def training_step(self, batch, i):
            loss = cross_entropy(self.net(batch[0]), batch[1])
            self.log('loss', loss, on_step=False, on_epoch=True)
            return loss
        def configure_optimizers(self): return sgd(self.net)
    module, folder = Module(), tempfile.mkdtemp()
    def run():
        trainer = L.Trainer(max_epochs=1, accelerator='cpu', logger=False, enable_checkpointing=False, enable_model_summary=False, default_root_dir=folder)
        trainer.fit(module, DataLoader(TensorDataset(x, y), BATCH, shuffle=True))
    return run

def keras(steps):
    os.environ.setdefault('KERAS_BACKEND', 'torch')
    import keras
    x, y, _ = problem(steps)
    model = keras.Sequential([keras.layers.Input((FEATURES,)), keras.layers.Dense(32, activation='relu'), keras.layers.Dense(CLASSES)])
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    loader = DataLoader(TensorDataset(x, y), BATCH, shuffle=True)
    return lambda: model.fit(loader, epochs=1, verbose=1)

def photos(pixels, batches):
    "Tensors for `batches` batches of pictures, and a new ResNet-18."
    from deep_studio_nb.models.resnet import ResNet18
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(batches*PICTURES, 3, pixels, pixels, generator=g), torch.randint(0, CLASSES, (batches*PICTURES,), generator=g)
    torch.manual_seed(0)
    return x, y, ResNet18(num_classes=CLASSES)

def adamw(model): return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

def hand_photos(pixels, batches, bf16, channels_last):
    "The loop that one would write for pictures in memory, with the switches on."
    x, y, model = photos(pixels, batches)
    if channels_last: model.to(memory_format=torch.channels_last)
    opt = adamw(model)
    def run():
        model.train()
        for idx in torch.randperm(len(x)).split(PICTURES):
            xb, yb = x.index_select(0, idx), y.index_select(0, idx)
            if channels_last: xb = xb.contiguous(memory_format=torch.channels_last)
            with torch.autocast('cpu', torch.bfloat16, enabled=bf16): loss = cross_entropy(model(xb), yb)
            loss.backward()
            opt.step()
            opt.zero_grad()
    return run

def our_photos(pixels, batches, bf16, channels_last):
    from deep_studio_nb.data.loaders import BaseDataLoader
    from deep_studio_nb.data.tensors import Tensors
    from deep_studio_nb.training.trainer import Trainer
    x, y, model = photos(pixels, batches)
    trainer = Trainer(model, BaseDataLoader(Tensors(x, y), PICTURES), loss='cross_entropy', metrics=['accuracy'], optimizer=adamw(model), device='cpu', epochs=10**6,
                      save_period=0, restore_best=False, precision='bf16' if bf16 else 'fp32', channels_last=channels_last)
    def run():
        trainer.epochs = len(trainer.history) + 1
        trainer.train()
    return run

def photo_contestants(pixels, batches):
    "Name -> function that prepares a run of one epoch, in pairs."
    res = {}
    for words, switches in (('fp32', (False, False)), ('bf16, channels_last', (True, True))):
        res[f'hand-written loop, {words}'] = lambda _, s=switches: hand_photos(pixels, batches, *s)
        res[f'deep_studio_nb, {words}'] = lambda _, s=switches: our_photos(pixels, batches, *s)
    return res

def contestants(folder):
    "Name -> function that prepares a run of one epoch."
    res = {'hand-written loop, `DataLoader(TensorDataset)`': hand, 'hand-written loop, gathered by index': floor,
           'deep_studio_nb': ours, 'deep_studio_nb, accuracy and checkpoints on': lambda n: ours(n, ['accuracy'], folder=folder),
           'deep_studio_nb with torch\'s `DataLoader(TensorDataset)`': lambda n: ours(n, plain=True)}
    return res | {o.__name__: o for o in (ignite, skorch, fastai, lightning, keras) if importlib.util.find_spec(o.__name__)}

def version(name):
    from importlib.metadata import PackageNotFoundError, version
    try: return version({'ignite': 'pytorch-ignite'}.get(name, name))
    except PackageNotFoundError: return ''

def measure(rounds, steps, who=contestants):
    "Microseconds a step for each contestant, one value a round; who begins changes from round to round."
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        runs = {k: f(steps) for k,f in who(folder).items()}
        times = {k: [] for k in runs}
        for i in range(rounds+1):
            for k,run in list(runs.items())[::-1 if i%2 else 1]:
                began = perf_counter()
                run()
                if i: times[k].append((perf_counter()-began)/steps*1e6)     # the first round warms up
    return times

def table(times):
    "Rows of name, median microseconds, median ratio to the hand-written loop above and its quartiles."
    base = None
    for name,values in times.items():
        if base is None or 'hand-written loop, fp32' in name or 'hand-written loop, bf16' in name: base = values
        ratios = sorted(a/b for a,b in zip(values, base))
        yield name, statistics.median(values), statistics.median(ratios), ratios[len(ratios)//4], ratios[-1-len(ratios)//4]

def in_lines(rows, unit='us', scale=1):
    "A table of text."
    res = [f'| one step | {unit} | of the hand-written loop | quartiles |', '|---|---|---|---|']
    return res + [f'| {" ".join(filter(None, [name, version(name)]))} | {us*scale:.{0 if scale==1 else 1}f} | {ratio:.{2 if scale==1 else 3}f} | {low:.{2 if scale==1 else 3}f} to {high:.{2 if scale==1 else 3}f} |' for name,us,ratio,low,high in rows]

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=9, help='of the tiny MLP; 0 leaves it out')
    parser.add_argument('--steps', type=int, default=400)
    parser.add_argument('--threads', type=int, default=1, help='of PyTorch, for the tiny MLP')
    parser.add_argument('--pixels', type=int, default=128, help='height and width of the pictures; 0 leaves them out')
    parser.add_argument('--picture-rounds', type=int, default=11)
    parser.add_argument('--picture-steps', type=int, default=16)
    parser.add_argument('--write', action='store_true', help='write the tables to benchmarks/training_step.md and picture_step.md')
    args = parser.parse_args()
    cores = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    rows = list(table(measure(args.rounds, args.steps))) if args.rounds else []
    lines, pairs, more = in_lines(rows), [], []
    if rows: print('\n'.join(lines))
    if args.pixels:
        torch.set_num_threads(cores)
        pairs = list(table(measure(args.picture_rounds, args.picture_steps, lambda _: photo_contestants(args.pixels, args.picture_steps))))
        more = in_lines(pairs, 'ms', 1e-3)
        print('\n'.join(['', *more]))
    if args.write:
        machine = f'{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__.split("+")[0]}'
        about = (f'A tiny MLP (20, 32, 5), batches of {BATCH}, SGD, {args.steps} steps an epoch, {args.rounds} paired rounds, medians, {args.threads} thread, '
                 f'{machine}. Progress and history are on for all but the hand-written loops.')
        photos_about = (f'ResNet-18 on pictures of {args.pixels} pixels, batches of {PICTURES}, AdamW, {args.picture_steps} steps an epoch, {args.picture_rounds} paired rounds, medians, {cores} threads, '
                        f'{machine}. Progress, history and accuracy are on for ours.')
        made = 'Made by `python benchmarks/training_step.py --write`. The claim is {} at most.'
        folder = Path(__file__).parent
        if rows: (folder/'training_step.md').write_text('\n\n'.join(['# One training step', about, '\n'.join(lines), made.format(LIMIT)]) + '\n')
        if pairs: (folder/'picture_step.md').write_text('\n\n'.join(['# One training step on pictures', photos_about, '\n'.join(more), made.format(SHARE)]) + '\n')
    worst = max((ratio for name,_,ratio,_,_ in rows if name in ('deep_studio_nb', 'deep_studio_nb, accuracy and checkpoints on')), default=0)
    large = max((ratio for name,_,ratio,_,_ in pairs if name.startswith('deep_studio_nb')), default=0)
    if rows: print(f'\ndeep_studio_nb costs at most {worst:.2f} of the hand-written loop on the tiny model; the claim is {LIMIT}.')
    if pairs: print(f'On pictures it costs {large:.3f}; the claim is {SHARE}.')
    return int(worst>LIMIT or large>SHARE)

if __name__=='__main__': sys.exit(main())
