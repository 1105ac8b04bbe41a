"""Every public name says what it does and what each parameter is, and the book uses it where a reader can watch."""
import ast, inspect, json, re
from importlib import import_module
import pytest
from fastcore.docments import docments
from test_fresh import fresh
from tiny_llm._modidx import d

PUBLIC = [(mod, name) for mod in d['syms'] for name in import_module(mod).__all__]
DOCUMENTED = [(mod, name) for mod, name in PUBLIC if inspect.isroutine(o := getattr(import_module(mod), name)) or inspect.isclass(o)]

def lines(source): return source.splitlines()
def directives(source): return [l.split('|', 1)[1].split() for l in lines(source) if l.startswith('#|')]
def lesson(source):
    "Whether a cell is executed and no definition of the package."
    found = directives(source)
    return ['eval:', 'false'] not in found and not any(f and f[0].startswith('export') for f in found)

def names(source):
    "The names that a cell uses: imported, it is not used yet; assigned, it is another."
    code = '\n'.join(l for l in lines(source) if not l.lstrip().startswith(('%', '!')))
    used = [n for n in ast.walk(ast.parse(code)) if isinstance(getattr(n, 'ctx', None), ast.Load)]
    return {n.id if isinstance(n, ast.Name) else n.attr for n in used if isinstance(n, (ast.Name, ast.Attribute))}

def used():
    "Every name used in a lesson cell of the book."
    cells = [c for p in fresh.notebooks() for c in json.loads(p.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
    return set().union(*(names(''.join(c['source'])) for c in cells if lesson(''.join(c['source']))))

@pytest.fixture(scope='module')
def in_the_book(): return shown(used())

def test_a_definition_or_an_import_is_no_use():
    assert names('from a import f\ndef g(): pass\nh = 1') == set() and names('m.f(g)') == {'m', 'f', 'g'}
    assert lesson('f()') and not lesson('#| exports\nf()') and not lesson('#| export lora\nf()') and not lesson('#| eval: false\nf()')

def shown(names):
    "These names, and the classes that the functions among them say they return."
    objects = {name: getattr(import_module(mod), name) for mod, name in PUBLIC}
    made = [inspect.signature(o).return_annotation for name, o in objects.items() if name in names and inspect.isfunction(o)]
    return names | {o.__name__ for o in made if inspect.isclass(o)}

def told(o):
    "Parameter -> what its comment says. `docments` does not see that of `**how`."
    found = {k: v for k, v in docments(o).items() if k not in ('self', 'return')}
    for k in re.findall(r'\*\*(\w+)[^#\n]*# .', inspect.getsource(inspect.unwrap(o))): found[k] = True
    return found

each = pytest.mark.parametrize('mod, name', DOCUMENTED, ids=[f'{mod}.{name}' for mod, name in DOCUMENTED])

@pytest.mark.parametrize('mod, name', PUBLIC, ids=[f'{mod}.{name}' for mod, name in PUBLIC])
def test_is_used_in_the_book(mod, name, in_the_book): assert name in in_the_book

@each
def test_has_a_docstring(mod, name):
    o = getattr(import_module(mod), name)
    assert vars(o).get('__doc__') if inspect.isclass(o) else o.__doc__
    assert not (o.__doc__ or '').startswith(f'{name}('), 'made by dataclass, not written'

@each
def test_says_what_each_parameter_is(mod, name):
    o = getattr(import_module(mod), name)
    if inspect.isclass(o) and '__init__' not in vars(o): pytest.skip('its parameters are those of its parent')
    said = told(inspect.unwrap(o))
    assert set(said) == {p for p in inspect.signature(o).parameters if p != 'self'} and all(said.values()), [k for k, v in said.items() if not v]
