"""Several processes on one machine, one a GPU: each embeds its share of the parts with its share of the cores."""

import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

from infer.embedder import Embedder, Job, Report, cores
from infer.plan import Part
from isic.errors import UserError

VISIBLE = "CUDA_VISIBLE_DEVICES"


def gpus() -> list[str]:
    """Returns the names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them."""
    if VISIBLE in os.environ:
        return [name for name in os.environ[VISIBLE].split(",") if name]
    return [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def share(items: Sequence[int], index: int, number: int) -> list[int]:
    """Returns the share of one of `number` workers in neighbouring items: one at least, the same for two if it must."""
    size = max(len(items) // number, 1)
    start = index * size % len(items)
    return list(items[start : start + size])


def run_processes(parts: Sequence[Part], job: Job, number: int, report: Report) -> None:
    """Embeds parts in `number` processes. The parts of one that dies stay missing; the caller does them again.

    Raises:
        UserError: what a worker raised; the others are stopped.
    """
    context = get_context("spawn")
    workers: dict[Connection, SpawnProcess] = {}
    try:
        for index in range(number):
            ours, theirs = context.Pipe()
            arguments = (parts[index::number], job, theirs, gpus()[index % len(gpus())] if gpus() else None)
            process = context.Process(target=_work, args=(*arguments, share(cores(), index, number)), daemon=True)
            workers[ours] = process
            process.start()
            theirs.close()
        _listen(dict(workers), report)
    finally:
        for process in workers.values():
            if process.pid is not None:
                process.terminate()
                process.join()


def _listen(workers: dict[Connection, SpawnProcess], report: Report) -> None:
    """Passes on what workers report until all have ended."""
    while workers:
        for pipe in connection.wait(list(workers)):
            assert isinstance(pipe, Connection)
            try:
                message = pipe.recv()
            except (EOFError, ConnectionResetError):
                process = workers.pop(pipe)
                process.join()
                if process.exitcode:
                    print(
                        f"a worker was lost (exit code {process.exitcode}), its parts are done again", file=sys.stderr
                    )
                continue
            if isinstance(message, UserError):
                raise message
            report(message)


def _work(parts: list[Part], job: Job, pipe: Connection, gpu: str | None, own_cores: list[int]) -> None:
    """The worker: embeds its parts and tells of each batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent ends this one
    if gpu is not None:
        os.environ[VISIBLE] = gpu
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, own_cores)
    try:
        with Embedder(job) as embedder:
            embedder.run(parts, pipe.send)
    except UserError as error:
        pipe.send(error)
    except BrokenPipeError:
        sys.exit(1)  # the parent is gone
