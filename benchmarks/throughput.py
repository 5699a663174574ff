"""`python -m benchmarks throughput`: every config in every engine that runs here, against what the machine could do."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from benchmarks.eager import ENGINES
from benchmarks.fresh import (
    ALL,
    Artifact,
    Features,
    Fresh,
    build_artifact,
    chosen,
    create_fresh,
    example_images,
    find_configs,
    least_cosine,
)
from benchmarks.limits import Work, count_work, limits
from benchmarks.process import run
from benchmarks.record import Row, append_each, reason
from benchmarks.worker import NUM_CHECKED, Job, job_file
from export.formats import FORMATS
from export.parity import run_model
from infer.engines import unavailable_reason
from isic.preprocess import Pixels
from isic.runtime.config import Settings, Several
from isic.runtime.errors import UserError
from isic.runtime.files import read_json

POOL = 64
"""Different images that the inputs are made of."""
BATCHES = {"cpu": (1, 16), "cuda": (1, 256)}
TORCH_PRECISIONS = {"cpu": ("fp32",), "cuda": ("fp32", "fp16", "bf16")}
"""What PyTorch itself is measured in: a CPU without the instructions emulates the others."""


class ThroughputSettings(Settings):
    """What `python -m benchmarks throughput` takes."""

    config: Several[str] = Field((ALL,), description="configs, separated by commas, or all")
    engine: Several[str] = Field(
        (ALL,), description="eager, compile, or formats of an export, separated by commas"
    )
    precision: Several[str] = Field(
        (ALL,), description="fp32, fp16, bf16, int8, fp8, separated by commas"
    )
    batch: Several[int] = Field(
        (), description="images a call, separated by commas; 1,16 on a CPU, 1,256 on a GPU"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the engines run")
    data: Path | None = Field(
        None, description="dataset whose images are the input; noise if not given"
    )
    repeats: int = Field(5, ge=1, description="repeats, of which the median counts")
    seconds: float = Field(
        1.0, gt=0, description="of each repeat, at least; one call where that takes longer"
    )
    patience: float = Field(900.0, gt=0, description="seconds after which an engine is given up")
    results: Path | None = Field(
        None, description="folder of the CSV; benchmarks/results if not given"
    )

    @property
    def where(self) -> str:
        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def batches(self) -> list[int]:
        return list(self.batch or BATCHES[self.where])


def throughput(settings: ThroughputSettings) -> None:
    """Measures images per second of fresh networks, each engine in a process of its own.

    A row says what was measured and what it is of the machine's limits, or why it could not be measured.
    """
    rows_of = partial(rows, wanted=engines(settings), settings=settings)
    append_each("throughput", find_configs(settings.config), rows_of, settings.results)


def rows(config: str, wanted: list[tuple[str, str]], settings: ThroughputSettings) -> Iterator[Row]:
    """Yields the rows of a config in each of some engines and precisions."""
    fresh = create_fresh(config)
    work = count_work(fresh.model, fresh.spec.size)
    images = example_images(settings.data, fresh.spec, POOL)
    expected = run_model(fresh.model, images[:NUM_CHECKED])[0]
    for engine, precision in wanted:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            for figures in measure(
                fresh, engine, precision, images, expected, settings, Path(folder)
            ):
                yield _row(fresh, engine, precision, figures, work, settings)


def engines(settings: ThroughputSettings) -> list[tuple[str, str]]:
    """Returns the engines and precisions that are asked for. Raises UserError where there is none such."""
    known = [
        (engine, precision) for engine in ENGINES for precision in TORCH_PRECISIONS[settings.where]
    ]
    known += [
        (name, precision)
        for name in FORMATS
        if settings.where in FORMATS[name].precisions
        for precision in FORMATS[name].offered(settings.where)
    ]
    names = chosen("engine", settings.engine, list(dict.fromkeys(name for name, _ in known)))
    precisions = chosen(
        "precision", settings.precision, list(dict.fromkeys(precision for _, precision in known))
    )
    found = [pair for pair in known if pair[0] in names and pair[1] in precisions]
    if not found:
        raise UserError(
            f"no engine of --engine has a --precision that is asked for; there are {known}"
        )
    return found


def measure(
    fresh: Fresh,
    engine: str,
    precision: str,
    images: Pixels,
    expected: Features,
    settings: ThroughputSettings,
    folder: Path,
) -> Iterator[Row]:
    """Yields the figures of each batch size, or a `reason` why there are none.

    Args:
        images: the pool, uint8 [P, size, size, 3].
        expected: features of its first NUM_CHECKED images by the network in float32.
        folder: for the artifact and the job.
    """
    artifact: Artifact | None = None
    if engine not in ENGINES:
        if missing := unavailable_reason(engine, settings.where):
            yield {"reason": missing}
            return
        try:
            artifact = build_artifact(
                fresh,
                engine,
                precision,
                folder,
                settings.where,
                max(settings.batches),
                images[NUM_CHECKED:],
            )
        except Exception as error:  # of any type, and it costs this row alone
            yield {"reason": f"does not build: {reason(error)}"}
            return
    result = run_job(fresh, engine, precision, images, artifact, settings, folder / "job.json")
    common = {
        "load_seconds": result.get("load_seconds"),
        "build_seconds": artifact and round(artifact.seconds, 1),
    }
    if (folder / "job.features.npy").is_file():
        features = np.load(folder / "job.features.npy").astype(np.float32)
        common["cosine"] = round(least_cosine(expected, features), 7)
    for row in result["rows"]:
        yield {**row, **common}
    if "reason" in result:
        yield {"reason": result["reason"]}


def run_job(
    fresh: Fresh,
    engine: str,
    precision: str,
    images: Pixels,
    artifact: Artifact | None,
    settings: ThroughputSettings,
    path: Path,
) -> dict[str, Any]:
    """Runs an engine in a process of its own and returns what it measured, perhaps with the `reason` why not all."""
    np.save(path.with_name("images.npy"), images)
    built = {"artifact": str(artifact.path), "manifest": artifact.manifest} if artifact else {}
    job_file(
        Job(
            config=fresh.config,
            engine=engine,
            precision=precision,
            device=settings.where,
            images=str(path.with_name("images.npy")),
            batches=settings.batches,
            repeats=settings.repeats,
            seconds=settings.seconds,
            **built,  # type: ignore[arg-type]
        ),
        path,
    )
    command = [sys.executable, "-m", "benchmarks.worker", str(path)]
    failed = None
    try:
        ended = run(command, settings.patience, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if ended.returncode:
            failed = f"its process ended with {ended.returncode}: {(ended.stderr.splitlines() or [''])[-1]}"
    except subprocess.TimeoutExpired:
        failed = f"took longer than {settings.patience:.0f} s"
    result = (
        read_json(path.with_suffix(".result"))
        if path.with_suffix(".result").is_file()
        else {"rows": []}
    )
    return {**result, **({"reason": failed} if failed else {})}


def _row(
    fresh: Fresh,
    engine: str,
    precision: str,
    figures: Row,
    work: Work,
    settings: ThroughputSettings,
) -> Row:
    row = {
        "what": fresh.settings.name,
        "engine": engine,
        "precision": precision,
        "device": settings.where,
        **figures,
    }
    row["input"] = settings.data.name if settings.data else "noise"
    row["size"] = fresh.spec.size
    if "reason" in figures:
        return row
    try:
        limit = limits(settings.where, precision).of(
            work, precision, figures["batch"], figures["images_per_second"]
        )
    except Exception as error:  # a rate counts also where torch has no product of that precision
        return {**row, "reason": f"no limit to compare with: {reason(error)}"}
    return {**row, **limit}
