"""TensorRT plans in memory: their batch sizes, their execution contexts and compiled kernels."""

from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from infer.engines import cudart
from infer.engines.contract import IMAGES, Tensor
from infer.engines.cudart import CudaError
from isic.runtime.errors import UserError
from isic.runtime.files import atomic_path


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


def common_profile(profiles: Collection[Profile]) -> Profile | None:
    """Return the batch sizes that several plans run, None if there are none."""
    smallest = max(profile.min for profile in profiles)
    largest = min(profile.max for profile in profiles)
    if smallest > largest:
        return None
    best = min(profile.opt for profile in profiles)
    return Profile(smallest, min(max(best, smallest), largest), largest)


class KernelCache:
    """The kernels that TensorRT-RTX has compiled on this machine, kept in a file.

    Without it, each start compiles the kernels of each batch size again. The library refuses the
    bytes of another GPU or version, and damaged ones; the file is then replaced.
    """

    def __init__(self, config: Any, path: Path) -> None:
        """Read the file, if there is one, and let the contexts of `config` use its kernels.

        CUDA must have been used before: the library compares the file with the current GPU.

        Args:
            config: TensorRT-RTX's runtime configuration.
            path: the file; it is trusted like the plan.
        """
        self._path = path
        self._cache = config.create_runtime_cache()
        config.set_runtime_cache(self._cache)
        self._saved = b""
        with suppress(OSError):  # no file yet, or not ours to read
            self._saved = path.read_bytes()
            self._cache.deserialize(self._saved)

    def save(self) -> None:
        """Write the file if there are new kernels; a folder that is read-only is no error."""
        content = self._cache.serialize()
        kernels = self._saved if content is None else bytes(content)
        if kernels == self._saved:
            return
        with suppress(UserError), atomic_path(self._path) as temporary:
            temporary.write_bytes(kernels)
        self._saved = kernels  # also if it was not written, so that it is tried once


@dataclass(frozen=True)
class PlanSettings:
    """How the execution contexts of a plan are created."""

    cuda_graph: bool
    """Replay a CUDA graph of full batches."""
    portable: bool = False
    """Whether the flavour compiles kernels on the machine that runs the plan, and records CUDA
    graphs by itself."""
    kernels: Path | None = None
    """The file that keeps such kernels."""


class Plan:
    """A loaded plan. Its execution contexts run on memory that the caller gives them."""

    def __init__(
        self,
        trt: ModuleType,
        engine: Any,
        tensors: Mapping[str, Tensor],
        profile: Profile,
        settings: PlanSettings,
    ) -> None:
        """Describe the plan.

        Args:
            trt: the Python module of the flavour.
            engine: TensorRT's engine of the plan.
            tensors: type and shape of each input and output.
            profile: the batch sizes that it was built for.
            settings: of its contexts.
        """
        self._trt = trt
        self._engine = engine
        self._settings = settings
        self.profile = profile
        self.shapes = {name: _without_batch(tensor) for name, tensor in tensors.items()}
        self.dtypes = {name: np.dtype(tensor.dtype) for name, tensor in tensors.items()}
        self.scratch_bytes = int(engine.device_memory_size_v2)
        self.records_graph = settings.cuda_graph and not settings.portable
        """Whether a CUDA graph is to be recorded for it."""
        self._kernels: KernelCache | None = None
        self._config: Any = None

    def create_context(
        self, scratch: cudart.DeviceMemory, buffers: Mapping[str, cudart.DeviceMemory]
    ) -> "BoundContext":
        """Return a new execution context.

        Args:
            scratch: memory for intermediate results, at least `scratch_bytes`. Contexts may share
                it if they run one after another.
            buffers: the memory of each input and output by name, for `profile.max` images.

        Raises:
            CudaError: for example, the GPU has too little memory.
        """
        context = self._engine.create_execution_context(self._context_settings())
        if context is None:
            raise CudaError(f"TensorRT creates no context: {self.reason()}")
        if hasattr(context, "nvtx_verbosity"):  # marks for a profiler cost time
            context.nvtx_verbosity = self._trt.ProfilingVerbosity.NONE
        context.set_device_memory(scratch.pointer, scratch.num_bytes)
        return BoundContext(self, context, scratch, buffers)

    def image_bytes(self, name: str) -> int:
        """Return the size of an input or output per image, bytes."""
        return prod(self.shapes[name]) * self.dtypes[name].itemsize

    def reason(self) -> str:
        """Return TensorRT's reason for its last refusal."""
        reason: str = logger(self._trt).reason()
        return reason

    def save_kernels(self) -> None:
        """Keep the kernels that were compiled for the batch sizes so far, if the flavour does so."""
        if self._kernels is not None:
            self._kernels.save()

    def _context_settings(self) -> Any:
        """Return the settings of a context that uses the caller's memory."""
        if not self._settings.portable:
            return self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._config is None:
            self._config = self._create_config()
        return self._config

    def _create_config(self) -> Any:
        """Return TensorRT-RTX's configuration of all contexts of the plan."""
        trt = self._trt
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        # By default TensorRT-RTX replaces kernels in the background while it runs, so the results
        # would come from other kernels than those that the parity check has seen.
        config.dynamic_shapes_kernel_specialization_strategy = (
            trt.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        if self._settings.cuda_graph:
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if self._settings.kernels is not None:
            self._kernels = KernelCache(config, self._settings.kernels)
            logger(trt).errors.clear()  # of a file that TensorRT-RTX refuses
        return config


def _without_batch(tensor: Tensor) -> tuple[int, ...]:
    return tuple(size for size in tensor.shape[1:] if size is not None)


class BoundContext:
    """An execution context that always reads and writes the same memory."""

    def __init__(
        self,
        plan: Plan,
        context: Any,
        scratch: cudart.DeviceMemory,
        buffers: Mapping[str, cudart.DeviceMemory],
    ) -> None:
        """Bind the memory of each input and output by name. Raises CudaError."""
        self._plan = plan
        self._context = context
        self._memory = (scratch, buffers)  # must live as long as the context
        self._size = 0
        for name, buffer in buffers.items():
            if not context.set_tensor_address(name, buffer.pointer):
                raise CudaError(f"TensorRT did not accept the memory of {name}: {plan.reason()}")

    def enqueue(self, size: int, stream: cudart.Stream) -> None:
        """Add a run of `size` images to the stream. Raises CudaError."""
        if size != self._size:
            self._size = 0  # stays 0 if TensorRT refuses the new shape
            if not self._context.set_input_shape(IMAGES, (size, *self._plan.shapes[IMAGES])):
                raise CudaError(f"TensorRT did not accept a batch of {size}: {self._plan.reason()}")
            self._size = size
        if not self._context.execute_async_v3(int(stream.handle)):
            raise CudaError(f"TensorRT did not run a batch of {size}: {self._plan.reason()}")
