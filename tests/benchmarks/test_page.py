from pathlib import Path

import pytest
from playwright.sync_api import Browser

from benchmarks.limits import Limits, Work
from benchmarks.page import render_page
from benchmarks.record import Row, append_rows
from benchmarks.settings import RESULTS
from tests.support.browser import WIDTHS, inspect


def throughput_row(what: str, rate: float) -> Row:
    return {
        "what": what,
        "engine": "onnx",
        "precision": "fp32",
        "device": "cpu",
        "batch": 16,
        "input": "noise",
        "images_per_second": rate,
        "min": rate - 1,
        "max": rate + 1,
        "p50_ms": 1.0,
        "cosine": 1.0,
        **Limits(1e12, 1e10).of(Work(2e9, 9e6, 5e6), "fp32", 16, rate),
    }


def write_results(folder: Path) -> None:
    """Write two runs of two configs, failures, peers, and whole runs, with markup in a text."""
    failed = {
        "what": "vit_tiny",
        "engine": "tensorrt",
        "precision": "fp16",
        "reason": "<b>no</b> GPU & no driver",
    }
    for rate in (100.0, 120.0):
        rows = [throughput_row(what, rate) for what in ("vit_tiny", "multitask_convnext_tiny")]
        append_rows("throughput", [*rows, failed], folder)
    common = {"what": "v", "ours": "infer embed, onnx fp32", "data": "d", "batch": 16}
    ratios = {"peer": "a", "ratio": 2.0, "ratio_min": 1.9, "ratio_max": 2.1}
    append_rows("peers", [{**common, **ratios}], folder)
    append_rows("peers", [{**common, "peer": "b", "reason": "is not installed"}], folder)
    whole = [{"what": "null", "data": "d", "images": n, "seconds": n / 5e3} for n in (4000, 40000)]
    append_rows("embed", whole, folder)
    features = {"what": "features", "rows": 4000, "seconds": 1.5, "peak_mb": 300}
    append_rows("tabular", [features], folder)


@pytest.mark.browser
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_is_sound_in_a_browser(browser: Browser, tmp_path: Path, width: int) -> None:
    write_results(tmp_path)
    page = tmp_path / "page.html"
    page.write_text(render_page(tmp_path), encoding="utf-8")
    text = page.read_text(encoding="utf-8")
    assert "<b>no</b>" not in text
    assert "&lt;b&gt;no&lt;/b&gt; GPU" in text
    assert "not measured" in text
    assert "2.0 times" in text
    assert "200.0" in text
    inspect(browser, page, width).assert_sound()


@pytest.mark.browser
def test_the_page_of_the_recorded_results_is_sound(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(render_page(RESULTS), encoding="utf-8")
    inspect(browser, page, WIDTHS[-1]).assert_sound()
