"""The contract of every exported graph: names, types and shapes of its input and its outputs."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from isic.layout import NONE

IMAGES = "images"
FEATURES = "features"
LOGITS = "logits"
"""Logits of the lesion's malignancy; only a backbone without a lesion head lacks this output."""
AUX = "aux"
"""Logits of the auxiliary targets; only networks that learned such targets have this output."""
MASK = "mask"
"""Probabilities of the lesion's pixels; only networks that learned from masks have this output."""
CLASS_LOGITS = "class_logits"
"""Logits of a backbone's own classes, such as ImageNet's; only one without a lesion head may have
this output."""


@dataclass(frozen=True)
class TensorSpec:
    """The types and the shape that the contract asks of one input or output."""

    dtypes: tuple[str, ...]
    """The accepted types, the usual one first."""
    sizes: tuple[int | None, ...]
    """The sizes after the batch; None is any fixed size."""
    optional: bool = False


@dataclass(frozen=True)
class Tensor:
    """The type and the shape of an input or output of a graph."""

    dtype: str
    shape: tuple[int | None, ...]
    """With the batch; None is a size that the graph leaves open."""


GRAPH_CONTRACT = {
    IMAGES: TensorSpec(("uint8",), (None, None, 3)),
    # A network in low precision returns its features in the type that they are stored in.
    FEATURES: TensorSpec(("float32", "float16"), (None,)),
    LOGITS: TensorSpec(("float32",), (1,)),
    AUX: TensorSpec(("float32",), (None,), optional=True),
    MASK: TensorSpec(("float32",), (None, None), optional=True),
    CLASS_LOGITS: TensorSpec(("float32",), (None,), optional=True),
}
"""The input, then the outputs in the order in which a network returns them."""
RESULTS = (FEATURES, LOGITS, AUX)
"""The outputs of a batch's result, as far as the graph has them; others are asked for by name."""
REQUIRED = tuple(name for name, spec in GRAPH_CONTRACT.items() if not spec.optional)
"""The tensors of every network with a lesion head."""


def output_names(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the outputs of an artifact in their order, by its manifest."""
    present = {
        FEATURES: True,
        LOGITS: manifest.get("fold") != NONE,
        AUX: AUX in manifest,
        MASK: "mask_stride" in manifest,
        CLASS_LOGITS: "num_classes" in manifest,
    }
    return tuple(name for name in present if present[name])


def required_tensors(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the tensors that the graph of an artifact must have, by its manifest."""
    outputs = output_names(manifest)
    return tuple(name for name in REQUIRED if name == IMAGES or name in outputs)


def contract_violation(
    tensors: Mapping[str, Tensor],
    size: int | None = None,
    other_outputs: bool = False,
    required: Collection[str] = REQUIRED,
) -> str | None:
    """Return how a graph breaks the contract, None if it keeps it.

    Args:
        tensors: its inputs and outputs by name.
        size: the side of its images in pixels; any if None.
        other_outputs: accept tensors that the contract does not name.
        required: the tensors that must be there.
    """
    unknown = set() if other_outputs else tensors.keys() - GRAPH_CONTRACT.keys()
    if unknown or not tensors.keys() >= set(required):
        return f"has {', '.join(tensors)}, not {', '.join(required)}"
    for name, tensor in tensors.items():
        if name not in GRAPH_CONTRACT:
            continue
        spec = GRAPH_CONTRACT[name]
        if name == IMAGES and size is not None:
            spec = replace(spec, sizes=(size, size, 3))
        if not _matches(tensor, spec):
            found = ["N" if length is None else length for length in tensor.shape]
            wanted = ["N", *("fixed" if length is None else length for length in spec.sizes)]
            expected = _text(" or ".join(spec.dtypes), wanted)
            return f"has {name} {_text(tensor.dtype, found)}, not {expected}"
    return None


def _matches(tensor: Tensor, spec: TensorSpec) -> bool:
    """Return whether a tensor has a type and the rank of the spec, and only its batch is open."""
    if tensor.dtype not in spec.dtypes or len(tensor.shape) != 1 + len(spec.sizes):
        return False
    batch, *sizes = tensor.shape
    if batch is not None:
        return False
    return all(
        size is not None and wanted in {None, size}
        for size, wanted in zip(sizes, spec.sizes, strict=True)
    )


def _text(dtype: str, sizes: Sequence[object]) -> str:
    return f"{dtype} [{', '.join(map(str, sizes))}]"
