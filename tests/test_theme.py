"""The palette: one set of colours in CSS, Sass and matplotlib, and enough contrast to read (WCAG AA)."""
import json, re
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
AA = 4.5  # contrast ratio of text with its ground; 3 for large text and for lines that carry meaning

def palette(selector):
    "The colours set in one rule of book.css: {name: '#rrggbb'}."
    css = (ROOT / 'nbs/theme/book.css').read_text(encoding='utf-8')
    return dict(re.findall(r'--([\w-]+): (#[0-9a-f]{6})', css.split(selector + ' {', 1)[1].split('}', 1)[0]))

LIGHT = palette(':root')
DARK = {**LIGHT, **palette('html[data-scheme="alternate"]')}

def luminance(color):
    "Relative luminance of '#rrggbb' (WCAG 2.2)."
    parts = [int(color[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * r + 0.7152 * g + 0.0722 * b

def contrast(a, b):
    "Contrast ratio of two colours, 1 to 21."
    low, high = sorted(map(luminance, (a, b)))
    return (high + 0.05) / (low + 0.05)

def style():
    "The settings of book.mplstyle."
    lines = (ROOT / 'tiny_llm/assets/book.mplstyle').read_text(encoding='utf-8').splitlines()
    return dict(l.split(': ', 1) for l in lines if l and l[0] != '#')

def test_contrast_function():
    assert contrast('#000000', '#ffffff') == pytest.approx(21)
    assert contrast('#777777', '#ffffff') == pytest.approx(4.48, abs=0.01)

@pytest.mark.parametrize('colors', [LIGHT, DARK], ids=['light', 'dark'])
@pytest.mark.parametrize('ground', ['paper', 'panel'])
@pytest.mark.parametrize('text', ['ink', 'soft', 'frozen', 'trained', 'grown', 'odd'])
def test_text_contrast(colors, ground, text): assert contrast(colors[text], colors[ground]) >= AA

@pytest.mark.parametrize('colors', [LIGHT, DARK], ids=['light', 'dark'])
def test_badge_contrast(colors): assert contrast(colors['badge-ink'], colors['badge']) >= AA

@pytest.mark.parametrize('file, colors', [('light', LIGHT), ('dark', DARK)])
def test_sass_repeats_the_palette(file, colors):
    sass = dict(re.findall(r'^\$([\w-]+): (#\w+);', (ROOT / f'nbs/theme/{file}.scss').read_text(encoding='utf-8'), re.M))
    twins = {'body-bg': 'paper', 'body-color': 'ink', 'primary': 'frozen', 'link-color': 'frozen', 'light': 'panel',
             'border-color': 'line', 'navbar-bg': 'paper', 'navbar-fg': 'ink', 'sidebar-bg': 'paper', 'sidebar-fg': 'ink'}
    assert sass == {k: colors[v] for k, v in twins.items()}

def test_figures_repeat_the_palette():
    conf = style()
    assert '#' + conf['text.color'] == '#' + conf['axes.labelcolor'] == LIGHT['ink']
    assert '#' + conf['xtick.color'] == '#' + conf['ytick.color'] == LIGHT['soft']
    assert '#' + re.findall(r'"(\w{6})"', conf['axes.prop_cycle'])[0] == LIGHT['frozen']

def test_style_is_read_by_matplotlib():
    plt = pytest.importorskip('matplotlib.pyplot')
    with plt.style.context(ROOT / 'tiny_llm/assets/book.mplstyle'):
        assert plt.rcParams['axes.prop_cycle'].by_key()['color'][0] .lstrip('#') == LIGHT['frozen'].lstrip('#')

def test_home_page_says_the_chapters_times():
    def text(nb): return [''.join(c['source']) for c in json.loads((ROOT / 'nbs' / nb).read_text(encoding='utf-8'))['cells']]
    rows = re.findall(r'\((\w+\.ipynb)\) \|.*\| (\d+ s) \|', '\n'.join(text('index.ipynb')))
    assert len(rows) == 5
    assert all(f'about {time} on two processor cores' in text(nb)[1] for nb, time in rows)
