"""The reference leaves no public name out and links each to the chapter that teaches it."""
import json, re
from importlib import import_module
from pathlib import Path
import pytest
from tiny_llm._modidx import d

ROOT = Path(__file__).resolve().parents[1]

def page(mod):
    "The Markdown of a module's page."
    nb = json.loads((ROOT / 'nbs/reference' / f'{mod.removeprefix("tiny_llm.")}.ipynb').read_text(encoding='utf-8'))
    return '\n'.join(''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'markdown')

def listed(text):
    "The names a page has an entry for: headings, and rows of the table of constants."
    return {*re.findall(r'^## ([\w.]+)$', text, re.M), *re.findall(r'^\| `(\w+)` \|', text, re.M)}

def test_every_public_name_is_listed():
    public = {name for mod in d['syms'] for name in import_module(mod).__all__}
    assert public <= {name for mod in d['syms'] for name in listed(page(mod))}

@pytest.mark.parametrize('mod', d['syms'])
def test_every_entry_has_a_summary_and_a_chapter(mod):
    for entry in page(mod).split('\n## ')[1:]:
        if entry.startswith('Constants'): continue
        name, code, summary, taught = re.match(r'(\S+)\n\n```python\n(.*?)\n```\n\n(.*?)\n\n(Taught in .*)', entry, re.S).groups()
        assert code.startswith(name + '(') and summary.strip() and re.search(r'\]\(\.\./\S+\.ipynb', taught)
