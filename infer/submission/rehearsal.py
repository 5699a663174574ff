"""The test of a bundle: a real submission in a process as on the other machine.

It has no network, no PyTorch and no home, may not write into the bundle or the data, and runs as
another user if this one is root.
"""

import contextlib
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from infer.embedding.store import RUN_FILE
from infer.submission.contents import CODE_DIR, SCRIPT, SITE_DIR
from infer.submission.settings import BundleSettings
from isic import schema
from isic.dataset import Dataset
from isic.runtime.errors import UserError
from isic.runtime.extras import EXTRAS
from isic.runtime.files import read_json
from isic.runtime.installed import this_python
from isic.settings import SynthSettings
from isic.synth.dataset import synthesize
from isic.synth.write import write_images
from isic.tables import read_table

SYNTHETIC = "synthetic"
NUM_SYNTHETIC = 200
NUM_OWN = 3
"""Test rows: synthetic ones, and the first ones of the user's dataset, as in Kaggle's sample."""
FULL_ROWS = 500_000
"""About the number of rows in the challenge's hidden test set."""
NOBODY = 65534
"""The user without rights of its own."""
FORBIDDEN = (*EXTRAS["train"], *EXTRAS["export"])
"""Modules that the other machine does not have."""

# Native code is not watched. None of the packages opens sockets in it, and the folders' permissions
# keep it from writing, unless the user is root.
GUARD = f"""
import os, runpy, sys

read_only, kind, target, *arguments = sys.argv[1:]
read_only = tuple(os.path.realpath(path) + os.sep for path in read_only.split(os.pathsep))

def refuse(event, values):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        raise RuntimeError("the bundle uses the network: " + event)
    if event == "import" and values[0].partition(".")[0] in {FORBIDDEN!r}:
        raise ModuleNotFoundError("no module in this test: " + values[0], name=values[0])
    if event == "open" and isinstance(values[0], str) and values[2] & (os.O_WRONLY | os.O_RDWR):
        if os.path.realpath(values[0]).startswith(read_only):
            raise PermissionError("the bundle writes into a read-only folder: " + values[0])

sys.addaudithook(refuse)
sys.argv = [target, *arguments]
run = runpy.run_path if kind == "script" else runpy.run_module
run(target, run_name="__main__")
"""


@dataclass(frozen=True)
class Rehearsal:
    """The result of a bundle's test."""

    python: str
    user: str
    rows: Mapping[str, int]
    """Submitted rows by dataset."""
    images_per_second: Mapping[str, float]
    """By network, all folds and views included, on the machine that made the bundle."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def rehearse(bundle: Path, settings: BundleSettings, synthetic: bool = True) -> Rehearsal:
    """Submit synthetic rows, and the first ones of the user's dataset, with a bundle.

    Args:
        synthetic: whether synthetic rows are submitted. They lack columns that are not the
            challenge's.

    Raises:
        UserError: a submission fails, loses a network or an image, or has other rows.
    """
    print("testing the bundle", flush=True)
    bundle = bundle.absolute()  # the process has another working directory
    with tempfile.TemporaryDirectory() as name, read_only(bundle):
        root = Path(name)
        datasets = _datasets(root, settings.data, synthetic)
        uid = _other_user(bundle, root)
        rates: dict[str, float] = {}
        rows = {}
        for label, data in datasets.items():
            out = root / f"{label}-output"
            out.mkdir()
            with read_only(data):
                _own(out, uid)
                _run(bundle, data, out, uid, settings)
            rows[label] = _check(data, out / "submission.csv")
            if label == SYNTHETIC:  # a handful of own rows says nothing
                rates = _rates(out)
    return Rehearsal(this_python(), "this user" if uid is None else "the user nobody", rows, rates)


def _datasets(root: Path, data: Path | None, synthetic: bool) -> dict[str, Path]:
    """Write the datasets of the test. Return their folders by name."""
    found = {}
    if synthetic:
        found[SYNTHETIC] = root / SYNTHETIC
        synthesize(
            SynthSettings(
                output_dir=found[SYNTHETIC], images=50, test_images=NUM_SYNTHETIC, pool=50
            )
        )
    if data:
        found["own"] = root / "own"
        _copy_rows(Dataset(data), found["own"])
    return found


def _copy_rows(dataset: Dataset, target: Path) -> None:
    """Write the first rows of a dataset's test split as a dataset of its own."""
    target.mkdir()
    table = read_table(dataset.metadata_path("test")).sort(schema.ID).head(NUM_OWN)
    ids = table[schema.ID].to_list()
    table.write_csv(target / "test-metadata.csv")
    contents = dataset.images("test").read(ids)
    write_images(target / "test-image.hdf5", zip(ids, contents, strict=True))


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Within the block everybody can read a folder, and nobody but root can write into it."""
    paths = [folder, *folder.rglob("*")]
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in paths}
    for path, mode in modes.items():
        path.chmod(mode & ~0o222 | (0o555 if path.is_dir() else 0o444))
    try:
        yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


def _other_user(bundle: Path, root: Path) -> int | None:
    """Return the id of a user without rights if this one may become it, else None."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return None
    root.chmod(0o755)
    # It may not reach this folder, or Python.
    command = [sys.executable, "-c", "import sys, os; os.listdir(sys.argv[1])", str(bundle)]
    try:
        ended = subprocess.run(
            command, user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True, check=False
        )
    except PermissionError:
        return None
    return NOBODY if ended.returncode == 0 else None


def _own(folder: Path, uid: int | None) -> None:
    if uid is not None:
        os.chown(folder, uid, uid)


def _run(bundle: Path, data: Path, out: Path, uid: int | None, settings: BundleSettings) -> None:
    """Run a bundle on a dataset. Raise UserError if it fails."""
    environment = {
        "PATH": os.environ.get("PATH", ""),
        "HOME": str(out / "no home"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    own_packages = (bundle / SITE_DIR).is_dir() and settings.python == this_python()
    if own_packages or not (bundle / SITE_DIR).is_dir():
        target = ["script", str(bundle / SCRIPT)]
    else:
        # The packages are for another Python: the code runs with those that are installed here.
        target = ["module", "infer", "submit", "--bundle", str(bundle)]
        environment["PYTHONPATH"] = str(bundle / CODE_DIR)
    # fmt: off
    arguments = [
        "--data", str(data), "--output", str(out / "submission.csv"), "--work", str(out / "work"),
        "--quiet", "true", "--strict", "true", "--keep", "true",
        "--device", "cpu" if settings.cuda == "none" else "auto",
    ]
    # fmt: on
    user: dict[str, Any] = {}
    if uid is not None:
        user = {"user": uid, "group": uid, "extra_groups": []}
    ended = subprocess.run(
        [sys.executable, "-P", "-c", GUARD, f"{bundle}{os.pathsep}{data}", *target, *arguments],
        cwd=out,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        **user,
    )
    if ended.returncode:
        lines = (ended.stderr.strip() or ended.stdout.strip()).splitlines()
        raise UserError(
            f"the bundle does not submit {data.name} rows ({lines[-1] if lines else 'no output'}); "
            "correct the cause, or write it untested with --test false"
        )


def _check(data: Path, path: Path) -> int:
    """Return the number of rows of a submission. Raise UserError if it is not a right one."""
    submission = read_table(path)
    wanted = Dataset(data).metadata("test")[schema.ID]
    score = submission[schema.TARGET].cast(pl.Float64).to_numpy()
    is_right = set(submission[schema.ID]) == set(wanted) and len(submission) == len(wanted)
    if not is_right or not np.isfinite(score).all() or score.min() < 0 or score.max() > 1:
        raise UserError(
            f"the submission of {data.name} rows has other ids, or scores beyond 0 and 1; "
            "report it as a bug"
        )
    return len(submission)


def _rates(out: Path) -> dict[str, float]:
    """Return the images per second of each network in a work folder, without its start."""
    rates = {}
    for path in sorted((out / "work").rglob(RUN_FILE)):
        run = read_json(path)
        seconds = sum(value for name, value in run["seconds"].items() if name != "total")
        rates[run["config"]] = run["num_images"] / seconds
    return rates
