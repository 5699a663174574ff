"""Occlusion maps of the lesions in a report, by a network that the ensemble was fitted with."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from infer.embedding.image_embedder import ImageEmbedder
from infer.embedding.models import Models, choose_device, config_of, find_models
from infer.ensemble.blends.artifact import Scorer, ensembles_of
from infer.ensemble.images.networks import listed
from infer.explain.explained import explain_images, held_out_folds
from infer.explain.picture import overlay
from infer.formats import AUTO
from infer.report.cases import Picture, jpeg_uri
from isic.dataset import Split
from isic.images import ImageStore
from isic.layout import Fold
from isic.preprocess import PreprocessSpec
from isic.runtime.errors import UserError


@dataclass(frozen=True)
class MapPicture:
    """A lesion's occlusion map for the page."""

    picture: Picture
    largest_change: float
    """Of the logit, by one hidden patch."""


@dataclass(frozen=True)
class Network:
    """A network of an ensemble whose folds' artifacts are at hand."""

    name: str
    model_dir: Path
    models: Models

    @contextmanager
    def open(self) -> Iterator[ImageEmbedder]:
        """Load the artifacts for the block."""
        device = choose_device(self.models, "auto", uses_ray=False)
        with ImageEmbedder(self.models, device) as embedder:
            yield embedder

    def folds_of(self, names: Sequence[str], split: Split) -> dict[str, Fold | None]:
        """Return, by id, the fold that held a train image out; None for test images.

        Raises:
            UserError: a lesion is not in the network's fold plan, or a fold has no artifact.
        """
        if split == "test":
            return dict.fromkeys(names)
        return {**held_out_folds(self.model_dir, self.models, names)}


def draw_maps(
    embedder: ImageEmbedder, images: ImageStore, fold_of: Mapping[str, Fold | None], side: int
) -> dict[str, MapPicture]:
    """Return the maps by id, each by its fold's network, or the mean over all for None.

    Warns of images that cannot be used, and leaves them out.
    """
    explained = list(explain_images(embedder, images, fold_of))
    shown = [each.name for each in explained]
    pixels, _ = images.load(shown, PreprocessSpec(size=side, interpolation="area"))
    return {
        each.name: MapPicture(
            Picture(jpeg_uri(overlay(pixels[row], each.drops))), float(np.abs(each.drops).max())
        )
        for row, each in enumerate(explained)
    }


def open_network(
    scorer: Scorer, model_dir: Path, trust: bool = False, fold: Fold | None = None
) -> Network:
    """Find the artifacts of a training run that an ensemble was fitted with.

    Args:
        trust: whether to load native code that this user has not exported.
        fold: the only fold whose network scores; None for all that have a number.

    Raises:
        UserError: the run has no artifacts, is not of the ensemble, or was trained again since.
    """
    fitted = {
        name: origin
        for ensemble in ensembles_of(scorer)
        for name, origin in ensemble.manifest["embeddings"].items()
    }
    if not fitted:
        raise UserError(f"{scorer.root} uses no network's score; leave out --maps")
    name = config_of(model_dir, fold)
    if name not in fitted:
        raise UserError(
            f"{model_dir} is the network {name}, but {scorer.root} was fitted with "
            f"{listed(fitted)}; give --maps a run of theirs"
        )
    models = find_models(model_dir, name, AUTO, fold=fold, trust=trust)
    fitted_with = fitted[name].get("checkpoints") or {}
    if not models.checkpoints.items() <= fitted_with.items():
        raise UserError(
            f"{model_dir} has other trained weights than those behind the scores of "
            f"{scorer.root}; give --maps the run of its embeddings"
        )
    return Network(name, model_dir, models)
