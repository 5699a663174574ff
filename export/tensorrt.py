"""TensorRT plans from strongly typed ONNX graphs, for TensorRT 10 and 11 and TensorRT-RTX."""

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

from export.formats import ArtifactSpec, BuildInputs
from export.network import artifact_network
from export.onnx_graph import ATTENTION_OPSET, OPSET, trace
from export.options import PlanOptions
from export.precision import head_as_sum
from export.quantize import BASE_PRECISION, QUANT_TYPES, quantize
from infer.engines import cudart
from infer.engines.contract import FEATURES, IMAGES, contract_violation
from infer.engines.tensorrt import (
    AMPERE_PLUS,
    TENSORRT_DTYPES,
    as_tensor,
    check_gpu,
    import_runtime,
)
from infer.engines.tensorrt_plan import logger
from infer.formats import ENGINE_FORMATS
from isic.layout import ONNX_FILE, Fold, fold_name
from isic.runtime.errors import UserError
from isic.runtime.files import atomic_path

TURING = "sm75"
"""On this architecture some versions of TensorRT-RTX compute float32 matrix products as zeros.

There is no error (https://github.com/pytorch/TensorRT/pull/4643).
"""
TURING_PRECISION = "fp16"
"""The precision whose graphs have no float32 matrix product, and that Turing computes in."""

SHAPE_DTYPES = frozenset({"int32", "int64", "bool"})
"""Types of shape arithmetic, which has no precision."""

ATTENTION_VERSION = (10, 14)
"""The first TensorRT whose parser reads ONNX's Attention."""

# NVIDIA calls plans portable across these: the support matrix of every version names them, and not
# SM80 (A100) nor SM121.
PORTABLE_CAPABILITIES = ("SM86", "SM89", "SM120")
"""Architectures that TensorRT-RTX builds for by default."""
CAPABILITIES = {"fp8": ("SM89", "SM120")}
"""Default architectures of a precision that not all of PORTABLE_CAPABILITIES compute in."""

Log = Callable[[str], None]


@dataclass(frozen=True)
class PlanFacts:
    """Facts about a plan for its manifest (under `plan`)."""

    runtime: str
    version: str
    """Of the library that built it; only this version runs it, unless it is version compatible."""
    version_compatible: bool
    architectures: tuple[str, ...]
    """GPUs that it runs on: `sm89`, or AMPERE_PLUS."""
    profile: dict[str, int]
    """Batch sizes: `min`, `opt` and `max`."""
    cuda_graph: bool
    tensors: dict[str, dict[str, Any]]
    """`dtype` and `shape` of each input and output, -1 for the batch."""
    layers: dict[str, dict[str, int]]
    """Number of layers by kind and by type of their output, without shape arithmetic."""
    seconds: float
    """Duration of the build."""


def architectures(flavour: str, options: PlanOptions) -> tuple[str, ...]:
    """Return the GPU architectures that a plan will run on.

    Raises:
        UserError: it needs a GPU and there is none, or the library has no kernels for one of them.
    """
    if not ENGINE_FORMATS[flavour].portable:
        current = cudart.architecture()
        return (AMPERE_PLUS,) if options.hardware_compatible else (current,)
    names = [name.lower() for name in options.compute_capabilities or PORTABLE_CAPABILITIES]
    found = tuple(cudart.architecture() if name == "current" else name for name in names)
    for name in found:
        check_gpu(flavour, import_runtime(flavour), name)
    return found


def file_name(spec: ArtifactSpec) -> str:
    return plan_name(spec.config, spec.fold, spec.precision, spec.format, spec.options)


def build(spec: ArtifactSpec, inputs: BuildInputs, path: Path) -> dict[str, Any]:
    """Build the plan of a network from a graph in the spec's precision."""
    opset = ATTENTION_OPSET if parses_attention(spec.format) else OPSET
    graph, calibration = typed_graph(spec, inputs, opset)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        onnx_path = Path(folder) / ONNX_FILE
        onnx.save(graph, onnx_path)
        timings = inputs.cache_dir / f"{spec.format}.timings"
        options = with_capabilities(spec.precision, spec.format, spec.options)
        facts = build_plan(onnx_path, path, spec.format, options, timing_cache=timings)
    return {
        "opset": opset,
        **calibration,
        "plan": asdict(facts),
        # One piece of an embedding batch, so that as many batches are in flight as slots exist.
        "batch_size": spec.options.opt_batch,
    }


def typed_graph(
    spec: ArtifactSpec, inputs: BuildInputs, opset: int
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Return the graph of a network in the spec's precision, and its calibration's facts."""
    quantized = spec.precision in QUANT_TYPES
    precision = BASE_PRECISION if quantized else spec.precision
    # TensorRT-RTX has no float32 product of matrices for Turing, see TURING.
    model = head_as_sum(inputs.model) if ENGINE_FORMATS[spec.format].portable else inputs.model
    network = artifact_network(model, precision, spec.options.tta)
    graph = trace(network, inputs.size, opset)
    if not quantized:
        return graph, {}
    return graph, {"calibration": quantize(graph, spec.precision, inputs.calibration())}


def with_capabilities(precision: str, flavour: str, options: PlanOptions) -> PlanOptions:
    """Return the options with a precision's default architectures if none are given."""
    if options.compute_capabilities or not ENGINE_FORMATS[flavour].portable:
        return options
    names = CAPABILITIES.get(precision, PORTABLE_CAPABILITIES)
    return options.model_copy(update={"compute_capabilities": names})


def parses_attention(flavour: str) -> bool:
    """Return whether the library reads ONNX's Attention node; older ones get it decomposed."""
    if ENGINE_FORMATS[flavour].portable:
        return True
    major, minor = import_runtime(flavour).__version__.split(".")[:2]
    return (int(major), int(minor)) >= ATTENTION_VERSION


def plan_name(config: str, fold: Fold, precision: str, flavour: str, options: PlanOptions) -> str:
    """Return a file name such as `vit_tiny-fold_0-fp16-d4-sm86-tensorrt_rtx_1.7.1.116.plan`.

    Raises:
        UserError: the library is not installed or does not know a GPU, a GPU is needed and there is
            none, or the precision does not run on one of the GPUs.
    """
    version = import_runtime(flavour).__version__
    target_gpus = architectures(flavour, with_capabilities(precision, flavour, options))
    if ENGINE_FORMATS[flavour].portable and TURING in target_gpus and precision != TURING_PRECISION:
        raise UserError(
            f"{ENGINE_FORMATS[flavour].title} runs only {TURING_PRECISION} on {TURING} (Turing), "
            f"not {precision}; use --precision {TURING_PRECISION}, or other architectures"
        )
    gpus = "-".join(target_gpus)
    views = "" if options.tta == "none" else f"-{options.tta}"
    return f"{config}-{fold_name(fold)}-{precision}{views}-{gpus}-{flavour}_{version}.plan"


def build_plan(
    onnx_path: Path,
    plan_path: Path,
    flavour: str,
    options: PlanOptions,
    log: Log = print,
    timing_cache: Path | None = None,
) -> PlanFacts:
    """Build a plan from a strongly typed ONNX graph and write it atomically.

    Args:
        onnx_path: a graph of this toolkit's contract in any precision.
        flavour: `tensorrt`, for this machine's GPU, or `tensorrt_rtx`, which needs none.
        options: those of the other flavour are ignored.
        timing_cache: TensorRT's timings of kernels, created if absent; TensorRT-RTX has none.

    Raises:
        UserError: the library or the GPU is missing, the graph cannot be parsed or breaks the
            contract, or TensorRT cannot build it.
        KeyboardInterrupt: Ctrl-C; no plan is written.
    """
    trt = import_runtime(flavour)
    portable = ENGINE_FORMATS[flavour].portable
    target_gpus = architectures(flavour, options)
    title = f"{ENGINE_FORMATS[flavour].title} {trt.__version__}"
    builder = trt.Builder(logger(trt))
    # The parser owns weights that the network points to, so it must live until the plan is built.
    network, _parser = parse(trt, builder, onnx_path, title)
    tensors = check_contract(network, onnx_path)
    allow_decomposed_attention(trt, network)
    if portable and TURING in target_gpus:
        refuse_float32_products(network, onnx_path, title)
    config = configure(trt, builder, network, portable, options)
    timings = None if portable else timing_cache
    started = time.perf_counter()
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
        version_compatible=options.version_compatible and not portable,
        architectures=target_gpus,
        profile=options.profile,
        cuda_graph=options.cuda_graph,
        tensors=tensors,
        layers=layer_types(network),
        seconds=time.perf_counter() - started,
    )


def parse(trt: ModuleType, builder: Any, onnx_path: Path, title: str) -> tuple[Any, Any]:
    """Return the network of an ONNX file and its parser. Raise UserError if it cannot be read."""
    # TensorRT 11 is always strongly typed and ignores the flag; 10 needs it.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger(trt))
    if parser.parse_from_file(str(onnx_path)):
        return network, parser
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    texts = dict.fromkeys(_parser_error_text(error) for error in errors[:2])
    reason = "; ".join(texts) or logger(trt).reason()
    raise UserError(
        f"{title} cannot read {onnx_path} ({reason}); export the ONNX file again, or with another "
        "opset"
    )


def _parser_error_text(error: Any) -> str:
    text = " ".join(error.desc().split())
    node = " ".join(filter(None, (error.node_operator(), error.node_name())))
    return (f"{node}: {text}" if node else text)[:200]


def check_contract(network: Any, onnx_path: Path) -> dict[str, dict[str, Any]]:
    """Return type and shape of each input and output. Raise UserError for a broken contract."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    tensors = {tensor.name: as_tensor(tensor.dtype, tensor.shape) for tensor in (*inputs, *outputs)}
    # Whether it should have logits depends on the network, with which parity compares the plan.
    violation = contract_violation(tensors, required=(IMAGES, FEATURES))
    if violation:
        raise UserError(f"{onnx_path} {violation}; export it again")
    return {
        tensor.name: {"dtype": TENSORRT_DTYPES[tensor.dtype.name], "shape": list(tensor.shape)}
        for tensor in (*inputs, *outputs)
    }


def refuse_float32_products(network: Any, onnx_path: Path, title: str) -> None:
    """Raise UserError if a network has a float32 matrix product, which Turing has no kernel for."""
    if layer_types(network).get("matrix_multiply", {}).get("float32"):
        raise UserError(
            f"{onnx_path} has a matrix product in float32, which {title} computes wrongly on "
            f"{TURING} (Turing); export it in {TURING_PRECISION}, or for other architectures"
        )


def allow_decomposed_attention(trt: ModuleType, network: Any) -> None:
    """Allow attention to be several kernels if no fused one has its type and head size."""
    # Otherwise a float32 network does not build; fused kernels are still preferred. TensorRT before
    # 10.14 has no such layer.
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    for layer in _layers(network):
        if layer.type == kind:
            # get_layer returns the base class, which has no `attention`.
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def configure(
    trt: ModuleType, builder: Any, network: Any, portable: bool, options: PlanOptions
) -> Any:
    """Return the builder's configuration of a network with one batch profile."""
    config = builder.create_builder_config()
    config.builder_optimization_level = options.optimization_level
    # DETAILED, for inspectors of a plan, slows runs down.
    config.profiling_verbosity = trt.ProfilingVerbosity.LAYER_NAMES_ONLY
    config.clear_flag(trt.BuilderFlag.TF32)  # the float32 layers are there to be exact
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
    # Kernels are chosen for `opt`; all sizes between `min` and `max` run.
    profile = builder.create_optimization_profile()
    image_shape = tuple(network.get_input(0).shape)[1:]
    shapes = [(batch, *image_shape) for batch in options.profile.values()]
    profile.set_shape(IMAGES, *shapes)
    config.add_optimization_profile(profile)
    return config


def read_timings(config: Any, path: Path, log: Log) -> None:
    """Load the timings of earlier builds, unless they are of another GPU or version."""
    earlier = path.read_bytes() if path.is_file() else b""
    if not _set_timings(config, earlier):
        log(f"{path} is damaged or of another GPU or TensorRT version: kernels are timed again")
        _set_timings(config, b"")


def _set_timings(config: Any, timings: bytes) -> bool:
    """Let a build use timings and add its own. Return whether TensorRT accepts them."""
    cache = config.create_timing_cache(timings)
    return cache is not None and bool(config.set_timing_cache(cache, False))


def write_timings(config: Any, path: Path) -> None:
    """Write the timings of earlier builds and of this one atomically, if TensorRT has any."""
    cache = config.get_timing_cache()
    if cache is not None:
        with atomic_path(path) as temporary:
            temporary.write_bytes(cache.serialize())


def serialize(
    trt: ModuleType, builder: Any, network: Any, config: Any, onnx_path: Path, title: str
) -> memoryview:
    """Build the plan and return its bytes.

    Raises:
        UserError: TensorRT cannot build it.
        KeyboardInterrupt: Ctrl-C.
    """
    logger(trt).errors.clear()
    with (
        deferred_sigint() as interrupted,
        tqdm(desc=title, unit="step", leave=False, disable=None) as bar,
    ):
        # The configuration does not own its monitor, so the monitor must live until it is unset.
        monitor = progress_monitor(trt, bar, interrupted)
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
        config.progress_monitor = None
        del monitor
    if interrupted.is_set():
        raise KeyboardInterrupt
    if plan is None:
        raise UserError(
            f"{title} cannot build {onnx_path} ({logger(trt).reason()}); try another --precision, "
            "a smaller --max_batch or other architectures"
        )
    return memoryview(plan)


def progress_monitor(trt: ModuleType, bar: Any, interrupted: threading.Event) -> Any:
    """Return a monitor that shows the current phase on `bar` and ends an interrupted build."""

    class Progress(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            # TensorRT's classes do not support super() (NVIDIA/TensorRT#2632).
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
def deferred_sigint() -> Iterator[threading.Event]:
    """Record Ctrl-C instead of raising: an exception must not pass through TensorRT's frames."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted  # only the main thread receives signals
        return
    previous = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


def layer_types(network: Any) -> dict[str, dict[str, int]]:
    """Return the number of layers by kind and by type of the first output.

    Shape arithmetic is not counted.
    """
    # The types are those of the plan: TensorRT may fuse layers of a strongly typed network but not
    # change types. A product of dequantized inputs is computed in the quantized type.
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    quantized = {
        layer.get_output(0).name: TENSORRT_DTYPES[layer.get_input(0).dtype.name]
        for layer in _layers(network)
        if layer.type.name == "DEQUANTIZE"
    }
    for layer in _layers(network):
        dtype = TENSORRT_DTYPES.get(layer.get_output(0).dtype.name, "other")
        if layer.num_inputs:
            dtype = quantized.get(layer.get_input(0).name, dtype)
        if dtype not in SHAPE_DTYPES:
            counts[layer.type.name.lower()][dtype] += 1
    return {kind: dict(counter) for kind, counter in sorted(counts.items())}


def _layers(network: Any) -> Iterator[Any]:
    return (network.get_layer(index) for index in range(network.num_layers))
