"""What history and tracking cost of a training step: a tiny MLP on tensors in memory, with and without them.

    python benchmarks/tracking.py [--rounds 11] [--epochs 60] [--steps 400] [--threads 1] [--write]

In every round each contestant trains for one turn of --epochs epochs of --steps steps of 64 samples, and the bare trainer has a turn before and after
it. A ratio is that of a turn to the two beside it, so that a busy machine slows both sides; the median over the rounds is reported, on the clock and in processor time
of the whole process, threads of the trackers included. The bare trainer counts its epochs and keeps nothing of them. The others keep the history and
the run folder (table, manifest, curve, values) and tell their trackers; a turn ends when everything has been sent, so that no work is left to the next
contestant. What a start costs is told beside it. Trackers whose library is not installed are left out.
Exit code 1 if history and tracking cost more than 3 % of a step.
"""
import argparse, importlib.metadata, logging, os, platform, statistics, sys, tempfile
from pathlib import Path
from time import monotonic, perf_counter, process_time
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
    ended = monotonic()
    def run():
        nonlocal ended
        for o in (recorder.writing, recorder.drawing): o.next += monotonic()-ended      # the time of the others earns nothing
        t.epochs = len(t.history)+epochs
        t.train()
        recorder.trackers.flush()
        ended = monotonic()
    def start():
        recorder.trackers.start(recorder.folder.path, dict(name='run', optimizer=dict(type='SGD', args=dict(lr=0.1))))
        recorder.trackers.flush()
    run.start, run.end = start, lambda: recorder.trackers.finish('finished')
    return run

def contestants(folder):
    "Name -> function that prepares a run of some epochs; the first is what the others are compared with."
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

def spent(fn):
    "Seconds on the clock and of the process that `fn` takes."
    clock, cpu = perf_counter(), process_time()
    fn()
    return perf_counter()-clock, process_time()-cpu

def measure(rounds, epochs, steps):
    "For each contestant its start and its turns, and the turns of the bare trainer before and after each: pairs of seconds on the clock and of the process."
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        base, *others = [(k, f(folder, epochs, steps)) for k,f in contestants(folder).items()]
        starts = {k: spent(run.start) for k,run in others}
        for k,run in [base, *others]: run()     # warms up
        turns, bares = {k: [] for k,_ in others}, {k: [] for k,_ in others}
        for i in range(rounds):
            before = spent(base[1])
            for k,run in others[::-1 if i%2 else 1]:
                turns[k].append(spent(run))
                after = spent(base[1])
                bares[k].append([(a+b)/2 for a,b in zip(before, after)])
                before = after
        for _,run in others: run.end()
    return base[0], starts, turns, bares

def quartiles(turns, bares, i):
    "Quartiles of the ratios of turns to the turns beside them, on the clock (0) or in seconds of the process (1)."
    ratios = sorted(a[i]/b[i] for a,b in zip(turns, bares))
    return ratios[len(ratios)//4], statistics.median(ratios), ratios[-1-len(ratios)//4]

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=11)
    parser.add_argument('--epochs', type=int, default=60)
    parser.add_argument('--steps', type=int, default=400)
    parser.add_argument('--threads', type=int, default=1, help='of PyTorch')
    parser.add_argument('--write', action='store_true', help='write the table to benchmarks/tracking.md')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger('deep_studio_nb').setLevel(logging.ERROR)
    target = Path(__file__).resolve().with_suffix('.md')
    base, starts, turns, bares = measure(args.rounds, args.epochs, args.steps)
    n, worst = args.epochs*args.steps, [0, 0]
    lines = ['| one step, with | us | of a step without | quartiles | processor time | quartiles | start |', '|---|---|---|---|---|---|---|',
             f'| {base} | {statistics.median(o[0] for v in bares.values() for o in v)/n*1e6:.1f} | 1 | | 1 | | |']
    for k,v in turns.items():
        (low, clock, high), (least, cpu, most) = (quartiles(v, bares[k], i) for i in (0, 1))
        worst = [max(a, b) for a,b in zip(worst, (clock, cpu))]
        lines.append(f'| {k} | {statistics.median(o[0] for o in v)/n*1e6:.1f} | {clock:.3f} | {low:.3f} to {high:.3f} | {cpu:.3f} | {least:.3f} to {most:.3f} | {starts[k][0]:.1f} s, {starts[k][1]:.1f} s of the processor |')
    print('\n'.join(lines))
    about = (f'A tiny MLP ({FEATURES}, 32, {CLASSES}), batches of {BATCH}, SGD, {args.steps} steps an epoch, {args.rounds} paired turns of {args.epochs} epochs, medians, {args.threads} thread, '
             f'{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__.split("+")[0]}. Each turn ends when everything has been sent. The processor time is that of the '
             "whole process with all its threads. The start, once for a run and beside the training, is not in the steps; it includes the library's import, and for MLflow the making of the store.")
    note = f'Made by `python benchmarks/tracking.py --write`. The claim is {LIMIT} at most, with any one tracker and with all of them. Turns of one training differ by some percent on a machine that is shared; what history and trackers use themselves is counted in `tracking_counted.md`.'
    if args.write: target.write_text('\n\n'.join(['# History and tracking', about, '\n'.join(lines), note]) + '\n')
    print(f'\nHistory and tracking cost at most {worst[0]:.3f} of a step, {worst[1]:.3f} of its processor time; the claim is {LIMIT}.')
    return int(worst[0]>LIMIT)

if __name__=='__main__': sys.exit(main())
