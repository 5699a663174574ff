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
from isic.errors import UserError
from isic.preprocess import Pixels


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


def works(flavour: str, device: str = "cuda") -> str | None:
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


class Slot:
    """One of two sets of buffers: while the GPU works on one, the host fills the other."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], max_batch: int) -> None:
        """Allocates for `max_batch` images; `shapes` are an image's (`images`) and the outputs', without the batch."""
        image, outputs = (
            shapes["images"],
            {name: shape for name, shape in shapes.items() if name != "images"},
        )
        self._staging_shape = (max_batch, *image)
        self.images = cudart.DeviceMemory(max_batch * prod(image))
        self.outputs = {
            name: cudart.DeviceMemory(4 * max_batch * prod(shape))
            for name, shape in outputs.items()
        }
        self.host = {
            name: cudart.pinned((max_batch, *shape), np.float32) for name, shape in outputs.items()
        }
        self.uploaded, self.done = cudart.Event(), cudart.Event()
        self.graph: Any = None

    @cached_property
    def staging(self) -> Pixels:
        """Page-locked memory for images that are not in such memory already."""
        return cudart.pinned(self._staging_shape, np.uint8)


class TensorRTEngine:
    """A plan in an execution context, with two slots and two streams. One thread at a time may use it."""

    device = "cuda"

    def __init__(
        self,
        context: Any,
        shapes: Mapping[str, tuple[int, ...]],
        profile: Profile,
        cuda_graph: bool,
    ) -> None:
        """Allocates buffers.

        Args:
            context: TensorRT's execution context of the plan.
            shapes: sizes of `images` and of each output, without the batch.
            profile: the batches that the plan was built for.
            cuda_graph: record batches of `opt` once and replay them.

        Raises:
            CudaError: out of memory, say.
        """
        self._context, self._shapes, self._profile = context, shapes, profile
        self._slots = (Slot(shapes, profile.max), Slot(shapes, profile.max))
        self._copies, self._kernels = cudart.Stream(), cudart.Stream()
        if cuda_graph:
            for slot in self._slots:
                self._enqueue(slot, profile.opt)  # the first run does what may not be recorded
                slot.graph = self._kernels.recorded(partial(self._enqueue, slot, profile.opt))

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

        for piece, slot in zip(self._profile.pieces(len(images)), cycle(self._slots)):
            if len(flying) == len(self._slots):
                land()
            self._launch(slot, images[piece], names)
            flying.append((slot, piece))
        while flying:
            land()
        return results

    def _launch(self, slot: Slot, images: Pixels, names: Sequence[str]) -> None:
        """Gives the GPU a piece: copy in, compute, copy out. Returns at once."""
        num_images = len(images)
        if not cudart.is_pinned(images):
            slot.staging[:num_images] = images
            images = slot.staging[:num_images]
        self._copies.upload(
            slot.images, images
        )  # what pads it is an earlier piece's images, and nobody reads that
        self._copies.record(slot.uploaded)
        self._kernels.wait_for(slot.uploaded)
        size = self._profile.padded(num_images)
        if slot.graph is not None and size == self._profile.opt:
            self._kernels.replay(slot.graph)
        else:
            self._enqueue(slot, size)
        for name in names:
            self._kernels.download(slot.host[name][:num_images], slot.outputs[name])
        self._kernels.record(slot.done)

    def _enqueue(self, slot: Slot, size: int) -> None:
        context = self._context
        accepted = context.set_input_shape("images", (size, *self._shapes["images"]))
        for name, memory in {"images": slot.images, **slot.outputs}.items():
            accepted = accepted and context.set_tensor_address(name, memory.pointer)
        if not (accepted and context.execute_async_v3(int(self._kernels.handle))):
            raise cudart.CudaError(f"TensorRT did not run a batch of {size}")


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
    plan = path.read_bytes()
    runtime = trt.Runtime(logger(trt))
    check_header(trt, runtime, path, plan, again)
    here = cudart.architecture()
    check_gpu(flavour, trt, here)
    check_architecture(path, manifest["plan"]["architectures"], here, again)
    runtime.engine_host_code_allowed = manifest["plan"][
        "version_compatible"
    ]  # such a plan brings its own runtime
    engine = deserialize(trt, runtime, path, plan, again)
    shapes, profile = check_engine(trt, engine, path, manifest["preprocess"]["size"], again)
    cuda_graph = manifest["plan"]["cuda_graph"]
    try:
        context = create_context(trt, engine, FLAVOURS[flavour].portable, cuda_graph)
        return TensorRTEngine(
            context, shapes, profile, cuda_graph and not FLAVOURS[flavour].portable
        )
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


def check_gpu(flavour: str, trt: ModuleType, here: str) -> None:
    """Raises UserError where a flavour has no kernels for this GPU (`sm90`) at all, whatever a plan was built for.

    TensorRT-RTX lists the GPUs that it is for; not all from Ampere on are among them.
    """
    if FLAVOURS[flavour].portable and here.upper() not in trt.ComputeCapability.__members__:
        known = ", ".join(
            name.lower() for name in trt.ComputeCapability.__members__ if name.startswith("SM")
        )
        raise UserError(
            f"{FLAVOURS[flavour].title} runs on {known}, and this GPU is {here}; use another format"
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


def create_context(trt: ModuleType, engine: Any, portable: bool, cuda_graph: bool) -> Any:
    """Returns an execution context, for TensorRT-RTX with kernels that stay the same. Raises CudaError."""
    if not portable:
        return _made(trt, engine.create_execution_context())
    config = engine.create_runtime_config()
    # Left to itself it changes kernels under way, and the parity gate would have seen others than those that go on.
    config.dynamic_shapes_kernel_specialization_strategy = (
        trt.DynamicShapesKernelSpecializationStrategy.EAGER
    )
    if cuda_graph:
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    return _made(trt, engine.create_execution_context(config))


def _made(trt: ModuleType, context: Any) -> Any:
    if context is None:
        raise cudart.CudaError(logger(trt).reason())
    return context
