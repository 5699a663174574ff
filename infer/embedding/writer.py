"""Write shards behind the engine: average views, convert to the stored type, check, write."""

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import polars as pl
from numpy.typing import NDArray

from infer.embedding.shards import Shard
from infer.embedding.store import BAD_IMAGES_SCHEMA, write_shard
from infer.engines import Outputs
from isic.layout import Fold
from isic.runtime.errors import UserError
from isic.runtime.remote import publish, published
from isic.tables import write_parquet

NUM_WRITERS = 2
"""Threads; one writes while the other one waits for the disk."""
# Bounds the memory if the disk is slow.
MAX_SHARDS_WAITING = 3
"""Shards that may wait to be written, or be in writing, before the engine pauses."""
STORED_DTYPES: dict[str, type[np.floating]] = {"float16": np.float16, "float32": np.float32}


@dataclass(frozen=True)
class Computed:
    """The outputs for a batch of N images."""

    ids: Sequence[str]
    failed: dict[int, str]
    """The reason by row for images that cannot be used; their outputs are dropped."""
    outputs: dict[Fold, Outputs]
    """By fold, for V views of each image: features [V * N, D] and, of networks with a lesion head,
    logits [V * N, 1] and any auxiliary logits [V * N, K]."""


class ShardWriter:
    """Collects the batches of a shard after another; a context manager that ends its threads."""

    def __init__(
        self, dtype: str, run_spec_digest: str | None, aux_names: Sequence[str] = ()
    ) -> None:
        """Start the threads.

        Args:
            dtype: of the stored features, a key of STORED_DTYPES.
            run_spec_digest: written into each shard.
            aux_names: [K], of the auxiliary logits in the outputs.
        """
        self._write = partial(
            write_batches,
            dtype=STORED_DTYPES[dtype],
            aux_names=aux_names,
            digest=run_spec_digest,
        )
        self._pool = ThreadPoolExecutor(NUM_WRITERS, thread_name_prefix="write")
        self._batches: list[Computed] = []
        self._num_images = 0
        self._written: deque[Future[None]] = deque()
        self.waited = 0.0
        """Seconds that the caller has waited for the disk."""

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def add(self, shard: Shard, batch: Computed) -> None:
        """Add the next batch of a shard; its last one starts the writing. Raise UserError."""
        self._batches.append(batch)
        self._num_images += len(batch.ids)
        if self._num_images == len(shard):
            self._written.append(self._pool.submit(self._write, shard, self._batches))
            self._batches = []
            self._num_images = 0
            self._wait(MAX_SHARDS_WAITING)

    def finish(self) -> None:
        """Wait until every shard is on disk. Raise UserError."""
        self._wait(0)

    def _wait(self, max_waiting: int) -> None:
        started = time.perf_counter()
        while len(self._written) > max_waiting:
            self._written.popleft().result()
        self.waited += time.perf_counter() - started


def write_batches(
    shard: Shard,
    batches: Sequence[Computed],
    dtype: type[np.floating],
    aux_names: Sequence[str],
    digest: str | None,
) -> None:
    """Write the files of a shard. Raise UserError for a value that is not finite."""
    # A shard counts as done once its Parquet files exist, so the list of bad images comes first.
    bad = [(batch.ids[row], reason) for batch in batches for row, reason in batch.failed.items()]
    if bad:
        write_parquet(shard.errors_path, pl.DataFrame(bad, BAD_IMAGES_SCHEMA, orient="row"))
        publish(shard.errors_path)
    ids = [
        name for batch in batches for row, name in enumerate(batch.ids) if row not in batch.failed
    ]
    for fold, path in shard.paths.items():
        parts = [good_rows(batch, fold, dtype) for batch in batches]
        features = np.concatenate([part[0] for part in parts])
        logits = np.concatenate([part[1] for part in parts])
        refuse_not_finite(ids, features, logits, fold)
        logit, *others = logits.T if logits.shape[1] else (None,)
        aux = dict(zip(aux_names, others, strict=True))
        with published(path) as whole:
            write_shard(whole, ids, features, logit, digest, aux)


def good_rows(
    batch: Computed, fold: Fold, dtype: type[np.floating]
) -> tuple[NDArray[np.floating], NDArray[np.float32]]:
    """Return features [G, D] in `dtype` and logits [G, 1 + K] of the G images without failure.

    The logits of a backbone without a lesion head are [G, 0].
    """
    features, *parts = (mean_of_views(values, len(batch.ids)) for values in batch.outputs[fold])
    logits = np.concatenate([np.empty((len(features), 0), np.float32), *parts], axis=1)
    good = [row for row in range(len(batch.ids)) if row not in batch.failed]
    if batch.failed:
        features, logits = features[good], logits[good]
    with np.errstate(over="ignore"):  # an infinite value is found and reported
        return features.astype(dtype, copy=False), logits.astype(np.float32, copy=False)


def mean_of_views(values: NDArray[np.floating], num_images: int) -> NDArray[np.floating]:
    """Return the mean over the views, in float32, of values [V * N, ...]; of one view as it is."""
    num_views = len(values) // num_images
    if num_views == 1:
        return values
    # Added in order; the number of views is a power of two, so the product is exact.
    total = values[:num_images].astype(np.float32)
    for view in range(1, num_views):
        total += values[view * num_images : (view + 1) * num_images]
    return total * np.float32(1 / num_views)


def refuse_not_finite(
    ids: Sequence[str], features: NDArray[np.floating], logits: NDArray[np.float32], fold: Fold
) -> None:
    """Raise UserError for a value that is not finite in features [G, D] or logits [G, L]."""
    # After the conversion: a value of a float32 engine can overflow float16.
    finite = np.isfinite(features).all(axis=1) & np.isfinite(logits).all(axis=1)
    if not finite.all():
        first = ids[int(np.argmin(finite))]
        raise UserError(
            f"the engine of fold {fold} returns values for {first} that are not finite as "
            f"{features.dtype}; use --dtype float32, or export the model in another precision"
        )
