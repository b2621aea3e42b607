"""How long people wait before anything happens: importing the package, and the command's help.

    python benchmarks/import_time.py [--runs 7] [--save]

Each figure is the median over fresh processes; the imports are measured in turn (A B A B ...), so that a machine whose
speed drifts treats them alike. `--save` writes the table to benchmarks/import_time.md.
"""
import argparse, platform, statistics, subprocess, sys
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

CASES = {
    'python': 'pass',
    'import torch': 'import torch',
    'from deep_studio_nb.all import *': 'from deep_studio_nb.all import *',
    'deep-studio --help': 'import sys; from deep_studio_nb.cli import main; sys.argv = ["deep-studio", "--help"]; main()',
}


def seconds(code):
    start = perf_counter()
    subprocess.run([sys.executable, '-c', code], check=True, stdout=subprocess.DEVNULL)
    return perf_counter()-start


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument('--runs', type=int, default=7, help='fresh processes for each figure')
    args.add_argument('--save', action='store_true', help='write the table to benchmarks/import_time.md')
    args = args.parse_args()
    for code in CASES.values(): seconds(code)  # fill the file cache
    times = {name: [] for name in CASES}
    for _ in range(args.runs):
        for name, code in CASES.items(): times[name].append(seconds(code))
    mid = {k: statistics.median(v) for k, v in times.items()}
    added = statistics.median(a-b for a, b in zip(times['from deep_studio_nb.all import *'], times['import torch']))
    lines = ['| what | median s | lowest s |', '|---|---|---|'] + [f'| `{k}` | {mid[k]:.2f} | {min(v):.2f} |' for k, v in times.items()]
    lines += [f'| added by `deep_studio_nb.all` to `import torch` | {added:.2f} | |', '',
              f'{args.runs} fresh processes each, in turn; Python {platform.python_version()}, torch {version("torch")}, {platform.machine()}.', '']
    print('\n'.join(lines))
    if args.save: Path(__file__).with_suffix('.md').write_text('\n'.join(['# Import time', '', *lines]))


if __name__ == '__main__': main()
