"""A model repository for NVIDIA Triton Inference Server: a model per fold, and their ensemble.

Clients send preprocessed images: uint8 [N, size, size, 3], RGB.
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

from export.formats import FORMATS
from infer.engines.contract import AUX, IMAGES, LOGITS
from infer.formats import ENGINE_FORMATS
from isic.layout import ALL
from isic.runtime.errors import UserError
from isic.runtime.files import atomic_path, read_manifest, refuse_foreign, write_json, write_text
from isic.views import VIEWS

PROBABILITIES = "probabilities"
"""The ensemble's additional output: the sigmoid of its logits."""
DEFAULT_MAX_BATCH = 256
"""Most images, with their views, in a batch of a model whose artifact has no limit of its own."""
MARK_FILE = "isic-toolkit.json"
"""Marks a model's folder as written here, so it may be replaced. Triton ignores the file."""
QUEUE_DELAY_US = 1000
"""Time that a request may wait for others to share its batch, microseconds."""
TRITON_DTYPES = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32", "float16": "TYPE_FP16"}
ONNX_DTYPES = {
    TensorProto.UINT8: "uint8",
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
}
# Old enough for the ONNX Runtime of any Triton.
MEAN_OPSET = 13
MEAN_IR_VERSION = 8

Shapes = Mapping[str, tuple[str, Sequence[int]]]
"""Type and sizes without the batch of each input and output."""


@dataclass(frozen=True)
class FoldModel:
    """A fold's artifact as Triton will serve it."""

    artifact: Path
    manifest: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.manifest['name']}_fold_{self.manifest['fold']}"

    @property
    def plan(self) -> Mapping[str, Any] | None:
        """The manifest's entry about a TensorRT plan, None for other formats."""
        return self.manifest.get("plan")

    @property
    def max_batch(self) -> int:
        if self.plan:
            return int(self.plan["profile"]["max"])
        return DEFAULT_MAX_BATCH // len(VIEWS[self.tta])

    @property
    def tta(self) -> str:
        """The views that the artifact averages over."""
        return str(self.manifest.get("tta", "none"))

    @property
    def file_name(self) -> str:
        """The file name that Triton's backend expects."""
        return f"model{ENGINE_FORMATS[self.manifest['format']].suffix}"

    @property
    def logits(self) -> str:
        """The name of its logits within the ensemble."""
        return self.ensemble_name(LOGITS)

    def ensemble_name(self, output: str) -> str:
        return f"{output}_{self.manifest['fold']}"

    def shapes(self) -> Shapes:
        """Return its inputs and outputs, from the manifest of a plan or from the ONNX file."""
        if self.plan:
            return {
                name: (tensor["dtype"], tensor["shape"][1:])
                for name, tensor in self.plan["tensors"].items()
            }
        graph = onnx.load(self.artifact, load_external_data=False).graph
        shapes = {}
        for value in (*graph.input, *graph.output):
            tensor = value.type.tensor_type
            sizes = [size.dim_value for size in tensor.shape.dim[1:]]
            shapes[value.name] = (ONNX_DTYPES[tensor.elem_type], sizes)
        return shapes

    def outputs(self) -> list[str]:
        return [name for name in self.shapes() if name != IMAGES]


def write_repository(root: Path, artifacts: Sequence[Path]) -> list[str]:
    """Write a model repository for the folds of one config and return its models' names.

    Models of these names are replaced, others are kept. For several folds there is also an
    ensemble with the config's name: it returns `logits` (the mean over the folds), `probabilities`
    (their sigmoid) and the features and optional outputs of each fold.

    Args:
        root: folder for `tritonserver --model-repository`.
        artifacts: one per fold, with its manifest.

    Raises:
        UserError: an artifact has no manifest, Triton has no backend for its format, the
            artifacts are not of one config, or a single fold would join an older ensemble.
    """
    models = read_models(artifacts)
    refuse_other_ensemble(root, models)
    mark_folders(root, models)
    for model in models:
        _write_fold(root / model.name, model)
    if len(models) == 1:
        return [models[0].name]
    # Triton's ensembles only route tensors, so the mean is a small ONNX model. Features are not
    # averaged, because each fold has its own feature space.
    ensemble, mean = _ensemble_names(models)
    _write_mean(root / mean, mean, models)
    (root / ensemble / "1").mkdir(parents=True, exist_ok=True)
    config = ensemble_config(ensemble, mean, models)
    write_text(root / ensemble / "config.pbtxt", to_pbtxt(config))
    return [*(model.name for model in models), mean, ensemble]


def _ensemble_names(models: Sequence[FoldModel]) -> tuple[str, str]:
    name = models[0].manifest["name"]
    return name, f"{name}_mean"


def refuse_other_ensemble(root: Path, models: Sequence[FoldModel]) -> None:
    """Raise a UserError if a single fold would be served next to an ensemble of older folds."""
    ensemble = root / _ensemble_names(models)[0]
    is_member = len(models) == 1 and models[0].manifest["fold"] != ALL
    if is_member and (ensemble / MARK_FILE).is_file():
        raise UserError(
            f"{ensemble} is an ensemble of several folds, and a new {models[0].name} would not fit "
            "the older ones; export all folds, or choose another folder for --triton"
        )


def mark_folders(root: Path, models: Sequence[FoldModel]) -> None:
    """Mark the folders of all models. Raise UserError if one holds a model of something else."""
    names = [model.name for model in models]
    if len(models) > 1:
        names += _ensemble_names(models)
    for name in names:
        content = (path for path in (root / name).rglob("*") if path.is_file())
        is_own = (root / name / MARK_FILE).is_file()
        refuse_foreign(content, is_own, "folder for --triton")
    mark = {"written by": "isic-toolkit", "config": models[0].manifest["name"]}
    for name in names:
        write_json(root / name / MARK_FILE, mark)


def read_models(artifacts: Sequence[Path]) -> list[FoldModel]:
    """Return the models of artifacts. Raise UserError if they do not belong together."""
    models = [FoldModel(path, read_manifest(path)) for path in artifacts]
    supported = [name for name, row in FORMATS.items() if row.triton_backend]
    for model in models:
        if model.manifest["format"] not in supported:
            raise UserError(
                f"--triton: Triton runs {' and '.join(supported)}, not the "
                f"{model.manifest['format']} of {model.artifact}; export one of those"
            )
    first = models[0].manifest
    is_one_config = all(
        model.manifest["name"] == first["name"]
        and model.manifest["preprocess"] == first["preprocess"]
        for model in models
    )
    folds = {model.manifest["fold"] for model in models}
    if not is_one_config or len(folds) < len(models):
        raise UserError(
            "--triton needs exactly one artifact per fold, all from one config with the same "
            "preprocessing"
        )
    return models


def fold_config(model: FoldModel) -> dict[str, Any]:
    """Return the fields of a fold's config.pbtxt (Triton's ModelConfig)."""
    shapes = model.shapes()
    batching: dict[str, Any] = {}
    if model.plan:
        batching["preferred_batch_size"] = [model.plan["profile"]["opt"]]
    batching["max_queue_delay_microseconds"] = QUEUE_DELAY_US
    # A plan needs a GPU; for an ONNX file Triton uses a GPU if there is one.
    kind = Word("KIND_GPU" if model.plan else "KIND_AUTO")
    facts = {key: model.manifest[key] for key in ("fold", "precision", "preprocess", "sha256")}
    facts["tta"] = model.tta
    if AUX in model.manifest:
        facts[AUX] = model.manifest[AUX]
    return {
        "name": model.name,
        "backend": FORMATS[model.manifest["format"]].triton_backend,
        "default_model_filename": model.file_name,
        "max_batch_size": model.max_batch,
        "input": [_tensor(IMAGES, shapes)],
        "output": [_tensor(name, shapes) for name in model.outputs()],
        "dynamic_batching": batching,
        "instance_group": [{"count": 1, "kind": kind}],
        "parameters": [
            {"key": key, "value": {"string_value": _as_text(value)}} for key, value in facts.items()
        ],
    }


def ensemble_config(name: str, mean: str, models: Sequence[FoldModel]) -> dict[str, Any]:
    """Return the fields of the ensemble's config.pbtxt: all folds, then their mean."""
    shapes = models[0].shapes()
    steps = []
    for model in models:
        outputs = {output: model.ensemble_name(output) for output in model.outputs()}
        steps.append(_step(model.name, {IMAGES: IMAGES}, outputs))
    logits = {model.logits: model.logits for model in models}
    steps.append(_step(mean, logits, {LOGITS: LOGITS, PROBABILITIES: PROBABILITIES}))
    outputs_of_ensemble = {LOGITS: shapes[LOGITS], PROBABILITIES: shapes[LOGITS]}
    for output in models[0].outputs():
        if output == LOGITS:
            continue
        for model in models:
            outputs_of_ensemble[model.ensemble_name(output)] = model.shapes()[output]
    return {
        "name": name,
        "platform": "ensemble",
        "max_batch_size": min(model.max_batch for model in models),
        "input": [_tensor(IMAGES, shapes)],
        "output": [_tensor(output, outputs_of_ensemble) for output in outputs_of_ensemble],
        "ensemble_scheduling": {"step": steps},
    }


def mean_model(names: Sequence[str]) -> onnx.ModelProto:
    """Return the ONNX model of `logits`, the mean of inputs [N, 1], and of their sigmoid."""

    def tensor(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 1])

    nodes = [
        helper.make_node("Mean", list(names), [LOGITS]),
        helper.make_node("Sigmoid", [LOGITS], [PROBABILITIES]),
    ]
    inputs = [tensor(name) for name in names]
    graph = helper.make_graph(nodes, "mean", inputs, [tensor(LOGITS), tensor(PROBABILITIES)])
    opsets = [helper.make_opsetid("", MEAN_OPSET)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=MEAN_IR_VERSION)


def _write_fold(folder: Path, model: FoldModel) -> None:
    manifest = model.manifest
    with atomic_path(folder / "1" / model.file_name) as temporary:
        if (manifest["format"], manifest["precision"]) == ("onnx", "int8"):
            onnx.save(with_unsigned_weights(onnx.load(model.artifact)), temporary)
        else:
            shutil.copyfile(model.artifact, temporary)
    # Last: a server that watches the folder loads a model when it has a configuration.
    write_text(folder / "config.pbtxt", to_pbtxt(fold_config(model)))


def with_unsigned_weights(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Store the int8 weights of a graph as uint8 with matching zero points, in place."""
    # On x86 CPUs without VNNI products of uint8 and int8 saturate. ONNX Runtime has an option that
    # does this (see infer/engines/onnxruntime.py), and Triton has no way to set it
    # (triton-inference-server/onnxruntime_backend#107).
    names = set()
    for node in graph.graph.node:
        if node.op_type == "MatMulInteger":
            names |= {node.input[1], node.input[3]}  # the weights and their zero points
    for tensor in graph.graph.initializer:
        if tensor.name in names and tensor.data_type == TensorProto.INT8:
            values = numpy_helper.to_array(tensor).astype(np.int16) + 128
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.uint8), tensor.name))
    return graph


def _write_mean(folder: Path, name: str, models: Sequence[FoldModel]) -> None:
    inputs = [model.logits for model in models]
    file_name = f"model{ENGINE_FORMATS['onnx'].suffix}"
    with atomic_path(folder / "1" / file_name) as temporary:
        onnx.save(mean_model(inputs), temporary)
    shape = models[0].shapes()[LOGITS]
    input_shapes = dict.fromkeys(inputs, shape)
    output_shapes = {LOGITS: shape, PROBABILITIES: shape}
    config = {
        "name": name,
        "backend": FORMATS["onnx"].triton_backend,
        "default_model_filename": file_name,
        "max_batch_size": min(model.max_batch for model in models),
        "input": [_tensor(name, input_shapes) for name in input_shapes],
        "output": [_tensor(name, output_shapes) for name in output_shapes],
        # The mean of a few numbers costs less than their copy to a GPU.
        "instance_group": [{"count": 1, "kind": Word("KIND_CPU")}],
    }
    write_text(folder / "config.pbtxt", to_pbtxt(config))


def _step(model: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> dict[str, Any]:
    """Return a step of an ensemble; the maps go from the model's names to the ensemble's."""
    return {
        "model_name": model,
        "model_version": -1,
        "input_map": [{"key": key, "value": value} for key, value in inputs.items()],
        "output_map": [{"key": key, "value": value} for key, value in outputs.items()],
    }


def _tensor(name: str, shapes: Shapes) -> dict[str, Any]:
    dtype, sizes = shapes[name]
    return {"name": name, "data_type": Word(TRITON_DTYPES[dtype]), "dims": list(sizes)}


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


class Word(str):
    """A name of an enumeration, which protobuf's text format writes without quotes."""


def to_pbtxt(fields: Mapping[str, Any], indent: str = "") -> str:
    """Return protobuf text format: mappings are messages, lists repeat their field."""
    lines = []
    for key, value in fields.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Mapping):
                lines.append(f"{indent}{key} {{\n{to_pbtxt(item, indent + '  ')}{indent}}}\n")
            else:
                text = item if isinstance(item, Word) else json.dumps(item)
                lines.append(f"{indent}{key}: {text}\n")
    return "".join(lines)
