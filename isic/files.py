"""Files written whole or not at all, and the manifests that tie each artifact to what it was made from."""

import contextlib
import errno
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import polars as pl

from isic.errors import UserError


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success its content appears under `path` in one step.

    A process killed inside the block leaves `path` as it was. Readers never see half a file.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
    except OSError as error:
        raise _disk_error(path, error) from error
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(
            0o666 & ~mask
        )  # mkstemp makes files private; these are for everybody the umask admits
        temporary.replace(path)
    except OSError as error:
        raise _disk_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _disk_error(path: Path, error: OSError) -> Exception:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return UserError(
            f"the disk is full, so {path} was not written; make room and run the same command again"
        )
    if error.errno in {
        errno.EACCES,
        errno.EROFS,
        errno.EPERM,
        errno.ENOTDIR,
        errno.EEXIST,
        errno.EISDIR,
    }:
        return UserError(
            f"cannot write {path} ({os.strerror(error.errno)}); choose another output folder"
        )
    return error


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_parquet(path: Path, table: pl.DataFrame, metadata: dict[str, str] | None = None) -> None:
    """Writes a table as Parquet, atomically; equal tables give equal bytes."""
    encoded = (
        io.BytesIO()
    )  # what polars raises for a full disk is not an OSError and does not say so
    table.write_parquet(encoded, compression="zstd", statistics=False, metadata=metadata)
    with atomic_path(path) as temporary:
        temporary.write_bytes(encoded.getvalue())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a mapping as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=1, default=str) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON mapping; raises UserError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run the step that makes it again") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is not valid JSON ({error}); run the step that makes it again"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, found a {type(value).__name__}")
    return value


def sha256(path: Path) -> str:
    """Returns the hexadecimal SHA-256 of a file's bytes."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None


def digest(*parts: object) -> str:
    """Returns a short digest (16 hexadecimal digits) of the parts' text."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()[:16]


def versions(*packages: str) -> dict[str, str]:
    """Returns the installed version of each package that is installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def manifest_path(artifact: Path) -> Path:
    """The manifest of `model.onnx` is `model.onnx.json`: the artifact's own bytes stay pure."""
    return artifact.with_name(artifact.name + ".json")


def write_manifest(artifact: Path, **fields: Any) -> None:
    """Writes the manifest beside an artifact; its `sha256` is added here."""
    write_json(
        manifest_path(artifact), {"artifact": artifact.name, "sha256": sha256(artifact), **fields}
    )


def read_manifest(artifact: Path) -> dict[str, Any]:
    """Reads an artifact's manifest and checks that it belongs to these very bytes.

    Raises:
        UserError: no artifact, no manifest, or one that was written for other bytes.
    """
    if not artifact.is_file():
        raise UserError(f"no such file: {artifact}")
    manifest = read_json(manifest_path(artifact))
    if manifest.get("sha256") != sha256(artifact):
        raise UserError(f"{artifact} is not the file its manifest describes; export it again")
    return manifest
