"""`python -m benchmarks report`: the documents' tables and a page of charts, all from the CSVs and nothing else."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
from pydantic import Field

from benchmarks.page import HEADING, last_rows, read, render
from benchmarks.record import RESULTS
from isic.runtime.config import Settings, Several
from isic.runtime.errors import UserError, did_you_mean
from isic.runtime.files import read_text, refuse_foreign, write_text

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")


class ReportSettings(Settings):
    """What `python -m benchmarks report` takes."""

    documents: Several[Path] = Field(
        DOCUMENTS, description="Markdown files whose tables are written anew"
    )
    results: Path = Field(RESULTS, description="folder of the CSVs")
    page: Path = Field(
        Path("outputs/benchmarks.html"), description="the page of charts and all tables"
    )


@dataclass(frozen=True)
class Table:
    """A table of a document: the last row of each kind in a CSV."""

    csv: str
    key: tuple[str, ...]
    """Columns that tell one kind of row from another."""
    columns: dict[str, str]
    """Heading by column."""
    only: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Values that a column may have in it, and their order, the last column's first; one not named may have any."""
    sort: tuple[str, ...] = ()
    """Columns to sort by, numbers as numbers; without them, kinds stand in the order in which they were first seen."""


THROUGHPUT = {
    "what": "config",
    "accelerator": "GPU",
    "engine": "engine",
    "precision": "precision",
    "device": "device",
    "batch": "batch",
    "images_per_second": "images/s (median)",
    "min": "min",
    "max": "max",
    "p50_ms": "ms, median",
    "p99_ms": "ms, 99th percentile",
    "peak_mb": "peak MB",
    "of_matmul": "of the matmul rate",
    "of_copy": "of the copy bandwidth",
    "bound_by": "bound by",
    "cosine": "cosine",
    "reason": "not measured, because",
}
SHORT = {
    *("what", "accelerator", "engine", "precision", "batch"),
    *("images_per_second", "min", "max", "peak_mb", "cosine"),
}
"""Columns of THROUGHPUT that the README shows."""
COMPARED = {
    "difference": "pAUC above the first, mean of seeds",
    "better_in": "better in",
    "p": "p",
    "low": "95 % of redraws of patients: from",
    "high": "to",
    "verdict": "verdict",
}
"""Columns of `infer.ensemble.comparison.Comparison.row`."""
TABLES = {
    "throughput": Table(
        "throughput",
        ("accelerator", "what", "engine", "precision", "batch", "device", "input"),
        THROUGHPUT,
        sort=("what", "accelerator", "engine", "precision", "batch"),
    ),
    "engines": Table(
        "throughput",
        ("accelerator", "what", "engine", "precision", "device", "input"),
        {name: heading for name, heading in THROUGHPUT.items() if name in SHORT},
        {
            "precision": ("fp32", "bf16", "int8"),
            "engine": ("eager", "onnx", "aoti"),
            "what": (
                *("vit_tiny", "vit_small", "vit_base", "eva02_small", "eva02_base"),
                *("convnext_tiny", "convnext_base", "multitask_vit_tiny"),
            ),
        },
    ),
    "export": Table(
        "export",
        ("accelerator", "what", "format", "precision"),
        {
            "what": "config",
            "format": "format",
            "precision": "precision",
            "seconds": "seconds",
            "megabytes": "MB",
            "cosine": "cosine",
            "max_logit_error": "logit error",
            "reason": "not compared, because",
        },
        sort=("what", "accelerator", "format", "precision"),
    ),
    "peers": Table(
        "peers",
        ("accelerator", "what", "data", "batch", "ours", "peer"),
        {
            "what": "config",
            "ours": "ours",
            "ours_images_per_second": "images/s",
            "peer": "peer",
            "peer_precision": "its precision",
            "images_per_second": "images/s",
            "ratio": "ours is faster by",
            "ratio_min": "min",
            "ratio_max": "max",
            "cosine_same_pixels": "cosine, same pixels",
            "cosine": "cosine, own pixels",
            "reason": "not measured, because",
        },
    ),
    "embed": Table(
        "embed",
        ("accelerator", "what", "data", "images"),
        {
            "what": "engine",
            "data": "data",
            "images": "images a repeat",
            "ingest": "reading alone, images/s",
            "engine": "engine alone",
            "end_to_end": "end to end",
            "share": "of the slower of the two",
        },
    ),
    "growth": Table(
        "embed",
        ("accelerator", "what", "data", "images"),
        {
            "what": "engine",
            "data": "data",
            "images": "images",
            "seconds": "seconds",
            "start_seconds": "of which to start",
            "us_per_row": "the rest, µs an image",
            "peak_mb": "peak MB",
            "bound_by": "bound by",
        },
    ),
    "growth_tabular": Table(
        "tabular",
        ("accelerator", "what", "rows"),
        {
            "what": "step",
            "rows": "rows",
            "seconds": "seconds",
            "start_seconds": "of which to start",
            "us_per_row": "the rest, µs a row",
            "peak_mb": "peak MB",
            "ours_is_faster_by": "ours is faster by",
            "rows_per_second": "rows/s",
        },
        sort=("what", "accelerator", "rows"),
    ),
    "ingest": Table(
        "ingest",
        ("what",),
        {
            "what": "from ids to uint8 batches",
            "images_per_second": "images/s (median)",
            "min": "min",
            "max": "max",
            "first_is_faster_by": "the first is faster by",
            "of_bare": "of the bare loop",
            "seconds": "seconds",
        },
    ),
    "train": Table(
        "train",
        ("what", "model", "device", "batch", "precision", "compile", "workers", "busy", "size"),
        {
            "what": "config",
            "device": "device",
            "size": "px",
            "batch": "batch x accumulated",
            "precision": "precision",
            "compile": "compiled",
            "workers": "loader processes",
            "busy": "busy processes beside it",
            "threads": "threads",
            "images_per_second": "images/s",
            "over_bare": "over a bare loop",
            "over_bare_min": "min",
            "over_bare_max": "max",
            "over_memory": "over itself on tensors in memory",
            "waiting": "share waiting for data",
            "mfu": "MFU",
        },
        sort=("accelerator", "what", "workers", "busy"),
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
            "pauc_by_fold": "pAUC by fold",
            "published_oof": "published out of fold, whole data",
            "published_board": "published, private board",
        },
    ),
    "hospitals": Table(
        "hospitals",
        ("data", "features", "treatment", "scored"),
        {
            "data": "data",
            "features": "features",
            "scored": "scored rows",
            "treatment": "categories",
            "pauc_mean_of_seeds": "pAUC, mean of seeds",
            **COMPARED,
        },
    ),
    "few": Table(
        "few",
        ("data", "features", "lesions_together"),
        {
            "data": "data",
            "features": "features",
            "lesions_together": "lesions scored together",
            "pauc": "pAUC, pooled",
            "auc": "AUC",
            **COMPARED,
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
            **COMPARED,
        },
    ),
}
MARK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def report(settings: ReportSettings) -> None:
    """Writes every table of the documents anew from the last results, and a page that shows them all."""
    is_own = settings.page.is_file() and HEADING in read_text(settings.page)
    refuse_foreign([settings.page], is_own, "--page")
    for path in settings.documents:
        write_text(path, with_tables(read_text(path), settings.results))
    write_text(settings.page, render(settings.results))
    print(f"wrote the tables of {', '.join(map(str, settings.documents))}, and {settings.page}")


def with_tables(text: str, results: Path) -> str:
    """Returns a Markdown text with the tables between its marks made from the CSVs."""
    return MARK.sub(lambda match: match[1] + _table(match[2], results) + match[3], text)


def _table(name: str, results: Path) -> str:
    if name not in TABLES:
        raise UserError(f'there is no table "{name}", {did_you_mean(name, TABLES)}')
    path = results / f"{TABLES[name].csv}.csv"
    if not path.is_file():
        raise UserError(f"the table {name} needs {path}; run the benchmark first")
    return markdown(read(path), TABLES[name])


def markdown(rows: pl.DataFrame, table: Table) -> str:
    """Renders the last row of each kind that has a figure, without the columns that are blank in all."""
    last = last_rows(rows, table.key)
    by = (pl.col(name) for name in table.sort if name in last.columns)
    last = last.sort(
        [key for column in by for key in (column.cast(pl.Float64, strict=False), column)]
    )
    for name, values in table.only.items():
        last = last.filter(pl.col(name).is_in(values)).sort(
            pl.col(name).cast(pl.Enum(values)), maintain_order=True
        )
    figures = [name for name in table.columns if name in last.columns and name not in table.key]
    last = last.filter(pl.any_horizontal(pl.col(name).is_not_null() for name in figures))
    shown = {name: heading for name, heading in table.columns.items() if name in last.columns}
    last = last.select(list(shown))
    shown = {
        name: heading
        for name, heading in shown.items()
        if not len(last) or last[name].null_count() < len(last)
    }
    lines = [
        list(shown.values()),
        ["---"] * len(shown),
        *map(list, last.select(list(shown)).fill_null("").iter_rows()),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
