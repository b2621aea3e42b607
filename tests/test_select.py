"Choosing a final model: runs that cannot be compared, folders that are not what they were, and a process that dies in the middle."
import hashlib, json, os, shutil, subprocess, sys
from pathlib import Path
import pytest
import torch
from deep_studio_nb.common.errors import ConfigError, RunError
from deep_studio_nb.experiments.experiment import Experiment
from deep_studio_nb.experiments.run_folder import RunFolder, this_process
from deep_studio_nb.experiments.select import select_best
from deep_studio_nb.experiments.trained import load_trained

def config(digits, name, hidden=16, **changes):
    return dict(dict(name=name, seed=0, dataset=dict(type='ImageFolder', args=dict(data_dir=str(digits))), data_loader=dict(type='DataLoader', args=dict(batch_size=128)),
                     arch=dict(type='MLP', args=dict(hidden=[hidden])), loss='cross_entropy', metrics=['accuracy'], optimizer=dict(type='AdamW', args=dict(lr=0.01)),
                     trainer=dict(epochs=2, monitor='max val_accuracy', save_dir='experiments')), **changes)

def train(*args, **kw):
    exp = Experiment(config(*args, **kw), device='cpu')
    exp.fit()
    return exp.folder

@pytest.fixture(scope='session')
def trained(digits, tmp_path_factory):
    "Two runs, one of which is clearly better."
    folder, before = tmp_path_factory.mktemp('trained'), Path.cwd()
    os.chdir(folder)
    try: train(digits, 'narrow', 2), train(digits, 'wide', 64)
    finally: os.chdir(before)
    return folder/'experiments'

@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    "The two runs, copied to where a test may spoil them."
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path/'experiments')
    return tmp_path

def choose(*args, **kw): return select_best(*args, **dict(dict(device='cpu'), **kw))
def manifest(run): return json.loads(Path('experiments', run, 'manifest.json').read_text())
def change(run, **entries): RunFolder(Path('experiments', run)).update(**entries)
def sha(path): return hashlib.sha256(Path(path).read_bytes()).hexdigest()

def test_the_better_run_is_found_and_the_record_proves_it(here):
    choice = choose()
    assert choice.winner.run.name=='wide' and choice.evidence
    assert 'wide > narrow in val_accuracy, 95 % interval [+' in str(choice)
    record = json.loads(Path('checkpoints/final_model.json').read_text())
    best = here/'experiments/wide/checkpoints/best_model.pt'
    assert record['sha256']==sha('checkpoints/final_model.pt')==sha(best)
    assert record['run']==str(best.parent.parent) and record['evidence'] is True
    assert set(record['candidates'])=={'wide', 'narrow'} and record['candidates']['narrow']['interval']['low'] < record['candidates']['narrow']['value']
    assert record['measured']['samples']==manifest('wide')['data']['counts']['valid']
    load_trained('checkpoints/final_model.pt', device='cpu').evaluate('valid')

def test_what_is_scored_again_is_what_was_recorded(here):
    "So nobody reads that anything has changed."
    choice = choose()
    for o in choice.ranked: assert o.value==pytest.approx(o.record['best']['value'], abs=1e-6)
    assert not choice.notes

@pytest.mark.parametrize('monitor, said', [('max val_accuracy', 'wide > narrow'), ('min val_loss', 'wide < narrow in val_loss')])
def test_directions(here, monitor, said): assert said in str(choose(monitor=monitor))

def test_of_two_equal_runs_there_is_no_evidence(here):
    shutil.copytree('experiments/wide', 'experiments/wide-again')
    choice = choose(['wide', 'wide-again'])
    assert not choice.evidence and 'no evidence that wide and wide-again differ' in str(choice) and 'the same on all samples' in str(choice)
    assert choice.winner.run.name=='wide'          # the one named first

def test_averaged_weights_are_the_ones_that_are_scored(here, digits):
    run = train(digits, 'averaged', 64, callbacks=[dict(type='EMA', args=dict(decay=0.9))])
    choice = choose([run.path])
    assert choice.winner.value==pytest.approx(run.read()['best']['value'], abs=1e-6)

def test_a_stop_before_the_end_leaves_a_candidate(here):
    change('wide', status='stopped')
    assert choose().winner.run.name=='wide'

@pytest.mark.parametrize('entries, said', [
    (dict(data=dict(counts=dict(valid=9), fingerprint=dict(valid='other'))), ['valid samples', 'classes']),
    (dict(config=dict(metrics=[dict(type='accuracy', args=dict(k=2))])), ['definition of `accuracy`', 'accuracy(k=2)']),
    (dict(parts={'metrics.accuracy': dict(place='mine.py:3', code='0123456789')}), ['code of `accuracy`', '01234567']),
])
def test_runs_that_differ_in_what_was_measured_are_refused(here, entries, said):
    choose()
    kept = sha('checkpoints/final_model.pt'), Path('checkpoints/final_model.json').read_bytes()
    change('narrow', **entries)
    with pytest.raises(RunError) as e: choose()
    assert 'cannot be ranked' in str(e.value) and 'belong together: narrow; wide' in str(e.value)
    for o in said: assert o in str(e.value)
    assert kept==(sha('checkpoints/final_model.pt'), Path('checkpoints/final_model.json').read_bytes())
    assert choose(['wide']).winner.run.name=='wide'

def test_another_split_of_the_same_data_is_named_as_such(here, digits):
    for seed in (0, 1):
        data = dict(type='ImageFolder', args=dict(data_dir=str(digits/'train')))
        train(digits, f'split-{seed}', seed=seed, dataset=data, data_loader=dict(type='DataLoader', args=dict(batch_size=128, validation_split=200)), trainer=dict(epochs=1, monitor='max val_accuracy'))
    with pytest.raises(RunError) as e: choose(['split-0', 'split-1'])
    assert '200 in split-0; 200 in split-1' in str(e.value) and 'the same data are split differently' in str(e.value)
    keys = dict(o.removeprefix('data_loader.args.').split('=') for o in str(e.value).rpartition(': ')[2].split())   # what it says to type
    train(digits, 'same', seed=1, dataset=data, data_loader=dict(type='DataLoader', args=dict(batch_size=128, validation_split=int(keys['validation_split']), split=keys['split'])), trainer=dict(epochs=1, monitor='max val_accuracy'))
    assert len(choose(['split-0', 'same']).ranked)==2

def test_a_metric_that_one_of_the_runs_does_not_have(here, digits):
    train(digits, 'more', 64, metrics=['accuracy', 'f1'])
    choice = choose(monitor='max val_f1')
    assert [o.run.name for o in choice.ranked]==['more']
    assert 'no `val_f1`' in choice.left['wide'] and '`val_accuracy`' in choice.left['wide']
    with pytest.raises(RunError, match='did you mean `val_accuracy`'): choose(['wide'], monitor='max val_acuracy')

def test_runs_watched_by_different_numbers(here):
    change('narrow', monitor='min val_loss')
    with pytest.raises(RunError, match='do not agree'): choose()
    assert choose(monitor='max val_accuracy').winner.run.name=='wide'

def test_words_that_are_no_monitor(here):
    with pytest.raises(ConfigError, match='`min` or `max`'): choose(monitor='val_accuracy')

@pytest.mark.parametrize('spoil, said', [
    (lambda run: (run/'manifest.json').write_text('{"form'), 'cannot be read'),
    (lambda run: (run/'manifest.json').write_text(json.dumps(dict(json.loads((run/'manifest.json').read_text()), format=0))), 'has format 0'),
    (lambda run: (run/'checkpoints'/'best_model.pt').unlink(), 'no best_model.pt'),
    (lambda run: (run/'checkpoints'/'best_model.pt').write_bytes(b'PK half'), 'cannot be scored again'),
    (lambda run: RunFolder(run).update(best=None, at_best=None), 'no finished epoch'),
    (lambda run: RunFolder(run).update(best=dict(epoch=1, value=float('nan'))), 'no `val_accuracy`'),
])
def test_a_spoilt_run_is_left_out_and_named(here, spoil, said):
    "Half written, of an older version, without a model, without a number, at work on another machine."
    shutil.copytree('experiments/wide', 'experiments/odd')
    spoil(here/'experiments/odd')
    choice = choose()
    assert [o.run.name for o in choice.ranked]==['wide', 'narrow'] and said in choice.left['odd']
    assert 'Left out: odd: ' in str(choice)

def test_a_run_at_work_is_left_alone(here):
    shutil.copytree('experiments/wide', 'experiments/odd')
    change('odd', status='running', **this_process())
    with RunFolder(here/'experiments/odd').claimed(): assert choose().left['odd']=='it is still being trained'
    assert len(choose().ranked)==3         # killed since: what it left can be used

def test_a_folder_without_manifest_is_no_run(here):
    (here/'experiments/empty').mkdir()
    assert len(choose().ranked)==2
    with pytest.raises(RunError, match='is no run folder'): choose(['empty'])

def test_moved_and_renamed_runs_are_found_where_they_are(here):
    shutil.move('experiments/wide', here/'다른 곳')
    choice = choose([here/'다른 곳', 'narrow'])
    assert choice.winner.run.path==here/'다른 곳' and '다른 곳 > narrow' in str(choice)

def test_two_runs_of_one_name_are_told_apart(here):
    shutil.copytree('experiments/narrow', 'elsewhere/wide')
    choice = choose(['wide', 'elsewhere/wide'])
    assert choice.names()==['experiments/wide', 'elsewhere/wide'] and choice.evidence

def test_data_that_is_gone(here):
    "Nobody can be scored: refused, with the way out; one of them: left out."
    for name in ('wide', 'narrow'):
        shutil.copytree(f'experiments/{name}', f'experiments/gone-{name}')
        run = RunFolder(here/'experiments'/f'gone-{name}')
        state = torch.load(run.path/'checkpoints/best_model.pt', weights_only=True)
        state['meta']['config']['dataset']['args']['data_dir'] = str(here/'nowhere')
        torch.save(state, run.path/'checkpoints/best_model.pt')
    choice = choose(['wide', 'gone-narrow'])
    assert choice.winner.run.name=='wide' and 'cannot be scored again' in choice.left['gone-narrow']
    with pytest.raises(RunError, match='--no-rescore'): choose(['gone-wide', 'gone-narrow'])
    assert choose(['gone-wide', 'gone-narrow'], rescore=False).winner.run.name=='gone-wide'

def test_samples_that_changed_since_are_told(here, digits):
    change('wide', best=dict(epoch=1, value=0.123))
    choice = choose()
    assert any('0.123 then' in o for o in choice.notes)

def test_only_the_front_runners_are_scored(here):
    choice = choose(top=1)
    assert [o.interval is not None for o in choice.ranked]==[True, False]
    assert not choice.evidence and 'behind' in ' '.join(choice.notes) and 'not scored again' in str(choice)

def test_more_candidates_ask_for_more(here):
    alone = choose().differences[0]
    for i in range(6): shutil.copytree('experiments/narrow', f'experiments/narrow-{i}')
    together = next(o for o in choose().differences if o.second=='narrow')
    assert together.level > alone.level and together.high-together.low > alone.high-alone.low
    assert 'hold together at 95 %' in str(choose())

def test_seeds_show_their_spread(here, digits):
    for seed in (1, 2):
        for name, hidden in (('narrow', 2), ('wide', 64)): train(digits, f'{name}-{seed}', hidden, seed=seed)
    said = str(choose())
    assert 'wide over its seeds' in said and 'over 3 seeds' in said

def test_another_file_is_never_overwritten(here):
    Path('checkpoints').mkdir()
    Path('checkpoints/final_model.pt').write_bytes(b'mine')
    with pytest.raises(RunError, match='not overwritten'): choose()
    assert Path('checkpoints/final_model.pt').read_bytes()==b'mine' and not Path('checkpoints/final_model.json').exists()
    Path('checkpoints/folder.pt').mkdir()
    with pytest.raises(RunError, match='not overwritten'): choose(to='checkpoints/folder.pt')

def test_a_full_disk_leaves_the_old_model(here, monkeypatch):
    choose(['narrow'])
    kept = sha('checkpoints/final_model.pt')
    def full(*_): raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr('deep_studio_nb.experiments.select.shutil.copyfile', full)
        with pytest.raises(RunError, match='full'): choose()
    assert sha('checkpoints/final_model.pt')==kept and json.loads(Path('checkpoints/final_model.json').read_text())['sha256']==kept
    assert choose().winner.run.name=='wide'

DIE = """
import os, sys
import deep_studio_nb.common.files as files
import deep_studio_nb.experiments.select as select
at, seen, replace = int(sys.argv[1]), [], os.replace
def dies(a, b):
    seen.append(b)
    if len(seen)==at: os._exit(9)
    replace(a, b)
files.os.replace = dies
select.select_best(['wide'], device='cpu')
"""

@pytest.mark.parametrize('at', [1, 2])
def test_a_process_that_dies_between_record_and_model_blocks_nothing(here, at):
    choose(['narrow'])
    old = sha('checkpoints/final_model.pt')
    env = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[1]))
    assert subprocess.run([sys.executable, '-c', DIE, str(at)], env=env, timeout=300).returncode==9
    assert sha('checkpoints/final_model.pt')==old           # the whole old model
    assert choose(['wide']).winner.run.name=='wide'
    assert sha('checkpoints/final_model.pt')==json.loads(Path('checkpoints/final_model.json').read_text())['sha256']!=old
