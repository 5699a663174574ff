"""A stand-in for the CUDA runtime and for a TensorRT context, for the one thing a machine without a GPU cannot have.

It keeps what CUDA promises and no more: a stream does its work in order, at any time until somebody waits for it, and
two streams know nothing of each other but by events. Work is put off as long as may be (or, with `eager_copies`, copies
to the GPU run as early as may be), so that a wait that is missing, or memory that is used again too early, gives wrong
numbers and not a lucky run.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np

Work = Callable[[], None]
SUCCESS = 0
POISON = 0xCD


@dataclass
class FakeEvent:
    stream: "FakeStream | None" = None
    position: int = 0


@dataclass(eq=False)
class FakeStream:
    """Work in order; `done` of it has run."""

    number: int
    work: list[Work] = field(default_factory=list)
    done: int = 0
    recording: list[Work] | None = None

    def __int__(self) -> int:
        return self.number

    def add(self, work: Work) -> None:
        (self.work if self.recording is None else self.recording).append(work)

    def run(self, until: int) -> None:
        while self.done < until:
            self.done += 1
            self.work[self.done - 1]()


class Kind(Enum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class FakeCuda:
    """The functions of `cuda.bindings.runtime` that the engine calls, on ordinary memory."""

    cudaHostAllocDefault = cudaStreamNonBlocking = cudaEventDisableTiming = 0
    cudaMemcpyKind = Kind
    cudaMemoryType = SimpleNamespace(cudaMemoryTypeHost=1)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self, eager_copies: bool = False) -> None:
        self.eager_copies = eager_copies
        self.host: dict[int, Any] = {}
        self.device: dict[int, Any] = {}
        self.streams: dict[int, FakeStream] = {}
        self.replays = 0

    def _allocate(self, memory: dict[int, Any], size: int) -> tuple[int, int]:
        array = np.full(size, POISON, np.uint8)
        memory[array.ctypes.data] = array
        return SUCCESS, array.ctypes.data

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[int, int]:
        return self._allocate(self.host, size)

    def cudaMalloc(self, size: int) -> tuple[int, int]:
        return self._allocate(self.device, size)

    def cudaFreeHost(self, pointer: int) -> tuple[int]:
        del self.host[pointer]
        return (SUCCESS,)

    def cudaFree(self, pointer: int) -> tuple[int]:
        del self.device[pointer]
        return (SUCCESS,)

    def cudaPointerGetAttributes(self, pointer: int) -> tuple[int, Any]:
        is_host = any(start <= pointer < start + array.size for start, array in self.host.items())
        return SUCCESS, SimpleNamespace(type=1 if is_host else 0)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, FakeStream]:
        stream = FakeStream(1 + len(self.streams))
        self.streams[stream.number] = stream
        return SUCCESS, stream

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[int, FakeEvent]:
        return SUCCESS, FakeEvent()

    def cudaStreamDestroy(self, stream: FakeStream) -> tuple[int]:
        return (SUCCESS,)

    def cudaEventDestroy(self, event: FakeEvent) -> tuple[int]:
        return (SUCCESS,)

    def cudaGraphExecDestroy(self, graph: list[Work]) -> tuple[int]:
        return (SUCCESS,)

    def cudaEventRecord(self, event: FakeEvent, stream: FakeStream) -> tuple[int]:
        event.stream, event.position = stream, len(stream.work)
        return (SUCCESS,)

    def cudaStreamWaitEvent(self, stream: FakeStream, event: FakeEvent, flags: int) -> tuple[int]:
        before, until = event.stream, event.position
        stream.add(lambda: before.run(until) if before else None)
        return (SUCCESS,)

    def cudaEventSynchronize(self, event: FakeEvent) -> tuple[int]:
        if event.stream:
            event.stream.run(event.position)
        return (SUCCESS,)

    def cudaStreamSynchronize(self, stream: FakeStream) -> tuple[int]:
        stream.run(len(stream.work))
        return (SUCCESS,)

    def cudaMemcpyAsync(
        self, target: int, source: int, count: int, kind: Kind, stream: FakeStream
    ) -> tuple[int]:
        for pointer, memory in ((target, self.device), (source, self.host)):
            on_device = memory if kind is Kind.cudaMemcpyHostToDevice else self._other(memory)
            assert _holds(on_device, pointer, count), (
                "a copy must lie in memory of its kind, host memory page-locked"
            )
        stream.add(lambda: ctypes.memmove(target, source, count) and None)
        if self.eager_copies and kind is Kind.cudaMemcpyHostToDevice:
            stream.run(len(stream.work))
        return (SUCCESS,)

    def _other(self, memory: dict[int, Any]) -> dict[int, Any]:
        return self.host if memory is self.device else self.device

    def cudaStreamBeginCapture(self, stream: FakeStream, mode: int) -> tuple[int]:
        stream.recording = []
        return (SUCCESS,)

    def cudaStreamEndCapture(self, stream: FakeStream) -> tuple[int, list[Work]]:
        recorded, stream.recording = stream.recording, None
        assert recorded
        return SUCCESS, recorded

    def cudaGraphInstantiate(self, graph: list[Work], flags: int) -> tuple[int, list[Work]]:
        return SUCCESS, graph

    def cudaGraphLaunch(self, graph: list[Work], stream: FakeStream) -> tuple[int]:
        self.replays += 1
        stream.work.extend(graph)
        return (SUCCESS,)


def _holds(memory: dict[int, Any], pointer: int, count: int) -> bool:
    return any(
        start <= pointer and pointer + count <= start + array.size
        for start, array in memory.items()
    )


def as_array(pointer: int, shape: tuple[int, ...], dtype: type) -> np.ndarray[Any, Any]:
    """Returns the array that lies at an address."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * size).from_address(pointer), dtype).reshape(shape)


class FakeContext:
    """A TensorRT execution context whose network is a function of images [n, H, W, 3]."""

    def __init__(
        self, cuda: FakeCuda, network: Callable[[Any], dict[str, Any]], max_batch: int
    ) -> None:
        self._cuda, self._network, self._max_batch = cuda, network, max_batch
        self._addresses: dict[str, int] = {}
        self._shape: tuple[int, ...] = ()
        self.batches: list[int] = []
        """The batch of each run or recording."""

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shape = shape
        return name == "images" and 1 <= shape[0] <= self._max_batch

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        self._addresses[name] = pointer
        return True

    def execute_async_v3(self, stream: int) -> bool:
        addresses, shape = dict(self._addresses), self._shape
        self.batches.append(shape[0])

        def work() -> None:
            for name, values in self._network(
                as_array(addresses["images"], shape, np.uint8)
            ).items():
                as_array(addresses[name], values.shape, np.float32)[:] = values

        self._cuda.streams[stream].add(work)
        return True
