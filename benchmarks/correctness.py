"""`python -m benchmarks correctness`: one training step and every engine, before their speed."""

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.artifacts import open_store
from benchmarks.checks import TRAINING, CheckJob, write_job
from benchmarks.process import run_groups
from benchmarks.record import Row, print_and_append
from benchmarks.settings import CHECKED_BATCHES, CorrectnessSettings
from benchmarks.throughput import resolve_device
from benchmarks.untrained import chosen, config_name, find_configs
from export.formats import FORMATS, gpu_without_bfloat16, offered_precisions
from infer.engines import unavailable_reason
from isic.runtime.files import read_json
from isic.runtime.machine import num_cores

CORES_PER_CHECK = 4
"""A check builds its engine, which keeps a few cores busy."""


@dataclass(frozen=True)
class Check:
    """A row that is to be measured."""

    config: str
    name: str
    """TRAINING, or the format of an engine."""
    precision: str


def correctness(settings: CorrectnessSettings) -> int:
    """Check everything, each in its own process, and return 1 if no check succeeds."""
    device = resolve_device(settings.device)
    checks = list(select_checks(settings, device))
    num_passed = 0
    with tempfile.TemporaryDirectory() as folder, open_store(settings.artifacts) as store:
        for row in check_rows(checks, settings, device, Path(folder), store.root):
            print_and_append("correctness", [row], settings.results)
            num_passed += "reason" not in row
    print(f"{num_passed} of {len(checks)} are correct")
    return 0 if num_passed else 1


def select_checks(settings: CorrectnessSettings, device: str) -> Iterator[Check]:
    """Yield the checks of each config. Raise UserError for an unknown word of a flag."""
    formats = chosen("formats", settings.formats, formats_of(device))
    for config in find_configs(settings.config):
        for precision in training_precisions(device):
            yield Check(config, TRAINING, precision)
        for name in formats:
            for precision in engine_precisions(name, device, settings.precision):
                yield Check(config, name, precision)


def formats_of(device: str) -> list[str]:
    """Return the export formats that run on a device."""
    return [name for name, row in FORMATS.items() if device in row.precisions]


def training_precisions(device: str) -> tuple[str, ...]:
    """Return the precisions that a run would train in."""
    if device == "cpu":
        return ("fp32", "bf16")
    return ("fp16",) if gpu_without_bfloat16() else ("bf16", "fp16")


def engine_precisions(name: str, device: str, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Return the wanted precisions that a format offers, or its default one."""
    offered = offered_precisions(name, device)
    return tuple(precision for precision in offered if precision in wanted) or offered[:1]


def check_rows(
    checks: list[Check], settings: CorrectnessSettings, device: str, folder: Path, artifacts: Path
) -> Iterator[Row]:
    """Yield the row of each check as it ends."""
    commands: dict[Path, list[str]] = {}
    rows: dict[Path, Row] = {}
    batches = sorted(settings.batch or CHECKED_BATCHES[device])
    for number, check in enumerate(checks):
        row = describe(check, device, batches)
        reason = None if check.name == TRAINING else unavailable_reason(check.name, device)
        if reason:
            yield {**row, "reason": reason}
            continue
        path = folder / f"{number}.json"
        job = CheckJob(
            config=check.config,
            check=check.name,
            precision=check.precision,
            device=device,
            batches=batches,
            artifacts=str(artifacts.resolve()),
            data=str(settings.data.resolve()) if settings.data else None,
        )
        write_job(job, path)
        output = path.with_suffix(".log")
        commands[output] = [sys.executable, "-m", "benchmarks.checks", str(path)]
        rows[output] = row
    num_at_once = settings.num_at_once or max(1, num_cores() // CORES_PER_CHECK)
    for output, code in run_groups(commands, num_at_once, settings.patience):
        yield {**rows[output], **read_result(output, code, settings.patience)}


def describe(check: Check, device: str, batches: list[int]) -> Row:
    """Return the columns that identify a check."""
    return {
        "what": config_name(check.config),
        "check": check.name,
        "precision": check.precision,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "batches": None if check.name == TRAINING else " ".join(map(str, batches)),
    }


def read_result(output: Path, code: int | None, patience: float) -> Row:
    """Return the measured columns of a check that has ended, or the reason that it failed."""
    result = output.with_suffix(".result")
    if result.is_file():
        return read_json(result)
    if code is None:
        return {"reason": f"took longer than {patience:.0f} s"}
    lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
    return {"reason": f"its process ended with {code}: {lines[-1] if lines else ''}"}
