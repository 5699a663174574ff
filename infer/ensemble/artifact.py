"""A fitted ensemble on disk: a folder of data files and a manifest, which is written last.

| file | content |
| --- | --- |
| `ensemble.json` | the manifest: sha256 of each file, features, boosters, weights, provenance |
| `<library>_fold_<k>_seed_<s>.*` | a booster as text |
| `<library>_fold_all_seed_<s>.*` | a booster on all rows, with `--refit true` |
| `state.json`, `maps_*_<network>.parquet` | encodings, constants of scores, maps of embeddings |
| `oof.parquet`, `scores.json` | out-of-fold scores, and their metrics |
| `folds.parquet` | the fold plan |
| `calibration.json` | the curve from scores to probabilities, if fitted with `--calibrate` |
| `training.json` | shares of the training rows, to find other tables that differ |
| `oof_splits.parquet` | out-of-fold scores over several fold plans, if fitted with `--splits` |

Nothing is pickled, so opening an ensemble runs no code from it.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from infer.ensemble.blends.ranks import Scores, blend_by_seed
from infer.ensemble.drift import Summary, summary_from_json
from infer.ensemble.features.own_columns import OwnColumns
from infer.ensemble.features.own_tables import TableSpec
from infer.ensemble.features.spec import FeatureSpec
from infer.ensemble.images.features import ImageState
from infer.ensemble.manifest import check_manifest
from infer.ensemble.scoring.calibration import Calibration
from isic import schema
from isic.features import Encoding
from isic.layout import FOLDS_FILE, OOF_FILE
from isic.runtime.errors import UserError
from isic.runtime.files import holds, read_json, refuse_foreign, sha256, write_json
from isic.tables import read_parquet

ENSEMBLE_FILE = "ensemble.json"
STATE_FILE = "state.json"
SCORES_FILE = "scores.json"
SPLITS_FILE = "oof_splits.parquet"
TRAINING_FILE = "training.json"
CALIBRATION_FILE = "calibration.json"
BEGUN_FILE = "begun.json"
"""Marks a folder in which an ensemble is being written."""
FORMAT_VERSION = 6

MEMBERS_DIR = "members"
"""Folder of the ensembles of a blend."""

# Not in the manifest: they can be written again at any time.
REPORT_FILE = "report.html"
SUBGROUPS_FILE = "subgroups.csv"


@dataclass(frozen=True)
class EnsembleState:
    """The fitted state of the features."""

    names: tuple[str, ...]
    """The columns of the boosters' matrix."""
    encodings: Mapping[int, Encoding]
    """By fold."""
    image: ImageState
    refit: Encoding | None = None
    """Of the boosters on all rows."""

    def write(self, root: Path) -> list[str]:
        """Write the state. Return the names of its files."""
        encodings = {str(fold): encoding.to_json() for fold, encoding in self.encodings.items()}
        image = self.image.to_json()
        value = {"names": list(self.names), "image": image, "encodings": encodings}
        if self.refit:
            value["refit"] = self.refit.to_json()
        write_json(root / STATE_FILE, value)
        return [STATE_FILE, *self.image.write(root)]

    @classmethod
    def read(cls, root: Path) -> "EnsembleState":
        value = read_json(root / STATE_FILE)
        names = tuple(value["names"])
        encodings = {
            int(fold): Encoding.from_json(names, part) for fold, part in value["encodings"].items()
        }
        # Only with --refit.
        refit = Encoding.from_json(names, value["refit"]) if "refit" in value else None
        return cls(names, encodings, ImageState.read(root, value["image"]), refit)


@dataclass(frozen=True)
class Ensemble:
    """An ensemble that `open_ensemble` has read and checked."""

    root: Path
    manifest: Mapping[str, Any]
    state: EnsembleState
    spec: FeatureSpec

    @property
    def weights(self) -> Mapping[str, float]:
        """The weight of each library; of `image` if there are no boosters."""
        return dict(self.manifest["weights"])

    @property
    def is_relative(self) -> bool:
        """Whether a score depends on the patient's other lesions."""
        return self.spec.compares_lesions(self.state.image)

    @property
    def uses_images(self) -> bool:
        return self.spec.images

    @property
    def own_tables(self) -> Mapping[str, TableSpec]:
        """The tables of own columns that a table to score needs, by name."""
        return self.spec.own.tables

    @cached_property
    def training(self) -> Summary:
        """Raw columns of the training table, and own columns as `set.column`."""
        return summary_from_json(read_json(self.root / TRAINING_FILE))

    @cached_property
    def calibration(self) -> Calibration | None:
        return read_calibration(self.root, self.manifest)

    def frame(self, metadata: pl.DataFrame, more: Iterable[pl.DataFrame]) -> pl.DataFrame:
        """Return the feature table of new rows, see `FeatureSpec.frame`.

        Raises:
            UserError: a definition gives text in place of numbers, or the reverse.
        """
        encodings = self.state.encodings.values()
        text = {name for encoding in encodings for name in encoding.categories}
        return self.spec.frame(metadata, more, text)

    def oof(self) -> pl.DataFrame:
        """Return `isic_id`, `fold`, `target`, each model's out-of-fold scores, and `blend`."""
        return read_parquet(self.root / OOF_FILE)

    def oof_models(self) -> dict[str, Scores]:
        """Return [N] out-of-fold scores by model name."""
        models = self.oof().drop(schema.ID, "fold", schema.TARGET, "blend")
        return {column.name: column.to_numpy() for column in models}

    def scores_by_seed(self) -> dict[int, Scores]:
        """Return [N] the out-of-fold scores of each seed's models; empty without boosters."""
        if not self.manifest["boosters"]:
            return {}
        return blend_by_seed(self.oof_models(), self.weights)


def write_calibration(root: Path, calibration: Calibration | None) -> list[str]:
    """Write the curve, if any. Return the names of its files."""
    if calibration is None:
        return []
    write_json(root / CALIBRATION_FILE, calibration.to_json())
    return [CALIBRATION_FILE]


def read_calibration(root: Path, manifest: Mapping[str, Any]) -> Calibration | None:
    """Return the curve of an ensemble or a blend; None if it was fitted without one."""
    if CALIBRATION_FILE not in manifest["files"]:
        return None
    return Calibration.from_json(read_json(root / CALIBRATION_FILE))


def write_ensemble_manifest(root: Path, files: Iterable[str], fields: Mapping[str, Any]) -> None:
    """Write the manifest of the named files. Call it after they are written."""
    digests = {name: sha256(root / name) for name in files}
    write_json(root / ENSEMBLE_FILE, {"format": FORMAT_VERSION, **fields, "files": digests})
    (root / BEGUN_FILE).unlink(missing_ok=True)


def refuse_foreign_folder(root: Path) -> None:
    """Raise a UserError if a folder has files with an ensemble's names but is not an ensemble."""
    # An ensemble whose fit was interrupted counts as one.
    is_own = holds(root / ENSEMBLE_FILE, "format", "weights") or holds(root / BEGUN_FILE, "format")
    names = (ENSEMBLE_FILE, BEGUN_FILE, STATE_FILE, OOF_FILE, SCORES_FILE, FOLDS_FILE)
    files = [root / name for name in names]
    refuse_foreign([*files, *_removable(root)], is_own, "--output_dir or --name")


def clear_ensemble(root: Path) -> None:
    """Remove an earlier ensemble."""
    # The manifest goes first: a folder without one is not an ensemble. BEGUN_FILE stays until
    # `write_ensemble_manifest`, so that a killed fit can be repeated.
    write_json(root / BEGUN_FILE, {"format": FORMAT_VERSION})
    for path in (root / ENSEMBLE_FILE, *_removable(root)):
        path.unlink(missing_ok=True)
    shutil.rmtree(root / MEMBERS_DIR, ignore_errors=True)


def _removable(root: Path) -> list[Path]:
    """Return the files that not every ensemble has, and the report."""
    boosters = root.glob("[!.]*_fold_*_seed_*")
    maps = root.glob("maps_*.parquet")
    names = (REPORT_FILE, SUBGROUPS_FILE, SPLITS_FILE, CALIBRATION_FILE, TRAINING_FILE)
    others = [root / name for name in names]
    return [*others, *boosters, *maps]


def refuse_other_ensemble(root: Path, fields: Mapping[str, Any]) -> None:
    """Raise a UserError if the folder has an ensemble whose manifest differs in these fields."""
    if not (root / ENSEMBLE_FILE).is_file():
        return
    manifest = read_json(root / ENSEMBLE_FILE)
    if manifest.get("format") != FORMAT_VERSION:
        raise UserError(
            f"{root} holds an ensemble of another version of the toolkit; "
            "choose another --name, or replace it with --force"
        )
    refuse_other_fields(manifest, fields, f"{root} holds an ensemble", "--name")


def refuse_other_fields(
    manifest: Mapping[str, Any], fields: Mapping[str, Any], held: str, flag: str
) -> None:
    """Raise a UserError if a manifest differs in these fields.

    Args:
        held: the start of the message: "outputs/a holds an ensemble".
        flag: the flag that names another place.
    """
    # Through JSON and back, so that tuples and integer keys compare as they were written.
    now = dict(_flatten(json.loads(json.dumps(fields))))
    then = dict(_flatten({key: manifest.get(key) for key in fields}))
    for key in {**now, **then}:
        # The weights that networks started from follow from their checkpoints, which are compared;
        # earlier versions did not record them.
        if now.get(key) != then.get(key) and ".pretrained" not in key:
            raise UserError(
                f"{held} with {key} = {then.get(key)}, now it is {now.get(key)}; "
                f"choose another {flag}, or replace it with --force"
            )


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield name, value
        return
    for key, part in value.items():
        yield from _flatten(part, f"{name}.{key}" if name else key)


def open_ensemble(path: Path) -> Ensemble:
    """Read and check the ensemble in a folder or in the only ensemble's folder within it.

    Raises:
        UserError: no ensemble, or several; a file that is missing or does not match the manifest;
            other features, or another order of them, in this version.
    """
    root = find_ensemble(path)
    manifest = read_json(root / ENSEMBLE_FILE)
    refuse_damaged(root, manifest)
    if "members" in manifest:
        raise UserError(f"{root} is a blend; give the ensembles in {root / MEMBERS_DIR} instead")
    try:
        own = OwnColumns.from_json(manifest)
        spec = FeatureSpec.parse(manifest["features"], own, manifest.get("lists"))
    except UserError as error:
        raise UserError(f"{root / ENSEMBLE_FILE}: {error}") from None
    state = EnsembleState.read(root)
    networks = {"embeddings": state.image.networks, "frozen": state.image.frozen}
    for flag, known in networks.items():
        if manifest[flag].keys() != known.keys():
            raise UserError(
                f"{root / ENSEMBLE_FILE} names other networks ({flag}) than {STATE_FILE}; fit the "
                "ensemble again"
            )
    names = spec.names(state.image)
    if names != state.names:
        changed = sorted({*names} ^ {*state.names})
        raise UserError(
            f"{root} was fitted on {len(state.names)} features, this version has {len(names)} for "
            f"{manifest['features']} (different: {', '.join(changed[:3]) or 'their order'}); "
            "fit the ensemble again"
        )
    return Ensemble(root, manifest, state, spec)


def refuse_damaged(root: Path, manifest: Mapping[str, Any]) -> None:
    """Raise a UserError if an ensemble is of another version or a file has changed."""
    if manifest.get("format") != FORMAT_VERSION:
        raise UserError(
            f"{root / ENSEMBLE_FILE} is of another version of the toolkit; fit the ensemble again"
        )
    check_manifest(root / ENSEMBLE_FILE, manifest)
    for name, expected in manifest["files"].items():
        if sha256(root / name) != expected:
            raise UserError(f"{root / name} does not match {ENSEMBLE_FILE}; fit the ensemble again")


def find_ensemble(path: Path) -> Path:
    """Return the folder itself or the only ensemble's within it. Raise UserError."""
    if (path / ENSEMBLE_FILE).is_file():
        return path
    inside = sorted(manifest.parent for manifest in path.glob(f"*/{ENSEMBLE_FILE}"))
    if not inside:
        raise UserError(f"{path} holds no finished ensemble; run `python -m infer fit` first")
    if len(inside) > 1:
        found = ", ".join(str(root) for root in inside)
        raise UserError(f"{path} holds several ensembles, choose one: {found}")
    return inside[0]
