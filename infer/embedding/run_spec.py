"""The run spec: everything that determines the content of an embedding run.

A run resumes only with the spec that it began with. The order of the keys matters: the digest is
that of the JSON text.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import Field

from infer.embedding.models import Models
from infer.embedding.settings import BATCH_CPU, BATCH_GPU, EmbedSettings
from infer.embedding.source import Source
from infer.embedding.staging import delete_run
from infer.embedding.store import (
    IMAGES,
    RUN_FILE,
    RUN_SPEC_FILE,
    RUN_SPEC_KEY,
    EmbeddedSplit,
    ids_digest,
    refuse_changed_spec,
)
from infer.engines import device_of
from infer.engines.contract import AUX
from isic.dataset import SPLITS
from isic.layout import ERRORS_FILE
from isic.runtime.errors import UserError
from isic.runtime.fields import Count, Fields, read_fields
from isic.runtime.files import (
    digest,
    holds,
    read_json,
    refuse_foreign,
    versions,
    write_json,
)
from isic.runtime.remote import publish
from isic.runtime.urls import shown
from isic.views import VIEWS

SPEC_PACKAGES = ("onnxruntime-gpu", "onnxruntime", "opencv-python-headless", "numpy", "polars")
STALE_SECONDS = 3600
"""Age from which a temporary file is taken for a killed run's, not for one of a run in progress."""

RunSpec = dict[str, Any]


def build_run_spec(
    source: Source,
    models: Models,
    folds_digest: str | None,
    ids: pl.Series,
    settings: EmbedSettings,
) -> RunSpec:
    """Return the run spec, with its own digest as the last field.

    Args:
        folds_digest: of the fold plan of the models; None if they embed any images.
        ids: of the split's table, in its order.
    """
    images = source.open()
    spec = {
        "config": settings.config,
        "split": source.split,
        "folds": models.folds,
        "folds_mode": settings.folds if folds_digest else "all",
        "folds_digest": folds_digest,
        "engines": models.engines,
        "checkpoints": models.checkpoints,
        "preprocess": models.spec.model_dump(mode="json"),
        "tta": settings.tta,
        "dtype": settings.dtype,
        "num_features": models.num_features,
        # Absent without them, so that runs of earlier versions resume.
        **({AUX: models.aux} if models.aux else {}),
        "metadata_sha256": source.table_digest(),
        "images": {"number": len(images), "sizes": images.sizes_digest()},
        "versions": versions(*SPEC_PACKAGES),
        "batch_size": settings.batch_size or _default_batch_size(source.split, models, settings),
        "ids_digest": ids_digest(ids),
    }
    spec[RUN_SPEC_KEY] = digest(json.dumps(spec))
    return spec


def _default_batch_size(split: EmbeddedSplit, models: Models, settings: EmbedSettings) -> int:
    """Return the batch size if none is given."""
    # A resumed run keeps its own: the last bits of an engine's outputs may depend on it.
    path = settings.run_dir.resolve() / split / RUN_SPEC_FILE
    if path.is_file() and not settings.force:
        earlier = read_spec(path).get("batch_size")
        if earlier:
            return int(earlier)
    return usual_batch_size(models, device_of(models.first_manifest, settings.device))


def usual_batch_size(models: Models, device: str) -> int:
    """Return the batch size that suits the models on `cpu` or `cuda`."""
    if models.batch_size:
        return int(models.batch_size)
    usual = BATCH_GPU if device == "cuda" else BATCH_CPU
    # The graph computes every view of a batch at once.
    return max(1, usual // len(VIEWS[models.tta]))


def earlier_engines(root: Path) -> frozenset[str]:
    """Return the digests of the artifacts that the embeddings in a folder were made with.

    Args:
        root: the folder of a config's embeddings, which need not exist.
    """
    for split in (*SPLITS, IMAGES):
        path = root / split / RUN_SPEC_FILE
        # Without a shard nothing is lost: an engine may have been refused before the first one.
        if path.is_file() and any(path.parent.rglob("part-*")):
            return frozenset(read_spec(path)["engines"].values())
    return frozenset()


class SpecFields(Fields):
    """The fields of a run spec that a later command reads."""

    engines: dict[str, str] = Field({})
    batch_size: Count | None = None


def read_spec(path: Path) -> RunSpec:
    """Read the run spec of an earlier command. Raise UserError if it is damaged."""
    spec = read_fields(path, SpecFields, "embed again with --force")
    refuse_changed_spec(path, spec)
    return {"engines": {}, **spec}


def start_or_resume_split(directory: Path, spec: Mapping[str, Any], force: bool) -> None:
    """Write the run spec, or check that it is the one of the run to resume.

    Args:
        force: delete a run that has another spec.

    Raises:
        UserError: the files there belong to something else, or to a run with another spec.
    """
    path = directory / RUN_SPEC_FILE
    is_own = holds(path, RUN_SPEC_KEY) or holds(directory / RUN_FILE, RUN_SPEC_KEY)
    names = (path, directory / RUN_FILE, directory / ERRORS_FILE)
    refuse_foreign([*names, *directory.glob("fold_*/part-*")], is_own, "--output_dir")
    if force and is_own:
        delete_run(directory)
    if path.is_file():
        earlier = read_json(path)
        changed = [key for key in spec if spec[key] != earlier.get(key)]
        # Without a shard nothing is lost: an engine may have been refused before the first one.
        if changed and any(directory.rglob("part-*")):
            raise UserError(_other_spec(directory, changed[0], earlier, spec))
        if changed:
            delete_run(directory)
    write_json(path, spec)
    publish(path)
    _delete_stale(directory)


def _other_spec(
    directory: Path, key: str, earlier: Mapping[str, Any], spec: Mapping[str, Any]
) -> str:
    difference = f"{key} = {earlier.get(key)}, now it is {spec[key]}"
    if isinstance(spec[key], dict):  # digests per fold would not help a reader
        difference = f"other {key}"
    return (
        f"{shown(directory)} holds embeddings made with {difference}; "
        "choose another --output_dir, or replace them with --force"
    )


def _delete_stale(directory: Path) -> None:
    """Delete temporary files that a killed run left; recent ones may belong to a running one."""
    for path in directory.rglob(".*.tmp"):
        if time.time() - path.stat().st_mtime > STALE_SECONDS:
            path.unlink(missing_ok=True)
