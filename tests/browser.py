"""Headless Chromium, one for a test process, and pages in it that note what went wrong."""

import atexit
import os
import shutil
import time
from functools import cache
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
AXE = Path(__file__).parent / "vendor/axe.min.js"
WAIT = 30_000  # milliseconds: other processes share the machine
LOCAL = ("file:", "blob:", "data:")

# words -> milliseconds that the page takes to search for each
SEARCH = """words => words.map((text) => {
  const field = document.getElementById('search');
  field.value = text;
  const start = performance.now();
  field.dispatchEvent(new Event('input'));
  document.getElementById('found').getBoundingClientRect();
  return performance.now() - start;
})"""


@cache
def browser():
    """Started at the first use."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright comes with the dev extra")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    driver = sync_api.sync_playwright().start()
    atexit.register(driver.stop)
    sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    return driver.chromium.launch(executable_path=CHROMIUM, args=sandbox)


def opened(path, **choices):
    """A page of its own; what it logs, throws or asks for from outside is kept in `page.troubles`."""
    context = browser().new_context(viewport={"width": 1280, "height": 800}, reduced_motion="reduce", **choices)
    context.set_default_timeout(WAIT)
    page = context.new_page()
    page.troubles = []
    page.on("console", lambda m: page.troubles.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: page.troubles.append(str(e)))
    page.on("request", lambda r: page.troubles.append(r.url) if not r.url.startswith(LOCAL) else None)
    page.on("dialog", lambda d: (page.troubles.append(f"dialog {d.message}"), d.dismiss()))
    page.goto(path.as_uri())
    return page


def until(page, expression):
    """Waits for a JavaScript expression to be true. Playwright's own wait evaluates text in the page: its policy forbids."""
    end = time.monotonic() + WAIT / 1000
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"never became true: {expression}"
        page.wait_for_timeout(15)


def violations(page, rules=()):
    """What axe-core finds: rule, elements. rules: only these of its rules."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE.read_text())
    only = {"runOnly": list(rules)} if rules else {}
    result = page.evaluate("choices => axe.run(choices)", {"resultTypes": ["violations"], **only})
    return [(v["id"], [n["html"][:200] for n in v["nodes"][:3]]) for v in result["violations"]]
