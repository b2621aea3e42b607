"""The quickstart's promise: at least 0.98 on the test split within 60 seconds on two cores, and one seed gives one model.

    python benchmarks/quickstart.py [--seeds 5] [--save]

Runs the command of the README in a temporary folder, once for each seed and once more for the first one.
`--save` writes the table to benchmarks/quickstart.md.
"""
import argparse, json, os, platform, subprocess, sys, tempfile
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

ROOT = Path(__file__).resolve().parent.parent
STUDIO = [sys.executable, '-c', 'from deep_studio_nb.cli import main; main()']


def train(folder, seed, name):
    start = perf_counter()
    subprocess.run([*STUDIO, 'train', str(ROOT/'configs/quickstart.yaml'), f'seed={seed}', '--name', name], cwd=folder, check=True, stdout=subprocess.DEVNULL,
                   env=dict(os.environ, PYTHONPATH=str(ROOT)))
    wall, run = perf_counter()-start, Path(folder)/'experiments'/name
    rows = (run/'metrics.csv').read_text().splitlines()
    col = rows[0].split(',').index('seconds')
    return wall, sum(float(o.split(',')[col]) for o in rows[1:]), json.loads((run/'manifest.json').read_text())['test']['accuracy'], run


def weights(run):
    from deep_studio_nb.training.checkpoints import load_checkpoint
    return load_checkpoint(run/'checkpoints/last.pt')['model']


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument('--seeds', type=int, default=5, help='how many seeds')
    args.add_argument('--save', action='store_true', help='write the table to benchmarks/quickstart.md')
    args = args.parse_args()
    with tempfile.TemporaryDirectory() as d:
        lines, runs = ['| seed | test accuracy | training s | whole command s |', '|---|---|---|---|'], []
        for seed in range(args.seeds):
            wall, training, accuracy, run = train(d, seed, f'seed-{seed}')
            runs.append(run)
            lines.append(f'| {seed} | {accuracy:.4f} | {training:.1f} | {wall:.1f} |')
            print(lines[-1], flush=True)
        a, b = weights(runs[0]), weights(train(d, 0, 'again')[-1])
        same = all(a[k].equal(b[k]) for k in a)
    lines += ['', f'Seed 0 twice gives {"identical" if same else "DIFFERENT"} weights. {os.cpu_count()} cores, Python {platform.python_version()}, torch {version("torch")}.', '']
    print('\n'.join(lines))
    if args.save: Path(__file__).with_suffix('.md').write_text('\n'.join(['# Quickstart', '', *lines]))


if __name__ == '__main__':
    sys.path.insert(0, str(ROOT))
    main()
