"""Embedding into a remote folder: the bytes of a local run, also after a kill."""

import os
import signal
import subprocess
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from infer.embedding import shards, staging
from isic.runtime import remote
from isic.runtime.remote import Storage, locked
from isic.runtime.urls import local_path
from tests.support.commands import ROOT, Cli
from tests.support.fake_run import FakeRun, make_fake_run
from tests.support.s3 import BUCKET, Bucket

TIMED = ("train/run.json",)
"""Files with times, which differ between runs."""


@pytest.fixture
def fake_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    """A run of 120 images, of which one is bad, in six shards."""
    monkeypatch.setattr(shards, "SHARD_ROWS", 20)
    return with_bad_image(make_fake_run(tmp_path / "local", 120))


def with_bad_image(run: FakeRun) -> FakeRun:
    with h5py.File(run.data / "train-image.hdf5", "a") as file:
        del file["ISIC_0000007"]
        file["ISIC_0000007"] = np.bytes_(b"this is text")
    return run


@pytest.fixture
def url(bucket: Bucket, tmp_path: Path) -> str:
    return f"s3://{BUCKET}/{tmp_path.name}"


def contents(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


def uploaded(bucket: Bucket, url: str) -> dict[str, bytes]:
    return bucket.objects(f"{url.rpartition('/')[2]}/null")


def without_times(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name not in TIMED}


FLAGS = ("--batch_size", 8, "--max_bad", 0.5)


@pytest.fixture
def expected(fake_run: FakeRun, tmp_path: Path, cli: Cli) -> dict[str, bytes]:
    """The files of a local run."""
    ended = cli("infer", *fake_run.flags(tmp_path / "here", *FLAGS))
    assert ended.code == 0, ended.err
    return contents(tmp_path / "here" / "null")


def test_a_remote_run_has_the_bytes_of_a_local_one(
    fake_run: FakeRun,
    expected: dict[str, bytes],
    bucket: Bucket,
    url: str,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []
    waiting: list[int] = []
    upload = Storage.upload
    root = local_path(url, "staged") / "null"

    def observed(storage: Storage, local: Path) -> None:
        waiting.append(sum(path.stat().st_size > 0 for path in root.rglob("*part-*")))
        upload(storage, local)
        order.append(storage.url.removeprefix(f"{url}/null/"))

    monkeypatch.setattr(Storage, "upload", observed)
    ended = cli("infer", *fake_run.flags(url, *FLAGS))
    assert ended.code == 0, ended.err
    assert f"output={url}/null/train" in ended.out
    found = uploaded(bucket, url)
    assert found.keys() == expected.keys()
    assert without_times(found) == without_times(expected)
    assert order[0] == "train/plan.json"
    assert order[-1] == "train/run.json"
    assert max(waiting) <= 2, "no more whole shards than threads that write them"
    assert not root.exists()
    again = cli("infer", *fake_run.flags(url, *FLAGS))
    assert "up to date" in again.out
    assert f"output={url}/null/train" in again.out


@pytest.mark.slow
def test_a_killed_run_is_resumed(
    bucket: Bucket, url: str, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_ROWS", 20)
    slow = with_bad_image(make_fake_run(tmp_path / "slow", 120, images_per_second=30))
    process = subprocess.Popen(
        slow.command(url, *FLAGS),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while sum("part-" in key for key in bucket.written(f"{tmp_path.name}/null")) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = bucket.written(f"{tmp_path.name}/null")
    assert not any(key.endswith("run.json") for key in before)
    assert 3 <= sum("part-" in key for key in before) < 6
    time.sleep(1.1)  # the server counts seconds
    resumed = slow.run(url, *FLAGS)
    assert resumed.returncode == 0, resumed.stderr
    after = bucket.written(f"{tmp_path.name}/null")
    kept = [key for key in before if "part-" in key]
    assert [after[key] for key in kept] == [before[key] for key in kept]
    found = uploaded(bucket, url)
    assert cli("infer", *slow.flags(tmp_path / "here", *FLAGS)).code == 0
    expected = contents(tmp_path / "here" / "null")
    assert found.keys() == expected.keys()
    assert without_times(found) == without_times(expected)


def test_other_settings_are_refused_and_force_replaces(
    fake_run: FakeRun, bucket: Bucket, url: str, cli: Cli
) -> None:
    assert cli("infer", *fake_run.flags(url, *FLAGS)).code == 0
    before = uploaded(bucket, url)
    bucket.put(f"{url.rpartition('/')[2]}/null/train/fold_9/part-00000.parquet", b"stale")
    other = cli("infer", *fake_run.flags(url, *FLAGS, "--dtype", "float32"))
    assert other.code == 2
    assert f"{url}/null/train holds embeddings made with dtype = float16" in other.err
    forced = cli("infer", *fake_run.flags(url, *FLAGS, "--dtype", "float32", "--force"))
    assert forced.code == 0, forced.err
    after = uploaded(bucket, url)
    assert after.keys() == before.keys()
    parts = [name for name in after if "part-" in name]
    assert all(after[name] != before[name] for name in parts)


def test_a_foreign_file_is_not_replaced(
    fake_run: FakeRun, bucket: Bucket, url: str, cli: Cli
) -> None:
    key = f"{url.rpartition('/')[2]}/null/train/run.json"
    bucket.put(key, b"of another program")
    ended = cli("infer", *fake_run.flags(url, *FLAGS))
    assert ended.code == 2
    assert "was not written by this command" in ended.err
    assert uploaded(bucket, url) == {"train/run.json": b"of another program"}


def test_two_runs_on_one_machine_do_not_share_a_folder(
    fake_run: FakeRun, url: str, cli: Cli
) -> None:
    root = local_path(url, "staged") / "null"
    with locked(root.with_name(".null.lock"), ""):
        ended = cli("infer", *fake_run.flags(url, *FLAGS))
    assert ended.code == 2
    assert f"another process embeds into {url}/null" in ended.err


def test_a_bucket_that_does_not_exist_ends_the_run_before_it_computes(
    fake_run: FakeRun, bucket: Bucket, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infer.embedding.embed.make_runner", lambda *_: pytest.fail("computes"))
    ended = cli("infer", *fake_run.flags("s3://no-such-bucket/out", *FLAGS))
    assert ended.code == 2
    assert "s3://no-such-bucket/out/null" in ended.err
    assert "does not exist" in ended.err


def test_an_upload_that_fails_leaves_no_partial_shard(
    fake_run: FakeRun, bucket: Bucket, url: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = Storage.upload
    monkeypatch.setattr(remote, "ATTEMPTS", 2)

    def failing(storage: Storage, local: Path) -> None:
        if storage.url.endswith("part-00001.parquet"):
            storage._call(lambda: (_ for _ in ()).throw(OSError("connection reset")))
        upload(storage, local)

    monkeypatch.setattr(Storage, "upload", failing)
    ended = cli("infer", *fake_run.flags(url, *FLAGS))
    assert ended.code == 2
    assert "part-00001.parquet cannot be reached (connection reset)" in ended.err
    assert not any("part-00001" in name for name in uploaded(bucket, url))
    assert not any("run.json" in name for name in uploaded(bucket, url))


@pytest.mark.slow
def test_several_processes_upload_their_shards(
    fake_run: FakeRun, expected: dict[str, bytes], bucket: Bucket, url: str
) -> None:
    ended = fake_run.run(url, *FLAGS, "--num_processes", 2)
    assert ended.returncode == 0, ended.stderr
    assert without_times(uploaded(bucket, url)) == without_times(expected)


def test_the_files_that_a_run_reads_are_in_full(bucket: Bucket, url: str, tmp_path: Path) -> None:
    prefix = f"{tmp_path.name}/null"
    bucket.put(f"{prefix}/train/plan.json", b"{}")
    bucket.put(f"{prefix}/train/fold_0/errors-00000.parquet", b"bad")
    bucket.put(f"{prefix}/train/fold_0/part-00000.parquet", b"rows")
    root = local_path(url, "staged") / "null"
    with staging.staged(root):
        assert contents(root) == {
            "train/plan.json": b"{}",
            "train/fold_0/errors-00000.parquet": b"bad",
            "train/fold_0/part-00000.parquet": b"",
        }
