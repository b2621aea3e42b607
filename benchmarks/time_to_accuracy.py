"""Seconds until a stated validation accuracy is reached: ours as its configs are, fastai and Lightning as their documentation says.

    python benchmarks/time_to_accuracy.py [--photos DIR] [--peers PYTHON] [--seeds 5] [--write]

The same data, split, model, initial weights and size of batches for all. Digits are those of scikit-learn, in memory; photos lie in class folders below
`train` and `val` in DIR and get a random crop and flip in training. What differs is what the documentation of each proposes:

- deep_studio_nb: AdamW and one cycle, with `precision: bf16` and `channels_last: true`; with `speed: auto` instead; and with neither.
- fastai: `Learner(...).fit_one_cycle(epochs)` with Adam, its rate and its loaders; item and batch transforms as in the vision tutorial.
- Lightning: a `LightningModule` with `torch.optim.Adam(lr=1e-3)` as in the quickstart, loaders of torch, two workers for photos as its own warnings ask for.

The rate and the length of our cycle were picked for each task, as a user would do with the finder and a trial or two; the peers have the rates that their
documentation starts with, and fastai a cycle of the length that reached the accuracy in a trial. How much of the difference is this recipe and how much is
speed, the rows `our cycle` tell: fastai and Lightning with our optimizer, rate and length. They are outside the claim.

Each run is a process of its own and ends when the accuracy is reached; one that never reaches it counts with its whole length. The clock starts when the libraries are imported, so it holds reading the data,
measuring the speed and validation; the seconds from the start of the process are in the last column. PYTHON is that of an environment with fastai and
lightning, by default the one at work. Exit code 1 if either is less than twice as long as ours on the digits or the photos, by the median.
"""
import argparse, gc, json, os, platform, statistics, subprocess, sys, tempfile, time
from pathlib import Path

BEGAN = time.perf_counter()
# a cycle ends after so many epochs; Lightning's constant rate goes on until the accuracy is there
TASKS = dict(digits=dict(target=0.98, batch=64, epochs=dict(ours=4, fastai=10, lightning=30), rate=0.02),
             photos=dict(target=0.50, batch=32, epochs=dict(ours=12, fastai=12, lightning=40), rate=0.001))
CLAIM = 2.0

class Clock:
    "Notes the accuracy of each epoch, and says when it is enough."
    def __init__(self, target):
        self.target, self.rows, self.ready = target, [], time.perf_counter()
    def __call__(self, accuracy):
        self.rows.append((round(time.perf_counter()-self.ready, 3), round(float(accuracy), 4)))
        return self.rows[-1][1]>=self.target

def split_digits(folder):
    "Write the digits as tensors: the same split for everybody."
    import torch
    from sklearn.datasets import load_digits
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(x, dtype=torch.float32).div(16).reshape(-1, 1, 8, 8)[order], torch.tensor(y)[order]
    n = len(x)//5
    torch.save({'train': (x[n:], y[n:]), 'valid': (x[:n], y[:n])}, folder/'digits.pt')

def load(path):
    import torch
    data = torch.load(path)
    return data['train'], data['valid']

def model_for(task, seed):
    "The same network with the same weights for everybody."
    import torch
    from torch import nn
    torch.manual_seed(seed)
    if task=='photos':
        from torchvision.models import resnet18
        return resnet18(weights=None, num_classes=5)
    def block(i, o, stride): return [nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True)]
    return nn.Sequential(*block(1, 32, 1), *block(32, 64, 2), *block(64, 128, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))

def ours(task, data, pixels, seed, clock, epochs, batch, **switches):
    from deep_studio_nb.data.image_folder import ImageFolder
    from deep_studio_nb.data.loaders import BaseDataLoader
    from deep_studio_nb.data.tensors import Tensors
    from deep_studio_nb.data.transforms import build_transforms
    from deep_studio_nb.training.events import When
    from deep_studio_nb.training.trainer import Trainer
    import deep_studio_nb.all  # noqa: F401
    yield
    if task=='digits':
        (x, y), (xv, yv) = load(data)
        train, valid = BaseDataLoader(Tensors(x, y), batch, seed=seed), BaseDataLoader(Tensors(xv, yv), 2*batch, shuffle=False)
    else:
        steps = {'train': [{'type': 'RandomResizedCrop', 'args': {'size': pixels, 'scale': [0.5, 1.0], 'antialias': True}}, 'RandomHorizontalFlip'],
                 'valid': [{'type': 'Resize', 'args': {'size': pixels, 'antialias': True}}, {'type': 'CenterCrop', 'args': {'size': pixels}}]}
        train = BaseDataLoader(ImageFolder(data, mode='RGB').with_transforms(build_transforms(steps, 'image')), batch, seed=seed)
        valid = train.split_validation()
    rate = TASKS[task]['rate']
    def look(trainer):
        if clock(trainer.history.rows[-1]['val_accuracy']): trainer.stop()
    trainer = Trainer(model_for(task, seed), train, valid, loss='cross_entropy', metrics=['accuracy'], optimizer={'type': 'AdamW', 'args': {'lr': rate}},
                      scheduler={'type': 'OneCycleLR', 'args': {'max_lr': rate}}, epochs=epochs, seed=seed, device='cpu', callbacks=[When(after_epoch=look)], **switches)
    trainer.train()
    yield trainer.chosen['why'] if trainer.chosen else ''

def fastai(task, data, pixels, seed, clock, epochs, batch, rate=None):
    import fastai.vision.all as fa
    yield
    fa.set_seed(seed)
    if task=='digits':
        dls = fa.DataLoaders(*(fa.DataLoader(list(zip(x, y)), bs=b, shuffle=s) for (x, y),b,s in zip(load(data), (batch, 2*batch), (True, False))))
    else: dls = fa.ImageDataLoaders.from_folder(data, train='train', valid='val', bs=batch, item_tfms=fa.RandomResizedCrop(pixels, min_scale=0.5), batch_tfms=[fa.Flip()])
    class Look(fa.Callback):
        order = fa.Recorder.order+1
        def after_epoch(self):
            if clock(self.learn.recorder.values[-1][-1]): raise fa.CancelFitException
    learn = fa.Learner(dls, model_for(task, seed), loss_func=fa.CrossEntropyLossFlat(), metrics=fa.accuracy, cbs=Look(), path=tempfile.mkdtemp())
    learn.fit_one_cycle(epochs, rate)      # its Adam decouples the decay, as AdamW does
    yield ''

def lightning(task, data, pixels, seed, clock, epochs, batch, rate=None):
    import lightning as L
    import torch
    from torch.utils.data import DataLoader, TensorDataset
    if task=='photos':
        from torchvision import transforms as T
        from torchvision.datasets import ImageFolder
    yield
    L.seed_everything(seed)
    if task=='digits': train, valid = (DataLoader(TensorDataset(x, y), b, shuffle=s) for (x, y),b,s in zip(load(data), (batch, 2*batch), (True, False)))
    else:
        crop = T.Compose([T.RandomResizedCrop(pixels, scale=(0.5, 1.0)), T.RandomHorizontalFlip(), T.ToTensor()])
        plain = T.Compose([T.Resize(pixels), T.CenterCrop(pixels), T.ToTensor()])
        train, valid = (DataLoader(ImageFolder(f'{data}/{o}', t), b, shuffle=s, num_workers=2, persistent_workers=True) for o,t,b,s in (('train', crop, batch, True), ('val', plain, 2*batch, False)))
    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = model_for(task, seed)
        def training_step(self, batch, i):
            loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.log('train_loss', loss)
            return loss
        def validation_step(self, batch, i):
            right = (self.net(batch[0]).argmax(1)==batch[1]).float().mean()
            self.log('val_accuracy', right, batch_size=len(batch[0]), prog_bar=True)
        def configure_optimizers(self):
            if rate is None: return torch.optim.Adam(self.parameters(), lr=1e-3)
            opt = torch.optim.AdamW(self.parameters(), lr=rate)
            cycle = torch.optim.lr_scheduler.OneCycleLR(opt, rate, total_steps=self.trainer.estimated_stepping_batches)
            return {'optimizer': opt, 'lr_scheduler': {'scheduler': cycle, 'interval': 'step'}}
    class Look(L.Callback):
        def on_validation_epoch_end(self, trainer, module):
            if not trainer.sanity_checking and clock(trainer.callback_metrics['val_accuracy']): trainer.should_stop = True
    trainer = L.Trainer(max_epochs=epochs, accelerator='cpu', callbacks=[Look()], default_root_dir=tempfile.mkdtemp())
    trainer.fit(Module(), train, valid)
    yield ''

SWITCHES = {'deep_studio_nb': dict(precision='bf16', channels_last=True), 'deep_studio_nb, speed: auto': dict(speed='auto'), 'deep_studio_nb, fp32 eager': {}}
PEERS = 'fastai','lightning'
OUR_CYCLE = ', our cycle'

def one(args):
    "Run one contestant in this process, and print what came of it."
    task = TASKS[args.task]
    kind = {'fastai': fastai, 'lightning': lightning}.get(args.run.removesuffix(OUR_CYCLE), ours)
    same = args.run.endswith(OUR_CYCLE)
    epochs = args.epochs or task['epochs']['ours' if same else kind.__name__]
    clock = Clock(args.target or task['target'])
    more = {'rate': task['rate']} if same else SWITCHES.get(args.run, {})
    run = kind(args.task, args.data, args.pixels, args.seed, clock, epochs, task['batch'], **more)
    next(run)                                       # imports
    import torch._dynamo  # noqa: F401 (torch imports it when the first optimizer is made, unless a library has done it before)
    gc.collect()                                    # or the garbage of the imports is collected within the clock of some, by chance
    clock.ready = time.perf_counter()
    note = next(run)
    print('RESULT ' + json.dumps(dict(rows=clock.rows, before=clock.ready-BEGAN, note=note, threads=torch.get_num_threads())))

def started(python, name, task, data, seed, args):
    "Run one contestant in a process, and return what it printed."
    command = [python, __file__, '--run', name, '--task', task, '--data', str(data), '--seed', str(seed), '--pixels', str(args.pixels)]
    for o in ('target', 'epochs'): command += [f'--{o}', str(getattr(args, o))] if getattr(args, o) else []
    env = dict(os.environ, PYTHONPATH=str(Path(__file__).resolve().parent.parent))
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tempfile.mkdtemp())
    found = [o for o in done.stdout.splitlines() if 'RESULT ' in o]
    if not found: sys.exit(f'{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}')
    return json.loads(found[-1].split('RESULT ')[1])

def has(python, module): return subprocess.run([python, '-c', f'import importlib.util,sys; sys.exit(importlib.util.find_spec("{module}") is None)']).returncode==0

def version(python, module): return subprocess.run([python, '-c', f'from importlib.metadata import version; print(version("{module}"))'], capture_output=True, text=True).stdout.strip()

def seeds_of(task, args): return args.photo_seeds if task=='photos' and args.photo_seeds else args.seeds

def race(task, data, args):
    "Name -> results, one a seed; who begins changes from seed to seed."
    there = [o for o in PEERS if has(args.peers, o)]
    who = {o: sys.executable for o in SWITCHES} | {o: args.peers for o in there} | {f'{o}{OUR_CYCLE}': args.peers for o in there}
    res = {o: [] for o in who}
    for seed in range(seeds_of(task, args)):
        for name in list(who)[::-1 if seed%2 else 1]:
            res[name].append(started(who[name], name, task, data, seed, args))
            seconds, accuracy = res[name][-1]['rows'][-1]
            print(f'{task} seed {seed} {name}: {accuracy:.4f} after {len(res[name][-1]["rows"])} epochs, {seconds:.1f} s {res[name][-1]["note"]}', flush=True)
    return res

def table(res, target, args):
    "Lines of a table, and the smallest ratio of a peer to ours."
    lines = ['| what | reached | epochs | seconds | lowest to highest | times ours | from the start of the process |', '|---|---|---|---|---|---|---|']
    middle = {k: statistics.median(o['rows'][-1][0] for o in runs) for k,runs in res.items()}
    for name, runs in res.items():
        seconds = sorted(o['rows'][-1][0] for o in runs)
        there = sum(o['rows'][-1][1]>=target for o in runs)
        peer, comma, rest = name.partition(',')
        label = f'{peer} {version(args.peers, peer)}{comma}{rest}' if peer in PEERS else name
        lines.append(f'| {label} | {there} of {len(runs)} | {statistics.median(len(o["rows"]) for o in runs):.0f} | {middle[name]:.1f} | {seconds[0]:.1f} to {seconds[-1]:.1f} | '
                     f'{middle[name]/middle["deep_studio_nb"]:.2f} | {statistics.median(o["before"]+o["rows"][-1][0] for o in runs):.1f} |')
    return lines, min((middle[o]/middle['deep_studio_nb'] for o in PEERS if o in middle), default=float('nan'))

def write(parts):
    "Write down what there is so far."
    import torch
    about = f'Medians, in turn, {torch.get_num_threads()} threads, {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__.split("+")[0]}.'
    text = ['# Time to accuracy', about, *parts, f'Made by `python benchmarks/time_to_accuracy.py --photos DIR --peers PYTHON --write`. The claim is {CLAIM:.0f} times at least, for either and on both.']
    Path(__file__).with_suffix('.md').write_text('\n\n'.join(text) + '\n')

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--photos', type=Path, help='folder of photos: train/<class>/*.jpg and val/<class>/*.jpg')
    parser.add_argument('--peers', default=sys.executable, help='python of an environment with fastai and lightning')
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--photo-seeds', type=int, help='as many as --seeds if left out')
    parser.add_argument('--pixels', type=int, default=128)
    parser.add_argument('--target', type=float, help='another accuracy than the stated one, for a trial')
    parser.add_argument('--epochs', type=int, help='other epochs than the stated ones, for a trial')
    parser.add_argument('--only', choices=list(TASKS), help='one of the tasks')
    parser.add_argument('--write', action='store_true', help='write the tables to benchmarks/time_to_accuracy.md')
    parser.add_argument('--run', help=argparse.SUPPRESS)
    parser.add_argument('--task', help=argparse.SUPPRESS)
    parser.add_argument('--data', help=argparse.SUPPRESS)
    parser.add_argument('--seed', type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run: return one(args)
    folder, parts, ratios = Path(tempfile.mkdtemp()), [], {}
    split_digits(folder)
    sets = {'digits': folder/'digits.pt', 'photos': args.photos and args.photos.resolve()}
    for task, data in sets.items():
        if data is None or args.only not in (None, task): continue
        target, epochs = args.target or TASKS[task]['target'], TASKS[task]['epochs']
        res = race(task, data, args)
        lines, ratios[task] = table(res, target, args)
        said = res['deep_studio_nb, speed: auto'][0]['note']
        what = 'convolutional network of 94,000 parameters' if task=='digits' else f'ResNet-18 from nothing, {args.pixels} pixels'
        parts += [f'## {task.capitalize()}', f'{what}, batches of {TASKS[task]["batch"]}, {seeds_of(task, args)} seeds, until a validation accuracy of {target}: one cycle of {epochs["ours"]} epochs up to a rate of {TASKS[task]["rate"]} for ours, of {epochs["fastai"]} up to 0.001 for fastai, a constant rate of 0.001 for Lightning.', '\n'.join(lines)]
        parts.append(f'What `speed: auto` said in the first run: {said}')
        print('\n'.join(['', *lines, '']), flush=True)
        if args.write: write(parts)
    print(', '.join(f'{k}: the faster of the peers takes {v:.2f} times as long' for k,v in ratios.items()) + f'; the claim is {CLAIM}.')
    return int(any(v<CLAIM for v in ratios.values()))

if __name__=='__main__': sys.exit(main())
