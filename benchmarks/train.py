"""`python -m benchmarks train`: the training loop on a dataset's files, against a bare loop on tensors in memory."""

import contextlib
import itertools
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from pydantic import Field
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader

from benchmarks.limits import count_work, torch_rate
from benchmarks.record import ratio, write
from isic.runtime.arithmetic import ceil_div
from isic.runtime.errors import UserError
from train.batch import Batch
from train.config import TrainSettings
from train.loaders import Item, fold_loaders, worker_errors
from train.loop import train_epoch
from train.machine import allow_tf32, check_bfloat16, prepare, select_device
from train.model import backbone_options, create_model, preprocess_spec
from train.optim import BACKBONE, HEAD
from train.rows import load_data
from train.state import create_state
from train.step import autocast
from train.threads import set_threads

NUM_IN_MEMORY = 4
"""Random batches that are used in turns where none are read."""
TIMED_PER_WARMUP = 8
"""Timed batches for each one before them, so that a queue that is still full at the start counts for little."""
PASSES = 3
"""Work of a training step in forward passes: the backward pass computes two gradients for each product."""


class TrainRateSettings(TrainSettings):
    """What `python -m benchmarks train` takes: every key of training, and how long to measure."""

    steps: int = Field(
        30,
        ge=1,
        description=f"optimizer steps per repeat; on files with loader processes at least {TIMED_PER_WARMUP} times "
        "those before them",
    )
    warmup_steps: int = Field(
        5,
        ge=1,
        description="steps before them that are not timed, besides those on prefetched batches",
    )
    repeats: int = Field(
        5, ge=1, description="repeats, of which the median counts; the loops take turns in each"
    )
    busy: int = Field(
        0,
        ge=0,
        description="processes that compute beside the measurement, each as much as one core can",
    )
    results: Path | None = Field(
        None, description="folder of the CSV; benchmarks/results if not given"
    )


@dataclass
class Window:
    """Batches for a loop, without end in themselves, of which the later ones are timed.

    Those before empty what the loader prepared during the first steps, which are slow.
    """

    batches: Iterable[Batch]
    warmup: int
    timed: int
    device: torch.device
    seconds: float = field(default=0.0, init=False)
    waiting: float = field(default=0.0, init=False)
    """Seconds of the timed part that the loop waited for a batch."""
    num_images: int = field(default=0, init=False)
    clock: Callable[[], float] = time.perf_counter

    def __len__(self) -> int:
        return self.warmup + self.timed

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.batches)
        for number in range(len(self)):
            if number == self.warmup:
                started, self.waiting, self.num_images = self._now(), 0.0, 0
            asked = self.clock()
            batch = next(batches)
            self.waiting += self.clock() - asked
            self.num_images += len(batch.images)
            yield batch
        self.seconds = self._now() - started

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.num_images / self.seconds


def train(settings: TrainRateSettings) -> None:
    """Measures images per second of training on files, on tensors in memory, and of a bare timm and torch loop.

    The three take turns, the bare loop in a process of its own, which this toolkit's settings do not reach.
    """
    if settings.mask_weight:
        raise UserError("a bare loop draws no masks; give --mask_weight 0")
    device = select_device(settings.device)
    if settings.bf16:
        check_bfloat16(device)
    with (
        worker_errors(),
        tempfile.TemporaryDirectory() as folder,
        busy_processes(settings.busy),
        BareLoop(settings) as bare,
    ):
        files = read_files(settings.model_copy(update={"output_dir": Path(folder)}))
        memory, run = in_memory(settings, device), create_loop(settings, device)
        windows: dict[str, list[Window]] = {"files": [], "memory": []}
        bare_rates = []
        for _ in range(settings.repeats):
            windows["files"].append(run(Endless(files), num_prefetched(files)))
            windows["memory"].append(run(memory, 0))
            bare_rates.append(bare.rate())
    row = figures(settings, device, windows, bare_rates, files.num_workers)
    print(f"appended to {write('train', [row], settings.results)}")


@contextlib.contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """Keeps some processes computing within the block; they end with this process too, however it ends."""
    spin = "import os; parent = os.getppid()\nwhile os.getppid() == parent: sum(range(10_000))"
    processes = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def read_files(settings: TrainSettings) -> DataLoader[Item]:
    """Returns the loader of the training batches of a fold."""
    data = load_data(settings)
    device = select_device(settings.device)
    spec = preprocess_spec(settings)
    return fold_loaders(data, settings.fold or 0, spec, settings, device).training


def num_prefetched(loader: DataLoader[Item]) -> int:
    """Returns how many batches a loader's processes prepare in advance."""
    return loader.num_workers * (loader.prefetch_factor or 0)


@dataclass(frozen=True)
class Endless:
    """Goes through an iterable again and again."""

    items: Iterable[Any]

    def __iter__(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(itertools.repeat(self.items))


def in_memory(settings: TrainSettings, device: torch.device) -> Iterable[Batch]:
    """Returns random batches that lie on the device, in turns."""
    size, shape = (
        settings.batch_size,
        (settings.batch_size, settings.image_size, settings.image_size, 3),
    )
    batches = [
        Batch(
            torch.randint(256, shape, dtype=torch.uint8),
            torch.randint(2, (size,)).float(),
            torch.arange(size),
        )
        for _ in range(NUM_IN_MEMORY)
    ]
    return Endless([Batch(*(part.to(device) for part in batch)) for batch in batches])


def create_loop(
    settings: TrainRateSettings, device: torch.device
) -> Callable[[Iterable[Batch], int], Window]:
    """Returns a function that learns from batches by the loop of `python -m train`, and times it.

    Its arguments are the batches and how many of them are prefetched.
    """
    prepare(device)
    state = create_state(settings.model_copy(update={"pretrained": False}), device, 0)
    threads = set_threads(state.model, settings, device, None)
    if threads:
        print(threads, flush=True)
    forward: Any = torch.compile(state.model) if settings.compile else state.model

    def run(batches: Iterable[Batch], prefetched: int) -> Window:
        window, state.step = create_window(settings, batches, device, prefetched), 0
        num_steps = len(window) // settings.accumulation_steps
        schedule = dict.fromkeys((BACKBONE, HEAD), np.full(num_steps, 0.1))
        train_epoch(state, forward, window, schedule, settings, device, "benchmark")
        return window

    return run


def create_window(
    settings: TrainRateSettings,
    batches: Iterable[Batch],
    device: torch.device,
    prefetched: int = 0,
) -> Window:
    """Returns a window of whole optimizer steps.

    While the first steps are slow, loader processes prepare batches. Taking those is faster than loading: they belong
    to the warm-up, and what is left of them when timing starts is little beside the timed batches.
    """
    each = settings.accumulation_steps
    warmup, steps = settings.warmup_steps, settings.steps
    if prefetched:
        warmup += ceil_div(prefetched, each)
        steps = max(steps, TIMED_PER_WARMUP * warmup)
    return Window(batches, warmup * each, steps * each, device)


class BareLoop:
    """A process with the loop that one writes first: timm's model, AdamW as it comes, and nothing else."""

    def __init__(self, settings: TrainRateSettings) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve_bare_loop, args=(theirs, settings), daemon=True)

    def __enter__(self) -> "BareLoop":
        self.process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.join()

    def rate(self) -> float:
        """Runs it once and returns images per second."""
        self.connection.send(None)
        while not self.connection.poll(timeout=1):
            if not self.process.is_alive():
                raise RuntimeError("the process of the bare loop has died; its error stands above")
        rate: float = self.connection.recv()
        return rate


def serve_bare_loop(connection: Connection, settings: TrainRateSettings) -> None:
    """Builds the model and runs the loop whenever it is asked to."""
    device = select_device(settings.device)
    allow_tf32(device)  # as training does: the ratio is to compare loops, not types
    model = timm.create_model(
        settings.model, **{**backbone_options(settings), "num_classes": 1}
    ).to(device)
    forward = torch.compile(model) if settings.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    while True:
        connection.recv()
        window = create_window(settings, normalised(settings, device), device)
        run_bare_loop(forward, optimizer, window, settings, device)
        connection.send(window.rate)


def normalised(settings: TrainSettings, device: torch.device) -> Iterable[Batch]:
    """Returns batches in memory as a bare loop takes them: float32 [N, 3, size, size]."""
    shape = (settings.batch_size, 3, settings.image_size, settings.image_size)
    target = torch.randint(2, (settings.batch_size,)).float()
    batches = [Batch(torch.randn(shape), target, torch.empty(0)) for _ in range(NUM_IN_MEMORY)]
    return Endless([Batch(*(part.to(device) for part in batch)) for batch in batches])


def run_bare_loop(
    model: Any,
    optimizer: torch.optim.Optimizer,
    batches: Window,
    settings: TrainSettings,
    device: torch.device,
) -> None:
    """Learns from the batches at the run's precision and accumulation."""
    scaler = torch.amp.GradScaler(device.type, enabled=settings.fp16)
    model.train()
    for number, batch in enumerate(batches, start=1):
        with autocast(device, settings.precision):
            loss = binary_cross_entropy_with_logits(model(batch.images).squeeze(1), batch.target)
        scaler.scale(loss / settings.accumulation_steps).backward()  # type: ignore[no-untyped-call]
        if number % settings.accumulation_steps == 0:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()


def precision_of(settings: TrainSettings, device: torch.device) -> str:
    """Return the type that matrix products are computed in; on a GPU float32 is TF32 in training."""
    if settings.fp16:
        return "fp16"
    if settings.bf16:
        return "bf16"
    return "tf32" if device.type == "cuda" else "fp32"


def figures(
    settings: TrainRateSettings,
    device: torch.device,
    windows: dict[str, list[Window]],
    bare: list[float],
    num_workers: int,
) -> dict[str, Any]:
    """Returns the row of the CSV. Ratios are of turns that followed each other, and their spread that between turns."""
    ours, memory = ([window.rate for window in windows[name]] for name in ("files", "memory"))
    precision = precision_of(settings, device)
    network = create_model(settings, pretrained=False).eval()
    flops, peak = (
        PASSES * count_work(network, settings.image_size).flops,
        torch_rate(device.type, "fp32" if precision == "tf32" else precision),
    )
    return {
        "what": settings.name,
        "model": settings.model,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "size": settings.image_size,
        "batch": f"{settings.batch_size} x {settings.accumulation_steps}",
        "precision": precision,
        "compile": str(settings.compile).lower(),
        "workers": num_workers,
        "busy": settings.busy or None,
        "threads": torch.get_num_threads(),
        "images_per_second": _round(statistics.median(ours)),
        "in_memory": _round(statistics.median(memory)),
        "bare": _round(statistics.median(bare)),
        **ratio("over_bare", ours, bare),
        **ratio("over_memory", ours, memory),
        "waiting": round(
            statistics.median(window.waiting / window.seconds for window in windows["files"]), 4
        ),
        "gflop_per_image": _round(flops / 1e9),
        "matmul_tflop_per_second": _round(peak / 1e12),
        "mfu": round(statistics.median(ours) * flops / peak, 3),
    }


def _round(value: float) -> float:
    """Three significant digits, and all of a number with more before the point."""
    return float(f"{value:.3g}") if value < 1000 else round(value)
