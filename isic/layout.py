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
"""

import re
from pathlib import Path

OUTPUT_DIR = Path("outputs")
"""Default parent of the runs."""

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


def find_run(folder: Path | None, config: str) -> Path:
    """Return a config's run: `folder`, or the default one if it is None."""
    return folder or OUTPUT_DIR / config


def fold_name(fold: int) -> str:
    """Return the name of a fold's folder."""
    return f"fold_{fold}"


def fold_dir(parent: Path, fold: int) -> Path:
    """Return the folder of a fold, which need not exist."""
    return parent / fold_name(fold)


def fold_dirs(parent: Path) -> dict[int, Path]:
    """Return the existing folders of folds by number, ascending; `fold_0_old` is not one."""
    found = {}
    for path in parent.glob("fold_*"):
        match = re.fullmatch(r"fold_([0-9]+)", path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def fold_files(parent: Path, name: str) -> dict[int, Path]:
    """Return the file of that name by fold, for the folds that have it."""
    paths = {fold: folder / name for fold, folder in fold_dirs(parent).items()}
    return {fold: path for fold, path in paths.items() if path.is_file()}
