"""What history and tracking cost of a training step: a tiny MLP on tensors in memory, with and without them.

    python benchmarks/tracking.py [--rounds 7] [--epochs 60] [--steps 400] [--threads 1] [--write]

Every round trains each contestant once, in turn, for --epochs epochs of --steps steps of 64 samples; a ratio is taken within a round, so that a busy
machine slows both sides, and the median over the rounds is reported, with the ratio of all rounds together beside it. The bare trainer counts its epochs and keeps nothing of them. The others keep the
history and the run folder (table, manifest, curve, values) and tell their trackers; a round ends when everything has been sent, so that no work is left
to the next contestant. Trackers whose library is not installed are left out.
Exit code 1 if the history and any one tracker cost more than 3 % of a step.
"""
import argparse, importlib.metadata, logging, os, platform, statistics, sys, tempfile
from pathlib import Path
from time import perf_counter
import torch
from torch import nn
from deep_studio_nb.common.registry import TRACKERS
from deep_studio_nb.data.loaders import BaseDataLoader
from deep_studio_nb.data.tensors import Tensors
from deep_studio_nb.experiments import mlflow, tensorboard, wandb  # noqa: F401 (they register themselves)
from deep_studio_nb.experiments.recorder import Recorder
from deep_studio_nb.experiments.run_folder import RunFolder
from deep_studio_nb.experiments.trackers import Trackers
from deep_studio_nb.training.trainer import Trainer

BATCH, FEATURES, CLASSES, LIMIT = 64, 20, 5, 1.03

class Bare(Trainer):
    "Counts its epochs, and keeps nothing of them."
    def _end_epoch(self, values):
        self.history.rows.append({'epoch': self.epoch})
        self.step, self._seconds, self._order = 0, 0., None

def trainer(kind, steps):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(steps*BATCH, FEATURES, generator=g), torch.randint(0, CLASSES, (steps*BATCH,), generator=g)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    return kind(model, BaseDataLoader(Tensors(x, y), BATCH), loss='cross_entropy', optimizer=torch.optim.SGD(model.parameters(), lr=0.1), device='cpu',
                epochs=1, save_period=0, restore_best=False, progress=False)

def bare(folder, epochs, steps):
    t = trainer(Bare, steps)
    def run():
        t.epochs = len(t.history)+epochs
        t.train()
    return run

def tracked(folder, epochs, steps, specs=()):
    t = trainer(Trainer, steps)
    recorder = Recorder(RunFolder.create(folder, 'run'), Trackers([TRACKERS.build(o) for o in specs]))
    t.add(recorder)
    recorder.trackers.start(recorder.folder.path, dict(name='run', optimizer=dict(type='SGD', args=dict(lr=0.1))))
    def run():
        t.epochs = len(t.history)+epochs
        t.train()
        recorder.trackers.flush()
    run.end = lambda: recorder.trackers.finish('finished')
    return run

def contestants(folder):
    "Name -> function that prepares a run of some epochs."
    parts = {'TensorBoard': ('tensorboard', 'tensorboard'), 'Weights & Biases, offline': ('wandb', dict(type='wandb', args=dict(mode='offline'))),
             'MLflow, on this machine': ('mlflow', dict(type='mlflow', args=dict(uri=f'sqlite:///{folder}/store.db')))}
    there = {f'{k} {version(lib)}': spec for k,(lib,spec) in parts.items() if version(lib)}
    res = {'neither history nor tracking': bare, 'history and run folder': tracked}
    res |= {f'history, run folder, {k}': lambda *args, s=spec: tracked(*args, [s]) for k,spec in there.items()}
    if len(there)>1: res['all of these at once'] = lambda *args: tracked(*args, list(there.values()))
    return res

def version(name):
    try: return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError: return ''

def measure(rounds, epochs, steps):
    "Microseconds a step for each contestant, one value a round; who begins changes from round to round."
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        runs = {k: f(folder, epochs, steps) for k,f in contestants(folder).items()}
        times = {k: [] for k in runs}
        for i in range(rounds+1):
            for k,run in list(runs.items())[::-1 if i%2 else 1]:
                began = perf_counter()
                run()
                if i: times[k].append((perf_counter()-began)/(steps*epochs)*1e6)     # the first round warms up
        for run in runs.values(): getattr(run, 'end', lambda: None)()
    return times

def table(times):
    "Rows of name, median microseconds, median ratio to the first row, its quartiles, and the ratio of the sums."
    base = next(iter(times.values()))
    for name,values in times.items():
        ratios = sorted(a/b for a,b in zip(values, base))
        yield name, statistics.median(values), statistics.median(ratios), ratios[len(ratios)//4], ratios[-1-len(ratios)//4], sum(values)/sum(base)

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--epochs', type=int, default=60)
    parser.add_argument('--steps', type=int, default=400)
    parser.add_argument('--threads', type=int, default=1, help='of PyTorch')
    parser.add_argument('--write', action='store_true', help='write the table to benchmarks/tracking.md')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger('deep_studio_nb').setLevel(logging.ERROR)
    target = Path(__file__).resolve().with_suffix('.md')
    rows = list(table(measure(args.rounds, args.epochs, args.steps)))
    lines = ['| one step, with | us | of a step without | quartiles | all rounds together |', '|---|---|---|---|---|']
    lines += [f'| {name} | {us:.1f} | {ratio:.3f} | {low:.3f} to {high:.3f} | {whole:.3f} |' for name,us,ratio,low,high,whole in rows]
    print('\n'.join(lines))
    worst = max(ratio for name,_,ratio,*_ in rows if not name.startswith('all'))
    about = (f'A tiny MLP ({FEATURES}, 32, {CLASSES}), batches of {BATCH}, SGD, {args.steps} steps an epoch, {args.rounds} paired rounds of {args.epochs} epochs, medians, {args.threads} thread, '
             f'{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__.split("+")[0]}. Each round ends when everything has been sent.')
    note = f'Made by `python benchmarks/tracking.py --write`. The claim is {LIMIT} at most for history and run folder with any one tracker.'
    if args.write: target.write_text('\n\n'.join(['# History and tracking', about, '\n'.join(lines), note]) + '\n')
    print(f'\nHistory and tracking cost at most {worst:.3f} of a step; the claim is {LIMIT}.')
    return int(worst>LIMIT)

if __name__=='__main__': sys.exit(main())
