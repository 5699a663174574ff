"""Local copies of remote inputs, from an S3 server and from memory."""

import threading
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import s3fs
from fsspec.implementations.memory import MemoryFileSystem

from isic.dataset import Dataset
from isic.layout import REMOTE_DATASET, REMOTE_TABLES
from isic.runtime import remote
from isic.runtime.errors import UserError
from isic.runtime.remote import PARTIAL, Storage, fetch
from isic.runtime.urls import local_path
from tests.support.commands import Cli
from tests.support.datasets import jpeg
from tests.support.s3 import BUCKET, KEYS, Bucket, Proxy

KIB = 1024


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryFileSystem]:
    """The file system of `memory://`, empty, and an empty cache."""
    monkeypatch.setenv("ISIC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.001)
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Path and first byte of each range that is read."""
    found = []
    read_range = Storage.read_range

    def counted(storage: Storage, path: str, start: int, end: int) -> bytes:
        found.append((path, start))
        return read_range(storage, path, start, end)

    monkeypatch.setattr(Storage, "read_range", counted)
    return found


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_dataset_on_s3_is_fetched_once_and_again_if_it_changes(
    bucket: Bucket, small_dataset: Path, cli: Cli
) -> None:
    url = bucket.put_folder(small_dataset, "set")
    bucket.put("set/outputs/best_model.pth", b"weights")
    bucket.put("set/notes.txt", b"notes")
    command = ("isic", "check", "--data", url, "--num_folds", 2)
    first = cli(*command)
    assert first.code == 0, first.err
    assert f"fetching {url} (2 files" in first.err
    local = local_path(url, "fetched")
    assert files_below(local) == files_below(small_dataset)
    again = cli(*command)
    assert again.code == 0
    assert "fetching" not in again.err
    table = (small_dataset / "train-metadata.csv").read_bytes()
    changed = table.replace(b"ISIC_", b"ISIX_", 1)
    bucket.put("set/train-metadata.csv", changed)
    changed_run = cli(*command)
    assert changed_run.code == 2
    assert f"fetching {url} (1 file," in changed_run.err
    assert (local / "train-metadata.csv").read_bytes() == changed


def test_a_folder_of_images_is_fetched_unless_there_is_an_hdf5_file(
    bucket: Bucket, reads: list[tuple[str, int]]
) -> None:
    images = {f"train-image/{part}/ISIC_{part}.jpg": jpeg(20, 10 * part) for part in range(5)}
    for key, data in images.items():
        bucket.put(f"photos/{key}", data)
    bucket.put("photos/train-image/", b"")  # as consoles mark folders
    bucket.put("photos/train-metadata.csv", b"isic_id,target\nISIC_0,0\n")
    local = local_path(f"s3://{BUCKET}/photos", "fetched")
    fetch(local, REMOTE_DATASET)
    store = Dataset(local).images("train")
    assert dict(zip(store.ids.tolist(), store.read(store.ids.tolist()), strict=True)) == {
        Path(key).stem: data for key, data in images.items()
    }
    bucket.put("photos/train-image.hdf5", b"another")
    bucket.put("photos/train-image/9/ISIC_9.jpg", b"not needed")
    reads.clear()
    fetch(local, REMOTE_DATASET)
    assert [path for path, _ in reads] == [f"{BUCKET}/photos/train-image.hdf5"]


def test_a_command_that_needs_tables_leaves_the_images_of_others(memory: MemoryFileSystem) -> None:
    memory.pipe({"/set/train-metadata.csv": b"a", "/set/train-image/A.jpg": b"b"})
    local = local_path("memory://set", "fetched")
    fetch(local, REMOTE_TABLES)
    assert files_below(local) == {"train-metadata.csv": b"a"}
    fetch(local, REMOTE_DATASET)
    fetch(local, REMOTE_TABLES)
    assert files_below(local) == {"train-metadata.csv": b"a", "train-image/A.jpg": b"b"}


def test_a_file_that_was_deleted_is_deleted_from_the_copy(memory: MemoryFileSystem) -> None:
    memory.pipe({"/set/train-metadata.csv": b"a", "/set/train-metadata.parquet": b"b"})
    local = local_path("memory://set", "fetched")
    fetch(local, REMOTE_TABLES)
    memory.rm("/set/train-metadata.parquet")
    fetch(local, REMOTE_TABLES)
    assert files_below(local) == {"train-metadata.csv": b"a"}


def test_a_damaged_copy_is_fetched_again(memory: MemoryFileSystem) -> None:
    memory.pipe({"/set/train-metadata.csv": b"whole", "/set/folds.parquet": b""})
    local = local_path("memory://set", "fetched")
    fetch(local, REMOTE_TABLES)
    (local / "train-metadata.csv").write_bytes(b"who")
    (local / "folds.parquet").unlink()
    with open(local.parent / remote.RECORD_FILE, "a") as record:
        record.write('["set/train-meta')  # as a killed process leaves it
    fetch(local, REMOTE_TABLES)
    assert files_below(local) == {"train-metadata.csv": b"whole", "folds.parquet": b""}


def test_a_file_is_fetched_again_if_its_storage_does_not_tell_versions_apart(
    memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same size, as a table in which one digit was corrected."""
    monkeypatch.setattr(remote, "VERSION_KEYS", ())
    local = local_path("memory://set", "fetched")
    for content in (b"isic_id,target\na,0\n", b"isic_id,target\na,1\n"):
        memory.pipe("/set/train-metadata.csv", content)
        fetch(local, REMOTE_TABLES)
        assert (local / "train-metadata.csv").read_bytes() == content


def test_remote_names_cannot_lead_out_of_the_copy(
    memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe({"/set/train-metadata.csv": b"a", "/set/train-image/A.jpg": b"b"})
    listed = MemoryFileSystem.ls

    def with_hostile_names(system: MemoryFileSystem, path: str, **options: Any) -> list[Any]:
        hostile = [
            {"name": f"{path}/..", "type": "directory", "size": 0},
            {"name": f"{path}/../evil.jpg/.", "type": "file", "size": 1},
        ]
        return [*listed(system, path, **options), *hostile]

    monkeypatch.setattr(MemoryFileSystem, "ls", with_hostile_names)
    local = local_path("memory://set", "fetched")
    fetch(local, REMOTE_DATASET)
    assert files_below(local) == {"train-metadata.csv": b"a", "train-image/A.jpg": b"b"}


@pytest.fixture
def large(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The content of an HDF5 file on the server that takes five requests."""
    monkeypatch.setattr(remote, "BLOCK", 64 * KIB)
    content = bytes(range(251)) * (300 * KIB // 251)
    bucket.put("large/train-image.hdf5", content)
    return content


LARGE = f"s3://{BUCKET}/large"


def through(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    s3fs.S3FileSystem.clear_instance_cache()


def test_dropped_connections_are_repeated(
    bucket: Bucket, large: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = Proxy(bucket.endpoint, drops=4, after=20 * KIB)
    through(proxy, monkeypatch)
    local = local_path(LARGE, "fetched")
    fetch(local, REMOTE_DATASET)
    proxy.close()
    assert proxy.num_dropped > 1
    assert (local / "train-image.hdf5").read_bytes() == large
    starts = {first for first, _ in proxy.ranges}
    assert starts == set(range(0, len(large), 64 * KIB))
    assert len(proxy.ranges) > len(starts)


@pytest.mark.slow
def test_a_connection_that_always_drops_ends_the_command(
    bucket: Bucket, large: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    proxy = Proxy(bucket.endpoint, drops=10_000, after=20 * KIB)
    through(proxy, monkeypatch)
    local = local_path(LARGE, "fetched")
    with pytest.raises(UserError, match=f"{LARGE} cannot be reached .* run the same command again"):
        fetch(local, REMOTE_DATASET)
    proxy.close()
    assert not local.exists()


def test_an_interrupted_fetch_is_continued(
    large: bytes, reads: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Storage.read_range

    def stopped(storage: Storage, path: str, start: int, end: int) -> bytes:
        if start == 128 * KIB:
            raise KeyboardInterrupt
        return counted(storage, path, start, end)

    monkeypatch.setattr(Storage, "read_range", stopped)
    local = local_path(LARGE, "fetched")
    with pytest.raises(KeyboardInterrupt):
        fetch(local, REMOTE_DATASET)
    assert not local.exists()
    monkeypatch.setattr(Storage, "read_range", counted)
    reads.clear()
    fetch(local, REMOTE_DATASET)
    assert [start for _, start in reads] == [128 * KIB, 192 * KIB, 256 * KIB]
    assert (local / "train-image.hdf5").read_bytes() == large
    assert not list(local.parent.glob(f"{PARTIAL}*"))


def test_a_file_that_changes_meanwhile_is_refused_then_fetched_from_its_start(
    bucket: Bucket, large: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_range = Storage.read_range

    def changed(storage: Storage, path: str, start: int, end: int) -> bytes:
        if start == 128 * KIB:
            bucket.put("large/train-image.hdf5", large[::-1])
        return read_range(storage, path, start, end)

    monkeypatch.setattr(Storage, "read_range", changed)
    local = local_path(LARGE, "fetched")
    with pytest.raises(UserError, match="was changed while it was fetched"):
        fetch(local, REMOTE_DATASET)
    assert not local.exists()
    monkeypatch.setattr(Storage, "read_range", read_range)
    fetch(local, REMOTE_DATASET)
    assert (local / "train-image.hdf5").read_bytes() == large[::-1]


def test_a_disk_that_is_too_small_is_refused_before(
    memory: MemoryFileSystem, reads: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe("/set/train-image.hdf5", bytes(5000))
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(4999))
    with pytest.raises(UserError, match=r"needs 0\.000 GB .* ISIC_CACHE_DIR"):
        fetch(local_path("memory://set", "fetched"), REMOTE_DATASET)
    assert reads == []


def test_processes_that_fetch_one_url_wait_for_each_other(
    memory: MemoryFileSystem, reads: list[tuple[str, int]], capfd: pytest.CaptureFixture[str]
) -> None:
    """Threads, for which the lock is another one's as it is for processes."""
    memory.pipe({f"/set/train-image/{row}.jpg": b"image %d" % row for row in range(50)})
    local = local_path("memory://set", "fetched")
    # Each thread has a file system of its own, on the same memory.
    threads = [threading.Thread(target=fetch, args=(local, REMOTE_DATASET)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 50
    assert len(files_below(local)) == 50
    assert capfd.readouterr().err.count("fetching memory://set") == 1


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        (f"s3://{BUCKET}/nothing", "does not exist"),
        ("s3://no-such-bucket/set", "does not exist"),
        (f"s3://{BUCKET}/errors/notes.txt", "is a file; give the folder that it is in"),
        (f"s3://{BUCKET}/errors", "has none of the files to read (train-metadata.csv"),
        ("s4://bucket/set", "there is no storage s4://; use s3://"),
        ("abfs://container/set", "needs the package adlfs; run `pip install adlfs`"),
    ],
)
def test_a_url_that_cannot_be_read_ends_in_one_sentence(
    url: str, reason: str, bucket: Bucket, cli: Cli
) -> None:
    bucket.put("errors/notes.txt", b"notes")
    ended = cli("infer", "embed", "--config", "tiny", "--data", url)
    assert ended.code == 2
    assert reason in ended.err
    assert ended.err.count("\n") == 1


def test_missing_credentials_end_in_one_sentence(
    bucket: Bucket, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in KEYS:
        if name != "AWS_EC2_METADATA_DISABLED":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    ended = cli("infer", "embed", "--config", "tiny", "--data", f"s3://{BUCKET}/set")
    assert ended.code == 2
    assert f"s3://{BUCKET}/set needs credentials" in ended.err
    assert "AWS_ACCESS_KEY_ID" in ended.err


def test_no_access_ends_in_one_sentence(
    memory: MemoryFileSystem, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(system: MemoryFileSystem, path: str, **options: Any) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(MemoryFileSystem, "info", refuse)
    ended = cli("isic", "check", "--data", "memory://set")
    assert ended.code == 2
    assert "no access to memory://set (Access Denied)" in ended.err
