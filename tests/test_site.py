"""The site as a person meets it, in headless Chromium: every page, two widths, light and dark, no network.

The site is what `.ci/site.py` leaves in `_docs`; it is built first where it is older than its sources.
"""
import functools, http.server, itertools, re, shutil, subprocess, sys, threading
from pathlib import Path
import pytest

pytest.importorskip('smalldocs', reason='the stand-in for Quarto needs Python 3.11')
playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / '_docs'
BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
FLAGS = '--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync'
WIDTHS, SCHEMES = (1280, 375), ('light', 'dark')
pytestmark = pytest.mark.skipif(BROWSER is None, reason='no chromium here: apt-get install chromium')

# Colours of the text on the page and the ground behind it, each pair once: [[text, ground, px, bold, words]].
COLOURS = '''() => {
  const seen = new Map(), walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  const solid = c => !/^rgba\\(.*, 0\\)$|^transparent$/.test(c)
  while (walk.nextNode()) {
    const el = walk.currentNode.parentElement, words = walk.currentNode.data.trim()
    if (!words || el.closest('script, style, svg') || !el.checkVisibility({visibilityProperty: true, opacityProperty: true})) continue
    const style = getComputedStyle(el)
    let back = el; while (back && !solid(getComputedStyle(back).backgroundColor)) back = back.parentElement
    const ground = getComputedStyle(back || document.body).backgroundColor
    const row = [style.color, ground, parseFloat(style.fontSize), +style.fontWeight >= 700, words.slice(0, 40)]
    seen.set(row.slice(0, 4).join(), row)
  }
  return [...seen.values()]
}'''

def pages():
    "For each notebook of the book, the page that it becomes."
    nbs = sorted(p.relative_to(ROOT / 'nbs') for p in (ROOT / 'nbs').rglob('*.ipynb'))
    return [p.with_name(re.sub(r'^\d+[a-zA-Z0-9]*_', '', p.stem) + '.html').as_posix() for p in nbs if not any(d[0] in '._' for d in p.parts)]

def stale():
    "Is the built site older than what it is made from?"
    sources = [ROOT / '_quarto.yml', ROOT / '.ci/site.py', *(p for p in (ROOT / 'nbs').rglob('*') if p.suffix in {'.ipynb', '.css', '.svg', '.png'})]
    home = DOCS / 'index.html'
    return not home.exists() or home.stat().st_mtime < max(p.stat().st_mtime for p in sources)

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

@pytest.fixture(scope='module')
def host():
    "The address where the built site is served."
    if stale():
        built = subprocess.run([sys.executable, '.ci/site.py'], cwd=ROOT, capture_output=True, text=True)
        assert built.returncode == 0, built.stdout + built.stderr[-2000:]
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(DOCS)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()

@pytest.fixture(scope='module')
def shared_tab(host):
    "One browser page for all tests, with `faults`: console errors, failed requests, requests to another host."
    with playwright.sync_playwright() as p, p.chromium.launch(executable_path=BROWSER, args=FLAGS.split()) as browser:
        tab = browser.new_context(permissions=['clipboard-read', 'clipboard-write']).new_page()
        tab.faults = []
        tab.on('console', lambda m: m.type == 'error' and tab.faults.append(f'console: {m.text}'))
        tab.on('pageerror', lambda e: tab.faults.append(f'error: {e}'))
        tab.on('requestfailed', lambda r: tab.faults.append(f'failed: {r.url}'))
        tab.on('response', lambda r: r.status >= 400 and tab.faults.append(f'{r.status}: {r.url}'))
        tab.on('request', lambda r: r.url.startswith((host, 'data:', 'blob:')) or tab.faults.append(f'elsewhere: {r.url}'))
        yield tab

@pytest.fixture
def tab(shared_tab):
    "The page, with a clean record, as wide as a laptop, in the light."
    shared_tab.faults.clear()
    look(shared_tab, 1280, 'light')
    return shared_tab

def look(tab, width, scheme):
    "Set the width of the window and the scheme that the reader prefers."
    tab.set_viewport_size(dict(width=width, height=812))
    tab.emulate_media(color_scheme=scheme, reduced_motion='reduce')

def channels(color): return [float(v) for v in re.findall(r'[\d.]+', color)][:3]

def luminance(color):
    "Relative luminance of 'rgb(r, g, b)' (WCAG 2.2)."
    r, g, b = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in channels(color))]
    return 0.2126 * r + 0.7152 * g + 0.0722 * b

def unreadable(rows):
    "Texts whose contrast is under AA: 4.5, or 3 where the text is large."
    for text, ground, px, bold, words in rows:
        low, high = sorted(map(luminance, (text, ground)))
        if (high + 0.05) / (low + 0.05) < (3 if px >= 24 or bold and px >= 18.66 else 4.5): yield f'{words!r}: {text} on {ground}'

@pytest.mark.parametrize('name', pages())
def test_page(tab, host, name):
    tab.goto(host + name, wait_until='load')
    grounds = {}
    for scheme, width in itertools.product(SCHEMES, WIDTHS):
        look(tab, width, scheme)
        tab.wait_for_function('dark => (document.documentElement.dataset.scheme === "alternate") === dark', arg=scheme == 'dark')
        wide = tab.evaluate('document.documentElement.scrollWidth - innerWidth')
        assert wide <= 0, f'{wide} px too wide at {width} px'
        grounds[scheme] = tab.evaluate('getComputedStyle(document.body).backgroundColor')
        if width == WIDTHS[0]: assert not list(unreadable(tab.evaluate(COLOURS))), scheme
    assert luminance(grounds['light']) > 0.8 and luminance(grounds['dark']) < 0.05
    assert not tab.faults

def test_opens_dark_for_a_reader_who_prefers_dark(tab, host):
    look(tab, 1280, 'dark')
    tab.goto(host + 'index.html')
    assert luminance(tab.evaluate('getComputedStyle(document.body).backgroundColor')) < 0.05

def test_toggle_changes_the_scheme(tab, host):
    tab.goto(host + 'lora.html')
    tab.click('.quarto-color-scheme-toggle')
    tab.wait_for_function("document.documentElement.classList.contains('quarto-dark')")
    assert luminance(tab.evaluate('getComputedStyle(document.body).backgroundColor')) < 0.05
    tab.evaluate('localStorage.clear()')

def test_search_finds(tab, host):
    tab.goto(host + 'index.html')
    tab.fill('#quarto-search input', 'moral')
    tab.wait_for_selector('.search-result:has-text("moral")')
    assert not tab.faults

def test_sidebar_opens_on_a_phone(tab, host):
    look(tab, 375, 'light')
    tab.goto(host + 'lora.html')
    link = tab.locator('#quarto-sidebar a', has_text='Surgery')
    assert link.bounding_box()['x'] < 0
    tab.click('.quarto-btn-toggle')
    tab.wait_for_function("document.querySelector('#quarto-sidebar').getBoundingClientRect().x >= 0")
    link.click()
    tab.wait_for_url('**/surgery.html')

def test_copy_button(tab, host):
    tab.goto(host + 'index.html')
    tab.locator('.code-copy-button').first.click()
    assert tab.evaluate('navigator.clipboard.readText()').startswith('make finetune')

def test_next_walks_the_whole_book_and_previous_goes_back(tab, host):
    seen, name = ['index.html'], 'index.html'
    while True:
        page = (DOCS / name).read_text(encoding='utf-8')
        found = re.search(r'nav-page-next"><a[^>]*href="([^"]+)"', page)
        if not found: break
        name = (DOCS / name).parent.joinpath(found[1]).resolve().relative_to(DOCS.resolve()).as_posix()
        seen.append(name)
    assert sorted(seen) == sorted(pages())
    tab.goto(host + 'surgery.html')
    tab.click('.nav-page-previous a')
    tab.wait_for_url('**/lora.html')

def test_edit_link_and_colab_badge(tab, host):
    tab.goto(host + 'lora.html')
    assert tab.get_attribute('a:has-text("Edit this page")', 'href').endswith('/edit/main/nbs/01_lora.ipynb')
    badge = tab.locator('a[href^="https://colab.research.google.com/"]').first
    assert badge.evaluate('a => getComputedStyle(a).borderRadius') != '0px'

def test_machine_readers_find_the_text(host):
    index = (DOCS / 'llms.txt').read_text(encoding='utf-8')
    copies = [p.replace('.html', '.llms.md') for p in pages()]
    assert all(c in index and (DOCS / c).stat().st_size > 200 for c in copies)
