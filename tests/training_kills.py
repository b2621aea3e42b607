"""Runs that are killed: children that die at a named moment, and what it takes to compare a run that was killed with one that was not.

A *plan* says what is trained (see `build`). A *death* is a pair of a moment and its number:

- `before_batch`, `after_loss`, `after_backward`, `after_step`, `after_batch`: in the step of that number, counted over the run, or the first after it in which that happens
- `before_epoch`, `before_validate`, `after_validate`, `after_epoch`: in the epoch of that number; `after_epoch` is before anything is saved
- `half`, `written`, `linked`, `replaced`: in the n-th checkpoint that this process writes: half of the file is there; all of it, without its name;
  under its first name only; under its name, before the folder is synced
- `interrupted`: not a death but a Ctrl-C in the middle of that step

Children are forked from a server that has torch loaded already, so one of them starts in a moment.
"""
import multiprocessing as mp, os, signal
from pathlib import Path
import torch
from deep_studio_nb.training import averaging, callbacks, keeping, mixing  # noqa: F401 (so that plans can name what is in them)
from training_toy import trainer
from deep_studio_nb.training.checkpoints import find_checkpoint, load_checkpoint, save_checkpoint
from deep_studio_nb.training.events import When

IN_STEP = 'before_batch', 'after_loss', 'after_backward', 'after_step', 'after_batch'
IN_EPOCH = 'before_epoch', 'before_validate', 'after_validate', 'after_epoch'
IN_WRITE = 'half', 'written', 'linked', 'replaced'
KINDS = {'gathered': 'ours', 'threads': 'ours threads', 'processes': 'ours workers', 'torch': 'plain', 'torch workers': 'plain workers'}

def in_a_child(target, *args):
    "What `target` sends, from a process that has done nothing else; an `EOFError` if it has died."
    ctx = mp.get_context('forkserver')
    here, there = ctx.Pipe(duplex=False)
    p = ctx.Process(target=target, args=(there, *args))
    p.start()
    there.close()
    try: return here.recv()
    finally: p.join(60)

def build(plan, folder, more=()):
    "The trainer of a plan: settings of the trainer, and under `loader` what loads for it."
    settings = dict(plan)
    kind, own = KINDS[settings.pop('loader', 'gathered')], settings.pop('callbacks', [])
    return trainer(kind, **settings, folder=folder, callbacks=[{'type': 'SaveSteps', 'args': {'every': 2}}, *own, *more])

def now(): os.kill(os.getpid(), signal.SIGKILL)

def nth(fn, number, before=None, after=None):
    "`fn`, but the process dies around its call of that number."
    calls = [0]
    def counted(*args, **kwargs):
        calls[0] += 1
        if calls[0]!=number: return fn(*args, **kwargs)
        if before: before(*args)
        else: fn(*args, **kwargs)
        now()
    return counted

def half(state, file):
    "Write the first half of a checkpoint."
    SAVE(state, file)
    os.truncate(file, Path(file).stat().st_size//2)

SAVE = torch.save

def arrange(death):
    "Let this process die; a callback that sees to it, where the moment is one of the run."
    moment, number = death
    if moment=='half': torch.save = nth(torch.save, number, half)
    if moment=='linked': os.link = nth(os.link, number, lambda *_: None)
    if moment in ('written', 'replaced'):
        rename = os.replace
        die = nth(rename, number, (lambda *_: None) if moment=='written' else None)
        os.replace = lambda a, b: die(a, b) if str(b).endswith('.pt') and Path(b).name=='last.pt' else rename(a, b)
    if moment=='interrupted': return When(after_backward=lambda t: t.steps+1==number and os.kill(os.getpid(), signal.SIGINT))
    if moment in IN_STEP: return When(**{moment: lambda t: t.steps+(moment!='after_batch')>=number and now()})
    if moment in IN_EPOCH: return When(**{moment: lambda t: t.epoch==number and now()})

def live(plan, folder, death, final):
    "The child: go on from `folder` as far as it comes; leave the last state in `final` if that is the end."
    torch.set_num_threads(1)
    mp.set_start_method(None, force=True)      # workers are started as in a process of one's own, and end with it
    folder = Path(folder)
    extra = arrange(death) if death else None
    t = build(plan, folder, [extra] if extra else ())
    if readable(folder): t.load(find_checkpoint(folder))
    t.train()
    if not t.left: save_checkpoint(final, t.state_dict())

def readable(folder):
    "Load every checkpoint of `folder`; how many there are."
    return len([load_checkpoint(o) for o in Path(folder).glob('*.pt') if not o.name.startswith('.')])

def start(*args, target=live):
    "Begin a child."
    ctx = mp.get_context('forkserver')
    p = ctx.Process(target=target, args=args)
    p.start()
    return p

def ended(p):
    "The exit code of a child."
    p.join(120)
    assert p.exitcode is not None, 'the child does not end'
    return p.exitcode

def suffer(plan, folder, deaths):
    "Live through `deaths` and then to the end; the last state. No checkpoint is torn after any of them."
    final = Path(folder).with_suffix('.final.pt')
    for death in deaths:
        code = ended(start(plan, folder, death, final))
        assert code==(0 if death[0]=='interrupted' else -signal.SIGKILL), (death, code)
        assert not final.exists(), f'{death} came too late'
        readable(folder)
    assert ended(start(plan, folder, None, final))==0
    return load_checkpoint(final)

def differences(a, b, where='state'):
    "Where two states differ, times of the clock aside."
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor): return [] if a.dtype==b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [k for k in {**a, **b} if k!='seconds']
        return [d for k in keys for d in (differences(a[k], b[k], f'{where}.{k}') if k in a and k in b else [f'{where}.{k} is missing'])]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a)==len(b):
        return [d for i,(x,y) in enumerate(zip(a, b)) for d in differences(x, y, f'{where}[{i}]')]
    return [] if type(a)==type(b) and (a==b or a!=a and b!=b) else [f'{where}: {a!r:.40} and {b!r:.40}']

def assert_same_files(a, b):
    "Two folders hold the same checkpoints."
    files = [sorted(o.name for o in Path(f).glob('*.pt')) for f in (a, b)]
    assert [o for o in files[0] if o[0]!='.']==[o for o in files[1] if o[0]!='.']
    for name in files[0]:
        if name[0]!='.': assert differences(load_checkpoint(Path(a)/name), load_checkpoint(Path(b)/name), name)==[]
