"""Build the site into `_docs/` and check it: `python .ci/site.py`.

With the `quarto` program on PATH this is `nbdev_docs`. Without it, nbdev still prepares the notebooks and
`smalldocs` renders them: a check of structure and links, with Quarto as the reference. Where `smalldocs` cannot
be had (Python 3.10) only the links in the notebooks' Markdown are checked. Exit 1 lists everything found wrong:
broken links and anchors, unrendered markup, images without alt text, paths of this machine, scripts, styles, fonts or pictures from another
host, and pages heavier than `HEAVY`. Figures do not count there: Quarto writes them as files, the stand-in inlines them.
"""
import html, json, os, posixpath, re, shutil, sys, traceback
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
import yaml

ROOT, DOCS, NBS = Path(__file__).resolve().parents[1], Path('_docs'), Path('nbs')
MARKUP = {'a cross-reference': r'@(?:fig|tbl|sec|eq|lst)-\w+', 'a cell marker or magic': r'%%\w*',
          'a raw div': r':{3,}', 'a raw shortcode': r'\{\{<', 'a raw link': r'.{0,30}\]\(.{0,30}', 'raw TeX': r'\$\$|\\[a-zA-Z]+',
          'raw emphasis': r'(?<![\w*])\*{1,2}[^\W\d].{0,30}'}
SCHEME = re.compile(r'[a-z][a-z0-9+.-]*:|//', re.I)
REMOTE = re.compile(r'(?:https?:)?//', re.I)
LOADS = {'script': 'src', 'img': 'src', 'iframe': 'src', 'source': 'src', 'video': 'src', 'audio': 'src', 'embed': 'src', 'object': 'data'}
LOADING_RELS = {'stylesheet', 'icon', 'preload', 'modulepreload', 'prefetch', 'preconnect', 'dns-prefetch', 'manifest'}
WIDGETS = re.compile(  # what Quarto adds to every notebook with an HTML output, for widgets that this book has not
    r'<script src="https://cdnjs\.cloudflare\.com/ajax/libs/(?:require\.js|jquery)/.*?</script>|<script[^>]*>define\(.jquery.*?</script>', re.S)
LINK_IN_CODE = re.compile(r'\[(`[\w.]+`)\]\(https?://[^)\s]+\)')  # nbdev links names in the comments of a signature too
FONT_IMPORT = r'@import\s*(?:url\()?["\']?https?://[^;]+;'
HEAVY = 400_000  # bytes of HTML without its figures

class Page(HTMLParser):
    "The ids, the links, what it loads, the images without alt text and the visible text outside code of one HTML page."
    NOT_TEXT = {'code', 'pre', 'script', 'style', 'math', 'svg'}
    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loads, self.mute, self.text, self.depth = set(), [], [], [], [], 0
        self.weight = len(re.sub(r'data:image/[\w+.-]+;base64,[^"]+', '', text).encode())
        self.leaks = str(ROOT) in text
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids.update(filter(None, [a.get('id'), a.get('name') if tag == 'a' else None]))
        self.links += [a[k] for k in ('href', 'src') if a.get(k)]
        loads = a.get(LOADS.get(tag)) or (a.get('href') if tag == 'link' and LOADING_RELS & set((a.get('rel') or '').split()) else None)
        self.loads += [loads] if loads else []
        self.mute += [(a.get('src') or '')[:60]] if tag == 'img' and not (a.get('alt') or '').strip() else []
        self.links += [a['content']] if tag == 'meta' and (a.get('property') or a.get('name') or '').endswith(':image') else []
        self.depth += tag in self.NOT_TEXT

    def handle_endtag(self, tag): self.depth -= tag in self.NOT_TEXT
    def handle_data(self, data): self.depth or self.text.append(data)

def site_url():
    "Where `settings.ini` says that the site is published, with a slash at the end."
    cfg = ConfigParser()
    cfg.read('settings.ini')
    return cfg['DEFAULT']['doc_host'] + cfg['DEFAULT']['doc_baseurl'].rstrip('/') + '/'

def output_names():
    "For each prepared notebook, the pages smalldocs writes -> those Quarto writes (nbdev's `output-file`), HTML and Markdown."
    names = {}
    for nb in sorted(Path('_proc').rglob('*.ipynb')):
        rel = nb.relative_to('_proc')
        front = ''.join((json.loads(nb.read_text(encoding='utf-8'))['cells'] or [{'source': ''}])[0]['source'])
        found = re.search(r'^output-file: (\S+)$', front, re.M)
        names[rel.with_suffix('.html').as_posix()] = rel.with_name(found[1] if found else rel.stem + '.html').as_posix()
    return names | {k[:-4] + 'llms.md': v[:-4] + 'llms.md' for k, v in names.items()}

def rename(page, names):
    "Give one page, and the links in it, the names Quarto would give."
    folder = page.relative_to(DOCS).parent.as_posix()
    def fix(m):
        new = names.get(posixpath.normpath(posixpath.join(folder, m[2])))
        return m[1] + (posixpath.join(posixpath.dirname(m[2]), posixpath.basename(new)) if new else m[2])
    text = re.sub(r'((?:href|src)="|\]\()(?!\w+:)([^"#?)\s]+\.(?:html|llms\.md))', fix, page.read_text(encoding='utf-8'))
    page.unlink()
    (DOCS / names.get(page.relative_to(DOCS).as_posix(), page.relative_to(DOCS))).write_text(text, encoding='utf-8')

def build_standin():
    "Render without Quarto: nbdev prepares `_proc`, smalldocs renders it."
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs
    import smalldocs.site
    refresh_quarto_yml()
    proc_nbs(force=True)
    site = smalldocs.site.build('_proc', quiet=True)  # its own link warnings are about names before `rename`
    names = output_names()
    twice = {v for v in names.values() if list(names.values()).count(v) > 1}
    if twice: raise ValueError(f'two notebooks write one page: {sorted(twice)}')
    shutil.rmtree(DOCS, ignore_errors=True)
    shutil.move(site.out, DOCS)
    for page in sorted([*DOCS.rglob('*.html'), *DOCS.rglob('*.llms.md')]): rename(page, names)
    for css in DOCS.rglob('site_libs/themes/*.css'):  # light.scss and dark.scss fetch no web font; smalldocs' plain CSS would
        css.write_text(re.sub(FONT_IMPORT, '', css.read_text(encoding='utf-8')), encoding='utf-8')
    for f in filter(Path.exists, (DOCS/'search.json', DOCS/'sitemap.xml', DOCS/'llms.txt')):
        new = re.sub('|'.join(map(re.escape, names)), lambda m: names[m[0]], f.read_text(encoding='utf-8'))
        f.write_text(new, encoding='utf-8')

def build_quarto():
    "Render with Quarto. README.md is made by `.ci/readme.py`, so it is marked as fresh for nbdev."
    from nbdev.quarto import nbdev_docs
    Path('README.md').touch()
    nbdev_docs.__wrapped__()

def tidy():
    "Take out of the pages what a builder put there and no reader needs."
    for page in DOCS.rglob('*.html'):
        old = page.read_text(encoding='utf-8')
        new = LINK_IN_CODE.sub(r'\1', WIDGETS.sub('', old))
        if new != old: page.write_text(new, encoding='utf-8')

def sidebar(node):
    "Every page named anywhere in the sidebar."
    if isinstance(node, str): return sorted(p.relative_to(NBS).as_posix() for p in NBS.glob(node)) if '*' in node else [node]
    if isinstance(node, list): return [p for n in node for p in sidebar(n)]
    return [p for k in ('href', 'file', 'contents') if k in node for p in sidebar(node[k])]

def missing_pages():
    "Sidebar entries that were not built."
    config, names = yaml.safe_load(Path('_quarto.yml').read_text(encoding='utf-8')), output_names()
    for p in sidebar(config['website']['sidebar']['contents']):
        old = posixpath.splitext(p)[0] + '.html'
        if not (DOCS / names.get(old, old)).exists(): yield f'_quarto.yml: sidebar page {p} was not built'

def broken(link, page, pages, base):
    "Why an internal link of a page is broken, or None."
    if (link + '/').startswith(base): link = '/' + link[len(base):]
    if SCHEME.match(link): return
    path, _, anchor = link.partition('#')
    path = unquote(path.partition('?')[0])
    target = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path and path[0] != '/' else path.lstrip('/') or '.'
    if not path: target = page
    if (DOCS / target).is_dir(): target = posixpath.normpath(posixpath.join(target, 'index.html'))
    if target.startswith('..') or not (DOCS / target).is_file(): return f'broken link {link}'
    if anchor and target in pages and unquote(anchor) not in pages[target].ids: return f'no anchor for {link}'

def page_faults(name, page, pages, base):
    "Everything wrong in one built page."
    for link in sorted(set(page.links)):
        if why := broken(link, name, pages, base): yield why
    text = html.unescape(''.join(page.text))
    yield from (f'{what} in the text: {m[0]}' for what, pat in MARKUP.items() for m in re.finditer(pat, text))
    yield from (f'loads from another host: {u[:80]}' for u in page.loads if REMOTE.match(u))
    yield from (f'image without alt text: {src}' for src in page.mute)
    if page.leaks: yield f'names a folder of this machine: {ROOT}'
    if page.weight > HEAVY: yield f'{page.weight / 1000:.0f} KB of HTML; {HEAVY / 1000:.0f} are allowed'

def check_site():
    "Everything wrong in the built site."
    files = [f for f in sorted(DOCS.rglob('*.html')) if 'site_libs' not in f.parts]
    pages = {f.relative_to(DOCS).as_posix(): Page(f.read_text(encoding='utf-8')) for f in files}
    base, found = site_url(), list(missing_pages())
    for name, page in pages.items(): found += [f'{name}: {why}' for why in page_faults(name, page, pages, base)]
    for css in DOCS.rglob('*.css'):
        found += [f'{css}: loads from another host' for _ in re.finditer(r'url\(\s*["\']?(?:https?:)?//|' + FONT_IMPORT, css.read_text(encoding='utf-8'))]
    found += [f'{f} was not written' for f in (DOCS/'llms.txt', *(DOCS / n.replace('.html', '.llms.md') for n in pages)) if not f.exists()]
    heavy = sorted(pages, key=lambda n: -pages[n].weight)[:3]
    print(f'{len(pages)} pages, {sum(len(p.links) for p in pages.values())} links; heaviest without figures: '
          + ', '.join(f'{n} {pages[n].weight / 1000:.0f} KB' for n in heavy))
    return found

def markdown(nb):
    "The Markdown of a notebook, without code."
    cells = json.loads(nb.read_text(encoding='utf-8'))['cells']
    text = '\n\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    return re.sub(r'^(```+|~~~+).*?^\1|`[^`\n]+`', '', text, flags=re.S | re.M)

def check_sources():
    "Links in the notebooks' Markdown to files that are not there."
    found = []
    for nb in sorted(p for p in NBS.rglob('*.ipynb') if not any(d[0] in '._' for d in p.parts)):
        links = re.findall(r'\]\(<?([^)\s>]+)', markdown(nb))
        found += [f'{nb}: broken link {k}' for k in links if not SCHEME.match(k) and k[0] != '#'
                  and not (nb.parent / unquote(k.partition('#')[0])).exists()]
    return found

def main():
    "Build and check; the number of things wrong."
    os.chdir(ROOT)
    build = build_quarto if shutil.which('quarto') else build_standin
    try: build()
    except (Exception, SystemExit) as e:
        if getattr(e, 'name', None) != 'smalldocs':
            traceback.print_exc()
            print(f'build error: {type(e).__name__}: {e}')
            return 1
        print('smalldocs is not here (it needs Python 3.11): no site built, checking the links in the notebooks only')
        found = check_sources()
    else:
        tidy()
        found = check_site()
    print('\n'.join(found) or 'site: ok')
    return len(found)

if __name__ == '__main__': sys.exit(main() > 0)
