"""Pages as a person sees them: headless Chromium opens a file, and what is wrong with it comes back as data."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

WIDTHS = (1280, 390)
"""CSS pixels: a laptop and a phone."""
NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)

LOOK = """() => {
  const root = document.body ?? document.documentElement;  // an SVG file has no body
  const clip = (element, {left, right, top, bottom}) => {  // what scrolling or cropping parents leave of a box
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
    if (!node.data.trim() || !parent.checkVisibility() || parent.closest('title, script, style')) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const svg = parent.closest('svg');
    const boxes = svg ? [parent.getBoundingClientRect()] : [...range.getClientRects()];
    const text = node.data.trim().slice(0, 40);
    for (const box of boxes) texts.push({node, svg, text, ...clip(svg?.parentElement ?? parent, box)});
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
    return left < edge.left - 1 || right > edge.right + 1 || top < edge.top - 1 || bottom > edge.bottom + 1;
  });
  const images = [...document.images];
  return {
    overflow: Math.max(0, document.documentElement.scrollWidth - window.innerWidth),
    num_images: images.length,
    broken: images.filter(image => !image.naturalWidth).map(image => image.alt || image.src.slice(0, 80)),
    without_alt: images.filter(image => !image.hasAttribute('alt')).map(image => image.src.slice(0, 80)),
    overlaps: overlaps,
    cut: cut.map(({text}) => text),
    num_texts: texts.length,
  };
}"""
"""Measures the page. A text's box may enter another's by 2 px upright: fonts leave that much above and below."""


@dataclass(frozen=True)
class Sight:
    """What a browser saw of a page."""

    errors: list[str]
    """Of scripts, and what the console calls an error."""
    requests: list[str]
    """All but the page itself and data URIs."""
    overflow: int
    """Pixels by which the page is wider than the window."""
    num_images: int
    broken: list[str]
    without_alt: list[str]
    overlaps: list[str]
    """Pairs of texts, in figures or outside, that cover each other."""
    cut: list[str]
    """Texts that stick out of their figure."""
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
    """Starts Chromium; skips the test on a machine without one."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium here to look at the page with; apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


def look(
    browser: Browser, path: Path, width: int, scheme: str = "light", screenshot: Path | None = None
) -> Sight:
    """Opens an HTML file in a window of a width.

    Args:
        scheme: `light` or `dark`, as the reader's system asks for.
        screenshot: where to write a PNG of the whole page.
    """
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    errors: list[str] = []
    requests: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "console", lambda message: errors.append(message.text) if message.type == "error" else None
    )
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.resolve().as_uri(), wait_until="load")
    seen = page.evaluate(LOOK)
    if screenshot:
        page.screenshot(path=screenshot, full_page=True)
    page.close()
    foreign = [
        url for url in requests if url != path.resolve().as_uri() and not url.startswith("data:")
    ]
    return Sight(errors, foreign, **seen)
