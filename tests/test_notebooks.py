"""Every notebook runs, in a fresh process and in good time, and is saved as a reader should find it.

A chapter has 90 s on two idle cores. Machines differ, so the test warns above that and fails only above
90 s x TINY_LLM_SLACK (a number from the environment; 4 unless set, for a slow or shared CI machine).
"""
import functools, json, os, re, subprocess, sys, warnings
from pathlib import Path
import pytest
from test_fresh import fresh

ROOT = Path(__file__).resolve().parents[1]
BUDGET, SLACK = 90, float(os.environ.get('TINY_LLM_SLACK', 4))  # seconds; how many times slower a machine may be
MAX_LINES = 25
MACHINE_PATH = re.compile(r'(?<![\w.:/~-])/(?:home|root|Users|tmp|work|var|private|opt|mnt|usr|github)/\S+|\b[A-Z]:\\\S+')
CHILD = '''
import sys
from pathlib import Path
from nbdev.test import test_nb as run_nb
ok, seconds = run_nb(Path(sys.argv[1]), skip_flags=["notest"], basepath=sys.argv[2])
print("\\nRAN", ok, seconds)
'''

every_notebook = pytest.mark.parametrize('nb', [pytest.param(p, id=p.relative_to(ROOT / 'nbs').as_posix()) for p in fresh.notebooks()])

@functools.cache
def run(nb):
    "Execute a notebook once, in a process of its own: (whether it ran through, seconds, what it said)."
    args = [sys.executable, '-c', CHILD, str(nb), str(ROOT)]
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'MPLBACKEND': 'agg'}
    try: p = subprocess.run(args, cwd=ROOT, env=env, capture_output=True, text=True, timeout=2 * BUDGET * SLACK)
    except subprocess.TimeoutExpired: return False, float('inf'), 'stopped: it took too long'
    m = re.search(r'^RAN (\w+) (\S+)$', p.stdout, re.M)
    return bool(m and m[1] == 'True'), float(m[2]) if m else 0., p.stdout[-2000:] + p.stderr[-8000:]

def code_cells(nb):
    "The code cells of a saved notebook."
    return [c for c in json.loads(nb.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']

def texts(out):
    "The parts of a saved output that are text."
    data = {k: v for k, v in out.get('data', {}).items() if k.startswith('text/') or k == 'image/svg+xml'}
    return [''.join(t) for t in (*data.values(), out.get('text', ''), out.get('traceback', ''))]

def test_there_are_notebooks(): assert fresh.notebooks()

@every_notebook
def test_runs(nb):
    ok, _, said = run(nb)
    assert ok, said

@every_notebook
def test_in_time(nb):
    _, seconds, _ = run(nb)
    if seconds > BUDGET: warnings.warn(f'{nb.name} took {seconds:.0f} s; a chapter has {BUDGET} s on two idle cores')
    assert seconds <= BUDGET * SLACK

@every_notebook
def test_saved_outputs(nb):
    outputs = [o for c in code_cells(nb) for o in c['outputs']]
    assert outputs, 'saved without outputs: run it and save it'
    assert not [o['ename'] for o in outputs if o['output_type'] == 'error']

@every_notebook
def test_short_cells(nb):
    cells = [''.join(c['source']).splitlines() for c in code_cells(nb)]
    assert not [f'{len(c)} lines from: {" / ".join(c[:2])}' for c in cells if len(c) > MAX_LINES]

@every_notebook
def test_no_machine_paths(nb):
    found = [m[0] for c in code_cells(nb) for o in c['outputs'] for t in texts(o) for m in MACHINE_PATH.finditer(t)]
    assert not found
