"""Check a dataset before training: tables, images, masks and folds."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from isic import schema
from isic.check_duplicates import duplicate_facts, open_others, patients_of, shared
from isic.dataset import Dataset, Split
from isic.duplicates import Prints, fingerprint
from isic.folds import Folds, draw_folds, read_folds
from isic.headers import ImageError
from isic.images import (
    NO_IMAGE,
    FolderImages,
    ImageStore,
    failures,
    open_folder,
    open_hdf5,
)
from isic.metadata import read_ids, with_patient
from isic.preprocess import check_mask
from isic.runtime.errors import UserError, first_of
from isic.runtime.urls import shown
from isic.settings import CheckSettings

SHOWN = 5
"""Number of values that a list shows before it only counts the rest."""

REQUIRED_COLUMNS: dict[Split, tuple[str, ...]] = {
    "train": schema.TRAIN_ORDER,
    "test": tuple(name for name in schema.TRAIN_ORDER if name not in schema.TRAIN_ONLY),
}
CHECKED_FEATURES = (schema.PATIENT, *schema.NUMERIC, *schema.CATEGORICAL)
"""The columns whose blanks are counted."""

Facts = dict[str, str]
Problems = list[str]


def check(settings: CheckSettings) -> None:
    """Print a dataset's content, problems, undecodable and repeated images, and its folds.

    Raises:
        UserError: a table cannot be read, or there are problems.
    """
    dataset = Dataset(settings.data)
    others = open_others(settings.against)
    prints: list[Prints] = []
    print(f"dataset {shown(settings.data)}")
    # Collected, so that one run reports all of them.
    problems: Problems = []
    train = dataset.metadata("train")
    masks = _open_masks(dataset.masks_path, problems)
    test: pl.DataFrame | None = None
    _print_facts("train", _split_facts(dataset, "train", train, masks, settings, problems, prints))
    if dataset.metadata_path("test").is_file():
        test = dataset.metadata("test")
        facts = _split_facts(dataset, "test", test, masks, settings, problems, prints)
        facts |= _submission_facts(dataset, test, problems)
        facts |= _unseen_facts(train, test)
        facts |= _shared_facts(train, test)
        _check_features(train, test, problems)
        _print_facts("test", facts)
    else:
        _print_facts("test", {"rows": "none (no test-metadata.csv)"})
    if masks is not None:
        _print_masks(masks, train, test, problems)
    if settings.against and not prints:
        problems.append("there are no images in the dataset to compare with those of --against")
    if prints:
        tables = [train] if test is None else [train, test]
        patients, threads = patients_of(tables), settings.num_threads
        facts = duplicate_facts(prints, others, patients, threads, settings.output)
        _print_facts("images that are alike", facts)
    _print_folds(dataset, train, settings, problems)
    if problems:
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        raise UserError(f"{shown(settings.data)} has {count}: {'; '.join(problems)}")
    print("\nno problems found")


def _check_features(train: pl.DataFrame, test: pl.DataFrame, problems: Problems) -> None:
    in_train = [name for name in CHECKED_FEATURES if name in train.columns]
    lacking = [name for name in in_train if name not in test.columns]
    if lacking:
        problems.append(
            f"the test table lacks columns that features are made of ({_listed(lacking)})"
        )


def _split_facts(
    dataset: Dataset,
    split: Split,
    table: pl.DataFrame,
    masks: ImageStore | None,
    settings: CheckSettings,
    problems: Problems,
    prints: list[Prints],
) -> Facts:
    facts = _table_facts(split, table)
    try:
        images = dataset.find_images(split)
    except UserError as error:
        problems.append(str(error))
        return facts | {"images": "cannot be read"}
    if images is None:
        return facts | {"images": f"none (metadata only){_similar_names(dataset.root, split)}"}
    facts |= _image_facts(split, table, images, problems)
    facts |= _other_facts(dataset.root, split, images, problems)
    facts |= _decode_facts(split, table, images, settings, problems, prints)
    return facts | _mask_facts(masks, split, table, images, settings, problems)


def _table_facts(split: Split, table: pl.DataFrame) -> Facts:
    missing = [name for name in REQUIRED_COLUMNS[split] if name not in table.columns]
    extra = [name for name in table.columns if name not in REQUIRED_COLUMNS[split]]
    known = len(REQUIRED_COLUMNS[split]) - len(missing)
    facts = {
        "rows": f"{len(table):,}",
        "columns": f"{known} of the challenge's {len(REQUIRED_COLUMNS[split])}",
    }
    if missing:
        facts["missing columns"] = _listed(missing)
    if extra:
        facts["other columns"] = _listed(extra)
    if schema.TARGET in table.columns:
        facts["positives"] = _fraction(int(table[schema.TARGET].sum()), len(table))
    facts["patients"] = _patient_fact(table)
    blanks = {name: table[name].null_count() for name in CHECKED_FEATURES if name in table.columns}
    blank = [f"{name} {_fraction(count, len(table))}" for name, count in blanks.items() if count]
    return facts | {"blanks": ", ".join(blank) or "none"}


def _patient_fact(table: pl.DataFrame) -> str:
    if schema.PATIENT not in table.columns:
        return "not known (no patient_id); each image is its own group"
    sizes = table.drop_nulls(schema.PATIENT).group_by(schema.PATIENT).len()["len"].to_numpy()
    if not len(sizes):
        return "not known (patient_id is blank); each image is its own group"
    return (
        f"{len(sizes):,} with {sizes.min():,} to {sizes.max():,} rows, median {np.median(sizes):g}"
    )


def _similar_names(root: Path, split: Split) -> str:
    names = [path.name for path in root.iterdir() if path.name.lower().startswith(f"{split}-image")]
    if not names:
        return ""
    return f"; {_listed(sorted(names))}, but images are in {split}-image.hdf5 or {split}-image/"


def _image_facts(
    split: Split, table: pl.DataFrame, images: ImageStore, problems: Problems
) -> Facts:
    absent = images.missing(table[schema.ID].to_list())
    rowless = np.setdiff1d(images.ids, table[schema.ID].to_numpy().astype(np.str_)).tolist()
    if absent:
        problem = f"{len(absent):,} {split} rows have no image, the first is {absent[0]}"
        reason = images.reason(absent[0])
        if reason != NO_IMAGE:
            problem += f" ({reason})"
        similar = {name.casefold() for name in absent} & {name.casefold() for name in rowless}
        if similar:
            problem += f"; {len(similar):,} differ from the name of an image in case only"
        problems.append(problem)
    facts = {"images": f"{len(images):,} in {images.source.name}"}
    facts["rows without image"] = _listed(absent)
    facts["images without row"] = _listed(rowless)
    return facts


def _other_facts(root: Path, split: Split, images: ImageStore, problems: Problems) -> Facts:
    facts: Facts = {}
    if images.rejected:
        facts["not images"] = _rejected(images)
    if isinstance(images, FolderImages):
        if images.other_files:
            counts = [f"{count:,} {suffix}" for suffix, count in images.other_files.most_common()]
            facts["other files"] = _listed(counts)
        return facts
    folder = root / f"{split}-image"
    try:
        unread = open_folder(folder)
    except UserError as error:
        return facts | {f"{folder.name}/": f"not read ({error})"}
    if unread is None:
        return facts
    difference = _difference(images, unread)
    if difference:
        problems.append(
            f"{images.source.name} and {folder.name}/ differ ({difference}) and only "
            f"{images.source.name} is read; move the other one out of this folder"
        )
    facts[f"{folder.name}/"] = f"not read; {difference or 'the same ids and file sizes'}"
    return facts


def _difference(images: ImageStore, others: ImageStore) -> str:
    """Compare two stores by ids and file sizes. Return an empty string if they are equal."""
    ids = images.ids
    other_ids = others.ids
    # By size: reading every file of both would take minutes.
    shared, rows, other_rows = np.intersect1d(ids, other_ids, True, return_indices=True)
    counts = {
        f"only in {images.source.name}": len(ids) - len(shared),
        f"only in {others.source.name}/": len(other_ids) - len(shared),
        "of another size": int((images.sizes()[rows] != others.sizes()[other_rows]).sum()),
    }
    return ", ".join(f"{count:,} images {text}" for text, count in counts.items() if count)


def _rejected(images: ImageStore) -> str:
    return _listed([f"{name} ({reason})" for name, reason in images.rejected.items()])


def _decode_facts(
    split: Split,
    table: pl.DataFrame,
    images: ImageStore,
    settings: CheckSettings,
    problems: Problems,
    prints: list[Prints],
) -> Facts:
    """Decode images, and append their fingerprints to `prints`."""
    ids = _sample(table, images, settings)
    found, failed = fingerprint(split, images, ids, settings.num_threads)
    prints.append(found)
    if failed:
        (name, reason), *_ = failed.items()
        problems.append(
            f"{len(failed):,} {split} images do not decode, the first is {name} ({reason})"
        )
    shown = _listed([f"{name} ({reason})" for name, reason in failed.items()])
    return {"decoded": f"{len(ids) - len(failed):,} of {len(ids):,}", "undecodable": shown}


def _sample(table: pl.DataFrame, images: ImageStore, settings: CheckSettings) -> list[str]:
    ids = table[schema.ID].to_numpy().astype(np.str_)
    ids = ids[images.locate(ids) >= 0]  # type: ignore[arg-type]
    if settings.sample is not None and settings.sample < len(ids):
        ids = np.random.default_rng(settings.seed).choice(ids, settings.sample, replace=False)
    return list(ids.tolist())


def _open_masks(path: Path, problems: Problems) -> ImageStore | None:
    try:
        return open_hdf5(path)
    except UserError as error:
        problems.append(str(error))
        return None


def _mask_facts(
    masks: ImageStore | None,
    split: Split,
    table: pl.DataFrame,
    images: ImageStore,
    settings: CheckSettings,
    problems: Problems,
) -> Facts:
    if masks is None:
        return {"masks": "none"}
    num_with = int((masks.locate(table[schema.ID].to_list()) >= 0).sum())
    facts = {"masks": _fraction(num_with, len(table))}
    ids = _sample(table, images, settings)
    with_mask = [ids[row] for row in np.flatnonzero(masks.locate(ids) >= 0)]
    wrong, other_sizes = _compare_masks(masks, images, with_mask, settings)
    if wrong:
        (name, reason), *_ = wrong.items()
        problems.append(
            f"{len(wrong):,} {split} masks cannot be used, the first is {name} ({reason})"
        )
        facts["unusable masks"] = _listed([f"{name} ({why})" for name, why in wrong.items()])
    if other_sizes:
        facts["masks of another size"] = _listed(
            [f"{name} ({sizes})" for name, sizes in other_sizes.items()]
        )
    return facts


def _compare_masks(
    masks: ImageStore, images: ImageStore, ids: Sequence[str], settings: CheckSettings
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the reason by id for unusable masks, and both sizes for masks of another size."""
    other_sizes: dict[str, str] = {}

    def look(row: int) -> None:
        files, failed = masks.read_each([ids[row]])
        image, no_image = images.read_each([ids[row]])
        if failed:
            raise ImageError(failed[0])
        if no_image:
            return
        sizes = check_mask(files[0], image[0])
        if sizes:
            other_sizes[ids[row]] = sizes

    wrong = failures(look, range(len(ids)), settings.num_threads)
    return {ids[row]: reason for row, reason in wrong.items()}, other_sizes


def _print_masks(
    masks: ImageStore, train: pl.DataFrame, test: pl.DataFrame | None, problems: Problems
) -> None:
    known = [
        table[schema.ID].to_numpy().astype(np.str_) for table in (train, test) if table is not None
    ]
    rowless = np.setdiff1d(masks.ids, np.concatenate(known)).tolist()
    if rowless:
        problems.append(f"{len(rowless):,} masks belong to no row, the first is {rowless[0]}")
    facts = {
        "masks": f"{len(masks):,} in {masks.source.name}",
        "masks without row": _listed(rowless),
    }
    if masks.rejected:
        facts["not images"] = _rejected(masks)
    _print_facts("masks", facts)


def _submission_facts(dataset: Dataset, test: pl.DataFrame, problems: Problems) -> Facts:
    if not dataset.sample_submission_path.is_file():
        return {}
    try:
        sample = read_ids(dataset.sample_submission_path)
    except UserError as error:
        problems.append(str(error))
        return {"sample submission": "unreadable"}
    if set(sample) != set(test[schema.ID]):
        problems.append("sample_submission.csv does not have the ids of the test table")
        return {"sample submission": f"{len(sample):,} rows, other ids than the table's"}
    return {"sample submission": f"{len(sample):,} rows, the table's ids"}


def _unseen_facts(train: pl.DataFrame, test: pl.DataFrame) -> Facts:
    shared = [name for name in schema.CATEGORICAL if name in train.columns and name in test.columns]
    unseen = {
        name: sorted(set(test[name].drop_nulls()) - set(train[name].drop_nulls()))
        for name in shared
    }
    return {f"unseen {name}": _listed(values) for name, values in unseen.items() if values}


def _shared_facts(train: pl.DataFrame, test: pl.DataFrame) -> Facts:
    """Return the ids and patients that both splits have, which make scores too good."""
    names = {"rows in train too": schema.ID, "patients in train too": schema.PATIENT}
    return {fact: _listed(shared(train, test, column)) for fact, column in names.items()}


def _print_folds(
    dataset: Dataset, train: pl.DataFrame, settings: CheckSettings, problems: Problems
) -> None:
    """Print the folds that runs will use, from the dataset's plan or newly drawn."""
    pinned = os.path.lexists(dataset.folds_path)
    title = dataset.folds_path.name if pinned else f"seed {settings.seed}"
    try:
        folds = (
            read_folds(dataset.folds_path)
            if pinned
            else draw_folds(train, settings.num_folds, settings.seed)
        )
    except UserError as error:
        problems.append(str(error) if pinned else f"no folds can be drawn: {error}")
        return
    fold = folds.find(train)
    problems += _fold_problems(folds, fold, train, settings.num_folds)
    counts = (
        with_patient(train)
        .with_columns(fold)
        .group_by("fold")
        .agg(pl.len(), pl.col(schema.PATIENT).n_unique(), pl.col(schema.TARGET).sum())
        .sort("fold", nulls_last=True)
    )
    print(f"\nfolds ({title})")
    print(f"  {'fold':>4} {'rows':>9} {'patients':>9} {'positives':>9}")
    for number, *row in counts.iter_rows():
        print("  {:>4} {:>9,} {:>9,} {:>9,}".format("none" if number is None else number, *row))


def _fold_problems(
    folds: Folds, fold: pl.Series, train: pl.DataFrame, num_folds: int
) -> Iterator[str]:
    """Yield the reasons that training would refuse a fold plan; `fold` [N] is each row's fold."""
    if folds.num_folds != num_folds:
        yield (
            f"{folds} has {folds.num_folds} folds, not {num_folds}; "
            f"use --num_folds {folds.num_folds}"
        )
    try:
        folds.of(train)
    except UserError as error:
        yield str(error)
    targets = train.select(fold, schema.TARGET).group_by("fold").agg(pl.col(schema.TARGET).unique())
    for number in range(folds.num_folds):
        if len(targets.filter(fold=number)[schema.TARGET].explode().drop_nulls()) < 2:
            yield (
                f"fold {number} does not have rows of both classes, "
                "so it can be neither trained nor scored"
            )


def _print_facts(title: str, facts: Mapping[str, str]) -> None:
    width = max(map(len, facts))
    print(f"\n{title}")
    for name, value in facts.items():
        print(f"  {name:<{width}}  {value}")


def _fraction(count: int, total: int) -> str:
    return f"{count:,} ({100 * count / total:.2f} %)"


def _listed(values: Iterable[object]) -> str:
    shown = list(map(str, values))
    if not shown:
        return "none"
    return f"{len(shown):,}: {first_of(shown, SHOWN)}"
