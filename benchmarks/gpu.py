"""`python -m benchmarks gpu`: all benchmarks of a GPU within a time limit."""

import subprocess
import sys
import time
from collections.abc import Sequence

from benchmarks.process import run_group
from benchmarks.settings import SHARES, GpuSettings
from export.formats import gpu_without_bfloat16
from infer.engines import unavailable_reason
from isic.runtime.errors import UserError, did_you_mean

TRAIN_STEPS = 10
"""Optimizer steps per repeat of training."""
ENGINE_PATIENCE = 240
"""Time limit of one engine in seconds."""
INGEST_THREADS = "1,2,4,8,16"

Flags = dict[str, object]


def gpu(settings: GpuSettings) -> int:
    """Run all parts and return 1 if none succeeds."""
    for name in settings.parts:
        if name not in SHARES:
            raise UserError(f'--parts: no part "{name}", {did_you_mean(name, SHARES)}')
    if not settings.precision:
        default = "fp16" if gpu_without_bfloat16() else "bf16"
        settings = settings.model_copy(update={"precision": (default,)})
    deadline = time.monotonic() + 60 * settings.minutes
    num_succeeded = 0
    for number, name in enumerate(settings.parts):
        # The time that earlier parts left over is shared among this one and the later ones.
        share = SHARES[name] / sum(SHARES[later] for later in settings.parts[number:])
        seconds = share * (deadline - time.monotonic())
        num_succeeded += run_part(name, part_commands(name, settings), seconds)
    print(f"{num_succeeded} of {len(settings.parts)} parts succeeded")
    return 0 if num_succeeded else 1


def part_commands(name: str, settings: GpuSettings) -> list[Flags]:
    """Return the flags of a part's commands; training has one per config."""
    if name == "train":
        return [_train_flags(config, settings) for config in settings.config]
    common: Flags = {"data": settings.data, "results": settings.results}
    flags_of = {
        "throughput": _throughput_flags,
        "export": _export_flags,
        "ingest": _ingest_flags,
        "peers": _peers_flags,
    }
    return [{**common, **flags_of[name](settings)}]


def _train_flags(config: str, settings: GpuSettings) -> Flags:
    flags: Flags = {
        "config": config,
        "data": settings.data,
        "results": settings.results,
        "device": settings.device,
        "repeats": settings.repeats,
        "steps": TRAIN_STEPS,
        "pretrained": "false",
    }
    precision = settings.precision[0]
    if precision in {"bf16", "fp16"}:
        flags[precision] = "true"
    return flags


def _throughput_flags(settings: GpuSettings) -> Flags:
    return {
        "config": ",".join(settings.config),
        "formats": ",".join(settings.formats),
        "precision": ",".join(settings.precision),
        "device": settings.device,
        "batch": settings.batch,
        "repeats": settings.repeats,
        "seconds": settings.seconds,
        "patience": ENGINE_PATIENCE,
    }


def _export_flags(settings: GpuSettings) -> Flags:
    return {"config": ",".join(settings.config), "precision": ",".join(settings.precision)}


def _ingest_flags(settings: GpuSettings) -> Flags:
    return {
        "images": settings.images,
        "repeats": settings.repeats,
        "threads": INGEST_THREADS,
        "index": "false",
    }


def _peers_flags(settings: GpuSettings) -> Flags:
    precision = "fp32" if "all" in settings.precision else ",".join(settings.precision)
    return {
        "config": settings.config[0],
        "formats": peers_format(settings.device),
        "precision": precision,
        "device": settings.device,
        "images": settings.images,
        "batch": settings.batch,
        "repeats": settings.repeats,
        "peers": "timm",
    }


def peers_format(device: str) -> str:
    """Return `onnx`, or `aoti` if this build of ONNX Runtime cannot use the GPU."""
    has_gpu = device != "cpu" and unavailable_reason("aoti", "cuda") is None
    return "aoti" if has_gpu and unavailable_reason("onnx", "cuda") else "onnx"


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
    seconds = max(deadline - time.monotonic(), 1.0)
    try:
        return run_group(command, seconds).returncode
    except subprocess.TimeoutExpired:
        return None
