"""A Ray cluster: Ray Data over the parts, with a pool of actors that embed them as a single process does.

Every node needs this toolkit, and sees dataset, engines and output folder under the same paths.
"""

import dataclasses
import json
import logging
import os
import signal
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from infer.embedding.embedder import Embedder, Job, Report, Step
from infer.embedding.plan import Part
from isic.runtime.arithmetic import ceil_div
from isic.runtime.errors import UserError
from isic.runtime.machine import num_cores

PARTS_A_TASK = 4
"""Parts that an actor runs through without a pause, and that are lost with it."""
OBJECT_STORE_BYTES = 128 * 1024 * 1024
"""Of a cluster started here: only counts travel through it, the images and features go from disk to disk."""

NO_AUTO_CONNECT = ("RAY_ENABLE_AUTO_CONNECT", "0")
"""Read when Ray is imported. Otherwise a thread that Ray Data leaves running starts a cluster of its own where it comes
too late for the one that has been shut down, and that cluster's end takes the process with it."""


class PartsActor:
    """Keeps an Embedder and runs it on the parts whose numbers arrive."""

    def __init__(self, job: Job, parts: Sequence[Part]) -> None:
        self._job, self._parts = job, parts
        self._embedder: Embedder | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Embeds parts; returns what they cost as JSON, or the sentence of a UserError: Ray would wrap an exception."""
        steps: list[Step] = []
        try:
            self._embedder = self._embedder or Embedder(self._job)
            self._embedder.run([self._parts[number] for number in batch["part"]], steps.append)
        except UserError as error:
            return {"message": [json.dumps({"error": str(error)})]}
        return {"message": [json.dumps(dataclasses.asdict(_sum(steps)))]}


def _sum(steps: Sequence[Step]) -> Step:
    return Step(
        sum(step.num_images for step in steps),
        [bad for step in steps for bad in step.bad],
        *(
            sum(getattr(step, name) for step in steps)
            for name in ("decode_wait", "engine", "write_wait")
        ),
    )


def run_ray(parts: Sequence[Part], job: Job, address: str, report: Report) -> None:
    """Embeds parts on a cluster: an actor a GPU, or one a machine where there are none.

    Ray runs a task again whose actor or machine died; what it may still lose, the caller does again.

    Args:
        address: of a running cluster, or `local` to start one on this machine.

    Raises:
        UserError: Ray is not installed, the cluster does not answer, or what an actor raised.
    """
    ray = connect(address)
    number, resources = actors(ray.nodes(), job.device)
    job = dataclasses.replace(job, num_threads=job.num_threads or int(resources["num_cpus"]))
    num_tasks = ceil_div(len(parts), min(PARTS_A_TASK, ceil_div(len(parts), number)))
    items = [{"part": number} for number in range(len(parts))]
    results = ray.data.from_items(items, override_num_blocks=num_tasks).map_batches(
        PartsActor,
        fn_constructor_args=(job, list(parts)),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=number),
        **resources,
    )
    for row in results.iter_rows():
        message = json.loads(row["message"])
        if "error" in message:
            raise UserError(message["error"])
        report(Step(**message))


def connect(address: str) -> Any:
    """Joins a cluster, or starts one, and returns the module `ray`; does nothing where this process has joined one.

    Raises:
        UserError: Ray is not installed, or nothing answers.
    """
    os.environ.setdefault(*NO_AUTO_CONNECT)
    try:
        ray = import_module("ray")
        import_module("ray.data")
    except ImportError as error:
        raise UserError(f'--ray needs Ray ({error}); pip install "isic-toolkit[ray]"') from None
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False
    if ray.is_initialized():
        return ray
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        settings |= {
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
            "num_cpus": num_cores(),
        }
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, **settings)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"no Ray cluster at {address} ({reason}); give its address, or --ray local"
        ) from None
    finally:
        signal.signal(signal.SIGTERM, handler)  # Ray puts one of its own there, which exits with 15
    return ray


def actors(nodes: Sequence[Mapping[str, Any]], device: str) -> tuple[int, dict[str, float]]:
    """Returns how many actors a cluster should have, and what each reserves: a GPU, or all cores of a machine."""
    alive = [
        node["Resources"]
        for node in nodes
        if node["Alive"] and node["Resources"].get("CPU", 0) >= 1
    ]
    with_gpu = [node for node in alive if node.get("GPU", 0) >= 1 and device != "cpu"]
    if with_gpu:
        num_cpus = min(max(node["CPU"] // node["GPU"], 1) for node in with_gpu)
        return int(sum(node["GPU"] for node in with_gpu)), {"num_cpus": num_cpus, "num_gpus": 1}
    return len(alive), {"num_cpus": min(node["CPU"] for node in alive)}
