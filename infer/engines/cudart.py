"""The part of CUDA that an engine needs: the GPU's architecture, memory, streams and events.

Calls go to NVIDIA's CUDA Python (the package `cuda-bindings`), so that an engine needs no torch.
"""

import weakref
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from isic.preprocess import Pixels
from isic.runtime.errors import UserError
from isic.runtime.machine import REPAIR_DRIVER, cuda_version, driver_for, no_gpu_reason


class CudaError(RuntimeError):
    """A CUDA call failed; the message names the call and CUDA's reason."""


@cache
def runtime() -> ModuleType:
    """Return CUDA Python's module of the CUDA runtime. Raises UserError if it is not installed."""
    try:
        return import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise UserError(
            f"CUDA Python does not load ({error}); install it with `pip install cuda-bindings`"
        ) from None


def call(function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
    """Call a function of the CUDA runtime; returns its value, if it has one. Raises CudaError."""
    status, *values = function(*arguments)
    check_status(function, status)
    return values[0] if values else None


def check_status(function: Callable[..., tuple[Any, ...]], status: Any) -> None:
    """Raise CudaError if the status that a function of the CUDA runtime returned is an error."""
    if int(status) != 0:
        # Reading the error clears it; otherwise another library would report it as its own.
        runtime().cudaGetLastError()
        raise CudaError(f"{getattr(function, '__name__', function)} failed: {_reason(status)}")


def _reason(status: Any) -> str:
    _, text = runtime().cudaGetErrorString(status)
    return text.decode() if isinstance(text, bytes) else str(text)


def architecture() -> str:
    """Return the architecture of the current GPU: `sm89` for compute capability 8.9.

    Raises:
        UserError: CUDA Python is not installed, its driver is too old, or there is no GPU that
            CUDA can use.
    """
    cuda = runtime()
    status, count = cuda.cudaGetDeviceCount()
    if int(status) != 0 or not count:
        check_driver()
        found = _reason(status) if int(status) else "no device"
        reason = no_gpu_reason() or f"CUDA finds no GPU ({found}); {REPAIR_DRIVER}"
        raise UserError(f"TensorRT does not run here: {reason}, or use the format onnx")
    device = call(cuda.cudaGetDevice)
    attributes = cuda.cudaDeviceAttr
    major = call(cuda.cudaDeviceGetAttribute, attributes.cudaDevAttrComputeCapabilityMajor, device)
    minor = call(cuda.cudaDeviceGetAttribute, attributes.cudaDevAttrComputeCapabilityMinor, device)
    return f"sm{major}{minor}"


def check_driver() -> None:
    """Raise UserError if the NVIDIA driver is older than the installed CUDA runtime.

    CUDA itself gives the same reason if there is no driver at all, whose version reads 0.
    """
    cuda = runtime()
    _, driver = cuda.cudaDriverGetVersion()
    _, library = cuda.cudaRuntimeGetVersion()
    if 0 < driver // 1000 < library // 1000:
        major = driver // 1000
        newest = cuda_version(library)
        raise UserError(
            f"the NVIDIA driver is for CUDA {cuda_version(driver)}, which is too old for the "
            f"installed CUDA runtime {newest}; install {driver_for(newest)}, or "
            f'run `pip install "cuda-bindings<{major + 1}"` and replace TensorRT by '
            f"tensorrt-cu{major}, or TensorRT-RTX by tensorrt_rtx_cu{major}"
        )


def built_for() -> str | None:
    """Return the CUDA that CUDA Python was built for (`13.0`), None if it does not load."""
    try:
        _, number = runtime().cudaRuntimeGetVersion()
    except UserError:
        return None
    return cuda_version(number)


class Pinned:
    """Page-locked host memory, from which the GPU copies faster and asynchronously.

    It is freed with the last array on it.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        cuda = runtime()
        self._dtype = np.dtype(dtype)
        size = max(int(np.prod(shape)) * self._dtype.itemsize, 1)
        self._pointer = int(call(cuda.cudaHostAlloc, size, cuda.cudaHostAllocDefault))
        self._shape = shape
        weakref.finalize(self, cuda.cudaFreeHost, self._pointer)

    # numpy keeps the object that gave it this interface alive, and so the memory.
    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self._shape,
            "typestr": self._dtype.str,
            "data": (self._pointer, False),
            "version": 3,
        }


def pinned(shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    """Return an uninitialised array in page-locked memory; any view of it keeps the memory."""
    return np.asarray(Pinned(shape, dtype))


def is_pinned(images: Pixels) -> bool:
    """Return whether the GPU can copy straight from an array: it is page-locked and contiguous."""
    first = images.ctypes.data
    # The last byte too: memory is locked in whole pages, which other arrays may begin in.
    ends = (first, first + images.nbytes - 1)
    return bool(images.flags.c_contiguous and all(map(_is_locked, ends)))


def _is_locked(pointer: int) -> bool:
    cuda = runtime()
    status, attributes = cuda.cudaPointerGetAttributes(pointer)
    return bool(int(status) == 0 and attributes.type == cuda.cudaMemoryType.cudaMemoryTypeHost)


class DeviceMemory:
    """GPU memory, aligned to 256 bytes as TensorRT requires; freed with the object."""

    def __init__(self, num_bytes: int) -> None:
        cuda = runtime()
        self.num_bytes = num_bytes
        self.pointer = int(call(cuda.cudaMalloc, max(num_bytes, 1)))
        weakref.finalize(self, cuda.cudaFree, self.pointer)


class Stream:
    """A CUDA stream that does not synchronise with the default one."""

    def __init__(self) -> None:
        cuda = runtime()
        self.handle = call(cuda.cudaStreamCreateWithFlags, cuda.cudaStreamNonBlocking)
        weakref.finalize(self, cuda.cudaStreamDestroy, self.handle)

    def upload(self, target: DeviceMemory, source: np.ndarray[Any, Any]) -> None:
        """Enqueues a copy of a contiguous array to the GPU."""
        cuda = runtime()
        kind = cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        call(
            cuda.cudaMemcpyAsync,
            target.pointer,
            source.ctypes.data,
            source.nbytes,
            kind,
            self.handle,
        )

    def download(self, target: np.ndarray[Any, Any], source: DeviceMemory) -> None:
        """Enqueues a copy from the GPU into a contiguous array."""
        cuda = runtime()
        kind = cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        call(
            cuda.cudaMemcpyAsync,
            target.ctypes.data,
            source.pointer,
            target.nbytes,
            kind,
            self.handle,
        )

    def record(self, event: "Event") -> None:
        """Record `event` after the work enqueued so far."""
        call(runtime().cudaEventRecord, event.handle, self.handle)

    def wait_for(self, event: "Event") -> None:
        """Make work enqueued from now on wait for `event`; the host does not wait."""
        call(runtime().cudaStreamWaitEvent, self.handle, event.handle, 0)

    def wait(self) -> None:
        """Wait on the host until the stream has done all its work. Raises CudaError."""
        call(runtime().cudaStreamSynchronize, self.handle)

    def recorded(self, enqueue: Callable[[], None]) -> Any:
        """Return the CUDA graph of the work that `enqueue` adds to this stream; runs nothing.

        Raises:
            CudaError: the work cannot be recorded; the stream is still usable.
        """
        cuda = runtime()
        self.wait()
        mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call(cuda.cudaStreamBeginCapture, self.handle, mode)
        try:
            enqueue()
        finally:  # also after an error: a stream that stays in capture refuses all later calls
            status, graph = cuda.cudaStreamEndCapture(self.handle)
            if int(status) == 0:
                weakref.finalize(self, cuda.cudaGraphDestroy, graph)
        check_status(cuda.cudaStreamEndCapture, status)
        executable = call(cuda.cudaGraphInstantiate, graph, 0)
        weakref.finalize(self, cuda.cudaGraphExecDestroy, executable)
        return executable

    def replay(self, graph: Any) -> None:
        """Enqueues a run of a recorded graph."""
        call(runtime().cudaGraphLaunch, graph, self.handle)


class Event:
    """A CUDA event: a point in a stream that other streams and the host can wait for."""

    def __init__(self) -> None:
        cuda = runtime()
        # A thread that waits for a blocking event sleeps; otherwise it would take a core.
        flags = cuda.cudaEventDisableTiming | cuda.cudaEventBlockingSync
        self.handle = call(cuda.cudaEventCreateWithFlags, flags)
        weakref.finalize(self, cuda.cudaEventDestroy, self.handle)

    def wait(self) -> None:
        """Wait on the host for the work before the event. Raises CudaError if any of it failed."""
        call(runtime().cudaEventSynchronize, self.handle)
