"""Names for parts: who may have one, how they are found, and what is said when they are not."""
import importlib, os, pickle, subprocess, sys, typing
from pathlib import Path
import pytest
import torch
from deep_studio_nb.common.arguments import ArgProblem, check_args, split_spec
from deep_studio_nb.common.errors import ConfigError, NameTaken, StudioError, UnknownName, did_you_mean, near
from deep_studio_nb.common.registry import LOSSES, METRICS, MODELS, OPTIMIZERS, REGISTRIES, SCHEDULERS, TRANSFORMS, Registry
from deep_studio_nb.common.sources import place_of, source_of

ROOT = Path(__file__).parents[1]

def run(code):
    "What another process prints."
    return subprocess.run([sys.executable, '-c', code], env=os.environ|{'PYTHONPATH': str(ROOT)}, capture_output=True, text=True, check=True).stdout

@pytest.fixture
def parts(): return Registry('part')

@pytest.fixture
def module(tmp_path, monkeypatch):
    "Write a module that registers in `parts`, and import it, as often as wanted."
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, 'dont_write_bytecode', True)
    def load(name, text):
        (tmp_path/f"{name}.py").write_text(text, encoding='utf-8')
        importlib.invalidate_caches()
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)
    yield load
    for o in tmp_path.glob('*.py'): sys.modules.pop(o.stem, None)

NET = "class Net:\n    def __init__(self, k:int={k}): self.k = k\n"

# Who may have a name

def test_reloading_a_changed_module_replaces_quietly(parts, module):
    parts.register(module('nets', NET.format(k=1)).Net)
    parts.register(module('nets', NET.format(k=2)).Net)
    assert parts.build('Net').k==2 and len(parts)==1

def test_the_same_text_from_another_place_replaces_quietly(parts, module):
    "A notebook defines what it also exports and imports."
    parts.register(module('one', NET.format(k=1)).Net)
    parts.register(module('two', NET.format(k=1)).Net)
    assert parts.get('Net').__module__=='two'

def test_another_part_is_told_both_places(parts, module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts.register(module('one', NET.format(k=1)).Net)
    with pytest.raises(NameTaken) as e: parts.register(module('two', '\n\n'+NET.format(k=2)).Net)
    assert 'one.py:2' in str(e.value) and 'two.py:4' in str(e.value) and '@PARTS.register' in str(e.value)
    assert isinstance(e.value, ValueError) and isinstance(e.value, StudioError)
    assert parts.get('Net').__module__=='one'

def test_functions_of_one_name_clash_too(parts):
    def first():
        def part(): return 1
        return part
    def second():
        def part(): return 2
        return part
    parts.register(first())
    with pytest.raises(NameTaken): parts.register(second())
    assert parts.register('second')(second()) is parts.get('second')

def test_code_without_source_is_known_by_its_name(parts):
    space = {'__name__': 'made_up'}
    exec('class Net: pass\ndef part(): pass', space)
    parts.register(space['Net'])
    exec('class Net: pass', space)
    parts.register(space['Net'])
    assert parts.get('Net') is space['Net'] and parts.code_hash('Net') is None and source_of(space['part']) is None

@pytest.mark.parametrize('thing', [3, 'text', None, [1]])
def test_only_what_can_be_called_gets_a_name(parts, thing):
    with pytest.raises(ConfigError, match='cannot be called'): parts.register('x')(thing)
    assert len(parts)==0

def test_an_instance_needs_a_name(parts):
    layer = torch.nn.ReLU()
    with pytest.raises(ConfigError, match=r'PARTS.register\("name"\)'): parts.register(layer)
    assert parts.register('act')(layer) is layer and parts.get('act') is layer

PARTIAL = "from functools import partial\ndef add(parts): parts.register('sum')(partial(sum, start={k}))\n"

def test_a_part_made_on_the_spot_belongs_to_the_module_that_registers_it(parts, module):
    module('one', PARTIAL.format(k=1)).add(parts)
    module('one', PARTIAL.format(k=2)).add(parts)
    assert parts.get('sum').keywords=={'start': 2}
    with pytest.raises(NameTaken, match='another comes from two'): module('two', PARTIAL.format(k=2)).add(parts)

def test_temporary_registrations_end_with_an_error_too(parts):
    with pytest.raises(KeyError):
        with parts.temporary():
            parts.register('x')(int)
            raise KeyError
    assert parts.names()==[]

# How names are found

def test_libraries_are_imported_only_when_needed():
    out = run("import sys\nfrom deep_studio_nb.common.registry import *\nprint([o for o in ('torch', 'torchvision', 'torchmetrics') if o in sys.modules])\n"
              "@MODELS.register\nclass Mine: pass\nMODELS.build('Mine'), 'Mine' in MODELS\nprint('torch' in sys.modules)\n"
              "OPTIMIZERS.get('SGD')\nprint('torch' in sys.modules, 'torchvision' in sys.modules)")
    assert out.split('\n')[:3]==['[]', 'False', 'True False']

def test_a_dotted_name_is_never_imported(parts, tmp_path, monkeypatch):
    mark = tmp_path/'was_run'
    (tmp_path/'evil.py').write_text(f"open({str(mark)!r}, 'w')\nclass Net: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for o in (parts, MODELS):
        with pytest.raises(UnknownName, match='A dotted path is not imported by itself'): o.get('evil.Net')
        assert 'evil.Net' not in o
    assert not mark.exists() and 'evil' not in sys.modules

@pytest.mark.parametrize('registry,there,absent', [
    (MODELS, ['resnet18', 'vit_b_16', 'ResNet'], ['get_model', 'list_models', 'ResNet18_Weights', 'resnet', 'detection']),
    (TRANSFORMS, ['RandomHorizontalFlip', 'Resize', 'Compose'], ['functional', 'Query', 'InterpolationMode']),
    (LOSSES, ['cross_entropy', 'nll_loss', 'NLLLoss', 'ctc_loss', 'triplet_margin_loss'], ['relu', 'Module', 'Linear', 'functional', 'dropout']),
    (OPTIMIZERS, ['Adam', 'SGD', 'LBFGS'], ['Optimizer', 'lr_scheduler', '_functional']),
    (SCHEDULERS, ['StepLR', 'OneCycleLR', 'ReduceLROnPlateau', 'SequentialLR'], ['Optimizer', 'Tensor', 'LRScheduler', 'bisect_right']),
])
def test_what_counts_in_a_library(registry, there, absent):
    assert [o for o in there if o not in registry]==[]
    assert [o for o in absent if o in registry]==[]

def test_torchmetrics_by_name():
    pytest.importorskip('torchmetrics')
    metric = METRICS.build({'type': 'Accuracy', 'args': {'task': 'multiclass'}}, facts=dict(num_classes=3, in_channels=1))
    assert metric.num_classes==3 and 'Metric' not in METRICS
    with pytest.raises(ConfigError, match='needs `task`'): METRICS.build('Accuracy')

def test_registered_parts_come_before_libraries():
    with OPTIMIZERS.temporary():
        @OPTIMIZERS.register
        class SGD(torch.optim.Adam): pass
        assert OPTIMIZERS.get('SGD') is SGD
    assert OPTIMIZERS.get('SGD') is torch.optim.SGD

@pytest.mark.parametrize('registry,word,hint', [(OPTIMIZERS, 'Adamw', 'AdamW'), (LOSSES, 'CrossEntropyLos', 'CrossEntropyLoss'), (LOSSES, 'crossentropy', 'cross_entropy'),
    (SCHEDULERS, 'steplr', 'StepLR'), (MODELS, 'resnet-18', 'resnet18'), (TRANSFORMS, 'RandomHorizontalFilp', 'RandomHorizontalFlip')])
def test_a_typo_gets_a_hint(registry, word, hint):
    with pytest.raises(UnknownName, match=f"did you mean .*`{hint}`") as e: registry.get(word)
    assert f"@{registry.variable}.register" in str(e.value) and 'imports:' in str(e.value)

def test_there_is_one_registry_a_kind():
    assert list(REGISTRIES)==['dataset', 'loader', 'transform', 'model', 'loss', 'metric', 'optimizer', 'scheduler', 'callback', 'tracker', 'trainer']
    assert all(o.kind==k for k,o in REGISTRIES.items())

# Words

@pytest.mark.parametrize('word,choices,want', [('lr_schedular', ['lr_scheduler', 'loss', 'optimizer'], ['lr_scheduler']), ('Epoch', ['epochs'], ['epochs']),
    ('', ['a'], []), ('a', [], []), ('batchSize', ['batch_size', 'size'], ['batch_size']), ('데이타', ['데이터', '모델'], ['데이터'])])
def test_near(word, choices, want): assert near(word, choices)==want

def test_hints_are_few_and_best_first():
    assert near('Adam', ['Adamax', 'NAdam', 'Adam', 'AdamW', 'RAdam'])[0]=='Adam'
    assert len(near('Adam', [f"Adam{i}" for i in range(50)]))==3
    assert did_you_mean('Adan', ['Adam', 'Adax'], 2)==', did you mean `Adam` or `Adax`?'

# Specs and arguments

@pytest.mark.parametrize('spec,words', [({}, '`type` is None'), ({'type': 3}, '`type` is 3'), ({'type': 'A', 'args': 'x'}, '`args` of `A`'), ({'type': 'A', 'args': []}, 'want a mapping'),
    ({'type': 'A', 'kwargs': {}}, 'Arguments go under'), ({'tpye': 'A'}, 'did you mean `type`'), (None, 'None names nothing'), (3.5, '3.5 names nothing'), (['A'], 'names nothing')])
def test_bad_specs(spec, words):
    with pytest.raises(ConfigError) as e: split_spec(spec)
    assert words in str(e.value)

class Part:
    def __init__(self, size:int, rate:float=0.1, *, names:list[str]|None=None, mode:typing.Literal['L', 'RGB']='L', flag:bool=False): self.size,self.rate = size,rate

@pytest.mark.parametrize('args', [dict(size=1), dict(size=1, rate=2), dict(size=1, names=['a']), dict(size=1, names=None), dict(size=1, mode='RGB'), dict(size=1, flag=True), dict(size=1, rate=torch.tensor(1.))])
def test_good_arguments(args): assert check_args(Part, args)==[]

@pytest.mark.parametrize('args,arg,wanted', [(dict(size=1.5), 'size', 'int'), (dict(size=True), 'size', 'int'), (dict(size=1, rate='1e-3'), 'rate', 'float'), (dict(size=1, names='a'), 'names', 'list[str] | None'),
    (dict(size=1, names=[1]), 'names', 'list[str] | None'), (dict(size=1, mode='grey'), 'mode', "Literal['L', 'RGB']"), (dict(size=1, flag='no'), 'flag', 'bool'), (dict(size=1, rate=None), 'rate', 'float'),
    (dict(), 'size', 'int'), (dict(size=1, rates=1), 'rates', "size, rate=0.1, names=None, mode='L', flag=False")])
def test_bad_arguments(args, arg, wanted):
    [problem] = check_args(Part, args)
    assert isinstance(problem, ArgProblem) and (problem.arg, problem.wanted)==(arg, wanted)
    assert f"`{arg}`" in problem and '`Part`' in problem

def test_all_problems_at_once(parts):
    parts.register(Part)
    with pytest.raises(ConfigError) as e: parts.build({'type': 'Part', 'args': {'raet': 1, 'flag': 'no'}})
    assert all(o in str(e.value) for o in ('did you mean `rate`', 'want bool', 'needs `size`'))

def test_annotations_that_cannot_be_evaluated(module):
    text = "from __future__ import annotations\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING: from nowhere import Thing\n"
    known = module('known', "from __future__ import annotations\ndef part(a:int): pass\n").part
    unknown = module('unknown', text+"def part(a:int, b:Thing=None): pass\n").part
    assert len(check_args(known, {'a': 'x'}))==1
    assert check_args(unknown, {'a': 'x', 'b': 1})==[] and len(check_args(unknown, {'c': 1}))==2

def test_facts_are_offered_not_forced(parts):
    @parts.register
    class Greedy:
        def __init__(self, *args, num_classes=1, **kwargs): self.n,self.kwargs = num_classes,kwargs
    facts = dict(num_classes=5, in_channels=3)
    built = parts.build('Greedy', facts=facts)
    assert (built.n, built.kwargs)==(5, {})
    assert parts.build({'type': 'Greedy', 'args': {'num_classes': 2, 'other': 1}}, facts=facts).n==2
    assert parts.build('Greedy', facts=facts, num_classes=7).n==7

def test_building_changes_nobodys_spec(parts):
    parts.register(Part)
    spec = {'type': 'Part', 'args': {'size': 1}}
    parts.build(spec, facts=dict(rate=0.5))
    assert spec=={'type': 'Part', 'args': {'size': 1}}

def test_the_config_of_the_ancestor_builds():
    "Each part of a config in the style of pytorch-template that PyTorch itself has."
    model = torch.nn.Linear(2, 2)
    optimizer = OPTIMIZERS.build({'type': 'Adam', 'args': {'lr': 0.001, 'weight_decay': 0, 'amsgrad': True}}, model.parameters())
    assert SCHEDULERS.build({'type': 'StepLR', 'args': {'step_size': 50, 'gamma': 0.1}}, optimizer).step_size==50
    assert LOSSES.build('nll_loss') is torch.nn.functional.nll_loss
    with pytest.raises(ConfigError, match='filled in by the toolkit'): OPTIMIZERS.build({'type': 'Adam', 'args': {'params': []}}, model.parameters())

def test_bound_functions_travel_to_other_processes():
    bound = LOSSES.build({'type': 'cross_entropy', 'args': {'label_smoothing': 0.1}})
    again = pickle.loads(pickle.dumps(bound))
    assert again.__name__=='cross_entropy' and again.keywords=={'label_smoothing': 0.1}

def test_errors_inside_a_part_are_not_hidden(parts):
    @parts.register
    class Broken:
        def __init__(self, size:int): raise FileNotFoundError('no such folder')
    with pytest.raises(FileNotFoundError, match='no such folder') as e: parts.build({'type': 'Broken', 'args': {'size': 3}})
    assert e.value.__notes__==["This happened while building the part `Broken` with {'size': 3}."]

# What ran

def test_hash_and_place_of_a_file(parts, module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts.register(module('hashed', NET.format(k=1)).Net)
    before = parts.code_hash('Net')
    assert parts.place('Net')=='hashed.py:2' and source_of(parts.get('Net'))==NET.format(k=1)
    import linecache
    parts.register(module('hashed', NET.format(k=2)).Net)
    linecache.clearcache()
    assert parts.code_hash('Net')!=before and len(before)==64
    assert run(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nimport hashed\nfrom deep_studio_nb.common.sources import source_hash\nprint(source_hash(hashed.Net))").strip()==parts.code_hash('Net')

def test_place_of_compiled_code():
    assert place_of(len)=='builtins' and place_of(torch.nn.functional.logsigmoid)
    assert LOSSES.place('cross_entropy').rpartition(':')[0].endswith('functional.py')
