"""Take the still of a lab that README.md shows: `python .ci/lab_picture.py labs/lora_lab.html nbs/images/lora_lab.png`.

Run it by hand after `.ci/site.py` when the lab looks different; it needs a browser, as tests/test_site.py does.
"""
import shutil, sys
from pathlib import Path
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]

def picture(page, out):
    "Save what the first HTML output of a built page looks like, at twice the size."
    browser = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))))
    with sync_playwright() as p, p.chromium.launch(executable_path=browser, args=['--no-sandbox', '--disable-gpu']) as b:
        tab = b.new_page(viewport=dict(width=1280, height=900), device_scale_factor=2, color_scheme='light')
        tab.goto((ROOT / '_docs' / page).as_uri())
        tab.locator('.cell-output-display').first.screenshot(path=ROOT / out)

if __name__ == '__main__': picture(*sys.argv[1:])
