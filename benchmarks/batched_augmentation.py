"""What augmenting one image costs: torchvision v2 image by image, against a whole batch at once, on one core.

    python benchmarks/batched_augmentation.py [--rounds 15] [--write]

Images are uint8 in memory, decoded already. Every round runs each contestant once, in turn, on the same batch of 64; the ratio is taken within a
round, so that a busy machine slows both sides, and its median is reported; the microseconds are those of the best round. "v2" is what a DataLoader does without workers: the
transforms on each tensor, then stacking. "v2, own draws" seeds the generators for each sample besides, which is what it takes to make draws
belong to samples with v2. Before anything is timed, lists without randomness are compared bit by bit.
"""
import argparse, platform, statistics
from pathlib import Path
from time import perf_counter
import torch
from torchvision.transforms import v2
from deep_studio_nb.common.randomness import seeded
from deep_studio_nb.data.draws import sample_draws
from deep_studio_nb.data.plan import plan_of
from deep_studio_nb.data.transforms import ToTensor, Transforms

BATCH, STATS = 64, ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])

def images(h, w):
    "A batch of smooth noise, with the bytes of a pixel side by side, as decoders and caches leave them."
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (BATCH, 3, h//8+1, w//8+1), generator=g).float()
    return torch.nn.functional.interpolate(x, (h, w), mode='bilinear').to(torch.uint8).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)

CASES = {
    '32 px, crop of the padded image, flip': (32, 32, [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]),
    '32 px, affine': (32, 32, [v2.RandomAffine(10, (0.1, 0.1), (0.9, 1.1))]),
    '32 px, crop, flip, colours': (32, 32, [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4, 0.4)]),
    '32 px, nothing random': (32, 32, []),
    '500x375 to 128 px, resized crop, flip': (375, 500, [v2.RandomResizedCrop(128, (0.35, 1)), v2.RandomHorizontalFlip()]),
    '500x375 to 128 px, the same and colours': (375, 500, [v2.RandomResizedCrop(128, (0.35, 1)), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4, 0.4)]),
    '128 px, crop, flip': (144, 144, [v2.RandomCrop(128), v2.RandomHorizontalFlip()]),
    '128 px, affine, bilinear': (128, 128, [v2.RandomAffine(10, (0.1, 0.1), (0.9, 1.1), interpolation='bilinear')]),
}

def contestants(x, steps):
    v2_list = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(*STATS)])
    ours = plan_of(Transforms([*steps, ToTensor(), v2.Normalize(*STATS)])).batch
    draws, xs = sample_draws(0, torch.arange(BATCH)), list(x)
    in_memory = x.contiguous()
    def own_draws():
        res = []
        for o, draw in zip(xs, draws.tolist()):
            with seeded(draw): res.append(v2_list(o))
        return torch.stack(res)
    return {'v2': lambda: torch.stack([v2_list(o) for o in xs]), 'v2, own draws': own_draws,
            'batched': lambda: ours(xs, draws), 'batched, one tensor': lambda: ours(in_memory, draws)}

def check():
    "Where nothing is random, the batch is what v2 makes, bit for bit."
    x = images(32, 32)
    steps = Transforms([v2.Resize(40), v2.CenterCrop(32), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*STATS)])
    plan = plan_of(steps)
    assert torch.equal(plan.batch([plan.prepare(o) for o in x]), torch.stack([steps(o) for o in x]))

def measure(rounds):
    "Best microseconds an image by case and contestant, and the median ratio of v2 to ours within a round."
    rows = []
    for case, (h, w, steps) in CASES.items():
        runs = contestants(images(h, w), steps)
        for run in runs.values(): run()
        times = {k: [] for k in runs}
        for _ in range(rounds):
            for k, run in runs.items():
                start = perf_counter()
                run()
                times[k].append((perf_counter()-start)/BATCH*1e6)
        ratio = statistics.median(a/b for a, b in zip(times['v2'], times['batched']))
        rows.append([case, *(f'{min(o):.0f}' if min(o)>=10 else f'{min(o):.1f}' for o in times.values()), f'{ratio:.1f}'])
    return rows

def table(rows, rounds):
    head = ['us an image', 'v2', 'v2, own draws', 'batched', 'batched, one tensor', 'v2 / batched']
    lines = ['| '+' | '.join(o)+' |' for o in [head, ['---']*len(head), *rows]]
    return '\n'.join([f'torch {torch.__version__}, one thread, batches of {BATCH}, the best of {rounds} paired rounds, ratios their medians, {platform.machine()}, CPU capability {torch.backends.cpu.get_cpu_capability()}.', '', *lines, ''])

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rounds', type=int, default=15)
    p.add_argument('--write', action='store_true', help='write the table beside this script')
    a = p.parse_args()
    torch.set_num_threads(1)
    check()
    text = table(measure(a.rounds), a.rounds)
    print(text)
    if a.write: Path(__file__).with_suffix('.md').write_text('# Batched augmentation\n\n'+text)
