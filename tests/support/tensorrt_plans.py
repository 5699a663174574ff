"""TensorRT plans on the fake CUDA."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from infer.engines.contract import Tensor
from infer.engines.tensorrt_engine import TensorRTEngine
from infer.engines.tensorrt_plan import Plan, PlanSettings, Profile
from tests.support.fake_cuda import AUX_SHAPE, FAKE_TRT, SHAPES, FakeCuda, FakeEngine, fake_network

PROFILE = Profile(min=2, opt=8, max=16)


@dataclass(frozen=True)
class FakePlan:
    """The choices of a test for one fold's plan."""

    cuda_graph: bool = False
    profile: Profile = PROFILE
    dtype: str = "float32"
    """Of the features."""
    aux: bool = False
    """Whether it has auxiliary logits."""

    def tensors(self) -> dict[str, Tensor]:
        dtypes = {"images": "uint8", "features": self.dtype}
        shapes = {**SHAPES, "aux": AUX_SHAPE} if self.aux else SHAPES
        return {
            name: Tensor(dtypes.get(name, "float32"), (None, *shape))
            for name, shape in shapes.items()
        }

    def load(self, fake: FakeEngine) -> Plan:
        settings = PlanSettings(self.cuda_graph)
        return Plan(FAKE_TRT, fake, self.tensors(), self.profile, settings)


def fake_engines(cuda: FakeCuda, plans: Mapping[int, FakePlan]) -> dict[int, FakeEngine]:
    """TensorRT's engine of each fold's plan; its scratch memory differs by fold."""
    fakes = {}
    for fold, plan in plans.items():
        network = partial(fake_network, fold=fold, dtype=plan.dtype, aux=plan.aux)
        fakes[fold] = FakeEngine(cuda, network, plan.profile.max)
        fakes[fold].device_memory_size_v2 = 1000 + 100 * fold
    return fakes


def engine_of(fakes: Mapping[int, FakeEngine], plans: Mapping[int, FakePlan]) -> TensorRTEngine:
    return TensorRTEngine({fold: plans[fold].load(fake) for fold, fake in fakes.items()})


def fake_engine(
    cuda: FakeCuda, folds: Sequence[int] = (0,), **choices: Any
) -> tuple[TensorRTEngine, dict[int, FakeEngine]]:
    """An engine of plans that differ by fold only, and TensorRT's engines in it."""
    plans = {fold: FakePlan(**choices) for fold in folds}
    fakes = fake_engines(cuda, plans)
    return engine_of(fakes, plans), fakes


def pictures(number: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (number, 4, 4, 3), dtype=np.uint8)


def assert_outputs(
    outputs: Mapping[int, tuple[Any, ...]], images: np.ndarray[Any, Any], dtype: str = "float32"
) -> None:
    """Compare the outputs of each fold with those of its network."""
    for fold, (features, logits, *aux) in outputs.items():
        expected = fake_network(images, fold, dtype, aux=bool(aux))
        for values in aux:
            np.testing.assert_array_equal(values, expected["aux"])
        assert features.dtype == dtype
        np.testing.assert_array_equal(features, expected["features"])
        np.testing.assert_array_equal(logits, expected["logits"])
