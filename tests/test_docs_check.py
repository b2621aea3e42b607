"The check of the documentation sees what a reader would see broken."
import importlib.util, json
from pathlib import Path
import pytest

pytest.importorskip('pypandoc', reason='pandoc is missing: pip install -e ".[dev]"')
spec = importlib.util.spec_from_file_location('docs_check', Path(__file__).parents[1]/'tools/docs_check.py')
docs_check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(docs_check)

def problems(folder, *cells, symbols=()):
    "What is found in a site of two pages, of which one holds `cells` (Markdown, or an output)."
    def page(*cells): return json.dumps(dict(cells=[dict(cell_type='markdown', source=o) if isinstance(o, str) else dict(cell_type='code', source='x', outputs=[o]) for o in cells]))
    cache = folder/'cache'
    (cache/'sub').mkdir(parents=True)
    (cache/'sub/one.ipynb').write_text(page('# One', *cells))
    (cache/'two.ipynb').write_text(page('# Two', '## A section'))
    (cache/'picture.png').write_bytes(b'')
    site = docs_check.Site(cache, folder/'out', 'https://example.org/docs/')
    site.build()
    site.check_links()
    site.check_names({o: (o, '') for o in symbols})
    return site.problems

def test_a_sound_site_passes(tmp_path):
    text = '[two](../two.ipynb#a-section) ![](../picture.png) [named](https://example.org/docs/two.html) [here](#one) `@fig-in-code`'
    assert problems(tmp_path, text, dict(output_type='stream', text=['fine']), symbols=['two.html#a-section'])==[]

@pytest.mark.parametrize('cell, found', [
    ('[lost](../nowhere.ipynb)', 'leads nowhere: ../nowhere.ipynb'),
    ('[lost](../two.ipynb#nothing)', 'no such anchor'),
    ('![](lost.png)', 'leads nowhere: lost.png'),
    ('[out](../../cache/picture.png)', 'leads out of the site'),
    ('as @fig-lost shows', '@fig-lost has no target'),
    (dict(output_type='error', ename='ValueError', evalue='no'), 'saved error ValueError'),
])
def test_what_is_broken_is_found(tmp_path, cell, found):
    told = problems(tmp_path, cell)
    assert len(told)==1 and found in told[0] and 'one' in told[0]

def test_a_name_without_documentation_is_found(tmp_path):
    assert problems(tmp_path, symbols=['two.html#mix_items'])==['two.html#mix_items: not documented on two.html']
