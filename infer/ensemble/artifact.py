"""A fitted ensemble on disk: a folder of data files and a manifest, which is written last.

| file | content |
| --- | --- |
| `ensemble.json` | the manifest: sha256 of each file, features, boosters, weights, provenance |
| `<library>_fold_<k>_seed_<s>.*` | a booster as text |
| `state.json`, `maps_aligned.parquet` | encodings, constants of the image score, rotations |
| `oof.parquet`, `scores.json` | out-of-fold scores, and their metrics |
| `folds.parquet` | the fold plan |

Nothing is pickled.
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
from isic.features import Encoding, relative_to_patient
from isic.folds import FILE as FOLDS_FILE
from isic.runtime.errors import UserError
from isic.runtime.files import holds, read_json, refuse_foreign, sha256, write_json
from isic.tables import read_parquet

MANIFEST = "ensemble.json"
STATE = "state.json"
OOF = "oof.parquet"
SCORES = "scores.json"
BEGUN = "begun.json"
"""Marks a folder in which an ensemble is being written."""
FORMAT = 4

REPORT = "report.html"
"""Not part of the manifest: it can be written again at any time."""

IMAGE_WORDS = ("image", "multimodal")
"""Words of `--features` that include the image model's score."""


@dataclass(frozen=True)
class FeatureSpec:
    """The features of the boosters, from the words of `--features`."""

    words: tuple[str, ...]
    tabular: tuple[str, ...]
    """Names of the tabular features."""
    score: bool
    """Whether the image model's score is a feature."""
    forms: tuple[str, ...]
    """The kinds of embedding columns, some of `FORMS`."""

    @classmethod
    def parse(cls, text: str) -> "FeatureSpec":
        """Parse a comma-separated list of sets, groups and features.

        `image` is the image model's score, `multimodal` is `image` and `engineered`; `aligned` and
        `frozen` are embeddings as columns.

        Raises:
            UserError: an unknown word, or a column that only training tables have.
        """
        words = tuple(word.strip() for word in text.split(","))
        image_words = (*IMAGE_WORDS, *FORMS)
        plain = [word for word in words if word not in image_words]
        if "multimodal" in words:
            plain.append("engineered")
        return cls(
            words,
            tabular=features.expand(plain, also_known=image_words),
            score=any(word in IMAGE_WORDS for word in words),
            forms=tuple(form for form in FORMS if form in words),
        )

    @property
    def images(self) -> bool:
        """Whether any feature comes from images."""
        return self.score or bool(self.forms)

    def names(self, image: ImageState) -> tuple[str, ...]:
        """Return the columns of the boosters' matrix.

        There are none, and no boosters, if the image model's score is the only feature.
        """
        if not (self.tabular or self.forms):
            return ()
        return (*self.tabular, *image.names)

    def frame(self, metadata: pl.DataFrame, image: Iterable[pl.DataFrame]) -> pl.DataFrame:
        """Return the feature table: `isic_id`, tabular and image columns.

        Args:
            metadata: the rows, whose order is kept.
            image: tables of `isic_id` and columns in the same order.
        """
        tabular = features.compute(metadata, self.tabular)
        return pl.concat([tabular, *(table.drop(schema.ID) for table in image)], how="horizontal")


@dataclass(frozen=True)
class State:
    """The fitted state of the features."""

    names: tuple[str, ...]
    """The columns of the boosters' matrix."""
    encodings: Mapping[int, Encoding]
    """By fold."""
    image: ImageState

    def write(self, root: Path) -> list[str]:
        """Write the state. Returns the names of its files."""
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
    """An ensemble that `open_ensemble` has read and checked."""

    root: Path
    manifest: Mapping[str, Any]
    state: State
    spec: FeatureSpec

    @property
    def weights(self) -> Mapping[str, float]:
        """The weight of each library; of `image` if there are no boosters."""
        return dict(self.manifest["weights"])

    @property
    def relative(self) -> bool:
        """Whether a score depends on the patient's other lesions."""
        names = self.state.names
        return image_scores.RELATIVE in names or relative_to_patient(names)

    def oof(self) -> pl.DataFrame:
        """Return `isic_id`, `fold`, `target`, each model's out-of-fold scores, and `blend`."""
        return read_parquet(self.root / OOF)

    def oof_models(self) -> dict[str, Scores]:
        """Return [N] out-of-fold scores by model name."""
        models = self.oof().drop(schema.ID, "fold", schema.TARGET, "blend")
        return {column.name: column.to_numpy() for column in models}


def write_manifest(root: Path, files: Iterable[str], fields: Mapping[str, Any]) -> None:
    """Write the manifest of the named files. Call it after they are written."""
    digests = {name: sha256(root / name) for name in files}
    write_json(root / MANIFEST, {"format": FORMAT, **fields, "files": digests})
    (root / BEGUN).unlink(missing_ok=True)


def refuse_other_content(root: Path) -> None:
    """Raise a UserError if a folder has files with an ensemble's names but is not an ensemble.

    An ensemble whose fit was interrupted counts as one.
    """
    is_own = holds(root / MANIFEST, "format", "weights") or holds(root / BEGUN, "format")
    others = (root / name for name in (MANIFEST, BEGUN, STATE, OOF, SCORES, FOLDS_FILE))
    refuse_foreign([*others, *_removable(root)], is_own, "--output_dir or --name")


def clear(root: Path) -> None:
    """Remove an earlier ensemble, manifest first: a folder without one is not an ensemble.

    BEGUN stays until `write_manifest`, so that a killed run can be repeated.
    """
    write_json(root / BEGUN, {"format": FORMAT})
    for path in (root / MANIFEST, *_removable(root)):
        path.unlink(missing_ok=True)


def _removable(root: Path) -> list[Path]:
    """Return the files that not every ensemble has, and the report."""
    boosters = root.glob("[!.]*_fold_*_seed_*")
    maps = root.glob("maps_*.parquet")
    return [root / REPORT, *boosters, *maps]


def refuse_another(root: Path, fields: Mapping[str, Any]) -> None:
    """Raise a UserError if the folder has an ensemble whose manifest differs in these fields."""
    if not (root / MANIFEST).is_file():
        return
    manifest = read_json(root / MANIFEST)
    now = dict(_flat(json.loads(json.dumps(fields))))
    then = dict(_flat({key: manifest.get(key) for key in fields}))
    for key in {**now, **then}:
        if now.get(key) != then.get(key):
            raise UserError(
                f"{root} holds an ensemble with {key} = {then.get(key)}, now it is "
                f"{now.get(key)}; choose another --name, or replace it with --force"
            )


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted names and values of nested mappings."""
    if not isinstance(value, dict):
        yield name, value
        return
    for key, part in value.items():
        yield from _flat(part, f"{name}.{key}" if name else key)


def open_ensemble(path: Path) -> Ensemble:
    """Read and checks an ensemble.

    Args:
        path: the ensemble's folder, or a folder with exactly one ensemble in it.

    Raises:
        UserError: no ensemble, or several; a file that is missing or does not match the manifest;
            other features, or another order of them, in this version.
    """
    root = _find(path)
    manifest = read_json(root / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{root / MANIFEST} is of another version of the toolkit; fit the ensemble again"
        )
    for name, expected in manifest["files"].items():
        if sha256(root / name) != expected:
            raise UserError(f"{root / name} does not match {MANIFEST}; fit the ensemble again")
    spec = FeatureSpec.parse(manifest["features"])
    state = State.read(root)
    names = spec.names(state.image)
    if names != state.names:
        changed = sorted({*names} ^ {*state.names})
        raise UserError(
            f"{root} was fitted on {len(state.names)} features, this version has {len(names)} for "
            f"{manifest['features']} (different: {', '.join(changed[:3]) or 'their order'}); "
            "fit the ensemble again"
        )
    return Ensemble(root, manifest, state, spec)


def _find(path: Path) -> Path:
    if (path / MANIFEST).is_file():
        return path
    inside = sorted(manifest.parent for manifest in path.glob(f"*/{MANIFEST}"))
    if not inside:
        raise UserError(f"{path} holds no finished ensemble; run `python -m infer fit` first")
    if len(inside) > 1:
        found = ", ".join(str(root) for root in inside)
        raise UserError(f"{path} holds several ensembles, choose one: {found}")
    return inside[0]
