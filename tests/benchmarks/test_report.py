from pathlib import Path

import pytest

from benchmarks.record import append_rows
from benchmarks.report import TABLES, with_tables
from benchmarks.settings import DOCUMENTS, RESULTS
from isic.runtime.errors import UserError
from tests.support.commands import Cli


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_tables_of_the_documents_match_the_csvs(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert "<!-- table:" in text
    assert with_tables(text, RESULTS) == text, "run `python -m benchmarks report`"


def test_the_last_row_of_each_kind_is_in_the_table(tmp_path: Path, cli: Cli) -> None:
    for seconds in (1, 2):
        rows = [{"what": "a", "seconds": seconds}, {"what": "b", "images_per_second": 5}]
        append_rows("ingest", rows, tmp_path)
    for table in TABLES.values():
        if table.csv != "ingest":
            row = dict.fromkeys([*table.key, *table.columns], 0.5) | {"what": "m"}
            append_rows(table.csv, [row], tmp_path)
    last = {"what": "a", "seconds": 3, "min": 0, "max": 0, "first_is_faster_by": 1, "of_bare": 1}
    append_rows("ingest", [last], tmp_path)
    readme = tmp_path / "README.md"
    marks = "".join(f"<!-- table: {name} -->\nstale\n<!-- end -->\n" for name in TABLES)
    readme.write_text(f"before\n{marks}after\n")
    flags = ("--documents", readme, "--results", tmp_path, "--page", tmp_path / "page.html")
    ended = cli("benchmarks", "report", *flags)
    assert ended.code == 0, ended.err
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "stale" not in text
    assert "| a |  | 0 | 0 | 1 | 1 | 3 |" in text
    assert "| b | 5 |  |  |  |  |  |" in text
    assert "| m |" in text


def throughput_row(**changes: object) -> dict[str, object]:
    """Return a measurement that the table of configs shows."""
    row: dict[str, object] = {"what": "vit_tiny", "engine": "onnx", "precision": "fp32"}
    return row | {"device": "cpu", "batch": 16, "cores": 2, "images_per_second": 140} | changes


def test_the_configs_have_their_titles_and_last_rates(tmp_path: Path) -> None:
    sizes = {"network": "a", "size": 224, "parameters_m": 5.5, "features": 192}
    small = {"what": "vit_tiny", **sizes}
    append_rows("configs", [small, {"what": "no_file", **sizes, "parameters_m": 86}], tmp_path)
    rows = [
        throughput_row(images_per_second=100),
        throughput_row(),
        throughput_row(images_per_second=None, reason="it crashed"),
        throughput_row(precision="int8", images_per_second=270),
        throughput_row(cores=64, images_per_second=900),
        throughput_row(batch=1, images_per_second=30),
        throughput_row(device="cuda", images_per_second=9000),
    ]
    append_rows("throughput", rows, tmp_path)
    text = with_tables("<!-- table: configs -->\n<!-- end -->", tmp_path)
    _, headings, _, *lines, _ = text.splitlines()
    assert headings.endswith("| features | ONNX fp32 | ONNX int8 |")
    assert lines == [
        "| vit_tiny | ViT-Tiny/16 | 224 | 5.5 | 192 | 140 | 270 |",
        "| no_file |  | 224 | 86.0 | 192 |  |  |",
    ]


def test_the_scores_are_shown_in_the_order_of_the_table(tmp_path: Path) -> None:
    table = TABLES["scores"]
    for data, model in reversed(table.rows):
        append_rows("accuracy", [{"data": data, "what": model, "auc_pooled": 0.9}], tmp_path)
    other = {"data": "real pairs", "what": "raw, ensemble", "auc_pooled": 0.9}
    append_rows("accuracy", [other], tmp_path)
    text = with_tables("<!-- table: scores -->\n<!-- end -->", tmp_path)
    _, _, _, *lines, _ = text.splitlines()
    assert lines == [f"| {data} | {model} | 0.9 |" for data, model in table.rows]


def test_a_table_without_results_or_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run the benchmark first"):
        with_tables("<!-- table: ingest -->\n<!-- end -->", tmp_path)
    with pytest.raises(UserError, match='did you mean "ingest"'):
        with_tables("<!-- table: ingets -->\n<!-- end -->", tmp_path)


def test_a_file_of_other_content_is_not_replaced(tmp_path: Path, cli: Cli) -> None:
    table = tmp_path / "b.csv"
    page = tmp_path / "page.html"
    table.write_text("isic_id,target\na,1\n")
    with pytest.raises(UserError, match=r"b\.csv holds no results of benchmarks"):
        append_rows("b", [{"what": "x"}], tmp_path)
    page.write_text("<html>mine</html>")
    document = tmp_path / "d.md"
    document.write_text("no tables")
    flags = ("report", "--documents", document, "--page", page, "--results", RESULTS)
    ended = cli("benchmarks", *flags)
    assert ended.code == 2
    assert "was not written by this command" in ended.err
    assert page.read_text() == "<html>mine</html>"
    page.unlink()
    for _ in range(2):  # the second run replaces its own page
        assert cli("benchmarks", *flags).code == 0
