"Broken configs in all four formats, each with the key, the line and the suggestion that a person must get."
import json, math, subprocess, sys, time
from contextlib import ExitStack
from pathlib import Path
import pytest
from hypothesis import given, settings, strategies as st
from deep_studio_nb.common.config import Config
from deep_studio_nb.common.config_files import read_config_file
from deep_studio_nb.common.config_writing import WRITERS, write_config_file
from deep_studio_nb.common.errors import ConfigError
from deep_studio_nb.common.registry import DATASETS, LOADERS, LOSSES, METRICS, MODELS, OPTIMIZERS
from deep_studio_nb.common.schema_check import json_schema

ROOT = Path(__file__).parent.parent

class ToyData: pass
class ToyLoader:
    def __init__(self, dataset, batch_size:int=1, validation_split:float=0., shuffle:bool=True): pass
class ToyNet:
    def __init__(self, num_classes:int, width:int=8): pass
class ToyAdam:
    def __init__(self, params, lr:float=0.1, betas:tuple[float,float]=(0.9,0.99)): pass
def toy_loss(preds, target): pass
def toy_accuracy(preds, target): pass

@pytest.fixture(autouse=True)
def toys():
    "Parts to name in configs, forgotten after each test."
    parts = {DATASETS: ToyData, LOADERS: ToyLoader, MODELS: ToyNet, OPTIMIZERS: ToyAdam, LOSSES: toy_loss, METRICS: toy_accuracy}
    with ExitStack() as stack:
        for registry,part in parts.items(): stack.enter_context(registry.temporary()).register(part)
        yield

# The same config four times, each key on the same line

GOOD = dict(yaml="""name: toy
dataset: ToyData
data_loader: {type: ToyLoader, args: {batch_size: 4, validation_split: 0.2}}
arch: {type: ToyNet, args: {width: 16}}
loss: toy_loss
metrics: [toy_accuracy]
optimizer: {type: ToyAdam, args: {lr: 0.001}}
trainer:
  epochs: 3
  monitor: min val_loss
""", json="""{"name": "toy",
 "dataset": "ToyData",
 "data_loader": {"type": "ToyLoader", "args": {"batch_size": 4, "validation_split": 0.2}},
 "arch": {"type": "ToyNet", "args": {"width": 16}},
 "loss": "toy_loss",
 "metrics": ["toy_accuracy"],
 "optimizer": {"type": "ToyAdam", "args": {"lr": 0.001}},
 "trainer": {
   "epochs": 3,
   "monitor": "min val_loss"}}
""", ini="""name = toy
dataset = ToyData
data_loader = {type: ToyLoader, args: {batch_size: 4, validation_split: 0.2}}
arch = {type: ToyNet, args: {width: 16}}
loss = toy_loss
metrics = [toy_accuracy]
optimizer = {type: ToyAdam, args: {lr: 0.001}}
[trainer]
epochs = 3
monitor = min val_loss
""", py="""name = "toy"
dataset = "ToyData"
data_loader = {"type": "ToyLoader", "args": {"batch_size": 4, "validation_split": 0.2}}
arch = {"type": "ToyNet", "args": {"width": 16}}
loss = "toy_loss"
metrics = ["toy_accuracy"]
optimizer = {"type": "ToyAdam", "args": {"lr": 0.001}}
trainer = dict(
    epochs=3,
    monitor="min val_loss")
""")

# What is changed (one pair for all formats, or one each), and the key, line and suggestion that follow

def same(old, new): return dict.fromkeys(GOOD, (old, new))
def line(n): return {k: (v.splitlines(True)[n-1], "") for k,v in GOOD.items()}

MISTAKES = {
    "unknown key": (same("metrics", "metric"), "metric", 6, "did you mean `metrics`?"),
    "unknown key inside": (same("epochs", "epoch"), "trainer.epoch", 9, "did you mean `epochs`?"),
    "key of another toolkit": (same("metrics", "callback_list"), "callback_list", 6, "did you mean `callbacks`?"),
    "key at the wrong level": (same("metrics", "early_stop"), "early_stop", 6, "did you mean `trainer.early_stop`?"),
    "argument beside args": ({"yaml": ("args: {lr: 0.001}", "lr: 0.001"), "json": ('"args": {"lr": 0.001}', '"lr": 0.001'), "ini": ("args: {lr: 0.001}", "lr: 0.001"),
                              "py": ('"args": {"lr": 0.001}', '"lr": 0.001')}, "optimizer.lr", 7, "arguments of a part go under `args`: `optimizer.args.lr`"),
    "missing section": (line(4), "arch", 0, ""),
    "missing epochs": ({**line(9)}, "trainer.epochs", 8, ""),
    "text for a number": ({"yaml": ("epochs: 3", "epochs: three"), "json": ('"epochs": 3', '"epochs": "three"'), "ini": ("epochs = 3", "epochs = three"),
                           "py": ("epochs=3", "epochs='three'")}, "trainer.epochs", 9, ""),
    "number in quotes": ({"yaml": ("epochs: 3", "epochs: '3'"), "json": ('"epochs": 3', '"epochs": "3"'), "ini": ("epochs = 3", "epochs = '3'"),
                          "py": ("epochs=3", "epochs='3'")}, "trainer.epochs", 9, "write `3`, without quotes"),
    "fraction for a whole number": ({"yaml": ("epochs: 3", "epochs: 3.0"), "json": ('"epochs": 3', '"epochs": 3.0'), "ini": ("epochs = 3", "epochs = 3.0"),
                                     "py": ("epochs=3", "epochs=3.0")}, "trainer.epochs", 9, "write `3`"),
    "zero epochs": ({"yaml": ("epochs: 3", "epochs: 0"), "json": ('"epochs": 3', '"epochs": 0'), "ini": ("epochs = 3", "epochs = 0"),
                     "py": ("epochs=3", "epochs=0")}, "trainer.epochs", 9, ""),
    "typo in a type": (same("ToyNet", "ToyNat"), "arch.type", 4, "did you mean `ToyNet`?"),
    "typo in a bare name": (same("toy_loss", "toy_los"), "loss", 5, "did you mean `toy_loss`?"),
    "typo in a list": (same("toy_accuracy", "toy_acuracy"), "metrics.0", 6, "did you mean `toy_accuracy`?"),
    "unheard of type": (same("ToyData", "Zebra"), "dataset", 2, "to add your own write it with @DATASETS.register and name its module under `imports`"),
    "typo in an argument": (same("width", "widht"), "arch.args.widht", 4, "did you mean `width`?"),
    "argument filled by the toolkit": (same("lr", "params"), "optimizer.args.params", 7, ""),
    "argument of the wrong type": ({k: ("16", '"wide"') for k in GOOD}, "arch.args.width", 4, ""),
    "share out of range": (same("0.2", "1.5"), "data_loader.args.validation_split", 3, ""),
    "empty batches": (same('4', '0'), "data_loader.args.batch_size", 3, ""),
    "monitor that nothing provides": (same("min val_loss", "min val_los"), "trainer.monitor", 10, "did you mean `val_loss`?"),
    "monitor without direction": (same("min val_loss", "val_loss"), "trainer.monitor", 10, ""),
    "one name for a list": ({k: (f"[{v}]", v) for k,v in dict(yaml="toy_accuracy", json='"toy_accuracy"', ini="toy_accuracy", py='"toy_accuracy"').items()},
                            "metrics", 6, "put it in brackets: `[toy_accuracy]`"),
}

def write(folder, suffix, text):
    path = folder/f"설정 {suffix}.{suffix}"
    path.write_text(text, encoding="utf-8")
    return path

def problems_of(*args):
    "Everything that `check` says."
    try: Config(*args).check()
    except ConfigError as e: return e.problems
    return []

def seen(problems): return [(p.key, p.place.line, p.hint) for p in problems]

@pytest.mark.parametrize("suffix", GOOD)
def test_good_config_has_no_problem(suffix, tmp_path):
    cfg = Config.load(write(tmp_path, suffix, GOOD[suffix])).check()
    assert {k: cfg[k] for k in json.loads(GOOD["json"]) if k!="trainer"} == {k: v for k,v in json.loads(GOOD["json"]).items() if k!="trainer"}
    assert (cfg["trainer.epochs"], cfg["seed"], cfg.notes) == (3, 0, [])

@pytest.mark.parametrize("suffix", GOOD)
@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name, suffix, tmp_path):
    edits,key,line,hint = MISTAKES[name]
    assert GOOD[suffix].count(edits[suffix][0])==1
    problem, = problems_of(write(tmp_path, suffix, GOOD[suffix].replace(*edits[suffix])))
    assert (problem.key, problem.place.line, problem.hint) == (key, line, hint)
    assert f"설정 {suffix}.{suffix}" in str(problem) and problem.found

@pytest.mark.parametrize("suffix", GOOD)
def test_all_mistakes_at_once(suffix, tmp_path):
    text = GOOD[suffix]
    for name in ("unknown key", "share out of range", "typo in an argument", "typo in a bare name", "zero epochs", "monitor without direction", "argument beside args"):
        text = text.replace(*MISTAKES[name][0][suffix])
    path = write(tmp_path, suffix, text.replace("ToyData", "ToyDat"))
    want = {("dataset",2), ("data_loader.args.validation_split",3), ("arch.args.widht",4), ("loss",5), ("metric",6), ("optimizer.lr",7), ("trainer.epochs",9), ("trainer.monitor",10)}
    assert {(p.key,p.place.line) for p in problems_of(path)} == want

@pytest.mark.parametrize("suffix", GOOD)
def test_checking_is_quick(suffix, tmp_path):
    "A person waits for it: under 100 ms of work, once the libraries are imported."
    text = GOOD[suffix]
    for name in ("unknown key", "typo in an argument", "zero epochs", "typo in a bare name"): text = text.replace(*MISTAKES[name][0][suffix])
    path,times = write(tmp_path, suffix, text),[]
    for _ in range(4):
        start = time.process_time()
        assert len(problems_of(path))==4
        times.append(time.process_time()-start)
    assert min(times[1:])<0.1

# Text that cannot be read, or only in part: ending, text, line, column, and a part of the suggestion

BROKEN = {
    "tab": ("yaml", "name: x\narch:\n\ttype: A", 3, 1, "indent with spaces"),
    "open bracket": ("yaml", "name: x\narch: {type: A", 2, 7, "close the bracket"),
    "open quote": ("yaml", "name: 'x\n", 1, 7, "close the bracket or the quote"),
    "colon in a value": ("yaml", "name: a: b", 1, 8, "in quotes"),
    "unknown alias": ("yaml", "name: *x", 1, 7, "define it first"),
    "two documents": ("yaml", "name: x\n---\nname: y", 2, 1, "one document"),
    "key twice": ("yaml", "seed: 1\nname: x\nseed: 2", 3, 1, "remove one"),
    "tag": ("yaml", "name: !!python/object/apply:os.system ['touch ran']", 1, 1, "remove the tag"),
    "key that is a number": ("yaml", "name: x\n3: y", 2, 1, "quotes"),
    "comma at the end": ("json", '{"name": "x",\n}', 2, 1, "remove the comma"),
    "comma missing": ("json", '{"name": "x"\n "seed": 1}', 2, 2, "a comma is missing"),
    "single quotes": ("json", "{'name': 'x'}", 1, 2, "double quotes"),
    "comment": ("json", '{"name": "x", // me\n "seed": 1}', 1, 15, "no comments"),
    "words of Python": ("json", '{"name": None}', 1, 10, "`null`"),
    "JSON key twice": ("json", '{"name": "x",\n "seed": 1,\n "seed": 2}', 3, 2, "remove one"),
    "no equals sign": ("ini", "name = x\nseed: 3", 2, 1, ""),
    "section twice": ("ini", "[trainer]\nepochs = 3\n[arch]\n[trainer]", 4, 1, "remove one"),
    "INI key twice": ("ini", "seed = 1\nseed = 2", 2, 1, "remove one"),
    "INI open bracket": ("ini", "metrics = [a,\n b\n[trainer]\nepochs = 3", 1, 11, "close the bracket"),
    "INI strange sign": ("ini", "name = x\narch = @y", 2, 8, "in quotes"),
    "unclosed": ("py", "name = 'x'\narch = {'type': 'A'\n", 2, 8, ""),
    "failing line": ("py", "name = 'x'\nseed = 1/0", 2, 1, ""),
    "missing import": ("py", "import nowhere\nname = 'x'", 1, 1, ""),
    "exit": ("py", "name = 'x'\nraise SystemExit(1)", 2, 1, ""),
    "not plain": ("py", "name = 'x'\nfrom pathlib import Path\ndataset = {'type': 'A', 'args': {'data_dir': Path('x')}}", 3, 34, "turn it into one"),
    "Python key twice": ("py", "arch = {'type': 'A', 'type': 'B'}", 1, 22, "remove one"),
}

@pytest.mark.parametrize("name", BROKEN)
def test_broken_text(name, tmp_path):
    suffix,text,line,column,hint = BROKEN[name]
    try: problems = Config(write(tmp_path, suffix, text)).problems
    except ConfigError as e: problems = e.problems
    assert (problems[0].place.line, problems[0].place.column) == (line, column)
    assert hint in problems[0].hint and (hint or not problems[0].hint)
    assert not (tmp_path/"ran").exists() and not Path("ran").exists()

@pytest.mark.parametrize("name,data,words", [
    ("a.yaml", None, "no such file"), ("good.ymal", None, "did you mean"), ("folder.yaml", "folder", "a folder"), ("a.toml", b"seed = 1", "the ending `.toml`"),
    ("a.yaml", b"", "nothing at the top level"), ("a.json", b"", "broken JSON"), ("a.ini", b"", "name"), ("a.py", b"", "name"), ("a.yaml", b"- a\n- b", "a list at the top level"),
    ("a.json", b"3", "a single value"), ("a.yaml", "이름".encode("cp949"), "not text in UTF-8"), ("a.yaml", b"a: \x00", "broken YAML"), ("a.json", b"["*100_000, "too deep"),
    ("a.yaml", b"a: &a [*a, *a]", "too deep"), ("a.yaml", b"name: a\nbase: gud.yaml", "did you mean `good.yaml`?"), ("a.yaml", b"base: a.yaml", "builds on this file"),
    ("a.yaml", b"base: {x: 1}", "a file name"), ("a.yaml", b"base: bad.json", "broken JSON")])
def test_files_that_are_no_configs(name, data, words, tmp_path):
    (tmp_path/"good.yaml").write_text(GOOD["yaml"])
    (tmp_path/"bad.json").write_text("{")
    if data=="folder": (tmp_path/name).mkdir()
    elif data is not None: (tmp_path/name).write_bytes(data)
    with pytest.raises(ConfigError) as e: Config.load(tmp_path/name)
    assert words in str(e.value)

@pytest.mark.parametrize("suffix,text,found", [
    ("yaml", "name: a\nbase: nowhere.yaml", "which is no file"), ("yaml", "", "nothing at the top level"), ("yaml", "- a", "a list at the top level"),
    ("ini", "name = a\n[arch\n", "a line without `=`")])
def test_what_could_not_be_read_is_not_called_missing(suffix, text, found, tmp_path):
    problem, = Config(write(tmp_path, suffix, text)).problems
    assert found in problem.found and problem.place.file!="config" and "did you mean" not in problem.hint

@pytest.mark.parametrize("text,found", [("seed: ${seed}", "`${seed}`, which leads back to itself"), ("seed: ${sed.x}", "`${sed.x}`, which is no key of this config")])
def test_a_reference_that_leads_nowhere_is_told_once(text, found, tmp_path):
    problem, = Config(write(tmp_path, "yaml", GOOD["yaml"]+text)).problems
    assert problem.found==found

@pytest.mark.parametrize("override,key,hint", [
    ("trainer.epoch=9", "trainer.epoch", "did you mean `epochs`?"), ("optimizer.lr=1", "optimizer.lr", "arguments of a part go under `args`: `optimizer.args.lr`"),
    ("trainer.epochs", "", ""), ("=3", "", "write names with dots between, as in `trainer.epochs=3`"), ("trainer.epochs=", "trainer.epochs", "write `trainer.epochs=null` for none, or `trainer.epochs=\"''\"` for an empty text"),
    ("trainer.epochs=x", "trainer.epochs", ""), ("metrics.3=toy_accuracy", "metrics.3", ""), ("name.x=3", "name.x", ""), ("arch={type: ToyNet", "arch", "close the bracket, or add the comma"),
    ("arch.type=ToyNat", "arch.type", "did you mean `ToyNet`?"), ("arch.args.widht=3", "arch.args.widht", "did you mean `width`?"), ("base=x.yaml", "base", ""),
    ("name=${vars.nam}", "name", ""), ("vars.x=${seeed}", "vars.x", "did you mean `seed`?"), ("loss=???", "loss", "give it on the command line: `loss=...`"), ("imports=[nowhere_at_all]", "imports.0", "")])
def test_broken_overrides(override, key, hint, tmp_path):
    problem, = problems_of(write(tmp_path, "yaml", "seed: 1\n"+GOOD["yaml"]), override)
    assert (problem.key, str(problem.place), problem.hint) == (key, "command line", hint)

def test_typos_are_reported_with_the_file_that_has_them(tmp_path):
    (tmp_path/"base.json").write_text(GOOD["json"].replace("width", "widht"))
    path = write(tmp_path, "ini", "base = base.json\nname = mine\n[trainer]\nepoch = 4")
    assert {(Path(p.place.file).name, p.place.line, p.key) for p in problems_of(path, "seed=x")} == {
        ("base.json", 4, "arch.args.widht"), ("설정 ini.ini", 4, "trainer.epoch"), ("command line", 0, "seed")}

def test_imports_beside_the_config(tmp_path):
    (tmp_path/"toy_imported_nets.py").write_text("from deep_studio_nb.common.registry import MODELS\n@MODELS.register\nclass NetFromFile:\n    def __init__(self, depth:int=1): pass\n")
    (tmp_path/"toy_failing_nets.py").write_text("x = 1\nraise RuntimeError('no good')\n")
    text = GOOD["yaml"].replace("arch: {type: ToyNet, args: {width: 16}}", "arch: NetFromFile")
    before = list(sys.path)
    Config(write(tmp_path, "yaml", text+"imports: [toy_imported_nets]\n")).check()
    assert sys.path[:len(before)]==before and sys.path[len(before):]==[str(tmp_path.resolve())]
    problem, = problems_of(write(tmp_path, "yaml", text+"imports: [toy_failing_nets]\n"))
    assert problem.place.line==11 and "toy_failing_nets.py:2" in problem.found and "no good" in problem.found
    sys.path[:] = before

# Configs that come with the package

TEMPLATE = '{"name":"Mask_ResNet","n_gpu":1,"arch":{"type":"ResNet","args":{"num_blocks":[3,4,6,3]}},"data_loader":{"type":"IrisDataLoader","args":{"batch_size":3,"shuffle":false,"validation_split":2,"num_workers":2}},"dataset":{"type":"ImageDataset","args":{"data_dir":"data/"}},"optimizer":{"type":"Adam","args":{"lr":0.001,"weight_decay":0,"amsgrad":true}},"loss":"nll_loss","metrics":["accuracy","top_k_acc"],"lr_scheduler":{"type":"StepLR","args":{"step_size":50,"gamma":0.1}},"trainer":{"epochs":1,"save_dir":"saved/","save_period":1,"verbosity":2,"monitor":"min val_loss","early_stop":10,"tensorboard":true}}'

def test_config_of_pytorch_template_loads_to_the_letter(tmp_path):
    assert (ROOT/"configs/pytorch_template.json").read_text().strip()==TEMPLATE
    cfg = Config.load(ROOT/"configs/pytorch_template.json")
    assert {k: cfg[k] for k in json.loads(TEMPLATE)}==json.loads(TEMPLATE)

def test_configs_of_the_package_are_right():
    code = f"""if True:
        from pathlib import Path
        from deep_studio_nb.common.config import Config
        from deep_studio_nb.common.problems import dotted
        from deep_studio_nb.common.schema_check import leaves
        from deep_studio_nb.experiments.build import learn_names
        learn_names()
        for path in sorted(Path({str(ROOT/'configs')!r}).iterdir()):
            if path.name in ('schema.json', 'pytorch_template.json', 'sweep.yaml'): continue      # the last is a space of configs
            given = [dotted(k)+'=x' for k,v in leaves(Config(path).data) if v=='???']
            Config(path, *given).check()
            print(path.name)"""
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert r.returncode==0, r.stderr
    assert len(r.stdout.split())>=10

def test_flowers_ask_for_their_folder():
    problem, = Config(ROOT/"configs/flowers.yaml").problems
    assert (problem.key, problem.hint)==("dataset.args.data_dir", "give it on the command line: `dataset.args.data_dir=...`")

def test_schema_for_editors_has_all_keys():
    saved,now = json.loads((ROOT/"configs/schema.json").read_text()),json_schema()
    assert saved["required"]==now["required"] and list(saved["properties"])==list(now["properties"])
    for k,v in now["$defs"].items(): assert list(saved["$defs"][k]["properties"])==list(v["properties"])

# Reading what was written

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(["off", "yes", "1e-3", "12:30", "~", "null", "0x1F", "007", "- a", "a: b", "a #b", "[", "1_000", "=", "${x}", "a\\${x}\\", "\\"])
values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words, lambda o: st.lists(o, max_size=3) | st.dictionaries(words, o, max_size=3), max_leaves=8)

@pytest.mark.parametrize("suffix", WRITERS)
@settings(max_examples=40, deadline=None)
@given(free=st.dictionaries(words, values, max_size=4))
def test_what_is_saved_is_read_again(suffix, free, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()/f"saved{suffix[1:]}"
    folder.mkdir(exist_ok=True)
    cfg = Config(write_config_file({"name": "x", "vars": free}, folder/f"x{suffix}"))
    assert repr(cfg["vars"])==repr(free)

@pytest.mark.parametrize("number", [1e-5, 1e20, -0.0, 3, math.inf])
@pytest.mark.parametrize("suffix", WRITERS)
def test_numbers_keep_value_and_type(number, suffix, tmp_path):
    read = read_config_file(write_config_file({"vars": {"x": number}}, tmp_path/f"x{suffix}")).data["vars"]["x"]
    assert repr(read)==repr(number)

def test_reading_configs_imports_no_heavy_library():
    code = "import sys, deep_studio_nb.common.config; print([o for o in ('torch','numpy','pydantic','omegaconf','yaml','typer','rich') if o in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()=="[]"
