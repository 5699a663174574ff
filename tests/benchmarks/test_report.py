from pathlib import Path

import pytest

from benchmarks.limits import Limits, Work
from benchmarks.page import render
from benchmarks.record import RESULTS, append
from benchmarks.report import DOCUMENTS, TABLES, with_tables
from isic.runtime.errors import UserError
from tests.support.browser import WIDTHS, look, open_browser
from tests.support.commands import Cli


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_documents_tables_are_the_csvs(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert "<!-- table:" in text
    assert with_tables(text, RESULTS) == text, "run `python -m benchmarks report`"


def test_the_last_row_of_each_kind_stands_in_the_table(tmp_path: Path, cli: Cli) -> None:
    for seconds in (1, 2):
        append(
            "ingest",
            [{"what": "a", "seconds": seconds}, {"what": "b", "images_per_second": 5}],
            tmp_path,
        )
    for table in TABLES.values():
        if table.csv != "ingest":
            append(
                table.csv,
                [dict.fromkeys([*table.key, *table.columns], 0.5) | {"what": "m"}],
                tmp_path,
            )
    append(
        "ingest",
        [{"what": "a", "seconds": 3, "min": 0, "max": 0, "first_is_faster_by": 1, "of_bare": 1}],
        tmp_path,
    )
    readme = tmp_path / "README.md"
    marks = "".join(f"<!-- table: {name} -->\nstale\n<!-- end -->\n" for name in TABLES)
    readme.write_text(f"before\n{marks}after\n")
    ended = cli(
        "benchmarks",
        "report",
        "--documents",
        readme,
        "--results",
        tmp_path,
        "--page",
        tmp_path / "page.html",
    )
    assert ended.code == 0, ended.err
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text
    assert (
        "| a |  | 0 | 0 | 1 | 1 | 3 |" in text
        and "| b | 5 |  |  |  |  |  |" in text
        and "| m |" in text
    )


def test_a_table_without_results_or_name_is_a_sentence(tmp_path: Path) -> None:
    for name, hint in (("ingest", "run the benchmark first"), ("ingets", 'did you mean "ingest"')):
        with pytest.raises(UserError, match=hint):
            with_tables(f"<!-- table: {name} -->\n<!-- end -->", tmp_path)


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
        append("throughput", rows, folder)
    compared = {"ours": "infer embed, onnx fp32", "data": "d", "batch": 16}
    append(
        "peers",
        [{"what": "v", "peer": "a", "ratio": 2.0, "ratio_min": 1.9, "ratio_max": 2.1, **compared}],
        folder,
    )
    append("peers", [{"what": "v", "peer": "b", "reason": "is not installed", **compared}], folder)
    append(
        "embed",
        [{"what": "null", "data": "d", "images": n, "seconds": n / 5e3} for n in (4000, 40000)],
        folder,
    )
    append("tabular", [{"what": "features", "rows": 4000, "seconds": 1.5, "peak_mb": 300}], folder)


def test_the_page_is_sound_on_a_laptop_and_a_phone(tmp_path: Path) -> None:
    made_results(tmp_path)
    page = tmp_path / "page.html"
    page.write_text(render(tmp_path), encoding="utf-8")
    text = page.read_text(encoding="utf-8")
    assert "<b>no</b>" not in text and "&lt;b&gt;no&lt;/b&gt; GPU" in text
    assert "not measured" in text and "2.0 times" in text and "200.0" in text
    with open_browser() as browser:
        for width in WIDTHS:
            look(browser, page, width).assert_sound()


def test_the_page_of_what_was_recorded_is_sound(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(render(RESULTS), encoding="utf-8")
    with open_browser() as browser:
        look(browser, page, WIDTHS[-1]).assert_sound()


def test_a_file_that_is_no_result_is_not_replaced(tmp_path: Path, cli: Cli) -> None:
    table, page = tmp_path / "b.csv", tmp_path / "page.html"
    table.write_text("isic_id,target\na,1\n")
    with pytest.raises(UserError, match=r"b\.csv holds no results of benchmarks"):
        append("b", [{"what": "x"}], tmp_path)
    page.write_text("<html>mine</html>")
    document = tmp_path / "d.md"
    document.write_text("no tables")
    flags = ("report", "--documents", document, "--page", page, "--results", RESULTS)
    ended = cli("benchmarks", *flags)
    assert ended.code == 2 and "was not written by this command" in ended.err
    assert page.read_text() == "<html>mine</html>"
    page.unlink()
    assert cli("benchmarks", *flags).code == cli("benchmarks", *flags).code == 0
