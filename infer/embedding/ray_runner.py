"""Embed shards on a Ray cluster: Ray Data over shard numbers, with a pool of actors.

Every node needs this toolkit, and the dataset, artifacts and output folder under the same paths.
"""

import dataclasses
import json
import logging
import os
import signal
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from infer.embedding.embedder import BatchStats, Embedder, EmbedJob, OnBatch
from infer.embedding.shards import Shard
from isic.runtime.arithmetic import ceil_div
from isic.runtime.errors import UserError, first_line
from isic.runtime.extras import install_command
from isic.runtime.machine import num_cores

SHARDS_PER_TASK = 4
"""Shards that an actor embeds in one task, and that are lost with it."""
# Only counts pass through it; images and features stay on disks.
OBJECT_STORE_BYTES = 128 * 1024 * 1024
"""Object store of a cluster started here."""

# A thread that Ray Data leaves running may call Ray after the cluster is shut down. Ray then starts
# another cluster (ray-project/ray#31060, seen with ray 2.60), whose end kills this process. Needed
# until Ray no longer connects implicitly.
NO_AUTO_CONNECT = ("RAY_ENABLE_AUTO_CONNECT", "0")
"""Environment variable that Ray reads when it is imported."""


class ShardsActor:
    """Holds an Embedder and runs it on the shards whose numbers it is given."""

    def __init__(self, job: EmbedJob, shards: Sequence[Shard]) -> None:
        self._job = job
        self._shards = shards
        self._embedder: Embedder | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Embed shards and return their stats, or the message of a UserError, as JSON."""
        stats: list[BatchStats] = []
        try:
            self._embedder = self._embedder or Embedder.open(self._job)
            shards = [self._shards[number] for number in batch["shard"]]
            self._embedder.run(shards, stats.append)
        except UserError as error:
            # Returned, because Ray Data hides the type of an exception (ray-project/ray#46962).
            return {"message": [json.dumps({"error": str(error)})]}
        return {"message": [json.dumps(dataclasses.asdict(_sum(stats)))]}


def _sum(stats: Sequence[BatchStats]) -> BatchStats:
    return BatchStats(
        num_images=sum(batch.num_images for batch in stats),
        bad=[bad for batch in stats for bad in batch.bad],
        decode_wait=sum(batch.decode_wait for batch in stats),
        engine=sum(batch.engine for batch in stats),
        write_wait=sum(batch.write_wait for batch in stats),
    )


def run_ray(shards: Sequence[Shard], job: EmbedJob, address: str, on_batch: OnBatch) -> None:
    """Embed shards on a cluster, with one actor per GPU, or per machine if there are no GPUs.

    Shards of an actor that dies again and again stay missing.

    Args:
        address: of a running cluster, or `local` to start one on this machine.

    Raises:
        UserError: Ray is not installed, the cluster does not answer, or an actor raised it.
    """
    ray = connect(address)
    num_actors, resources = size_actors(ray.nodes(), job.device)
    job = dataclasses.replace(job, num_threads=job.num_threads or int(resources["num_cpus"]))
    shards_per_actor = ceil_div(len(shards), num_actors)
    # Several tasks per actor, so that a lost one costs little, but at least one for each actor.
    num_tasks = ceil_div(len(shards), min(SHARDS_PER_TASK, shards_per_actor))
    items = [{"shard": number} for number in range(len(shards))]
    results = ray.data.from_items(items, override_num_blocks=num_tasks).map_batches(
        ShardsActor,
        fn_constructor_args=(job, list(shards)),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=num_actors),
        **resources,
    )
    for row in results.iter_rows():
        message = json.loads(row["message"])
        if "error" in message:
            raise UserError(message["error"])
        on_batch(BatchStats(**message))


def connect(address: str) -> Any:
    """Join or start a cluster, unless this process has joined one; return the module `ray`.

    Raises:
        UserError: Ray is not installed, or no cluster answers.
    """
    os.environ.setdefault(*NO_AUTO_CONNECT)
    try:
        ray = import_module("ray")
        import_module("ray.data")
    except ImportError as error:
        raise UserError(f"--ray needs Ray ({error}); run `{install_command('ray')}`") from None
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False
    if ray.is_initialized():
        return ray
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        options |= {
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
            "num_cpus": num_cores(),
        }
    # ray.init replaces the SIGTERM handler by one that exits with code 15 (ray-project/ray#17308),
    # so a stopped run would not clean up. Needed as long as Ray installs a handler in drivers.
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(
            f"no Ray cluster at {address} ({first_line(error)}); give its address, or --ray local"
        ) from None
    finally:
        signal.signal(signal.SIGTERM, handler)
    return ray


def size_actors(nodes: Sequence[Mapping[str, Any]], device: str) -> tuple[int, dict[str, float]]:
    """Return the number of actors and the resources of each, from the result of `ray.nodes()`."""
    machines = [
        node["Resources"]
        for node in nodes
        if node["Alive"] and node["Resources"].get("CPU", 0) >= 1
    ]
    with_gpu = [machine for machine in machines if machine.get("GPU", 0) >= 1]
    if with_gpu and device != "cpu":
        num_gpus = int(sum(machine["GPU"] for machine in with_gpu))
        # The machine with the fewest cores per GPU decides: all actors reserve the same.
        num_cpus = min(max(machine["CPU"] // machine["GPU"], 1) for machine in with_gpu)
        return num_gpus, {"num_cpus": num_cpus, "num_gpus": 1}
    return len(machines), {"num_cpus": min(machine["CPU"] for machine in machines)}
