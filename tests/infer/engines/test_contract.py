"""The contract of exported graphs: graphs that keep it, and the message about others."""

import subprocess
import sys
from typing import Any

import pytest

from infer.engines.contract import (
    AUX,
    CLASS_LOGITS,
    GRAPH_CONTRACT,
    IMAGES,
    LOGITS,
    MASK,
    Tensor,
    contract_violation,
    output_names,
    required_tensors,
)
from tests.support.networks import with_all_outputs

KEPT = {
    "images": Tensor("uint8", (None, 8, 8, 3)),
    "features": Tensor("float32", (None, 5)),
    "logits": Tensor("float32", (None, 1)),
}


def test_a_graph_may_have_a_mask_and_auxiliary_logits() -> None:
    assert contract_violation(KEPT) is None
    assert contract_violation(KEPT, size=8) is None
    more = {MASK: Tensor("float32", (None, 4, 4)), AUX: Tensor("float32", (None, 3))}
    assert contract_violation({**KEPT, **more}) is None
    for name, tensor in more.items():
        assert contract_violation({**KEPT, name: tensor}) is None


def test_features_may_be_in_the_type_that_they_are_stored_in() -> None:
    assert contract_violation({**KEPT, "features": Tensor("float16", (None, 5))}) is None
    violation = contract_violation({**KEPT, "features": Tensor("bfloat16", (None, 5))})
    assert violation == "has features bfloat16 [N, 5], not float32 or float16 [N, fixed]"


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("images", Tensor("uint8", (4, 8, 8, 3)), "images uint8 [4, 8, 8, 3], not uint8 [N, "),
        ("images", Tensor("uint8", (None, 3, 8, 8)), "images uint8 [N, 3, 8, 8], not uint8 [N, f"),
        ("features", Tensor("float32", (None, None)), "features float32 [N, N], not float32 or "),
        ("logits", Tensor("float16", (None, 1)), "logits float16 [N, 1], not float32 [N, 1]"),
        ("logits", Tensor("float32", (None,)), "logits float32 [N], not float32 [N, 1]"),
        ("logits", Tensor("float32", (None, 2)), "logits float32 [N, 2], not float32 [N, 1]"),
        ("aux", Tensor("float16", (None, 2)), "aux float16 [N, 2], not float32 [N, fixed]"),
        ("aux", Tensor("float32", (None, None)), "aux float32 [N, N], not float32 [N, fixed]"),
        ("mask", Tensor("uint8", (None, 4, 4)), "mask uint8 [N, 4, 4], not float32 [N, fixed, "),
    ],
)
def test_a_wrong_tensor_is_named(name: str, tensor: Tensor, words: str) -> None:
    violation = contract_violation({**KEPT, name: tensor})
    assert violation is not None
    assert violation.startswith(f"has {words}")


def test_another_size_of_images_is_reported() -> None:
    violation = contract_violation(KEPT, size=9)
    assert violation == "has images uint8 [N, 8, 8, 3], not uint8 [N, 9, 9, 3]"


def test_missing_and_unknown_tensors_are_reported() -> None:
    renamed = {"scores" if name == LOGITS else name: KEPT[name] for name in KEPT}
    words = "has images, features, scores, not images, features, logits"
    assert contract_violation(renamed) == words
    assert contract_violation(renamed, other_outputs=True) == words
    more = {**KEPT, "attention": Tensor("float16", (None,))}
    assert contract_violation(more) is not None
    assert contract_violation(more, other_outputs=True) is None


def test_networks_return_the_outputs_in_the_contracts_order() -> None:
    of_lesions = tuple(name for name in GRAPH_CONTRACT if name != CLASS_LOGITS)
    assert (IMAGES, *with_all_outputs().output_names) == of_lesions


def test_only_a_backbones_graph_may_lack_logits() -> None:
    """Its manifest is of `fold_none`; it may have the logits of its own classes."""
    bare = {name: KEPT[name] for name in ("images", "features")}
    classes = {**bare, CLASS_LOGITS: Tensor("float32", (None, 1000))}
    required = required_tensors({"fold": "none", "num_classes": 1000})
    assert contract_violation(bare, required=required) is None
    assert contract_violation(classes, required=required) is None
    for fold in (0, "all"):
        required = required_tensors({"fold": fold})
        violation = contract_violation(bare, required=required)
        assert violation == "has images, features, not images, features, logits"


@pytest.mark.parametrize(
    ("manifest", "outputs"),
    [
        ({"fold": 1}, ("features", "logits")),
        ({"fold": "all", "aux": {"mel": "x"}}, ("features", "logits", "aux")),
        ({"fold": 1, "mask_stride": 2}, ("features", "logits", "mask")),
        ({"fold": "none"}, ("features",)),
        ({"fold": "none", "num_classes": 9}, ("features", "class_logits")),
    ],
)
def test_a_manifest_tells_the_outputs(manifest: dict[str, Any], outputs: tuple[str, ...]) -> None:
    assert output_names(manifest) == outputs


def test_the_contract_needs_neither_torch_nor_onnx() -> None:
    code = (
        "import sys, infer.engines.contract, infer.formats\n"
        "assert not {'torch', 'onnx', 'onnxruntime'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
