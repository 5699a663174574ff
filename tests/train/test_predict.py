import numpy as np
import pytest
import torch

from isic.runtime.errors import UserError
from tests.support.commands import tiny_settings
from tests.support.training import CPU, random_batch
from train.batch import split
from train.predict import Predictions, predict, score
from train.state import create_state
from train.step import DTYPES, autocast


@pytest.mark.parametrize("values", [{"bf16": True}, {"fp16": True}])
def test_logits_keep_float32_resolution_under_autocast(values: dict[str, object]) -> None:
    settings = tiny_settings(**values)
    state = create_state(settings, CPU, 0)
    held = predict(state.model, [random_batch(500)], CPU, settings.precision)
    half = DTYPES[settings.precision]
    logits = torch.from_numpy(held.logits)
    assert logits.dtype == torch.float32
    assert len(logits.unique()) > 450
    assert (logits.to(half) == logits).float().mean() < 0.05
    images = random_batch(8).images
    with autocast(CPU, settings.precision):
        features, logits, *_ = state.model(images)
    assert torch.equal(logits, state.model.head(features))
    assert not torch.equal(features, state.model(images)[0]), "the backbone in half precision"


def test_logits_that_are_not_finite_are_refused() -> None:
    held = Predictions(
        np.arange(2),
        np.array([0.5, np.nan], np.float32),
        np.full(2, np.nan, np.float32),
        np.empty((2, 0), np.float32),
    )
    with pytest.raises(UserError, match=r"not finite; lower --lr"):
        score(np.array([0, 1], np.float32), held)


@pytest.mark.parametrize("masks", [False, True])
def test_auxiliary_logits_are_float32_and_in_the_tables_order(masks: bool) -> None:
    settings = tiny_settings(aux="a: x; b: y", bf16=True, mask_weight=float(masks))
    state = create_state(settings, CPU, 0)
    batch = random_batch(300, masks=masks)
    whole = predict(state.model, [batch], CPU, "bf16")
    assert whole.aux.shape == (300, 2)
    assert whole.aux.dtype == np.float32
    assert len(np.unique(whole.aux[:, 0])) > 250
    assert np.isnan(whole.dice).any() != masks
    parts = [
        predict(state.model, split(batch, 3)[index : index + 1], CPU, "bf16", num_parts=2)
        for index in (2, 0, 1)
    ]
    merged = Predictions.merge(parts)
    assert np.array_equal(merged.rows, np.arange(300))
    np.testing.assert_allclose(merged.aux, whole.aux, atol=0.02)
    assert predict(create_state(tiny_settings(), CPU, 0).model, [batch], CPU, "fp32").aux.size == 0


def test_a_compiled_network_predicts_batches_of_one_size() -> None:
    settings = tiny_settings()
    state = create_state(settings, CPU, 0)
    batches = [random_batch(8), random_batch(7), random_batch(3)]
    sizes: list[int] = []

    def compiled(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sizes.append(len(images))
        outputs: tuple[torch.Tensor, ...] = state.model(images)
        return outputs

    expected = predict(state.model, batches, CPU, "fp32")
    for num_parts, size in ((1, 8), (2, 4)):
        sizes.clear()
        held = predict(state.model, batches, CPU, "fp32", num_parts, compiled)
        assert set(sizes) == {size}
        assert np.array_equal(held.rows, expected.rows)
        np.testing.assert_allclose(held.logits, expected.logits, atol=1e-5)
