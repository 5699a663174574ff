"""The number of threads that torch computes with on a CPU: given, or measured.

Every layer waits for the slowest of its threads. If another program has a core, that is the thread which is not
scheduled, and a small network is many times faster with a single thread.
"""

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
"""What torch chooses by itself: the physical cores, or OMP_NUM_THREADS."""
VARIABLE = "OMP_NUM_THREADS"
SECONDS_PER_PASS = 0.05
"""Of a forward and backward pass in the measurement, about; the number of images follows from it."""
MAX_ROUNDS, MIN_ROUNDS = 6, 2
"""Timed passes with each number of threads."""
CLEAR_RATIO = 2.0
"""Ratio of times from which the measurement ends after MIN_ROUNDS."""
MAX_SECONDS = 2.0
"""After which the measurement of a large network ends with the round, even the first."""


def set_threads(
    model: Classifier, settings: TrainSettings, device: torch.device, saved: int | None
) -> str:
    """Sets torch's number of threads and returns a few words on it, none on a GPU.

    Args:
        model: to be trained; it is not changed.
        settings: of the run.
        device: of the model.
        saved: number of the run that is resumed, whose results would otherwise differ in the last bits.
    """
    number, words = _given(settings.num_threads, device, saved)
    if number is None:
        rates = measure(_pass(model, settings, device), settings.batch_size, thread_counts())
        number, words = max(rates, key=lambda count: rates[count]), describe(rates)
    number, words = distributed.from_main((number, words))
    torch.set_num_threads(number)
    return words and f"{_plural(number)} ({words})"


def _given(wanted: int | None, device: torch.device, saved: int | None) -> tuple[int | None, str]:
    """Returns the number of threads and its origin, or None if it is to be measured."""
    if wanted is not None:
        return wanted, "--num_threads"
    if device.type != "cpu":
        return torch.get_num_threads(), ""
    if saved is not None:
        return saved, "as before it was stopped"
    if VARIABLE in os.environ and not _is_default_of_torchrun():
        return DEFAULT_THREADS, VARIABLE
    if thread_counts() == [1]:
        return 1, "one core for each process"
    return None, ""


def _is_default_of_torchrun() -> bool:
    """Whether OMP_NUM_THREADS may be the 1 that torchrun sets for several processes if it is not set."""
    return distributed.local_world_size() > 1 and os.environ[VARIABLE] == "1"


def thread_counts() -> list[int]:
    """Returns the numbers of threads to choose from: one, this process's share of the cores, and torch's default."""
    share = max(1, num_cores() // distributed.local_world_size())
    return sorted({1, share, min(share, DEFAULT_THREADS)})


def _pass(
    model: Classifier, settings: TrainSettings, device: torch.device
) -> Callable[[int], None]:
    """Returns a function that makes a forward and backward pass of some images through a copy of the model."""
    network = copy.deepcopy(model).requires_grad_(True).train()
    shape = (settings.batch_size, settings.image_size, settings.image_size, 3)
    with torch.random.fork_rng(devices=[]):
        images = torch.randint(256, shape, dtype=torch.uint8)

    def run(num_images: int) -> None:
        with torch.random.fork_rng(devices=[]), autocast(settings, device):
            outputs: tuple[Tensor, ...] = network(images[:num_images])
            loss = torch.stack([output.float().mean() for output in outputs[1:]]).sum()
        loss.backward()  # type: ignore[no-untyped-call]

    return run


def measure(
    run: Callable[[int], None],
    batch_size: int,
    counts: Sequence[int],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[int, float]:
    """Returns images per second by number of threads. The numbers take turns, so that all meet the same load.

    Args:
        run: makes a pass of some images.
        batch_size: largest number of images.
        counts: numbers of threads.
        clock: seconds.
    """

    def timed(count: int, num_images: int) -> float:
        torch.set_num_threads(count)
        started = clock()
        run(num_images)
        return clock() - started

    smallest = min(2, batch_size)  # batch normalisation may need two
    timed(1, smallest)
    each = timed(1, smallest) / smallest
    num_images = min(max(int(SECONDS_PER_PASS / max(each, 1e-9)), smallest), batch_size)
    if each * num_images < MAX_SECONDS / 4:
        for count in counts:
            timed(count, num_images)  # each number has kernels of its own to prepare
    seconds, started = dict.fromkeys(counts, 0.0), clock()
    for number in range(1, MAX_ROUNDS + 1):
        for count in counts:
            seconds[count] += timed(count, num_images)
        is_clear = max(seconds.values()) > CLEAR_RATIO * min(seconds.values())
        if clock() - started > MAX_SECONDS or (is_clear and number >= MIN_ROUNDS):
            break
    return {count: number * num_images / max(seconds[count], 1e-9) for count in counts}


def describe(rates: dict[int, float]) -> str:
    """Returns the rates in words."""
    return ", ".join(f"{_plural(count)}: {rate:.3g} img/s" for count, rate in rates.items())


def _plural(count: int) -> str:
    return f"{count} thread" if count == 1 else f"{count} threads"
