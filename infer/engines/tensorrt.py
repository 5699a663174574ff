"""TensorRT 10 and 11 and TensorRT-RTX, through one code path."""

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from infer.engines import cudart, network_command
from infer.engines.contract import (
    FEATURES,
    IMAGES,
    REQUIRED,
    Tensor,
    contract_violation,
    required_tensors,
)
from infer.engines.cudart import CudaError
from infer.engines.tensorrt_engine import TensorRTEngine
from infer.engines.tensorrt_plan import Plan, PlanSettings, Profile, logger
from infer.formats import ENGINE_FORMATS
from isic.layout import Fold
from isic.runtime.errors import UserError, first_line
from isic.runtime.extras import install_command
from isic.runtime.machine import no_gpu_reason

TENSORRT_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "UINT8": "uint8",
    "INT8": "int8",
    "FP8": "float8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}
"""TensorRT's data types by their usual names."""
AMPERE_PLUS = "sm80plus"
"""The architecture of a plan that runs on Ampere GPUs and all newer ones."""


@cache
def import_runtime(flavour: str) -> ModuleType:
    """Return the Python module of a flavour: TensorRT or TensorRT-RTX, which have one interface.

    Raises:
        UserError: it is not installed.
    """
    row = ENGINE_FORMATS[flavour]
    assert row.extra is not None
    try:
        return import_module(flavour)
    except ImportError as error:
        raise UserError(
            f"{row.title} does not load here ({first_line(error)}); "
            f"run `{install_command(row.extra)}`"
        ) from None


def unavailable_reason(flavour: str, device: str = "cuda") -> str | None:
    """Return why a flavour's plans cannot run here, None if they can."""
    try:
        check_gpu(flavour, import_runtime(flavour), cudart.architecture())
    except UserError as error:
        return no_gpu_reason() or str(error)  # without a GPU, installing the library is no fix
    return None


def built_for() -> str | None:
    """Return the CUDA of CUDA Python, whose major version the plans' libraries share."""
    return cudart.built_for()


def create(
    artifacts: Mapping[Fold, Path], manifests: Mapping[Fold, Mapping[str, Any]], device: str
) -> TensorRTEngine:
    """Open the plans of all folds on the current GPU. Only the last step touches the GPU.

    Raises:
        UserError: a plan is for another library, version or GPU, has not passed the parity check,
            is damaged or breaks the contract; the plans do not fit in the GPU's memory; or the
            library, CUDA Python or a GPU is missing.
    """
    plans = {fold: open_plan(path, manifests[fold], device) for fold, path in artifacts.items()}
    try:
        return TensorRTEngine(plans)
    except CudaError as error:
        fold, *others = artifacts
        fewer = "use fewer folds, or " if others else ""
        raise UserError(
            f"{artifacts[fold]} does not run on this GPU ({error}); {fewer}"
            f"{_again(artifacts[fold], manifests[fold])} and a smaller --max_batch"
        ) from None


def open_plan(path: Path, manifest: Mapping[str, Any], device: str) -> Plan:
    """Load a plan for the current GPU, with no memory for its execution contexts yet.

    Raises:
        UserError: as `create`.
    """
    flavour = manifest["format"]
    row = ENGINE_FORMATS[flavour]
    again = _again(path, manifest)
    trt = import_runtime(flavour)
    check_manifest(path, manifest, trt.__version__, again)
    if device == "cpu":
        raise UserError(f"{path} is a {row.title} plan and runs on a GPU; use --device cuda")
    data = path.read_bytes()
    runtime = trt.Runtime(logger(trt))
    check_header(trt, runtime, path, data, again)
    architecture = cudart.architecture()
    check_gpu(flavour, trt, architecture)
    check_architecture(path, manifest["plan"]["architectures"], architecture, again)
    # A version-compatible plan contains its own runtime, which is code to run.
    runtime.engine_host_code_allowed = manifest["plan"]["version_compatible"]
    engine = deserialize(trt, runtime, path, data, again)
    size, required = manifest["preprocess"]["size"], required_tensors(manifest)
    tensors, profile = check_engine(engine, path, size, again, required)
    kernels = path.with_name(f"{path.name}.{architecture}.cache")
    settings = PlanSettings(manifest["plan"]["cuda_graph"], row.portable, kernels)
    return Plan(trt, engine, tensors, profile, settings)


def _again(path: Path, manifest: Mapping[str, Any]) -> str:
    """Return the fix of a plan that does not run."""
    return f"build it again with `{export_command(path, manifest)} --force`"


def run_one_node(flavour: str) -> None:
    """Build a plan of one node, which casts uint8 [1] to float32, and run it on the GPU.

    Raises:
        UserError: the library cannot build or load the plan, or computes something else.
        CudaError: CUDA cannot run it.
    """
    row = ENGINE_FORMATS[flavour]
    trt = import_runtime(flavour)
    again = f"run `pip install --force-reinstall {' '.join(row.packages)}`"
    data = one_node_plan(trt, cudart.architecture() if row.portable else None)
    if data is None:
        raise UserError(f"{row.title} builds no plan ({logger(trt).reason()}); {again}")
    runtime = trt.Runtime(logger(trt))
    engine = deserialize(trt, runtime, Path("a plan of one node"), data, again)
    tensors = {IMAGES: Tensor("uint8", (1,)), FEATURES: Tensor("float32", (1,))}
    settings = PlanSettings(cuda_graph=False, portable=row.portable)
    plan = Plan(trt, engine, tensors, Profile(1, 1, 1), settings)
    pixel = cudart.pinned((1,), np.uint8)
    result = cudart.pinned((1,), np.float32)
    pixel[0] = 255
    memory = {IMAGES: cudart.DeviceMemory(pixel.nbytes), FEATURES: cudart.DeviceMemory(4)}
    context = plan.create_context(cudart.DeviceMemory(plan.scratch_bytes), memory)
    stream = cudart.Stream()
    stream.upload(memory[IMAGES], pixel)
    context.enqueue(1, stream)
    stream.download(result, memory[FEATURES])
    stream.wait()
    if result[0] != pixel[0]:
        raise UserError(f"{row.title} computes {result[0]} for {pixel[0]}; {again}")


def one_node_plan(trt: ModuleType, architecture: str | None) -> bytes | None:
    """Return a plan with the input IMAGES and the output FEATURES, None if it cannot be built.

    Args:
        trt: the Python module of the flavour.
        architecture: of the GPU that a portable plan is for; None for this machine's GPU.
    """
    builder = trt.Builder(logger(trt))
    # TensorRT 11 is always strongly typed and ignores the flag; 10 needs it.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    images = network.add_input(IMAGES, trt.DataType.UINT8, (1,))
    features = network.add_cast(images, trt.DataType.FLOAT).get_output(0)
    features.name = FEATURES
    network.mark_output(features)
    config = builder.create_builder_config()
    if architecture is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, architecture.upper()), 0)
    plan = builder.build_serialized_network(network, config)
    return None if plan is None else bytes(plan)


def export_command(path: Path, manifest: Mapping[str, Any]) -> str:
    """Return the command that exports a plan again."""
    flags = {"fold": "fold", "formats": "format", "precision": "precision", "tta": "tta"}
    given = [
        f"--{flag} {manifest[key]}"
        for flag, key in flags.items()
        if manifest.get(key, "none") != "none"
    ]
    if path.parent.name.startswith("fold_"):
        given.insert(0, f"--model_dir {path.parent.parent}")
    return " ".join((network_command(manifest), *given))


def check_manifest(path: Path, manifest: Mapping[str, Any], version: str, again: str) -> None:
    """Raise UserError if this version must not run the plan, or its parity is unchecked."""
    plan = manifest.get("plan")
    if plan is None:
        raise UserError(
            f"the manifest of {path} does not name the plan's library and GPUs; {again}"
        )
    if not _can_run(plan, version):
        title = ENGINE_FORMATS[manifest["format"]].title
        raise UserError(
            f"{path} was built by {title} {plan['version']}, and this is {version}; {again}"
        )
    if "parity" in manifest and manifest["parity"] is None:
        raise UserError(
            f"{path} has not passed the parity check, because it was built without a GPU; check "
            f"it here with `{export_command(path, manifest)} --check`"
        )


def _can_run(plan: Mapping[str, Any], version: str) -> bool:
    """Return whether a library of this version runs a plan, by NVIDIA's rules of compatibility."""
    if not plan["version_compatible"]:
        return bool(plan["version"] == version)
    built = _version_numbers(plan["version"])
    here = _version_numbers(version)
    return built[0] == here[0] and built <= here


def _version_numbers(version: str) -> tuple[int, ...]:
    """Return major, minor and patch of a version such as `10.14.1.48`."""
    return tuple(int(number) for number in version.split(".")[:3])


def check_gpu(flavour: str, trt: ModuleType, architecture: str) -> None:
    """Raise UserError if a flavour cannot run on a GPU (`sm90`), whatever the plan.

    TensorRT-RTX lists the GPUs that it supports; not all from Ampere on are among them.
    """
    if not ENGINE_FORMATS[flavour].portable:
        return
    title = ENGINE_FORMATS[flavour].title
    known = trt.ComputeCapability.__members__
    if architecture.upper() not in known:
        names = [name.lower() for name in known if name.startswith("SM")]
        raise UserError(
            f"{title} runs on {', '.join(names)}, and not on {architecture}; use another format "
            "there"
        )


def check_architecture(path: Path, architectures: Sequence[str], here: str, again: str) -> None:
    """Raise UserError if a plan's architectures do not include this GPU's (`sm89`)."""
    is_ampere_plus = AMPERE_PLUS in architectures and int(here.removeprefix("sm")) >= 80
    if here not in architectures and not is_ampere_plus:
        raise UserError(
            f"{path} was built for {' and '.join(architectures)}, and this GPU is {here}; {again}"
        )


INVALID = {
    "VERSION_MISMATCH": "was built by another version",
    "UNSUPPORTED_CC": "was built for other GPUs",
    "OLD_CUDA_DRIVER": "needs a newer CUDA driver",
    "OLD_CUDA_RUNTIME": "needs a newer CUDA runtime",
    "INSUFFICIENT_GPU_MEMORY": "needs more memory than this GPU has",
    "MALFORMED_ENGINE": "is damaged or not a plan",
}
"""TensorRT-RTX's findings in a plan's header, in words."""


def check_header(trt: ModuleType, runtime: Any, path: Path, plan: bytes, again: str) -> None:
    """Raise UserError for a bad plan header; only TensorRT-RTX can check it."""
    if not hasattr(runtime, "get_engine_validity"):
        return
    _, found = runtime.get_engine_validity(plan)
    for name, words in INVALID.items():
        if int(found) & int(getattr(trt.EngineInvalidityDiagnostics, name)):
            raise UserError(f"{path} {words}; {again}")


def deserialize(trt: ModuleType, runtime: Any, path: Path, plan: bytes, again: str) -> Any:
    """Return TensorRT's engine of a plan's bytes. Raises UserError with TensorRT's reason."""
    logger(trt).errors.clear()
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise UserError(f"{path} does not load ({logger(trt).reason()}); {again}")
    return engine


def check_engine(
    engine: Any, path: Path, size: int, again: str, required: Collection[str] = REQUIRED
) -> tuple[dict[str, Tensor], Profile]:
    """Return type and shape of each input and output, and the profile.

    Raises:
        UserError: it breaks the contract, or takes images of another size.
    """
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    tensors = {
        name: as_tensor(engine.get_tensor_dtype(name), engine.get_tensor_shape(name))
        for name in names
    }
    violation = contract_violation(tensors, size, required=required)
    if violation:
        raise UserError(f"{path} {violation}; {again}")
    batches = [int(shape[0]) for shape in engine.get_tensor_profile_shape(IMAGES, 0)]
    return tensors, Profile(*batches)


def as_tensor(dtype: Any, shape: Sequence[int]) -> Tensor:
    """Return a tensor of TensorRT, which writes -1 for an open size."""
    sizes = tuple(None if size == -1 else int(size) for size in shape)
    return Tensor(TENSORRT_DTYPES.get(dtype.name, dtype.name.lower()), sizes)
