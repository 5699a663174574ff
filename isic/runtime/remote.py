"""Remote files, by fsspec: local copies of inputs, and the upload of outputs."""

import contextlib
import fcntl
import json
import os
import random
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from isic.runtime.errors import UserError, first_line
from isic.runtime.extras import install_command
from isic.runtime.files import FOLDER_VARIABLE, digest, disk_error, sync
from isic.runtime.urls import Wanted, url_of

BLOCK = 16 * 1024 * 1024
"""Bytes per request; a dropped connection repeats one request."""
NUM_THREADS = 8
"""Files that are fetched at once; each holds one block in memory."""
SLICE_FILES = 1024
"""Files that are handed to the threads at once, to bound memory."""
ATTEMPTS = 6
"""Number of times that a request is made before the command ends."""
FIRST_DELAY = 1.0
"""Mean seconds before the second attempt; they double from each attempt to the next."""

LOCK_FILE = ".lock"
RECORD_FILE = ".fetched.jsonl"
"""A line per file of a local copy: its name, and size and version of the remote file."""
PARTIAL = ".partial-"
"""Beginning of the names of unfinished files."""

VERSION_KEYS = ("ETag", "etag", "md5Hash", "content_md5", "blob_id", "mtime", "updated", "created")
"""Keys of file systems for a value that changes with a file, the most reliable first."""

NETWORK_ERRORS = (
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("httpx", "HTTPError"),
)
"""Module and name of the errors of file systems that are no OSError."""
NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "ProfileNotFound",
    "DefaultCredentialsError",
}
"""Names of the errors of file systems for missing credentials."""

_ResultT = TypeVar("_ResultT")


class NoSuchFile(UserError):
    """A remote file or folder does not exist."""


@dataclass(frozen=True)
class RemoteFile:
    """A file in a file system of fsspec."""

    path: str
    size: int
    version: str
    """Changes with the content; empty if the file system has no such value."""

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> "RemoteFile":
        if info.get("size") is None:
            raise UserError(f"{info['name']} has no known size; copy it to this machine instead")
        version = next((str(info[key]) for key in VERSION_KEYS if info.get(key)), "")
        return cls(str(info["name"]), int(info["size"]), version)

    @property
    def state(self) -> list[int | str]:
        return [self.size, self.version]


class Storage:
    """The file system of a URL. Every request is repeated after network errors.

    Every method raises a UserError that names the URL, NoSuchFile if a file does not exist.
    """

    def __init__(self, url: str) -> None:
        fsspec = import_module("fsspec")  # optional
        self.url = url
        protocol = url.partition("://")[0]
        try:
            # A cached listing would hide that a file has changed.
            self._system, self.root = fsspec.url_to_fs(url, use_listings_cache=False)
        except ImportError:
            # `fsspec.registry` is also the name of a mapping.
            known = import_module("fsspec.registry").known_implementations
            package = known[protocol]["class"].partition(".")[0]
            command = install_command("remote") if package == "s3fs" else f"pip install {package}"
            raise UserError(f"{url} needs the package {package}; run `{command}`") from None
        except ValueError:
            raise UserError(f"there is no storage {protocol}://; use s3:// or another") from None

    def info(self, path: str) -> dict[str, Any]:
        """Return fsspec's description of a file or folder."""
        found: dict[str, Any] = self._call(partial(self._system.info, path))
        return found

    def list(self, folder: str) -> dict[str, dict[str, Any]]:
        """Return fsspec's description of each file and folder in a folder, by name."""
        entries = {
            entry["name"].rstrip("/").rpartition("/")[2]: entry
            for entry in self._call(partial(self._system.ls, folder, detail=True))
            # Some stores keep an empty file of the folder's own name.
            if entry["name"].strip("/") != folder.strip("/")
        }
        return {name: entry for name, entry in entries.items() if _is_safe(name)}

    def find(self) -> dict[str, RemoteFile]:
        """Return every file below the URL by relative path."""
        found = self._call(partial(self._system.find, self.root, detail=True))
        files = {path.removeprefix(f"{self.root}/"): info for path, info in found.items()}
        return {
            name: RemoteFile.of(info)
            for name, info in files.items()
            if all(map(_is_safe, name.split("/")))
        }

    def read(self, path: str) -> bytes:
        """Return the content of a file."""
        data: bytes = self._call(partial(self._system.cat_file, path))
        return data

    def read_range(self, path: str, start: int, end: int) -> bytes:
        """Return the bytes from `start` up to `end`."""

        def read() -> bytes:
            data: bytes = self._system.cat_file(path, start=start, end=end)
            if len(data) != end - start:
                raise OSError(f"{len(data)} bytes in place of {end - start}")
            return data

        return self._call(read)

    def upload(self, local: Path) -> None:
        """Upload a file whole, to the URL."""
        self._call(partial(self._system.put_file, os.fspath(local), self.root))

    def delete(self, names: Sequence[str]) -> None:
        """Delete files below the URL, in this order."""
        for name in names:
            with contextlib.suppress(NoSuchFile):
                self._call(partial(self._system.rm_file, f"{self.root}/{name}"))

    def _call(self, request: Callable[[], _ResultT]) -> _ResultT:
        for attempt in range(ATTEMPTS):
            try:
                return request()
            except _network_errors() as error:
                if _is_final(error) or attempt == ATTEMPTS - 1:
                    raise self._explain(error) from None
            time.sleep(FIRST_DELAY * 2**attempt * random.uniform(0.5, 1.5))
        raise AssertionError("the last attempt returns or raises")

    def _explain(self, error: BaseException) -> UserError:
        reason = first_line(error)
        if isinstance(error, FileNotFoundError):
            return NoSuchFile(f"{self.url} does not exist ({reason}); check the URL")
        if isinstance(error, PermissionError):
            return UserError(
                f"no access to {self.url} ({reason}); check the credentials and their rights"
            )
        if type(error).__name__ in NO_CREDENTIALS:
            return UserError(
                f"{self.url} needs credentials ({reason}); give those of its storage, for S3 "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile in ~/.aws"
            )
        return UserError(
            f"{self.url} cannot be reached ({reason}); run the same command again when it can"
        )


def _network_errors() -> tuple[type[BaseException], ...]:
    # Only a library that is imported can raise its errors.
    loaded = [(sys.modules.get(module), name) for module, name in NETWORK_ERRORS]
    return (OSError, *(getattr(module, name) for module, name in loaded if module))


def _is_final(error: BaseException) -> bool:
    """Return whether another attempt would fail too."""
    refused = isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError)
    return refused or type(error).__name__ in NO_CREDENTIALS


def _is_safe(name: str) -> bool:
    """Return whether a remote name stays in its folder, which those of object stores need not."""
    return name not in ("", ".", "..")


def fetch(local: Path, wanted: Wanted) -> None:
    """Bring the local copy of a URL up to date; for any other path, do nothing.

    A file of unchanged size and version is not fetched again, and an unfinished one is continued.
    Processes that fetch the same URL wait for each other.

    Args:
        local: the path that stands for the URL.

    Raises:
        UserError: the URL does not exist, cannot be read or has none of the files; or the disk is
            too small.
    """
    url = url_of(local, "fetched")
    if url is None:
        return
    with locked(local.parent / LOCK_FILE, f"waiting for another process that fetches {url}"):
        storage = Storage(url)
        _update(local.parent, storage, _find(storage, local.name, wanted), wanted)


def _find(storage: Storage, name: str, wanted: Wanted) -> dict[str, RemoteFile]:
    """Return the wanted files by their path in the local copy. Raise UserError if there are none.

    Args:
        name: the last part of the URL.
    """
    about = storage.info(storage.root)
    if about["type"] == "directory":
        entries = storage.list(storage.root)
        patterns = [_first_present(group, entries) for group in wanted.below]
        files = {f"{name}/{path}": file for path, file in _matching(storage, entries, patterns)}
    elif wanted.may_be_file:
        files = {name: RemoteFile.of(about)}
    else:
        raise UserError(f"{storage.url} is a file; give the folder that it is in")
    if not files:
        names = ", ".join(name for group in wanted.below for name in group)
        raise UserError(f"{storage.url} has none of the files to read ({names}); check the URL")
    parent = storage.root.rpartition("/")[0]
    for beside in wanted.beside if parent else ():
        with contextlib.suppress(NoSuchFile):
            files[beside] = RemoteFile.of(storage.info(f"{parent}/{beside}"))
    return files


def _first_present(group: tuple[str, ...], names: Mapping[str, Any]) -> str:
    for pattern in group:
        if any(fnmatchcase(name, pattern.partition("/")[0]) for name in names):
            return pattern
    return group[0]


def _matching(
    storage: Storage, entries: Mapping[str, Mapping[str, Any]], patterns: Sequence[str]
) -> Iterator[tuple[str, RemoteFile]]:
    """Yield relative path and file for each file that a pattern names."""
    for name, entry in entries.items():
        if entry["type"] != "directory":
            if any(fnmatchcase(name, pattern) for pattern in patterns):
                yield name, RemoteFile.of(entry)
            continue
        parts = [pattern.partition("/") for pattern in patterns]
        below = [rest for first, _, rest in parts if rest and fnmatchcase(name, first)]
        below += [pattern for pattern in patterns if pattern == "**"]
        if below:
            for path, file in _matching(storage, storage.list(entry["name"]), below):
                yield f"{name}/{path}", file


def _update(
    folder: Path, storage: Storage, files: Mapping[str, RemoteFile], wanted: Wanted
) -> None:
    record = _read_record(folder)
    for name in record.keys() - files.keys():
        if wanted.includes(name.partition("/")[2]):  # other commands may need the others
            (folder / name).unlink(missing_ok=True)
    due = {
        name: file
        for name, file in files.items()
        # Without a version, a change that keeps the size would not be noticed.
        if not file.version or record.get(name) != file.state or _size(folder / name) != file.size
    }
    partials = {name: _partial(folder, name, file) for name, file in due.items()}
    for path in set(folder.glob(f"{PARTIAL}*")) - set(partials.values()):
        path.unlink()  # of a version that no longer exists
    if due:
        missing = sum(file.size - (_size(partials[name]) or 0) for name, file in due.items())
        _refuse_small_disk(folder, missing, storage.url)
        _fetch_all(folder, storage, due, partials)


def _fetch_all(
    folder: Path, storage: Storage, due: Mapping[str, RemoteFile], partials: Mapping[str, Path]
) -> None:
    num_bytes = sum(file.size for file in due.values())
    size = f"{len(due):,} file{'s' * (len(due) > 1)}, {num_bytes / 1e6:,.1f} MB"
    print(f"fetching {storage.url} ({size})", file=sys.stderr)
    names = list(due)
    pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="fetch")
    with (
        tqdm(total=num_bytes, unit="B", unit_scale=True, disable=None) as bar,
        open(folder / RECORD_FILE, "a", encoding="utf-8") as record,
    ):

        def fetch_one(name: str) -> str:
            _fetch_file(storage, due[name], partials[name], folder / name)
            return name

        try:
            for start in range(0, len(names), SLICE_FILES):
                for name in pool.map(fetch_one, names[start : start + SLICE_FILES]):
                    with _disk_errors(folder / RECORD_FILE):
                        record.write(json.dumps([name, *due[name].state]) + "\n")
                        record.flush()
                    bar.update(due[name].size)
        finally:
            pool.shutdown(cancel_futures=True)


def _fetch_file(storage: Storage, file: RemoteFile, unfinished: Path, target: Path) -> None:
    """Fetch the rest of a file by ranges, and give it its name when it is whole."""
    start = _size(unfinished) or 0
    with _disk_errors(target):
        out = open(unfinished, "ab")  # noqa: SIM115
    with out:
        for begin in range(start, file.size, BLOCK):
            data = storage.read_range(file.path, begin, min(begin + BLOCK, file.size))
            with _disk_errors(target):
                out.write(data)
                out.flush()  # to be continued if this process is killed
    if start or file.size > BLOCK:  # another version may have been written between two requests
        _refuse_change(storage, file, unfinished)
    with _disk_errors(target):
        if file.size > BLOCK:  # for a folder of images it would take longer than to fetch them
            sync(unfinished)
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished.replace(target)


def _refuse_change(storage: Storage, file: RemoteFile, unfinished: Path) -> None:
    if RemoteFile.of(storage.info(file.path)).state != file.state:
        unfinished.unlink()
        raise UserError(f"{file.path} was changed while it was fetched; run the same command again")


def _partial(folder: Path, name: str, file: RemoteFile) -> Path:
    """Return the path of the unfinished file, which is deleted if it cannot be continued."""
    path = folder / f"{PARTIAL}{digest(name, *file.state)}"
    if not file.version or (_size(path) or 0) > file.size:
        path.unlink(missing_ok=True)
    return path


def _size(path: Path) -> int | None:
    """Return the size of a file in bytes, None if there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _read_record(folder: Path) -> dict[str, list[int | str]]:
    """Return size and version of each file of a local copy, as they were when it was fetched."""
    record = {}
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / RECORD_FILE).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a line that a killed process did not finish
                name, *state = json.loads(line)
                record[name] = state
    return record


def _refuse_small_disk(folder: Path, num_bytes: int, url: str) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise UserError(
            f"{url} needs {num_bytes / 1e9:,.3f} GB in {folder.parent}, which has "
            f"{free / 1e9:,.3f} GB free; free space, or name another folder by {FOLDER_VARIABLE}"
        )


def publish(path: Path) -> None:
    """Upload a file that stands for one of a remote output; for any other path, do nothing."""
    url = url_of(path, "staged")
    if url is not None:
        Storage(url).upload(path)


@contextlib.contextmanager
def published(path: Path) -> Iterator[Path]:
    """Yield the path to write a file to, which is `path` unless it stands for a remote file.

    A remote one is uploaded at the end of the block, and `path` becomes an empty file.
    """
    url = url_of(path, "staged")
    if url is None:
        yield path
        return
    whole = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield whole
        Storage(url).upload(whole)
        path.touch()  # only now, because a shard that exists counts as done
    finally:
        whole.unlink(missing_ok=True)


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turn errors of this machine's disk into a UserError."""
    try:
        yield
    except OSError as error:
        raise disk_error(path, error) from None


@contextlib.contextmanager
def locked(path: Path, waiting: str, wait: bool = True) -> Iterator[None]:
    """Hold a lock for the block, against other processes on machines that share the file.

    Args:
        waiting: printed if another process holds the lock.
        wait: False to raise it as a UserError instead.
    """
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a", encoding="utf-8")  # noqa: SIM115
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise UserError(waiting) from None
            print(waiting, file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
