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
from isic.preprocess import Pixels
from isic.runtime.errors import UserError


@dataclass(frozen=True)
class Flavour:
    """One of NVIDIA's two libraries with the same interface."""

    title: str
    extra: str
    """The extra of this package that installs it; the Python module has the same name."""
    portable: bool
    """Its plans are built without a GPU for several architectures, and their kernels compiled where they run."""


FLAVOURS = {
    "tensorrt": Flavour("TensorRT", extra="tensorrt", portable=False),
    "tensorrt_rtx": Flavour("TensorRT-RTX", extra="tensorrt_rtx", portable=True),
}

AMPERE_PLUS = "sm80plus"
"""The architectures of a plan that runs on Ampere GPUs and all newer ones."""
TURING = "sm75"
"""TensorRT-RTX computes a float32 matrix product there as zeros, without an error, in some versions.

https://github.com/pytorch/TensorRT/pull/4643
"""


@cache
def import_runtime(flavour: str) -> ModuleType:
    """Returns the Python module of a flavour. Raises UserError where it is not installed."""
    entry = FLAVOURS[flavour]
    try:
        return import_module(entry.extra)
    except ImportError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{entry.title} does not load here ({reason}); install it with `pip install isic-toolkit[{entry.extra}]`"
        ) from None


@cache
def logger(trt: ModuleType) -> Any:
    """Returns the logger of a flavour, which keeps what went wrong in `errors`.

    There is one a process, because TensorRT goes on with the first that it is given.
    """

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in {trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR}:
                self.errors.append(" ".join(message.split()))

        def reason(self) -> str:
            """Returns the first thing that went wrong since the last call."""
            errors, self.errors = self.errors, []
            return errors[0][:300] if errors else "it gives no reason"

    return Log()


def unavailable_reason(flavour: str, device: str = "cuda") -> str | None:
    """Returns why a flavour's plans cannot run here, None where they can."""
    try:
        check_gpu(flavour, import_runtime(flavour), cudart.architecture())
    except UserError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class Profile:
    """The batch sizes that a plan was built for."""

    min: int
    opt: int
    max: int

    def pieces(self, num_images: int) -> Iterator[slice]:
        """Yields the parts of a batch that run one after another.

        A batch that the profile holds is one piece. A larger one goes in pieces of `opt`, which the kernels were
        chosen for; while one is computed the next is copied.
        """
        size = num_images if num_images <= self.max else self.opt
        return (slice(at, min(at + size, num_images)) for at in range(0, num_images, max(size, 1)))

    def padded(self, num_images: int) -> int:
        """Returns the batch that a piece runs as: the next of a few sizes, powers of two and `opt` and `max`.

        A size that TensorRT has not seen costs time (TensorRT-RTX compiles kernels for it), so that the tails of many
        batches should not each have their own.
        """
        powers = (2**exponent for exponent in range(self.max.bit_length()))
        sizes: list[int] = sorted(
            {self.min, self.opt, self.max, *(power for power in powers if power > self.min)}
        )
        return sizes[bisect_left(sizes, num_images)]


class Plan:
    """A loaded plan, and memory on the GPU that all its execution contexts share.

    They may share it because they take turns: the engine runs all of them on one stream.
    """

    def __init__(self, trt: ModuleType, engine: Any, portable: bool, cuda_graph: bool) -> None:
        """Allocates the memory.

        Args:
            trt: the Python module of the flavour.
            engine: TensorRT's engine of the plan.
            portable: whether the flavour compiles kernels where the plan runs.
            cuda_graph: whether such a flavour is to record CUDA graphs by itself.

        Raises:
            CudaError: the GPU has too little memory.
        """
        self._trt, self._engine = trt, engine
        self._portable, self._cuda_graph = portable, cuda_graph
        self._memory = cudart.DeviceMemory(engine.device_memory_size_v2)

    def create_context(self) -> Any:
        """Return a new execution context. Raises CudaError."""
        context = self._engine.create_execution_context(self._settings())
        if context is None:
            raise cudart.CudaError(logger(self._trt).reason())
        context.set_device_memory(self._memory.pointer, self._memory.num_bytes)
        return context

    def _settings(self) -> Any:
        """Return the settings of a context, whose memory is the shared one."""
        trt, strategy = self._trt, self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self._portable:
            return strategy
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        # By default it replaces kernels during the run, and the parity gate would have judged
        # others than those that compute the results.
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
        """Binds the memory of each input and output, by name. Raises CudaError."""
        self._context, self._image_shape, self._size = context, image_shape, 0
        for name, buffer in memory.items():
            if not context.set_tensor_address(name, buffer.pointer):
                raise cudart.CudaError(f"TensorRT did not accept the memory of {name}")

    def enqueue(self, size: int, stream: cudart.Stream) -> None:
        """Run a batch of `size` images in the stream's turn. Raises CudaError."""
        if size != self._size:
            self._size = 0
            if not self._context.set_input_shape("images", (size, *self._image_shape)):
                raise cudart.CudaError(f"TensorRT did not accept a batch of {size}")
            self._size = size
        if not self._context.execute_async_v3(int(stream.handle)):
            raise cudart.CudaError(f"TensorRT did not run a batch of {size}")


class Slot:
    """One of two sets of buffers: while the GPU works on one, the host fills the other."""

    def __init__(self, plan: Plan, shapes: Mapping[str, tuple[int, ...]], max_batch: int) -> None:
        """Allocates for `max_batch` images.

        Args:
            plan: the plan to run.
            shapes: the shape of an image (`images`) and of each output, without the batch.
            max_batch: the largest number of images.
        """
        outputs = {name: shape for name, shape in shapes.items() if name != "images"}
        self._plan, self._image_shape, self._max_batch = plan, shapes["images"], max_batch
        self.images = cudart.DeviceMemory(max_batch * prod(self._image_shape))
        self.outputs = {
            name: cudart.DeviceMemory(4 * max_batch * prod(shape))
            for name, shape in outputs.items()
        }
        self.host = {
            name: cudart.pinned((max_batch, *shape), np.float32) for name, shape in outputs.items()
        }
        self.uploaded, self.done = cudart.Event(), cudart.Event()
        self.context = self._bound_context()
        self._graph_context: BoundContext | None = None
        self.graph: Any = None

    def record(self, size: int, stream: cudart.Stream) -> None:
        """Record a batch of `size` images as a CUDA graph. Raises CudaError.

        It has a context of its own, which nothing else uses: NVIDIA advises one context per graph,
        as another shape changes the state that the graph relies on
        (https://github.com/NVIDIA/TensorRT/issues/3798).
        """
        self._graph_context = context = self._bound_context()
        context.enqueue(size, stream)  # the first run does what cannot be recorded
        self.graph = stream.recorded(partial(context.enqueue, size, stream))

    def _bound_context(self) -> BoundContext:
        memory = {"images": self.images, **self.outputs}
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
        """Allocates buffers.

        Args:
            plan: the plan to run.
            shapes: sizes of `images` and of each output, without the batch.
            profile: the batches that the plan was built for.
            cuda_graph: record batches of `opt` once and replay them.

        Raises:
            CudaError: for example, the GPU has too little memory.
        """
        self._shapes, self._profile = shapes, profile
        self._copies, self._kernels = cudart.Stream(), cudart.Stream()
        self._slots = (Slot(plan, shapes, profile.max), Slot(plan, shapes, profile.max))
        if cuda_graph:
            for slot in self._slots:
                slot.record(profile.opt, self._kernels)

    def run(self, images: Pixels) -> Outputs:
        """Runs a batch of any size. Raises CudaError where the GPU fails."""
        features, logits = self._run(images, ("features", "logits"))
        return features, logits

    def run_mask(self, images: Pixels) -> NDArray[np.float32]:
        """Returns the lesion's probabilities [n, h, w] of a plan with the optional output `mask`."""
        return self._run(images, ("mask",))[0]

    def allocate(self, shape: tuple[int, int, int, int]) -> Pixels:
        """Returns uint8 memory from which `run` copies to the GPU without a copy on the host first."""
        return cudart.pinned(shape, np.uint8)

    def _run(self, images: Pixels, names: Sequence[str]) -> list[NDArray[np.float32]]:
        assert images.dtype == np.uint8 and images.shape[1:] == self._shapes["images"], (
            images.dtype,
            images.shape,
        )
        results = [np.empty((len(images), *self._shapes[name]), np.float32) for name in names]
        flying: deque[tuple[Slot, slice]] = deque()

        def land() -> None:
            slot, piece = flying.popleft()
            slot.done.wait()
            for name, result in zip(names, results, strict=True):
                result[piece] = slot.host[name][: piece.stop - piece.start]

        try:
            for piece, slot in zip(self._profile.pieces(len(images)), cycle(self._slots)):
                if len(flying) == len(self._slots):
                    land()
                self._launch(slot, images[piece], names)
                flying.append((slot, piece))
            while flying:
                land()
        finally:  # after an error too, no copy may still read memory that is about to be reused
            self._copies.wait()
            self._kernels.wait()
        return results

    def _launch(self, slot: Slot, images: Pixels, names: Sequence[str]) -> None:
        """Gives the GPU a piece: copy in, compute, copy out. Returns at once."""
        num_images = len(images)
        if not cudart.is_pinned(images):
            slot.staging[:num_images] = images
            images = slot.staging[:num_images]
        # Images of an earlier piece pad the batch, and nobody reads their outputs.
        self._copies.upload(slot.images, images)
        self._copies.record(slot.uploaded)
        self._kernels.wait_for(slot.uploaded)
        size = self._profile.padded(num_images)
        if slot.graph is not None and size == self._profile.opt:
            self._kernels.replay(slot.graph)
        else:
            slot.context.enqueue(size, self._kernels)
        for name in names:
            self._kernels.download(slot.host[name][:num_images], slot.outputs[name])
        self._kernels.record(slot.done)


def create(path: Path, manifest: Mapping[str, Any], device: str) -> TensorRTEngine:
    """Opens a plan on the current GPU.

    Raises:
        UserError: the plan is for another library, version or GPU, has not passed the parity gate, is damaged or not
            of the contract; or the library, CUDA Python or a GPU is missing. Nothing of this touches the GPU but
            the last step.
    """
    flavour, again = (
        manifest["format"],
        f"build it again with `{export_command(path, manifest)} --force`",
    )
    trt = import_runtime(flavour)
    check_manifest(path, manifest, trt.__version__, again)
    if device == "cpu":
        raise UserError(
            f"{path} is a {FLAVOURS[flavour].title} plan and runs on a GPU; use --device cuda"
        )
    data = path.read_bytes()
    runtime = trt.Runtime(logger(trt))
    check_header(trt, runtime, path, data, again)
    here = cudart.architecture()
    check_gpu(flavour, trt, here)
    check_architecture(path, manifest["plan"]["architectures"], here, again)
    runtime.engine_host_code_allowed = manifest["plan"][
        "version_compatible"
    ]  # such a plan brings its own runtime
    engine = deserialize(trt, runtime, path, data, again)
    shapes, profile = check_engine(trt, engine, path, manifest["preprocess"]["size"], again)
    cuda_graph = manifest["plan"]["cuda_graph"]
    try:
        portable = FLAVOURS[flavour].portable
        plan = Plan(trt, engine, portable, cuda_graph)
        return TensorRTEngine(plan, shapes, profile, cuda_graph and not portable)
    except cudart.CudaError as error:
        raise UserError(
            f"{path} does not run on this GPU ({error}); {again} and a smaller --max_batch"
        ) from None


def export_command(path: Path, manifest: Mapping[str, Any]) -> str:
    """Returns the command whose artifact a plan is."""
    flags = {"config": "name", "fold": "fold", "formats": "format", "precision": "precision"}
    given = [f"--{flag} {manifest[key]}" for flag, key in flags.items() if key in manifest]
    if path.parent.name.startswith("fold_"):
        given.insert(1, f"--model_dir {path.parent.parent}")
    return " ".join(("python -m export", *given))


def check_manifest(path: Path, manifest: Mapping[str, Any], version: str, again: str) -> None:
    """Raises UserError where the manifest says that this library's version may not run the plan, or nobody gated it."""
    plan = manifest.get("plan")
    if plan is None:
        raise UserError(f"the manifest of {path} does not say what the plan was built for; {again}")
    built, here = (tuple(map(int, text.split(".")[:3])) for text in (plan["version"], version))
    fits = (
        built[0] == here[0] and built <= here
        if plan["version_compatible"]
        else plan["version"] == version
    )
    if not fits:
        title = FLAVOURS[manifest["format"]].title
        raise UserError(
            f"{path} was built by {title} {plan['version']}, and here is {version}; {again}"
        )
    if "parity" in manifest and manifest["parity"] is None:
        raise UserError(
            f"{path} has not passed the parity gate, for want of a GPU where it was built; gate it here with "
            f"`{export_command(path, manifest)} --check`"
        )


def check_gpu(flavour: str, trt: ModuleType, architecture: str) -> None:
    """Raise UserError if a flavour cannot run these models on a GPU (`sm90`), whatever the plan.

    TensorRT-RTX lists the GPUs that it is for; not all from Ampere on are among them.
    """
    if not FLAVOURS[flavour].portable:
        return
    title, known = FLAVOURS[flavour].title, trt.ComputeCapability.__members__
    if architecture == TURING:
        raise UserError(
            f"{title} has no matrix product in float32 on {TURING} (Turing), and each model ends "
            "with one; use another format there"
        )
    if architecture.upper() not in known:
        names = [name.lower() for name in known if name.startswith("SM") and name.lower() != TURING]
        raise UserError(
            f"{title} runs on {', '.join(names)}, and not on {architecture}; use another format there"
        )


def check_architecture(path: Path, architectures: Sequence[str], here: str, again: str) -> None:
    """Raises UserError where a plan's architectures do not include this GPU's (`sm89`)."""
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
"""What TensorRT-RTX reads in a plan's header, in words."""


def check_header(trt: ModuleType, runtime: Any, path: Path, plan: bytes, again: str) -> None:
    """Raises UserError for what TensorRT-RTX finds wrong in a plan's header; TensorRT has no such look."""
    if not hasattr(runtime, "get_engine_validity"):
        return
    _, found = runtime.get_engine_validity(plan)
    for name, words in INVALID.items():
        if int(found) & int(getattr(trt.EngineInvalidityDiagnostics, name)):
            raise UserError(f"{path} {words}; {again}")


def deserialize(trt: ModuleType, runtime: Any, path: Path, plan: bytes, again: str) -> Any:
    """Returns TensorRT's engine of a plan's bytes. Raises UserError with TensorRT's reason."""
    logger(trt).errors.clear()
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise UserError(f"{path} does not load ({logger(trt).reason()}); {again}")
    return engine


def check_engine(
    trt: ModuleType, engine: Any, path: Path, size: int, again: str
) -> tuple[dict[str, tuple[int, ...]], Profile]:
    """Returns the sizes of each input and output without the batch, and the profile.

    Raises:
        UserError: other names, types or sizes than the contract's.
    """
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    shapes = {name: tuple(engine.get_tensor_shape(name))[1:] for name in names}
    types = {name: engine.get_tensor_dtype(name) for name in names}
    expected = dict.fromkeys(names, trt.DataType.FLOAT) | {"images": trt.DataType.UINT8}
    if not {"images", "features", "logits"} <= set(names) or types != expected:
        found = ", ".join(f"{name} {dtype.name}" for name, dtype in types.items())
        raise UserError(
            f"{path} has {found}, not images UINT8, features FLOAT and logits FLOAT; {again}"
        )
    if shapes["images"] != (size, size, 3):
        raise UserError(
            f"{path} takes images {list(shapes['images'])}, not [{size}, {size}, 3]; {again}"
        )
    batches = [int(shape[0]) for shape in engine.get_tensor_profile_shape("images", 0)]
    return shapes, Profile(*batches)
