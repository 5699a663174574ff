"""The engine that runs TensorRT plans of several folds on one GPU.

A batch is cut into pieces. Each piece takes a slot, which has buffers of its own, and goes through
two streams: one copies its images to the GPU, the other one runs each fold's plan on them and
copies the outputs back. So pieces in other slots are copied in or collected while one is computed.
"""

import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infer.engines import IN_FLIGHT, Engine, Outputs, cudart
from infer.engines.contract import IMAGES, RESULTS
from infer.engines.cudart import CudaError
from infer.engines.tensorrt_plan import BoundContext, Plan, common_profile
from isic.layout import Fold
from isic.preprocess import Pixels
from isic.runtime.errors import UserError

Results = Mapping[Fold, Mapping[str, NDArray[Any]]]
"""Outputs of a batch by fold and name."""


class FoldRun:
    """One fold's plan in one slot: its execution context and the memory of its outputs."""

    def __init__(
        self, plan: Plan, images: cudart.DeviceMemory, scratch: cudart.DeviceMemory, max_batch: int
    ) -> None:
        """Allocate outputs for `max_batch` images. Raises CudaError.

        Args:
            plan: the plan to run.
            images: the slot's images on the GPU.
            scratch: memory for intermediate results, which all contexts share.
            max_batch: the largest number of images.
        """
        self._plan = plan
        self._scratch = scratch
        self._max_batch = max_batch
        self._buffers = {IMAGES: images}
        for name in plan.shapes.keys() - {IMAGES}:
            self._buffers[name] = cudart.DeviceMemory(max_batch * plan.image_bytes(name))
        self._host: dict[str, NDArray[Any]] = {}
        self._context = plan.create_context(scratch, self._buffers)
        self._graphs: dict[int, tuple[Any, BoundContext]] = {}

    def record(self, size: int, stream: cudart.Stream) -> None:
        """Record a run of `size` images as a CUDA graph. Raises CudaError.

        The graph has a context of its own: NVIDIA advises one context per graph, because another
        shape changes the state that the graph relies on
        (https://github.com/NVIDIA/TensorRT/issues/3798).
        """
        context = self._plan.create_context(self._scratch, self._buffers)
        context.enqueue(size, stream)  # the first run does work that cannot be recorded
        graph = stream.recorded(partial(context.enqueue, size, stream))
        self._graphs[size] = graph, context  # the graph uses the context's memory

    def enqueue(self, size: int, stream: cudart.Stream) -> None:
        """Add a run of `size` images to the stream. Raises CudaError."""
        if size in self._graphs:
            graph, _ = self._graphs[size]
            stream.replay(graph)
        else:
            self._context.enqueue(size, stream)

    def download(self, name: str, num_images: int, stream: cudart.Stream) -> None:
        """Add the copy of an output to the host to the stream. Raises CudaError."""
        stream.download(self.host(name)[:num_images], self._buffers[name])

    def host(self, name: str) -> NDArray[Any]:
        """Return the page-locked memory that an output is copied to. Raises CudaError."""
        if name not in self._host:  # masks are large, and few callers ask for them
            shape = (self._max_batch, *self._plan.shapes[name])
            self._host[name] = cudart.pinned(shape, self._plan.dtypes[name])
        return self._host[name]


class Slot:
    """The buffers and events of one piece in flight, for all folds.

    `uploaded` follows the copy of the images to the GPU; the plans wait for it. `done` follows the
    copies of the outputs to the host; the next upload and the host wait for it.
    """

    def __init__(
        self, plans: Mapping[Fold, Plan], scratch: cudart.DeviceMemory, max_batch: int
    ) -> None:
        """Allocate for `max_batch` images. Raises CudaError."""
        plan, *_ = plans.values()
        self._staging_shape = (max_batch, *plan.shapes[IMAGES])
        self.images = cudart.DeviceMemory(max_batch * plan.image_bytes(IMAGES))
        self.runs = {
            fold: FoldRun(plan, self.images, scratch, max_batch) for fold, plan in plans.items()
        }
        self.uploaded = cudart.Event()
        self.done = cudart.Event()
        self.piece: Piece | None = None
        """The piece whose outputs are not copied out of the slot yet."""
        self.last_use = 0

    def page_locked(self, images: Pixels) -> Pixels:
        """Return the images, in the slot's own memory if the GPU cannot copy from theirs."""
        if cudart.is_pinned(images):
            return images
        self.uploaded.wait()  # the last copy from this memory
        self._staging[: len(images)] = images
        return self._staging[: len(images)]

    @cached_property
    def _staging(self) -> Pixels:
        return cudart.pinned(self._staging_shape, np.uint8)


class Piece:
    """A part of a batch in a slot, until its outputs are copied out."""

    def __init__(self, slot: Slot, rows: slice, images: Pixels, results: Results) -> None:
        self._slot: Slot | None = slot
        self._rows = rows
        self._images: Pixels | None = images  # their memory must outlive the copy to the GPU
        self._results = results
        self._error: CudaError | None = None
        self._lock = threading.Lock()  # results may be asked for in another thread than submit's

    def collect(self) -> None:
        """Wait for the outputs, copy them into the batch's results and free the slot, once.

        Raises:
            CudaError: the GPU failed, now or when this was called before.
        """
        with self._lock:
            if self._slot is not None and self._error is None:
                self._copy_outputs(self._slot)
        if self._error is not None:
            raise self._error

    def _copy_outputs(self, slot: Slot) -> None:
        try:
            slot.done.wait()
        except CudaError as error:
            self._error = error
            return
        num_images = self._rows.stop - self._rows.start
        for fold, outputs in self._results.items():
            for name, values in outputs.items():
                values[self._rows] = slot.runs[fold].host(name)[:num_images]
        self._leave()

    def fail(self, error: CudaError) -> None:
        """Give up the outputs because the GPU failed."""
        with self._lock:
            self._error = error
            self._leave()

    def _leave(self) -> None:
        if self._slot is not None:
            self._slot.piece = None
        self._slot = self._images = None


class TensorRTPending:
    """A batch in flight."""

    def __init__(self, engine: "TensorRTEngine", pieces: Sequence[Piece], results: Results) -> None:
        self._engine = engine  # its memory is in use until the batch is finished
        self._pieces = pieces
        self._results = results

    def result(self) -> dict[Fold, Outputs]:
        return {fold: as_outputs(values) for fold, values in self.outputs().items()}

    def outputs(self) -> Results:
        """Wait for the batch and return its outputs by fold and name. Raises UserError."""
        with self._engine.settled_after_errors():
            for piece in self._pieces:
                piece.collect()
        return self._results


class TensorRTEngine(Engine):
    """The plans of several folds, with IN_FLIGHT slots and two streams."""

    device = "cuda"

    def __init__(self, plans: Mapping[Fold, Plan]) -> None:
        """Allocate buffers and record the CUDA graphs.

        Args:
            plans: by fold; all take images of one size.

        Raises:
            UserError: no batch size fits all plans.
            CudaError: for example, the GPU has too little memory.
        """
        self.folds = tuple(plans)
        self._plans = plans
        profile = common_profile([plan.profile for plan in plans.values()])
        if profile is None:
            raise UserError(
                "the plans of these folds have no batch size in common; export them again with "
                "one --min_batch and one --max_batch"
            )
        self._profile = profile
        self._sizes: set[int] = set()
        """The batch sizes that were run."""
        self._failure: CudaError | None = None
        self._uploads = cudart.Stream()
        self._compute = cudart.Stream()
        # One memory for all contexts, since they run one after another on one stream.
        scratch = cudart.DeviceMemory(max(plan.scratch_bytes for plan in plans.values()))
        self._slots = [Slot(plans, scratch, profile.max) for _ in range(IN_FLIGHT)]
        # TensorRT's contexts must not end while they run.
        weakref.finalize(self, _wait_for_all, self._uploads, self._compute)
        self._record_graphs()

    def submit(self, images: Pixels, folds: Iterable[Fold] | None = None) -> TensorRTPending:
        chosen = self.folds if folds is None else tuple(folds)
        return self._submit(images, chosen, RESULTS)

    def run_other(self, images: Pixels, name: str) -> NDArray[np.float32]:
        """Return an output of the only plan that no batch's result has."""
        (outputs,) = self._submit(images, self.folds, (name,)).outputs().values()
        return outputs[name]

    def close(self) -> None:
        """Wait for the batches in flight; their results stay available."""
        self._settle()

    def _submit(
        self, images: Pixels, folds: Sequence[Fold], names: Sequence[str]
    ) -> TensorRTPending:
        """Start to compute the named outputs of each fold, as far as its plan has them."""
        plans = {fold: self._plans[fold] for fold in folds}
        assert images.dtype == np.uint8, images.dtype
        for plan in plans.values():
            assert images.shape[1:] == plan.shapes[IMAGES], images.shape
        if self._failure is not None:
            raise user_error(self._failure)
        results = {
            fold: {
                name: np.empty((len(images), *plan.shapes[name]), plan.dtypes[name])
                for name in names
                if name in plan.shapes
            }
            for fold, plan in plans.items()
        }
        with self.settled_after_errors():
            pieces = [
                self._launch(rows, images[rows], results)
                for rows in self._profile.pieces(len(images))
            ]
        return TensorRTPending(self, pieces, results)

    def _launch(self, rows: slice, images: Pixels, results: Results) -> Piece:
        """Enqueue one piece: copy in, compute, copy out. Raise CudaError.

        Returns at once if a slot is free, else when the oldest piece has left its slot.
        """
        num_images = len(images)
        slot = min(self._slots, key=lambda slot: (slot.piece is not None, slot.last_use))
        images = slot.page_locked(images)
        self._uploads.wait_for(slot.done)  # the plans that have read the slot's last images
        self._uploads.upload(slot.images, images)
        self._uploads.record(slot.uploaded)
        if (earlier := slot.piece) is not None:  # another thread may collect it meanwhile
            earlier.collect()  # else its outputs would be overwritten
        self._compute.wait_for(slot.uploaded)
        # The padding is whatever images an earlier piece left; their outputs are not copied back.
        size = self._profile.padded(num_images)
        for fold, outputs in results.items():
            slot.runs[fold].enqueue(size, self._compute)
            for name in outputs:
                slot.runs[fold].download(name, num_images, self._compute)
        self._compute.record(slot.done)
        slot.last_use = 1 + max(slot.last_use for slot in self._slots)
        slot.piece = piece = Piece(slot, rows, images, results)
        self._keep_kernels(size)
        return piece

    def _record_graphs(self) -> None:
        """Record full batches of the plans that ask for it. Raise CudaError."""
        for slot in self._slots:
            for fold, plan in self._plans.items():
                if plan.records_graph:
                    slot.runs[fold].record(self._profile.opt, self._compute)

    def _keep_kernels(self, size: int) -> None:
        """Let the plans save the kernels that they have compiled for a size, if it is new."""
        if size in self._sizes:
            return
        self._sizes.add(size)
        for plan in self._plans.values():
            plan.save_kernels()

    @contextmanager
    def settled_after_errors(self) -> Iterator[None]:
        """Leave nothing in flight after an error, so that callers may reuse their memory.

        Raises:
            UserError: in place of a CudaError.
        """
        try:
            yield
        except CudaError as error:
            self._settle()
            raise user_error(error) from None
        except BaseException:  # also Ctrl-C
            self._settle()
            raise

    def _settle(self) -> None:
        """Wait for the pieces in flight and keep their results; they fail if the GPU has failed."""
        pieces = [slot.piece for slot in self._slots if slot.piece is not None]
        try:
            self._uploads.wait()
            self._compute.wait()
            for piece in pieces:
                piece.collect()
        except CudaError as error:
            # Other results may be wrong too, and CUDA refuses all later work of this process.
            self._failure = error
            for piece in pieces:
                piece.fail(error)


def as_outputs(values: Mapping[str, NDArray[Any]]) -> Outputs:
    """Return the result of a batch from its outputs by name."""
    features, *others = (values[name] for name in RESULTS if name in values)
    return features, *others


def user_error(error: CudaError) -> UserError:
    """Return the sentence for an error of the GPU during a run."""
    if "outofmemory" in str(error).lower().replace(" ", ""):
        return UserError(
            f"the GPU's memory is full ({error}); use a smaller --batch_size or fewer folds, or "
            "end other processes on the GPU"
        )
    return UserError(
        f"the GPU failed ({error}); run `python -m infer doctor`, and export the plan again if "
        "the GPU works"
    )


def _wait_for_all(*streams: cudart.Stream) -> None:
    """Wait for streams; a GPU that has failed has nothing in flight."""
    for stream in streams:
        with suppress(CudaError):
            stream.wait()
