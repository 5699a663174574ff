"""The number of threads that torch computes with on a CPU: given, or measured."""

import copy
import os
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from isic.runtime.machine import num_cores
from train import distributed
from train.config import TrainSettings
from train.model import Classifier
from train.step import autocast

DEFAULT_THREADS = torch.get_num_threads()
"""torch's own choice: the physical cores, or OMP_NUM_THREADS."""
VARIABLE = "OMP_NUM_THREADS"
SECONDS_PER_PASS = 0.05
"""Approximate length of a timed forward and backward pass; determines its number of images."""
MIN_ROUNDS = 2
MAX_ROUNDS = 6
"""Timed passes per number of threads."""
CLEAR_RATIO = 2.0
"""Ratio of the slowest to the fastest at which the measurement ends after MIN_ROUNDS."""
MAX_TRIAL_SECONDS = 2.0
"""Time after which the measurement ends with the current round, even the first."""


def set_threads(
    model: Classifier, settings: TrainSettings, device: torch.device, saved: int | None
) -> str:
    """Set torch's number of threads and return a few words about it, "" on a GPU.

    Args:
        model: to be trained; unchanged.
        saved: number of the run that is resumed; another one would change the last bits of results.
    """
    number, reason = _known_number(settings.num_threads, device, saved)
    if number is None:
        # Every layer waits for the slowest of its threads. If another program occupies a core, that
        # is the thread that is not scheduled: one thread can then be many times faster.
        shape = (settings.batch_size, settings.image_size, settings.image_size, 3)
        training_pass = _create_pass(model, shape, device, settings.precision)
        rates = measure(training_pass, settings.batch_size, thread_counts())
        number = max(rates, key=lambda count: rates[count])
        reason = describe_rates(rates)
    number, reason = distributed.broadcast_object((number, reason))
    torch.set_num_threads(number)
    return reason and f"{_plural(number)} ({reason})"


def _known_number(
    wanted: int | None, device: torch.device, saved: int | None
) -> tuple[int | None, str]:
    """Return the number of threads and the reason for it, or None if it is to be measured."""
    if wanted is not None:
        return wanted, "--num_threads"
    if device.type != "cpu":
        return torch.get_num_threads(), ""
    if saved is not None:
        return saved, "as before it was stopped"
    if VARIABLE in os.environ and not _may_be_set_by_torchrun():
        return DEFAULT_THREADS, VARIABLE
    if thread_counts() == [1]:
        return 1, "one core per process"
    return None, ""


def _may_be_set_by_torchrun() -> bool:
    # torchrun sets OMP_NUM_THREADS to 1 if it starts several processes.
    return distributed.local_world_size() > 1 and os.environ[VARIABLE] == "1"


def thread_counts() -> list[int]:
    """Return the candidates: one, this process's part of the cores, and torch's default."""
    cores = max(1, num_cores() // distributed.local_world_size())
    return sorted({1, cores, min(cores, DEFAULT_THREADS)})


def _create_pass(
    model: Classifier, shape: tuple[int, ...], device: torch.device, precision: str
) -> Callable[[int], None]:
    """Return a function that makes a training pass of some random images through a copy.

    Args:
        shape: [N, size, size, 3], of the largest batch.
    """
    network = copy.deepcopy(model).requires_grad_(True).train()
    # fork_rng: measuring must not change the random numbers of the training that follows.
    with torch.random.fork_rng(devices=[]):
        images = torch.randint(256, shape, dtype=torch.uint8)

    def run(num_images: int) -> None:
        with torch.random.fork_rng(devices=[]), autocast(device, precision):
            outputs: tuple[Tensor, ...] = network(images[:num_images])
            # Without the features: they are an input of the logits.
            loss = torch.stack([output.float().mean() for output in outputs[1:]]).sum()
        loss.backward()  # type: ignore[no-untyped-call]

    return run


def measure(
    run: Callable[[int], None],
    batch_size: int,
    counts: Sequence[int],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[int, float]:
    """Measure images per second by number of threads; `run` makes a pass of some images."""

    def timed(count: int, num_images: int) -> float:
        torch.set_num_threads(count)
        started = clock()
        run(num_images)
        return clock() - started

    smallest = min(2, batch_size)  # batch normalisation may need two
    timed(1, smallest)
    seconds_per_image = timed(1, smallest) / smallest
    affordable = int(SECONDS_PER_PASS / max(seconds_per_image, 1e-9))
    num_images = min(max(affordable, smallest), batch_size)
    if seconds_per_image * num_images < MAX_TRIAL_SECONDS / 4:
        for count in counts:
            timed(count, num_images)  # warm-up: each number of threads prepares its own kernels

    seconds = dict.fromkeys(counts, 0.0)
    started = clock()
    for num_rounds in range(1, MAX_ROUNDS + 1):
        # In turns, so that other programs slow all numbers of threads alike.
        for count in counts:
            seconds[count] += timed(count, num_images)
        is_clear = max(seconds.values()) > CLEAR_RATIO * min(seconds.values())
        if clock() - started > MAX_TRIAL_SECONDS or (is_clear and num_rounds >= MIN_ROUNDS):
            break
    return {count: num_rounds * num_images / max(seconds[count], 1e-9) for count in counts}


def describe_rates(rates: dict[int, float]) -> str:
    return ", ".join(f"{_plural(count)}: {rate:.3g} img/s" for count, rate in rates.items())


def _plural(count: int) -> str:
    return f"{count} thread" if count == 1 else f"{count} threads"
