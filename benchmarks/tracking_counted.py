"""What history and tracking cost of a training step, counted: the processor time of their own code, thread by thread.

    python benchmarks/tracking_counted.py [--turns 5] [--write]

`tracking.py` compares whole turns, in which a busy machine differs by more than tracking costs. Here a turn is taken apart: what the main thread spends in
the ends of epochs (history, files, messages) and in the recorder's part of each step, and what all other threads of the process spend (the trackers and
their libraries). A bare turn has no other threads. Exit code 1 if the parts together are more than 3 % of a turn.
"""
import argparse, logging, os, platform, statistics, sys, tempfile, timeit
from pathlib import Path
from time import process_time, thread_time
import torch
from tracking import LIMIT, contestants
from deep_studio_nb.experiments.recorder import Recorder
from deep_studio_nb.training.trainer import Trainer

EPOCHS, STEPS = 60, 400
ends, recorders = [0.], []

def counting():
    "Have the trainer note the processor time of the ends of its epochs, and keep the recorders."
    end, begin = Trainer._end_epoch, Recorder.before_fit
    def timed(self, *args):
        began = thread_time()
        end(self, *args)
        ends[0] += thread_time()-began
    def kept(self, trainer):
        recorders.append((self, trainer))
        begin(self, trainer)
    Trainer._end_epoch, Recorder.before_fit = timed, kept

def turn(run):
    "Shares of the processor time of one turn: ends of epochs, the recorder in each step, other threads."
    ends[0], whole, main = 0., process_time(), thread_time()
    run()
    whole, main = process_time()-whole, thread_time()-main
    recorder, trainer = recorders[-1]
    step = min(timeit.repeat(lambda: recorder.after_batch(trainer), number=2000, repeat=5))/2000
    return ends[0]/whole, step*EPOCHS*STEPS/whole, max(whole-main, 0)/whole

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--turns', type=int, default=5)
    parser.add_argument('--write', action='store_true', help='write the table to benchmarks/tracking_counted.md')
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger('deep_studio_nb').setLevel(logging.ERROR)
    target = Path(__file__).resolve().with_suffix('.md')
    counting()
    lines, worst = ['| with | ends of epochs | each step | other threads | together |', '|---|---|---|---|---|'], 0.
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name,make in list(contestants(folder).items())[1:]:
            run = make(folder, EPOCHS, STEPS)
            run.start()
            run()      # warms up
            parts = list(zip(*(turn(run) for _ in range(args.turns))))
            run.end()
            together = statistics.median(map(sum, zip(*parts)))
            worst = max(worst, together)
            lines.append(f'| {name} | ' + ' | '.join(f'{statistics.median(o):.2%}' for o in parts) + f' | {together:.2%} |')
        os.chdir('/')
    print('\n'.join(lines))
    about = (f'Shares of the processor time of a turn of {EPOCHS} epochs of {STEPS} steps of the tiny MLP of `tracking.md`, medians of {args.turns} turns, 1 thread, {platform.machine()}, '
             f'{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__.split("+")[0]}. Each turn ends when everything has been sent; starts are not in it.')
    note = f'Made by `python benchmarks/tracking_counted.py --write`. The claim is {LIMIT-1:.0%} at most.'
    if args.write: target.write_text('\n\n'.join(['# History and tracking, counted', about, '\n'.join(lines), note]) + '\n')
    return int(worst>LIMIT-1)

if __name__=='__main__': sys.exit(main())
