"""A fake CUDA runtime and fake TensorRT execution contexts, stricter than the real ones.

Tests without a GPU run the engine on them. Undefined behaviour of CUDA or TensorRT is an error:

- Two unordered pieces of work on the same memory, of which one writes. A stream does its work in
  order; events and the host's waits order the work of several streams.
- Memory that is freed, or host memory that is rewritten, before the host has waited for the work
  on it. An execution context that ends before.
- Outputs on the host that are overwritten before the host has waited for them.
- A wait of the host for an event that spins, since it takes a core.
- An address for TensorRT that is not aligned to 256 bytes. Allocations are aligned to no more.
- An execution context on two streams at once, or two contexts on the same scratch memory.
- A graph that is replayed after its context was used for anything else or has ended, and one that
  is recorded before a run with the context's present shape.

Work runs as late as possible (or, with `eager_copies`, copies to the GPU as early as possible).
Memory is poisoned until it has been written, so a missing wait gives wrong numbers too.
"""

import ctypes
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

SUCCESS, UNSUPPORTED_IN_CAPTURE, CAPTURE_INVALIDATED, ILLEGAL_STATE = 0, 900, 901, 401
OUT_OF_MEMORY, ILLEGAL_ADDRESS = 2, 700
TEXTS = {OUT_OF_MEMORY: "out of memory", ILLEGAL_ADDRESS: "an illegal memory access"}
POISON = 0xCD
ALIGNMENT = 256

Clock = dict[int, int]
"""How much of each stream, by its number, is known to be done."""


class Misuse(AssertionError):
    """The behaviour of CUDA or TensorRT would be undefined."""


@dataclass(frozen=True)
class Touch:
    """Memory that a piece of work reads or writes."""

    start: int
    size: int
    writes: bool

    def collides(self, other: "Touch") -> bool:
        apart = self.start + self.size <= other.start or other.start + other.size <= self.start
        return (self.writes or other.writes) and not apart


@dataclass(frozen=True)
class Work:
    """A copy or a run of a network."""

    name: str
    touches: tuple[Touch, ...]
    run: Callable[[], None]


@dataclass
class FakeEvent:
    flags: int = 0
    clock: Clock = field(default_factory=dict)
    stream: "FakeStream | None" = None
    position: int = 0


@dataclass(eq=False)
class FakeStream:
    """Work in order; `done` of it has run."""

    number: int
    work: list[Work] = field(default_factory=list)
    clock: Clock = field(default_factory=dict)
    """The work of others that is done before the stream's next one."""
    done: int = 0
    recording: "FakeGraph | None" = None

    def __int__(self) -> int:
        return self.number

    def run(self, until: int) -> None:
        while self.done < until:
            self.done += 1
            self.work[self.done - 1].run()


@dataclass(eq=False)
class FakeGraph:
    work: list[Work] = field(default_factory=list)
    contexts: "dict[FakeContext, int]" = field(default_factory=weakref.WeakKeyDictionary)
    """The contexts that are part of it, and how often each had been used after it was recorded.

    It does not own them: work of a context that has ended is refused."""
    is_valid: bool = True


class Kind(Enum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class FakeCuda:
    """The functions of `cuda.bindings.runtime` that the engine calls, on ordinary memory."""

    cudaHostAllocDefault = 0
    cudaStreamNonBlocking = cudaEventBlockingSync = 1
    cudaEventDisableTiming = 2
    cudaMemcpyKind = Kind
    cudaMemoryType = SimpleNamespace(cudaMemoryTypeHost=1)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self, eager_copies: bool = False) -> None:
        self.eager_copies = eager_copies
        self.host: dict[int, Any] = {}
        self.device: dict[int, Any] = {}
        self.internal: dict[int, Any] = {}
        """TensorRT's own."""
        self.streams: dict[int, FakeStream] = {}
        self.graphs: set[FakeGraph] = set()
        self.replays = 0
        self.uploads: list[int] = []
        """The size of each copy to the GPU, bytes."""
        self.waits = 0
        """How often the host waited for an event or a stream."""
        self.is_broken = False
        """Whether the GPU has failed: every call that has a status returns the error."""
        self.next_wait_fails = False
        """Whether the host's next wait for an event returns an error, which CUDA then forgets."""
        self.capacity: int | None = None
        """Bytes of the GPU's memory, any number if None."""
        self.misuses: list[str] = []
        """All misuses; Python drops an exception that a finalizer raises."""
        self._clock: Clock = {}
        self._freed: list[Any] = []
        self._outputs: list[tuple[Touch, FakeStream, int]] = []
        """Downloads that the host has not waited for: their memory, stream and position."""

    def misuse(self, text: str) -> Misuse:
        self.misuses.append(text)
        return Misuse(text)

    def cudaGetErrorString(self, status: int) -> tuple[int, bytes]:
        return SUCCESS, TEXTS.get(status, f"error {status}").encode()

    def cudaGetLastError(self) -> tuple[int]:
        return (SUCCESS,)

    # Memory

    def register(self, array: np.ndarray[Any, Any]) -> None:
        """Page-lock memory of the caller until it ends, as the driver's library does."""
        pointer = array.ctypes.data
        self.host[pointer] = as_array(pointer, (array.nbytes,), np.uint8)
        weakref.finalize(array, self._free, self.host, pointer)

    def _allocate(self, memory: dict[int, Any], size: int) -> tuple[int, int | None]:
        status = self._status()
        if status:
            return status, None
        block = np.full(size + 2 * ALIGNMENT, POISON, np.uint8)
        start = -block.ctypes.data % ALIGNMENT
        start += 0 if (block.ctypes.data + start) % (2 * ALIGNMENT) else ALIGNMENT
        array = block[start : start + size]
        memory[array.ctypes.data] = array
        return SUCCESS, array.ctypes.data

    def _free(self, memory: dict[int, Any], pointer: int) -> tuple[int]:
        array = memory.pop(pointer)
        self._freed.append(array)  # so that no other allocation gets the address
        if self.is_broken:
            return (ILLEGAL_ADDRESS,)
        self._check_order(None, Work("free", (Touch(pointer, array.size, writes=True),), _nothing))
        array[:] = POISON
        return (SUCCESS,)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[int, int | None]:
        return self._allocate(self.host, size)

    def cudaMalloc(self, size: int) -> tuple[int, int | None]:
        used = sum(array.size for array in self.device.values())
        if self.capacity is not None and used + size > self.capacity:
            return OUT_OF_MEMORY, None
        return self._allocate(self.device, size)

    def cudaFreeHost(self, pointer: int) -> tuple[int]:
        return self._free(self.host, pointer)

    def cudaFree(self, pointer: int) -> tuple[int]:
        return self._free(self.device, pointer)

    def cudaPointerGetAttributes(self, pointer: int) -> tuple[int, Any]:
        return SUCCESS, SimpleNamespace(type=1 if _holds(self.host, pointer, 1) else 0)

    def end_context(self, pointer: int) -> None:
        """Free the memory of an execution context."""
        self._free(self.internal, pointer)

    # Order

    def submit(self, stream: FakeStream, work: Work) -> None:
        """Give a stream work, or its recording if it records."""
        if stream.recording is not None:
            stream.recording.work.append(work)
            return
        stream.clock = _merged(stream.clock, self._clock)
        self._check_memory(work)
        self._check_order(stream, work)
        stream.work.append(work)

    def _check_memory(self, work: Work) -> None:
        for touch in work.touches:
            memories = (self.device, self.host, self.internal)
            if not any(_holds(memory, touch.start, touch.size) for memory in memories):
                raise self.misuse(
                    f"{work.name} touches memory that is freed or never was allocated"
                )

    def _check_order(self, stream: FakeStream | None, work: Work) -> None:
        """Raise Misuse if work collides with work of other streams that is not done before it.

        Work of the host itself (`stream` is None) comes after the work that it has waited for.
        """
        clock = stream.clock if stream else self._clock
        for other in self.streams.values():
            if other is stream:
                continue
            for earlier in other.work[clock.get(other.number, 0) :]:
                if any(one.collides(two) for one in work.touches for two in earlier.touches):
                    raise self.misuse(f"{work.name} does not wait for {earlier.name}")

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, FakeStream]:
        stream = FakeStream(1 + len(self.streams))
        self.streams[stream.number] = stream
        return SUCCESS, stream

    def cudaStreamDestroy(self, stream: FakeStream) -> tuple[int]:
        return (SUCCESS,)

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[int, FakeEvent]:
        return SUCCESS, FakeEvent(flags)

    def cudaEventDestroy(self, event: FakeEvent) -> tuple[int]:
        return (SUCCESS,)

    def cudaEventRecord(self, event: FakeEvent, stream: FakeStream) -> tuple[int]:
        if self.is_broken:
            return (ILLEGAL_ADDRESS,)
        event.stream, event.position = stream, len(stream.work)
        event.clock = _merged(stream.clock, {stream.number: event.position})
        return (SUCCESS,)

    def cudaStreamWaitEvent(self, stream: FakeStream, event: FakeEvent, flags: int) -> tuple[int]:
        if self.is_broken:
            return (ILLEGAL_ADDRESS,)
        before, until = event.stream, event.position
        if before:
            stream.clock = _merged(stream.clock, event.clock)
            stream.work.append(Work("wait", (), lambda: before.run(until)))
        return (SUCCESS,)

    def cudaEventSynchronize(self, event: FakeEvent) -> tuple[int]:
        if not event.flags & self.cudaEventBlockingSync:
            raise self.misuse("the host spins while it waits for an event")
        status = self._status()
        if status:
            return (status,)
        if self.next_wait_fails:
            self.next_wait_fails = False
            return (ILLEGAL_ADDRESS,)
        if event.stream:
            event.stream.run(event.position)
            self._waited(event.clock)
        return (SUCCESS,)

    def cudaStreamSynchronize(self, stream: FakeStream) -> tuple[int]:
        status = self._status()
        if status:
            return (status,)
        stream.run(len(stream.work))
        self._waited(_merged(stream.clock, {stream.number: len(stream.work)}))
        return (SUCCESS,)

    def _waited(self, clock: Clock) -> None:
        """Note that the host has waited for work."""
        self.waits += 1
        self._clock = _merged(self._clock, clock)
        self._outputs = [
            output for output in self._outputs if output[2] > self._clock.get(output[1].number, 0)
        ]

    def _status(self) -> int:
        """Return the error of a call that CUDA prohibits while a stream records, or 0."""
        if self._interrupts_capture():
            return UNSUPPORTED_IN_CAPTURE
        return ILLEGAL_ADDRESS if self.is_broken else SUCCESS

    # Copies

    def cudaMemcpyAsync(
        self, target: int, source: int, count: int, kind: Kind, stream: FakeStream
    ) -> tuple[int]:
        if self.is_broken:
            return (ILLEGAL_ADDRESS,)
        is_upload = kind is Kind.cudaMemcpyHostToDevice
        on_device, on_host = (target, source) if is_upload else (source, target)
        if not (_holds(self.device, on_device, count) and _holds(self.host, on_host, count)):
            raise self.misuse("a copy outside page-locked host memory and memory of the GPU")
        before = ctypes.string_at(source, count)

        def copy() -> None:
            if is_upload and ctypes.string_at(source, count) != before:
                raise self.misuse("host memory was rewritten before its copy to the GPU was done")
            ctypes.memmove(target, source, count)

        touches = Touch(source, count, writes=False), Touch(target, count, writes=True)
        self.submit(stream, Work("upload" if is_upload else "download", touches, copy))
        if is_upload:
            self.uploads.append(count)
            if self.eager_copies:
                stream.run(len(stream.work))
            return (SUCCESS,)
        output = touches[1]
        if any(output.collides(other) for other, _, _ in self._outputs):
            raise self.misuse("outputs are overwritten before the host has waited for them")
        self._outputs.append((output, stream, len(stream.work)))
        ctypes.memset(target, POISON, count)  # who reads it without a wait gets this
        return (SUCCESS,)

    # Graphs

    def _interrupts_capture(self) -> bool:
        """Whether a stream records; a call that CUDA prohibits meanwhile invalidates that."""
        recording = [stream.recording for stream in self.streams.values() if stream.recording]
        for graph in recording:
            graph.is_valid = False
        return bool(recording)

    def cudaStreamBeginCapture(self, stream: FakeStream, mode: int) -> tuple[int]:
        if stream.recording:
            return (ILLEGAL_STATE,)
        stream.recording = FakeGraph()
        return (SUCCESS,)

    def cudaStreamEndCapture(self, stream: FakeStream) -> tuple[int, FakeGraph | None]:
        graph, stream.recording = stream.recording, None
        if graph is None:
            return ILLEGAL_STATE, None
        if not graph.is_valid:
            return CAPTURE_INVALIDATED, None
        for context in graph.contexts:
            graph.contexts[context] = context.uses
        self.graphs.add(graph)
        return SUCCESS, graph

    def cudaGraphInstantiate(self, graph: FakeGraph, flags: int) -> tuple[int, FakeGraph]:
        executable = FakeGraph(graph.work, graph.contexts)
        self.graphs.add(executable)
        return SUCCESS, executable

    def cudaGraphDestroy(self, graph: FakeGraph) -> tuple[int]:
        self.graphs.remove(graph)
        return (SUCCESS,)

    def cudaGraphExecDestroy(self, graph: FakeGraph) -> tuple[int]:
        self.graphs.remove(graph)
        return (SUCCESS,)

    def cudaGraphLaunch(self, graph: FakeGraph, stream: FakeStream) -> tuple[int]:
        if self.is_broken:
            return (ILLEGAL_ADDRESS,)
        if graph not in self.graphs:
            raise self.misuse("a graph is replayed that was destroyed")
        if any(context.uses != uses for context, uses in graph.contexts.items()):
            raise self.misuse("a graph is replayed whose context has been used for something else")
        self.replays += 1
        for work in graph.work:
            self.submit(stream, work)
        return (SUCCESS,)


def _nothing() -> None:
    """Nothing to run."""


def _merged(*clocks: Clock) -> Clock:
    numbers = {number for clock in clocks for number in clock}
    return {number: max(clock.get(number, 0) for clock in clocks) for number in numbers}


def _holds(memory: Mapping[int, Any], pointer: int, count: int) -> bool:
    return any(
        start <= pointer and pointer + count <= start + array.size
        for start, array in memory.items()
    )


def as_array(pointer: int, shape: tuple[int, ...], dtype: type) -> np.ndarray[Any, Any]:
    """Return the array that lies at an address."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * size).from_address(pointer), dtype).reshape(shape)


class FakeLogger:
    """TensorRT's base class of loggers."""

    Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1)


FAKE_TRT = ModuleType("fake TensorRT")
"""The names of TensorRT's module that creating and running contexts takes."""
vars(FAKE_TRT).update(
    ExecutionContextAllocationStrategy=SimpleNamespace(STATIC=0, USER_MANAGED=2),
    ILogger=FakeLogger,
    ProfilingVerbosity=SimpleNamespace(LAYER_NAMES_ONLY=0, NONE=1),
)


@dataclass
class ContextLog:
    """The history of an execution context, which may have ended."""

    shapes: list[int] = field(default_factory=list)
    """The batch of each shape that was set."""
    runs: list[tuple[int, int]] = field(default_factory=list)
    """The number of each run or recording among those of all contexts, and its batch."""
    nvtx_verbosity: int = 0


class FakeEngine:
    """TensorRT's engine of a plan whose network is a function of images [n, H, W, 3]."""

    device_memory_size_v2 = 1000

    def __init__(
        self, cuda: FakeCuda, network: Callable[[Any], dict[str, Any]], max_batch: int
    ) -> None:
        self.cuda, self.network, self.max_batch = cuda, network, max_batch
        self.contexts: list[ContextLog] = []
        self.fails_from: int | None = None
        """The number of runs, of all contexts, from which on runs fail."""

    def create_execution_context(self, strategy: int) -> "FakeContext":
        assert strategy == FAKE_TRT.ExecutionContextAllocationStrategy.USER_MANAGED
        context = FakeContext(self)
        self.contexts.append(context.log)
        return context

    @property
    def batches(self) -> list[int]:
        """The batch of each run or recording, in their order."""
        return [batch for _, batch in sorted(run for each in self.contexts for run in each.runs)]


class FakeContext:
    """A TensorRT execution context."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine, self._cuda = engine, engine.cuda
        self._state = np.zeros(1, np.uint8)
        """Its own memory, which every run writes."""
        self._cuda.internal[self._state.ctypes.data] = self._state
        weakref.finalize(self, self._cuda.end_context, self._state.ctypes.data)
        self._addresses: dict[str, int] = {}
        self._memory = (0, 0)
        self._shape: tuple[int, ...] = ()
        self._is_ready = False
        """Whether it has run with its shape, outside a recording."""
        self.uses = 0
        self.log = ContextLog()

    @property
    def nvtx_verbosity(self) -> int:
        return self.log.nvtx_verbosity

    @nvtx_verbosity.setter
    def nvtx_verbosity(self, verbosity: int) -> None:
        self.log.nvtx_verbosity = verbosity

    def set_device_memory(self, pointer: int, size: int) -> None:
        if pointer % ALIGNMENT or size < self._engine.device_memory_size_v2:
            raise self._cuda.misuse("scratch memory that is too small or not aligned")
        self.uses += 1
        self._memory = (pointer, size)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.uses += 1
        self.log.shapes.append(shape[0])
        self._is_ready = self._is_ready and shape == self._shape
        self._shape = shape
        return name == "images" and 1 <= shape[0] <= self._engine.max_batch

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        if pointer % ALIGNMENT:
            raise self._cuda.misuse(f"the address of {name} is not aligned to {ALIGNMENT} bytes")
        self.uses += 1
        self._addresses[name] = pointer
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if self._cuda.is_broken:
            return False
        number = len(self._engine.batches)
        if self._engine.fails_from is not None and number >= self._engine.fails_from:
            return False
        target = self._cuda.streams[stream]
        self.uses += 1
        self.log.runs.append((number, self._shape[0]))
        if target.recording is None:
            self._is_ready = True
        elif self._is_ready:
            target.recording.contexts[self] = self.uses
        else:
            raise self._cuda.misuse("a recording before a run with the context's shape")
        self._cuda.submit(target, self._work())
        return True

    def _work(self) -> Work:
        addresses, shape, network = dict(self._addresses), self._shape, self._engine.network
        sizes = {name: values.nbytes for name, values in network(np.zeros(shape, np.uint8)).items()}
        read = Touch(addresses["images"], int(np.prod(shape)), writes=False)
        written = [Touch(addresses[name], size, writes=True) for name, size in sizes.items()]
        own = Touch(*self._memory, writes=True), Touch(self._state.ctypes.data, 1, writes=True)

        def run() -> None:
            images = as_array(addresses["images"], shape, np.uint8)
            for name, values in network(images).items():
                as_array(addresses[name], values.shape, values.dtype)[:] = values

        return Work("a run", (read, *written, *own), run)


SHAPES = {"images": (4, 4, 3), "features": (5,), "logits": (1,), "mask": (2, 2)}
"""Input and outputs of the fake network, without the batch."""
AUX_SHAPE = (3,)
"""That of its auxiliary logits, if it has them."""


def fake_network(
    images: np.ndarray[Any, Any], fold: int = 0, dtype: str = "float32", aux: bool = False
) -> dict[str, np.ndarray[Any, Any]]:
    """The network of the fake plan: its outputs differ for any two images and any two folds.

    `dtype` is the type of the features, in which they are exact; `aux` adds auxiliary logits.
    """
    values = images.astype(np.float32)
    weights = np.arange(1, 49, dtype=np.float32).reshape(4, 4, 3)
    more = {"aux": values.reshape(len(images), 48)[:, -3:] - fold} if aux else {}
    return {
        **more,
        "features": (values.reshape(len(images), 48)[:, :5] + fold).astype(dtype),
        "logits": (values * weights).sum(axis=(1, 2, 3))[:, None] + fold,
        "mask": values[:, ::2, ::2, 0] + fold,
    }
