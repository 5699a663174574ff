"""The parity check: which differences it finds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from export.formats import TOLERANCES
from export.options import ExportSettings
from export.parity import (
    ParityError,
    Reference,
    check_figure,
    check_parity,
    compare,
    run_model,
)
from export.run import load_source
from infer.engines import load
from isic.layout import BEST_CHECKPOINT
from isic.preprocess import Pixels
from isic.runtime.files import sha256
from tests.support.networks import network, with_all_outputs


class Wrong:
    """An engine that differs from its checkpoint in one way."""

    device = "cpu"

    def __init__(self, engine: object, change: str) -> None:
        self.engine, self.change = engine, change

    def run(self, images: Pixels) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        if self.change == "channels":
            images = np.ascontiguousarray(images[..., ::-1])
        if self.change == "transposed":
            images = np.ascontiguousarray(images.transpose(0, 2, 1, 3))
        features, logits = self.engine.run(images)  # type: ignore[attr-defined]
        if self.change == "nan":
            features[0, 0] = np.nan
        if self.change == "features dtype":
            features = features.astype(np.float64)
        if self.change == "overflow":
            features = np.full_like(features, np.inf, np.float16)
        if self.change == "logits dtype":
            logits = logits.astype(np.float16)
        if self.change == "shape":
            features = features[:, :-1]
        if self.change == "order":
            features, logits = features[::-1], logits[::-1]
        if self.change == "logit":
            logits = logits + 0.01
        return features, logits


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("channels", "cosine|logit"),
        ("transposed", "cosine|logit"),
        ("order", "cosine|logit"),
        ("nan", "not finite"),
        ("features dtype", r"features are float64 \[108, 64\], not float32 or float16 \[108, 64\]"),
        ("overflow", "features hold values that are not finite"),
        ("logits dtype", r"logits are float16 \[108, 1\], not float32 \[108, 1\]"),
        ("shape", "63"),
        ("logit", "a logit is off by 0.01"),
    ],
)
def test_a_wrong_engine_is_found(exported: Path, change: str, words: str) -> None:
    checkpoint = exported / "fold_0" / BEST_CHECKPOINT
    settings = ExportSettings(config="tiny", model_dir=exported)
    source = load_source(checkpoint, sha256(checkpoint), 0, settings)
    engine = load(exported / "fold_0" / "model.onnx", "cpu")
    wrong: Any = Wrong(engine, change)
    assert check_parity(source.reference, engine, TOLERANCES["fp32"], (1, 8))
    with pytest.raises(ParityError, match=words):
        check_parity(source.reference, wrong, TOLERANCES["fp32"], (8,))


def test_cosine_is_the_worst_images() -> None:
    features = np.eye(3, dtype=np.float32)
    turned = features.copy()
    turned[2] = [0, 1, 1]
    logits = np.zeros((3, 1), np.float32)
    assert compare((features, logits), (turned, logits))["cosine"] == pytest.approx(np.sqrt(0.5))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda aux: (aux + np.array([0, 0.01], np.float32),), "an auxiliary logit is off by 0.01"),
        (lambda aux: (aux[:, ::-1],), "an auxiliary logit is off by"),
        (lambda aux: (aux[:, :1],), r"aux are float32 \[4, 1\], not float32 \[4, 2\]"),
        (lambda aux: (aux.astype(np.float16),), "aux are float16"),
        (lambda aux: (np.full_like(aux, np.nan),), "aux hold values that are not finite"),
        (lambda aux: (), "there are 3 outputs, not features, logits, aux, mask"),
    ],
)
def test_wrong_auxiliary_logits_are_found(change: Any, words: str) -> None:
    model = with_all_outputs()
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    features, logits, aux, mask = run_model(model, images)
    expected = (features, logits, aux, mask)
    figure = compare(expected, (features, logits, aux + 1e-4, mask), model.output_names)
    assert figure["max_aux_error"] == pytest.approx(1e-4, rel=0.01)
    assert figure["max_logit_error"] == figure["max_mask_error"] == 0
    with pytest.raises(ParityError, match=words):
        actual = (features, logits, *change(aux), mask)
        check_figure(compare(expected, actual, model.output_names), TOLERANCES["fp32"], "here")


def test_errors_of_auxiliary_logits_are_in_deviations_of_their_target() -> None:
    """A target with wide logits does not hide an error of another one."""
    features = np.ones((4, 3), np.float32)
    logits = np.zeros((4, 1), np.float32)
    aux = np.array([[0, -200], [0, 200], [0, -200], [0, 200]], np.float32)
    figure = compare(
        (features, logits, aux),
        (features, logits, aux + np.array([0.1, 2], np.float32)),
        ("features", "logits", "aux"),
    )
    assert figure["max_aux_error"] == pytest.approx(0.1)


class Fixed:
    """An engine that returns given logits."""

    device = "cpu"

    def __init__(self, reference: Reference, logits: NDArray[np.float32]) -> None:
        self.answers = dict(
            zip((image.tobytes() for image in reference.images), logits, strict=True)
        )
        self.features = dict(zip(self.answers, reference.outputs[0], strict=True))

    def run(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        keys = [image.tobytes() for image in images]
        return np.stack([self.features[key] for key in keys]), np.stack(
            [self.answers[key] for key in keys]
        )


def test_the_order_of_the_logits_counts_and_so_does_the_score() -> None:
    model, plain = network("test_vit3")
    order = plain.outputs[1][: plain.num_real, 0].argsort()
    labels = np.zeros(plain.num_real, np.float32)
    labels[order[-12:]] = 1
    reference = Reference(model, plain.images[: plain.num_real], labels)
    tolerance = replace(TOLERANCES["fp32"], max_logit_error=1e9)
    assert (
        check_parity(reference, Fixed(reference, reference.outputs[1]), tolerance, (4,))[
            "pauc_change"
        ]
        == 0
    )
    swapped = reference.outputs[1].copy()
    swapped[[order[0], order[-1]]] = swapped[[order[-1], order[0]]]
    with pytest.raises(ParityError, match="rank correlation"):
        check_parity(reference, Fixed(reference, swapped), tolerance, (4,))
    with pytest.raises(ParityError, match="pAUC changes by -"):
        check_parity(
            reference, Fixed(reference, swapped), replace(tolerance, min_rank_correlation=0.0), (4,)
        )
