"""Checkpoints: tensors and plain values only, written atomically, never unpickled into code."""

import pickle
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from isic.runtime.config import build
from isic.runtime.errors import UserError, first_line
from isic.runtime.fields import Count, Fields, Index, check_fields
from isic.runtime.files import atomic_path
from isic.tables import reading
from train.config import TrainSettings

CHECKPOINT_KEYS = (
    "model_state_dict",
    "optimizer_state_dict",
    "best_pauc",
    "epoch",
    "config",
    "args",
)

DAMAGE = (
    RuntimeError,
    EOFError,
    OSError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
)
"""Errors that torch.load has been seen to raise for a file with a few wrong bytes."""


class CheckpointFields(Fields):
    """The entries of a checkpoint that are no tensors."""

    model_state_dict: dict[str, Any]
    optimizer_state_dict: dict[str, Any] | None
    best_pauc: Annotated[float, Field(allow_inf_nan=True)] | None
    epoch: Index
    config: dict[str, Any]
    args: dict[str, Any]
    scaler_state_dict: dict[str, Any] = Field({})
    averaged_state_dict: dict[str, Any] | None = None
    step: Index = 0
    num_threads: Count | None = None
    num_processes: Count | None = None
    metadata_digests: list[str] | None = None
    images_digest: str | None = None


def save_checkpoint(path: Path, **values: Any) -> None:
    """Write a checkpoint; equal values give equal bytes.

    Raises:
        UserError: the disk is full or not writable; a previous file is then still intact.
    """
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(without_shared_parts(values), file)
        except RuntimeError as error:
            # When a write fails, torch.save closes its zip archive, which raises a RuntimeError
            # that hides the OSError; atomic_path needs the OSError to report a full disk. Seen with
            # torch 2.14; no report found. Remove it once torch.save raises the OSError.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def without_shared_parts(value: Any) -> Any:
    """Return a copy whose pickle depends on its content only, not on which parts are one object."""
    # Equal texts and tuples are one object in a new optimizer, and several in one that was loaded.
    if isinstance(value, str):
        return sys.intern(value)
    if type(value) is dict:
        return {without_shared_parts(key): without_shared_parts(value[key]) for key in value}
    if type(value) in {list, tuple}:
        return type(value)(map(without_shared_parts, value))
    return value  # also the states of modules, which hold more than their entries


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        UserError: the file is missing, damaged or not a checkpoint of this toolkit, or it holds
            anything but tensors and plain values, which would be code to run.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; train this fold first")
    with reading(path), open(path, "rb"):
        pass  # reports unreadable files here, because below an OSError means wrong bytes
    try:
        # weights_only: a file of unknown origin must not run code.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they concern files of old or damaged formats
            values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors and plain values and is not loaded; ask its author "
            "for plain tensors"
        ) from error
    except DAMAGE as error:
        reason = first_line(error, "it ends too early")
        raise UserError(f"{path} is damaged ({reason}); train this fold again") from error
    present = values if isinstance(values, dict) else {}
    missing = [key for key in CHECKPOINT_KEYS if key not in present]
    if missing:
        raise UserError(
            f"{path} is not a checkpoint of this toolkit: it lacks {', '.join(missing)}"
        )
    check_fields(path, values, CheckpointFields, "train this fold again")
    return dict(values)


@contextmanager
def damaged_content(path: Path) -> Iterator[None]:
    """Turn errors inside the block into a UserError: the content of a checkpoint has no use."""
    try:
        yield
    except UserError:
        raise
    except DAMAGE as error:
        reason = first_line(error, "a value is missing")
        raise UserError(f"{path} is damaged ({reason}); train this fold again") from error


def checkpoint_settings(path: Path, checkpoint: dict[str, Any]) -> TrainSettings:
    """Return the settings that the checkpoint at `path` was trained with. Raise UserError."""
    return build(TrainSettings, checkpoint["args"], source=str(path))
