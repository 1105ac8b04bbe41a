"""Does every notebook still say what it says? `python .ci/fresh.py [notebook…]` executes and compares; `--save` saves.

Each notebook runs from top to bottom in Jupyter: a fresh kernel, in the notebook's own folder. What comes out is
compared with what is saved: text and tables word by word, numbers within the tolerances below, figures by what is drawn
in them, not by pixels. For that the kernel adds to each Matplotlib figure an output of type `FIGURE`, which browsers,
Quarto and nbdev pass over. Not compared: cells with `#| eval: false`, which do not run, and cells with `#| volatile: …`,
which must still run. The reason follows: `timing`; `sampling`, texts drawn from a model that was trained in the notebook;
`rounding`, what is made of it: its size, a hash of trained weights, counts of close decisions of a trained model.
Another processor rounds otherwise.

Tolerances, as another processor adds in another order: a number with a decimal point may differ by `RELATIVE`, or by one
in its last printed place, or by `ABSOLUTE`; a whole percentage by one; other whole numbers not at all. A mark in a figure
may lie `DRAWN` of its axes' width or height elsewhere.
"""
import argparse, os, re, sys
from itertools import zip_longest
from pathlib import Path
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parents[1]
FIGURE, WIDGET = 'application/vnd.tiny-llm.figure+json', 'application/vnd.jupyter.widget-view+json'
RELATIVE, ABSOLUTE, DRAWN = 0.01, 1e-6, 0.02
NUMBER = re.compile(r'(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?(?![\w.]*\w)', re.I)
NOISE = [(re.compile(r'\b0x[0-9a-f]{6,}\b'), '0x…'),                           # where an object lies in memory
         (re.compile(r'[A-Za-z0-9+/]{200,}={0,2}'), 'base64…'),                 # packed bytes in a page
         (re.compile(r'[ \t]+'), ' ')]                                          # columns are as wide as their numbers
SECONDS = 1200  # at most, for one cell

HOOK = '''
def _figure_hook():
    import sys
    import numpy as np
    from IPython.core.formatters import JSONFormatter
    from traitlets import Unicode

    def shares(a, most=24):
        "An array in few numbers: itself, or means of `most` runs of it."
        a = np.clip(np.nan_to_num(np.ma.filled(np.ma.asarray(a, float), 9)), -9, 9)
        return [round(float(part.mean()), 3) for part in np.array_split(a, min(most, len(a)))] if len(a) else []

    def mark(axes, artist):
        "What an artist draws: its kind, its label, how many values, and these as shares of the axes or of the colours."
        inside = lambda points, transform: (transform - axes.transAxes).transform(np.asarray(points, float).reshape(-1, 2))
        kind, label = type(artist).__name__, str(artist.get_label() or "")
        drawn = []
        if hasattr(artist, "get_offsets") and len(artist.get_offsets()) > 0 and artist.get_offsets().any():
            drawn = list(inside(artist.get_offsets(), artist.get_offset_transform()).T)
        elif hasattr(artist, "get_paths") and not hasattr(artist, "get_coordinates"):
            paths = [inside(p.vertices, artist.get_transform()) for p in artist.get_paths()]
            drawn = list(np.concatenate(paths).T) if paths else []
        elif hasattr(artist, "get_path"):
            drawn = list(inside(artist.get_path().vertices, artist.get_transform()).T)
        if getattr(artist, "get_array", lambda: None)() is not None:
            drawn.append(np.ma.ravel(artist.norm(artist.get_array())))
        return [kind, "" if label.startswith("_") else label, max(map(len, drawn), default=0), *map(shares, drawn)]

    def words(axes):
        "Every text a reader sees, but the numbers along the axes: those follow from their limits."
        named = [t.get_text() for axis in (axes.xaxis, axes.yaxis) if type(axis.get_major_formatter()).__name__
                 in ("FixedFormatter", "StrCategoryFormatter") for t in axis.get_ticklabels()]
        legend = axes.get_legend()
        found = [axes.get_title(), axes.get_title("left"), axes.get_title("right"), axes.get_xlabel(), axes.get_ylabel(), *named,
                 *([t.get_text() for t in legend.get_texts()] if legend else []), *(t.get_text() for t in axes.texts)]
        return [w for w in found if w]

    def data(figure):
        return [dict(words=[t.get_text() for t in figure.texts], limits=[], marks=[])] * bool(figure.texts) + [
            dict(words=words(ax), limits=[float(f"{v:.4g}") for v in (*ax.get_xlim(), *ax.get_ylim())],
                 marks=[mark(ax, m) for m in (*ax.lines, *ax.patches, *ax.collections, *ax.images)]) for ax in figure.axes]

    class FigureData(JSONFormatter):
        format_type = Unicode("FIGURE TYPE")
        def __call__(self, shown):  # a registered printer would not do: Matplotlib's backend removes those of figures
            figures = sys.modules.get("matplotlib.figure")
            return data(shown) if figures and isinstance(shown, figures.Figure) else None

    shell = get_ipython().display_formatter
    shell.formatters["FIGURE TYPE"] = FigureData(parent=shell)

_figure_hook()
del _figure_hook
'''.replace('FIGURE TYPE', FIGURE)

def notebooks():
    "Every notebook of the book that has something to run: not `_proc` and hidden folders, nor the reference."
    found = ((p, p.relative_to(ROOT/'nbs').parts) for p in sorted((ROOT/'nbs').rglob('*.ipynb')))
    return [p for p, parts in found if not any(d[0] in '._' for d in parts) and parts[0] != 'reference']

def directive(cell, name):
    "What follows `#| name` in a code cell, or None."
    m = re.search(rf'^#\| *{name}\b:?(.*)$', cell.source, re.M) if cell.cell_type == 'code' else None
    return m and m[1].strip()

def runs(cell): return cell.cell_type == 'code' and directive(cell, 'eval') != 'false'

def tidy(nb):
    "A notebook as it is saved: without counts, widgets and what cells that do not run once gave."
    nb.metadata.pop('widgets', None)
    for cell in nb.cells:
        if cell.cell_type != 'code': continue
        cell.execution_count, cell.outputs = None, [o for o in cell.outputs if runs(cell) and WIDGET not in o.get('data', {})]
        cell.metadata.pop('execution', None)
        for o in cell.outputs:
            if 'execution_count' in o: o.execution_count = None
    return nb

def execute(path):
    "A notebook as it comes out of Jupyter, and the error that stopped it or None."
    nb = nbformat.read(path, 4)
    sources = [c.source for c in nb.cells]
    for c in nb.cells:
        if c.cell_type == 'code': c.outputs, c.source = [], c.source if runs(c) else ''
    nb.cells.insert(0, nbformat.v4.new_code_cell(HOOK))
    env = {k: v for k, v in os.environ.items() if k != 'MPLBACKEND'} | {'PYTHONPATH': str(ROOT)}
    client = NotebookClient(nb, timeout=SECONDS, kernel_name='python3', store_widget_state=False, coalesce_streams=True,
                            resources={'metadata': {'path': str(Path(path).parent)}})
    try: client.execute(env=env)
    except CellExecutionError as e: error = e
    else: error = None
    del nb.cells[0]
    for c, source in zip(nb.cells, sources): c.source = source
    return tidy(nb), error

def plain(text):
    "A saved text without what no run repeats."
    text = ''.join(text)
    for pattern, instead in NOISE: text = pattern.sub(instead, text)
    return text

def near(old, new, percent=False):
    "Whether two printed numbers are the same number but for rounding."
    if old == new: return True
    decimals = [len(n.partition('.')[2]) if '.' in n else None for n in (old, new)]
    a, b = (float(n.replace(',', '')) for n in (old, new))
    if all(d is None for d in decimals) and 'e' not in (old + new).lower(): return percent and abs(a - b) <= 1
    last = max((10.0 ** -d for d in decimals if d and d < 6), default=0)
    return abs(a - b) <= max(RELATIVE * max(abs(a), abs(b)), ABSOLUTE, 1.001 * last if 'e' not in (old + new).lower() else 0)

def same_text(old, new):
    "Whether two texts are the same, word by word and number by number."
    old, new = plain(old), plain(new)
    if NUMBER.split(old) != NUMBER.split(new): return False
    return all(near(a[0], b[0], re.match(r' ?%', old[a.end():])) for a, b in zip(NUMBER.finditer(old), NUMBER.finditer(new)))

def same_figure(old, new):
    "Whether two figures show the same: words and marks, and each mark in its place."
    if isinstance(old, str) and isinstance(new, str): return same_text(old, new)
    if isinstance(old, dict) and isinstance(new, dict):
        (x0, x1, y0, y1), limits = old['limits'] or [0] * 4, new['limits'] or [0] * 4
        room = [DRAWN * abs(x1 - x0)] * 2 + [DRAWN * abs(y1 - y0)] * 2
        return all(abs(a - b) <= r for a, b, r in zip([x0, x1, y0, y1], limits, room)) and all(same_figure(old[k], new[k]) for k in ('words', 'marks'))
    if isinstance(old, list) and isinstance(new, list): return len(old) == len(new) and all(map(same_figure, old, new))
    if isinstance(old, int) or isinstance(new, int): return old == new
    return abs(min(max(old, -0.5), 1.5) - min(max(new, -0.5), 1.5)) <= DRAWN  # how far outside of the axes is not seen

def first_change(old, new):
    "The first line that differs, before and after."
    for a, b in zip_longest(plain(old).split('\n'), plain(new).split('\n'), fillvalue='(nothing)'):
        if not same_text(a, b): return f'saved {a.strip()[:300]!r}, now {b.strip()[:300]!r}'

def figure_change(old, new):
    "What differs first in a figure."
    if old is None: return 'a figure saved without its data'
    if new is None: return 'a saved figure is no longer drawn'
    if len(old) != len(new): return f'a figure of {len(old)} parts saved, now of {len(new)}'
    for n, (a, b) in enumerate(zip(old, new)):
        for k in ('words', 'limits', 'marks'):
            if same_figure({**a, k: b[k]}, a): continue
            if k == 'limits': return f'the limits of part {n + 1} of a figure: saved {a[k]}, now {b[k]}'
            pairs = [(p, q) for p, q in zip_longest(a[k], b[k]) if p is None or q is None or not same_figure(p, q)]
            return f'the {k} of part {n + 1} of a figure: saved {str(pairs[0][0])[:200]}, now {str(pairs[0][1])[:200]}'

def parts(output):
    "The comparable parts of an output: {type: value}."
    if output.output_type == 'stream': return {output.name: output.text}
    if output.output_type == 'error': return {'error': f'{output.ename}: {output.evalue}'}
    return dict(output.data)

def part_change(kind, old, new):
    "What differs between two values of one type of output, each None where there is none; None if nothing does."
    both = old is not None and new is not None
    if kind == FIGURE: return None if both and same_figure(old, new) else figure_change(old, new)
    if kind.startswith('image/') and 'svg' not in kind:
        return None if both else f'an {kind} saved and not now' if old else f'an {kind} now and not saved'
    return None if both and same_text(old, new) else f'{kind}: {first_change(old or "(nothing)", new or "(nothing)")}'

def change(old, new):
    "The first difference between the outputs of a cell, saved and new, or None."
    for a, b in zip_longest(map(parts, old), map(parts, new), fillvalue={}):
        for kind in sorted({*a, *b}):
            if told := part_change(kind, a.get(kind), b.get(kind)): return told

def compared(nb): return [c for c in nb.cells if runs(c) and c.outputs and directive(c, 'volatile') is None]

def stale(saved, new, error=None):
    "What differs between a notebook as saved and as executed: a line for each cell."
    told = [f'cell {n} ({old.id}): {what}' for n, (old, now) in enumerate(zip(saved.cells, new.cells))
            if runs(old) and directive(old, 'volatile') is None and not any(o.output_type == 'error' for o in now.outputs)
            and not error and (what := change(old.outputs, now.outputs))]
    failed = [f'cell {n} ({c.id}): raised {o.ename}: {o.evalue}' for n, c in enumerate(new.cells) for o in c.get('outputs', []) if o.output_type == 'error']
    return failed + told if failed or not error else [f'stopped: {error}']

def check(path):
    "Execute a notebook and compare: what is stale."
    return stale(nbformat.read(path, 4), *execute(path))

def save(path):
    "Execute a notebook and save what comes out; one that fails stays as it is."
    new, error = execute(path)
    if error: raise error
    nbformat.write(new, path)

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('notebooks', nargs='*', type=Path, default=notebooks())
    p.add_argument('--save', action='store_true', help='save what comes out instead of comparing it')
    args = p.parse_args(argv)
    wrong = 0
    for path in map(Path.resolve, args.notebooks):
        told = save(path) if args.save else check(path)
        nb = nbformat.read(path, 4)
        wrong += len(told or [])
        print(f'{path.relative_to(ROOT)}: ' + ('saved' if args.save else f'{len(compared(nb))} of {sum(bool(c.get("outputs")) for c in nb.cells)} outputs compared, {len(told)} stale'))
        for line in told or []: print('  ' + line)
    return bool(wrong)

if __name__ == '__main__': sys.exit(main())
