"""The weights that a backbone starts from: file, digests, and images they learned from."""

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import nn

from isic.layout import BACKBONE_DIR, TRAINED_ON_FILE, WEIGHTS_FILE, Fold, fold_dir, fold_name
from isic.provenance import NOTHING, Seen, read_seen, refuse_seen
from isic.runtime.errors import UserError, first_line
from isic.runtime.files import sha256
from isic.runtime.urls import shown

TRAINED_ON_KEY = "trained_on"
"""Key in the metadata of WEIGHTS_FILE: the SHA-256 of its list of images and patients."""
HUB_PREFIX = "hf-hub:"
NOT_ON_HUB = (
    EntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    HFValidationError,
)
"""Errors about a file, repository or revision that does not exist."""
WEIGHT_SUFFIXES = {".safetensors", ".pth", ".pt", ".bin"}


@dataclass(frozen=True)
class Weights:
    """The weights that a backbone starts from."""

    source: str
    """A path or URL, a hub repository, `timm` (its own weights for the model), or `random`."""
    path: Path | None = None
    """The file, if it is a local one."""
    seen: Seen = field(default_factory=lambda: NOTHING)
    """The images and patients they have learned from, as far as known."""

    @property
    def repository(self) -> str | None:
        """The hub repository, optionally with a revision; None for other weights."""
        return None if self.path or self.source in {"timm", "random"} else self.source

    def manifest_fields(self, backbone: nn.Module) -> dict[str, Any]:
        """Return source, SHA-256 of the file and SHA-256 of the tensors, as far as they apply.

        `backbone` holds these weights.
        """
        if self.source == "random":
            return {"source": self.source}
        file = {"sha256": sha256(self.path)} if self.path else {}
        return {"source": self.source, **file, "tensors_sha256": tensors_sha256(backbone)}


def find_weights(pretrained: bool | str, fold: Fold) -> Weights:
    """Find the weights that a fold starts from.

    Args:
        pretrained: the setting: true, false, a local file or folder, or a hub repository.

    Raises:
        UserError: the file is missing, or it is a trained backbone without its list of images.
    """
    if isinstance(pretrained, bool):
        return Weights("timm" if pretrained else "random")
    path = local_file(pretrained, fold)
    if path:
        return Weights(shown(path), path, seen_by(path))
    name = hub_id(pretrained)
    return Weights(name, seen=seen_by_hub(name))


def local_file(pretrained: str, fold: Fold | None = None) -> Path | None:
    """Return the file of weights that a setting names, None for a hub repository.

    Args:
        pretrained: a file, a folder with WEIGHTS_FILE, or a run of this toolkit.

    Raises:
        UserError: the file does not exist, or a folder has none.
    """
    path = Path(pretrained)
    if fold is not None and (fold_dir(path, fold) / BACKBONE_DIR).is_dir():
        path = fold_dir(path, fold) / BACKBONE_DIR
    if path.is_dir():
        path = path / WEIGHTS_FILE
    if path.is_file():
        return path
    if Path(pretrained).is_dir():
        raise UserError(_without_weights(Path(pretrained), fold))
    # A misspelt path; timm would look for it on the hub.
    if path.suffix in WEIGHT_SUFFIXES:
        raise UserError(
            f"no weights at {shown(pretrained)}; give a file that exists, a hub name, or "
            "--pretrained false"
        )
    # Likewise; a repository of this name can be given with the prefix.
    if not pretrained.startswith(HUB_PREFIX) and len(path.parts) > 1 and path.parent.is_dir():
        raise UserError(
            f"there is nothing at {shown(pretrained)}; give a file or folder that exists, or "
            f"{HUB_PREFIX}{pretrained} for a repository of the hub"
        )
    return None


def existing_file(pretrained: bool | str, fold: Fold) -> Path | None:
    """Return the file of weights that a fold starts from, None if it is no local one or gone."""
    if isinstance(pretrained, bool):
        return None
    with contextlib.suppress(UserError):
        return local_file(pretrained, fold)
    return None


def _without_weights(folder: Path, fold: Fold | None) -> str:
    """Return the error message for a folder that has no weights to start a fold from."""
    lacking = WEIGHTS_FILE
    if fold is not None:
        lacking += f" and no {fold_name(fold)}/{BACKBONE_DIR}"
    others = [folder / BACKBONE_DIR, *sorted(folder.glob(f"fold_*/{BACKBONE_DIR}"))]
    found = [str(path) for path in others if path.is_dir()]
    fix = f"give a backbone of it, such as {found[0]}" if found else "give a file of weights"
    return f"{folder} has no {lacking}; {fix}"


def hub_id(pretrained: str) -> str:
    return pretrained.removeprefix(HUB_PREFIX)


def seen_by(path: Path) -> Seen:
    """Return the images and patients that the weights in a file have learned from.

    Raises:
        UserError: the list is missing, belongs to other weights, or is from an earlier version.
    """
    # The list is next to the weights, or, for `backbone/`, in the folder of the fold.
    folders = [path.parent]
    if path.parent.name == BACKBONE_DIR:
        folders.append(path.parent.parent)
    lists = [folder / TRAINED_ON_FILE for folder in folders]
    lists = [file for file in lists if file.is_file()]
    # Weights of this toolkit carry their list's digest, so they are recognised without the list.
    expected = _trained_on_digest(path)
    if expected is None:
        return read_seen(lists[0]) if lists else NOTHING
    for file in lists:
        if sha256(file) == expected:
            return read_seen(file)
    raise UserError(
        f"{shown(path)} was trained by this toolkit, but its list of images is not next to it; "
        f"copy {TRAINED_ON_FILE} from the fold's folder there"
    )


def seen_by_hub(name: str) -> Seen:
    """Return the images and patients that the weights in a hub repository have learned from.

    Args:
        name: `<owner>/<repository>`, with `@<revision>` for another one than the main one.

    Raises:
        UserError: this toolkit has trained them, and the repository lacks their list.
    """
    path = hub_file(name, WEIGHTS_FILE)
    if path is None or _trained_on_digest(path) is None:
        return NOTHING
    if hub_file(name, TRAINED_ON_FILE) is None:
        raise UserError(
            f"{name} was trained by this toolkit, but its list of images is not in the repository; "
            f"add {TRAINED_ON_FILE} from the fold's folder, or give a local copy of both files"
        )
    return seen_by(path)  # the hub's cache has the list next to the weights


@cache  # each request takes a while; failures, which raise, are not kept
def hub_file(name: str, file: str) -> Path | None:
    """Return a file of a hub repository, None if there is no such file or repository.

    Args:
        name: the repository, as for `seen_by_hub`.

    Raises:
        UserError: the hub gives no answer.
    """
    repository, _, revision = name.partition("@")
    try:
        return Path(hf_hub_download(repository, file, revision=revision or None))
    except Exception as error:  # of many types: the network, a proxy, the disk
        if _is_absent(error):
            return None
        # A command that reached the hub has left a note in its cache.
        known = try_to_load_from_cache(repository, file, revision=revision or None)
        if known is _CACHED_NO_EXIST:
            return None
        raise UserError(
            f"the hub cannot be asked for {file} of {name} ({first_line(error).rstrip('.')}); "
            "connect to it, or give a local copy as --pretrained"
        ) from error


def _is_absent(error: Exception) -> bool:
    """Return whether an error is the hub's answer that it has no such file or repository."""
    # LocalEntryNotFoundError is raised if the hub gives no answer.
    return isinstance(error, NOT_ON_HUB) and not isinstance(error, LocalEntryNotFoundError)


def _trained_on_digest(path: Path) -> str | None:
    """Return the digest of its list of images that a file carries, None if it has none."""
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get(TRAINED_ON_KEY)
    except SafetensorError as error:
        raise UserError(
            f"{path} is not a complete safetensors file ({error}); give one that is, or "
            "--pretrained false"
        ) from None


def tensors_sha256(module: nn.Module) -> str:
    """Return the SHA-256 of a module's tensors in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def refuse_leaking_weights(pretrained: bool | str, held_out: Mapping[Fold, pl.DataFrame]) -> None:
    """Raise a UserError if the weights of a fold have learned from rows that the fold holds out.

    Args:
        held_out: `isic_id` and optionally `patient_id` of the rows, by fold.
    """
    for fold, rows in held_out.items():
        weights = find_weights(pretrained, fold)
        refuse_seen(
            rows,
            weights.seen,
            f"the weights in {weights.source}",
            "start from weights that were trained on other data, or give the folder of a run with "
            "the same folds, so that each fold takes its own backbone",
        )
