"""`python -m benchmarks check`: is anything slower than the last time on the same kind of machine, beyond noise?"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from pydantic import Field

from benchmarks.record import MACHINE, RESULTS
from isic.runtime.config import Settings, Several
from isic.runtime.errors import UserError, did_you_mean
from isic.tables import read_csv


@dataclass(frozen=True)
class Speed:
    """Where a CSV says how fast something is."""

    key: tuple[str, ...]
    """Columns that tell one thing from another."""
    rate: str
    """Larger is better."""
    low: str | None = None
    high: str | None = None
    """The least and the most of the repeats, where they are known."""
    yardstick: str | None = None
    """What the machine did in the same run at something that is not ours: a virtual machine that has half its speed on
    some days is no slowdown. None where the rate is a ratio already."""


SPEEDS = {
    "throughput": Speed(
        ("what", "engine", "precision", "batch", "device", "input", "matmul_by"),
        *("images_per_second", "min", "max", "matmul_gflops"),
    ),
    "peers": Speed(("what", "data", "batch", "ours", "peer"), "ratio", "ratio_min", "ratio_max"),
    "ingest": Speed(("what", "images", "size"), "of_bare", "of_bare_min", "of_bare_max"),
    "embed": Speed(("what", "data", "images"), "share"),
    "train": Speed(
        ("what", "model", "device", "batch", "precision", "compile", "workers", "busy", "size"),
        *("over_bare", "over_bare_min", "over_bare_max"),
    ),
}


class CheckSettings(Settings):
    """What `python -m benchmarks check` takes."""

    benchmark: Several[str] = Field(
        (), description="CSVs to look at, separated by commas; all if not given"
    )
    tolerance: float = Field(0.05, ge=0, lt=1, description="slowdown that is never complained of")
    noise: float = Field(
        0.1, ge=0, lt=1, description="spread of a figure whose repeats are not in its row"
    )
    results: Path = Field(RESULTS, description="folder of the CSVs")


@dataclass(frozen=True)
class Change:
    """The last figure of a thing as a ratio to the one before it, and the bounds within which it may lie."""

    name: str
    ratio: float
    low: float
    high: float

    def is_slower(self, tolerance: float) -> bool:
        """Whether even the best of the last repeats is slower than the worst of those before, and by enough."""
        return self.high < 1 and self.ratio < 1 - tolerance


def check(settings: CheckSettings) -> int:
    """Compares each last figure with the one before it, by what the machine itself did at the time.

    Exits with 1 where one is slower beyond noise.
    """
    unknown = [name for name in settings.benchmark if name not in SPEEDS]
    if unknown:
        raise UserError(
            f'--benchmark: nothing to check in "{unknown[0]}", {did_you_mean(unknown[0], SPEEDS)}'
        )
    changes = []
    for name in settings.benchmark or SPEEDS:
        path = settings.results / f"{name}.csv"
        if path.is_file():
            changes += list(find_changes(read_csv(path), SPEEDS[name], name, settings.noise))
    slower = [change for change in changes if change.is_slower(settings.tolerance)]
    for change in sorted(changes, key=lambda change: change.ratio):
        mark = "SLOWER" if change in slower else "ok"
        print(
            f"{mark:6} {change.ratio:6.2f} ({change.low:.2f} to {change.high:.2f})  {change.name}"
        )
    print(
        f"{len(changes)} compared with the last on the same kind of machine, {len(slower)} slower beyond noise"
    )
    return 1 if slower else 0


def find_changes(rows: pl.DataFrame, speed: Speed, csv: str, noise: float) -> Iterator[Change]:
    """Yields a change for everything that stands in a CSV twice on one kind of machine."""
    needed = [name for name in (speed.rate, speed.yardstick) if name]
    if not set(needed) <= set(rows.columns):
        return
    key = [name for name in (*MACHINE, *speed.key) if name in rows.columns]
    measured = rows.filter(pl.all_horizontal(pl.col(needed).is_not_null() & (pl.col(needed) != "")))
    numbers = [name for name in (speed.rate, speed.low, speed.high) if name]
    unit = pl.col(speed.yardstick).cast(pl.Float64) if speed.yardstick else 1.0
    measured = measured.with_columns(pl.col(numbers).cast(pl.Float64) / unit)
    for _, group in measured.group_by(key, maintain_order=True):
        if len(group) > 1:
            before, last = (
                _bounds(row, speed, noise) for row in group.tail(2).iter_rows(named=True)
            )
            named = group.row(-1, named=True)
            name = " · ".join(
                [csv, *(str(named[column]) for column in speed.key if named.get(column))]
            )
            yield Change(name, last[0] / before[0], last[1] / before[2], last[2] / before[1])


def _bounds(row: dict[str, float], speed: Speed, noise: float) -> tuple[float, float, float]:
    """Returns a figure with the least and the most that it may be."""
    rate = row[speed.rate]
    if speed.low is None or speed.high is None:
        return rate, rate * (1 - noise / 2), rate * (1 + noise / 2)
    return rate, row[speed.low], row[speed.high]
