"""What looks at the pages must see what is wrong with one."""

from pathlib import Path

from playwright.sync_api import Browser

from tests.support.browser import look

BAD = """<!doctype html><title>t</title>
<link rel="stylesheet" href="missing.css"><script>nothing()</script>
<p>above</p><p style="margin-top: -2em">below</p>
<svg width="200" height="50"><text x="9" y="20">one</text><text x="12" y="22">two</text><text x="-9" y="45">cut</text>
</svg>
<img src="data:image/png;base64,AAAA"><div style="width: 500px">wide</div>"""
GOOD = """<!doctype html><title>t</title><p>one</p><p>two</p>
<div style="overflow-x: auto"><div style="width: 900px; text-align: right">out of sight</div></div>"""


def test_faults_are_seen(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text(BAD)
    seen = look(browser, tmp_path / "bad.html", 390)
    assert seen.errors
    assert seen.requests == [(tmp_path / "missing.css").as_uri()]
    assert seen.overlaps == ['"above" and "below"', '"one" and "two"']
    assert seen.cut == ["cut"]
    assert seen.broken
    assert seen.without_alt
    assert seen.num_images == 1
    assert seen.overflow > 100


def test_a_sound_page_is_sound(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "good.html").write_text(GOOD)
    look(browser, tmp_path / "good.html", 390).assert_sound()
