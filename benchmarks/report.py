"""`python -m benchmarks report`: the documents' tables and a page of charts, from the CSVs."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from benchmarks.computed import H200_CONFIGS, fed_column, h200_column, training_column
from benchmarks.page import OWN_MARK, last_rows, read_results, render_page
from benchmarks.settings import ALL, CAMPAIGNS, TablesSettings
from infer.submission.rehearsal import FULL_ROWS
from isic.runtime.config import describe_configs
from isic.runtime.errors import UserError, did_you_mean
from isic.runtime.files import read_text, refuse_foreign, write_text
from train.augmentation.levels import LEVELS

Lookup = Callable[[Path], Mapping[str, str]]
"""Reads values by config for a column that is not in the table's CSV, from a folder of CSVs."""


@dataclass(frozen=True)
class Table:
    """A table of a document: the last row of each kind in a CSV."""

    csv: str
    key: tuple[str, ...]
    """Columns that identify a kind of row."""
    columns: dict[str, str]
    """Heading by column."""
    rows: tuple[tuple[str, ...], ...] = ()
    """The kinds to show, as values of `key`, in this order; all if empty."""
    sort: tuple[str, ...] = ()
    """Columns to sort by, numbers as numbers; otherwise kinds keep the order of the CSV."""
    lookups: dict[str, Lookup] = field(default_factory=dict)
    """Source by column, for columns of other files."""


def config_titles(results: Path) -> dict[str, str]:
    """Return the network of each model config, from the start of its file's first line."""
    titles = describe_configs()
    return {name: re.split(r" at |[,:.]", title)[0] for name, title in titles.items()}


def cpu_rate(engine: str, precision: str) -> Lookup:
    """Return the lookup of an engine's last rate on two CPU cores, in images per second."""

    def rates(results: Path) -> dict[str, str]:
        rows = read_results(results / "throughput.csv")
        wanted = {
            "engine": engine,
            "precision": precision,
            "device": "cpu",
            "batch": "16",
            "cores": "2",
        }
        measured = pl.col("images_per_second").is_not_null()
        is_wanted = [pl.col(name) == value for name, value in wanted.items()]
        last = last_rows(rows.filter(measured, *is_wanted), ("what",))
        return dict(last.select("what", "images_per_second").iter_rows())

    return rates


def submission_hours(precision: str, num_models: int) -> Lookup:
    """Return the lookup of the hours for a hidden test set on two CPU cores by ONNX Runtime.

    Args:
        precision: of the engines.
        num_models: 5 for the folds, 1 for fold_all.
    """
    rate = cpu_rate("onnx", precision)

    def hours(results: Path) -> dict[str, str]:
        seconds = {name: num_models * FULL_ROWS / float(of) for name, of in rate(results).items()}
        return {name: f"{value / 3600:.1f}" for name, value in seconds.items()}

    return hours


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
    "in_flight": "batches at once",
    "one_at_a_time": "images/s, one at a time",
    "p50_ms": "ms, median",
    "p99_ms": "ms, 99th percentile",
    "peak_mb": "peak MB",
    "of_matmul": "of the matmul rate",
    "of_copy": "of the copy bandwidth",
    "bound_by": "bound by",
    "cosine": "cosine",
    "reason": "reason if not measured",
}
COMPARED = {
    "difference": "pAUC above the first, mean of seeds",
    "better_in": "better in",
    "p": "p",
    "low": "95 % of patient resamples: from",
    "high": "to",
    "verdict": "verdict",
}
"""Columns of `infer.ensemble.scoring.comparison.Comparison.row`."""
OUTCOMES = {
    "attempts": "attempts",
    "survived": "survived",
    "refused": "refused with a sentence",
    "failed": "failed",
}
"""Columns of `benchmarks.faults.log.count_outcomes`."""
TABLES = {
    "throughput": Table(
        "throughput",
        ("accelerator", "what", "engine", "precision", "batch", "device", "input"),
        THROUGHPUT,
        sort=("what", "accelerator", "engine", "precision", "batch"),
    ),
    "correctness": Table(
        "correctness",
        ("accelerator", "what", "check", "precision", "device"),
        {
            "what": "config",
            "device": "device",
            "check": "check",
            "precision": "precision",
            "batches": "batch sizes",
            "cosine": "least cosine",
            "max_logit_error": "logit error",
            "loss": "loss",
            "gradient_norm": "norm of the gradient",
            "reason": "reason if not correct",
        },
        sort=("what", "accelerator", "check", "precision"),
    ),
    "configs": Table(
        "configs",
        ("what",),
        {
            "what": "config",
            "title": "network",
            "size": "px",
            "parameters_m": "million parameters",
            "features": "features",
            "eager_fp32": "PyTorch fp32",
            "onnx_fp32": "ONNX fp32",
            "onnx_int8": "ONNX int8",
            "aoti_bf16": "AOTInductor bf16",
        },
        sort=("parameters_m",),
        lookups={
            "title": config_titles,
            "eager_fp32": cpu_rate("eager", "fp32"),
            "onnx_fp32": cpu_rate("onnx", "fp32"),
            "onnx_int8": cpu_rate("onnx", "int8"),
            "aoti_bf16": cpu_rate("aoti", "bf16"),
        },
    ),
    "hours": Table(
        "configs",
        ("what",),
        {
            "what": "config",
            "folds_fp32": "fp32, five folds",
            "all_fp32": "fp32, fold_all",
            "folds_int8": "int8, five folds",
            "all_int8": "int8, fold_all",
        },
        sort=("parameters_m",),
        lookups={
            "folds_fp32": submission_hours("fp32", 5),
            "all_fp32": submission_hours("fp32", 1),
            "folds_int8": submission_hours("int8", 5),
            "all_int8": submission_hours("int8", 1),
        },
    ),
    "h200": Table(
        "configs",
        ("what",),
        {
            "what": "config",
            "engine": "engine alone",
            "processes": "decoder processes",
            "share": "of the engine",
            "threads": "decoder threads",
            "d4_graph": "d4 in the graph",
            "d4_host": "d4 on the host",
        },
        rows=tuple((name,) for name in H200_CONFIGS),
        lookups={
            name: h200_column(name)
            for name in ("engine", "processes", "share", "threads", "d4_graph", "d4_host")
        },
    ),
    "pipeline": Table(
        "pipeline",
        ("what", "data"),
        {
            "what": "part, with stand-ins for the rest",
            "images_per_second": "images/s",
            "cpu_us": "CPU time of the engine's process, µs per image",
            "control_us": "of its control thread",
            "share": "of the engine's own rate",
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
            "reason": "reason if not compared",
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
            "reason": "reason if not measured",
        },
    ),
    "embed": Table(
        "embed",
        ("accelerator", "what", "data", "images", "tta", "num_threads"),
        {
            "what": "engine",
            "data": "data",
            "images": "images per repeat",
            "tta": "views",
            "num_threads": "decoders",
            "ingest": "reading only, images/s",
            "engine": "engine only",
            "end_to_end": "end to end",
            "share": "share of the slower of the two",
        },
    ),
    "growth": Table(
        "embed",
        ("accelerator", "what", "data", "images", "decode_in"),
        {
            "what": "engine",
            "data": "data",
            "images": "images",
            "decode_in": "decoders",
            "seconds": "seconds",
            "start_seconds": "start-up seconds",
            "us_per_row": "the rest, µs per image",
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
            "start_seconds": "start-up seconds",
            "us_per_row": "the rest, µs per row",
            "peak_mb": "peak MB",
            "ours_is_faster_by": "ours is faster by",
            "rows_per_second": "rows/s",
        },
        sort=("what", "accelerator", "rows"),
    ),
    "networks": Table(
        "networks",
        ("features", "networks", "width", "rows"),
        {
            "features": "features",
            "networks": "networks",
            "width": "features of each",
            "columns": "columns",
            "rows": "rows",
            "cpu_seconds": "CPU seconds (median)",
            "peak_mb": "peak MB",
        },
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
        (
            *("what", "model", "device", "batch", "precision", "compile", "workers", "busy"),
            *("augment_on", "size"),
        ),
        {
            "what": "config",
            "device": "device",
            "size": "px",
            "batch": "batch x accumulated",
            "precision": "precision",
            "compile": "compiled",
            "workers": "loader processes",
            "busy": "other busy processes",
            "augment_on": "augmentation, if not in the workers",
            "threads": "threads",
            "images_per_second": "images/s",
            "over_bare": "over a bare loop",
            "over_bare_min": "min",
            "over_bare_max": "max",
            "over_memory": "over the same loop in memory",
            "waiting": "share of time waiting for data",
            "mfu": "MFU",
        },
        sort=("accelerator", "what", "workers", "busy"),
    ),
    "augment": Table(
        "augment",
        ("what", "source", "size"),
        {
            "source": "images from",
            "what": "augmentation",
            "size": "px",
            "images_per_second": "images/s of a core (median)",
            "min": "min",
            "max": "max",
        },
    ),
    "starved": Table(
        "configs",
        ("what",),
        {"what": "config", "training": "training, images/s", **{level: level for level in LEVELS}},
        rows=tuple((name,) for name in H200_CONFIGS),
        lookups={
            "training": training_column,
            **{level: fed_column(level) for level in LEVELS},
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
            "pauc_by_fold": "pAUC by fold",
        },
    ),
    "comparisons": Table(
        "comparisons",
        ("data", "first", "second"),
        {
            "data": "data",
            "first": "first",
            "first_pauc": "its pAUC",
            "second": "second",
            "second_pauc": "its pAUC",
            **COMPARED,
        },
    ),
    "submissions": Table(
        "submissions",
        ("data", "what", "first"),
        {
            "data": "data",
            "what": "submission",
            "rows": "rows",
            "positives": "positives",
            "pauc": "pAUC",
            "pauc_low": "95 % of patient resamples: from",
            "pauc_high": "to",
            "auc": "AUC",
            "first": "compared with",
            "difference": "above it by",
            "low": "from",
            "high": "to",
            "verdict": "verdict",
            "rank_correlation": "rank correlation with it",
        },
    ),
    "scores": Table(
        "accuracy",
        ("data", "what"),
        {
            "data": "data",
            "what": "model",
            "rows": "rows",
            "positives": "positives",
            "pauc_pooled": "pAUC, pooled",
            "pauc_std_of_folds": "± between folds",
            "auc_pooled": "AUC",
        },
        rows=(
            ("real crops", "scratch, images only"),
            ("real crops", "scratch_eight_views, ensemble"),
            ("real crops, ImageNet weights", "efficientnet_lite0_eight_views, ensemble"),
            ("real crops, ImageNet weights", "two_networks_eight_views, ensemble"),
            ("real tables", "numeric_wide_use, ensemble"),
            ("real tables", "raw, ensemble"),
            ("real tables", "engineered, ensemble"),
            ("synthetic, 401,059 rows", "image_demo, ensemble"),
            ("synthetic, 401,059 rows", "engineered, ensemble"),
            ("synthetic, 401,059 rows", "multimodal_demo, ensemble"),
        ),
    ),
    "start": Table(
        "start",
        ("what",),
        {
            "what": "command",
            "cpu_seconds": "CPU seconds (median)",
        },
        rows=(
            ("isic --version",),
            ("isic check --data /nowhere",),
            ("train --help",),
            ("export --help",),
            ("infer embed --help",),
            ("infer fit --help",),
            ("infer fit --no_such_key 1",),
            ("benchmarks throughput --help",),
        ),
    ),
    "faults": Table(
        "faults",
        ("campaign", "target"),
        {"campaign": "campaign", **OUTCOMES},
        rows=tuple((campaign, ALL) for campaign in CAMPAIGNS),
    ),
    "fault_targets": Table(
        "faults",
        ("campaign", "target"),
        {"campaign": "campaign", "target": "target", **OUTCOMES},
        sort=("campaign", "target"),
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


def report(settings: TablesSettings) -> None:
    """Run `benchmarks report`, which its settings describe."""
    is_own = settings.page.is_file() and OWN_MARK in read_text(settings.page)
    refuse_foreign([settings.page], is_own, "--page")
    for path in settings.documents:
        write_text(path, with_tables(read_text(path), settings.results))
    write_text(settings.page, render_page(settings.results))
    documents = ", ".join(map(str, settings.documents))
    print(f"wrote the tables of {documents}, and {settings.page}")


def with_tables(text: str, results: Path) -> str:
    """Return a Markdown text with the tables between its marks made from the CSVs."""
    return MARK.sub(lambda match: match[1] + _table_text(match[2], results) + match[3], text)


def _table_text(name: str, results: Path) -> str:
    if name not in TABLES:
        raise UserError(f'there is no table "{name}", {did_you_mean(name, TABLES)}')
    path = results / f"{TABLES[name].csv}.csv"
    if not path.is_file():
        raise UserError(f"the table {name} needs {path}; run the benchmark first")
    last = last_rows(read_results(path), TABLES[name].key)
    return render_markdown(_with_lookups(last, TABLES[name].lookups, results), TABLES[name])


def _with_lookups(rows: pl.DataFrame, lookups: Mapping[str, Lookup], results: Path) -> pl.DataFrame:
    """Add the columns of other files; a config that they lack is blank."""
    for name, lookup in lookups.items():
        values = pl.col("what").replace_strict(
            lookup(results), default=None, return_dtype=pl.String
        )
        rows = rows.with_columns(values.alias(name))
    return rows


def render_markdown(rows: pl.DataFrame, table: Table) -> str:
    """Render the measured rows of a table; columns that are blank in all are omitted."""
    shown = _selected(_sorted(rows, table.sort), table)
    measured = [name for name in table.columns if name in shown.columns and name not in table.key]
    has_value = pl.any_horizontal(pl.col(name).is_not_null() for name in measured)
    shown = shown.filter(has_value)
    names = [name for name in table.columns if _is_filled(shown, name)]
    lines = [
        [table.columns[name] for name in names],
        ["---"] * len(names),
        *map(list, shown.select(names).fill_null("").iter_rows()),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _sorted(rows: pl.DataFrame, columns: tuple[str, ...]) -> pl.DataFrame:
    """Sort text columns: numbers first as numbers, then other values as text."""
    keys = []
    for name in columns:
        if name in rows.columns:
            keys += [pl.col(name).cast(pl.Float64, strict=False), pl.col(name)]
    return rows.sort(keys) if keys else rows


def _selected(rows: pl.DataFrame, table: Table) -> pl.DataFrame:
    """Return the rows of the table's kinds, in their order."""
    if not table.rows:
        return rows
    kinds = pl.DataFrame(table.rows, schema=table.key, orient="row")
    return kinds.join(rows, on=table.key, maintain_order="left")


def _is_filled(rows: pl.DataFrame, name: str) -> bool:
    """Return whether a column has a value in some row, or the table has no rows."""
    if name not in rows.columns:
        return False
    return rows.is_empty() or rows[name].null_count() < len(rows)
