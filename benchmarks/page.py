"""The page of `python -m benchmarks report`: how fast, against the limit, against peers, over time, and every table."""

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

HEADING = "What it costs"
DECADES = tuple(10.0**power for power in range(-3, 4))
NOT_SHOWN = ("versions", "python", "commit", "time")
GROWS = ("data", "images", "rows")


def read(path: Path) -> pl.DataFrame:
    """Reads a CSV of results as text.

    Where it has seconds and a number of rows, the cost of a row beyond that of starting is added.
    """
    rows = read_csv(path)
    needed = (*MACHINE, "device")
    rows = rows.with_columns(
        pl.lit(None, pl.String).alias(name) for name in needed if name not in rows.columns
    )
    number = next((name for name in ("images", "rows") if name in rows.columns), None)
    if number is None or "seconds" not in rows.columns:
        return rows
    start = (
        pl.col("start_seconds").cast(pl.Float64).fill_null(0)
        if "start_seconds" in rows.columns
        else 0.0
    )
    cost = 1e6 * (pl.col("seconds").cast(pl.Float64) - start) / pl.col(number).cast(pl.Float64)
    return rows.with_columns(us_per_row=cost.round(1).cast(pl.String))


def last_rows(rows: pl.DataFrame, key: Sequence[str]) -> pl.DataFrame:
    """Returns the last row of each kind, in the order in which the kinds first appeared."""
    present = [name for name in key if name in rows.columns]
    return rows.unique(present, keep="last", maintain_order=True)


def render(results: Path) -> str:
    """Returns the page about a folder of CSVs: one file of HTML, without scripts, that loads nothing."""
    tables = {path.stem: read(path) for path in sorted(results.glob("*.csv"))}
    sections: list[Section] = []
    if "throughput" in tables:
        measured = _numbers(tables["throughput"])
        sections += [_throughput(measured), _limit(measured), _time(measured)]
    if "peers" in tables:
        sections.append(_peers(tables["peers"]))
    sections += _growth(tables)
    sections.append(_tables(tables))
    head = (
        tag("p", "isic-toolkit", class_="over"),
        tag("h1", HEADING),
        tag(
            "p",
            "Every figure was measured by a command of this toolkit; its row names the machine.",
            class_="lead",
        ),
        page.links(name for name, _, _ in sections),
    )
    body = (page.section(name, title, *content) for name, title, content in sections)
    return page.document("Benchmarks", tag("header", *head), tag("main", *body))


NUMBERS = ("images_per_second", "min", "max", "limit_images_per_second", "gflop_per_image")


def _numbers(rows: pl.DataFrame) -> pl.DataFrame:
    """Returns the rows that were measured, their figures as numbers."""
    needed = (*NUMBERS, *KEY[1:], "bound_by")
    rows = rows.with_columns(
        pl.lit(None, pl.String).alias(name) for name in needed if name not in rows.columns
    )
    rows = rows.with_columns(pl.col(NUMBERS).cast(pl.Float64))
    rows = rows.filter(pl.col("images_per_second").is_not_null())
    share = pl.col("images_per_second") / pl.col("limit_images_per_second")
    return rows.with_columns(machine=_machine(), share=share)


def _machine() -> pl.Expr:
    on_gpu = (pl.col("device").fill_null("cuda") == "cuda") & pl.col("accelerator").is_not_null()
    processor = pl.concat_str(pl.col("processor"), pl.lit(", "), pl.col("cores"), pl.lit(" cores"))
    return pl.when(on_gpu).then(pl.col("accelerator")).otherwise(processor)


KEY = ("machine", "what", "engine", "precision", "batch", "device", "input")


def _throughput(rows: pl.DataFrame) -> Section:
    best = last_rows(rows, KEY).sort("images_per_second", descending=True)
    best = best.unique(["machine", "what"], keep="first", maintain_order=True)
    groups = best.group_by("machine", maintain_order=True)
    content = (_alone(_fastest(machine, part)) for (machine,), part in groups)
    intro = "The fastest engine of each config, and how much of the machine's limit it reaches."
    return "Throughput", "Images a second", (tag("p", intro), *content)


def _alone(table: Markup) -> Markup:
    """A table with the page's width to itself."""
    return tag("div", table, class_="tables")


def _fastest(machine: Any, rows: pl.DataFrame) -> Markup:
    lines = rows.select(
        "what",
        "engine",
        "precision",
        "batch",
        "images_per_second",
        "min",
        "max",
        "bound_by",
        "share",
    )
    cells = (
        (
            what,
            f"{engine} {precision}",
            batch,
            f"{rate:,.1f}",
            f"{low:,.1f} to {high:,.1f}",
            page.NONE if share is None else page.percent(share),
            bound or page.NONE,
        )
        for what, engine, precision, batch, rate, low, high, bound, share in lines.iter_rows()
    )
    heading = ("config", "engine", "batch", "images/s", "spread", "of the limit", "bound by")
    return page.table(str(machine), heading, cells)


def _limit(rows: pl.DataFrame) -> Section:
    last = last_rows(rows, KEY).filter(
        pl.col("share").is_not_null() & pl.col("gflop_per_image").is_not_null()
    )
    figures = [
        _limit_figure(str(machine), part)
        for (machine,), part in last.group_by("machine", maintain_order=True)
    ]
    intro = (
        "Each dot is an engine at its best batch. At 1 it would do what the machine's matrix products or its memory "
        "allow, whichever is less; both were measured in the same run."
    )
    return "Limit", "Against the limit", (tag("p", intro), tag("div", *figures, class_="figures"))


def _limit_figure(machine: str, rows: pl.DataFrame) -> Markup:
    best = rows.sort("images_per_second").unique(
        ["what", "engine", "precision"], keep="last", maintain_order=True
    )
    x = _log_axis("operations an image, GFLOP", best["gflop_per_image"])
    high = max(1.0, math.ceil(5 * best["share"].max()) / 5)  # type: ignore[operator, arg-type]
    y = Axis("share of the limit", 0, high, [at / 5 for at in range(round(5 * high) + 1)])
    plot = Plot(x, y, f"Share of the limit by size of the network on {machine}")
    columns = (
        "what",
        "engine",
        "precision",
        "batch",
        "gflop_per_image",
        "images_per_second",
        "share",
    )
    dots = (
        plot.dot(
            size,
            share,
            "",
            f"{what}, {engine} {precision}, batch {batch}: {rate:,.1f} images/s, {share:.0%}",
        )
        for what, engine, precision, batch, size, rate, share in best.select(columns).iter_rows()
    )
    return tag("figure", tag("h3", machine), plot.draw(*dots))


def _log_axis(label: str, values: Iterable[float]) -> Axis:
    """Returns a logarithmic axis of whole decades around some values."""
    known = sorted(values)
    low = max([tick for tick in DECADES if tick <= known[0]], default=DECADES[0])
    high = min([tick for tick in DECADES if tick >= known[-1] and tick > low], default=DECADES[-1])
    return Axis(label, low, high, [tick for tick in DECADES if low <= tick <= high], log=True)


def _time(rows: pl.DataFrame) -> Section:
    figures = []
    for (machine,), part in rows.group_by("machine", maintain_order=True):
        again = (
            part.group_by(KEY, maintain_order=True)
            .agg("images_per_second", "time")
            .filter(pl.col("time").list.len() > 1)
        )
        if len(again):
            figures.append(_time_figure(str(machine), again))
    intro = "What was measured more than once on one kind of machine, relative to the first time."
    nothing = "Nothing has been measured twice on one kind of machine yet."
    content = tag("div", *figures, class_="figures") if figures else tag("p", nothing)
    return "Time", "Over time", (tag("p", intro), content)


def _time_figure(machine: str, series: pl.DataFrame) -> Markup:
    longest = int(series["time"].list.len().max())  # type: ignore[arg-type]
    ratios = [
        [rate / rates[0] for rate in rates] for rates in series["images_per_second"].to_list()
    ]
    high = max(1.5, *(max(ratio) for ratio in ratios))
    step = 0.5 if high <= 3 else 1.0
    ticks = [step * at for at in range(int(high / step) + 2)]
    x = Axis("measurement", 1, longest, list(range(1, longest + 1)))
    plot = Plot(
        x, Axis("rate relative to the first", 0, ticks[-1], ticks), f"Rates over time on {machine}"
    )
    lines = [
        plot.line(
            list(range(1, len(ratio) + 1)),
            ratio,
            "part",
            " ".join([name[1], name[2], name[3], f"batch {name[4]}"]),
        )
        for ratio, name in zip(ratios, series.select(KEY).iter_rows(), strict=True)
    ]
    return tag("figure", tag("h3", machine), plot.draw(*lines))


def _peers(rows: pl.DataFrame) -> Section:
    last = last_rows(rows, (*MACHINE, "what", "data", "batch", "ours", "peer"))
    columns = (
        "what",
        "ours",
        "peer",
        "ratio",
        "ratio_min",
        "ratio_max",
        "cosine_same_pixels",
        "cosine",
    )
    last = last.with_columns(
        pl.lit(None, pl.String).alias(name) for name in columns if name not in last.columns
    )
    heading = (
        "config and peer",
        "ours",
        "ours is faster by",
        "spread",
        "least cosine, same pixels",
        "own pixels",
    )

    def cells(part: pl.DataFrame) -> Iterator[tuple[str, ...]]:
        for what, ours, peer, ratio, low, high, same, own in part.select(columns).iter_rows():
            figures = (
                (f"{ratio} times", f"{low} to {high}") if ratio else ("not measured", page.NONE)
            )
            yield f"{what}: {peer}", ours, *figures, same or page.NONE, own or page.NONE

    tables = (
        _alone(page.table(machine, heading, cells(part))) for machine, part in _by_machine(last)
    )
    intro = (
        "The same images and the same weights, in turns, from the file to features. Same pixels: decoded and resized "
        "once for all; own pixels: by each way, of which those that use PIL antialias where they shrink."
    )
    return "Peers", "Against what people use", (tag("p", intro), *tables)


def _by_machine(rows: pl.DataFrame) -> Iterator[tuple[str, pl.DataFrame]]:
    """Yields the rows of each machine, the last measured first."""
    groups = (
        rows.with_columns(machine=_machine()).reverse().partition_by("machine", maintain_order=True)
    )
    return ((str(part["machine"][0]), part.reverse()) for part in groups)


def _growth(tables: dict[str, pl.DataFrame]) -> list[Section]:
    shown = []
    for name in ("embed", "tabular"):
        rows = tables.get(name, pl.DataFrame())
        if "us_per_row" in rows.columns:
            rows = rows.filter(pl.col("us_per_row").is_not_null())
            shown += [
                _alone(_growth_table(f"{name}, {machine}", part))
                for machine, part in _by_machine(rows)
            ]
    intro = "Whole runs: what a row costs should not depend on how many there are, and memory should not grow."
    return [("Growth", "As work grows", (tag("p", intro), *shown))] if shown else []


def _growth_table(title: str, rows: pl.DataFrame) -> Markup:
    number = "images" if "images" in rows.columns else "rows"
    last = last_rows(rows, (*MACHINE, "what", *GROWS))
    cells = (
        (what, f"{float(count):,.0f}", seconds, cost, peak or page.NONE)
        for what, count, seconds, cost, peak in last.select(
            "what",
            number,
            "seconds",
            "us_per_row",
            "peak_mb" if "peak_mb" in last.columns else pl.lit(None),
        ).iter_rows()
    )
    return page.table(title, ("what", number, "seconds", "µs each", "peak MB"), cells)


def _tables(tables: dict[str, pl.DataFrame]) -> Section:
    content = (_whole(name, rows) for name, rows in tables.items())
    return "Tables", "Every table", (tag("p", "All rows there are, the newest first."), *content)


def _whole(name: str, rows: pl.DataFrame) -> Markup:
    shown = [
        column
        for column in rows.columns
        if column not in NOT_SHOWN and rows[column].null_count() < len(rows)
    ]
    shown = sorted(
        shown, key=lambda column: column in MACHINE
    )  # what was measured comes first, where comes last
    cells = (
        [value or page.NONE for value in row]
        for row in rows.reverse().select(*shown, "time", "commit").iter_rows()
    )
    table = page.table(
        name, [*(column.replace("_", " ") for column in shown), "time", "commit"], cells
    )
    return tag("details", tag("summary", join(name, f", {len(rows)} rows")), table)
