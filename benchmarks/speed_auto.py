"""What `speed: auto` is worth: images a second, the same accuracy, and never slower where nothing is to be gained.

    python benchmarks/speed_auto.py [--photos DIR] [--rounds 5] [--small-rounds 5] [--seeds 5] [--write]

First ResNet-18 on batches of 32 pictures of 128 pixels: whole runs with `speed: auto` and with fp32 eager in turn, each a new trainer on the same
pictures in memory. The seconds of a run with `auto` hold the measuring. Then small models, on which nothing or little pays, in the same way.
At last the accuracy after training with and without, for each of --seeds seeds, on the digits of scikit-learn and on the photos in DIR
(class folders below `train` and `val` or `valid`), with a test on the paired differences. `--seeds 0` leaves that out, `--small-rounds 0` the small models.
Exit code 1 if ResNet-18 is not twice as fast on hardware with bf16, or if any model is slower than in fp32 eager by more than 3 %.
"""
import argparse, contextlib, io, math, os, platform, statistics, sys
from pathlib import Path
from time import perf_counter
import torch
from deep_studio_nb.data.digits import Digits
from deep_studio_nb.data.image_folder import ImageFolder
from deep_studio_nb.data.loaders import BaseDataLoader
from deep_studio_nb.data.tensors import Tensors
from deep_studio_nb.data.transforms import build_transforms
from deep_studio_nb.models.cnn import SimpleCNN
from deep_studio_nb.models.mlp import MLP
from deep_studio_nb.models.resnet import ResNet18
from deep_studio_nb.training.switches import fast_bf16
from deep_studio_nb.training.trainer import Trainer

GAIN, SLACK = 2.0, 1.03
# T distribution, two-sided 95 %, by degrees of freedom: for at most 10 seeds
T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}

def in_memory(n, shape, classes, batch_size):
    "A loader of pictures or rows that are made once."
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(n, *shape, generator=g), torch.randint(0, classes, (n,), generator=g)
    return BaseDataLoader(Tensors(x, y), batch_size)

def model_of(make, *args, **kwargs):
    torch.manual_seed(0)
    return make(*args, **kwargs)

def one_run(case, speed, threads=None):
    "Seconds of a whole run, the trainer after it."
    make, loader, epochs = case
    trainer = Trainer(make(), loader, loss='cross_entropy', metrics=['accuracy'], optimizer='AdamW', epochs=epochs, device='cpu', restore_best=False, speed=speed, threads=threads)
    began = perf_counter()
    with contextlib.redirect_stdout(io.StringIO()): trainer.train()
    return perf_counter()-began, trainer

def cases(pixels, batches, seconds):
    "Name -> (model, loader, epochs); runs of the small models take about `seconds`."
    small = {'tiny MLP, 20 numbers, batch 64': (lambda: model_of(MLP, 20, 5, hidden=(32,)), in_memory(64*200, (20,), 5, 64), 0),
             'SimpleCNN (8), 8 pixels, batch 64': (lambda: model_of(SimpleCNN, 10, 1, width=8), in_memory(64*50, (1, 8, 8), 10, 64), 0),
             'SimpleCNN (32), 28 pixels, batch 64': (lambda: model_of(SimpleCNN, 10, 1, width=32), in_memory(64*25, (1, 28, 28), 10, 64), 0)}
    res = {f'ResNet-18, {pixels} pixels, batch 32': (lambda: model_of(ResNet18, num_classes=5), in_memory(32*batches, (3, pixels, pixels), 5, 32), 10)}
    for name, (make, loader, _) in small.items() if seconds else ():
        one_run((make, loader, 1), None)
        res[name] = make, loader, max(2, round(seconds/one_run((make, loader, 1), None)[0]))
    return res

def compare(case, rounds):
    "Paired whole runs: seconds of each, images a second of an epoch, and the choices."
    plain, auto, rates, chosen = [], [], [], []
    for i in range(rounds):
        for speed in (None, 'auto')[::-1 if i%2 else 1]:
            took, trainer = one_run(case, speed)
            (auto if speed else plain).append(took)
            epoch = statistics.median(o['seconds'] for o in trainer.history.rows)
            rates.append((speed, len(trainer.train_loader.dataset)/epoch))
            if speed: chosen.append(trainer.chosen)
    rate = {k: statistics.median(v for s,v in rates if s==k) for k in (None, 'auto')}
    return plain, auto, rate, chosen

def quartiles(values):
    o = sorted(values)
    return o[len(o)//4], statistics.median(o), o[-1-len(o)//4]

def digits(root):
    "Loaders of the digits, moved and turned a little in training."
    ds = Digits(root).with_transforms(build_transforms({'train': [{'type': 'RandomAffine', 'args': {'degrees': 10, 'translate': [0.1, 0.1]}}]}, 'image'))
    return lambda seed: BaseDataLoader(ds, 64, seed=seed)

def photos(root, pixels):
    "Loaders of photos in class folders."
    steps = {'train': [{'type': 'RandomResizedCrop', 'args': {'size': pixels, 'scale': [0.5, 1.0], 'antialias': True}}, 'RandomHorizontalFlip'],
             'valid': [{'type': 'Resize', 'args': {'size': pixels, 'antialias': True}}, {'type': 'CenterCrop', 'args': {'size': pixels}}]}
    ds = ImageFolder(root, mode='RGB').with_transforms(build_transforms(steps, 'image'))
    return lambda seed: BaseDataLoader(ds, 32, seed=seed)

def accuracy(loaders, make, epochs, lr, seed, speed):
    "Validation accuracy after the last epoch, seconds, and what was on."
    train = loaders(seed)
    torch.manual_seed(seed)
    trainer = Trainer(make(), train, train.split_validation(), loss='cross_entropy', metrics=['accuracy'], optimizer={'type': 'AdamW', 'args': {'lr': lr}},
                      scheduler={'type': 'OneCycleLR', 'args': {'max_lr': lr}}, epochs=epochs, seed=seed, device='cpu', restore_best=False, speed=speed[0], precision=speed[1], channels_last=speed[2])
    began = perf_counter()
    with contextlib.redirect_stdout(io.StringIO()): trainer.train()
    return trainer.history.rows[-1]['val_accuracy'], perf_counter()-began, f'{trainer.precision}{", channels_last" if trainer.channels_last else ""}'

def accuracies(args, root):
    "Rows of data, mean accuracy of each kind, the paired difference with its interval, median seconds."
    import tempfile
    sets = [('digits, SimpleCNN', digits(Path(tempfile.mkdtemp())/'digits'), lambda: SimpleCNN(10, 1, width=32), 8, 0.01)]
    if root: sets.append((f'photos, ResNet-18, {args.pixels} pixels', photos(root, args.pixels), lambda: ResNet18(num_classes=5), args.photo_epochs, 0.001))
    for name, loaders, make, epochs, lr in sets:
        # the digits are over before measuring would pay: there the switches are put on by hand, so that their accuracy is seen all the same
        kinds = [(None, 'fp32', False), ('auto', 'fp32', False) if 'photos' in name else (None, 'bf16', True)]
        found = [[accuracy(loaders, make, epochs, lr, seed, kind) for kind in (kinds[::-1] if seed%2 else kinds)][::-1 if seed%2 else 1] for seed in range(args.seeds)]
        off = [b[0]-a[0] for a,b in found]
        half = T95.get(len(off)-1, 2.2)*statistics.stdev(off)/math.sqrt(len(off)) if len(off)>1 else math.nan
        yield (name, *(statistics.mean(o[i][0] for o in found) for i in (0, 1)), statistics.mean(off), half, *(statistics.median(o[i][1] for o in found) for i in (0, 1)), found[0][1][2])

def what_it_saw(chosen):
    "The table that the choice was made from, as lines, and the reason."
    keys = list(dict.fromkeys(k for o in chosen['table'] for k in o))
    res = ['| '+' | '.join(k or 'note' for k in keys)+' |', '|'+'---|'*len(keys)] if keys else []
    return res + ['| '+' | '.join(str(o.get(k, '')) for k in keys)+' |' for o in chosen['table']] + ['', chosen['why']]

def write(args, lines, seen, more):
    "Write down what there is so far."
    if not args.write: return
    about = (f'Whole runs in turn, {args.rounds} pairs of ResNet-18 and {args.small_rounds} of each small model, {torch.get_num_threads()} threads, {platform.machine()} {"with" if fast_bf16(torch.device("cpu")) else "without"} bf16 circuits, '
             f'Python {platform.python_version()}, torch {torch.__version__.split("+")[0]}, {os.cpu_count()} cores. A whole run with `auto` holds the seconds of measuring.')
    text = ['# `speed: auto`', about, '\n'.join(lines), 'What the first of these runs of ResNet-18 saw:', '\n'.join(seen)]
    if more: text += [f'Validation accuracy after training, {args.seeds} seeds, the same seeds on both sides:', '\n'.join(more)]
    text.append(f'Made by `python benchmarks/speed_auto.py --photos DIR --write`. The claims: {GAIN} times as many images a second at least for ResNet-18 where there are bf16 circuits, '
                f'no model slower by more than {SLACK-1:.0%}, no difference of accuracy beyond noise.')
    Path(__file__).with_suffix('.md').write_text('\n\n'.join(text) + '\n')

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--photos', type=Path, help='folder of photos: train/<class>/*.jpg and val/<class>/*.jpg')
    parser.add_argument('--pixels', type=int, default=128)
    parser.add_argument('--batches', type=int, default=12, help='in an epoch of ResNet-18, of which there are 10')
    parser.add_argument('--rounds', type=int, default=5, help='paired runs of ResNet-18')
    parser.add_argument('--small-rounds', type=int, default=5, help='paired runs of each small model')
    parser.add_argument('--seconds', type=float, default=40, help='length of a run of a small model; below 20 nothing is measured')
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--photo-epochs', type=int, default=15)
    parser.add_argument('--write', action='store_true', help='write the tables to benchmarks/speed_auto.md')
    args = parser.parse_args()
    lines, seen, more = ['| model | chosen | images a second, fp32 eager | with speed: auto | times | whole run, fp32 eager / auto | quartiles |', '|---|---|---|---|---|---|---|'], [], []
    print('\n'.join(lines), flush=True)
    gains, slower, same = {}, {}, True
    for name, case in cases(args.pixels, args.batches, args.seconds if args.small_rounds else 0).items():
        plain, auto, rate, chosen = compare(case, args.small_rounds if gains else args.rounds)
        low, mid, high = quartiles([a/b for a,b in zip(plain, auto)])
        gains[name], slower[name] = rate['auto']/rate[None], 1/mid
        words = sorted({', '.join(f'{v}' if k=='precision' else f'{v} thread{"s"*(v!=1)}' if k=='threads' else k for k,v in o['switches'].items() if v and v!='fp32') or 'fp32 eager' for o in chosen})
        lines.append(f'| {name} | {"; ".join(words)} | {rate[None]:.0f} | {rate["auto"]:.0f} | {gains[name]:.2f} | {mid:.2f} | {low:.2f} to {high:.2f} |')
        seen = seen or what_it_saw(chosen[0])
        print(lines[-1], flush=True)
        write(args, lines, seen, more)
    print('\n'.join(['', *seen, '']), flush=True)
    for name, a, b, off, half, slow, fast, on in accuracies(args, args.photos) if args.seeds else ():
        more = more or ['| data and model | fp32 eager | with the switches | difference, 95 % interval | seconds, fp32 eager | with the switches | on |', '|---|---|---|---|---|---|---|']
        more.append(f'| {name} | {a:.4f} | {b:.4f} | {off:+.4f}, {off-half:+.4f} to {off+half:+.4f} | {slow:.1f} | {fast:.1f} | {on} |')
        print(more[-1], flush=True)
        same &= off+half>=0 or math.isnan(half)
        write(args, lines, seen, more)
    resnet = next(iter(gains))
    failed = [f'{resnet}: {gains[resnet]:.2f} times, the claim is {GAIN}']*(fast_bf16(torch.device('cpu')) and gains[resnet]<GAIN)
    failed += [f'{k}: {v:.2f} of the time in fp32 eager' for k,v in slower.items() if v>SLACK] + ['accuracy is lower']*(not same)
    print('\n'.join(failed) or 'All claims hold.')
    return int(bool(failed))

if __name__=='__main__': sys.exit(main())
