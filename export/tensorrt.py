"""TensorRT plans: one strongly typed path for TensorRT 10 and 11 and for TensorRT-RTX.

Precision lives in the ONNX graph, so the plan has the types that the graph has: nothing here lowers a layer.
"""

import contextlib
import signal
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
from tqdm import tqdm

from export.formats import Target
from export.onnx_graph import ATTENTION_OPSET, OPSET, trace
from export.options import PlanOptions
from export.precision import lowered
from export.quantize import BASE, QUANTIZED, quantize
from infer.engines import cudart
from infer.engines.tensorrt import AMPERE_PLUS, FLAVOURS, check_gpu, import_runtime, logger
from isic.runtime.errors import UserError
from isic.runtime.files import atomic_path
from train.model import Classifier

DTYPES = {
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
INTEGERS = frozenset({"int32", "int64", "bool"})
"""Types of shape arithmetic, which says nothing of precision."""
CONTRACT = {
    "images": ("uint8", (None, None, 3)),
    "features": ("float32", (None,)),
    "logits": ("float32", (1,)),
    "mask": ("float32", (None, None)),
}
"""Type of each input and output, and its sizes after the batch; None stands for any that is fixed. A mask may lack."""

ATTENTION_VERSION = (10, 14)
"""TensorRT's first with a parser for ONNX's Attention."""

PORTABLE_CAPABILITIES = ("SM86", "SM89", "SM120")
"""Architectures that TensorRT-RTX builds for by default: those over which NVIDIA calls plans portable.

The support matrix of every version names these, and not SM80 (A100) nor SM121.
"""
CAPABILITIES = {"fp8": ("SM89", "SM120")}
"""Architectures that it builds a precision for, if not all of those compute in it."""

Log = Callable[[str], None]


@dataclass(frozen=True)
class PlanFacts:
    """What a plan is, for its manifest (under `plan`)."""

    runtime: str
    version: str
    """Of the library that built it, and that alone runs it, unless it is version compatible."""
    version_compatible: bool
    architectures: tuple[str, ...]
    """GPUs that it runs on: `sm89`, or AMPERE_PLUS."""
    profile: dict[str, int]
    """Batch: `min`, `opt` and `max`."""
    cuda_graph: bool
    tensors: dict[str, dict[str, Any]]
    """`dtype` and `shape` of each input and output, -1 for the batch."""
    layers: dict[str, dict[str, int]]
    """Number of layers by kind and by the type of what they compute, without shape arithmetic."""
    seconds: float
    """Time that the build took."""


def architectures(flavour: str, options: PlanOptions) -> tuple[str, ...]:
    """Return the GPU architectures that a plan is to run on.

    Raises:
        UserError: it takes a GPU and there is none, or the library has no kernels for one of them.
    """
    if not FLAVOURS[flavour].portable:
        current = cudart.architecture()
        return (AMPERE_PLUS,) if options.hardware_compatible else (current,)
    names = [name.lower() for name in options.compute_capabilities or PORTABLE_CAPABILITIES]
    found = tuple(cudart.architecture() if name == "current" else name for name in names)
    for name in found:
        check_gpu(flavour, import_runtime(flavour), name)
    return found


def file_name(target: Target) -> str:
    return plan_name(target.config, target.fold, target.precision, target.format, target.options)


def build(model: Classifier, target: Target, path: Path) -> dict[str, Any]:
    """Builds the plan of `model` by way of a graph that has the target's types."""
    opset = ATTENTION_OPSET if parses_attention(target.format) else OPSET
    graph, calibration = typed_graph(model, target, opset)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        onnx_path = Path(folder) / "model.onnx"
        onnx.save(graph, onnx_path)
        timings = target.cache_dir / f"{target.format}.timings"
        options = options_for(target.precision, target.format, target.options)
        facts = build_plan(onnx_path, path, target.format, options, timing_cache=timings)
    # Twice the largest batch keeps both of the engine's streams busy.
    return {
        "opset": opset,
        **calibration,
        "plan": asdict(facts),
        "batch_size": 2 * target.options.max_batch,
    }


def typed_graph(
    model: Classifier, target: Target, opset: int
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Returns the graph of `model` in the target's precision, and for the manifest what it was calibrated on."""
    if target.precision not in QUANTIZED:
        return trace(lowered(model, target.precision), target.size, opset), {}
    graph = trace(lowered(model, BASE), target.size, opset)
    return graph, {"calibration": quantize(graph, target.precision, target.calibration())}


def options_for(precision: str, flavour: str, options: PlanOptions) -> PlanOptions:
    """Returns the options with the architectures that a precision takes, where none is asked for."""
    if options.compute_capabilities or not FLAVOURS[flavour].portable:
        return options
    names = CAPABILITIES.get(precision, PORTABLE_CAPABILITIES)
    return options.model_copy(update={"compute_capabilities": names})


def parses_attention(flavour: str) -> bool:
    """Whether the library reads ONNX's Attention node; older ones get it in parts."""
    trt = import_runtime(flavour)
    return (
        FLAVOURS[flavour].portable
        or tuple(map(int, trt.__version__.split(".")[:2])) >= ATTENTION_VERSION
    )


def plan_name(config: str, fold: int, precision: str, flavour: str, options: PlanOptions) -> str:
    """Returns the file name of a plan: all that decides whether it is the one to run.

    For example `vit_tiny-fold_0-fp16-sm86-sm89-sm120-tensorrt_rtx_1.7.1.116.plan`. Raises UserError if the library is
    not installed or does not know a GPU, or a GPU is needed and there is none.
    """
    version = import_runtime(flavour).__version__
    options = options_for(precision, flavour, options)
    return f"{config}-fold_{fold}-{precision}-{'-'.join(architectures(flavour, options))}-{flavour}_{version}.plan"


def build_plan(
    onnx_path: Path,
    plan_path: Path,
    flavour: str,
    options: PlanOptions,
    log: Log = print,
    timing_cache: Path | None = None,
) -> PlanFacts:
    """Builds a plan from a strongly typed ONNX graph and writes it, whole or not at all.

    Args:
        onnx_path: a graph of this toolkit's contract in any precision, external data beside it.
        plan_path: where the plan goes.
        flavour: a key of FLAVOURS. TensorRT builds for the GPU of this machine; TensorRT-RTX needs none.
        options: how to build; what belongs to another flavour is left aside.
        log: hears what is worth a line.
        timing_cache: file with TensorRT's timings of kernels, which folds of one config share; made if not there.
            TensorRT-RTX times nothing and leaves it alone.

    Raises:
        UserError: the library or the GPU is missing, the graph does not parse or is not of the contract, or TensorRT
            cannot build it.
        KeyboardInterrupt: Ctrl-C; no plan is left behind.
    """
    trt = import_runtime(flavour)
    targets = architectures(flavour, options)
    title = f"{FLAVOURS[flavour].title} {trt.__version__}"
    builder = trt.Builder(logger(trt))
    network, _parser = parse(trt, builder, onnx_path, title)
    tensors = check_contract(network, onnx_path)
    allow_decomposed_attention(trt, network)
    config = configure(trt, builder, network, FLAVOURS[flavour].portable, options)
    started = time.perf_counter()
    timings = None if FLAVOURS[flavour].portable or timing_cache is None else timing_cache
    if timings:
        read_timings(config, timings, log)
    plan = serialize(trt, builder, network, config, onnx_path, title)
    if timings:
        write_timings(config, timings)
    with atomic_path(plan_path) as temporary:
        temporary.write_bytes(plan)
    return PlanFacts(
        runtime=flavour,
        version=trt.__version__,
        version_compatible=options.version_compatible and not FLAVOURS[flavour].portable,
        architectures=targets,
        profile=options.profile,
        cuda_graph=options.cuda_graph,
        tensors=tensors,
        layers=layer_types(network),
        seconds=time.perf_counter() - started,
    )


def parse(trt: ModuleType, builder: Any, onnx_path: Path, title: str) -> tuple[Any, Any]:
    """Returns the network of an ONNX file, and the parser, which owns weights that the network points to.

    Raises:
        UserError: says what the parser says first.
    """
    # TensorRT 11 is always strongly typed and ignores the flag; 10 needs it.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger(trt))
    if parser.parse_from_file(str(onnx_path)):
        return network, parser
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    said = (
        "; ".join(dict.fromkeys(_parser_sentence(error) for error in errors[:2]))
        or logger(trt).reason()
    )
    raise UserError(
        f"{title} cannot read {onnx_path} ({said}); export the ONNX file again, or with another opset"
    )


def _parser_sentence(error: Any) -> str:
    text = " ".join(error.desc().split())
    node = " ".join(filter(None, (error.node_operator(), error.node_name())))
    return (f"{node}: {text}" if node else text)[:200]


def check_contract(network: Any, onnx_path: Path) -> dict[str, dict[str, Any]]:
    """Returns type and shape of each input and output. Raises UserError where they are not those of CONTRACT."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    tensors = {
        tensor.name: {"dtype": DTYPES[tensor.dtype.name], "shape": list(tensor.shape)}
        for tensor in (*inputs, *outputs)
    }
    if [tensor.name for tensor in inputs] != ["images"] or not {"features", "logits"} <= set(
        tensors
    ) <= set(CONTRACT):
        raise UserError(
            f"{onnx_path} has {', '.join(tensors)}, not images, features and logits; export it again"
        )
    for name, tensor in tensors.items():
        dtype, sizes = CONTRACT[name]
        batch, *rest = tensor["shape"]
        fits = [have == want if want else have > 0 for have, want in zip(rest, sizes, strict=False)]
        if tensor["dtype"] != dtype or batch != -1 or len(rest) != len(sizes) or not all(fits):
            wanted = ", ".join(["N", *(str(want or "fixed") for want in sizes)])
            raise UserError(
                f"{onnx_path}: {name} is {tensor['dtype']} {tensor['shape']}, not {dtype} [{wanted}]; export it again"
            )
    return tensors


def allow_decomposed_attention(trt: ModuleType, network: Any) -> None:
    """Lets attention fall back to several kernels where there is no fused one for its type and head size.

    There is none for float32, and the build would fail; where there is one it is used as before.
    """
    kind = getattr(
        trt.LayerType, "ATTENTION_INPUT", None
    )  # TensorRT before 10.14 has no such layer
    for layer in _layers(network):
        if layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def configure(
    trt: ModuleType, builder: Any, network: Any, portable: bool, options: PlanOptions
) -> Any:
    """Returns the builder's configuration of a network with its one batch profile."""
    config = builder.create_builder_config()
    config.builder_optimization_level = options.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 islands are there to be exact
    if options.workspace_mib:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib * 1024**2)
    if portable:
        names = options.compute_capabilities or PORTABLE_CAPABILITIES
        config.num_compute_capabilities = len(names)
        for index, name in enumerate(names):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    if options.version_compatible and not portable:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible and not portable:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    profile = builder.create_optimization_profile()
    size = tuple(network.get_input(0).shape)[1:]
    profile.set_shape("images", *((batch, *size) for batch in options.profile.values()))
    config.add_optimization_profile(profile)
    return config


def read_timings(config: Any, path: Path, log: Log) -> None:
    """Gives the builder the timings of earlier builds; those of another GPU or version are left aside."""
    known = path.read_bytes() if path.is_file() else b""
    if not config.set_timing_cache(config.create_timing_cache(known), False):
        log(f"{path} is of another GPU or TensorRT version, so kernels are timed anew")
        config.set_timing_cache(config.create_timing_cache(b""), False)


def write_timings(config: Any, path: Path) -> None:
    """Writes the timings of earlier builds and of this one, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(config.get_timing_cache().serialize())


def serialize(
    trt: ModuleType, builder: Any, network: Any, config: Any, onnx_path: Path, title: str
) -> memoryview:
    """Builds the plan and returns its bytes. Raises UserError with TensorRT's reason, KeyboardInterrupt on Ctrl-C."""
    logger(trt).errors.clear()
    with (
        interrupts() as interrupted,
        tqdm(desc=title, unit="step", leave=False, disable=None) as bar,
    ):
        config.progress_monitor = monitor = progress_monitor(trt, bar, interrupted)
        plan = builder.build_serialized_network(network, config)
        config.progress_monitor = None  # the monitor outlives all that uses it
        del monitor
    if interrupted.is_set():
        raise KeyboardInterrupt
    if plan is None:
        raise UserError(
            f"{title} cannot build {onnx_path} ({logger(trt).reason()}); try another --precision, a smaller "
            "--max_batch or other architectures"
        )
    return memoryview(plan)


def progress_monitor(trt: ModuleType, bar: Any, interrupted: threading.Event) -> Any:
    """Returns TensorRT's reporter that shows the phase in progress on `bar` and ends the build when interrupted."""

    class Progress(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._shown = ""

        def phase_start(self, phase: str, parent: str | None, num_steps: int) -> None:
            self._shown = phase
            bar.reset(total=num_steps)
            bar.set_description(f"TensorRT: {phase}")

        def step_complete(self, phase: str, step: int) -> bool:
            if phase == self._shown:
                bar.update()
            return not interrupted.is_set()

        def phase_finish(self, phase: str) -> None:
            pass

    return Progress()


@contextlib.contextmanager
def interrupts() -> Iterator[threading.Event]:
    """Notes Ctrl-C instead of raising it: an exception may not pass through TensorRT's own frames."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted  # signals reach the main thread alone
        return
    former = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, former)


def layer_types(network: Any) -> dict[str, dict[str, int]]:
    """Returns the number of layers by kind and by type of the first output, without shape arithmetic.

    A strongly typed plan computes each layer in the type that the network states; TensorRT may fuse layers, and may
    not change types. A product of dequantized inputs is one of the quantized type.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    quantized = {
        layer.get_output(0).name: DTYPES[layer.get_input(0).dtype.name]
        for layer in _layers(network)
        if layer.type.name == "DEQUANTIZE"
    }
    for layer in _layers(network):
        dtype = DTYPES.get(layer.get_output(0).dtype.name, "other")
        if layer.num_inputs:
            dtype = quantized.get(layer.get_input(0).name, dtype)
        if dtype not in INTEGERS:
            counts[layer.type.name.lower()][dtype] += 1
    return {kind: dict(counter) for kind, counter in sorted(counts.items())}


def _layers(network: Any) -> Iterator[Any]:
    return (network.get_layer(index) for index in range(network.num_layers))
