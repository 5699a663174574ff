"""`python -m infer embed`: features and logits of every image, by the engines of every fold that should see it."""

import contextlib
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from pydantic import AliasChoices, Field
from tqdm import tqdm

from infer.embeddings import ERRORS_FILE, PLAN_FILE, RUN_FILE, part_path, write_part
from infer.engines import Engine, Outputs, create, manifest_spec
from infer.pipeline import Decoded, decode_ahead
from isic import schema
from isic.config import Settings
from isic.dataset import Dataset, Split
from isic.errors import UserError
from isic.files import atomic_path, digest, read_json, read_manifest, sha256, versions, write_json
from isic.folds import FILE as FOLDS_FILE
from isic.folds import Folds, read_folds
from isic.images import ImageStore, decode_pool
from isic.preprocess import PreprocessSpec

PART_ROWS = 4096
MAX_PARTS_WAITING = 2
"""Parts that may wait for the disk before the engines do."""
DTYPES: dict[str, type[np.floating]] = {"float16": np.float16, "float32": np.float32}


class EmbedSettings(Settings):
    """What `python -m infer embed` takes."""

    config: str = Field(
        validation_alias=AliasChoices("config", "model_config"), description="name of the model config (--model_config)"
    )
    data: Path = Field(Path("data/isic-2024"), description="dataset folder in the challenge's layout")
    model_dir: Path | None = Field(None, description="run with exported folds; outputs/<config> if not given")
    output_dir: Path = Field(Path("outputs/embeddings"), description="embeddings land in <output_dir>/<config>")
    split: Literal["train", "test", "all"] = Field("all", description="which images; all: what the dataset has")
    folds: Literal["oof", "all"] = Field(
        "oof", description="train images by the fold that did not see them, or by all; test images always by all"
    )
    engine: str = Field("model.onnx", description="file name of the exported engine in each fold's folder")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the engine runs")
    dtype: Literal["float16", "float32"] = Field("float16", description="type in which features are stored")
    batch_size: int = Field(16, ge=1, description="images a call of the engine")
    num_threads: int | None = Field(None, ge=1, description="decoding threads; one a core if not given")
    on_error: Literal["raise", "skip"] = Field("skip", description="an image that is absent or does not decode")
    max_bad: float = Field(0.01, ge=0, le=1, description="share of skipped images above which the run stops")
    force: bool = Field(False, description="replace embeddings that were made with other engines or data")

    @property
    def run_dir(self) -> Path:
        return self.output_dir / self.config


@dataclass(frozen=True)
class Part:
    """One shard: some ids and the folds whose engines see them."""

    ids: list[str]
    paths: dict[int, Path]
    """The part's file by fold."""

    @property
    def errors_path(self) -> Path:
        """The reasons for the part's bad images, kept here until the run is whole and gathers them."""
        path = next(iter(self.paths.values()))
        return path.with_name(path.name.replace("part-", "errors-"))

    @property
    def is_done(self) -> bool:
        return all(path.is_file() for path in self.paths.values())


@dataclass(frozen=True)
class Models:
    """The engines of a run by fold, what their manifests say, and the preprocessing they share."""

    engines: dict[int, Engine]
    manifests: dict[int, dict[str, Any]]
    spec: PreprocessSpec


@dataclass
class Tally:
    """Counts and seconds of a run."""

    num_images: int = 0
    num_bad: int = 0
    decode_wait: float = 0.0
    engine: float = 0.0
    write_wait: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started


def embed(settings: EmbedSettings) -> None:
    """Embeds the dataset's images with the exported folds of a model config.

    Parts that exist are kept, so a run that was interrupted goes on where it stopped.
    """
    dataset = Dataset(settings.data)
    model_dir = settings.model_dir or Path("outputs") / settings.config
    models = load_models(model_dir, settings)
    folds = read_folds(model_dir / FOLDS_FILE)
    splits = present_splits(dataset) if settings.split == "all" else [settings.split]
    for split in splits:
        embed_split(dataset, split, models, folds, settings)


def present_splits(dataset: Dataset) -> list[Split]:
    """Returns the splits of a dataset that have a table and images."""
    splits: tuple[Split, ...] = ("train", "test")
    found = [split for split in splits if dataset.metadata_path(split).is_file() and dataset.find_images(split)]
    if not found:
        raise UserError(f"{dataset.root} has no split with both a table and images; run `python -m isic check`")
    return found


def load_models(model_dir: Path, settings: EmbedSettings) -> Models:
    """Loads the exported engine of every fold that has one.

    Raises:
        UserError: none is exported, one is of another config, or they do not share their preprocessing.
    """
    paths = {int(path.parent.name.removeprefix("fold_")): path for path in model_dir.glob(f"fold_*/{settings.engine}")}
    if not paths:
        raise UserError(
            f"{model_dir} has no fold_<k>/{settings.engine}; run `python -m export --config {settings.config}` first"
        )
    manifests = {fold: read_manifest(paths[fold]) for fold in sorted(paths)}
    for fold, manifest in manifests.items():
        if (manifest["name"], manifest["fold"]) != (settings.config, fold):
            raise UserError(
                f"{paths[fold]} is fold {manifest['fold']} of {manifest['name']}, not fold {fold} of "
                f"{settings.config}; export it again"
            )
    specs = {fold: manifest_spec(manifest) for fold, manifest in manifests.items()}
    if len(set(specs.values())) > 1:
        raise UserError(f"the folds in {model_dir} differ in their preprocessing; train and export them alike")
    engines = {fold: create(paths[fold], manifest, settings.device) for fold, manifest in manifests.items()}
    return Models(engines, manifests, next(iter(specs.values())))


def embed_split(dataset: Dataset, split: Split, models: Models, folds: Folds, settings: EmbedSettings) -> None:
    """Embeds one split and writes its `run.json`."""
    root, table = settings.run_dir, dataset.metadata(split)
    parts = plan_parts(root, split, table, list(models.engines), folds if split == "train" else None, settings.folds)
    plan = run_plan(dataset, split, models, folds, settings, parts)
    begin(root / split, plan, settings)
    due = [part for part in parts if not part.is_done]
    if not due and (root / split / RUN_FILE).is_file():
        print(f"up to date config={settings.config} split={split} output={root / split}")
        return
    tally = Tally()
    with decode_pool(settings.num_threads or os.cpu_count() or 1) as pool:
        run_parts(due, dataset.images(split), models, settings, pool, tally)
    bad = gather_errors(root / split, parts)
    if split == "train":
        folds.write(root / FOLDS_FILE)
    seconds = {
        "total": tally.seconds,
        "decode_wait": tally.decode_wait,
        "engine": tally.engine,
        "write_wait": tally.write_wait,
    }
    counts = {"num_images": sum(len(part.ids) for part in parts) - bad, "num_bad": bad}
    write_json(root / split / RUN_FILE, {**plan, **counts, "embedded_now": tally.num_images, "seconds": seconds})
    print(
        f"embedded config={settings.config} split={split} images={counts['num_images']} bad={bad} "
        f"seconds={tally.seconds:.1f} images_per_second={tally.num_images / tally.seconds:.0f} output={root / split}"
    )


def plan_parts(
    root: Path, split: Split, table: pl.DataFrame, engines: list[int], folds: Folds | None, mode: str
) -> list[Part]:
    """Cuts a split into parts of `PART_ROWS` ids in the table's order, the same cut whatever is already done.

    Args:
        folds: the plan that says which fold held an image out; None where no fold has seen any (test).
        mode: `oof`: an image goes to the fold that held it out; `all`: to every fold.
    """
    if folds is None or mode == "all":
        groups = [(engines, table)]
    else:
        fold = folds.of(table)
        groups = [([k], table.filter(fold == k)) for k in engines]
    parts = []
    for seen_by, rows in groups:
        ids = rows[schema.ID].to_list()
        for index, start in enumerate(range(0, len(ids), PART_ROWS)):
            paths = {k: part_path(root, split, k, index) for k in seen_by}
            parts.append(Part(ids[start : start + PART_ROWS], paths))
    return parts


def run_plan(
    dataset: Dataset, split: Split, models: Models, folds: Folds, settings: EmbedSettings, parts: list[Part]
) -> dict[str, Any]:
    """Returns all that decides what the parts contain; a run goes on only where this is the same."""
    return {
        "config": settings.config,
        "split": split,
        "folds": list(models.engines),
        "folds_mode": settings.folds,
        "folds_digest": folds.digest,
        "engines": {str(fold): manifest["sha256"] for fold, manifest in models.manifests.items()},
        "preprocess": models.spec.model_dump(mode="json"),
        "dtype": settings.dtype,
        "num_features": next(iter(models.manifests.values()))["num_features"],
        "ids_digest": digest(*(name for part in parts for name in part.ids)),
        "metadata_sha256": sha256(dataset.metadata_path(split)),
        "versions": versions("onnxruntime-gpu", "onnxruntime", "opencv-python-headless", "numpy"),
    }


def begin(directory: Path, plan: dict[str, Any], settings: EmbedSettings) -> None:
    """Writes the plan, or checks that it is the one an earlier run wrote."""
    path = directory / PLAN_FILE
    if path.is_file():
        former = read_json(path)
        changed = next((key for key in plan if plan[key] != former.get(key)), None)
        if changed and not settings.force:
            raise UserError(
                f"{directory} holds embeddings made with {changed} = {former.get(changed)}, now it is {plan[changed]}; "
                "choose another --output_dir, or replace them with --force"
            )
        if changed:
            shutil.rmtree(directory)
    write_json(path, plan)


def run_parts(
    parts: list[Part],
    store: ImageStore,
    models: Models,
    settings: EmbedSettings,
    pool: ThreadPoolExecutor,
    tally: Tally,
) -> None:
    """Embeds parts: decoding runs ahead, writing runs behind, the engines in between set the pace."""
    batches = [
        part.ids[at : at + settings.batch_size] for part in parts for at in range(0, len(part.ids), settings.batch_size)
    ]
    stream = decode_ahead(store, batches, models.spec, pool, settings.batch_size)
    written: deque[Future[None]] = deque()
    with contextlib.closing(stream), ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
        progress = tqdm(total=sum(map(len, batches)), unit="img", disable=None)
        for part in parts:
            written.append(writer.submit(write, part, *embed_part(part, stream, models, settings, tally, progress)))
            started = time.perf_counter()
            while len(written) > MAX_PARTS_WAITING:
                written.popleft().result()
            tally.write_wait += time.perf_counter() - started
        progress.close()
        for future in written:
            future.result()


def embed_part(
    part: Part, stream: Iterator[Decoded], models: Models, settings: EmbedSettings, tally: Tally, progress: Any
) -> tuple[list[str], dict[int, Outputs], dict[str, str]]:
    """Takes a part's batches off the stream and runs every engine of the part on each.

    Returns:
        The ids of the N good images, by fold their features [N, D] in the stored type and logits [N] float32, and
        the reason by id for each bad one.
    """
    outputs: dict[int, list[Outputs]] = {fold: [] for fold in part.paths}
    good: list[str] = []
    bad: dict[str, str] = {}
    for batch in islice(stream, -(-len(part.ids) // settings.batch_size)):
        tally.decode_wait += batch.waited
        keep = [row for row in range(len(batch.ids)) if row not in batch.failed]
        started = time.perf_counter()
        for fold, results in outputs.items():
            features, logits = models.engines[fold].run(batch.images)
            results.append((features[keep].astype(DTYPES[settings.dtype]), logits[keep, 0]))
        tally.engine += time.perf_counter() - started
        good += [batch.ids[row] for row in keep]
        bad |= {batch.ids[row]: reason for row, reason in batch.failed.items()}
        progress.update(len(batch.ids))
    count_bad(part, bad, settings, tally)
    arrays = {fold: tuple(map(np.concatenate, zip(*results, strict=True))) for fold, results in outputs.items()}
    return good, arrays, bad  # type: ignore[return-value]


def count_bad(part: Part, bad: dict[str, str], settings: EmbedSettings, tally: Tally) -> None:
    """Adds a part to the tally. Raises UserError where bad images are not to be skipped, or are too many."""
    tally.num_images += len(part.ids)
    tally.num_bad += len(bad)
    if not bad:
        return
    first, reason = next(iter(bad.items()))
    if settings.on_error == "raise":
        raise UserError(f"{first}: {reason}; mend it, or leave such images out with --on_error skip")
    if tally.num_bad > settings.max_bad * tally.num_images:
        raise UserError(
            f"{tally.num_bad} of the first {tally.num_images} images cannot be used, such as {first} ({reason}); "
            "look at the dataset with `python -m isic check`, or allow more with --max_bad"
        )


def write(part: Part, ids: list[str], outputs: dict[int, Outputs], bad: dict[str, str]) -> None:
    """Writes a part's files, the reasons for its bad images first: a part that exists has said all it knows."""
    if bad:
        with atomic_path(part.errors_path) as temporary:
            pl.DataFrame({schema.ID: list(bad), "reason": list(bad.values())}).write_parquet(temporary)
    for fold, (features, logits) in outputs.items():
        write_part(part.paths[fold], ids, features, logits)


def gather_errors(directory: Path, parts: list[Part]) -> int:
    """Writes `errors.parquet` from the parts' own and returns how many images it names."""
    paths = [part.errors_path for part in parts if part.errors_path.is_file()]
    tables = [pl.DataFrame(schema={schema.ID: pl.String, "reason": pl.String}), *map(pl.read_parquet, paths)]
    errors = pl.concat(tables)
    with atomic_path(directory / ERRORS_FILE) as temporary:
        errors.write_parquet(temporary)
    return len(errors)
