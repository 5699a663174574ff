"""TensorRT 10 and 11 and TensorRT-RTX, through one code path."""

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from importlib import import_module
from itertools import cycle
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infer.engines import Outputs, cudart
from infer.engines.contract import FEATURES, IMAGES, LOGITS, MASK, Tensor, contract_violation
from infer.formats import ENGINE_FORMATS
from isic.preprocess import Pixels
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


@cache
def logger(trt: ModuleType) -> Any:
    """Return the logger of a flavour, which keeps error messages in `errors`.

    It is cached because TensorRT keeps the first logger of a process, whatever it is given later.
    """

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            # TensorRT's classes do not support super() (NVIDIA/TensorRT#2632).
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in {trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR}:
                self.errors.append(" ".join(message.split()))

        def reason(self) -> str:
            """Return the first error since the last call."""
            errors, self.errors = self.errors, []
            return errors[0][:300] if errors else "it gives no reason"

    return Log()


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


@dataclass(frozen=True)
class Profile:
    """The batch sizes that a plan was built for."""

    min: int
    opt: int
    max: int

    def pieces(self, num_images: int) -> Iterator[slice]:
        """Yield the parts of a batch that run one after another.

        A batch within the profile is one piece. A larger one is cut into pieces of `opt`, for
        which the kernels were chosen, so that one piece is computed while the next is copied.
        """
        size = num_images if num_images <= self.max else self.opt
        for start in range(0, num_images, max(size, 1)):
            yield slice(start, min(start + size, num_images))

    def padded(self, num_images: int) -> int:
        """Return the batch size that a piece runs as: `min`, `opt`, `max` or a power of two.

        A size that is new to TensorRT costs time (TensorRT-RTX compiles kernels for it), so the
        last pieces of different batches share a few sizes.
        """
        powers = (2**exponent for exponent in range(self.max.bit_length()))
        larger_powers = (power for power in powers if power > self.min)
        sizes: list[int] = sorted({self.min, self.opt, self.max, *larger_powers})
        return sizes[bisect_left(sizes, num_images)]


class Plan:
    """A loaded plan, and memory on the GPU that all its execution contexts share.

    They can share it because they take turns: the engine runs all of them on one stream.
    """

    def __init__(self, trt: ModuleType, engine: Any, portable: bool, cuda_graph: bool) -> None:
        """Allocate the memory.

        Args:
            trt: the Python module of the flavour.
            engine: TensorRT's engine of the plan.
            portable: whether the flavour compiles kernels on the machine that runs the plan.
            cuda_graph: whether such a flavour records CUDA graphs by itself.

        Raises:
            CudaError: the GPU has too little memory.
        """
        self._trt = trt
        self._engine = engine
        self._portable = portable
        self._cuda_graph = cuda_graph
        self._memory = cudart.DeviceMemory(engine.device_memory_size_v2)

    def create_context(self) -> Any:
        """Return a new execution context. Raises CudaError."""
        context = self._engine.create_execution_context(self._context_settings())
        if context is None:
            raise cudart.CudaError(logger(self._trt).reason())
        context.set_device_memory(self._memory.pointer, self._memory.num_bytes)
        return context

    def _context_settings(self) -> Any:
        """Return the settings of a context that uses the shared memory."""
        trt = self._trt
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self._portable:
            return strategy
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        # By default TensorRT-RTX replaces kernels in the background while it runs, so the results
        # would come from other kernels than those that the parity check has seen.
        config.dynamic_shapes_kernel_specialization_strategy = (
            trt.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        if self._cuda_graph:
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return config


class BoundContext:
    """An execution context that always reads and writes the same memory."""

    def __init__(
        self,
        context: Any,
        memory: Mapping[str, cudart.DeviceMemory],
        image_shape: tuple[int, ...],
    ) -> None:
        """Bind the memory of each input and output by name. Raises CudaError."""
        self._context = context
        self._image_shape = image_shape
        self._size = 0
        for name, buffer in memory.items():
            if not context.set_tensor_address(name, buffer.pointer):
                raise cudart.CudaError(f"TensorRT did not accept the memory of {name}")

    def enqueue(self, size: int, stream: cudart.Stream) -> None:
        """Add a run of `size` images to the stream. Raises CudaError."""
        if size != self._size:
            self._size = 0  # stays 0 if TensorRT refuses the new shape
            if not self._context.set_input_shape(IMAGES, (size, *self._image_shape)):
                raise cudart.CudaError(f"TensorRT did not accept a batch of {size}")
            self._size = size
        if not self._context.execute_async_v3(int(stream.handle)):
            raise cudart.CudaError(f"TensorRT did not run a batch of {size}")


class Slot:
    """The buffers, events and execution context of one piece in flight.

    An engine has two slots. A piece is copied in (stream 1), computed and copied out (stream 2).
    With two sets of buffers, stream 1 fills one slot while stream 2 computes from the other. The
    events order the work of one slot: `uploaded` holds the computation back until the images are
    on the GPU, and the host waits for `done` before it reads the results or reuses the buffers.
    """

    def __init__(self, plan: Plan, shapes: Mapping[str, tuple[int, ...]], max_batch: int) -> None:
        """Allocate for `max_batch` images.

        Args:
            plan: the plan to run.
            shapes: the shape of `images` and of each output, without the batch.
            max_batch: the largest number of images.
        """
        self._plan = plan
        self._image_shape = shapes[IMAGES]
        self._max_batch = max_batch
        self.images = cudart.DeviceMemory(max_batch * prod(self._image_shape))
        self.outputs: dict[str, cudart.DeviceMemory] = {}
        self.host: dict[str, NDArray[np.float32]] = {}
        for name, shape in shapes.items():
            if name == IMAGES:
                continue
            float32_bytes = 4 * max_batch * prod(shape)
            self.outputs[name] = cudart.DeviceMemory(float32_bytes)
            self.host[name] = cudart.pinned((max_batch, *shape), np.float32)
        self.uploaded = cudart.Event()
        self.done = cudart.Event()
        self.context = self._bound_context()
        self._graph_context: BoundContext | None = None
        self.graph: Any = None

    def record(self, size: int, stream: cudart.Stream) -> None:
        """Record a run of `size` images as a CUDA graph. Raises CudaError.

        The graph has a context of its own: NVIDIA advises one context per graph, because another
        shape changes the state that the graph relies on
        (https://github.com/NVIDIA/TensorRT/issues/3798).
        """
        context = self._bound_context()
        self._graph_context = context  # must live as long as the graph, which uses its memory
        context.enqueue(size, stream)  # the first run does work that cannot be recorded
        self.graph = stream.recorded(partial(context.enqueue, size, stream))

    def _bound_context(self) -> BoundContext:
        memory = {IMAGES: self.images, **self.outputs}
        return BoundContext(self._plan.create_context(), memory, self._image_shape)

    @cached_property
    def staging(self) -> Pixels:
        """Page-locked memory for images that are not in such memory already."""
        return cudart.pinned((self._max_batch, *self._image_shape), np.uint8)


class TensorRTEngine:
    """A plan with two slots and two streams. One thread at a time may use it."""

    device = "cuda"

    def __init__(
        self,
        plan: Plan,
        shapes: Mapping[str, tuple[int, ...]],
        profile: Profile,
        cuda_graph: bool,
    ) -> None:
        """Allocate buffers.

        Args:
            plan: the plan to run.
            shapes: the shape of `images` and of each output, without the batch.
            profile: the batch sizes that the plan was built for.
            cuda_graph: record batches of `opt` once and replay them.

        Raises:
            CudaError: for example, the GPU has too little memory.
        """
        self._shapes = shapes
        self._profile = profile
        self._copies = cudart.Stream()
        self._kernels = cudart.Stream()
        self._slots = (Slot(plan, shapes, profile.max), Slot(plan, shapes, profile.max))
        if cuda_graph:
            for slot in self._slots:
                slot.record(profile.opt, self._kernels)

    def run(self, images: Pixels) -> Outputs:
        """Run a batch of any size. Raises CudaError."""
        features, logits = self._run(images, (FEATURES, LOGITS))
        return features, logits

    def predict_mask(self, images: Pixels) -> NDArray[np.float32]:
        """Return probabilities [N, h, w] of a plan with the optional output `mask`."""
        return self._run(images, (MASK,))[0]

    def allocate(self, shape: tuple[int, int, int, int]) -> Pixels:
        """Return page-locked memory, from which `run` copies to the GPU without staging."""
        return cudart.pinned(shape, np.uint8)

    def _run(self, images: Pixels, names: Sequence[str]) -> list[NDArray[np.float32]]:
        assert images.dtype == np.uint8 and images.shape[1:] == self._shapes[IMAGES], (
            images.dtype,
            images.shape,
        )
        results = [np.empty((len(images), *self._shapes[name]), np.float32) for name in names]
        in_flight: deque[tuple[Slot, slice]] = deque()

        def collect() -> None:
            """Wait for the oldest piece in flight and copy its outputs into the results."""
            slot, piece = in_flight.popleft()
            slot.done.wait()
            for name, result in zip(names, results, strict=True):
                result[piece] = slot.host[name][: piece.stop - piece.start]

        try:
            for piece, slot in zip(self._profile.pieces(len(images)), cycle(self._slots)):
                if len(in_flight) == len(self._slots):
                    collect()  # slots alternate, so the oldest piece is the one in this slot
                self._launch(slot, images[piece], names)
                in_flight.append((slot, piece))
            while in_flight:
                collect()
        finally:  # also after an error: no copy may still read memory that the caller reuses
            self._copies.wait()
            self._kernels.wait()
        return results

    def _launch(self, slot: Slot, images: Pixels, names: Sequence[str]) -> None:
        """Enqueues one piece: copy in, compute, copy out. Returns at once."""
        num_images = len(images)
        if not cudart.is_pinned(images):
            slot.staging[:num_images] = images
            images = slot.staging[:num_images]
        self._copies.upload(slot.images, images)
        self._copies.record(slot.uploaded)
        self._kernels.wait_for(slot.uploaded)
        # The padding is whatever images an earlier piece left; their outputs are not copied back.
        size = self._profile.padded(num_images)
        if slot.graph is not None and size == self._profile.opt:
            self._kernels.replay(slot.graph)
        else:
            slot.context.enqueue(size, self._kernels)
        for name in names:
            self._kernels.download(slot.host[name][:num_images], slot.outputs[name])
        self._kernels.record(slot.done)


def create(path: Path, manifest: Mapping[str, Any], device: str) -> TensorRTEngine:
    """Open a plan on the current GPU. Only the last step touches the GPU.

    Raises:
        UserError: the plan is for another library, version or GPU, has not passed the parity
            check, is damaged or breaks the contract; or the library, CUDA Python or a GPU is
            missing.
    """
    flavour = manifest["format"]
    row = ENGINE_FORMATS[flavour]
    again = f"build it again with `{export_command(path, manifest)} --force`"
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
    shapes, profile = check_engine(engine, path, manifest["preprocess"]["size"], again)
    cuda_graph = manifest["plan"]["cuda_graph"]
    try:
        plan = Plan(trt, engine, row.portable, cuda_graph)
        return TensorRTEngine(plan, shapes, profile, cuda_graph and not row.portable)
    except cudart.CudaError as error:
        raise UserError(
            f"{path} does not run on this GPU ({error}); {again} and a smaller --max_batch"
        ) from None


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
    plan = Plan(trt, engine, row.portable, cuda_graph=False)
    pixel = cudart.pinned((1,), np.uint8)
    result = cudart.pinned((1,), np.float32)
    pixel[0] = 255
    memory = {IMAGES: cudart.DeviceMemory(pixel.nbytes), FEATURES: cudart.DeviceMemory(4)}
    context = BoundContext(plan.create_context(), memory, image_shape=())
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
    flags = {"config": "name", "fold": "fold", "formats": "format", "precision": "precision"}
    given = [f"--{flag} {manifest[key]}" for flag, key in flags.items() if key in manifest]
    if path.parent.name.startswith("fold_"):
        given.insert(1, f"--model_dir {path.parent.parent}")
    return " ".join(("python -m export", *given))


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
    engine: Any, path: Path, size: int, again: str
) -> tuple[dict[str, tuple[int, ...]], Profile]:
    """Return the shape of each input and output without the batch, and the profile.

    Raises:
        UserError: it breaks the contract, or takes images of another size.
    """
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    tensors = {
        name: as_tensor(engine.get_tensor_dtype(name), engine.get_tensor_shape(name))
        for name in names
    }
    violation = contract_violation(tensors, size)
    if violation:
        raise UserError(f"{path} {violation}; {again}")
    shapes = {name: tuple(engine.get_tensor_shape(name))[1:] for name in names}
    batches = [int(shape[0]) for shape in engine.get_tensor_profile_shape(IMAGES, 0)]
    return shapes, Profile(*batches)


def as_tensor(dtype: Any, shape: Sequence[int]) -> Tensor:
    """Return a tensor of TensorRT, which writes -1 for an open size."""
    sizes = tuple(None if size == -1 else int(size) for size in shape)
    return Tensor(TENSORRT_DTYPES.get(dtype.name, dtype.name.lower()), sizes)
