"""The features that an ensemble takes from images, per network and form."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from infer.embedding.store import Embeddings, read_run, refuse_without_head
from infer.ensemble.images import scores as image_scores
from infer.ensemble.images.columns import (
    ALIGNED,
    AffineMaps,
    column_names,
    fit_aligned,
    mapped_columns,
    maps_file,
    read_affine_maps,
    write_affine_maps,
)
from infer.ensemble.images.distances import DISTANCES, PatientDistances, distance_columns
from infer.ensemble.images.frozen import (
    FROZEN,
    PCA,
    FrozenModel,
    component_columns,
    find_frozen_model,
    fit_components,
    frozen_columns,
    refuse_other_frozen_model,
)
from infer.ensemble.images.networks import RunT, by_network, match_networks
from infer.ensemble.images.relative_scores import (
    DIFFERENCE,
    RANKS,
    ImageScores,
    group_lesions,
    score_column,
)
from infer.ensemble.images.scores import LogitScaler
from infer.ensemble.settings import EmbeddingSources
from isic.dataset import Split
from isic.folds import read_folds
from isic.layout import FOLDS_FILE, fold_number
from isic.runtime.errors import UserError

NEEDS = {
    "embeddings": "image features need --embeddings outputs/embeddings/<config>; "
    "run `python -m infer embed` first",
    "frozen": "frozen columns and scores need --frozen outputs/embeddings/<config>, "
    "of a network that was trained on other images; all but frozen_score also take those of a "
    "backbone",
}

SCORE = "image_score"
FROZEN_SCORE = "frozen_score"
"""First parts of the names of columns."""

SCORE_FORMS: dict[str, tuple[str, ...]] = {"image": ("", DIFFERENCE), "image_ranks": tuple(RANKS)}
"""The columns that a word requests of each network's score."""
EMBEDDED_FORMS = (*SCORE_FORMS, ALIGNED)
"""Forms of a network whose folds' models hold out the training rows."""
COMPONENT_FORMS = (PCA, DISTANCES)
"""Forms that read the principal components of a frozen network's embeddings."""
FROZEN_FORMS = (FROZEN_SCORE, FROZEN, *COMPONENT_FORMS)
FORMS = (*SCORE_FORMS, FROZEN_SCORE, ALIGNED, FROZEN, *COMPONENT_FORMS)
"""The kinds of image features, in the order of the feature table. Each is a word of --features."""


@dataclass(frozen=True)
class Network:
    """The fitted state of a network whose folds' models hold out the training rows."""

    folds_digest: str
    """Of its own fold plan, which need not be the boosters'."""
    scaler: LogitScaler | None = None
    """For the score."""
    maps: AffineMaps | None = None
    """For the aligned embeddings."""


@dataclass(frozen=True)
class ImageState:
    """The fitted state of the image features; empty if an ensemble uses none."""

    forms: tuple[str, ...] = ()
    """Of FORMS, in that order."""
    networks: Mapping[str, Network] = field(default_factory=dict)
    """By name, in the order of the names."""
    frozen: Mapping[str, FrozenModel] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The columns, in the order of the feature table, with those that --features leaves out."""
        names = [
            score_column(score, network, relative)
            for score, networks in ((SCORE, self.networks), (FROZEN_SCORE, self.frozen))
            for network in networks
            for relative in self.relatives(score)
        ]
        for network, state in self.networks.items():
            if state.maps:
                names += column_names(ALIGNED, network, len(state.maps[0].offset))
        for network, model in self.frozen.items():
            names += model.names(self.forms)
            if DISTANCES in self.forms:
                names += distance_columns(network)
        return tuple(names)

    def relatives(self, score: str) -> tuple[str, ...]:
        """Return the columns to make of each network's score, by its SCORE or FROZEN_SCORE."""
        if score == FROZEN_SCORE:
            return SCORE_FORMS["image"] if FROZEN_SCORE in self.forms else ()
        return tuple(relative for form in self.forms for relative in SCORE_FORMS.get(form, ()))

    @property
    def needs(self) -> dict[str, bool]:
        """Whether each field of `EmbeddingSources` is read."""
        return {"embeddings": bool(self.networks), "frozen": bool(self.frozen)}

    def roots(self, sources: EmbeddingSources, split: Split) -> dict[str, dict[str, Embeddings]]:
        """Return the embedding runs by field of `EmbeddingSources` and network.

        Raises:
            UserError: there are none, a network is missing, or there are others.
        """
        fitted = {"embeddings": self.networks, "frozen": self.frozen}
        return {
            flag: match_networks(flag, _required(getattr(sources, flag), flag), split, names)
            if names
            else {}
            for flag, names in fitted.items()
        }

    def write(self, root: Path) -> list[str]:
        """Write the maps, which `to_json` leaves out. Return the names of the files."""
        files = [file for model in self.frozen.values() for file in model.write(root)]
        for name, network in self.networks.items():
            if network.maps:
                files.append(maps_file(ALIGNED, name))
                write_affine_maps(root / files[-1], network.maps)
        return files

    def to_json(self) -> dict[str, Any]:
        networks = {
            name: {
                "folds_digest": network.folds_digest,
                "scaler": network.scaler.to_json() if network.scaler else None,
                "maps": maps_file(ALIGNED, name) if network.maps else None,
            }
            for name, network in self.networks.items()
        }
        frozen = {name: model.to_json() for name, model in self.frozen.items()}
        return {"forms": list(self.forms), "networks": networks, "frozen": frozen}

    @classmethod
    def read(cls, root: Path, value: Mapping[str, Any]) -> "ImageState":
        """Read the maps from `root` and the rest from `value`, the result of `to_json`."""
        networks = {
            name: Network(
                part["folds_digest"],
                LogitScaler.from_json(part["scaler"]) if part["scaler"] else None,
                read_affine_maps(root / part["maps"]) if part["maps"] else None,
            )
            for name, part in value["networks"].items()
        }
        frozen = {name: FrozenModel.read(root, part) for name, part in value["frozen"].items()}
        return cls(tuple(value["forms"]), networks, frozen)


@dataclass(frozen=True)
class NetworkRows:
    """The features of some rows by one network."""

    score: pl.Series | None = None
    """[N] Float64, null for an unreadable image."""
    columns: Sequence[pl.DataFrame] = ()
    """Its embeddings."""
    components: pl.DataFrame | None = None
    """Their principal components."""


def fit_images(
    forms: Sequence[str],
    embeddings: Sequence[Path],
    frozen: Sequence[Path],
    metadata: pl.DataFrame,
) -> tuple[ImageState, "ImageRows"]:
    """Fit the image features to a training table's embeddings, and read those of the rows.

    Each network has the fold plan beside its embeddings. Plans may differ, because whether a score
    is out of fold is checked by rows. Each row is read from the model that held it out.

    Args:
        forms: of FORMS.
        embeddings: runs of networks whose folds' models hold out the training rows.
        frozen: runs of networks that were trained on other images.

    Raises:
        UserError: embeddings that are needed are not given, not finished, of another fold plan
            than the one beside them, or of a model that has learned from the rows it scores.
    """
    networks = {}
    frozen_models = {}
    rows: dict[str, NetworkRows] = {}
    frozen_rows: dict[str, NetworkRows] = {}
    if any(form in EMBEDDED_FORMS for form in forms):
        for name, root in by_network(_required(embeddings, "embeddings"), "train").items():
            networks[name], rows[name] = _fit_network(root, name, forms, metadata)
    if any(form in FROZEN_FORMS for form in forms):
        for name, root in by_network(_required(frozen, "frozen"), "train").items():
            model = _fit_frozen(root, forms, metadata)
            frozen_rows[name] = _read_frozen(root, "train", name, model, forms, metadata)
            frozen_models[name] = model
    state = ImageState(tuple(form for form in FORMS if form in forms), networks, frozen_models)
    return state, _image_rows(state, rows, frozen_rows, metadata)


def _fit_network(
    root: Path, name: str, forms: Sequence[str], metadata: pl.DataFrame
) -> tuple[Network, NetworkRows]:
    refuse_without_head(root, read_run(root, "train"))
    folds = read_folds(root / FOLDS_FILE)
    image_scores.read_origin(root, "train", folds.digest)
    # Before anything is fitted: a leak would make every out-of-fold score too good.
    image_scores.refuse_leaks(root, metadata, folds)
    scaler = score = maps = None
    columns = []
    if any(form in SCORE_FORMS for form in forms):
        logits = image_scores.oof_logits(root, metadata, folds)
        scaler = image_scores.fit_logit_scaler(logits)
        score = image_scores.mean_scores(logits, scaler, metadata)
    if ALIGNED in forms:
        maps, aligned = fit_aligned(root, name, metadata, folds)
        columns.append(aligned)
    return Network(folds.digest, scaler, maps), NetworkRows(score, columns)


def _fit_frozen(root: Path, forms: Sequence[str], metadata: pl.DataFrame) -> FrozenModel:
    model = find_frozen_model(root, metadata)
    if any(form in COMPONENT_FORMS for form in forms):
        model = replace(model, components=fit_components(root, metadata, model))
    if FROZEN_SCORE not in forms:
        return model
    refuse_without_head(root, read_run(root, "train"))
    logits = image_scores.scoring_logits(root, "train", metadata, [fold_number(model.fold)])
    return replace(model, scaler=image_scores.fit_logit_scaler(logits))


def _required(roots: Sequence[RunT], flag: str) -> Sequence[RunT]:
    if not roots:
        raise UserError(NEEDS[flag])
    return roots


@dataclass(frozen=True)
class ImageRows:
    """The image features of some rows."""

    scores: Sequence[ImageScores]
    """Of the networks (SCORE), then of the frozen ones (FROZEN_SCORE), as far as they are used."""
    embeddings: Sequence[pl.DataFrame]
    """Embeddings as columns, a table per network and form."""
    distances: Sequence[PatientDistances] = ()
    """Of the frozen networks, if they are used."""

    def with_patients(self, metadata: pl.DataFrame) -> "ImageRows":
        """Return the features if the patients of the rows were those of `metadata`."""
        scores = [
            replace(part, lesions=group_lesions(metadata, part.relatives)) for part in self.scores
        ]
        distances = [replace(part, lesions=group_lesions(metadata, ())) for part in self.distances]
        return replace(self, scores=scores, distances=distances)

    def tables(self) -> list[pl.DataFrame]:
        """Return tables of columns in the order of the rows."""
        distances = [part.columns() for part in self.distances]
        return [*(scores.columns() for scores in self.scores), *distances, *self.embeddings]

    def noisy(self, deviation: float) -> Callable[[tuple[int, int]], pl.DataFrame] | None:
        """Return a function from a seed to the columns of out-of-fold scores with noise.

        None if there are none or the deviation is 0.
        """
        # Without those of frozen networks: one model scores the training rows and new rows alike.
        out_of_fold = [scores for scores in self.scores if scores.score == SCORE]
        if not out_of_fold or not deviation:
            return None
        return partial(out_of_fold[0].noisy_columns, deviation)

    def by_column(self) -> pl.DataFrame:
        """Return [N] Float64 every network's score by the name of its column."""
        named = [scores.named() for scores in self.scores]
        return pl.concat(named, how="horizontal") if named else pl.DataFrame()


def read_image_rows(
    state: ImageState, sources: EmbeddingSources, split: Split, metadata: pl.DataFrame
) -> ImageRows:
    """Read the image features of new rows, in the order of `metadata`: means over all models.

    Raises:
        UserError: embeddings are not given, missing, of another fold plan or frozen model.
    """
    roots = state.roots(sources, split)
    rows = {
        name: _read_network(roots["embeddings"][name], split, name, network, metadata)
        for name, network in state.networks.items()
    }
    frozen = {
        name: _read_frozen(roots["frozen"][name], split, name, model, state.forms, metadata)
        for name, model in state.frozen.items()
    }
    return _image_rows(state, rows, frozen, metadata)


def _read_network(
    root: Embeddings, split: Split, name: str, network: Network, metadata: pl.DataFrame
) -> NetworkRows:
    image_scores.read_origin(root, split, network.folds_digest)
    score = None
    columns = []
    if network.scaler:
        score = _mean_score(root, split, network.scaler, metadata)
    if network.maps:
        names = column_names(ALIGNED, name, len(network.maps[0].offset))
        columns.append(mapped_columns(root, split, names, metadata, network.maps))
    return NetworkRows(score, columns)


def _read_frozen(
    root: Embeddings,
    split: Split,
    name: str,
    model: FrozenModel,
    forms: Sequence[str],
    metadata: pl.DataFrame,
) -> NetworkRows:
    refuse_other_frozen_model(root, split, model)
    score = components = None
    columns = []
    if model.scaler:
        score = _mean_score(root, split, model.scaler, metadata)
    if FROZEN in forms:
        columns.append(frozen_columns(root, split, name, metadata, model))
    if model.components:
        components = component_columns(root, split, name, metadata, model)
    if PCA in forms and components is not None:
        columns.append(components)
    return NetworkRows(score, columns, components)


def _mean_score(
    root: Embeddings, split: Split, scaler: LogitScaler, metadata: pl.DataFrame
) -> pl.Series:
    logits = image_scores.scoring_logits(root, split, metadata, list(scaler.folds))
    return image_scores.mean_scores(logits, scaler, metadata)


def _image_rows(
    state: ImageState,
    rows: Mapping[str, NetworkRows],
    frozen: Mapping[str, NetworkRows],
    metadata: pl.DataFrame,
) -> ImageRows:
    scores = {
        score: {name: part.score for name, part in parts.items() if part.score is not None}
        for score, parts in ((SCORE, rows), (FROZEN_SCORE, frozen))
    }
    tables = [table for part in (*rows.values(), *frozen.values()) for table in part.columns]
    distances = [
        PatientDistances(name, part.components, group_lesions(metadata, ()))
        for name, part in frozen.items()
        if DISTANCES in state.forms and part.components is not None
    ]
    return ImageRows(_compare_scores(state, scores, metadata), tables, distances)


def _compare_scores(
    state: ImageState, scores: Mapping[str, Mapping[str, pl.Series]], metadata: pl.DataFrame
) -> list[ImageScores]:
    """Return the scores by kind, with the groups of lesions that they are compared in."""
    found = []
    for score, by_name in scores.items():
        if by_name:
            relatives = state.relatives(score)
            lesions = group_lesions(metadata, relatives)
            found.append(ImageScores(score, pl.DataFrame(by_name), lesions, relatives))
    return found


def embedding_origins(
    state: ImageState, sources: EmbeddingSources, split: Split
) -> dict[str, dict[str, Any]]:
    """Return the origin of each network's embeddings, by field of `EmbeddingSources` and name.

    Raises:
        UserError: embeddings belong to another fold plan.
    """
    roots = state.roots(sources, split)
    origins = {
        name: image_scores.read_origin(roots["embeddings"][name], split, network.folds_digest)
        for name, network in state.networks.items()
    }
    frozen = {name: model.to_json() for name, model in state.frozen.items()}
    return {"embeddings": origins, "frozen": frozen}
