"""One step of a large model on a GPU against a loop tuned by hand, and the share of time spent waiting for data.

    python benchmarks/gpu.py [--photos DIR] [--write]
    python benchmarks/gpu.py --device cpu --model ResNet18 --pixels 64 --batch 8 --steps 2 --rounds 1 --photos-count 24 --no-compile      # a trial without a GPU

First ResNet-50 on batches of 224 pixels that lie on the device: a hand-written loop with bf16, channels_last, `torch.compile` and a fused AdamW, and ours with
the same switches, in turn; ours computes the accuracy, keeps a history and shows progress. Then the same model fed from JPEG files, those in DIR
(class folders below `train`) or some that are made for it, with our loader: what an epoch takes beyond the steps on data that is there already
is time waited for data. The first epoch, in which pictures are decoded and kept, and later ones are told apart.
Exit code 1 if ours takes more than 1.02 of the hand-tuned loop.
"""
import argparse, contextlib, io, os, platform, statistics, sys, tempfile
from pathlib import Path
from time import perf_counter
import torch
from torch.nn.functional import cross_entropy
from deep_studio_nb.common.devices import describe_device, pick_device
from deep_studio_nb.data.image_folder import ImageFolder
from deep_studio_nb.data.loaders import BaseDataLoader
from deep_studio_nb.data.transforms import build_transforms
from deep_studio_nb.models import resnet
from deep_studio_nb.training.trainer import Trainer

LIMIT, CLASSES = 1.02, 10

def wait(device):
    if device.type=='cuda': torch.cuda.synchronize(device)

def batches_on(device, args):
    "Batches that lie on the device: a few, used over and over."
    g = torch.Generator().manual_seed(0)
    made = [(torch.rand(args.batch, 3, args.pixels, args.pixels, generator=g).to(device, memory_format=torch.channels_last),
             torch.randint(0, CLASSES, (args.batch,), generator=g).to(device)) for _ in range(min(4, args.steps))]
    return [made[i%len(made)] for i in range(args.steps)]

def new_model(args):
    torch.manual_seed(0)
    return getattr(resnet, args.model)(num_classes=CLASSES)

def adamw(model): return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

def by_hand(device, batches, args):
    "The loop that somebody writes who knows how."
    model = new_model(args).to(device, memory_format=torch.channels_last).train()
    opt, net = adamw(model), torch.compile(model) if args.compile else model
    def run():
        for x, y in batches:
            with torch.autocast(device.type, torch.bfloat16): loss = cross_entropy(net(x), y)
            loss.backward()
            opt.step()
            opt.zero_grad(set_to_none=True)
        wait(device)
    return run

def trainer_on(device, loader, args, **more):
    model = new_model(args).to(device)
    return Trainer(model, loader, loss='cross_entropy', metrics=['accuracy'], optimizer=adamw(model), device=device, epochs=10**6, restore_best=False,
                   precision='bf16', channels_last=True, compile=args.compile, **more)

def epoch_of(trainer, device):
    def run():
        trainer.epochs = len(trainer.history) + 1
        trainer.train()
        wait(device)
    return run

def quietly(run):
    began = perf_counter()
    with contextlib.redirect_stdout(io.StringIO()): run()
    return perf_counter()-began

def compare(device, args):
    "Seconds a step of both, one value a round."
    batches = batches_on(device, args)
    runs = {'hand-tuned loop': by_hand(device, batches, args), 'deep_studio_nb': epoch_of(trainer_on(device, batches, args), device)}
    times = {k: [] for k in runs}
    for i in range(args.rounds+1):
        for k in list(runs)[::-1 if i%2 else 1]:
            took = quietly(runs[k])/args.steps
            if i: times[k].append(took)             # the first round warms up and compiles
    return times

def make_photos(folder, n):
    "JPEGs of 500 by 375 pixels: soft random colours, so that they are as large as photos."
    from PIL import Image
    g = torch.Generator().manual_seed(0)
    for i in range(n):
        soft = torch.nn.functional.interpolate(torch.rand(1, 3, 24, 32, generator=g), (375, 500), mode='bicubic')[0].clamp(0, 1)
        path = folder/'train'/f'class{i%CLASSES}'/f'{i:05}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((soft*255).byte().permute(1, 2, 0).numpy()).save(path, quality=90)
    return folder

def fed_from_files(root, device, step, args):
    "Seconds of each epoch on files, and the share of it that the steps do not explain."
    steps = {'train': [{'type': 'RandomResizedCrop', 'args': {'size': args.pixels, 'antialias': True}}, 'RandomHorizontalFlip']}
    loader = BaseDataLoader(ImageFolder(str(root), mode='RGB').with_transforms(build_transforms(steps, 'image')), args.batch, drop_last=True)
    if len(loader.classes)>CLASSES: sys.exit(f'--photos may have {CLASSES} classes at most')
    trainer = trainer_on(device, loader, args)
    run, res = epoch_of(trainer, device), []
    for _ in range(3):
        took = quietly(run)
        res.append((took, max(0., 1-len(loader)*step/took), len(loader)))
    return res

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--model', default='ResNet50')
    parser.add_argument('--pixels', type=int, default=224)
    parser.add_argument('--batch', type=int, default=128)
    parser.add_argument('--steps', type=int, default=40, help='in a round')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--compile', action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument('--photos', type=Path, help='folder of photos, train/<class>/*.jpg')
    parser.add_argument('--photos-count', type=int, default=4096, help='how many to make where none are given')
    parser.add_argument('--write', action='store_true', help='write the tables to benchmarks/gpu.md')
    args = parser.parse_args()
    device = pick_device(args.device)
    times = compare(device, args)
    base = times['hand-tuned loop']
    ratios = sorted(a/b for a,b in zip(times['deep_studio_nb'], base))
    mid, low, high = statistics.median(ratios), ratios[len(ratios)//4], ratios[-1-len(ratios)//4]
    lines = ['| one step | ms | images a second | of the hand-tuned loop | quartiles |', '|---|---|---|---|---|']
    for name, ratio in (('hand-tuned loop', '1.000 | '), ('deep_studio_nb', f'{mid:.3f} | {low:.3f} to {high:.3f}')):
        step = statistics.median(times[name])
        lines.append(f'| {name} | {1000*step:.2f} | {args.batch/step:.0f} | {ratio} |')
    print('\n'.join(lines), flush=True)
    with tempfile.TemporaryDirectory() as d:
        root = args.photos or make_photos(Path(d), args.photos_count)
        fed = fed_from_files(root, device, statistics.median(times['deep_studio_nb']), args)
    more = ['| epoch on files | seconds | images a second | waited for data |', '|---|---|---|---|']
    more += [f'| {i} | {took:.1f} | {n*args.batch/took:.0f} | {share:.0%} |' for i,(took, share, n) in enumerate(fed, 1)]
    print('\n'.join(['', *more]), flush=True)
    if args.write:
        about = (f'{args.model} at {args.pixels} pixels, batches of {args.batch}, bf16, channels_last, {"compiled, " if args.compile else ""}fused AdamW, {args.steps} steps a round, {args.rounds} paired rounds, medians, '
                 f'{describe_device(device)}, {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__.split("+")[0]}.')
        text = ['# On a GPU', about, '\n'.join(lines), '\n'.join(more), f'Made by `python benchmarks/gpu.py --write`. The claim is {LIMIT} of the hand-tuned loop at most.']
        Path(__file__).with_suffix('.md').write_text('\n\n'.join(text) + '\n')
    print(f'\ndeep_studio_nb takes {mid:.3f} of the hand-tuned loop; the claim is {LIMIT}.')
    return int(mid>LIMIT)

if __name__=='__main__': sys.exit(main())
