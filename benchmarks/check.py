"""`python -m benchmarks check`: find results that became slower, beyond noise."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import polars as pl

from benchmarks.record import MACHINE
from benchmarks.settings import SlowdownSettings
from isic.runtime.errors import UserError, did_you_mean
from isic.tables import read_csv


@dataclass(frozen=True)
class Speed:
    """The columns of a CSV that hold a speed."""

    key: tuple[str, ...]
    """Columns that, with the machine, identify a measurement."""
    rate: str
    """Larger is better."""
    low: str | None = None
    high: str | None = None
    """The least and the most of the repeats, if they are recorded."""
    unit: str | None = None
    """Speed of the machine in the same run, by which the rate is divided; None for a ratio."""


SPEEDS = {
    "throughput": Speed(
        ("what", "engine", "precision", "batch", "in_flight", "device", "input", "matmul_by"),
        rate="images_per_second",
        low="min",
        high="max",
        unit="matmul_gflops",
    ),
    "peers": Speed(
        ("what", "data", "batch", "ours", "peer"), rate="ratio", low="ratio_min", high="ratio_max"
    ),
    "ingest": Speed(
        ("what", "images", "size"), rate="of_bare", low="of_bare_min", high="of_bare_max"
    ),
    "embed": Speed(("what", "data", "images"), rate="share"),
    "train": Speed(
        ("what", "model", "device", "batch", "precision", "compile", "workers", "busy", "size"),
        rate="over_bare",
        low="over_bare_min",
        high="over_bare_max",
    ),
}


@dataclass(frozen=True)
class Change:
    """The last rate of a measurement divided by the previous one, with its bounds."""

    name: str
    ratio: float
    low: float
    high: float

    def is_slower(self, tolerance: float) -> bool:
        """Return whether it is slower by more than noise and tolerance."""
        # Even the best of the last repeats is then slower than the worst of the previous ones.
        return self.high < 1 and self.ratio < 1 - tolerance


def check(settings: SlowdownSettings) -> int:
    """Compare each last rate with the previous one; return 1 if one is slower beyond noise."""
    for name in settings.benchmark:
        if name not in SPEEDS:
            raise UserError(f'--benchmark: no speeds in "{name}", {did_you_mean(name, SPEEDS)}')
    changes: list[Change] = []
    for name in settings.benchmark or SPEEDS:
        path = settings.results / f"{name}.csv"
        if path.is_file():
            changes += find_changes(read_csv(path), SPEEDS[name], name, settings.noise)
    num_slower = 0
    for change in sorted(changes, key=lambda change: change.ratio):
        slower = change.is_slower(settings.tolerance)
        num_slower += slower
        mark = "SLOWER" if slower else "ok"
        bounds = f"({change.low:.2f} to {change.high:.2f})"
        print(f"{mark:6} {change.ratio:6.2f} {bounds}  {change.name}")
    print(
        f"{len(changes)} compared with the previous on the same kind of machine, "
        f"{num_slower} slower beyond noise"
    )
    return 1 if num_slower else 0


def find_changes(rows: pl.DataFrame, speed: Speed, csv: str, noise: float) -> Iterator[Change]:
    """Yield a change for each measurement that is in a CSV at least twice."""
    needed = [speed.rate, speed.unit] if speed.unit else [speed.rate]
    if not set(needed) <= set(rows.columns):
        return
    key = [name for name in (*MACHINE, *speed.key) if name in rows.columns]
    for _, group in _normalised(rows, speed, needed).group_by(key, maintain_order=True):
        if len(group) > 1:
            # The CSV is append-only, so its order is that of time.
            previous, last = group.tail(2).to_dicts()
            yield _change(previous, last, speed, csv, noise)


def _normalised(rows: pl.DataFrame, speed: Speed, needed: list[str]) -> pl.DataFrame:
    """Return the rows with a rate, in units of the machine's speed."""
    # A virtual machine may have half its speed on some days.
    is_known = pl.col(needed).is_not_null() & (pl.col(needed) != "")
    rates = [name for name in (speed.rate, speed.low, speed.high) if name]
    unit = pl.col(speed.unit).cast(pl.Float64) if speed.unit else 1.0
    return rows.filter(pl.all_horizontal(is_known)).with_columns(
        pl.col(rates).cast(pl.Float64) / unit
    )


def _change(
    previous: dict[str, Any], last: dict[str, Any], speed: Speed, csv: str, noise: float
) -> Change:
    words = [str(last[column]) for column in speed.key if last.get(column)]
    previous_low, previous_high = _bounds(previous, speed, noise)
    last_low, last_high = _bounds(last, speed, noise)
    return Change(
        name=" · ".join([csv, *words]),
        ratio=last[speed.rate] / previous[speed.rate],
        low=last_low / previous_high,
        high=last_high / previous_low,
    )


def _bounds(row: dict[str, Any], speed: Speed, noise: float) -> tuple[float, float]:
    if speed.low is not None and speed.high is not None:
        return row[speed.low], row[speed.high]
    rate = row[speed.rate]
    half = rate * noise / 2
    return rate - half, rate + half
