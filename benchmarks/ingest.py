"""`python -m benchmarks ingest`: from ids to uint8 batches, compared with the usual loaders."""

import io
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from timm.data import create_transform

from benchmarks.record import Row, print_and_append, ratio_columns
from benchmarks.settings import IngestSettings
from benchmarks.timing import batches, seconds_of
from infer.embedding.decoders import DecoderThreads, Recipe
from infer.embedding.pipeline import DecodeAhead, num_slots
from infer.embedding.ring import Ring
from isic import schema
from isic.dataset import Dataset
from isic.hdf5 import Index, build_index
from isic.images import Hdf5Images, ImageStore, decode_pool
from isic.preprocess import IMAGENET_MEAN, IMAGENET_STD, Pixels, PreprocessSpec
from isic.synth.write import write_images

BATCH = 256
FULL_SIZE = 401_059
BARE = "bare pread + cv2"
NUM_CACHED = 5
"""Repeats of reading the index from the cache."""

ReadAll = Callable[[Sequence[str]], None]
"""Reads the images of some ids, batch by batch."""


@dataclass(frozen=True)
class ImageLoader:
    """One way to turn ids into batches."""

    name: str
    read: ReadAll
    share: float = 1.0
    """Share of the images that it reads per repeat."""
    bare: str | None = None
    """Name of the bare loop that its rate is divided by."""


def ingest(settings: IngestSettings) -> None:
    """Measure images per second from ids to batches, for this toolkit and for common loaders."""
    dataset = Dataset(settings.data)
    ids = dataset.metadata("train")[schema.ID].to_list()[: settings.images]
    store = dataset.images("train")
    loaders = make_loaders(store, settings)
    rates = loader_rates(loaders, ids, settings.repeats)
    first = rates[loaders[0].name]
    rows = [_row(loader, rates, first, settings.size, len(ids)) for loader in loaders]
    print_and_append("ingest", rows, settings.results)
    if settings.index and isinstance(store, Hdf5Images):
        print_and_append("ingest", time_index(store), settings.results)


def make_loaders(store: ImageStore, settings: IngestSettings) -> list[ImageLoader]:
    """Return the loaders for a store; those of HDF5 files only if it is one."""
    spec = PreprocessSpec(size=settings.size)
    threads = {number: f"{number} thread{'s' * (number > 1)}" for number in settings.threads}
    loaders = [
        ImageLoader(f"ours, {text}", _ours(store, spec, number), bare=f"{BARE}, {text}")
        for number, text in threads.items()
    ]
    if isinstance(store, Hdf5Images):
        bare = partial(_bare, store.source, build_index(store.source), settings.size)
        loaders += [
            ImageLoader(f"{BARE}, {text}", bare(number)) for number, text in threads.items()
        ]
        notebook = _notebook(store.source, settings.size)
        loaders.append(ImageLoader("h5py + PIL + numpy, 1 core", notebook, share=0.1))
    for num_workers in (0, 2):
        name = f"timm transform in a DataLoader, {num_workers} workers"
        loaders.append(
            ImageLoader(name, _data_loader(store, settings.size, num_workers), share=0.25)
        )
    return loaders


def loader_rates(
    loaders: Sequence[ImageLoader], ids: Sequence[str], repeats: int
) -> dict[str, list[float]]:
    """Return images per second of each loader and repeat, after one warm-up of each."""
    rates: dict[str, list[float]] = {loader.name: [] for loader in loaders}
    for repeat in range(repeats + 1):
        # In turns, so that a drift of the machine affects all of them.
        for loader in loaders:
            wanted = ids[: max(1, round(loader.share * len(ids)))]
            seconds = seconds_of(partial(loader.read, wanted))
            if repeat:
                rates[loader.name].append(len(wanted) / seconds)
    return rates


def _row(
    loader: ImageLoader,
    rates: dict[str, list[float]],
    first: list[float],
    size: int,
    num_images: int,
) -> Row:
    own = rates[loader.name]
    row: Row = {
        "what": loader.name,
        "images": num_images,
        "size": size,
        "images_per_second": round(statistics.median(own)),
        "min": round(min(own)),
        "max": round(max(own)),
        "first_is_faster_by": ratio_columns("first", first, own, digits=2)["first"],
    }
    if loader.bare in rates:
        row |= ratio_columns("of_bare", own, rates[loader.bare])
    return row


def _ours(store: ImageStore, spec: PreprocessSpec, num_threads: int) -> ReadAll:
    """The ring of batches that embedding reads, without an engine behind it."""
    # The ring exists already: an embedding run creates it once for all its images.
    ring = Ring((num_slots(BATCH, DecoderThreads, num_threads), BATCH, spec.size, spec.size, 3))
    decoders = DecoderThreads(store, Recipe(spec, "none"), ring, num_threads)

    def read(ids: Sequence[str]) -> None:
        stream = DecodeAhead(decoders, ring.slots, batches(ids, BATCH))
        for batch in stream:
            assert not batch.failed
            stream.release(batch)

    return read


def _bare(path: Path, index: Index, size: int, num_threads: int) -> ReadAll:
    """The machine's limit: one pread, decode and resize per image, with the ids split by thread."""
    pool = decode_pool(num_threads)
    file = os.open(path, os.O_RDONLY)
    names = np.char.decode(index.ids).tolist()
    places = zip(index.sizes.tolist(), index.offsets.tolist(), strict=True)
    place_of = dict(zip(names, places, strict=True))
    outs = [np.empty((BATCH, size, size, 3), np.uint8) for _ in range(num_threads)]

    def decode(ids: Sequence[str], out: Pixels) -> None:
        for row, name in enumerate(ids):
            data = np.frombuffer(os.pread(file, *place_of[name]), np.uint8)
            image = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)
            assert image is not None
            cv2.resize(image, (size, size), dst=out[row % BATCH])

    def read(ids: Sequence[str]) -> None:
        parts = [ids[thread::num_threads] for thread in range(num_threads)]
        list(pool.map(decode, parts, outs))

    return read


def _notebook(path: Path, size: int) -> ReadAll:
    """h5py by key, PIL with bicubic resize, numpy: as in most public notebooks."""
    mean = np.array(IMAGENET_MEAN, np.float32)
    std = np.array(IMAGENET_STD, np.float32)

    def load(file: h5py.File, name: str) -> NDArray[np.float32]:
        picture = PIL.Image.open(io.BytesIO(file[name][()])).convert("RGB")
        resized = picture.resize((size, size), PIL.Image.Resampling.BICUBIC)
        pixels = (np.asarray(resized, np.float32) / 255 - mean) / std
        return np.asarray(pixels.transpose(2, 0, 1), np.float32)

    def read(ids: Sequence[str]) -> None:
        with h5py.File(path) as file:
            for names in batches(ids, BATCH):
                np.stack([load(file, name) for name in names])

    return read


def _data_loader(store: Any, size: int, num_workers: int) -> ReadAll:
    """timm's evaluation transform in a torch DataLoader, as in most training code."""
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

    def read(ids: Sequence[str]) -> None:
        loader = torch.utils.data.DataLoader(Images(ids), batch_size=BATCH, num_workers=num_workers)
        for _ in loader:
            pass

    return read


def time_index(store: Hdf5Images) -> list[Row]:
    """Measure the seconds to index a file of 401,059 images, and to read it from the cache."""
    files = store.read(store.ids[:1000].tolist())
    names = (f"ISIC_{row:07d}" for row in range(FULL_SIZE))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train-image.hdf5"
        write_images(path, ((name, files[row % len(files)]) for row, name in enumerate(names)))
        first = seconds_of(lambda: build_index(path))
        Hdf5Images(path)  # fills the cache
        cached = [seconds_of(lambda: Hdf5Images(path)) for _ in range(NUM_CACHED)]
    built: Row = {
        "what": "offset index, built",
        "images": FULL_SIZE,
        "seconds": round(first, 2),
    }
    from_cache: Row = {
        "what": "offset index, from the cache",
        "images": FULL_SIZE,
        "seconds": round(statistics.median(cached), 3),
    }
    return [built, from_cache]
