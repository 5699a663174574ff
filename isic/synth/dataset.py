"""Synthetic dataset with the challenge's layout, schema and marginals, and a learnable target.

Nothing in it is real. It serves to run, test and measure the pipeline without the data.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import polars as pl
from numpy.random import Generator
from numpy.typing import NDArray
from pydantic import Field
from sklearn.neighbors import KDTree

from isic import schema
from isic.runtime.errors import UserError
from isic.runtime.fields import Fields, read_fields
from isic.runtime.files import sha256, versions, write_json
from isic.runtime.machine import num_cores
from isic.runtime.only_writer import only_writer
from isic.settings import SynthSettings
from isic.synth.crops import Crop, crop_specs, render
from isic.synth.rows import SyntheticRows, default_positives, draw_rows, num_patients
from isic.synth.write import write_images, write_table

MANIFEST = "synth.json"
FORMAT = 1
"""Incremented when the same settings give different content."""

TABLE_FILES = ("train-metadata.csv", "test-metadata.csv", "test-truth.csv", "sample_submission.csv")
IMAGE_FILES = ("train-image.hdf5", "test-image.hdf5", "masks.hdf5")
FILES = (*TABLE_FILES, *IMAGE_FILES)
FOREIGN = ("train-image", "test-image", "train-metadata.parquet", "test-metadata.parquet")
"""Other names of a dataset's files, which a synthetic dataset never has."""

DEFAULT_POOL = 4_000
# More than in the tables: the pool needs enough crops with a strong cue.
POOL_POSITIVES = 0.15
"""Share of malignant rows in the pool."""

CUE_WEIGHT = 3.0
MATCHED = (
    "tbp_lv_L",
    "tbp_lv_Lext",
    "tbp_lv_A",
    "tbp_lv_B",
    "tbp_lv_Aext",
    "clin_size_long_diam_mm",
)
"""Columns that match a row to its crop, in standard deviations; its cue counts CUE_WEIGHT."""


class ManifestFields(Fields):
    """The fields of MANIFEST that a later run reads."""

    unfinished: bool = False
    files: dict[str, str] = Field({})


@dataclass(frozen=True)
class Spec:
    """The settings that determine the content, with all defaults filled in."""

    images: int
    positives: int
    test_images: int
    test_positives: int
    seed: int
    pool: int
    format: int = FORMAT


def spec_of(settings: SynthSettings) -> Spec:
    """Fill in the defaults. Raise UserError if more than half of the rows are positive."""
    positives = settings.positives or default_positives(settings.images)
    if positives > settings.images // 2:
        raise UserError(
            f"--positives {positives} is more than half of --images {settings.images}; use fewer"
        )
    test_images = settings.test_images or max(settings.images // 10, 10)
    fewest_positives = min(2, test_images // 2)
    return Spec(
        images=settings.images,
        positives=positives,
        test_images=test_images,
        test_positives=max(round(test_images * positives / settings.images), fewest_positives),
        seed=settings.seed,
        pool=min(settings.images, settings.pool or DEFAULT_POOL),
    )


def synth(settings: SynthSettings) -> None:
    """Write a synthetic dataset, with its progress on stdout."""
    if synthesize(settings, say=partial(print, flush=True)):
        print(f"wrote a synthetic dataset to {settings.output_dir}")
    else:
        print(f"{settings.output_dir} already holds this dataset; nothing to do")


def synthesize(settings: SynthSettings, say: Callable[[str], None] = lambda _: None) -> bool:
    """Write a synthetic dataset into `settings.output_dir`, in the challenge's layout.

    Three files are extra: `masks.hdf5`, `test-truth.csv` (labels of the test split) and
    `synth.json` (settings, counts, digests), which is written last. A run that finds it marked as
    unfinished starts over.

    Returns:
        False if the folder already holds this dataset and nothing was written.

    Raises:
        UserError: too many positives, or the folder holds another dataset or cannot be written.
    """
    with only_writer(settings.output_dir):
        return _write_dataset(settings.output_dir, spec_of(settings), say)


def _write_dataset(out: Path, spec: Spec, say: Callable[[str], None]) -> bool:
    """Write the files, unless they are there. Return whether they were written."""
    if _is_done(out, spec):
        return False
    _remove_leftovers(out)
    write_json(out / MANIFEST, {"unfinished": True, **_described(spec)})
    say(f"sampling {spec.images:,} training and {spec.test_images:,} test rows")
    train, test = draw_tables(spec)
    _write_tables(out, train.table, test.table)
    _write_crops(out, train, test, spec, say)
    manifest = {
        **_described(spec),
        "patients": {
            "train": train.table[schema.PATIENT].n_unique(),
            "test": test.table[schema.PATIENT].n_unique(),
        },
        "files": {name: sha256(out / name) for name in FILES},
        "versions": versions("numpy", "opencv-python-headless", "h5py", "polars", "scikit-learn"),
    }
    write_json(out / MANIFEST, manifest)
    return True


def _described(spec: Spec) -> dict[str, object]:
    return {"what": "stand-in dataset, nothing in it is real", "spec": spec.__dict__}


def _is_done(out: Path, spec: Spec) -> bool:
    """Return whether `out` holds all of this dataset. Raise UserError if it holds another."""
    manifest = out / MANIFEST
    present = [name for name in (*FILES, *FOREIGN) if (out / name).exists()]
    if not manifest.is_file():
        if present:
            raise UserError(
                f"{out} already holds a dataset ({present[0]}) that is not synthetic; "
                "choose another --output_dir"
            )
        return False
    found = read_fields(manifest, ManifestFields, "delete the folder")
    if found.get("unfinished"):
        return False
    if found.get("spec") != spec.__dict__:
        raise UserError(
            f"{out} already holds a synthetic dataset with other settings; "
            "choose another --output_dir, or delete it"
        )
    files = found.get("files", {})
    if not set(files) == set(FILES) == set(present):
        return False
    return all(sha256(out / name) == files[name] for name in FILES)


def _remove_leftovers(out: Path) -> None:
    for name in FILES:
        for leftover in out.glob(f".{name}.*.tmp"):
            leftover.unlink()


def draw_tables(spec: Spec) -> tuple[SyntheticRows, SyntheticRows]:
    """Sample the two splits, which share no id and no patient."""
    rng = np.random.default_rng((spec.seed, 0))
    num_train = num_patients(spec.images)
    num_test = num_patients(spec.test_images)
    ids = _numbered("ISIC", spec.images + spec.test_images, rng)
    patients = _numbered("IP", num_train + num_test, rng)
    train = draw_rows(sorted(ids[: spec.images]), patients[:num_train], spec.positives, rng)
    test = draw_rows(
        sorted(ids[spec.images :]), patients[num_train:], spec.test_positives, rng, unseen_site=True
    )
    return train, test


def _numbered(prefix: str, count: int, rng: Generator) -> list[str]:
    """Return `count` distinct names such as ISIC_0123456, in random order."""
    return [f"{prefix}_{number:07d}" for number in rng.choice(10_000_000, count, replace=False)]


def _write_tables(out: Path, train: pl.DataFrame, test: pl.DataFrame) -> None:
    write_table(out / "train-metadata.csv", train)
    write_table(out / "test-metadata.csv", test.drop(schema.TRAIN_ONLY))
    write_table(out / "test-truth.csv", test.select(schema.ID, schema.TARGET))
    sample = test.select(schema.ID, pl.lit(0.3).alias(schema.TARGET))
    write_table(out / "sample_submission.csv", sample)


def _write_crops(
    out: Path, train: SyntheticRows, test: SyntheticRows, spec: Spec, say: Callable[[str], None]
) -> None:
    """Render and write one crop per row, or a pool from which each row takes the nearest."""
    rows = SyntheticRows(
        pl.concat([train.table, test.table]), np.concatenate([train.cue, test.cue])
    )
    # A large table reuses the crops of a pool, since rendering would take most of the time.
    one_crop_per_row = spec.images == spec.pool
    rendered = rows if one_crop_per_row else _pool_rows(spec)
    say(f"rendering {len(rendered.table):,} crops")
    crops = _render_all(rendered, spec.seed)
    choice = np.arange(len(rows.table)) if one_crop_per_row else _nearest(rows, rendered)
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
    for name, crop in sorted(zip(ids, choice, strict=True)):
        yield name, crops[crop].mask


def _pool_rows(spec: Spec) -> SyntheticRows:
    """Sample rows for the pool that are not in the tables.

    Otherwise a malignant row would match its own crop, which would identify it.
    """
    rng = np.random.default_rng((spec.seed, 1))
    names = [str(number) for number in range(spec.pool)]
    patients = names[: num_patients(spec.pool)]
    return draw_rows(names, patients, round(POOL_POSITIVES * spec.pool), rng)


def _nearest(rows: SyntheticRows, pool: SyntheticRows) -> NDArray[np.int64]:
    """Return the index of the most similar pool row for each row, [N]; ignores the target."""
    spread = pool.table.select(MATCHED).to_numpy().std(axis=0)

    def key(some: SyntheticRows) -> NDArray[np.float64]:
        scaled = some.table.select(MATCHED).to_numpy() / spread
        return np.column_stack([scaled, CUE_WEIGHT * some.cue])

    nearest = KDTree(key(pool)).query(key(rows), return_distance=False)
    return np.asarray(nearest[:, 0], dtype=np.int64)


def _render_all(rows: SyntheticRows, seed: int) -> list[Crop]:
    """Render one crop per row, on all cores. Each has its own seed, so their order is free."""
    cv2.setNumThreads(1)  # the pool's threads already occupy all cores
    wanted = crop_specs(rows.table, rows.cue)
    with ThreadPoolExecutor(num_cores()) as pool:
        return list(pool.map(lambda i: render(wanted[i], (seed, 2, i)), range(len(wanted))))
