"""`python -m benchmarks gpu`: every part that says something about a GPU, within a time, each in its own process."""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from benchmarks.process import run
from export.formats import gpu_without_bfloat16
from infer.engines import unavailable_reason
from isic.runtime.config import Settings, Several
from isic.runtime.errors import UserError, did_you_mean

SHARES = {"throughput": 0.45, "train": 0.25, "peers": 0.15, "export": 0.1, "ingest": 0.05}
"""The parts in their order, and the share of the time after which each is stopped.

What it has measured whole until then stays: an engine of throughput, a format of export, a config of train, a peer of
peers; all of ingest takes turns.
"""
CONFIGS = (
    "vit_tiny",
    "convnext_tiny",
    "vit_base",
    "eva02_base",
    "vit_small",
    "eva02_small",
    "convnext_base",
)
"""The most telling first: time may run out."""
TRAIN_STEPS = 10
"""Optimizer steps a repeat of training."""


class GpuSettings(Settings):
    """What `python -m benchmarks gpu` takes."""

    data: Path | None = Field(
        None, description="dataset whose images are used; noise, and fewer parts, if not given"
    )
    parts: Several[str] = Field(
        tuple(SHARES), description=f"of {', '.join(SHARES)}, separated by commas"
    )
    config: Several[str] = Field(
        CONFIGS, description="configs, separated by commas; the peers run the first"
    )
    engine: Several[str] = Field(
        ("all",), description="engines of the throughput, separated by commas, or all"
    )
    precision: Several[str] = Field(
        (),
        description="precisions of the engines, separated by commas, or all; bf16 if not given, "
        "and fp16 on a GPU without it",
    )
    batch: int = Field(256, ge=1, description="images a call")
    images: int = Field(4096, ge=1, description="images a repeat of peers and ingest")
    repeats: int = Field(3, ge=1, description="repeats of each part")
    seconds: float = Field(0.5, gt=0, description="of each repeat of the throughput, at least")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the networks run")
    minutes: float = Field(9.5, gt=0, description="for all parts together")
    results: Path | None = Field(
        None, description="folder of the CSVs; benchmarks/results if not given"
    )


def gpu(settings: GpuSettings) -> int:
    """Runs all parts. One that fails or takes too long costs its own rows only; exits with 1 where none succeeds."""
    for name in settings.parts:
        if name not in SHARES:
            raise UserError(f'--parts: no part "{name}", {did_you_mean(name, SHARES)}')
    if not settings.precision:
        usual = "fp16" if gpu_without_bfloat16() else "bf16"
        settings = settings.model_copy(update={"precision": (usual,)})
    ends = time.monotonic() + 60 * settings.minutes
    succeeded = 0
    for at, name in enumerate(settings.parts):
        left = ends - time.monotonic()
        of_it = SHARES[name] / sum(SHARES[later] for later in settings.parts[at:])
        succeeded += run_part(name, commands(name, settings), left * of_it)
    print(f"{succeeded} of {len(settings.parts)} parts went through")
    return 0 if succeeded else 1


Flags = dict[str, object]


def commands(name: str, settings: GpuSettings) -> list[Flags]:
    """Returns the flags of a part's commands: training takes one for each config."""
    if name != "train":
        return [flags(name, settings)]
    precision = {settings.precision[0]: "true"} if settings.precision[0] in {"bf16", "fp16"} else {}
    common = {"data": settings.data, "results": settings.results, "device": settings.device}
    timing = {"repeats": settings.repeats, "steps": TRAIN_STEPS, "pretrained": "false"}
    return [{"config": config, **common, **timing, **precision} for config in settings.config]


def flags(name: str, settings: GpuSettings) -> Flags:
    """Returns the flags of a part that is one command."""
    common = {"data": settings.data, "results": settings.results}
    configs = ",".join(settings.config)
    precisions, repeats = ",".join(settings.precision), settings.repeats
    if name == "throughput":
        engines, where = (
            ",".join(settings.engine),
            {"device": settings.device, "batch": settings.batch},
        )
        timing = {"repeats": repeats, "seconds": settings.seconds, "patience": 240}
        return {
            **common,
            **where,
            **timing,
            "config": configs,
            "engine": engines,
            "precision": precisions,
        }
    if name == "export":
        return {**common, "config": configs, "precision": precisions}
    sized = {**common, "images": settings.images, "repeats": repeats}
    if name == "ingest":
        return {**sized, "threads": "1,2,4,8,16", "index": "false"}
    precision = "fp32" if "all" in settings.precision else precisions
    ours = {
        "format": peers_format(settings.device),
        "precision": precision,
        "device": settings.device,
    }
    return {**sized, **ours, "config": settings.config[0], "batch": settings.batch, "peers": "timm"}


def peers_format(device: str) -> str:
    """Returns the format that goes beside the peers: ONNX, but on a GPU that this build of ONNX Runtime cannot use."""
    has_gpu = device != "cpu" and unavailable_reason("aoti", "cuda") is None
    return "aoti" if has_gpu and unavailable_reason("onnx", "cuda") else "onnx"


def run_part(name: str, wanted: Sequence[Flags], seconds: float) -> bool:
    """Runs a part's commands one after another for some seconds at most. Returns whether one went through."""
    print(f"{name}: at most {seconds:.0f} s", flush=True)
    started = time.monotonic()
    codes = [run_command(name, each, started + seconds) for each in wanted]
    how = ", ".join(
        "stopped: no time left" if code is None else f"ended with {code}" for code in codes
    )
    print(f"{name}: {how} after {time.monotonic() - started:.0f} s", flush=True)
    return 0 in codes


def run_command(name: str, wanted: Flags, ends: float) -> int | None:
    """Runs one command until some time of the monotonic clock. Returns its exit code, None where time ran out."""
    given = (
        text
        for key, value in wanted.items()
        if value is not None
        for text in (f"--{key}", f"{value}")
    )
    left = max(ends - time.monotonic(), 1.0)
    try:
        return run([sys.executable, "-m", "benchmarks", name, *given], left).returncode
    except subprocess.TimeoutExpired:
        return None
