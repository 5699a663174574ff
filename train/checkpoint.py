"""Checkpoints: tensors and plain values only, written whole or not at all, never unpickled into code."""

import pickle
from pathlib import Path
from typing import Any

import torch

from isic.runtime.errors import UserError
from isic.runtime.files import atomic_path
from isic.tables import reading
from train.config import TrainSettings

BEST, LAST = "best_model.pth", "last.pth"
KEYS = ("model_state_dict", "optimizer_state_dict", "best_pauc", "epoch", "config", "args")

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
"""What reading a file with a few wrong bytes has been seen to raise."""


def save_checkpoint(path: Path, **values: Any) -> None:
    """Writes a checkpoint. Raises UserError when the disk is full; the former file is then still whole."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(values, file)
        except RuntimeError as error:
            # torch's archive is closed on the way out of a failed write, and what that raises hides the OSError.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU.

    Raises:
        UserError: no such file, damaged, not a checkpoint of this toolkit, or it holds anything but tensors and
            plain values (which would be code to run, and is refused).
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; train this fold first")
    with reading(path), open(path, "rb"):
        pass  # below, an OSError means wrong bytes
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors and plain values and is not loaded; get it from its author "
            "as plain tensors"
        ) from error
    except DAMAGE as error:
        reason = next(iter(str(error).splitlines()), "it ends too early")
        raise UserError(f"{path} is damaged ({reason}); train this fold again") from error
    missing = [key for key in KEYS if key not in values] if isinstance(values, dict) else list(KEYS)
    if missing:
        raise UserError(f"{path} is no checkpoint of this toolkit: it lacks {', '.join(missing)}")
    return dict(values)


def checkpoint_settings(checkpoint: dict[str, Any]) -> TrainSettings:
    """Returns the settings a checkpoint was trained with."""
    return TrainSettings(**checkpoint["args"])
