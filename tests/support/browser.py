"""Open a page in headless Chromium and return its faults as data."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, sync_playwright

WIDTHS = (1280, 390)
"""CSS pixels: a laptop and a phone."""
NAMES = ("chromium", "chromium-browser", "google-chrome")
# fmt: off
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)
# fmt: on

MEASURE = """() => {
  const root = document.body ?? document.documentElement;  // an SVG file has no body
  // The part of a box that scrolling or cropping parents leave visible.
  const clip = (element, {left, right, top, bottom}) => {
    let box = {left, right, top, bottom};
    for (let at = element; at && at !== root; at = at.parentElement) {
      if (getComputedStyle(at).overflowX === 'visible') continue;
      const edge = at.getBoundingClientRect();
      box = {left: Math.max(box.left, edge.left), right: Math.min(box.right, edge.right),
             top: Math.max(box.top, edge.top), bottom: Math.min(box.bottom, edge.bottom)};
    }
    return box;
  };
  const texts = [];
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  for (let node; node = walker.nextNode();) {
    const parent = node.parentElement;
    if (!node.data.trim() || !parent.checkVisibility()) continue;
    if (parent.closest('title, script, style')) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const svg = parent.closest('svg');
    const boxes = svg ? [parent.getBoundingClientRect()] : [...range.getClientRects()];
    const text = node.data.trim().slice(0, 40);
    const clipped = svg?.parentElement ?? parent;
    for (const box of boxes) texts.push({node, svg, text, ...clip(clipped, box)});
  }
  texts.sort((a, b) => a.top - b.top);
  const overlaps = [];
  texts.forEach((a, i) => {
    for (let j = i + 1; j < texts.length && texts[j].top < a.bottom - 2; j++) {
      const b = texts[j];
      const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (a.node !== b.node && wide > 1 && high > 2) overlaps.push(`"${a.text}" and "${b.text}"`);
    }
  });
  const cut = texts.filter(({svg}) => svg).filter(({svg, left, right, top, bottom}) => {
    const edge = svg.getBoundingClientRect();
    return left < edge.left - 1 || right > edge.right + 1
        || top < edge.top - 1 || bottom > edge.bottom + 1;
  });
  const images = [...document.images];
  const name = image => image.alt || image.src.slice(0, 80);
  return {
    overflow: Math.max(0, document.documentElement.scrollWidth - window.innerWidth),
    num_images: images.length,
    broken: images.filter(image => !image.naturalWidth).map(name),
    without_alt: images.filter(image => !image.hasAttribute('alt')).map(name),
    overlaps: overlaps,
    cut: cut.map(({text}) => text),
    num_texts: texts.length,
  };
}"""
"""Script that measures the page.

Boxes of text may overlap vertically by 2 px: fonts leave that much above and below.
"""


@dataclass(frozen=True)
class Inspection:
    """The faults of a page."""

    errors: list[str]
    """Errors of scripts and of the console."""
    requests: list[str]
    """URLs requested, without the page itself and data URIs."""
    overflow: int
    """Pixels by which the page is wider than the window."""
    num_images: int
    broken: list[str]
    """Images that do not decode."""
    without_alt: list[str]
    """Images without an alternative text."""
    overlaps: list[str]
    """Pairs of texts that cover each other."""
    cut: list[str]
    """Texts that extend beyond their figure."""
    num_texts: int

    def assert_sound(self) -> None:
        assert self.num_texts > 0, "the page is blank"
        faults = {
            name: value
            for name, value in vars(self).items()
            if value and not name.startswith("num_")
        }
        assert not faults, faults


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Start Chromium; skips the test on a machine without it."""
    paths = [path for path in map(shutil.which, NAMES) if path]
    if not paths:
        pytest.skip("Chromium is not installed; apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=paths[0], args=FLAGS)
        yield browser
        browser.close()


def inspect(
    browser: Browser, path: Path, width: int, scheme: str = "light", screenshot: Path | None = None
) -> Inspection:
    """Open an HTML or SVG file in a window of some width and return its faults.

    Args:
        scheme: `light` or `dark`, the system's colour scheme.
        screenshot: PNG of the whole page to write. Playwright hangs on that of an SVG file.
    """
    url = path.resolve().as_uri()
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    errors: list[str] = []
    requests: list[str] = []

    def on_console(message: ConsoleMessage) -> None:
        if message.type == "error":
            errors.append(message.text)

    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", on_console)
    page.on("request", lambda request: requests.append(request.url))
    page.goto(url, wait_until="load")
    measured = page.evaluate(MEASURE)
    if screenshot:
        page.screenshot(path=screenshot, full_page=True)
    page.close()
    external = [
        request for request in requests if request != url and not request.startswith("data:")
    ]
    return Inspection(errors, external, **measured)
