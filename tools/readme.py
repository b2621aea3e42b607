"""Make README.md from nbs/index.ipynb, with no need of Quarto.

usage: python tools/readme.py [--check]

`--check` writes nothing and ends with status 1 when README.md is not what the notebook says. Where Quarto is installed `nbdev_readme` gives the
same text up to line breaks and links on code: the notebook keeps to Markdown that both read alike, and this script refuses the rest.
"""
import difflib, json, re, sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOTE = '<!-- Made from nbs/index.ipynb by tools/readme.py. Edit the notebook, not this file. -->'
REFUSED = {r'^:::': 'a Quarto div', r'\{\{<': 'a Quarto shortcode', r'\{[#.][\w-]+\}': 'a Pandoc attribute', r'(?<!\w)@(fig|tbl|sec)-': 'a Quarto cross-reference',
           r'\]\((?!https?:|images/|#)': 'a link that leads elsewhere from nbs/ than from the top: name the file in backticks'}

def prose(text):
    "The Markdown `text`, once it is known to mean the same in Quarto and on a code host."
    for pattern,why in REFUSED.items():
        if m := re.search(pattern, re.sub(r'```.*?```|`[^`\n]*`', '', text, flags=re.S), re.M): raise ValueError(f'nbs/index.ipynb: `{m[0]}` is {why}')
    return text.strip()

def outputs(cell):
    "The text outputs of `cell`, each as an indented block."
    for o in cell['outputs']:
        data = o.get('data', {})
        if any(k.startswith('image/') for k in data): raise ValueError('nbs/index.ipynb: keep pictures in images/ and show them with `![](images/...)`')
        if text := ''.join(o.get('text', data.get('text/plain', []))).strip('\n'): yield '\n'.join(f'    {line}'.rstrip() for line in text.splitlines())

def readme(notebook):
    "The Markdown of `notebook`, a dict as read from its file: its title, a note and all cells that are not hidden."
    first, *cells = notebook['cells']
    parts = [''.join(first['source']).splitlines()[0], NOTE]   # the subtitle below the title describes the page to search engines
    for cell in cells:
        source = ''.join(cell['source'])
        if cell['cell_type']=='markdown': parts.append(prose(source))
        elif cell['cell_type']=='code' and not re.match(r'#\|\s*hide\b', source): parts += [f'```python\n{source}\n```', *outputs(cell)]
    return '\n\n'.join(parts) + '\n'

def main(check):
    new, path = readme(json.loads((ROOT/'nbs/index.ipynb').read_text(encoding='utf-8'))), ROOT/'README.md'
    old = path.read_text(encoding='utf-8') if path.exists() else ''
    if new==old: return 0
    if not check:
        path.write_text(new, encoding='utf-8')
        return 0
    sys.stderr.writelines(difflib.unified_diff(old.splitlines(True), new.splitlines(True), 'README.md', 'nbs/index.ipynb'))
    print('README.md is not what nbs/index.ipynb says: run `python tools/readme.py`', file=sys.stderr)
    return 1

if __name__ == '__main__': sys.exit(main('--check' in sys.argv[1:]))
