"""Build the documentation as plain HTML, with no need of Quarto, and fail on whatever a reader would see broken.

usage: python tools/docs_check.py [--out DIR] [--workers N]

nbdev prepares the notebooks as it does for Quarto (it runs imports, exported cells and `show_doc`), Pandoc makes a page of each, and then links,
anchors, pictures, cross-references, saved errors and the documentation of every exported name are checked. Quarto itself lets most of these pass.
"""
import argparse, base64, importlib.util, json, os, re, shutil, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path
import pypandoc

ROOT = Path(__file__).parents[1]
DIRECTIVE = re.compile(r'^#\|\s*([\w-]+):\s*(.*?)\s*$', re.M)
SUFFIX = {'image/svg+xml': 'svg', 'image/png': 'png', 'image/jpeg': 'jpg'}
PANDOC = '-f markdown+lists_without_preceding_blankline -t html5 -s --toc --mathml --wrap=none --section-divs --fail-if-warnings'.split()

def prepare(n_workers):
    "Let nbdev prepare all notebooks, and say where. Its own `nbdev_proc_nbs` would download Quarto first."
    import nbdev.doclinks, nbdev.quarto
    from nbdev.serve import proc_nbs
    nbdev.quarto.refresh_quarto_yml()
    nbdev.doclinks._build_modidx()
    nbdev.quarto.nbdev_sidebar.__wrapped__()
    try: return proc_nbs(n_workers=n_workers, force=True)
    except Exception as e:
        first = re.search(r'^[A-Za-z_][\w.]*: .*', str(e.__cause__), re.M)
        sys.exit(f'ERROR {e}\n{first[0] if first else ""}\nFor the documentation nbdev runs imports, exported cells and `show_doc` of a notebook, and no other cells.')

def output_md(o, directives, picture):
    "Markdown of one saved output; `picture(suffix, bytes)` keeps an image and says under which name."
    if o['output_type']=='stream': return '```{.output}\n' + ''.join(o['text']).rstrip('\n') + '\n```'
    data = {k: ''.join(v) for k,v in o.get('data', {}).items() if isinstance(v, (str, list))}
    for mime,suffix in SUFFIX.items():
        if mime not in data: continue
        name = picture(suffix, data[mime].encode() if suffix=='svg' else base64.b64decode(data[mime]))
        label = f'{{#{directives["label"]}}}' if 'label' in directives else ''
        return f'![{directives.get("fig-cap", "")}]({name}){label}'
    if 'text/markdown' in data: return data['text/markdown']
    if 'text/html' in data: return '```{=html}\n' + data['text/html'] + '\n```'
    return '```{.output}\n' + data.get('text/plain', '') + '\n```'

def cell_md(cell, i, folder):
    "Markdown of cell `i` as Quarto would show it; pictures go to `folder`."
    source = ''.join(cell['source'])
    if cell['cell_type']!='code': return source
    directives = {k: v.strip('"\'') for k,v in DIRECTIVE.findall(source)}
    if directives.get('include')=='false': return ''
    code, parts = DIRECTIVE.sub('', source).strip('\n'), []
    if code and directives.get('echo')!='false': parts.append(f'```{{.python}}\n{code}\n```')
    if directives.get('output')=='false': return '\n\n'.join(parts)
    for j,o in enumerate(cell.get('outputs', [])):
        def picture(suffix, content):
            folder.mkdir(parents=True, exist_ok=True)
            (folder/f'cell-{i}-{j}.{suffix}').write_bytes(content)
            return f'{folder.name}/cell-{i}-{j}.{suffix}'
        if o['output_type']!='error': parts.append(output_md(o, directives, picture))
    return '\n\n'.join(parts)

class Page(HTMLParser):
    "The anchors of a page and what it refers to."
    def __init__(self, html):
        super().__init__()
        self.ids, self.refs = set(), []
        self.feed(html)
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if attrs.get('id'): self.ids.add(attrs['id'])
        self.refs += [attrs[k] for k in ('href', 'src') if attrs.get(k)]

class Site:
    "Pages made from prepared notebooks, and the problems found in them."
    def __init__(self, cache, out, base):
        self.cache, self.out, self.base = cache, out, base   # base: the address under which nbdev links its pages
        self.problems, self.pages, self.cross, self.made = [], {}, {}, {}

    def build(self):
        "Make a page of each notebook; everything else is copied."
        shutil.rmtree(self.out, ignore_errors=True)
        for path in sorted(self.cache.rglob('*')):
            rel = path.relative_to(self.cache)
            if not path.is_file() or path.suffix in ('.yml', '.qmd'): continue
            (self.out/rel).parent.mkdir(parents=True, exist_ok=True)
            if path.suffix=='.ipynb': self.page(path, rel)
            else: shutil.copy(path, self.out/rel)
        self.pages = {o: Page(o.read_text(encoding='utf-8')) for o in self.made.values()}

    def page(self, path, rel):
        "Make a page of the notebook at `path`."
        cells = json.loads(path.read_text(encoding='utf-8'))['cells']
        for i,cell in enumerate(cells, 1):
            self.problems += [f'{rel} cell {i}: saved error {o["ename"]}: {o["evalue"]}' for o in cell.get('outputs', []) if o['output_type']=='error']
        md = '\n\n'.join(cell_md(c, i, self.out/rel.parent/f'{path.stem}_files') for i,c in enumerate(cells, 1))
        named = re.search(r'^output-file:\s*(\S+)', md, re.M)
        html = self.made[rel.as_posix()] = self.out/rel.parent/(named[1] if named else f'{path.stem}.html')
        plain = re.sub(r'```.*?```|`[^`\n]*`', '', md, flags=re.S)
        self.cross[html] = set(re.findall(r'(?<![\w`/])@((?:fig|tbl|sec|eq|lst)-[\w-]+)', plain))
        r = subprocess.run([pypandoc.get_pandoc_path(), *PANDOC, '-o', str(html)], input=md.replace(self.base, '../'*(len(rel.parts)-1)),
                           text=True, capture_output=True, cwd=self.out)
        if r.returncode or r.stderr.strip(): self.problems.append(f'{rel}: pandoc: {r.stderr.strip()[:400]}')

    def check_links(self):
        "Everything that a page refers to must exist inside the site, anchors and cross-references included."
        anchors = set().union(*(o.ids for o in self.pages.values()))
        for path,page in self.pages.items():
            name = path.relative_to(self.out)
            self.problems += [f'{name}: cross-reference @{o} has no target' for o in sorted(self.cross[path]-anchors)]
            for ref in page.refs:
                if re.match(r'[a-z]+:', ref): continue
                file, _, anchor = ref.partition('#')
                target = (path.parent/file).resolve() if file else path
                if target.suffix=='.ipynb' and target.is_relative_to(self.out): target = self.made.get(target.relative_to(self.out).as_posix(), target)
                if not target.is_relative_to(self.out): self.problems.append(f'{name}: leads out of the site: {ref}')
                elif not target.exists(): self.problems.append(f'{name}: leads nowhere: {ref}')
                elif anchor and target in self.pages and anchor not in self.pages[target].ids: self.problems.append(f'{name}: no such anchor: {ref}')

    def check_names(self, symbols):
        "Every public name of the package must be documented where nbdev's index says."
        for name,(place,_) in symbols.items():
            page, _, anchor = place.partition('#')
            if '.' in anchor or anchor.startswith('_'): continue
            if anchor not in getattr(self.pages.get(self.out/page), 'ids', ()): self.problems.append(f'{name}: not documented on {page}')

def symbols(path):
    "The exported names in the index file at `path`, each with its place in the documentation."
    spec = importlib.util.spec_from_file_location('_modidx', path)
    mod = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mod)
    return {name: place for module in mod.d['syms'].values() for name,place in module.items()}

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=ROOT/'_docs_check', help='folder for the pages; it is emptied first')
    parser.add_argument('--workers', type=int, default=2, help='processes that prepare notebooks')
    args = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))   # this checkout's package, whatever is installed; nbdev's processes take the path over
    from nbdev.config import get_config
    cfg = get_config()
    site = Site(prepare(args.workers), args.out.resolve(), f"{cfg['doc_host']}{cfg['doc_baseurl']}/")
    site.build()
    site.check_links()
    site.check_names(symbols(cfg.lib_path/'_modidx.py'))
    for o in site.problems: print('ERROR', o, file=sys.stderr)
    print(f'{len(site.pages)} pages in {args.out}, {len(site.problems)} problems')
    return bool(site.problems)

if __name__ == '__main__': sys.exit(main())
