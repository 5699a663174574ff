"""Occlusion maps are true: the maximum is on the patch that the score depends on."""

from collections.abc import Iterable

import numpy as np
import pytest

from infer import UserError, occlusion_map
from infer.engines import Engine, Outputs
from infer.explain.occlusion import GRID, hide_patches, occlude
from isic.layout import Fold
from isic.preprocess import Pixels
from tests.support.networks import POINTWISE, SIZES, build_engine, network, spec_of

PATCH = 10
"""Side of a patch in the images below."""
SIZE = PATCH * GRID


class Result:
    def __init__(self, outputs: dict[Fold, Outputs]) -> None:
        self._outputs = outputs

    def result(self) -> dict[Fold, Outputs]:
        return self._outputs


class PatchEngine(Engine):
    """The logit is the mean red of one patch, times the fold plus one. Counts images, calls."""

    device = "cpu"
    folds = (0, 1, 2)

    def __init__(self, row: int, column: int) -> None:
        self._where = np.s_[
            :, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH
        ]
        self.batches: list[int] = []

    def submit(self, images: Pixels, folds: Iterable[Fold] | None = None) -> Result:
        assert images.dtype == np.uint8 and images.shape[1:] == (SIZE, SIZE, 3)
        self.batches.append(len(images))
        red = images[self._where][..., 0].astype(np.float32).mean(axis=(1, 2))[:, None] / 255
        chosen = self.folds if folds is None else tuple(folds)
        return Result({fold: (np.zeros((len(red), 1)), red * (int(fold) + 1)) for fold in chosen})

    def close(self) -> None:
        """Nothing to end."""


def images_of(number: int) -> Pixels:
    """Return noise with a red patch in row 2 and column 5."""
    images = np.random.default_rng(0).integers(0, 120, (number, SIZE, SIZE, 3), dtype=np.uint8)
    images[:, 2 * PATCH : 3 * PATCH, 5 * PATCH : 6 * PATCH, 0] = 255
    return images


@pytest.mark.parametrize("fill", ["mean", "blur"])
def test_only_the_patch_that_counts_has_a_value(fill: str) -> None:
    engine = PatchEngine(2, 5)
    found = occlusion_map(engine, images_of(3), fill=fill, batch_size=32)  # type: ignore[arg-type]
    assert found.shape == (3, GRID, GRID)
    assert found.dtype == np.float32
    for drops in found:
        assert np.argwhere(drops).tolist() == [[2, 5]]
        assert drops[2, 5] > 0.5
    assert sum(engine.batches) == 3 * (1 + GRID * GRID)
    assert engine.batches == [32, 32, 32, 32, 22]


def test_a_patch_that_lowers_the_logit_is_negative() -> None:
    images = images_of(1)
    images[:, : 2 * PATCH] = 0
    assert occlusion_map(PatchEngine(0, 3), images)[0, 0, 3] < 0


def test_the_value_is_the_drop_of_the_folds_mean_logit() -> None:
    image = images_of(1)
    hidden = image[0].mean(axis=(0, 1)).round()[0]
    expected = (255 - hidden) / 255
    whole = occlude(PatchEngine(2, 5), image)
    assert whole.logits[0] == pytest.approx(2.0)  # the mean of 1, 2 and 3
    assert whole.drops[0, 2, 5] == pytest.approx(2 * expected, abs=1e-5)
    one = occlude(PatchEngine(2, 5), image, folds=[2])
    assert one.logits[0] == pytest.approx(3.0)
    assert one.drops[0, 2, 5] == pytest.approx(3 * expected, abs=1e-5)


@pytest.mark.parametrize("size", [7, 32, 64, 224])
def test_the_patches_cover_the_image_once(size: int) -> None:
    image = np.random.default_rng(1).integers(0, 256, (size, size, 3), dtype=np.uint8)
    image[0, 0] = 255  # unlike the mean
    whole, *variants = hide_patches(image, "mean")
    assert whole is image
    assert len(variants) == GRID * GRID
    colour = image.mean(axis=(0, 1)).round().astype(np.uint8)
    hidden = np.stack([(variant != image).any(axis=2) for variant in variants])
    assert hidden.sum(axis=0).max() == 1
    unhidden = hidden.sum(axis=0) == 0
    assert (image[unhidden] == colour).all()


def test_wrong_arguments_are_refused() -> None:
    engine = PatchEngine(0, 0)
    with pytest.raises(UserError, match='fill is "black", known are: blur, mean'):
        occlusion_map(engine, images_of(1), fill="black")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="there are no images"):
        occlusion_map(engine, images_of(0))
    for images in ([images_of(1)[0]], images_of(1)[0], images_of(1) / 255):
        with pytest.raises(UserError, match=r"an engine takes an array uint8 \[N, S, S, 3\]"):
            occlusion_map(engine, images)


def test_a_real_network_in_onnx(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each value is the difference of two runs of the network."""
    model, reference = network(POINTWISE)
    folder = tmp_path_factory.mktemp("onnx")
    engine = build_engine(model, spec_of(POINTWISE, "onnx", "fp32"), folder)
    images = reference.images[:2]
    found = occlusion_map(engine, images, batch_size=16)
    size = SIZES[POINTWISE]
    for image, drops in zip(images, found, strict=True):
        edges = np.linspace(0, size, GRID + 1).round().astype(int)
        hidden = image.copy()
        hidden[edges[3] : edges[4], edges[1] : edges[2]] = image.mean(axis=(0, 1)).round()
        logits = engine.run(np.stack([image, hidden]))[1][:, 0]
        assert drops[3, 1] == pytest.approx(logits[0] - logits[1], abs=1e-6)
    assert np.abs(found).max() > 0
    engine.close()
