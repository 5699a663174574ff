"""The page of `python -m benchmarks report`: speed, limits, peers, changes, and every table."""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from benchmarks.record import MACHINE
from isic.html import page
from isic.html.markup import Markup, join, tag
from isic.html.plot import Axis, Plot
from isic.tables import read_csv

Section = tuple[str, str, tuple[Markup, ...]]
"""Name, title and content."""

HEADING = "Benchmarks of the toolkit"
OWN_MARK = tag("p", "isic-toolkit", class_="over")
"""A file with it was written by this command and may be replaced."""
DECADES = tuple(10.0**power for power in range(-3, 4))
NOT_SHOWN = ("versions", "python", "commit", "time")
GROWS = ("data", "images", "rows")
KEY = ("machine", "what", "engine", "precision", "batch", "device", "input")
"""Columns that identify a measurement of throughput."""
NUMBERS = ("images_per_second", "min", "max", "limit_images_per_second", "gflop_per_image")


def read_results(path: Path) -> pl.DataFrame:
    """Read a CSV of results as text.

    If it has seconds and a number of rows, `us_per_row` is added: the cost of a row without that
    of starting, in microseconds.
    """
    rows = _with_columns(read_csv(path), (*MACHINE, "device"))
    counts = [name for name in ("images", "rows") if name in rows.columns]
    if not counts or "seconds" not in rows.columns:
        return rows
    rows = _with_columns(rows, ("start_seconds",))
    start = pl.col("start_seconds").cast(pl.Float64).fill_null(0)
    seconds = pl.col("seconds").cast(pl.Float64) - start
    cost = 1e6 * seconds / pl.col(counts[0]).cast(pl.Float64)
    return rows.with_columns(us_per_row=cost.round(1).cast(pl.String))


def _with_columns(rows: pl.DataFrame, names: Iterable[str]) -> pl.DataFrame:
    """Return the rows with blank columns for those that are missing."""
    missing = [name for name in names if name not in rows.columns]
    return rows.with_columns(pl.lit(None, pl.String).alias(name) for name in missing)


def last_rows(rows: pl.DataFrame, key: Sequence[str]) -> pl.DataFrame:
    """Return the last row of each kind, in the order in which the kinds first appeared."""
    present = [name for name in key if name in rows.columns]
    return rows.unique(present, keep="last", maintain_order=True)


def render_page(results: Path) -> str:
    """Return the page about a folder of CSVs as one HTML file that loads nothing."""
    tables = {path.stem: read_results(path) for path in sorted(results.glob("*.csv"))}
    sections: list[Section] = []
    if "throughput" in tables:
        measured = _measured(tables["throughput"])
        sections += [_throughput(measured), _limit(measured), _time(measured)]
    if "peers" in tables:
        sections.append(_peers(tables["peers"]))
    sections += _growth(tables)
    sections.append(_tables(tables))
    command = tag("code", "python -m benchmarks")
    lead = tag(
        "p", "Values are measured by ", command, "; each row has its machine.", class_="lead"
    )
    header = tag(
        "header",
        OWN_MARK,
        tag("h1", HEADING),
        lead,
        page.links(name for name, _, _ in sections),
    )
    body = (page.section(name, title, *content) for name, title, content in sections)
    return page.document("Benchmarks", header, tag("main", *body))


def _measured(rows: pl.DataFrame) -> pl.DataFrame:
    """Return the rows of throughput with a rate, their NUMBERS as numbers."""
    rows = _with_columns(rows, (*NUMBERS, *KEY[1:], "bound_by"))
    rows = rows.with_columns(pl.col(NUMBERS).cast(pl.Float64))
    rows = rows.filter(pl.col("images_per_second").is_not_null())
    share = pl.col("images_per_second") / pl.col("limit_images_per_second")
    return rows.with_columns(machine=_machine(), share=share)


def _machine() -> pl.Expr:
    """The GPU of a row, or its processor and cores."""
    on_gpu = (pl.col("device").fill_null("cuda") == "cuda") & pl.col("accelerator").is_not_null()
    processor = pl.concat_str(pl.col("processor"), pl.lit(", "), pl.col("cores"), pl.lit(" cores"))
    return pl.when(on_gpu).then(pl.col("accelerator")).otherwise(processor)


def _throughput(rows: pl.DataFrame) -> Section:
    best = last_rows(rows, KEY).sort("images_per_second", descending=True)
    best = best.unique(["machine", "what"], keep="first", maintain_order=True)
    groups = best.group_by("machine", maintain_order=True)
    tables = (_full_width(_fastest(str(machine), part)) for (machine,), part in groups)
    intro = "The fastest engine of each config, and its share of the machine's limit."
    return "Throughput", "Images per second", (tag("p", intro), *tables)


def _full_width(table: Markup) -> Markup:
    return tag("div", table, class_="tables")


def _fastest(machine: str, rows: pl.DataFrame) -> Markup:
    heading = ("config", "engine", "batch", "images/s", "spread", "of the limit", "bound by")
    cells = (
        (
            row["what"],
            f"{row['engine']} {row['precision']}",
            row["batch"],
            f"{row['images_per_second']:,.1f}",
            f"{row['min']:,.1f} to {row['max']:,.1f}",
            page.NONE if row["share"] is None else page.percent(row["share"]),
            row["bound_by"] or page.NONE,
        )
        for row in rows.iter_rows(named=True)
    )
    return page.table(machine, heading, cells)


def _limit(rows: pl.DataFrame) -> Section:
    is_known = pl.col("share").is_not_null() & pl.col("gflop_per_image").is_not_null()
    groups = last_rows(rows, KEY).filter(is_known).group_by("machine", maintain_order=True)
    figures = [_limit_figure(str(machine), part) for (machine,), part in groups]
    intro = (
        "Each dot is an engine at its best batch size. The limit, 1, is the rate that the "
        "machine's matrix products or its memory allow, whichever is less; both were measured in "
        "the same run."
    )
    content = (tag("p", intro), tag("div", *figures, class_="figures"))
    return "Limit", "Compared with the limit", content


def _limit_figure(machine: str, rows: pl.DataFrame) -> Markup:
    best = rows.sort("images_per_second").unique(
        ["what", "engine", "precision"], keep="last", maintain_order=True
    )
    x = _log_axis("operations per image, GFLOP", best["gflop_per_image"].to_list())
    num_steps = math.ceil(5 * max(1.0, *best["share"].to_list()))
    ticks = [step / 5 for step in range(num_steps + 1)]
    y = Axis("share of the limit", 0, ticks[-1], ticks)
    plot = Plot(x, y, f"Share of the limit by size of the network on {machine}")
    dots = (
        plot.dot(row["gflop_per_image"], row["share"], "", _dot_title(row))
        for row in best.iter_rows(named=True)
    )
    return page.figure(machine, plot.draw(*dots))


def _dot_title(row: dict[str, Any]) -> str:
    engine = f"{row['what']}, {row['engine']} {row['precision']}, batch {row['batch']}"
    return f"{engine}: {row['images_per_second']:,.1f} images/s, {row['share']:.0%}"


def _log_axis(label: str, values: Sequence[float]) -> Axis:
    """Return a logarithmic axis of whole decades around some values."""
    low = max([tick for tick in DECADES if tick <= min(values)], default=DECADES[0])
    above = [tick for tick in DECADES if tick >= max(values) and tick > low]
    high = min(above, default=DECADES[-1])
    return Axis(label, low, high, [tick for tick in DECADES if low <= tick <= high], log=True)


def _time(rows: pl.DataFrame) -> Section:
    figures = []
    for (machine,), part in rows.group_by("machine", maintain_order=True):
        series = part.group_by(KEY, maintain_order=True).agg("images_per_second")
        repeated = series.filter(pl.col("images_per_second").list.len() > 1)
        if len(repeated):
            figures.append(_time_figure(str(machine), repeated))
    intro = "Rates that were measured more than once on one kind of machine, divided by the first."
    content = tag("p", "Nothing has been measured twice on one kind of machine yet.")
    if figures:
        content = tag("div", *figures, class_="figures")
    return "Time", "Over time", (tag("p", intro), content)


def _time_figure(machine: str, series: pl.DataFrame) -> Markup:
    """Draw the rates of each measurement, which are lists, as a line."""
    ratios = [_relative(rates) for rates in series["images_per_second"].to_list()]
    longest = max(len(ratio) for ratio in ratios)
    x = Axis("measurement", 1, longest, list(range(1, longest + 1)))
    y = _ratio_axis("rate relative to the first", max(max(ratio) for ratio in ratios))
    plot = Plot(x, y, f"Rates over time on {machine}")
    lines = []
    for row, ratio in zip(series.iter_rows(named=True), ratios, strict=True):
        title = f"{row['what']} {row['engine']} {row['precision']} batch {row['batch']}"
        lines.append(plot.line(list(range(1, len(ratio) + 1)), ratio, "part", title))
    return page.figure(machine, plot.draw(*lines))


def _relative(rates: Sequence[float]) -> list[float]:
    return [rate / rates[0] for rate in rates]


def _ratio_axis(label: str, largest: float) -> Axis:
    """Return an axis from 0 to at least 1.5 with few ticks."""
    high = max(1.5, largest)
    step = 0.5 if high <= 3 else 1.0
    ticks = [step * number for number in range(int(high / step) + 2)]
    return Axis(label, 0, ticks[-1], ticks)


def _peers(rows: pl.DataFrame) -> Section:
    last = last_rows(rows, (*MACHINE, "what", "data", "batch", "ours", "peer"))
    ratios = ("ratio", "ratio_min", "ratio_max", "cosine_same_pixels", "cosine")
    last = _with_columns(last, ratios)
    tables = (_full_width(_peer_table(machine, part)) for machine, part in _by_machine(last))
    intro = (
        "The same images and weights, in turns, from the file to features. Same pixels: decoded "
        "and resized once for all. Own pixels: those that each library makes itself; PIL "
        "antialiases the images that it shrinks."
    )
    return "Peers", "Compared with other libraries", (tag("p", intro), *tables)


def _peer_table(machine: str, rows: pl.DataFrame) -> Markup:
    heading = (
        "config and peer",
        "ours",
        "ours is faster by",
        "spread",
        "least cosine, same pixels",
        "own pixels",
    )
    return page.table(machine, heading, map(_peer_cells, rows.iter_rows(named=True)))


def _peer_cells(row: dict[str, Any]) -> tuple[str, ...]:
    ratio = "not measured"
    spread = page.NONE
    if row["ratio"]:
        ratio = f"{row['ratio']} times"
        spread = f"{row['ratio_min']} to {row['ratio_max']}"
    return (
        f"{row['what']}: {row['peer']}",
        row["ours"],
        ratio,
        spread,
        row["cosine_same_pixels"] or page.NONE,
        row["cosine"] or page.NONE,
    )


def _by_machine(rows: pl.DataFrame) -> Iterator[tuple[str, pl.DataFrame]]:
    """Yield the rows of each machine, the last measured first."""
    newest_first = rows.with_columns(machine=_machine()).reverse()
    for part in newest_first.partition_by("machine", maintain_order=True):
        yield str(part["machine"][0]), part.reverse()


def _growth(tables: dict[str, pl.DataFrame]) -> list[Section]:
    shown = []
    for name in ("embed", "tabular"):
        rows = tables.get(name, pl.DataFrame())
        if "us_per_row" in rows.columns:
            measured = rows.filter(pl.col("us_per_row").is_not_null())
            for machine, part in _by_machine(measured):
                shown.append(_full_width(_growth_table(f"{name}, {machine}", part)))
    intro = (
        "Whole runs of different sizes. The cost of a row should not depend on their number, and "
        "memory should not grow."
    )
    return [("Growth", "As the work grows", (tag("p", intro), *shown))] if shown else []


def _growth_table(title: str, rows: pl.DataFrame) -> Markup:
    count = "images" if "images" in rows.columns else "rows"
    last = _with_columns(last_rows(rows, (*MACHINE, "what", *GROWS)), ("peak_mb",))
    cells = (
        (
            row["what"],
            f"{float(row[count]):,.0f}",
            row["seconds"],
            row["us_per_row"],
            row["peak_mb"] or page.NONE,
        )
        for row in last.iter_rows(named=True)
    )
    return page.table(title, ("what", count, "seconds", "µs each", "peak MB"), cells)


def _tables(tables: dict[str, pl.DataFrame]) -> Section:
    content = (_whole_table(name, rows) for name, rows in tables.items())
    return "Tables", "Every table", (tag("p", "All rows, the newest first."), *content)


def _whole_table(name: str, rows: pl.DataFrame) -> Markup:
    filled = [column for column in rows.columns if rows[column].null_count() < len(rows)]
    shown = [column for column in filled if column not in NOT_SHOWN]
    # The results first, the machine after them.
    shown = sorted(shown, key=lambda column: column in MACHINE)
    heading = [*(column.replace("_", " ") for column in shown), "time", "commit"]
    cells = (
        [value or page.NONE for value in row]
        for row in rows.reverse().select(*shown, "time", "commit").iter_rows()
    )
    table = page.table(name, heading, cells)
    return tag("details", tag("summary", join(name, f", {len(rows)} rows")), table)
