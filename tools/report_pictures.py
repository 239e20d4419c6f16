"""Takes the pictures of docs/report.md, of the report of a real run. usage: python tools/report_pictures.py REPORT"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.debug.browser import chromium  # noqa: E402 - found by the line above

PICTURES = ROOT / "docs/pictures"

if __name__ == "__main__":
    index = Path(sys.argv[1]) / "index.html"
    with chromium() as browser:
        browser.show(index, width=1280, height=1000)
        browser.screenshot(PICTURES / "report.png")
        browser.show(index, width=360, height=740, dark=True)
        browser.screenshot(PICTURES / "report-phone.png")
