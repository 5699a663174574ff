"""The inspection of pages must find every kind of fault."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.support.browser import inspect

pytestmark = pytest.mark.browser

BAD = """<!doctype html><title>t</title>
<link rel="stylesheet" href="missing.css"><script>nothing()</script>
<p>above</p><p style="margin-top: -2em">below</p>
<svg width="200" height="50"><text x="9" y="20">one</text><text x="12" y="22">two</text>
<text x="-9" y="45">cut</text></svg>
<img src="data:image/png;base64,AAAA"><div style="width: 500px">wide</div>"""
GOOD = """<!doctype html><title>t</title><p>one</p><p>two</p>
<div style="overflow-x: auto"><div style="width: 900px; text-align: right">out of sight</div>
</div>"""


def test_faults_are_found(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text(BAD)
    found = inspect(browser, tmp_path / "bad.html", 390)
    assert found.errors
    assert found.requests == [(tmp_path / "missing.css").as_uri()]
    assert found.overlaps == ['"above" and "below"', '"one" and "two"']
    assert found.cut == ["cut"]
    assert found.broken
    assert found.without_alt
    assert found.num_images == 1
    assert found.overflow > 100


def test_a_sound_page_is_sound(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "good.html").write_text(GOOD)
    inspect(browser, tmp_path / "good.html", 390).assert_sound()
