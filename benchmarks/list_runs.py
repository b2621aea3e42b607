"""How long it takes to list a thousand runs, in a notebook and from the command line.

    python benchmarks/list_runs.py [--runs 1000] [--repeats 7] [--save]

Each run folder has the manifest of a real training of the digits with its 15 files; every tenth is in a bad state. The folders are written once and
listed several times, so they come from the file cache, as they do for somebody who lists them twice. Where MLflow is installed (extra `track`) it
lists as many runs with the same numbers from its local store. `--save` writes the table to benchmarks/list_runs.md.
"""
import argparse, json, os, platform, statistics, subprocess, sys, tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter

ROOT = Path(__file__).parents[1]
CLASSES = [str(i) for i in range(10)]
FILES = ['checkpoints/best_model.pt', 'checkpoints/last.pt', 'config.yaml', 'figures/confusion.png', 'figures/loss_curve.png', 'figures/results.png', 'images/train_batch.png',
         'images/valid_batch.png', 'logs/training.log', 'manifest.json', 'metrics.csv', 'predictions/test.csv', 'split.json']


def record(i, folder):
    "What a training of the digits writes down."
    best = dict(epoch=3, loss=0.39+i/1e4, accuracy=0.9, val_loss=0.34+i/1e4, val_accuracy=0.87, lr=0.01, seconds=0.2)
    config = dict(name=f'digits-{i}', seed=i, dataset=dict(type='Digits', args=dict(data_dir='data/digits')), data_loader=dict(type='DataLoader', args=dict(batch_size=64)),
                  transforms=dict(train=[dict(type='RandomAffine', args=dict(degrees=10, translate=[0.1, 0.1]))]), arch=dict(type='MLP', args=dict(hidden=[32])), loss='cross_entropy',
                  metrics=['accuracy'], optimizer=dict(type='AdamW', args=dict(lr=10**-(1+i%4))), lr_scheduler=dict(type='OneCycleLR', args=dict(max_lr=0.01)),
                  trainer=dict(epochs=3, monitor='min val_loss', early_stop=0, save_period=1, save_dir=str(folder), tensorboard=False, verbosity=1))
    parts = {f'{k}.{v}': dict(place=f'deep_studio_nb/{k}.py:20', code='0123456789abcdef'*4) for k, v in
             [('dataset', 'Digits'), ('data_loader', 'DataLoader'), ('arch', 'MLP'), ('loss', 'cross_entropy'), ('metrics', 'accuracy'), ('optimizer', 'AdamW'), ('lr_scheduler', 'OneCycleLR')]}
    return dict(config=config, config_file='configs/digits.yaml', command=['train', 'configs/digits.yaml'], seed=i, device='CPU, 2 threads', processes=1,
                versions={o: '1.2.3' for o in ('python', 'deep_studio_nb', 'torch', 'torchvision', 'torchmetrics', 'numpy', 'scikit-learn', 'pillow')},
                git=dict(commit='a'*40, branch='main', diff='b'*64), parts=parts, monitor='min val_loss', resumed_from=None, epochs=3, steps=57, best=dict(epoch=3, value=best['val_loss']), at_best=best,
                data=dict(counts=dict(train=1197, valid=300, test=300), classes=CLASSES, input='image', task='classes', folder='data/digits', file=None,
                          fingerprint=dict(train='c'*64, valid='d'*64, test='e'*64)), test=dict(loss=0.35, accuracy=0.9), host='here', pid=1)


def write_runs(folder, n):
    from deep_studio_nb.experiments.run_folder import MANIFEST_FORMAT, now
    for i in range(n):
        path = folder/f'digits-{i}'
        for o in FILES:
            (path/o).parent.mkdir(parents=True, exist_ok=True)
            (path/o).touch()
        whole = dict(format=MANIFEST_FORMAT, name=path.name, status='finished', started=now(), updated=now(), files=FILES, **record(i, folder))
        text = json.dumps(whole, indent=2)
        if i%10 == 9: text = ['', text[:900], '{"format": 0}', text.replace(path.name, 'other')][i//10%4]
        (path/'manifest.json').write_text(text)
        if i%50 == 19: (path/'manifest.json').unlink()


def timed(fn, repeats):
    times = []
    for _ in range(repeats):
        start = perf_counter()
        fn()
        times.append(perf_counter()-start)
    return times


def mlflow_times(folder, n, repeats):
    "The same numbers in MLflow's local store, listed with its search; None without MLflow."
    try: import mlflow
    except ImportError: return None
    os.environ['MLFLOW_DISABLE_TELEMETRY'] = 'true'
    mlflow.set_tracking_uri(f'sqlite:///{folder/"mlflow.db"}')
    mlflow.set_experiment('digits')
    for i in range(n):
        with mlflow.start_run(run_name=f'digits-{i}'):
            whole = record(i, folder)
            mlflow.log_params({k: str(v) for k, v in whole['config'].items()})
            mlflow.log_metrics({k: v for k, v in whole['at_best'].items()})
    return timed(lambda: mlflow.search_runs(max_results=n), repeats)


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument('--runs', type=int, default=1000)
    args.add_argument('--repeats', type=int, default=7)
    args.add_argument('--save', action='store_true', help='write the table to benchmarks/list_runs.md')
    args = args.parse_args()
    sys.path.insert(0, str(ROOT))
    from deep_studio_nb.experiments.runs import runs
    code = f'import sys; sys.path.insert(0, {str(ROOT)!r}); from deep_studio_nb.cli import main; main()'
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)/'experiments'
        write_runs(folder, args.runs)
        table = runs(folder)
        assert len(table) == args.runs
        studio = lambda *words: subprocess.run([sys.executable, '-c', code, 'runs', str(folder), *words], check=True, stdout=subprocess.DEVNULL)
        rows = {'`runs()`': timed(lambda: runs(folder), args.repeats),
                '`runs().where("val_loss<0.4").sorted_by("-best")`': timed(lambda: runs(folder).where('val_loss<0.4').sorted_by('-best'), args.repeats),
                'as HTML, for a notebook': timed(table._repr_html_, args.repeats),
                '`deep-studio runs`, from the start of the process': timed(studio, args.repeats)}
        peer = mlflow_times(Path(tmp), args.runs, args.repeats)
        if peer: rows[f'MLflow {version("mlflow")}, `search_runs` on SQLite, the process running'] = peer
    lines = [f'| listing {args.runs:,} runs | median s | lowest s | highest s |', '|---|---|---|---|']
    lines += [f'| {k} | {statistics.median(v):.3f} | {min(v):.3f} | {max(v):.3f} |' for k, v in rows.items()]
    try: studio_version = version('deep_studio_nb')
    except PackageNotFoundError: studio_version = 'from the source tree'
    lines += ['', f'{args.repeats} repeats each, a tenth of the folders in a bad state; deep_studio_nb {studio_version}, Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores.', '']
    print('\n'.join(lines))
    if args.save: Path(__file__).with_suffix('.md').write_text('\n'.join(['# Listing runs', '', *lines]))


if __name__ == '__main__': main()
