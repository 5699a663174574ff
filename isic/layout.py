"""Folders and file names that more than one command uses.

<output_dir>/<name>/           a run
    folds.parquet              which fold holds out which row
    errors.parquet             images that could not be used
    fold_<k>/                  one trained fold
        config.yaml            settings of the run
        last.pth               to resume from
        history.jsonl          one line per epoch
        best_model.pth         the trained network
        trained_on.parquet     images and patients that it has learned from
        oof.parquet            scores of the held-out rows
        backbone/              the backbone for timm
        model.onnx             an exported artifact
    fold_all/                  the network trained on every row: as a fold, without oof.parquet
    fold_none/                 a backbone that was not trained: artifacts, trained_on.parquet
"""

import re
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator

from isic.runtime.urls import Wanted

Fold = int | Literal["all", "none"]
"""The number of a fold, ALL or NONE."""
ALL: Final = "all"
"""The fold that trains on every row and holds none out."""
NONE: Final = "none"
"""In place of a fold: a backbone without a lesion head, exported as its weights were found."""
# Not numbers of a fold. Null would be lost in joins.
ALL_NUMBER = -1
"""ALL in a column of integers, and among the numbers that seeds depend on."""
NONE_NUMBER = -2
"""NONE in a column of integers."""

OUTPUT_DIR = Path("outputs")
"""Default parent of the runs."""
EMBEDDINGS_DIR = OUTPUT_DIR / "embeddings"
"""Default parent of embeddings."""

FOLDS_FILE = "folds.parquet"
ERRORS_FILE = "errors.parquet"

CONFIG_FILE = "config.yaml"
LAST_CHECKPOINT = "last.pth"
HISTORY_FILE = "history.jsonl"
BEST_CHECKPOINT = "best_model.pth"
TRAINED_ON_FILE = "trained_on.parquet"
OOF_FILE = "oof.parquet"
BACKBONE_DIR = "backbone"
ONNX_FILE = "model.onnx"

WEIGHTS_FILE = "model.safetensors"
"""Weights in a folder in timm's `local-dir` form."""

REMOTE_TABLES = Wanted(
    (
        *(
            (f"{split}-metadata.{ending}",)
            for split in ("train", "test")
            for ending in ("csv", "parquet")
        ),
        (FOLDS_FILE,),
        ("sample_submission.csv",),
    )
)
"""The files to fetch of a remote dataset if its images are not needed."""
REMOTE_DATASET = Wanted(
    (
        *REMOTE_TABLES.below,
        # As when it is read: a folder is used only if there is no HDF5 file.
        *((f"{split}-image.hdf5", f"{split}-image/**") for split in ("train", "test")),
        ("masks.hdf5",),
    )
)
"""The files to fetch of a remote dataset."""
REMOTE_WEIGHTS = Wanted(
    (
        (WEIGHTS_FILE,),
        (TRAINED_ON_FILE,),
        (f"fold_*/{BACKBONE_DIR}/{WEIGHTS_FILE}",),
        (f"fold_*/{BACKBONE_DIR}/{TRAINED_ON_FILE}",),
        (f"fold_*/{TRAINED_ON_FILE}",),
    ),
    beside=(TRAINED_ON_FILE,),
    may_be_file=True,
)
"""The files to fetch of remote weights: a file, a folder for timm, or a run."""

TABLE_SUFFIXES = (".csv", ".parquet")
"""Endings of the tables that commands read and write."""
AUX_PREFIX = "aux."
"""Beginning of the columns of auxiliary targets and of their logits, in every table."""


def find_embeddings(parent: Path, config: str, fold: Fold | None = None) -> Path:
    """Return the folder of a config's embeddings: by its numbered folds (None), or by ALL."""
    # A folder of its own: each reader of embeddings takes all models that a folder names.
    return parent / (f"{config}_{ALL}" if fold == ALL else config)


def _parse_fold(value: Any) -> Any:
    # One sentence, because pydantic would report each part of the union.
    if value == ALL or re.fullmatch("[0-9]+", str(value)):
        return value
    raise ValueError(f"a fold is a number from 0 on, or {ALL}")


FoldFlag = Annotated[Fold, BeforeValidator(_parse_fold)]
"""A fold in the settings of a command."""


def find_run(folder: Path | None, config: str) -> Path:
    """Return a config's run: `folder`, or the default one if it is None."""
    return folder or OUTPUT_DIR / config


def fold_number(fold: Fold) -> int:
    """Return the number of a fold, ALL_NUMBER for ALL, and NONE_NUMBER for NONE."""
    return fold if isinstance(fold, int) else {ALL: ALL_NUMBER, NONE: NONE_NUMBER}[fold]


def fold_name(fold: Fold) -> str:
    """Return the name of a fold's folder."""
    return f"fold_{fold}"


def fold_dir(parent: Path, fold: Fold) -> Path:
    """Return the folder of a fold, which need not exist."""
    return parent / fold_name(fold)


def fold_dirs(parent: Path, only: Fold | None = None) -> dict[Fold, Path]:
    """Return the existing folders of folds by number, ascending; `fold_0_old` is not one.

    Args:
        only: the fold to look for; None for all that have a number, which ALL and NONE have not.
    """
    if only is not None:
        folder = fold_dir(parent, only)
        return {only: folder} if folder.is_dir() else {}
    found = {}
    for path in parent.glob("fold_*"):
        match = re.fullmatch(r"fold_([0-9]+)", path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def fold_files(parent: Path, name: str, only: Fold | None = None) -> dict[Fold, Path]:
    """Return the file of that name by fold, for the folds of `fold_dirs` that have it."""
    paths = {fold: folder / name for fold, folder in fold_dirs(parent, only).items()}
    return {fold: path for fold, path in paths.items() if path.is_file()}


def is_backbone(run: Path) -> bool:
    """Return whether a run is a backbone that `export --model` made, and has no trained fold."""
    return fold_dir(run, NONE).is_dir() and not fold_dirs(run)
