"""Kill -9 at any moment: the run goes on in another process to the same bits, and no file is ever torn."""
import itertools, os, random, signal, threading
import pytest
import training_kills as kills
from training_kills import IN_EPOCH, IN_STEP, IN_WRITE, assert_same_files, differences, ended, readable, start, suffer
from training_toy import EPOCHS, STEPS

pytestmark = pytest.mark.skipif(os.name!='posix', reason='SIGKILL')

def spec(name, **args): return {'type': name, 'args': args}

OPTIMIZERS = dict(SGD=spec('SGD', lr=0.1, momentum=0.9), AdamW=spec('AdamW', lr=0.02), RMSprop=spec('RMSprop', lr=0.01, momentum=0.5))
SCHEDULERS = dict(constant=None, OneCycleLR=spec('OneCycleLR', max_lr=0.05), ReduceLROnPlateau=spec('ReduceLROnPlateau', patience=0))
EMAS = {'plain': [], 'EMA': [spec('EMA', decay=0.8)]}
LOADERS = 'gathered', 'threads', 'processes', 'torch', 'torch workers'

def check(plan, folder, deaths):
    "A run that dies so often ends like one that does not, and leaves the same files."
    whole = suffer(plan, folder/'whole', [])
    killed = suffer(plan, folder/'killed', deaths)
    assert differences(whole, killed)==[]
    assert whole['steps']==STEPS*EPOCHS
    assert_same_files(folder/'whole', folder/'killed')

def test_five_kills(tmp_path):
    "In a step, between two epochs, in three places of a write; with everything switched on."
    plan = dict(optimizer=OPTIMIZERS['AdamW'], scheduler=SCHEDULERS['OneCycleLR'], callbacks=EMAS['EMA'], accumulate=2, loader='threads')
    check(plan, tmp_path, [('after_backward', 4), ('half', 3), ('after_epoch', 1), ('linked', 2), ('written', 4)])

def moments(seed):
    "Five moments to die at: two in an epoch, one between two epochs, two in a write."
    draw = random.Random(seed)
    return [(draw.choice(IN_STEP), draw.randint(1, STEPS)), (draw.choice(IN_WRITE[:2]), draw.randint(1, 3)), (draw.choice(IN_EPOCH), 2),
            (draw.choice(IN_STEP), draw.randint(2*STEPS+1, 3*STEPS)), (draw.choice(IN_WRITE[2:]), 1)]

MATRIX = list(itertools.product(OPTIMIZERS, SCHEDULERS, EMAS, (1, 4)))
@pytest.mark.slow
@pytest.mark.parametrize('number,optimizer,scheduler,ema,accumulate', [(i, *o) for i,o in enumerate(MATRIX)], ids=['-'.join(map(str, o)) for o in MATRIX])
def test_matrix(tmp_path, number, optimizer, scheduler, ema, accumulate):
    "Each optimizer with each schedule, averaged or not, accumulating or not; the five ways to load in turn: 180 kills."
    plan = dict(optimizer=OPTIMIZERS[optimizer], scheduler=SCHEDULERS[scheduler], callbacks=EMAS[ema], accumulate=accumulate, loader=LOADERS[number%5])
    check(plan, tmp_path, moments(number))

MORE = dict(bf16=dict(precision='bf16'), clipped=dict(clip_norm=0.5), mixup=dict(callbacks=[spec('Mixup', alpha=0.4)]), swa=dict(callbacks=[spec('SWA')]),
            warm_up=dict(scheduler=spec('CosineAnnealingLR', warmup_steps=5)), no_decay=dict(optimizer=spec('AdamW', lr=0.02, weight_decay=0.1, no_decay=['norm', 'bias'])),
            best_three=dict(callbacks=[spec('KeepBest', k=2)]), f1=dict(metrics=['accuracy', spec('F1Score', task='multiclass', num_classes=2)]))
@pytest.mark.slow
@pytest.mark.parametrize('name', MORE)
def test_every_technique(tmp_path, name):
    check(MORE[name], tmp_path, moments(name))

@pytest.mark.slow
@pytest.mark.parametrize('loader', LOADERS)
def test_every_moment(tmp_path, loader):
    "One after the other, a little later each time."
    deaths = [(o, 2+i) for i,o in enumerate(IN_STEP)] + [('before_validate', 1), ('after_epoch', 1), ('before_epoch', 2), ('half', 2), ('written', 2), ('linked', 1), ('replaced', 1), ('after_validate', EPOCHS)]
    check(dict(loader=loader), tmp_path, deaths)

@pytest.mark.slow
@pytest.mark.parametrize('seed', range(6))
def test_any_moment(tmp_path, seed):
    "By the clock, from outside, wherever the run happens to be."
    draw, plan = random.Random(seed), dict(callbacks=EMAS['EMA'], accumulate=2, loader=LOADERS[seed%3], epochs=12)
    whole = suffer(plan, tmp_path/'whole', [])
    final = (tmp_path/'killed').with_suffix('.final.pt')
    for _ in range(4):
        p = start(plan, tmp_path/'killed', None, final)
        timer = threading.Timer(draw.uniform(0.05, 0.6), p.kill)
        timer.start()
        p.join(120)
        timer.cancel()
        assert p.exitcode in (0, -signal.SIGKILL)
        readable(tmp_path/'killed')
        if p.exitcode==0: break
    assert differences(whole, suffer(plan, tmp_path/'killed', []) if not final.exists() else kills.load_checkpoint(final))==[]

def test_ctrl_c_and_a_kill(tmp_path):
    check(dict(callbacks=EMAS['EMA'], accumulate=4), tmp_path, [('interrupted', 3), ('after_step', 6), ('interrupted', 14)])

def test_drafts_of_the_dead_are_cleared_away(tmp_path):
    folder = tmp_path/'run'
    for _ in range(2): assert ended(start({}, folder, ('half', 2), tmp_path/'final.pt'))==-signal.SIGKILL
    assert len([o for o in folder.iterdir() if o.name.startswith('.')])==1           # the one of the second death
    (folder/'.mine.pt').write_text('a file of somebody else')
    assert ended(start({}, folder, None, tmp_path/'final.pt'))==0
    assert [o.name for o in folder.iterdir() if o.name.startswith('.')]==['.mine.pt']
