"""What an embedding run is to do: its ids cut into parts, the same cut whatever is done already, and what made them."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from infer.embeddings import ERRORS_FILE, PLAN_FILE, PLAN_KEY, RUN_FILE, part_path
from infer.engines import manifest_spec
from infer.engines.registry import ENGINE_FORMATS
from isic import schema
from isic.dataset import Split
from isic.folds import Folds, fold_dirs
from isic.preprocess import PreprocessSpec
from isic.runtime.errors import UserError
from isic.runtime.files import holds, read_json, read_manifest, refuse_foreign, write_json
from isic.tables import read_parquet

PART_ROWS = 4096
STALE_SECONDS = 3600
"""Age at which a temporary file belongs to a run that was killed, and not to one that goes on beside this one."""


@dataclass(frozen=True, eq=False)
class Part:
    """One shard: some ids and the folds whose engines see them."""

    ids: pl.Series
    """[N] String."""
    paths: dict[int, Path]
    """The part's file by fold."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def errors_path(self) -> Path:
        """The reasons for the part's bad images, kept here until the run is whole and gathers them."""
        path = next(iter(self.paths.values()))
        return path.with_name(path.name.replace("part-", "errors-"))

    @property
    def is_done(self) -> bool:
        return all(path.is_file() for path in self.paths.values())

    def bad(self) -> list[tuple[str, str]]:
        """Returns id and reason of the images that could not be used, of a part that is done."""
        return read_parquet(self.errors_path).rows() if self.errors_path.is_file() else []


@dataclass(frozen=True)
class Models:
    """The exported engine of each fold: its file, what its manifest says, and the preprocessing they all share."""

    artifacts: dict[int, Path]
    manifests: dict[int, dict[str, Any]]
    spec: PreprocessSpec

    @property
    def folds(self) -> list[int]:
        return list(self.artifacts)

    @property
    def num_features(self) -> int:
        return int(next(iter(self.manifests.values()))["num_features"])

    @property
    def batch_size(self) -> int | None:
        """What the engines were built for, where they were built for one."""
        return next(iter(self.manifests.values())).get("batch_size")


def find_models(model_dir: Path, config: str, engine: str, precision: str | None = None) -> Models:
    """Finds the exported engine of every fold that has one.

    Args:
        model_dir: the run, with a folder a fold.
        config: the name of the run's config.
        engine: file name of the artifact, or a format that an artifact may have.
        precision: of the artifact, where a format is given; any if None.

    Raises:
        UserError: none is exported or several are, one is of another config, or they differ in preprocessing.
    """
    if engine not in ENGINE_FORMATS and Path(engine).name != engine:
        raise UserError(f"--engine {engine!r} is a path; give a file name in each fold's folder")
    artifacts: dict[int, Path] = {}
    for fold, folder in fold_dirs(model_dir).items():
        named = [folder / engine] if (folder / engine).is_file() else []
        found = of_format(folder, engine, precision) if engine in ENGINE_FORMATS else named
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise UserError(
                f"{folder} has {names}; choose with --precision, or give a file name as --engine"
            )
        for path in found:
            artifacts[fold] = path.resolve()
    if not artifacts:
        what = f"{engine} in {precision}" if precision else engine
        asked = {"formats": engine if engine in ENGINE_FORMATS else None, "precision": precision}
        flags = "".join(f" --{key} {value}" for key, value in asked.items() if value)
        raise UserError(
            f"{model_dir} has no fold_<k> with {what}; run `python -m export --config {config}{flags}` first"
        )
    manifests = {fold: read_manifest(path) for fold, path in artifacts.items()}
    for fold, manifest in manifests.items():
        if (manifest["name"], manifest["fold"]) != (config, fold):
            raise UserError(
                f"{artifacts[fold]} is fold {manifest['fold']} of {manifest['name']}, not fold {fold} of {config}; "
                "export it again"
            )
    specs = {manifest_spec(manifest) for manifest in manifests.values()}
    if len(specs) > 1:
        raise UserError(
            f"the folds in {model_dir} differ in their preprocessing; train and export them alike"
        )
    return Models(artifacts, manifests, specs.pop())


def of_format(folder: Path, name: str, precision: str | None) -> list[Path]:
    """Returns the artifacts of a format in a fold's folder, by their manifests."""
    manifests = [read_json(path) for path in sorted(folder.glob("*.json"))]
    return [
        folder / manifest["artifact"]
        for manifest in manifests
        if manifest.get("format") == name and precision in {None, manifest.get("precision")}
    ]


def plan_parts(
    root: Path, split: Split, ids: pl.Series, engines: Sequence[int], folds: Folds | None, mode: str
) -> list[Part]:
    """Cuts a split into parts of `PART_ROWS` ids in the table's order, the same cut whatever is already done.

    Args:
        folds: the plan that says which fold held an image out; None where no fold has seen any (test).
        mode: `oof`: an image goes to the fold that held it out; `all`: to every fold.
    """
    if folds is None or mode == "all":
        groups = [(list(engines), ids)]
    else:
        fold = fold_of(ids, folds)
        groups = [([k], ids.filter(fold == k)) for k in engines]
    parts = []
    for seen_by, rows in groups:
        for index, start in enumerate(range(0, len(rows), PART_ROWS)):
            paths = {k: part_path(root, split, k, index) for k in seen_by}
            parts.append(Part(rows.slice(start, PART_ROWS), paths))
    return parts


def fold_of(ids: pl.Series, folds: Folds) -> pl.Series:
    """Returns the fold of each id like `Folds.of`, whose joins take ten times the memory of a full-size table."""
    known, fold = folds.table[schema.ID], folds.table["fold"]
    position = known.search_sorted(ids).clip(upper_bound=len(known) - 1)
    if (known.gather(position) == ids).all():
        return fold.gather(position)
    return folds.of(
        ids.to_frame(schema.ID)
    )  # a plan that is not sorted, or lacks an id: it says which


def begin(directory: Path, plan: Mapping[str, Any], force: bool) -> None:
    """Write the plan, or check that it is the one an earlier run wrote; remove what killed runs left behind.

    Raises:
        UserError: what is there is no run, or was made with something else and `force` does not say to begin again.
    """
    path = directory / PLAN_FILE
    is_own = holds(path, PLAN_KEY) or holds(directory / RUN_FILE, PLAN_KEY)
    names = (path, directory / RUN_FILE, directory / ERRORS_FILE)
    refuse_foreign([*names, *directory.glob("fold_*/part-*")], is_own, "--output_dir")
    if force and is_own:
        shutil.rmtree(directory)
    if path.is_file():
        former = read_json(path)
        changed = next((key for key in plan if plan[key] != former.get(key)), None)
        if changed and next(
            directory.rglob("part-*"), None
        ):  # else an engine refused before the first
            is_short = not isinstance(plan[changed], dict)  # digests by fold are nothing to read
            what = (
                f"{changed} = {former.get(changed)}, now it is {plan[changed]}"
                if is_short
                else f"other {changed}"
            )
            raise UserError(
                f"{directory} holds embeddings made with {what}; choose another --output_dir, or replace them with "
                "--force"
            )
        if changed:
            shutil.rmtree(directory)
    write_json(path, plan)
    for left_behind in directory.rglob(".*.tmp"):
        if time.time() - left_behind.stat().st_mtime > STALE_SECONDS:
            left_behind.unlink(missing_ok=True)


def complete(parts: Sequence[Part], run: Callable[[list[Part]], None]) -> None:
    """Has `run` embed the parts that are missing, again and again while workers get lost and each round gets on.

    Raises:
        UserError: a whole round finished no part.
    """
    due = [part for part in parts if not part.is_done]
    while due:
        run(due)
        left = [part for part in due if not part.is_done]
        if len(left) == len(due):
            raise UserError(
                f"every worker was lost before it finished one of {len(due)} parts; see their messages above, "
                "and try fewer --num_processes or a smaller --batch_size"
            )
        due = left
