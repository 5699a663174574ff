from pathlib import Path

from benchmarks.limits import Limits, Work
from benchmarks.page import render_page
from benchmarks.record import RESULTS, append_rows
from tests.support.browser import WIDTHS, look, open_browser


def made_results(folder: Path) -> None:
    """Two runs of two configs, what could not be measured, a peer, and whole runs, with text that is no HTML."""
    for rate in (100.0, 120.0):
        rows: list[dict[str, object]] = [
            {
                **{
                    "what": what,
                    "engine": "onnx",
                    "precision": "fp32",
                    "device": "cpu",
                    "batch": 16,
                    "input": "noise",
                },
                **{
                    "images_per_second": rate,
                    "min": rate - 1,
                    "max": rate + 1,
                    "p50_ms": 1.0,
                    "cosine": 1.0,
                },
                **Limits(1e12, 1e10).of(Work(2e9, 9e6, 5e6), "fp32", 16, rate),
            }
            for what in ("vit_tiny", "multitask_convnext_tiny")
        ]
        rows.append(
            {
                "what": "vit_tiny",
                "engine": "tensorrt",
                "precision": "fp16",
                "reason": "<b>no</b> GPU & no driver",
            }
        )
        append_rows("throughput", rows, folder)
    compared = {"ours": "infer embed, onnx fp32", "data": "d", "batch": 16}
    append_rows(
        "peers",
        [{"what": "v", "peer": "a", "ratio": 2.0, "ratio_min": 1.9, "ratio_max": 2.1, **compared}],
        folder,
    )
    append_rows(
        "peers", [{"what": "v", "peer": "b", "reason": "is not installed", **compared}], folder
    )
    append_rows(
        "embed",
        [{"what": "null", "data": "d", "images": n, "seconds": n / 5e3} for n in (4000, 40000)],
        folder,
    )
    append_rows(
        "tabular", [{"what": "features", "rows": 4000, "seconds": 1.5, "peak_mb": 300}], folder
    )


def test_the_page_is_sound_on_a_laptop_and_a_phone(tmp_path: Path) -> None:
    made_results(tmp_path)
    page = tmp_path / "page.html"
    page.write_text(render_page(tmp_path), encoding="utf-8")
    text = page.read_text(encoding="utf-8")
    assert "<b>no</b>" not in text
    assert "&lt;b&gt;no&lt;/b&gt; GPU" in text
    assert "not measured" in text
    assert "2.0 times" in text
    assert "200.0" in text
    with open_browser() as browser:
        for width in WIDTHS:
            look(browser, page, width).assert_sound()


def test_the_page_of_what_was_recorded_is_sound(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(render_page(RESULTS), encoding="utf-8")
    with open_browser() as browser:
        look(browser, page, WIDTHS[-1]).assert_sound()
