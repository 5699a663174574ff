"""Checkpoints: tensors and plain values only, written atomically, never unpickled into code."""

import pickle
from pathlib import Path
from typing import Any

import torch

from isic.runtime.errors import UserError, first_line
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


def save_checkpoint(path: Path, **values: Any) -> None:
    """Write a checkpoint.

    Raises:
        UserError: the disk is full or not writable; a previous file is then still intact.
    """
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(values, file)
        except RuntimeError as error:
            # When a write fails, torch.save closes its zip archive, which raises a RuntimeError
            # that hides the OSError; atomic_path needs the OSError to report a full disk. Seen with
            # torch 2.14; no report found. Remove it once torch.save raises the OSError.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


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
    return dict(values)


def checkpoint_settings(checkpoint: dict[str, Any]) -> TrainSettings:
    """Return the settings that a checkpoint was trained with."""
    return TrainSettings(**checkpoint["args"])
