"""Decode images into a ring of batches: in threads, or in processes of their own.

Threads share one interpreter lock with the thread that feeds the engine. Processes do not, which
matters above some 20,000 images per second.
"""

import contextlib
import pickle
import signal
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Protocol

from infer.embedding.ring import Ring
from infer.embedding.settings import DecodeIn
from isic.images import ImageStore, decode_pool, quiet_opencv
from isic.preprocess import Pixels, PreprocessSpec, write_views
from isic.runtime.errors import UserError
from isic.runtime.interrupt import block_sigint
from isic.views import VIEWS

MAX_LOSSES = 2
"""Processes that may be lost on the same images before these are blamed."""
PRELOADED = ["infer.embedding.decoders", "isic.runtime.cli"]
"""Modules that every decoder process imports: this one, and those of the command."""
GRACE_SECONDS = 5
"""Time that a decoder process has to end."""
MIN_PROCESSES = 4
"""Workers from which a GPU may need more images than one interpreter lock lets through."""


@dataclass(frozen=True)
class Recipe:
    """How an image becomes the rows of a batch."""

    spec: PreprocessSpec
    tta: str
    """A key of VIEWS; every view of an image is a row."""

    @property
    def num_views(self) -> int:
        return len(VIEWS[self.tta])


@dataclass(frozen=True)
class Chunk:
    """Some images of a batch."""

    slot: int
    """Of the ring."""
    num_images: int
    """Of the whole batch."""
    start: int
    """Of the first one within the batch."""
    ids: Sequence[str]


class Decoding(Protocol):
    """A chunk that is being decoded."""

    def result(self) -> dict[int, str]:
        """Wait for the chunk and return the reason for each row that cannot be used.

        Raises:
            UserError: the source was changed, or decoders are lost again and again.
        """
        ...


class Decoders(ABC):
    """Workers that decode chunks into the slots of a ring."""

    chunk_size: int
    """Images per chunk: enough to read neighbours together and few enough to balance workers."""
    smallest_chunk: int
    """Rows per chunk below which a batch is not split further."""
    chunks_ahead: int
    """Chunks per worker to queue so that none runs dry while the engine is busy."""

    def __init__(self, store: ImageStore, recipe: Recipe, ring: Ring, num_workers: int) -> None:
        self._store = store
        self._recipe = recipe
        self._ring = ring
        self.num_workers = num_workers
        self.num_views = recipe.num_views

    @abstractmethod
    def submit(self, chunk: Chunk) -> Decoding:
        """Start to decode a chunk."""

    @abstractmethod
    def cancel(self, decodings: Sequence[Decoding]) -> None:
        """Return once none of them writes into the ring any more."""

    @abstractmethod
    def close(self) -> None:
        """End the workers."""


def decode_chunk(store: ImageStore, recipe: Recipe, slots: Pixels, chunk: Chunk) -> dict[int, str]:
    """Decode the images of a chunk, and their views, into rows of a slot.

    A batch of N images with V views takes the first V * N rows of its slot, view by view.

    Args:
        slots: uint8 [S, R, size, size, 3].

    Returns:
        The reason by row of the batch; all views of such a row are zero.
    """
    shape = (recipe.num_views, chunk.num_images)
    rows = slots[chunk.slot, : shape[0] * shape[1]].reshape(*shape, *slots.shape[2:])
    views = rows[:, chunk.start : chunk.start + len(chunk.ids)]
    failed = store.decode(chunk.ids, recipe.spec, views[0])
    if recipe.num_views > 1:
        for row in range(len(chunk.ids)):
            image = views[0, row]
            write_views(image, recipe.tta, [image, *views[1:, row]])
    return {chunk.start + row: reason for row, reason in failed.items()}


class DecoderThreads(Decoders):
    """Threads of this process."""

    chunk_size = 32
    smallest_chunk = 1
    chunks_ahead = 4

    def __init__(self, store: ImageStore, recipe: Recipe, ring: Ring, num_workers: int) -> None:
        super().__init__(store, recipe, ring, num_workers)
        self._pool = decode_pool(num_workers)

    def submit(self, chunk: Chunk) -> "Future[dict[int, str]]":
        return self._pool.submit(decode_chunk, self._store, self._recipe, self._ring.slots, chunk)

    def cancel(self, decodings: Sequence[Decoding]) -> None:
        futures = [decoding for decoding in decodings if isinstance(decoding, Future)]
        for future in [future for future in futures if not future.cancel()]:
            future.exception()

    def close(self) -> None:
        self._pool.shutdown()


class DecoderProcesses(Decoders):
    """Processes, each with one thread. One that dies is replaced, and its work is repeated."""

    # A message per chunk takes the engine's process some 10 microseconds.
    chunk_size = 64
    smallest_chunk = 16
    chunks_ahead = 2

    def __init__(self, store: ImageStore, recipe: Recipe, ring: Ring, num_workers: int) -> None:
        super().__init__(store, recipe, ring, num_workers)
        pickled = pickle.dumps(store)  # once, because the index of a whole dataset takes 11 ms
        self._processes = [
            DecoderProcess(pickled, recipe, ring, number) for number in range(num_workers)
        ]
        self._turns = cycle(self._processes)

    def submit(self, chunk: Chunk) -> "SentChunk":
        return next(self._turns).submit(chunk)

    def cancel(self, decodings: Sequence[Decoding]) -> None:
        for process in self._processes:
            process.finish()

    def close(self) -> None:
        for process in self._processes:
            process.close()
        for process in self._processes:
            process.join()


DECODERS: dict[DecodeIn, type[Decoders]] = {
    "threads": DecoderThreads,
    "processes": DecoderProcesses,
}


def decoders_for(decode_in: DecodeIn, device: str, num_workers: int) -> type[Decoders]:
    """Return the kind of decoders; `auto` is processes if they feed a GPU from several cores."""
    if decode_in == "auto":
        decode_in = "processes" if device == "cuda" and num_workers >= MIN_PROCESSES else "threads"
    return DECODERS[decode_in]


class DecoderProcess:
    """One process, its pipe and the chunks that it has been sent, which it answers in order."""

    def __init__(self, pickled: bytes, recipe: Recipe, ring: Ring, number: int) -> None:
        self._pickled = pickled
        self._recipe = recipe
        self._ring = ring
        self._number = number
        self._sent: deque[SentChunk] = deque()
        self._start()

    def _start(self) -> None:
        # Forked from a server that has imported everything, a process starts at once and shares
        # the memory of libraries; forked from this process, it would inherit CUDA and threads.
        context = get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._pipe, theirs = context.Pipe()
        self._process: ForkServerProcess = context.Process(
            target=serve,
            args=(theirs, self._ring, self._pickled, self._recipe),
            name=f"decode-{self._number}",
            daemon=True,  # ended at the exit of a process that has not closed it
        )
        with block_sigint():
            self._process.start()
        # The child has its own copy; with this one open, the child's end would give no EOF.
        theirs.close()

    def submit(self, chunk: Chunk) -> "SentChunk":
        sent = SentChunk(self, chunk)
        self._sent.append(sent)
        self._send(sent)
        return sent

    def _send(self, sent: "SentChunk") -> None:
        try:
            self._pipe.send_bytes(pickle.dumps(sent.chunk))
        except OSError:
            return  # the process has died: reading its answers ends, and it is replaced

    def receive(self) -> None:
        """Wait for the answer to the oldest chunk. Raise UserError."""
        try:
            answer = pickle.loads(self._pipe.recv_bytes())  # written by this module
        except (EOFError, OSError):
            self._replace()
            return
        self._sent.popleft().answer = answer

    def _replace(self) -> None:
        """Start another process instead of one that died, and send it the same chunks."""
        self._pipe.close()
        self._process.join()
        oldest = self._sent[0]
        oldest.num_losses += 1
        code = self._process.exitcode
        if oldest.num_losses >= MAX_LOSSES:
            raise UserError(
                f"{MAX_LOSSES} decoder processes were lost (exit code {code}) while they decoded "
                f"{oldest.chunk.ids[0]} to {oldest.chunk.ids[-1]}; free memory, or look at these "
                "images"
            )
        print(
            f"a decoder process was lost (exit code {code}); its images are decoded again",
            file=sys.stderr,
        )
        self._start()
        for sent in self._sent:
            self._send(sent)

    def finish(self) -> None:
        """Wait for the answers to all chunks, whatever they are."""
        while self._sent:
            try:
                self._pipe.recv_bytes()
            except (EOFError, OSError):
                self._sent.clear()
                self._process.join()
                self._start()
                return
            self._sent.popleft()

    def close(self) -> None:
        """Have the process end."""
        self._pipe.close()

    def join(self) -> None:
        self._process.join(GRACE_SECONDS)
        self._process.kill()  # no effect on one that has ended
        self._process.join()


class SentChunk:
    """A chunk in a process."""

    def __init__(self, process: DecoderProcess, chunk: Chunk) -> None:
        self._process = process
        self.chunk = chunk
        self.answer: dict[int, str] | UserError | None = None
        self.num_losses = 0
        """Processes that died when this was the chunk that they decoded."""

    def result(self) -> dict[int, str]:
        while self.answer is None:
            self._process.receive()
        if isinstance(self.answer, UserError):
            raise self.answer
        return self.answer


def serve(pipe: Connection, ring: Ring, pickled: bytes, recipe: Recipe) -> None:
    """Answer the chunks that arrive through a pipe until its other end is closed.

    Args:
        pickled: the image store; if it cannot be opened here, the answers are the reason.
    """
    # Ctrl-C reaches every process of a terminal; this one ends with its parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    quiet_opencv()
    try:
        store: ImageStore = pickle.loads(pickled)
        answer_of = partial(decode_chunk, store, recipe, ring.slots)
    except UserError as error:
        answer_of = partial(_fail, error)
    with contextlib.suppress(EOFError, OSError):  # the parent has closed the pipe, or is gone
        while True:
            chunk = pickle.loads(pipe.recv_bytes())
            try:
                answer: dict[int, str] | UserError = answer_of(chunk)
            except UserError as error:
                answer = error
            pipe.send_bytes(pickle.dumps(answer))


def _fail(error: UserError, chunk: Chunk) -> dict[int, str]:
    raise error
