"""A stand-in for the challenge's dataset: its layout, schema and margins, with a malignancy that can be learnt.

Nothing in it is real. What it is for: to run, test and measure the whole road without the data.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import polars as pl
from numpy.random import Generator
from numpy.typing import NDArray
from pydantic import Field
from sklearn.neighbors import KDTree

from isic import schema
from isic.config import Settings
from isic.errors import UserError
from isic.files import read_json, sha256, versions, write_json
from isic.machine import num_cores
from isic.synth.crops import Crop, looks, render
from isic.synth.rows import Rows, default_positives, draw_rows, num_patients
from isic.synth.write import write_images, write_table

MANIFEST = "synth.json"
FORMAT = 1
"""Goes up when the same settings give other content."""

TABLES = ("train-metadata.csv", "test-metadata.csv", "test-truth.csv", "sample_submission.csv")
IMAGES = ("train-image.hdf5", "test-image.hdf5", "masks.hdf5")
FILES = (*TABLES, *IMAGES)
FOREIGN = ("train-image", "test-image", "train-metadata.parquet", "test-metadata.parquet")
"""What else a dataset may consist of, and a stand-in never does."""

DEFAULT_POOL = 4_000
POOL_POSITIVES = 0.15
"""Share of malignant rows among those the pool is drawn from, so that there are crops enough for strong cues."""

CUE_WEIGHT = 3.0
MATCHED = (
    "tbp_lv_L",
    "tbp_lv_Lext",
    "tbp_lv_A",
    "tbp_lv_B",
    "tbp_lv_Aext",
    "clin_size_long_diam_mm",
)
"""A row takes the pool's crop that is nearest in these columns (in standard deviations) and CUE_WEIGHT x its cue."""


class SynthSettings(Settings):
    """What to draw. The same settings give the same bytes."""

    out: Path = Field(description="folder to write the dataset into")
    images: int = Field(
        3_000, ge=50, le=2_000_000, description="rows and crops of the training split"
    )
    positives: int | None = Field(
        None, ge=1, description="malignant ones among them; by default 5 %, at most 393"
    )
    seed: int = Field(0, ge=0, description="of everything that is drawn")
    test_images: int | None = Field(
        None, ge=1, le=2_000_000, description="rows and crops of the test split; by default a tenth"
    )
    pool: int | None = Field(
        None, ge=50, description="crops to render; with more rows they are used again"
    )


@dataclass(frozen=True)
class Spec:
    """The settings with every default filled in: what decides the content."""

    images: int
    positives: int
    test_images: int
    test_positives: int
    seed: int
    pool: int
    format: int = FORMAT


def spec_of(settings: SynthSettings) -> Spec:
    """Fills in the defaults. Raises UserError where the numbers do not fit one another."""
    positives = (
        default_positives(settings.images) if settings.positives is None else settings.positives
    )
    if positives > settings.images // 2:
        raise UserError(
            f"--positives {positives} is more than half of --images {settings.images}; ask for fewer"
        )
    test_images = settings.test_images or max(settings.images // 10, 10)
    return Spec(
        images=settings.images,
        positives=positives,
        test_images=test_images,
        test_positives=max(
            round(test_images * positives / settings.images), min(2, test_images // 2)
        ),
        seed=settings.seed,
        pool=min(settings.images, settings.pool or DEFAULT_POOL),
    )


def synthesize(settings: SynthSettings, say: Callable[[str], None] = lambda _: None) -> bool:
    """Writes a stand-in dataset into `settings.out` in the challenge's layout.

    Beside the challenge's files there are `masks.hdf5`, `test-truth.csv` (the labels of the test split) and, last,
    `synth.json` with the settings, counts and digests: as long as it says "unfinished", the run was interrupted and
    is done anew.

    Args:
        settings: what to draw, and where.
        say: is told what goes on.

    Returns:
        False where the folder already holds this very dataset, so that nothing was done.

    Raises:
        UserError: the numbers do not fit one another, the folder holds another dataset, or it cannot be written.
    """
    spec, out = spec_of(settings), settings.out
    if _is_done(out, spec):
        return False
    _remove_leftovers(out)
    write_json(out / MANIFEST, {"unfinished": True, **_described(spec)})
    say(f"drawing {spec.images:,} training and {spec.test_images:,} test rows")
    train, test = _draw_tables(spec)
    _write_tables(out, train.table, test.table)
    _write_crops(out, train, test, spec, say)
    write_json(
        out / MANIFEST,
        {
            **_described(spec),
            "patients": {
                name: rows.table[schema.PATIENT].n_unique()
                for name, rows in (("train", train), ("test", test))
            },
            "files": {name: sha256(out / name) for name in FILES},
            "versions": versions(
                "numpy", "opencv-python-headless", "h5py", "polars", "scikit-learn"
            ),
        },
    )
    return True


def _described(spec: Spec) -> dict[str, object]:
    return {"what": "stand-in dataset, nothing in it is real", "spec": spec.__dict__}


def _is_done(out: Path, spec: Spec) -> bool:
    """Whether `out` holds this dataset whole. Raises UserError where it holds another one."""
    manifest = out / MANIFEST
    present = [name for name in (*FILES, *FOREIGN) if (out / name).exists()]
    if not manifest.is_file():
        if present:
            raise UserError(
                f"{out} already holds a dataset ({present[0]}) that is not a stand-in; choose another --out"
            )
        return False
    found = read_json(manifest)
    if found.get("unfinished"):
        return False
    if found.get("spec") != spec.__dict__:
        raise UserError(
            f"{out} already holds a stand-in dataset of other settings; choose another --out or delete it"
        )
    files = found.get("files", {})
    return set(files) == set(FILES) == set(present) and all(
        sha256(out / name) == files[name] for name in FILES
    )


def _remove_leftovers(out: Path) -> None:
    """Removes the temporary files of a run that was killed."""
    for name in FILES:
        for leftover in out.glob(f".{name}.*.tmp"):
            leftover.unlink()


def _draw_tables(spec: Spec) -> tuple[Rows, Rows]:
    """Draws the two splits: no id and no patient in both."""
    rng = np.random.default_rng((spec.seed, 0))
    num_train, num_test = num_patients(spec.images), num_patients(spec.test_images)
    ids = _numbered("ISIC", spec.images + spec.test_images, rng)
    patients = _numbered("IP", num_train + num_test, rng)
    train = draw_rows(sorted(ids[: spec.images]), patients[:num_train], spec.positives, rng)
    test = draw_rows(
        sorted(ids[spec.images :]), patients[num_train:], spec.test_positives, rng, unseen_site=True
    )
    return train, test


def _numbered(prefix: str, count: int, rng: Generator) -> list[str]:
    """Returns `count` different names such as ISIC_0123456, in random order."""
    return [f"{prefix}_{number:07d}" for number in rng.choice(10_000_000, count, replace=False)]


def _write_tables(out: Path, train: pl.DataFrame, test: pl.DataFrame) -> None:
    write_table(out / "train-metadata.csv", train)
    write_table(out / "test-metadata.csv", test.drop(schema.TRAIN_ONLY))
    write_table(out / "test-truth.csv", test.select(schema.ID, schema.TARGET))
    write_table(
        out / "sample_submission.csv", test.select(schema.ID, pl.lit(0.3).alias(schema.TARGET))
    )


def _write_crops(
    out: Path, train: Rows, test: Rows, spec: Spec, say: Callable[[str], None]
) -> None:
    """Renders the crops, one for each row, or a pool of which each row takes the nearest."""
    rows = Rows(pl.concat([train.table, test.table]), np.concatenate([train.cue, test.cue]))
    own = spec.images == spec.pool
    drawn = rows if own else _pool_rows(spec)
    say(f"rendering {len(drawn.table):,} crops")
    crops = _render_all(drawn, spec.seed)
    choice = np.arange(len(rows.table)) if own else _nearest(rows, drawn)
    say(f"writing {len(choice):,} images and masks")
    ids = rows.table[schema.ID].to_list()
    parts = {
        "train-image.hdf5": range(spec.images),
        "test-image.hdf5": range(spec.images, len(ids)),
    }
    for name, part in parts.items():
        write_images(out / name, ((ids[i], crops[choice[i]].jpeg) for i in part))
    write_images(out / "masks.hdf5", _masks(ids, choice, crops))


def _masks(
    ids: Sequence[str], choice: NDArray[np.int64], crops: Sequence[Crop]
) -> Iterator[tuple[str, bytes]]:
    return ((name, crops[crop].mask) for name, crop in sorted(zip(ids, choice, strict=True)))


def _pool_rows(spec: Spec) -> Rows:
    """Rows of their own for the pool: were they the table's, a malignant row's crop would be its alone."""
    rng = np.random.default_rng((spec.seed, 1))
    names = [str(number) for number in range(spec.pool)]
    return draw_rows(
        names, names[: num_patients(spec.pool)], round(POOL_POSITIVES * spec.pool), rng
    )


def _nearest(rows: Rows, pool: Rows) -> NDArray[np.int64]:
    """Returns for each row [N] the pool's row that looks most like it. The target has no say in it."""
    spread = pool.table.select(MATCHED).to_numpy().std(axis=0)

    def key(of: Rows) -> NDArray[np.float64]:
        return np.column_stack([of.table.select(MATCHED).to_numpy() / spread, CUE_WEIGHT * of.cue])

    return np.asarray(
        KDTree(key(pool)).query(key(rows), return_distance=False)[:, 0], dtype=np.int64
    )


def _render_all(rows: Rows, seed: int) -> list[Crop]:
    """Renders one crop a row, on all cores. Each crop has a seed of its own, so the order does not matter."""
    cv2.setNumThreads(1)
    wanted = looks(rows.table, rows.cue)
    with ThreadPoolExecutor(num_cores()) as pool:
        return list(pool.map(lambda i: render(wanted[i], (seed, 2, i)), range(len(wanted))))
