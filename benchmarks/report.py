"""`python -m benchmarks report`: writes the README's tables from the CSVs, so that they hold no other numbers."""

import re
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from pydantic import Field

from benchmarks.record import RESULTS
from isic.config import Settings
from isic.errors import UserError
from isic.files import write_text

README = Path(__file__).resolve().parents[1] / "README.md"


class ReportSettings(Settings):
    """What `python -m benchmarks report` takes."""

    readme: Path = Field(README, description="file whose tables are written anew")
    results: Path = Field(RESULTS, description="folder of the CSVs")


@dataclass(frozen=True)
class Table:
    """A table of the README: the last row of each kind in a CSV."""

    csv: str
    key: tuple[str, ...]
    """Columns that tell one kind of row from another."""
    columns: dict[str, str]
    """Heading by column."""


TABLES = {
    "ingest": Table(
        "ingest",
        ("what",),
        {
            "what": "from ids to uint8 batches",
            "images_per_second": "images/s (median)",
            "min": "min",
            "max": "max",
            "first_is_faster_by": "the first is faster by",
            "seconds": "seconds",
        },
    ),
    "train": Table(
        "train",
        ("what", "model", "device", "batch", "precision", "compile", "workers", "size"),
        {
            "what": "config",
            "device": "device",
            "size": "px",
            "batch": "batch x accumulated",
            "precision": "precision",
            "compile": "compiled",
            "images_per_second": "images/s",
            "over_bare": "over a bare loop",
            "over_bare_min": "min",
            "over_bare_max": "max",
            "over_memory": "over itself on tensors in memory",
            "waiting": "share waiting for data",
            "mfu": "MFU",
        },
    ),
    "accuracy": Table(
        "accuracy",
        ("what", "data"),
        {
            "data": "data",
            "what": "model",
            "rows": "rows",
            "positives": "positives",
            "pauc_pooled": "pAUC, pooled",
            "pauc_mean_of_folds": "mean of folds",
            "pauc_std_of_folds": "± between folds",
            "auc_pooled": "AUC",
        },
    ),
    "ablation": Table(
        "ablation",
        ("data", "features", "model"),
        {
            "data": "data",
            "model": "boosters",
            "features": "features",
            "num_features": "columns",
            "pauc": "pAUC, pooled",
            "auc": "AUC",
            "difference": "pAUC above raw, mean of seeds",
            "better_in": "better in",
            "p": "p",
        },
    ),
}
MARK = r"(<!-- table: {name} -->\n).*?(<!-- end -->)"


def report(settings: ReportSettings) -> None:
    """Writes every table of the README anew from the last results."""
    text = settings.readme.read_text(encoding="utf-8")
    write_text(settings.readme, with_tables(text, settings.results))
    print(f"wrote the tables of {settings.readme}")


def with_tables(text: str, results: Path) -> str:
    """Returns a Markdown text with the tables between its marks made from the CSVs."""
    for name, table in TABLES.items():
        path = results / f"{table.csv}.csv"
        pattern = re.compile(MARK.format(name=name), re.DOTALL)
        if not path.is_file() or not pattern.search(text):
            raise UserError(f"the table {name} needs {path} and its mark in the text; run the benchmark first")
        rendered = markdown(pl.read_csv(path, infer_schema=False), table)
        text = pattern.sub(lambda match, body=rendered: match[1] + body + match[2], text)  # type: ignore[misc]
    return text


def markdown(rows: pl.DataFrame, table: Table) -> str:
    """Renders the last row of each kind."""
    last = rows.unique(table.key, keep="last", maintain_order=True).select(list(table.columns)).fill_null("")
    lines = [list(table.columns.values()), ["---"] * len(table.columns), *map(list, last.iter_rows())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
