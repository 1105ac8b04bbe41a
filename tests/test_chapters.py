"""Each chapter has the parts a reader relies on, and its exercises can be solved, and only by solving them.

An exercise is three cells, `exercise_N` (the stub), `check_N` (its oracle) and `solution_N`. They may use the
chapter's imports and each other, nothing else, so they run here without the chapter.
"""
import ast, json, re
from pathlib import Path
import pytest

NBS = Path(__file__).resolve().parents[1] / 'nbs'
CHAPTERS = ['01_lora', '02_surgery', '03_data', '04_train', '05_load_merge', 'further/05_moral', 'further/06_real_models', 'further/07_speed', 'further/08_claims', 'further/09_evaluate']
HEADINGS = ['## What you will learn', '## What we did and did not do', '## Questions', '## Exercises', '## Next']
LESSON_LINES = 12

every_chapter = pytest.mark.parametrize('name', CHAPTERS)

def cells(name, kind=None):
    "(kind, source) of the cells of a chapter."
    found = json.loads((NBS / f'{name}.ipynb').read_text(encoding='utf-8'))['cells']
    return [(c['cell_type'], ''.join(c['source'])) for c in found if kind in (None, c['cell_type'])]

def directives(source): return re.findall(r'^#\| *(\S+)', source, re.M)
def exported(source): return any(d.startswith('export') for d in directives(source))
def body(source): return [l for l in source.splitlines() if not l.startswith('#|')]
def imports_only(source):
    tree = ast.parse('\n'.join(body(source))).body
    style = lambda n: isinstance(n, ast.Expr) and ast.unparse(n).startswith('plt.style.use')
    return bool(tree) and all(isinstance(n, (ast.Import, ast.ImportFrom)) or style(n) for n in tree)

@every_chapter
def test_parts_in_order(name):
    text = [s for _, s in cells(name, 'markdown')]
    assert re.match(r'# .+\n\n> .+', text[0]), 'a chapter begins with its title and its promise'
    assert f'colab.research.google.com/github/tiny-llm-lora/tiny-llm-lora/blob/main/nbs/{name}.ipynb' in text[1], 'nbdev drops it from the first cell'
    assert 'google.colab' in cells(name, 'code')[0][1], 'the first code cell installs the package on Colab'
    assert [h for h in text if h in HEADINGS] == HEADINGS
    assert any(t.startswith('| symbol | shape |') or '\n| symbol | shape |' in t for t in text), 'no shape legend'

@every_chapter
def test_three_questions_with_folded_answers(name):
    text = [s for _, s in cells(name, 'markdown')]
    asked = [s for s in text[text.index('## Questions'):] if s.startswith('<details><summary>')]
    assert len(asked) == 3 and all(re.match(r'<details><summary>\d\. .+\?</summary>\n\n.{40}[\s\S]*\n\n</details>$', s) for s in asked)

@every_chapter
def test_exercises(name):
    code = [s for _, s in cells(name, 'code')]
    work = [s for s in code if re.search(r'^def (exercise|check|solution)_\d', s, re.M)]
    scope = {'__name__': 'exercises'}
    for s in code:
        if '#| eval: false' not in s and imports_only(s): exec('\n'.join(body(s)).replace('from .', 'from tiny_llm.'), scope)
    for s in work: exec(s, scope)  # the solutions check themselves
    for n in (1, 2):
        scope[f'check_{n}'](scope[f'solution_{n}'])
        with pytest.raises(Exception): scope[f'check_{n}'](scope[f'exercise_{n}'])
    folded = [s for s in work if 'def solution_' in s]
    assert len(folded) == 2 and all('#| code-fold: true' in s for s in folded)

@every_chapter
def test_short_lesson_cells(name):
    long = [s for _, s in cells(name, 'code') if not exported(s) and len(body(s)) > LESSON_LINES]
    assert not long, f'{len(long)} lesson cells of more than {LESSON_LINES} lines, the first: {long[0][:200]}'

@every_chapter
def test_prose_between_code(name):
    run = 0
    for kind, source in cells(name):
        run = 0 if kind == 'markdown' else run if 'default_exp' in source or imports_only(source) or '#| eval: false' in source else run + 1
        assert run <= 2, f'three code cells without prose, the last: {source[:120]}'

@every_chapter
def test_headings_stand_alone(name):
    assert not [s for _, s in cells(name, 'markdown')[1:] if s.startswith('#') and '\n' in s.strip()]

@every_chapter
def test_figures_have_alt_text(name):
    found = json.loads((NBS / f'{name}.ipynb').read_text(encoding='utf-8'))['cells']
    pictures = [''.join(c['source']) for c in found for o in c.get('outputs', []) if 'image/png' in o.get('data', {})]
    assert pictures and not [s[:100] for s in pictures if 'fig-alt' not in directives(s) and '#| fig-alt:' not in s]
