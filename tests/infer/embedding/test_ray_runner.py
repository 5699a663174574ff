"""Embedding on Ray, on real clusters of node processes on this machine."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infer.embedding import shards
from infer.embedding.ray_runner import NO_AUTO_CONNECT, size_actors
from tests.support.commands import Cli
from tests.support.fake_run import FakeRun, make_fake_run, shard_bytes

# Otherwise every init warns of a future default (seen with ray 2.60).
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Before Ray is imported: these tests shut clusters down and continue.
os.environ.setdefault(*NO_AUTO_CONNECT)

try:
    import ray
except ImportError:
    pytest.skip('Ray is not installed: pip install "isic-toolkit[ray]"', allow_module_level=True)
from ray.cluster_utils import Cluster

NODE = {"num_cpus": 1, "object_store_memory": 80 * 1024 * 1024, "include_dashboard": False}


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    """300 images at 50 per second, so that a node can be killed during the run."""
    return make_fake_run(tmp_path_factory.mktemp("slow"), images_per_second=50)


@pytest.fixture(scope="module")
def expected(slow: FakeRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The shards of a single process."""
    output = tmp_path_factory.mktemp("whole")
    ended = slow.run(output)
    assert ended.returncode == 0, ended.stderr
    return shard_bytes(output)


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Two nodes of one core each."""
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.ray
def test_a_node_killed_during_the_run_costs_nothing_but_time(
    cluster: Any,
    slow: FakeRun,
    expected: dict[str, bytes],
    tmp_path: Path,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shards, "SHARD_ROWS", 20)
    killed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 120
        while len(shard_bytes(tmp_path)) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        killed.append(len(shard_bytes(tmp_path)))
        (worker,) = (node for node in cluster.list_all_nodes() if not node.head)
        cluster.remove_node(worker, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    ended = cli("infer", *slow.flags(tmp_path, "--batch_size", 8, "--ray", cluster.address))
    killer.join()
    assert ended.code == 0, ended.err
    assert 0 < killed[0] < 15, "the node was killed during the run"
    assert "images=300" in ended.out
    assert shard_bytes(tmp_path) == expected


@pytest.mark.ray
def test_a_local_cluster_gives_the_same_bytes_and_reports_an_actors_error(
    slow: FakeRun,
    expected: dict[str, bytes],
    tmp_path: Path,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shards, "SHARD_ROWS", 20)
    try:
        ended = cli("infer", *slow.flags(tmp_path, "--batch_size", 8, "--ray", "local"))
        assert ended.code == 0, ended.err
        assert shard_bytes(tmp_path) == expected
        blocked = tmp_path / "blocked" / "null" / "train" / "fold_1"
        blocked.parent.mkdir(parents=True)
        blocked.write_text("a file where a folder must be")
        failed = cli(
            "infer", *slow.flags(tmp_path / "blocked", "--batch_size", 8, "--ray", "local")
        )
        assert failed.code == 2
        assert "choose another output folder" in failed.err
    finally:
        ray.shutdown()


@pytest.mark.ray
def test_no_cluster_at_the_address_is_a_user_error(slow: FakeRun, tmp_path: Path, cli: Cli) -> None:
    ended = cli("infer", *slow.flags(tmp_path, "--ray", "nonsense"))
    assert ended.code == 2
    assert "no Ray cluster at nonsense" in ended.err
    assert "--ray local" in ended.err


def test_no_cluster_is_started_implicitly() -> None:
    assert not ray.is_initialized()
    with pytest.raises(ray.exceptions.RaySystemError, match="has not been started"):
        ray.get([])
    assert not ray.is_initialized()


def test_one_actor_per_gpu_or_per_machine() -> None:
    def node(alive: bool = True, **resources: float) -> dict[str, Any]:
        return {"Alive": alive, "Resources": resources}

    machines = [
        node(CPU=32, GPU=4),
        node(CPU=16, GPU=2),
        node(CPU=8),
        node(False, CPU=64, GPU=8),
        node(memory=1e9),
    ]
    assert size_actors(machines, "auto") == (6, {"num_cpus": 8, "num_gpus": 1})
    assert size_actors(machines, "cpu") == (3, {"num_cpus": 8})
    assert size_actors([node(CPU=2)], "auto") == (1, {"num_cpus": 2})
