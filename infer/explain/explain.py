"""`python -m infer explain`: a picture and the values of the occlusion map per image."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import polars as pl

from infer.embedding.image_embedder import ImageEmbedder
from infer.embedding.models import Models, choose_device, find_models
from infer.embedding.source import Source
from infer.explain.explained import Explained, explain_images, held_out_folds
from infer.explain.occlusion import GRID, WITHOUT_HEAD
from infer.explain.picture import SIDE, draw
from infer.explain.settings import ExplainSettings
from isic import schema
from isic.dataset import Dataset
from isic.images import ImageStore
from isic.layout import Fold, find_run, fold_name
from isic.preprocess import Pixels, PreprocessSpec
from isic.runtime.errors import UserError
from isic.runtime.files import (
    atomic_path,
    digest,
    holds,
    manifest_path,
    read_text,
    refuse_foreign,
    versions,
    write_manifest,
)
from isic.runtime.only_writer import only_writer
from isic.tables import read_parquet, write_parquet

TABLE_FILE = "occlusion.parquet"
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", re.ASCII)
"""Names that are the same file on every system."""
FROM_FILE = "@"


def explain(settings: ExplainSettings) -> None:
    """Run `infer explain`, which its settings describe."""
    names = read_names(settings.ids)
    source = Source(Dataset(settings.data).root, settings.split)
    _refuse_unknown(names, source)
    files = {name: f"{safe}.png" for name, safe in safe_names(names).items()}
    _refuse_foreign(settings.output_dir, files.values())
    model_dir = find_run(settings.model_dir, settings.config)
    models = find_models(
        model_dir,
        settings.config,
        settings.format,
        settings.precision,
        device=settings.device,
        trust=settings.trust,
    )
    if models.is_backbone:
        raise UserError(WITHOUT_HEAD)
    fold_of = _folds(model_dir, models, names, settings.split)
    store = source.open()
    device = choose_device(models, settings.device, uses_ray=False)
    with ImageEmbedder(models, device, batch_size=settings.batch_size) as embedder:
        found = {
            each.name: each for each in explain_images(embedder, store, fold_of, settings.fill)
        }
    if not found:
        raise UserError("none of the images can be used; run `python -m isic check`")
    explained = [found[name] for name in names if name in found]
    with only_writer(settings.output_dir):
        _write(settings, explained, files, store, models)
    print(
        f"explained config={settings.config} split={settings.split} images={len(explained)} "
        f"bad={len(names) - len(explained)} output={settings.output_dir}"
    )


def read_names(entries: Sequence[str]) -> list[str]:
    """Return the ids, each once; `@file` stands for the lines of a file."""
    names: list[str] = []
    for entry in entries:
        if entry.startswith(FROM_FILE):
            lines = read_text(Path(entry.removeprefix(FROM_FILE)).expanduser()).splitlines()
            names += [line.strip() for line in lines]
        else:
            names.append(entry)
    names = list(dict.fromkeys(filter(None, names)))
    if not names:
        raise UserError("--ids has no ids; give at least one")
    return names


def safe_names(names: Sequence[str]) -> dict[str, str]:
    """Return the name of a file by id: the id itself, or a part of it and a digest.

    An id may have slashes or any other character, and two may differ only in case, which some
    file systems do not distinguish.
    """
    lower = [name.lower() for name in names]
    return {
        name: name
        if SAFE_NAME.fullmatch(name) and lower.count(name.lower()) == 1
        else f"{re.sub('[^A-Za-z0-9_-]', '_', name)[:60]}-{digest(name)}"
        for name in names
    }


def _refuse_unknown(names: Sequence[str], source: Source) -> None:
    known = source.read_ids()
    unknown = pl.Series(names).filter(~pl.Series(names).is_in(known.implode()))
    if len(unknown):
        raise UserError(
            f"{len(unknown)} of {len(names)} ids are not in the {source.split} table of "
            f"{source.data}, the first is {unknown[0]}; correct --ids, --split or --data"
        )


def _refuse_foreign(folder: Path, files: Iterable[str]) -> None:
    """Raise a UserError if a file would be replaced that `infer explain` did not write."""
    table = folder / TABLE_FILE
    manifest = manifest_path(table)
    is_own = holds(manifest, "artifact", "fill", "grid")
    refuse_foreign([table, manifest, *(folder / name for name in files)], is_own, "--output_dir")


def _folds(
    model_dir: Path, models: Models, names: Sequence[str], split: str
) -> dict[str, Fold | None]:
    if split == "train":
        return {**held_out_folds(model_dir, models, names)}
    return dict.fromkeys(names)


def _write(
    settings: ExplainSettings,
    explained: Sequence[Explained],
    files: dict[str, str],
    store: ImageStore,
    models: Models,
) -> None:
    table = settings.output_dir / TABLE_FILE
    earlier = _earlier_pictures(table)
    with atomic_path(table) as temporary:
        write_parquet(temporary, values_table(explained, files))
        # The manifest comes before the other files get their names: it shows that they are this
        # command's own, so a run that is killed in between can be repeated.
        write_manifest(table, temporary, **_facts(settings, models))
        # Before the table gets its name: beside it they would seem to be of its network.
        for path in earlier:
            path.unlink(missing_ok=True)
    for each in explained:
        crop, _ = store.load([each.name], PreprocessSpec(size=SIDE, interpolation="area"))
        picture = draw(crop[0], each.drops, _caption(each, settings.config))
        write_png(settings.output_dir / files[each.name], picture)


def _earlier_pictures(table: Path) -> list[Path]:
    """Return the pictures beside an earlier table, which is this command's own."""
    if not table.is_file():
        return []
    names = read_parquet(table, ["file"])["file"].unique()
    # Only of pictures in the folder, whatever an edited table holds.
    paths = [table.with_name(name) for name in names if Path(name).name == name]
    return [path for path in paths if path.suffix == ".png" and path.is_file()]


def values_table(explained: Sequence[Explained], files: dict[str, str]) -> pl.DataFrame:
    """Return `isic_id`, `fold` (null for the mean of all), `logit`, `drop` [7, 7] and `file`."""
    drops = np.stack([each.drops for each in explained])
    return pl.DataFrame(
        {
            schema.ID: [each.name for each in explained],
            "fold": pl.Series([each.fold for each in explained], dtype=pl.Int8),
            "logit": pl.Series([each.logit for each in explained], dtype=pl.Float32),
            "drop": pl.Series(drops, dtype=pl.Array(pl.Float32, (GRID, GRID))),
            "file": [files[each.name] for each in explained],
        }
    )


def _facts(settings: ExplainSettings, models: Models) -> dict[str, Any]:
    return {
        "config": settings.config,
        "split": settings.split,
        "fill": settings.fill,
        "grid": GRID,
        "engines": models.engines,
        "versions": versions("isic-toolkit", "numpy", "polars"),
    }


def _caption(each: Explained, network: str) -> str:
    fold = "mean of the folds" if each.fold is None else fold_name(each.fold).replace("_", " ")
    return f"logit {each.logit:+.2f}, {network}, {fold}"


def write_png(path: Path, picture: Pixels) -> None:
    """Write RGB pixels as a PNG file."""
    _, data = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.tobytes())
