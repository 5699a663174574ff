"""`python -m benchmarks ingest`: from ids to uint8 batches, against the usual loaders, in one run."""

import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import PIL.Image
import torch
from pydantic import Field
from timm.data import create_transform

from benchmarks.record import ratio, write
from infer.embedding.pipeline import decode_ahead, ring_depth
from isic import schema
from isic.dataset import Dataset
from isic.hdf5 import Index, build_index
from isic.images import Hdf5Images, ImageStore, decode_pool
from isic.preprocess import IMAGENET_MEAN, IMAGENET_STD, Pixels, PreprocessSpec
from isic.runtime.config import Settings, Several
from isic.synth.write import write_images

BATCH = 256
FULL_SIZE = 401_059
BARE = "bare pread + cv2"


class IngestSettings(Settings):
    """What `python -m benchmarks ingest` takes."""

    data: Path = Field(Path("data/isic-2024"), description="dataset folder with train-image.hdf5")
    size: int = Field(224, ge=8, description="side of the decoded images, pixels")
    images: int = Field(
        4000, ge=1, description="images a repeat of ours; the slower peers read a tenth"
    )
    repeats: int = Field(
        5, ge=1, description="repeats, of which the median counts; all ways take turns in each"
    )
    threads: Several[int] = Field(
        (1, 2), description="numbers of decoding threads, separated by commas"
    )
    index: bool = Field(True, description="also time the offset index of a file of 401,059 images")
    results: Path | None = Field(
        None, description="folder of the CSV; benchmarks/results if not given"
    )


@dataclass(frozen=True)
class Way:
    """One way to turn ids into batches."""

    name: str
    run: Callable[[Sequence[str]], None]
    share: float = 1.0
    """Share of the images that it reads in a repeat."""
    bare: str | None = None
    """Name of the way that does the same and nothing else."""


def ingest(settings: IngestSettings) -> None:
    """Measures images per second from ids to batches, for this toolkit and for the loaders that people use.

    All ways read the same images, in turns, so that a machine that drifts drifts for all.
    """
    dataset = Dataset(settings.data)
    ids = dataset.metadata("train")[schema.ID].to_list()[: settings.images]
    store, spec = dataset.images("train"), PreprocessSpec(size=settings.size)
    threads = {n: f"{n} thread{'s' * (n > 1)}" for n in settings.threads}
    ways = [
        Way(f"ours, {text}", _ours(store, spec, n), bare=f"{BARE}, {text}")
        for n, text in threads.items()
    ]
    if isinstance(store, Hdf5Images):
        bare = partial(_bare, store.source, build_index(store.source), settings.size)
        ways += [Way(f"{BARE}, {text}", bare(n)) for n, text in threads.items()]
        ways.append(
            Way("h5py + PIL + numpy, 1 core", _usual(store.source, settings.size), share=0.1)
        )
    ways += [
        Way(
            f"timm transform in a DataLoader, {n} workers",
            _data_loader(store, settings.size, n),
            0.25,
        )
        for n in (0, 2)
    ]
    rates = measure(ways, ids, settings.repeats)
    write("ingest", [_row(way, rates, settings, len(ids)) for way in ways], settings.results)
    if settings.index and isinstance(store, Hdf5Images):
        write("ingest", time_index(store), settings.results)


def measure(ways: Sequence[Way], ids: Sequence[str], repeats: int) -> dict[str, list[float]]:
    """Returns images per second of each way and repeat, after one warm-up of each."""
    rates: dict[str, list[float]] = {way.name: [] for way in ways}
    for repeat in range(repeats + 1):
        for way in ways:
            wanted = ids[: max(1, round(way.share * len(ids)))]
            started = time.perf_counter()
            way.run(wanted)
            if repeat:
                rates[way.name].append(len(wanted) / (time.perf_counter() - started))
    return rates


def _row(
    way: Way, rates: dict[str, list[float]], settings: IngestSettings, num_images: int
) -> dict[str, Any]:
    first, own = rates[next(iter(rates))], rates[way.name]
    row = {
        "what": way.name,
        "images": num_images,
        "size": settings.size,
        "images_per_second": round(statistics.median(own)),
        "min": round(min(own)),
        "max": round(max(own)),
        "first_is_faster_by": ratio("first", first, own, digits=2)["first"],
    }
    return {**row, **ratio("of_bare", own, rates[way.bare])} if way.bare in rates else row


def _ours(
    store: ImageStore, spec: PreprocessSpec, num_threads: int
) -> Callable[[Sequence[str]], None]:
    """The ring of batches that embedding reads, without an engine behind it."""
    pool, depth = decode_pool(num_threads), ring_depth(BATCH, num_threads)
    ring = [np.empty((BATCH, spec.size, spec.size, 3), np.uint8) for _ in range(depth)]

    def run(ids: Sequence[str]) -> None:
        free = iter(
            ring
        )  # memory that is there already: a run allocates it once, whatever the number of images
        for batch in decode_ahead(
            store, _batches(ids), spec, pool, BATCH, depth, lambda _: next(free)
        ):
            assert not batch.failed

    return run


def _bare(path: Path, index: Index, size: int, num_threads: int) -> Callable[[Sequence[str]], None]:
    """Nothing but a read, a decode and a resize for each image, a share of the images a thread: the machine's limit."""
    pool, file = decode_pool(num_threads), os.open(path, os.O_RDONLY)
    names, offsets, sizes = np.char.decode(index.ids), index.offsets, index.sizes
    places = dict(
        zip(names.tolist(), zip(sizes.tolist(), offsets.tolist(), strict=True), strict=True)
    )
    outs = [np.empty((BATCH, size, size, 3), np.uint8) for _ in range(num_threads)]

    def decode(ids: Sequence[str], out: Pixels) -> None:
        for row, name in enumerate(ids):
            image = cv2.imdecode(
                np.frombuffer(os.pread(file, *places[name]), np.uint8), cv2.IMREAD_COLOR_RGB
            )
            assert image is not None
            cv2.resize(image, (size, size), dst=out[row % BATCH])

    def run(ids: Sequence[str]) -> None:
        list(pool.map(decode, (ids[thread::num_threads] for thread in range(num_threads)), outs))

    return run


def _batches(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    return (ids[at : at + BATCH] for at in range(0, len(ids), BATCH))


def _usual(path: Path, size: int) -> Callable[[Sequence[str]], None]:
    """h5py by key, PIL with bicubic resize, normalised and transposed in numpy: what most public notebooks do."""
    mean, std = np.array(IMAGENET_MEAN, np.float32), np.array(IMAGENET_STD, np.float32)

    def load(file: h5py.File, name: str) -> Any:
        image = (
            PIL.Image.open(io.BytesIO(file[name][()]))
            .convert("RGB")
            .resize((size, size), PIL.Image.Resampling.BICUBIC)
        )
        return ((np.asarray(image, np.float32) / 255 - mean) / std).transpose(2, 0, 1)

    def run(ids: Sequence[str]) -> None:
        with h5py.File(path) as file:
            for batch in _batches(ids):
                np.stack([load(file, name) for name in batch])

    return run


def _data_loader(store: Any, size: int, num_workers: int) -> Callable[[Sequence[str]], None]:
    """timm's evaluation transform in a torch DataLoader: what most training code does."""
    transform = create_transform((3, size, size), is_training=False, crop_pct=1.0)

    class Images(torch.utils.data.Dataset[torch.Tensor]):
        def __init__(self, ids: Sequence[str]) -> None:
            self.ids = ids

        def __len__(self) -> int:
            return len(self.ids)

        def __getitem__(self, row: int) -> torch.Tensor:
            (data,) = store.read([self.ids[row]])
            tensor: torch.Tensor = transform(PIL.Image.open(io.BytesIO(data)).convert("RGB"))
            return tensor

    def run(ids: Sequence[str]) -> None:
        for _ in torch.utils.data.DataLoader(
            Images(ids), batch_size=BATCH, num_workers=num_workers
        ):
            pass

    return run


def time_index(store: Hdf5Images) -> list[dict[str, Any]]:
    """Seconds to index a file of 401,059 images the first time, and from the cache afterwards."""
    files = store.read(store.ids[:1000].tolist())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train-image.hdf5"
        write_images(
            path, ((f"ISIC_{row:07d}", files[row % len(files)]) for row in range(FULL_SIZE))
        )
        first = _seconds(lambda: build_index(path))
        Hdf5Images(path)
        cached = [_seconds(lambda: Hdf5Images(path)) for _ in range(5)]
    return [
        {"what": "offset index, built", "images": FULL_SIZE, "seconds": round(first, 2)},
        {
            "what": "offset index, from the cache",
            "images": FULL_SIZE,
            "seconds": round(statistics.median(cached), 3),
        },
    ]


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
