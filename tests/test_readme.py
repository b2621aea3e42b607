"README.md says what nbs/index.ipynb says, its commands exist and its examples run."
import importlib.util, json, os, re, shutil, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT/'README.md').read_text(encoding='utf-8')
LANGUAGES = README.split('\n## ')[1:]   # English, Korean

def tool(name):
    "The script `name` of tools/ as a module."
    spec = importlib.util.spec_from_file_location(name, ROOT/f'tools/{name}.py')
    mod = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mod)
    return mod

def blocks(text, language): return re.findall(rf'^```{language}\n(.*?)^```', text, re.M | re.S)

def test_readme_is_what_the_notebook_says(): assert tool('readme').main(check=True)==0

@pytest.mark.parametrize('text', ['::: {.note}\nhi\n:::', 'see @fig-curve', '[design](dev/design.ipynb)', '## Title {#sec-title}', '{{< video x >}}'])
def test_what_only_quarto_reads_is_refused(text):
    with pytest.raises(ValueError, match='nbs/index.ipynb'): tool('readme').prose(text)

def test_hidden_cells_stay_out_and_outputs_come_along():
    def cell(source, *outputs): return dict(cell_type='code', source=source, outputs=list(outputs))
    nb = dict(cells=[dict(cell_type='markdown', source='# T\n\n> s'), cell('#| hide\nx'), cell('1+1', dict(output_type='execute_result', data={'text/plain': '2'}))])
    assert tool('readme').readme(nb).endswith('-->\n\n```python\n1+1\n```\n\n    2\n')

def test_the_two_lines_are_there_once_in_each_language():
    assert len(LANGUAGES)==2
    for text in LANGUAGES:
        lines = ''.join(blocks(text, 'bash')).splitlines()
        assert lines==['pip install -e . && deep-studio train configs/quickstart.yaml', 'pip install -e ".[dev]" && pytest']

def test_both_languages_show_the_same():
    "Everything but prose: commands, and code without comments, docstrings and names of runs."
    def bare(text): return [re.sub(r'\s*#.*|^\s*".*"$|name[=:] ?[\w-]+', '', o, flags=re.M) for o in blocks(text, r'\w+')]
    english, korean = LANGUAGES
    assert bare(english)==bare(korean)
    assert re.findall(r'^\| (`.*?`)', english, re.M)==re.findall(r'^\| (`.*?`)', korean, re.M)

def test_the_commands_exist():
    from typer.testing import CliRunner
    from deep_studio_nb.cli import app
    for line in set(re.findall(r'`deep-studio ([a-z].*?)`', README)):
        shown = CliRunner().invoke(app, [*line.split()[:2 if line.startswith('data ') else 1], '--help'])
        assert shown.exit_code==0, line
        for option in re.findall(r'--[\w-]+', line): assert option in shown.output, line

@pytest.fixture(scope='module')
def workplace(tmp_path_factory):
    "A folder as it is at the top of the tree, for one short run of each example."
    here = tmp_path_factory.mktemp('readme')
    shutil.copytree(ROOT/'configs', here/'configs')
    file = here/'configs/quickstart.yaml'
    file.write_text(re.sub(r'\bepochs: *\d+', 'epochs: 1', file.read_text(encoding='utf-8')), encoding='utf-8')
    return here

def run(here, *args):
    env = {**os.environ, 'PYTHONPATH': f'{ROOT}{os.pathsep}{here}', 'PYTHONIOENCODING': 'utf-8', 'MPLBACKEND': 'agg'}
    done = subprocess.run([sys.executable, *args], cwd=here, env=env, capture_output=True, text=True)
    assert done.returncode==0, done.stdout + done.stderr
    return done.stdout

def test_the_notebook_examples_run(workplace):
    for i,text in enumerate(LANGUAGES):
        script = workplace/f'example_{i}.py'
        script.write_text('\n'.join(blocks(text, 'py')), encoding='utf-8')
        run(workplace, script.name)
    runs = {o.parent.name: json.loads(o.read_text(encoding='utf-8')) for o in (workplace/'experiments').glob('*/manifest.json')}
    assert {'two-layers', '두-층'} <= set(runs)
    assert {o['status'] for o in runs.values()}=={'finished'}

def test_the_config_example_runs(workplace):
    "The class in a module of its own and both named in a config, as the command line needs it."
    for i,text in enumerate(LANGUAGES):
        own, (config,) = blocks(text, 'py')[1], blocks(text, 'yaml')
        klass = own[own.index('@MODELS'):own.index('exp = ')]
        (workplace/'my_nets.py').write_text(f'from torch import nn\nfrom deep_studio_nb.all import MODELS\n\n{klass}', encoding='utf-8')
        (workplace/'my.yaml').write_text(config, encoding='utf-8')
        run(workplace, '-c', 'from deep_studio_nb.cli import main; main()', 'train', 'my.yaml')

def test_measured_numbers_are_those_of_the_benchmarks():
    "Every number with decimals under 'What it costs', in both languages, stands in a table that a script wrote."
    measured = '\n'.join(o.read_text(encoding='utf-8') for o in sorted((ROOT/'benchmarks').glob('*.md')))
    for title in ('What it costs', '비용'):
        section = README.split(f'### {title}\n')[1].split('\n### ')[0]
        numbers = re.findall(r'\d+\.\d+', section)
        assert len(numbers) > 8
        missing = [o for o in numbers if o not in measured]
        assert not missing, f'{title}: {missing}'
