"""Write nbs/reference/, a notebook for each module of the package: `python .ci/reference.py`.

A page lists the public names with what they do and where the book teaches them. Names and anchors come from
`tiny_llm/_modidx.py`, lines from the modules; the tables of parameters are made by fastcore's `DocmentTbl` when nbdev
prepares the page, so the notebooks stay small and hold nothing that differs between machines.
"""
import ast, json, os, re, textwrap
from importlib import import_module
from pathlib import Path
from nbdev.config import get_config
from tiny_llm._modidx import d as index

ROOT, OUT = Path(__file__).resolve().parents[1], Path('nbs/reference')
TABLE = r'''#| exec_doc
#| hide
from fastcore.docments import DocmentTbl
from {mod} import *
class Table(DocmentTbl):
    "The parameters of a function, with the bar of a type such as `str | None` kept out of the table's own."
    def __init__(self, f):
        super().__init__(f)
        for d in self.dm.values(): d.update({k: str(v).replace('|', r'\|') for k, v in d.items() if '|' in str(v)})'''
MARK = re.compile(r'^# %% \.\./(nbs/\S+\.ipynb)')

def chapter(nb):
    "The title of a notebook, from its first cell."
    first = json.loads(Path(nb).read_text(encoding='utf-8'))['cells'][0]['source']
    return ''.join(first).splitlines()[0].lstrip('# ')

def notebook_of(lines, lineno):
    "The notebook whose exported cell holds a line of a module."
    return next(m[1] for l in reversed(lines[:lineno]) if (m := MARK.match(l)))

def doc(node):
    "The first paragraph of a docstring, on one line."
    return ' '.join((ast.get_docstring(node) or '').split('\n\n')[0].split())

def call(name, args):
    "How a function is called: names and defaults, the types left to the table."
    for a in [*args.posonlyargs, *args.args, *args.kwonlyargs, *filter(None, [args.vararg, args.kwarg])]: a.annotation = None
    return textwrap.fill(f'{name}({re.sub("^(self|cls)(, |$)", "", ast.unparse(args))})', 72, subsequent_indent='    ', break_on_hyphens=False)

def entries(mod, text):
    "(name, kind, node) of each public function, class, method and constant of a module, as they stand in the file."
    public = import_module(mod).__all__
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in public: yield node.name, 'doc', node
        for m in node.body if isinstance(node, ast.ClassDef) and node.name in public else []:
            if isinstance(m, ast.FunctionDef) and m.name[0] != '_' and doc(m): yield f'{node.name}.{m.name}', 'doc', m
        if isinstance(node, ast.Assign):
            yield from ((n.id, 'value', node) for t in node.targets for n in ast.walk(t) if getattr(n, 'id', '') in public)

def signature(name, node):
    "The call of a function, or of a class through its `__init__`; a dataclass is called by its fields."
    if isinstance(node, ast.FunctionDef): return call(name, node.args)
    init = next((m for m in node.body if getattr(m, 'name', '') == '__init__'), None)
    if init: return call(name, init.args)
    fields = [f.target.id + (f'={ast.unparse(f.value)}' if f.value else '') for f in node.body if isinstance(f, ast.AnnAssign)]
    return textwrap.fill(f'{name}({", ".join(fields)})', 72, subsequent_indent='    ', break_on_hyphens=False)

def has_parameters(node): return not signature('', node).endswith('()')

def cell(source, i, kind='markdown'):
    "A notebook cell with a fixed id, its source as lines."
    extra = dict(execution_count=None, outputs=[]) if kind == 'code' else {}
    return dict(cell_type=kind, id=f'ref{i:03}', metadata={}, source=source.splitlines(True), **extra)

def sources(mod):
    "The cells of a module's page as (source, kind)."
    path = f'{mod.replace(".", "/")}.py'
    text = Path(path).read_text(encoding='utf-8')
    lines, git, syms = text.splitlines(), get_config().git_url, index['syms'].get(mod, {})
    found = list(entries(mod, text))
    homes = {nb: chapter(nb) for nb in dict.fromkeys(notebook_of(lines, n.lineno) for _, _, n in found)}
    link = lambda nb, anchor='': f'[{homes[nb]}](../{nb[4:]}{anchor})'
    yield f'# {mod}\n\n> Public names of the module, taught in {" and ".join(homes.values())}.', 'markdown'
    yield f'The chapter{"s" if len(homes) > 1 else ""} with the reasons and the checks: {", ".join(map(link, homes))}.', 'markdown'
    yield TABLE.replace('{mod}', mod), 'code'
    for name, kind, node in found:
        if kind == 'value': continue
        anchor = syms.get(f'{mod}.{name}', ('',))[0].partition('#')[2]
        taught = link(notebook_of(lines, node.lineno), f'#{anchor}' if anchor and '.' not in name else '')
        source = f'[source]({git}/blob/main/{path}#L{node.lineno})'
        yield f'## {name}\n\n```python\n{signature(name, node)}\n```\n\n{doc(node)}\n\nTaught in {taught} · {source}', 'markdown'
        if has_parameters(node): yield f'#| exec_doc\n#| echo: false\nTable({name})', 'code'
    values = [(n, node) for n, kind, node in found if kind == 'value']
    if values:
        rows = [f'| `{n}` | {link(notebook_of(lines, node.lineno))} | [source]({git}/blob/main/{path}#L{node.lineno}) |' for n, node in values]
        yield '## Constants\n\n| Name | Taught in | |\n|---|---|---|\n' + '\n'.join(rows), 'markdown'

def notebook(mod):
    "A module's page as the text of a notebook."
    kernel = dict(display_name='python3', language='python', name='python3')
    cells = [cell(s, i, kind) for i, (s, kind) in enumerate(sources(mod))]
    return json.dumps(dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5), indent=1, sort_keys=True, ensure_ascii=False) + '\n'

def main():
    "Write what changed; pages of modules that are gone go."
    os.chdir(ROOT)
    OUT.mkdir(exist_ok=True)
    pages = {OUT / f'{mod.removeprefix("tiny_llm.")}.ipynb': notebook(mod) for mod in index['syms']}
    changed = [p for p, text in pages.items() if not p.exists() or p.read_text(encoding='utf-8') != text]
    for p in changed: p.write_text(pages[p], encoding='utf-8')
    for old in set(OUT.glob('*.ipynb')) - set(pages): old.unlink()
    print(f'reference: {len(pages)} pages, changed: {", ".join(p.stem for p in changed) or "none"}')

if __name__ == '__main__': main()
