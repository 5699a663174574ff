"""A fitted ensemble on disk: a folder of data files that one manifest, written last, ties together.

`ensemble.json` names every file with its sha256, the features, the boosters, the fold plan and the embeddings;
`state.json` holds what was learnt about features, `oof.parquet` the out-of-fold scores, `scores.json` what they are
worth, `folds.parquet` the fold plan. Nothing is ever unpickled.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from infer import image_scores
from infer.image_scores import Standard
from isic import features
from isic.errors import UserError
from isic.features import Encoding
from isic.files import read_json, sha256, write_json

MANIFEST = "ensemble.json"
STATE = "state.json"
OOF = "oof.parquet"
FORMAT = 1

IMAGE_WORDS = ("image", "multimodal")


@dataclass(frozen=True)
class FeatureSpec:
    """What the boosters see, as the words of `--features` say it."""

    words: tuple[str, ...]
    tabular: tuple[str, ...]
    image: bool

    @classmethod
    def parse(cls, text: str) -> "FeatureSpec":
        """Reads a comma-separated list of sets, groups and features.

        `image` is the image model's score; `multimodal` is that and the engineered features.

        Raises:
            UserError: an unknown word, or a column that only training tables have.
        """
        words = tuple(word.strip() for word in text.split(","))
        plain = [word for word in words if word not in IMAGE_WORDS]
        if "multimodal" in words:
            plain.append("engineered")
        return cls(words, features.expand(plain, IMAGE_WORDS), any(word in IMAGE_WORDS for word in words))

    @property
    def names(self) -> tuple[str, ...]:
        """The columns of the boosters' matrix; none where the image model's score stands alone."""
        return (*self.tabular, *(image_scores.FEATURES if self.image else ())) if self.tabular else ()

    def frame(self, metadata: pl.DataFrame, image: pl.DataFrame | None) -> pl.DataFrame:
        """Returns the feature table, in the order of `metadata`: `isic_id`, tabular, image."""
        table = features.compute(metadata, self.tabular)
        if image is None:
            return table
        return table.hstack(image.select(image_scores.FEATURES))


@dataclass(frozen=True)
class State:
    """What was learnt about features: an encoding a fold, and how to standardise image logits."""

    names: tuple[str, ...]
    encodings: Mapping[int, Encoding]
    standard: Standard | None

    def write(self, path: Path) -> None:
        image = self.standard.to_json() if self.standard else None
        encodings = {str(fold): encoding.to_json() for fold, encoding in self.encodings.items()}
        write_json(path, {"names": list(self.names), "image": image, "encodings": encodings})

    @classmethod
    def read(cls, path: Path) -> "State":
        value = read_json(path)
        names = tuple(value["names"])
        encodings = {int(fold): Encoding.from_json(names, part) for fold, part in value["encodings"].items()}
        return cls(names, encodings, Standard.from_json(value["image"]) if value["image"] else None)


@dataclass(frozen=True)
class Ensemble:
    """An ensemble that was read and checked."""

    root: Path
    manifest: Mapping[str, Any]
    state: State
    spec: FeatureSpec


def write_manifest(root: Path, files: Iterable[str], fields: Mapping[str, Any]) -> None:
    """Writes the manifest over the named files; call it last."""
    write_json(root / MANIFEST, {"format": FORMAT, **fields, "files": {name: sha256(root / name) for name in files}})


def clear(root: Path) -> None:
    """Takes an earlier ensemble's manifest and boosters away: a folder without a manifest is no ensemble."""
    for path in (root / MANIFEST, *root.glob("*_fold_*_seed_*")):
        path.unlink(missing_ok=True)


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
        raise UserError(f"{root / MANIFEST} is not of this version of the toolkit; fit the ensemble again")
    for name, expected in manifest["files"].items():
        if sha256(root / name) != expected:
            raise UserError(f"{root / name} is not the file that {MANIFEST} describes; fit the ensemble again")
    state = State.read(root / STATE)
    spec = FeatureSpec.parse(manifest["features"])
    if spec.names != state.names:
        changed = sorted({*spec.names} ^ {*state.names})
        raise UserError(
            f"{root} was fitted on {len(state.names)} features and this version has {len(spec.names)} for "
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
        raise UserError(f"{path} holds several ensembles, choose one: {', '.join(str(root) for root in inside)}")
    return inside[0]
