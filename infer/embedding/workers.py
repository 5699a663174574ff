"""Several processes on one machine, one per GPU, each with its own shards and cores."""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from infer.embedding.embedder import Embedder, EmbedJob, OnBatch
from infer.embedding.shards import Shard
from isic.runtime.errors import UserError
from isic.runtime.interrupt import Interrupted, block_sigint, interruptible
from isic.runtime.machine import VISIBLE_GPUS, cores, gpus, num_cores

GRACE_SECONDS = 30
"""Time that a stopped worker has to write its finished shards to disk."""


def core_slice(items: Sequence[int], index: int, number: int) -> list[int]:
    """Return a worker's contiguous slice of `items`; workers share items if these are fewer."""
    size = max(len(items) // number, 1)
    start = index * size % len(items)
    return list(items[start : start + size])


def run_processes(shards: Sequence[Shard], job: EmbedJob, number: int, on_batch: OnBatch) -> None:
    """Embed shards in `number` processes. The shards of one that dies stay missing.

    Raises:
        UserError: raised in a worker; the others are stopped.
    """
    # Counted here: a limit on CPU time holds for all of them together, and each would take it all.
    job = replace(job, num_threads=job.num_threads or max(1, num_cores() // number))
    context = get_context("spawn")
    gpu_names = gpus()
    workers: dict[Connection, SpawnProcess] = {}
    try:
        for index in range(number):
            receiver, sender = context.Pipe()
            gpu = gpu_names[index % len(gpu_names)] if gpu_names else None
            own_cores = core_slice(cores(), index, number)
            process = context.Process(
                target=_work,
                args=(shards[index::number], job, sender, gpu, own_cores),
            )
            workers[receiver] = process
            with block_sigint():
                process.start()
            # The child has its own copy; with this one open, the child's end would give no EOF.
            sender.close()
        _listen(dict(workers), on_batch)
    finally:
        started = [process for process in workers.values() if process.pid is not None]
        for process in started:
            process.terminate()
        for process in started:
            process.join(GRACE_SECONDS)
            process.kill()  # no effect on one that has ended


def _listen(workers: dict[Connection, SpawnProcess], on_batch: OnBatch) -> None:
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
                        f"a worker was lost (exit code {process.exitcode}); "
                        "its shards are embedded again",
                        file=sys.stderr,
                    )
                continue
            if isinstance(message, UserError):
                raise message
            on_batch(message)


def _work(
    shards: list[Shard], job: EmbedJob, pipe: Connection, gpu: str | None, own_cores: list[int]
) -> None:
    if gpu is not None:
        os.environ[VISIBLE_GPUS] = gpu
    if hasattr(os, "sched_setaffinity"):  # Linux only
        os.sched_setaffinity(0, own_cores)
    try:
        with interruptible(), Embedder.open(job) as embedder:
            embedder.run(shards, pipe.send)
    except UserError as error:
        pipe.send(error)
    except Interrupted as stop:
        sys.exit(stop.exit_code)
    except BrokenPipeError:
        sys.exit(1)  # the parent is gone
