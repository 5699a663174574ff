"""A fitted ensemble on disk: a folder of data files that one manifest, written last, ties together.

`ensemble.json` names every file with its sha256, the features, the boosters, the weights of their libraries, the fold
plan and the embeddings; `state.json` and `maps_aligned.parquet` hold what was learnt about features, `oof.parquet` the
out-of-fold scores, `scores.json` what they are worth, `folds.parquet` the fold plan. Nothing is ever unpickled.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from infer.ensemble import image_scores
from infer.ensemble.blend import Scores
from infer.ensemble.image_columns import FORMS
from infer.ensemble.image_features import ImageState
from isic import features, schema
from isic.errors import UserError
from isic.features import Encoding, relative_to_patient
from isic.files import holds, read_json, refuse_foreign, sha256, write_json
from isic.folds import FILE as FOLDS_FILE
from isic.tables import read_parquet

MANIFEST = "ensemble.json"
STATE = "state.json"
OOF = "oof.parquet"
SCORES = "scores.json"
BEGUN = "begun.json"
"""Marks a folder in which an ensemble is being written."""
FORMAT = 4

IMAGE_WORDS = ("image", "multimodal")


@dataclass(frozen=True)
class FeatureSpec:
    """What the boosters see, as the words of `--features` say it."""

    words: tuple[str, ...]
    tabular: tuple[str, ...]
    score: bool
    """Whether the image model's score is a feature."""
    forms: tuple[str, ...]
    """Which embedding columns are."""

    @classmethod
    def parse(cls, text: str) -> "FeatureSpec":
        """Reads a comma-separated list of sets, groups and features.

        `image` is the image model's score, `multimodal` that and the engineered features; `aligned`
        and `frozen` are embeddings as columns.

        Raises:
            UserError: an unknown word, or a column that only training tables have.
        """
        words = tuple(word.strip() for word in text.split(","))
        plain = [word for word in words if word not in (*IMAGE_WORDS, *FORMS)]
        if "multimodal" in words:
            plain.append("engineered")
        forms = tuple(form for form in FORMS if form in words)
        score = any(word in IMAGE_WORDS for word in words)
        return cls(words, features.expand(plain, (*IMAGE_WORDS, *FORMS)), score, forms)

    @property
    def images(self) -> bool:
        return self.score or bool(self.forms)

    def names(self, image: ImageState) -> tuple[str, ...]:
        """The columns of the boosters' matrix; none where the image model's score stands alone."""
        return (*self.tabular, *image.names) if self.tabular or self.forms else ()

    def frame(self, metadata: pl.DataFrame, image: Iterable[pl.DataFrame]) -> pl.DataFrame:
        """Returns the feature table, in the order of `metadata`: `isic_id`, tabular, image."""
        tabular = features.compute(metadata, self.tabular)
        return pl.concat([tabular, *(table.drop(schema.ID) for table in image)], how="horizontal")


@dataclass(frozen=True)
class State:
    """What was learnt about features: an encoding a fold, and how to read embeddings."""

    names: tuple[str, ...]
    encodings: Mapping[int, Encoding]
    image: ImageState

    def write(self, root: Path) -> list[str]:
        """Writes the state and returns the names of its files."""
        encodings = {str(fold): encoding.to_json() for fold, encoding in self.encodings.items()}
        value = {"names": list(self.names), **self.image.to_json(), "encodings": encodings}
        write_json(root / STATE, value)
        return [STATE, *self.image.write(root)]

    @classmethod
    def read(cls, root: Path) -> "State":
        value = read_json(root / STATE)
        names = tuple(value["names"])
        encodings = {
            int(fold): Encoding.from_json(names, part) for fold, part in value["encodings"].items()
        }
        return cls(names, encodings, ImageState.read(root, value))


@dataclass(frozen=True)
class Ensemble:
    """An ensemble that was read and checked."""

    root: Path
    manifest: Mapping[str, Any]
    state: State
    spec: FeatureSpec

    @property
    def weights(self) -> Mapping[str, float]:
        """The weight of each library, or of the image model's score alone."""
        return dict(self.manifest["weights"])

    @property
    def relative(self) -> bool:
        """Whether a score depends on the patient's other lesions."""
        names = self.state.names
        return image_scores.RELATIVE in names or relative_to_patient(names)

    def oof(self) -> pl.DataFrame:
        """Returns the out-of-fold scores: `isic_id`, `fold`, `target`, a column a model, and `blend`."""
        return read_parquet(self.root / OOF)

    def oof_models(self) -> dict[str, Scores]:
        """Returns [N] out-of-fold scores by the model's name."""
        models = self.oof().drop(schema.ID, "fold", schema.TARGET, "blend")
        return {column.name: column.to_numpy() for column in models}


def write_manifest(root: Path, files: Iterable[str], fields: Mapping[str, Any]) -> None:
    """Writes the manifest over the named files; call it last."""
    digests = {name: sha256(root / name) for name in files}
    write_json(root / MANIFEST, {"format": FORMAT, **fields, "files": digests})
    (root / BEGUN).unlink(missing_ok=True)


def refuse_other_content(root: Path) -> None:
    """Raise a UserError if a folder holds files of the names that an ensemble has, but no ensemble, whole or begun."""
    is_own = holds(root / MANIFEST, "format", "weights") or holds(root / BEGUN, "format")
    others = (root / name for name in (MANIFEST, BEGUN, STATE, OOF, SCORES, FOLDS_FILE))
    refuse_foreign([*others, *_removable(root)], is_own, "--output_dir or --name")


def clear(root: Path) -> None:
    """Remove an earlier ensemble, its manifest first: a folder without one is no ensemble.

    BEGUN stays until `write_manifest`, so that a run that was killed can be repeated.
    """
    write_json(root / BEGUN, {"format": FORMAT})
    for path in (root / MANIFEST, *_removable(root)):
        path.unlink(missing_ok=True)


def _removable(root: Path) -> list[Path]:
    """Return the files of an ensemble whose names differ from one to another, and its report."""
    boosters, maps = root.glob("[!.]*_fold_*_seed_*"), root.glob("maps_*.parquet")
    return [root / "report.html", *boosters, *maps]


def refuse_another(root: Path, fields: Mapping[str, Any]) -> None:
    """Raises a UserError where the folder holds an ensemble of whose manifest some of these fields differ."""
    if not (root / MANIFEST).is_file():
        return
    manifest = read_json(root / MANIFEST)
    now = dict(_flat(json.loads(json.dumps(fields))))
    then = dict(_flat({key: manifest.get(key) for key in fields}))
    changed = next((key for key in {**now, **then} if now.get(key) != then.get(key)), None)
    if changed:
        raise UserError(
            f"{root} holds an ensemble with {changed} = {then.get(changed)}, now it is {now.get(changed)}; choose "
            "another --name, or replace it with --force"
        )


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the values of nested mappings by their dotted names."""
    if not isinstance(value, dict):
        yield name, value
        return
    for key, part in value.items():
        yield from _flat(part, f"{name}.{key}" if name else key)


def open_ensemble(path: Path) -> Ensemble:
    """Reads an ensemble and checks it.

    Args:
        path: the ensemble's folder, or a folder with exactly one ensemble in it.

    Raises:
        UserError: no ensemble, or several; a file that is missing or not the one the manifest describes; features
            that this version computes no longer, or in another order.
    """
    root = _find(path)
    manifest = read_json(root / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{root / MANIFEST} is not of this version of the toolkit; fit the ensemble again"
        )
    for name, expected in manifest["files"].items():
        if sha256(root / name) != expected:
            raise UserError(
                f"{root / name} is not the file that {MANIFEST} describes; fit the ensemble again"
            )
    spec = FeatureSpec.parse(manifest["features"])
    state = State.read(root)
    names = spec.names(state.image)
    if names != state.names:
        changed = sorted({*names} ^ {*state.names})
        raise UserError(
            f"{root} was fitted on {len(state.names)} features and this version has {len(names)} for "
            f"{manifest['features']} (different: {', '.join(changed[:3]) or 'their order'}); fit the ensemble again"
        )
    return Ensemble(root, manifest, state, spec)


def _find(path: Path) -> Path:
    if (path / MANIFEST).is_file():
        return path
    inside = sorted(manifest.parent for manifest in path.glob(f"*/{MANIFEST}"))
    if not inside:
        raise UserError(f"{path} holds no finished ensemble; run `python -m infer fit` first")
    if len(inside) > 1:
        raise UserError(
            f"{path} holds several ensembles, choose one: {', '.join(str(root) for root in inside)}"
        )
    return inside[0]
