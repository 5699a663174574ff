"""`python -m benchmarks gpu`: all benchmarks of a GPU within a time limit."""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import polars as pl

from benchmarks.artifacts import open_store
from benchmarks.correctness import engine_precisions, formats_of, training_precisions
from benchmarks.eager import TORCH_ENGINES
from benchmarks.page import last_rows
from benchmarks.process import run_group
from benchmarks.record import commit
from benchmarks.settings import CHECKED_BATCHES, RESULTS, SHARES, GpuSettings
from benchmarks.throughput import resolve_device
from benchmarks.untrained import config_name
from infer.engines import unavailable_reason
from infer.formats import AUTO_ORDER
from isic.runtime.errors import UserError, did_you_mean
from isic.tables import read_csv

TRAIN_STEPS = 30
"""Optimizer steps per repeat of training."""
# Each has a limit of its own, so that one that hangs leaves time to the others.
CHECK_PATIENCE = 100
"""Time limit of a check of correctness in seconds."""
ENGINE_PATIENCE = 90
"""Time limit of an engine's throughput in seconds."""
PEER_IMAGES = 16_384
"""Most images per repeat of the peers, which are slower."""

Flags = dict[str, object]


def gpu(settings: GpuSettings) -> int:
    """Run all parts and return 1 if none succeeds."""
    for name in settings.parts:
        if name not in SHARES:
            raise UserError(f'--parts: no part "{name}", {did_you_mean(name, SHARES)}')
    deadline = time.monotonic() + 60 * settings.minutes
    num_succeeded = 0
    with open_store(settings.artifacts) as store:
        settings = settings.model_copy(update={"artifacts": store.root})
        for number, name in enumerate(settings.parts):
            # The time that earlier parts left over is shared among this one and the later ones.
            share = SHARES[name] / sum(SHARES[later] for later in settings.parts[number:])
            seconds = share * (deadline - time.monotonic())
            num_succeeded += run_part(name, part_commands(name, settings), seconds)
    print(f"{num_succeeded} of {len(settings.parts)} parts succeeded")
    return 0 if num_succeeded else 1


def part_commands(name: str, settings: GpuSettings) -> list[Flags]:
    """Return the flags of each of a part's commands."""
    flags: Flags = {"data": settings.data, "results": settings.results, "device": settings.device}
    return [{**flags, **own} for own in FLAGS_OF_PART[name](settings)]


def _correctness_flags(settings: GpuSettings) -> list[Flags]:
    sizes = {*CHECKED_BATCHES["cpu"], settings.batch}
    return [
        {
            "config": ",".join(settings.config),
            "precision": ",".join(settings.precision) or None,
            "batch": ",".join(str(size) for size in sorted(sizes) if size <= settings.batch),
            "patience": CHECK_PATIENCE,
            "artifacts": settings.artifacts,
        }
    ]


def _throughput_flags(settings: GpuSettings) -> list[Flags]:
    """Return the flags for the engines of all configs, then for torch's own, which are peers."""
    device = resolve_device(settings.device)
    engines: dict[str, list[str]] = {}
    for name in formats_of(device):
        for precision in engine_precisions(name, device, settings.precision):
            engines.setdefault(precision, []).append(name)
    flags: Flags = {
        "config": ",".join(settings.config),
        "batch": settings.batch,
        "repeats": settings.repeats,
        "seconds": settings.seconds,
        "patience": ENGINE_PATIENCE,
        "artifacts": settings.artifacts,
    }
    of_torch = (torch_precision(settings), TORCH_ENGINES)
    return [
        {**flags, "precision": precision, "formats": ",".join(names)}
        for precision, names in (*engines.items(), of_torch)
    ]


def torch_precision(settings: GpuSettings) -> str:
    """Return the precision of torch's engines and of training: what a run would use."""
    usual = training_precisions(resolve_device(settings.device))
    return next((name for name in usual if name in settings.precision), usual[0])


def _embed_flags(settings: GpuSettings) -> list[Flags]:
    return [
        {
            **engine_flags(config, settings),
            "config": config,
            "images": settings.images,
            "batch": settings.batch,
            "repeats": 1,
            "artifacts": settings.artifacts,
        }
        for config in settings.config
    ]


def _train_flags(settings: GpuSettings) -> list[Flags]:
    flags: Flags = {
        "repeats": settings.repeats,
        "steps": TRAIN_STEPS,
        "pretrained": "false",
        "precision": torch_precision(settings),
    }
    return [{**flags, "config": config} for config in settings.config]


def _peers_flags(settings: GpuSettings) -> list[Flags]:
    config = settings.config[0]
    return [
        {
            **engine_flags(config, settings),
            "config": config,
            "images": min(settings.images, PEER_IMAGES),
            "batch": settings.batch,
            "repeats": settings.repeats,
            "peers": "DataLoader",
            "artifacts": settings.artifacts,
        }
    ]


FLAGS_OF_PART: dict[str, Callable[[GpuSettings], list[Flags]]] = {
    "correctness": _correctness_flags,
    "throughput": _throughput_flags,
    "embed": _embed_flags,
    "train": _train_flags,
    "peers": _peers_flags,
}
"""Function of each part that returns the flags of its commands."""


def engine_flags(config: str, settings: GpuSettings) -> Flags:
    """Return the format and precision that a user would take of those found to be correct."""
    device = resolve_device(settings.device)
    path = (settings.results or RESULTS) / "correctness.csv"
    found = read_correct(path, config_name(config)) if path.is_file() else set()
    if not found:  # that part did not run: those that may work
        found = {
            (name, engine_precisions(name, device, settings.precision)[0])
            for name in formats_of(device)
            if unavailable_reason(name, device) is None
        }
    name, precision = next(pair for pair in AUTO_ORDER[device] if pair in found)
    return {"formats": name, "precision": precision}


def read_correct(path: Path, config: str) -> set[tuple[str, str]]:
    """Return the formats, with their precisions, whose last check of a config found no fault."""
    rows = read_csv(path)
    if "cosine" not in rows.columns:
        return set()
    rows = rows.filter(what=config, commit=commit())
    last = last_rows(rows, ("check", "precision"))
    if "reason" in last.columns:
        last = last.filter(pl.col("reason").is_null())
    engines = last.filter(pl.col("cosine").is_not_null())
    return set(engines.select("check", "precision").iter_rows())


def run_part(name: str, commands: Sequence[Flags], seconds: float) -> bool:
    """Run a part's commands within a time limit. Return whether one succeeded."""
    print(f"{name}: at most {seconds:.0f} s", flush=True)
    started = time.monotonic()
    codes = [run_command(name, flags, started + seconds) for flags in commands]
    ends = ["stopped: no time left" if code is None else f"ended with {code}" for code in codes]
    print(f"{name}: {', '.join(ends)} after {time.monotonic() - started:.0f} s", flush=True)
    return 0 in codes


def run_command(name: str, flags: Flags, deadline: float) -> int | None:
    """Run one command until a time of the monotonic clock. Return its exit code, if it ended."""
    command = [sys.executable, "-m", "benchmarks", name]
    for key, value in flags.items():
        if value is not None:
            command += [f"--{key}", f"{value}"]
    seconds = deadline - time.monotonic()
    if seconds < 0:
        return None
    try:
        return run_group(command, seconds).returncode
    except subprocess.TimeoutExpired:
        return None
