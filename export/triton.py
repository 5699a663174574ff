"""A model repository that NVIDIA Triton Inference Server loads: a model a fold, and an ensemble of them.

Clients send images as the manifest's preprocessing leaves them: uint8 [N, size, size, 3], RGB.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from isic.runtime.errors import UserError
from isic.runtime.files import atomic_path, read_manifest, refuse_foreign, write_json, write_text

BACKENDS = {"onnx": ("onnxruntime", "model.onnx"), "tensorrt": ("tensorrt", "model.plan")}
"""Triton's backend for a format, and the file name that it looks for."""
MAX_BATCH = 256
"""Largest batch of a model whose artifact has no limit of its own."""
MARK = "isic-toolkit.json"
"""In the folder of a model: it was written here and may be replaced. Triton takes no notice of it."""
QUEUE_DELAY_US = 1000
"""How long a request may wait for others to share its batch, microseconds."""
DTYPES = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32"}
OF_ONNX = {TensorProto.UINT8: "uint8", TensorProto.FLOAT: "float32"}

Shapes = Mapping[str, tuple[str, Sequence[int]]]
"""Type and sizes without the batch by name of an input or output."""


@dataclass(frozen=True)
class FoldModel:
    """A fold's artifact as Triton is to serve it."""

    artifact: Path
    manifest: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.manifest['name']}_fold_{self.manifest['fold']}"

    @property
    def max_batch(self) -> int:
        return (
            int(self.manifest["plan"]["profile"]["max"]) if "plan" in self.manifest else MAX_BATCH
        )

    def shapes(self) -> Shapes:
        """Returns the inputs and outputs, from the manifest of a plan or from the ONNX file itself."""
        if "plan" in self.manifest:
            tensors = self.manifest["plan"]["tensors"]
            return {
                name: (tensor["dtype"], tensor["shape"][1:]) for name, tensor in tensors.items()
            }
        graph = onnx.load(self.artifact, load_external_data=False).graph
        types = {value.name: value.type.tensor_type for value in (*graph.input, *graph.output)}
        return {
            name: (OF_ONNX[tensor.elem_type], [size.dim_value for size in tensor.shape.dim[1:]])
            for name, tensor in types.items()
        }


def write_repository(root: Path, artifacts: Sequence[Path]) -> list[str]:
    """Writes a model repository for the folds of one config and returns its models' names.

    A model that is there already under such a name is replaced; others are left alone. With several folds there is
    also an ensemble of the config's name. Triton's ensembles only route tensors, so that the mean is a small ONNX
    model of its own. The ensemble gives `logits` (mean over the folds), `probabilities` (its sigmoid) and each
    fold's features (and masks), which are of that fold's own space and not to be averaged.

    Args:
        root: folder for `tritonserver --model-repository`.
        artifacts: of the formats in BACKENDS, one a fold, with their manifests.

    Raises:
        UserError: an artifact without its manifest, of a format that Triton has no backend for, or not of one config.
    """
    models = read_models(artifacts)
    _begin(root, models)
    for model in models:
        _write_fold(root / model.name, model)
    if len(models) == 1:
        return [models[0].name]
    name = models[0].manifest["name"]
    mean = f"{name}_mean"
    _write_mean(root / mean, mean, models)
    (root / name / "1").mkdir(parents=True, exist_ok=True)
    write_text(root / name / "config.pbtxt", to_pbtxt(ensemble_config(name, mean, models)))
    return [*(model.name for model in models), mean, name]


def _begin(root: Path, models: Sequence[FoldModel]) -> None:
    """Mark the folders of the models as written here. Raises UserError if one of them holds another model."""
    config = models[0].manifest["name"]
    names = [model.name for model in models] + [config, f"{config}_mean"] * (len(models) > 1)
    for name in names:
        content = (path for path in (root / name).rglob("*") if path.is_file())
        is_own = (root / name / MARK).is_file()
        refuse_foreign(content, is_own, "folder for --triton")
    for name in names:
        write_json(root / name / MARK, {"written by": "isic-toolkit", "config": config})


def read_models(artifacts: Sequence[Path]) -> list[FoldModel]:
    """Returns the models of artifacts, which must belong together. Raises UserError where they do not."""
    models = [FoldModel(path, read_manifest(path)) for path in artifacts]
    for model in models:
        if model.manifest["format"] not in BACKENDS:
            raise UserError(
                f"--triton: Triton runs {' and '.join(BACKENDS)}, not the {model.manifest['format']} of "
                f"{model.artifact}; export one of those"
            )
    of = [(model.manifest["name"], model.manifest["preprocess"]) for model in models]
    folds = [model.manifest["fold"] for model in models]
    if any(other != of[0] for other in of) or len(set(folds)) < len(folds):
        raise UserError(
            "--triton: the artifacts are not one a fold of one config with one preprocessing"
        )
    return models


def fold_config(model: FoldModel) -> dict[str, Any]:
    """Returns the fields of a fold's config.pbtxt (Triton's ModelConfig)."""
    backend, file = BACKENDS[model.manifest["format"]]
    shapes = model.shapes()
    preferred = (
        {"preferred_batch_size": [model.manifest["plan"]["profile"]["opt"]]}
        if "plan" in model.manifest
        else {}
    )
    # a plan runs on a GPU; for the others Triton takes one where there is one
    kind = Word("KIND_GPU" if "plan" in model.manifest else "KIND_AUTO")
    told = {key: model.manifest[key] for key in ("fold", "precision", "preprocess", "sha256")}
    return {
        "name": model.name,
        "backend": backend,
        "default_model_filename": file,
        "max_batch_size": model.max_batch,
        "input": [_tensor("images", shapes)],
        "output": [_tensor(name, shapes) for name in shapes if name != "images"],
        "dynamic_batching": {**preferred, "max_queue_delay_microseconds": QUEUE_DELAY_US},
        "instance_group": [{"count": 1, "kind": kind}],
        "parameters": [
            {"key": key, "value": {"string_value": _text(value)}} for key, value in told.items()
        ],
    }


def ensemble_config(name: str, mean: str, models: Sequence[FoldModel]) -> dict[str, Any]:
    """Returns the fields of the ensemble's config.pbtxt: every fold on the same images, then the mean."""
    shapes = models[0].shapes()
    own = [output for output in shapes if output not in {"images", "logits"}]
    steps = [_step(model.name, {"images": "images"}, _outputs(model)) for model in models]
    logits = {_logits(model): _logits(model) for model in models}
    steps.append(_step(mean, logits, {"logits": "logits", "probabilities": "probabilities"}))
    outputs = {"logits": shapes["logits"], "probabilities": shapes["logits"]}
    outputs |= {
        f"{output}_{model.manifest['fold']}": model.shapes()[output]
        for output in own
        for model in models
    }
    return {
        "name": name,
        "platform": "ensemble",
        "max_batch_size": min(model.max_batch for model in models),
        "input": [_tensor("images", shapes)],
        "output": [_tensor(output, outputs) for output in outputs],
        "ensemble_scheduling": {"step": steps},
    }


def mean_model(names: Sequence[str]) -> onnx.ModelProto:
    """Returns the ONNX model of `logits`, the mean of inputs [N, 1], and `probabilities`, its sigmoid."""

    def tensor(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 1])

    nodes = [
        helper.make_node("Mean", list(names), ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["probabilities"]),
    ]
    outputs = [tensor("logits"), tensor("probabilities")]
    graph = helper.make_graph(nodes, "mean", [tensor(name) for name in names], outputs)
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8
    )  # any server's runtime


def _write_fold(folder: Path, model: FoldModel) -> None:
    """Write the model before its configuration: a server that watches the folder sees it whole."""
    with atomic_path(folder / "1" / BACKENDS[model.manifest["format"]][1]) as temporary:
        if (model.manifest["format"], model.manifest["precision"]) == ("onnx", "int8"):
            onnx.save(with_unsigned_weights(onnx.load(model.artifact)), temporary)
        else:
            shutil.copyfile(model.artifact, temporary)
    write_text(folder / "config.pbtxt", to_pbtxt(fold_config(model)))


def with_unsigned_weights(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Store the int8 weights of a graph as uint8, with zero points to match, in place.

    On x86 CPUs without VNNI products of uint8 and int8 saturate. ONNX Runtime has an option that
    does this (see infer/engines/onnxruntime.py), and Triton has no way to set it
    (https://github.com/triton-inference-server/onnxruntime_backend/issues/107).
    """
    products = [node for node in graph.graph.node if node.op_type == "MatMulInteger"]
    names = {node.input[at] for node in products for at in (1, 3)}
    for tensor in graph.graph.initializer:
        if tensor.name in names and tensor.data_type == TensorProto.INT8:
            values = (numpy_helper.to_array(tensor).astype(np.int16) + 128).astype(np.uint8)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return graph


def _write_mean(folder: Path, name: str, models: Sequence[FoldModel]) -> None:
    names = [_logits(model) for model in models]
    with atomic_path(folder / "1" / "model.onnx") as temporary:
        onnx.save(mean_model(names), temporary)
    logits = models[0].shapes()["logits"]
    outputs = {"logits": logits, "probabilities": logits}
    config = {
        "name": name,
        "backend": "onnxruntime",
        "default_model_filename": "model.onnx",
        "max_batch_size": min(model.max_batch for model in models),
        "input": [_tensor(name, dict.fromkeys(names, logits)) for name in names],
        "output": [_tensor(output, outputs) for output in outputs],
        "instance_group": [{"count": 1, "kind": Word("KIND_CPU")}],  # a handful of numbers
    }
    write_text(folder / "config.pbtxt", to_pbtxt(config))


def _logits(model: FoldModel) -> str:
    return f"logits_{model.manifest['fold']}"


def _outputs(model: FoldModel) -> dict[str, str]:
    """Returns the ensemble's names of a fold's outputs."""
    return {name: f"{name}_{model.manifest['fold']}" for name in model.shapes() if name != "images"}


def _step(model: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> dict[str, Any]:
    maps = {"input_map": inputs, "output_map": outputs}
    entries = {
        field: [{"key": key, "value": value} for key, value in names.items()]
        for field, names in maps.items()
    }
    return {"model_name": model, "model_version": -1, **entries}


def _tensor(name: str, shapes: Shapes) -> dict[str, Any]:
    dtype, sizes = shapes[name]
    return {"name": name, "data_type": Word(DTYPES[dtype]), "dims": list(sizes)}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


class Word(str):
    """A name of an enumeration, which protobuf's text format writes without quotes."""


def to_pbtxt(fields: Mapping[str, Any], indent: str = "") -> str:
    """Returns protobuf text format: mappings are messages, lists repeat their field."""
    lines = []
    for key, value in fields.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Mapping):
                lines.append(f"{indent}{key} {{\n{to_pbtxt(item, indent + '  ')}{indent}}}\n")
            else:
                text = item if isinstance(item, Word) else json.dumps(item)
                lines.append(f"{indent}{key}: {text}\n")
    return "".join(lines)
