"""A bundle's files for Kaggle: metadata of the dataset, and a notebook with its own metadata.

The keys are those of https://github.com/Kaggle/kaggle-cli/tree/main/docs.
"""

import json
import re
from pathlib import Path
from typing import Any

from infer.submission.settings import BundleSettings
from isic.runtime.files import write_json, write_text

COMPETITION = "isic-2024-challenge"
NOTEBOOK_DIR = "notebook"
NOTEBOOK = "submit.ipynb"
HOURS = 8.5
"""Half an hour less than a competition notebook may run."""

CELL = f"""\
import os
import subprocess
import sys
from pathlib import Path

inputs = Path(os.environ.get("KAGGLE_INPUT", "/kaggle/input"))
found = [path for depth in range(1, 6) for path in inputs.glob("*/" * depth + "bundle.json")]
if len(found) != 1:
    raise RuntimeError(f"{{inputs}} needs one bundle and has {{len(found)}}: {{found}}")
command = [sys.executable, str(found[0].with_name("submit.py")), "--input", str(inputs)]
command += ["--output", "submission.csv", "--hours", "{HOURS}", "--quiet", "true"]
ended = subprocess.run(command)
# If the cell failed, Kaggle would not score the submission by tables, which may be there already.
if not Path("submission.csv").is_file():
    raise RuntimeError(f"no submission: submit.py ended with exit code {{ended.returncode}}")
if ended.returncode:
    print(f"submit.py ended with exit code {{ended.returncode}}; the submission so far stays")
"""


def write(folder: Path, settings: BundleSettings) -> None:
    """Write the files into the folder of a bundle."""
    slug = slug_of(settings.title)
    dataset = {
        "title": settings.title,
        "id": f"{settings.owner}/{slug}",
        "licenses": [{"name": "other"}],
    }
    write_json(folder / "dataset-metadata.json", dataset)
    title = f"{settings.title} submission"
    kernel = {
        "id": f"{settings.owner}/{slug_of(title)}",
        "title": title,
        "code_file": NOTEBOOK,
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_gpu": settings.cuda != "none",
        "enable_internet": False,
        "dataset_sources": [dataset["id"]],
        "competition_sources": [COMPETITION],
        "kernel_sources": [],
        "model_sources": [],
    }
    write_json(folder / NOTEBOOK_DIR / "kernel-metadata.json", kernel)
    write_text(folder / NOTEBOOK_DIR / NOTEBOOK, json.dumps(notebook(), indent=1) + "\n")


def slug_of(title: str) -> str:
    """Return the part of an address that Kaggle makes of a title."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def notebook() -> dict[str, Any]:
    """Return a notebook of one cell that runs the bundle's script (nbformat 4.5)."""
    cell: dict[str, Any] = {
        "cell_type": "code",
        "execution_count": None,
        "id": "submit",
        "metadata": {},
        "outputs": [],
        "source": CELL.splitlines(keepends=True),
    }
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "cells": [cell],
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
