"""Several processes on one machine, one a GPU: each embeds its share of the parts with its share of the cores."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from infer.embedding.embedder import Embedder, Job, Report
from infer.embedding.plan import Part
from isic.runtime.errors import UserError
from isic.runtime.interrupt import Interrupted, interruptible
from isic.runtime.machine import VISIBLE_GPUS, cores, gpus

GRACE_SECONDS = 30
"""For a worker that is told to stop, to bring what it has to disk."""


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
    context, names = get_context("spawn"), gpus()
    workers: dict[Connection, SpawnProcess] = {}
    try:
        for index in range(number):
            ours, theirs = context.Pipe()
            arguments = (
                parts[index::number],
                job,
                theirs,
                names[index % len(names)] if names else None,
            )
            process = context.Process(
                target=_work, args=(*arguments, share(cores(), index, number)), daemon=True
            )
            workers[ours] = process
            with _deaf_to_ctrl_c():
                process.start()
            theirs.close()
        _listen(dict(workers), report)
    finally:
        started = [process for process in workers.values() if process.pid is not None]
        for process in started:
            process.terminate()
        for process in started:
            process.join(GRACE_SECONDS)
            process.kill()


@contextlib.contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Processes started in the block never hear of the Ctrl-C that reaches all of a terminal: this one ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
                        f"a worker was lost (exit code {process.exitcode}), its parts are done again",
                        file=sys.stderr,
                    )
                continue
            if isinstance(message, UserError):
                raise message
            report(message)


def _work(
    parts: list[Part], job: Job, pipe: Connection, gpu: str | None, own_cores: list[int]
) -> None:
    """The worker: embeds its parts and tells of each batch."""
    if gpu is not None:
        os.environ[VISIBLE_GPUS] = gpu
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, own_cores)
    try:
        with interruptible(), Embedder(job) as embedder:
            embedder.run(parts, pipe.send)
    except UserError as error:
        pipe.send(error)
    except Interrupted as stop:
        sys.exit(stop.exit_code)
    except BrokenPipeError:
        sys.exit(1)  # the parent is gone
