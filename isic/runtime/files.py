"""Atomic writes, the cache folder, digests, and the manifest of each artifact."""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from isic.runtime.errors import DiskError, UserError
from isic.runtime.inputs import file_sha256, sha256_as_read

FOLDER_VARIABLE = "ISIC_CACHE_DIR"
"""Environment variable of the cache folder."""
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
    b"BZh": "bzip2",
}
"""The first bytes of a compressed file, and the program that made it."""
SYNCS_AT_ONCE = 16


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it replaces `path` in one step.

    After the block the file stays, even if the machine loses its power.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    try:
        make_folder(path.parent)
        # In the same folder, because a rename across file systems is not atomic.
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        # Not tempfile, whose files are private: some network file systems do not permit chmod.
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except OSError as error:
        raise disk_error(path, error) from error
    try:
        yield temporary
        sync(temporary)
        rename(temporary, path)
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # else it would hide why the block failed
            temporary.unlink(missing_ok=True)


def rename(source: Path, target: Path) -> None:
    """Rename a file or a folder in its folder, so that a loss of power does not undo it."""
    source.replace(target)
    sync(target.parent)


def make_folder(path: Path) -> None:
    """Create a folder and its parents, so that a loss of power does not undo it."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk, if this can be known."""
    try:
        opened = os.open(path, os.O_RDONLY)
    except PermissionError:
        if path.is_dir():  # one that may be written to but not listed
            return
        raise
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(opened)


def sync_tree(folder: Path) -> None:
    """Wait until all files and folders below a folder are on the disk."""
    paths = [path for path in (*folder.rglob("*"), folder) if not path.is_symlink()]
    # One by one, the 6,600 files of a bundle's packages take half a minute: each waits for the
    # journal, which threads share.
    with ThreadPoolExecutor(SYNCS_AT_ONCE) as pool:
        list(pool.map(sync, paths))  # raises the first error


def remove_folder(path: Path) -> None:
    """Remove a folder, if it is there, so that a kill leaves no part of it under its name."""
    removed = path.with_name(f".{path.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)  # of a run that was killed
    with contextlib.suppress(OSError):
        path.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content; the copy has its name only when it is whole and on the disk."""
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)


NO_SYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EROFS}
"""Errors of fsync(2) for files that cannot be synchronised, as on some FUSE and network mounts."""
DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
ONLY_OF_WRITING = {*DISK_FULL, errno.EFBIG, errno.EROFS}
NOT_WRITABLE = {
    *(errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EFBIG, errno.EIO, errno.ENOTSUP),
}


def disk_error(path: Path | str, error: OSError) -> Exception:
    """Return the error to raise for one that writing `path` has raised; a DiskError if possible."""
    number = _number(error)
    if number in DISK_FULL:
        return DiskError(
            f"the disk is full, so {path} was not written; free space and run the command again"
        )
    if number in NOT_WRITABLE:
        reason = os.strerror(number)
        return DiskError(f"cannot write {path} ({reason}); choose another output folder")
    return error


def is_of_writing(error: OSError) -> bool:
    """Return whether an error cannot come from reading: a full or a read-only disk, for example."""
    return _number(error) in ONLY_OF_WRITING


def _number(error: OSError) -> int | None:
    """Return the errno, which errors of Polars and of `shutil.copytree` have only in their text."""
    named = re.search(r"(?:os error |Errno )(\d+)", str(error))
    return int(named[1]) if error.errno is None and named else error.errno


def cache_folder() -> Path | None:
    """Return `ISIC_CACHE_DIR`, else a folder in the user's cache, None without a home."""
    if folder := os.environ.get(FOLDER_VARIABLE):
        return Path(folder)
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))  # relative paths are to be ignored
    try:
        if not base.is_absolute():
            base = Path.home() / {"darwin": "Library/Caches", "win32": "AppData/Local"}.get(
                sys.platform, ".cache"
            )
    except RuntimeError:  # neither HOME nor an entry for this user in the list of accounts
        return None
    return base / "isic-toolkit"


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a folder that is renamed to `target` on success and removed otherwise.

    After the block the folder stays, even if the machine loses its power.

    Raises:
        UserError: the disk is full or the parent cannot be written.
    """
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        make_folder(target.parent)
        temporary.mkdir()
    except OSError as error:
        raise disk_error(target, error) from error
    try:
        yield temporary
        sync_tree(temporary)
        rename(temporary, target)
    except OSError as error:
        if not is_of_writing(error):  # it may be of a file that the block reads
            raise
        raise disk_error(target, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_foreign(paths: Iterable[Path], is_own: bool, flag: str) -> None:
    """Raise a UserError if writing would replace something that the command did not write.

    Args:
        is_own: whether an earlier run of the command wrote them; devices and folders are refused
            even then.
    """
    for path in paths:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a regular file; choose another {flag}")
        if os.path.lexists(path) and not is_own:
            raise UserError(
                f"{path} exists and was not written by this command, which would replace it; "
                f"choose another {flag}"
            )


def megabytes(path: Path) -> float:
    """Return the size of a file, or of all files in a folder, in units of 1,000,000 bytes."""
    files = [path, *path.rglob("*")]
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_text(path: Path) -> str:
    """Read UTF-8 text. Raise UserError if it is missing, cannot be opened or is something else."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run the step that makes it again") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8; save it in that encoding") from None
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}); check its permissions and the disk"
        ) from None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a mapping as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=1, default=str) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON mapping. Raise UserError if there is none."""
    value = parse_json(read_text(path), path)
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, found a {type(value).__name__}")
    return value


def parse_json(text: str, source: Path) -> Any:
    """Return the value of a JSON text. Raise UserError, which names the file it is from."""
    try:
        return json.loads(text)
    except RecursionError:
        reason = "its brackets are nested too deeply"
    except ValueError as error:  # also for a number of thousands of digits
        reason = str(error)
    raise UserError(f"{source} is not valid JSON ({reason}); run the step that makes it again")


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes.

    Raises:
        UserError: it cannot be read, or is a table that has changed since this command read it.
    """
    try:
        return sha256_as_read(path) or file_sha256(path)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}); check its permissions and the disk"
        ) from None


def digest(*parts: object) -> str:
    """Return a short digest (16 hexadecimal digits) of the parts' text."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()[:16]


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of the packages that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def manifest_path(artifact: Path) -> Path:
    """Return the path of an artifact's manifest: `model.onnx.json` for `model.onnx`."""
    return artifact.with_name(artifact.name + ".json")


def write_manifest(artifact: Path, content: Path | None = None, **fields: Any) -> None:
    """Write an artifact's manifest with the artifact's `sha256`.

    `content` is the file that will be renamed to the artifact, if that has not happened yet.
    """
    about = {"artifact": artifact.name, "sha256": sha256(content or artifact)}
    write_json(manifest_path(artifact), {**about, **fields})


def holds(path: Path, *keys: str) -> bool:
    """Return whether a file is a JSON object with these keys, as a command's own output is."""
    if not path.is_file():
        return False
    with contextlib.suppress(UserError):
        return set(keys) <= set(read_json(path))
    return False


def read_manifest(artifact: Path) -> dict[str, Any]:
    """Read an artifact's manifest and check the artifact's sha256.

    Raises:
        UserError: no artifact, no manifest, or a manifest of other bytes.
    """
    if not artifact.is_file():
        raise UserError(f"no such file: {artifact}")
    manifest = read_json(manifest_path(artifact))
    if manifest.get("sha256") != sha256(artifact):
        raise UserError(f"{artifact} does not match its manifest's sha256; export it again")
    return manifest
