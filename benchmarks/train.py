"""`python -m benchmarks train`: the training loop on files, against a bare loop in memory."""

import contextlib
import itertools
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, Sampler

from benchmarks.limits import count_work, torch_rate
from benchmarks.record import Row, print_and_append, ratio_columns
from benchmarks.settings import TIMED_PER_WARMUP, TrainRateSettings
from isic.runtime.arithmetic import ceil_div
from isic.runtime.errors import UserError
from train.batch import Batch, to_device
from train.config import TrainSettings
from train.decoded import keep_repeated
from train.loaders import (
    TRAINING_PASSES,
    Item,
    LesionImages,
    create_loader,
    fold_loaders,
    worker_errors,
)
from train.loop import train_epoch
from train.machine import (
    allow_tf32,
    check_bfloat16,
    prepare,
    resolve_choices,
    select_device,
)
from train.model import create_model, preprocess_spec
from train.optim import BACKBONE, HEAD
from train.rows import load_data
from train.sampling import Key
from train.state import create_state
from train.step import autocast
from train.threads import set_threads
from train.timm_models import backbone_options

NUM_IN_MEMORY = 4
"""Random batches in memory, used in turns."""


@dataclass
class TimedBatches:
    """A number of batches for a loop, timed after a warm-up."""

    batches: Iterable[Batch]
    warmup: int
    timed: int
    device: torch.device
    seconds: float = field(default=0.0, init=False)
    waiting: float = field(default=0.0, init=False)
    """Seconds of the timed part in which the loop waited for a batch."""
    num_images: int = field(default=0, init=False)
    clock: Callable[[], float] = time.perf_counter

    def __len__(self) -> int:
        return self.warmup + self.timed

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.batches)
        for number in range(len(self)):
            if number == self.warmup:
                started = self._now()
                self.waiting = 0.0
                self.num_images = 0
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
        """Images per second."""
        return self.num_images / self.seconds


def train(settings: TrainRateSettings) -> None:
    """Measure images per second of training, on files and in memory, and of a bare loop."""
    if settings.mask_weight:
        raise UserError("the bare loop predicts no masks; give --mask_weight 0")
    if settings.aux:
        raise UserError('the bare loop has no auxiliary targets; give --aux ""')
    device = select_device(settings.device)
    settings = resolve_choices(settings, device)
    if settings.precision == "bf16":
        check_bfloat16(device)
    with (
        worker_errors(),
        tempfile.TemporaryDirectory() as folder,
        busy_processes(settings.busy),
        BareLoop(settings) as bare,
    ):
        files = read_files(settings.model_copy(update={"output_dir": Path(folder)}))
        memory = random_batches(settings, device)
        run = create_loop(settings, device)
        on_files: list[TimedBatches] = []
        in_memory: list[TimedBatches] = []
        bare_rates: list[float] = []
        # In turns, so that a drift of the machine affects all of them.
        for _ in range(settings.repeats):
            on_files.append(run(iter(files), num_prefetched(files)))
            in_memory.append(run(endless(memory), 0))
            bare_rates.append(bare.rate())
    row = {
        **run_columns(settings, device, files.num_workers),
        **compare_loops(on_files, in_memory, bare_rates),
        **utilisation(settings, device, [run.rate for run in on_files]),
    }
    print(f"appended to {print_and_append('train', [row], settings.results)}")


@contextlib.contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """Keep some processes computing within the block."""
    # They also end if this process is killed and has no time to end them.
    spin = "import os; parent = os.getppid()\nwhile os.getppid() == parent: sum(range(10_000))"
    processes = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def read_files(settings: TrainSettings) -> DataLoader[Item]:
    """Return an endless loader of the training batches of a fold, with its decoded images."""
    data = load_data(settings)
    device = select_device(settings.device)
    spec = preprocess_spec(settings)
    loaders = fold_loaders(data, settings.fold or 0, spec, settings, device)
    uses = loaders.count_uses(settings, num_finished=0)
    keep_repeated(loaders.decoded, uses, settings.cache, settings.run_dir, "on files")
    loader = loaders.training
    images = loader.dataset
    assert isinstance(images, LesionImages)
    return create_loader(
        images,
        EndlessSampler(loader.sampler),
        settings.batch_size,
        loader.num_workers,
        loader.prefetch_factor or 0,
    )


class EndlessSampler(Sampler[Key]):
    """The keys of an epoch again and again."""

    # An epoch of a small dataset may be shorter than the queues, and all of them run empty at its
    # end; those of a real run are thousands of batches long.

    def __init__(self, keys: Iterable[Any]) -> None:
        self.keys = keys

    def __iter__(self) -> Iterator[Key]:
        return itertools.chain.from_iterable(itertools.repeat(self.keys))


def num_prefetched(loader: DataLoader[Item]) -> int:
    """Return the number of batches that a loader's processes prepare in advance."""
    return loader.num_workers * (loader.prefetch_factor or 0)


def endless(items: Iterable[Batch]) -> Iterator[Batch]:
    return itertools.chain.from_iterable(itertools.repeat(items))


def random_batches(settings: TrainSettings, device: torch.device) -> list[Batch]:
    """Return batches of noise on the device; images have seeds, which its augmentation reads."""
    size = settings.batch_size
    shape = (size, settings.image_size, settings.image_size, 3)
    batches = []
    for _ in range(NUM_IN_MEMORY):
        images = torch.randint(256, shape, dtype=torch.uint8)
        target = torch.randint(2, (size,)).float()
        rows = torch.arange(size)
        batch = Batch(images, target, rows, seeds=rows)
        batches.append(to_device(batch, device))
    return batches


def create_loop(
    settings: TrainRateSettings, device: torch.device
) -> Callable[[Iterable[Batch], int], TimedBatches]:
    """Return a function of batches, and the number of prefetched ones, that times training."""
    prepare(device)
    state = create_state(settings.model_copy(update={"pretrained": False}), device, 0)
    threads = set_threads(state.model, settings, device, None)
    if threads:
        print(threads, flush=True)
    forward: Any = torch.compile(state.model) if settings.compile else state.model

    def run(batches: Iterable[Batch], prefetched: int) -> TimedBatches:
        timed = time_batches(settings, batches, device, prefetched)
        state.step = 0
        num_steps = len(timed) // settings.accumulation_steps
        schedule = dict.fromkeys((BACKBONE, HEAD), np.full(num_steps, 0.1))
        train_epoch(state, forward, timed, schedule, settings, device, "benchmark")
        return timed

    return run


def time_batches(
    settings: TrainRateSettings,
    batches: Iterable[Batch],
    device: torch.device,
    prefetched: int = 0,
) -> TimedBatches:
    """Return timed batches for whole optimizer steps."""
    # Loader processes prepare batches while the first steps are slow, and taking those is faster
    # than loading. They belong to the warm-up; the rest counts little among the timed ones.
    per_step = settings.accumulation_steps
    warmup = settings.warmup_steps
    steps = settings.steps
    if prefetched:
        warmup += ceil_div(prefetched, per_step)
        steps = max(steps, TIMED_PER_WARMUP * warmup)
    return TimedBatches(batches, warmup * per_step, steps * per_step, device)


class BareLoop:
    """A process with the simplest training loop: timm's model, AdamW's defaults, nothing else."""

    def __init__(self, settings: TrainRateSettings) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve_bare_loop, args=(theirs, settings), daemon=True)

    def __enter__(self) -> "BareLoop":
        self.process.start()
        # While it imports torch it would disturb all other measurements.
        self._receive()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.join()

    def rate(self) -> float:
        """Run it once and return images per second."""
        self.connection.send(None)
        rate: float = self._receive()
        return rate

    def _receive(self) -> Any:
        while not self.connection.poll(timeout=1):
            if not self.process.is_alive():
                raise RuntimeError("the process of the bare loop died; its error is printed above")
        return self.connection.recv()


def serve_bare_loop(connection: Connection, settings: TrainRateSettings) -> None:
    """Build the model, report that it is ready, and run the loop on each request."""
    device = select_device(settings.device)
    allow_tf32(device)  # as training does: the ratio is to compare loops, not types
    options = {**backbone_options(settings), "num_classes": 1}
    model = timm.create_model(settings.model, **options).to(device)
    forward = torch.compile(model) if settings.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    connection.send(None)
    while True:
        connection.recv()
        batches = time_batches(settings, endless(normalised_batches(settings, device)), device)
        run_bare_loop(forward, optimizer, batches, settings, device)
        connection.send(batches.rate)


def normalised_batches(settings: TrainSettings, device: torch.device) -> list[Batch]:
    """Return batches of noise as the bare loop takes them: float32 [N, 3, size, size]."""
    size = settings.batch_size
    shape = (size, 3, settings.image_size, settings.image_size)
    target = torch.randint(2, (size,)).float()
    batches = []
    for _ in range(NUM_IN_MEMORY):
        batch = Batch(torch.randn(shape), target, torch.empty(0))
        batches.append(to_device(batch, device))
    return batches


def run_bare_loop(
    model: Any,
    optimizer: torch.optim.Optimizer,
    batches: TimedBatches,
    settings: TrainSettings,
    device: torch.device,
) -> None:
    """Train on the batches with the run's precision and accumulation."""
    scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
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
    """Return the type of matrix products; float32 on a GPU is TF32 in training."""
    return "tf32" if settings.precision == "fp32" and device.type == "cuda" else settings.precision


def run_columns(settings: TrainRateSettings, device: torch.device, num_workers: int) -> Row:
    """Return the columns that identify a measurement."""
    on_gpu = device.type == "cuda"
    return {
        "what": settings.name,
        "model": settings.model,
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "size": settings.image_size,
        "batch": f"{settings.batch_size} x {settings.accumulation_steps}",
        "precision": precision_of(settings, device),
        "compile": str(settings.compile).lower(),
        "workers": num_workers,
        "busy": settings.busy or None,
        "augment_on": "device" if settings.augment_on == "device" else None,
        "threads": torch.get_num_threads(),
    }


def compare_loops(
    on_files: Sequence[TimedBatches], in_memory: Sequence[TimedBatches], bare: Sequence[float]
) -> Row:
    """Return the columns of rates and ratios; a ratio is that of one repeat."""
    ours = [run.rate for run in on_files]
    memory = [run.rate for run in in_memory]
    waiting = statistics.median(run.waiting / run.seconds for run in on_files)
    return {
        "images_per_second": _three_digits(statistics.median(ours)),
        "in_memory": _three_digits(statistics.median(memory)),
        "bare": _three_digits(statistics.median(bare)),
        **ratio_columns("over_bare", ours, bare),
        **ratio_columns("over_memory", ours, memory),
        "waiting": round(waiting, 4),
    }


def utilisation(settings: TrainSettings, device: torch.device, rates: Sequence[float]) -> Row:
    """Return the columns of model FLOPs utilisation (MFU)."""
    network = create_model(settings, pretrained=False).eval()
    flops = TRAINING_PASSES * count_work(network, settings.image_size).flops
    precision = precision_of(settings, device)
    peak = torch_rate(device.type, "fp32" if precision == "tf32" else precision)
    return {
        "gflop_per_image": _three_digits(flops / 1e9),
        "matmul_tflop_per_second": _three_digits(peak / 1e12),
        "mfu": round(statistics.median(rates) * flops / peak, 3),
    }


def _three_digits(value: float) -> float:
    return float(f"{value:.3g}") if value < 1000 else round(value)
