"""Chromium without a window, for tests of pages: what it logged, what it asked the network for, how wide a page is."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

MISSING = "Chromium is needed: apt-get install chromium chromium-driver"


class Browser:
    """One browser, which is at one page at a time."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def show(self, page: Path | str, *, width: int = 1280, height: int = 800, dark: bool = False) -> None:
        """Opens a page at a size, and empties the logs before it."""
        self.problems()
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(page.resolve().as_uri() if isinstance(page, Path) else page)

    def script(self, text: str, *arguments: Any) -> Any:
        return self.driver.execute_script(text, *arguments)

    def problems(self) -> list[str]:
        """What was logged since the last look, and each address outside of the folder that was asked for."""
        found = [entry["message"] for entry in self.driver.get_log("browser")]
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                url = message["params"]["request"]["url"]
                found += [url] if urlsplit(url).scheme not in ("file", "data") else []
        return found

    def is_too_wide(self) -> bool:
        """Whether the page as a whole scrolls sideways."""
        return bool(self.script("return document.documentElement.scrollWidth > window.innerWidth"))

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        options = {"format": "png", "captureBeyondViewport": whole}
        if whole:
            size = self.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
            options["clip"] = {**size, "scale": 1}
        taken = self.driver.execute_cdp_cmd("Page.captureScreenshot", options)
        path.write_bytes(base64.b64decode(taken["data"]))

    def crawl(self, first: Path, *, widths: tuple[int, ...] = (1280, 360)) -> set[Path]:
        """Follows all links from a page on; each has to lead to a file, and to a place in it that is there.

        Looks at every page at each width: none may scroll sideways, log an error or ask the network. Gives the pages;
        tlparse's are not looked at further.
        """
        top = first.resolve().parent
        anchors: dict[Path, set[str]] = {}
        wanted: list[tuple[Path, Path, str]] = []
        waiting = [first.resolve()]
        while waiting:
            page = waiting.pop()
            if page in anchors:
                continue
            for width in widths:
                self.show(page, width=width)
                assert not self.is_too_wide(), f"{page} is wider than {width} px"
            assert self.problems() == [], page
            anchors[page] = set(self.script("return [...document.querySelectorAll('[id]')].map((one) => one.id)"))
            for link in self.script(
                "return [...document.querySelectorAll('a[href]')].map((one) => one.href.baseVal ?? one.href)"
            ):
                address, anchor = urldefrag(link)
                target = page if not address else Path(unquote(urlsplit(address).path))
                assert urlsplit(address).scheme in ("", "file"), f"{page}: {link}"
                assert target.is_file(), f"{page}: {link} leads nowhere"
                assert target.is_relative_to(top), f"{page}: {link} leads out of the report"
                if target.suffix == ".html" and "tlparse" not in target.relative_to(top).parts:
                    wanted.append((page, target, unquote(anchor)))
                    waiting.append(target)
        lost = [
            (page.name, target.name, anchor)
            for page, target, anchor in wanted
            if anchor and anchor not in anchors[target]
        ]
        assert lost == []
        return set(anchors)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Skips the test where there is no Chromium; nothing is fetched from anywhere."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is needed: it is in the extra dev")
    program, driver_program = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver_program is None:
        pytest.skip(MISSING)
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver_program))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
