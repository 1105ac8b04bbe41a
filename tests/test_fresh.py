"""Every notebook, executed in Jupyter, gives the outputs it is saved with; and the comparison tells what is not so."""
import copy, importlib.util
from pathlib import Path
import nbformat, pytest

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location('fresh', ROOT/'.ci/fresh.py')
fresh = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fresh)

CELLS = ['print("loss 3.468 after 34 steps")', '{"first": 0.12345678, "second": [1, 2]}',
         'from IPython.display import Markdown\nMarkdown("| run | loss |\\n|---|---|\\n| a | 3.97 |\\n| b | 11% |")',
         'import matplotlib.pyplot as plt\nfig, ax = plt.subplots()\nax.plot([1, 2, 4], label="line"); ax.bar([0, 1], [1, 2]); ax.scatter([0, 2], [1, 3])\n'
         'ax.imshow([[0, 1], [2, 3]]); ax.text(0, 0, "here"); ax.set(title="Title", xlabel="steps"); ax.legend();',
         '#| volatile: timing\nimport time\ntime.time()', '#| eval: false\nraise SystemExit', 'object()']

def book(path, *sources):
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources]), path)
    return path

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "A small notebook as it is saved, and its path."
    path = book(tmp_path_factory.mktemp('book')/'small.ipynb', *CELLS)
    fresh.save(path)
    return nbformat.read(path, 4), path

def changed(saved, n, old, new):
    "What is told when a saved output of cell n says `new` for `old`."
    nb = copy.deepcopy(saved[0])
    text = nbformat.from_dict(eval(repr(nb.cells[n].outputs).replace(old, new))) if old in repr(nb.cells[n].outputs) else None
    assert text, f'no {old} in {nb.cells[n].outputs}'
    nb.cells[n].outputs = text
    return fresh.stale(nb, saved[0])

def test_a_fresh_notebook_is_not_stale(saved): assert fresh.check(saved[1]) == []
def test_what_does_not_run_is_saved_without_outputs(saved): assert not saved[0].cells[5].outputs

@pytest.mark.parametrize('n, old, new, told', [
    (0, 'steps', 'rounds', 'rounds'), (0, '34 ', '35 ', '35 steps'), (0, '3.468', '3.568', '3.568'), (1, '0.12345678', '0.12845678', '0.12845678'),
    (2, '3.97', '4.97', '| a | 4.97 |'), (2, '| b', '| c', '| c |'), (2, '11%', '13%', '13%'),
    (3, 'Title', 'Other', 'words'), (3, 'here', 'there', 'words'), (3, "'Line2D', 'line', 3", "'Line2D', 'line', 4", 'marks'), (3, 'image/png', 'image/jpeg', 'image/jpeg')])
def test_a_stale_output_is_told_with_cell_and_difference(saved, n, old, new, told):
    lines = changed(saved, n, old, new)
    assert len(lines) == 1 and lines[0].startswith(f'cell {n} ({saved[0].cells[n].id}): ') and told in lines[0]

@pytest.mark.parametrize('kind', ['Line2D', 'Rectangle', 'PathCollection', 'AxesImage'])
def test_a_mark_that_moved_is_told(saved, kind):
    nb = copy.deepcopy(saved[0])
    mark = next(m for m in nb.cells[3].outputs[0].data[fresh.FIGURE][0]['marks'] if m[0] == kind)
    mark[-1][0] += 2 * fresh.DRAWN
    assert len(lines := fresh.stale(nb, saved[0])) == 1 and 'marks' in lines[0] and kind in lines[0]

def test_limits_that_moved_are_told(saved):
    nb = copy.deepcopy(saved[0])
    nb.cells[3].outputs[0].data[fresh.FIGURE][0]['limits'][1] *= 2
    assert 'limits' in fresh.stale(nb, saved[0])[0]

def test_an_output_too_few_or_too_many_is_told(saved):
    for n in (0, 1, 2, 3):
        nb = copy.deepcopy(saved[0])
        nb.cells[n].outputs = []
        assert len(fresh.stale(nb, saved[0])) == len(fresh.stale(saved[0], nb)) == 1
    nb = copy.deepcopy(saved[0])
    del nb.cells[3].outputs[0].data[fresh.FIGURE]
    assert 'without its data' in fresh.stale(nb, saved[0])[0]

@pytest.mark.parametrize('n, old, new', [(0, '3.468', '3.469'), (0, '3.468', '3.49'), (1, '0.12345678', '0.123456'), (2, '11%', '12%')])
def test_rounding_is_not_stale(saved, n, old, new): assert changed(saved, n, old, new) == []

def test_a_volatile_cell_is_not_compared_but_must_run(saved, tmp_path):
    nb = copy.deepcopy(saved[0])
    nb.cells[4].outputs = []
    assert fresh.stale(nb, saved[0]) == [] and nb.cells[4] not in fresh.compared(nb)
    path = book(tmp_path/'bad.ipynb', '1', '#| volatile: timing\n1 / 0')
    told = fresh.check(path)
    assert len(told) == 1 and told[0].startswith('cell 1 (') and 'ZeroDivisionError' in told[0]

def test_a_notebook_that_fails_is_not_saved(tmp_path):
    path = book(tmp_path/'bad.ipynb', 'print(1)', '1 / 0')
    before = path.read_bytes()
    with pytest.raises(Exception, match='ZeroDivisionError'): fresh.save(path)
    assert path.read_bytes() == before

def test_volatile_says_why():
    "A mark names its reason, and most of the book is compared."
    books = [nbformat.read(p, 4) for p in fresh.notebooks()]
    reasons = [r for nb in books for c in nb.cells if (r := fresh.directive(c, 'volatile')) is not None]
    assert set(reasons) <= {'timing', 'sampling', 'rounding'}
    assert len(reasons) < 0.1 * sum(len(fresh.compared(nb)) for nb in books)

@pytest.mark.parametrize('nb', [pytest.param(p, id=p.relative_to(ROOT/'nbs').as_posix()) for p in fresh.notebooks()])
def test_outputs_are_fresh(nb):
    told = fresh.check(nb)
    assert not told, '`make refresh` executes and saves:\n' + '\n'.join(told)
