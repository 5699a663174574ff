"""Image stores: JPEG bytes by id from an HDF5 file (by byte offset) or a folder, decoded from threads."""

import contextlib
import hashlib
import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
from numpy.typing import NDArray

from isic.errors import UserError
from isic.files import atomic_path, digest
from isic.preprocess import JPEG_START, ImageError, Pixels, PreprocessSpec, decode_into

NO_OFFSET = -1
INDEX_VERSION = 2
HDF5_CACHE = 1024 * 1024
INDEX_SLICE = 32768
"""Rows that are Python objects at a time while an index is built: those of a full-size file leave memory full of
holes."""

CHUNK = 32
"""Images that one thread reads and decodes at a time, at most: few enough to share out, enough to read at once."""
MAX_GAP = 16 * 1024
"""Bytes between two images that are rather read along than skipped with another call."""
MAX_AHEAD = 8 * 1024 * 1024
"""Bytes of a chunk above which its images are read one by one, to bound memory."""


class ImageStore(ABC):
    """Images by `isic_id`. Safe to read from several threads, and from a forked process."""

    def __init__(self, source: Path, names: NDArray[np.bytes_]) -> None:
        """Keeps the sorted ids as UTF-8: a quarter of what numpy's strings take, and in the same order."""
        self.source = source
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    @property
    def ids(self) -> NDArray[np.str_]:
        """[N] str, sorted; made anew for each caller."""
        return np.char.decode(self._names, "utf-8")

    def locate(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Returns the position of each id in `self.ids`, -1 for an id without an image."""
        if not len(self):
            return np.full(len(ids), -1)
        wanted = np.array([name.encode() for name in ids], dtype=np.bytes_)
        position = np.minimum(np.searchsorted(self._names, wanted), len(self) - 1)
        return np.where(self._names[position] == wanted, position, -1)

    def missing(self, ids: Sequence[str]) -> list[str]:
        """Returns those of `ids` that have no image here."""
        return [name for name, position in zip(ids, self.locate(ids), strict=True) if position < 0]

    def read(self, ids: Sequence[str]) -> list[bytes]:
        """Returns the bytes of each image file.

        Raises:
            UserError: an id has no image.
        """
        positions = self.locate(ids)
        absent = np.flatnonzero(positions < 0)
        if len(absent):
            raise UserError(
                f"{self.source}: {len(absent)} of {len(ids)} ids have no image, the first is {ids[absent[0]]}; "
                "run `python -m isic check` for the whole list"
            )
        return [self.read_at(int(position)) for position in positions]

    @abstractmethod
    def read_at(self, position: int) -> bytes:
        """Returns the bytes of the image at a position of `self.ids`."""

    @abstractmethod
    def sizes(self) -> NDArray[np.int64]:
        """Returns [N] the bytes of each image in the order of `self.ids`."""

    def sizes_digest(self) -> str:
        """Returns what tells images that were replaced by others, short of reading them all."""
        return hashlib.sha256(self.sizes().astype("<i8").tobytes()).hexdigest()[:16]

    def decode(
        self,
        ids: Sequence[str],
        spec: PreprocessSpec,
        out: Pixels,
        pool: ThreadPoolExecutor | None = None,
    ) -> dict[int, str]:
        """Decodes and resizes the images of `ids` into `out`, with the threads of `pool` where one is given.

        Args:
            ids: N ids.
            spec: size and interpolation.
            out: uint8 [N, size, size, 3], contiguous; the row of an image that fails is set to zero.
            pool: its size is the number of threads.

        Returns:
            The reason by row for every image that is absent or does not decode.
        """
        if pool is None:
            return self._decode_rows(self.locate(ids), spec, out, range(len(ids)))
        return gather(self.submit(ids, spec, out, pool))

    def submit(
        self, ids: Sequence[str], spec: PreprocessSpec, out: Pixels, pool: ThreadPoolExecutor
    ) -> "list[Decoding]":
        """Starts to decode into `out` as `decode` does, and returns at once; `gather` waits for what it returns."""
        positions = self.locate(ids)
        size = max(1, min(CHUNK, -(-len(ids) // pool._max_workers)))
        chunks = [range(start, min(start + size, len(ids))) for start in range(0, len(ids), size)]
        return [pool.submit(self._decode_rows, positions, spec, out, rows) for rows in chunks]

    def read_ahead(self, positions: Sequence[int]) -> dict[int, bytes]:
        """Reads those images of some positions that are cheaper to read together. The rest is for `read_at`."""
        return {}

    def _decode_rows(
        self, positions: NDArray[np.int64], spec: PreprocessSpec, out: Pixels, rows: range
    ) -> dict[int, str]:
        wanted: list[int] = positions[rows.start : rows.stop].tolist()
        files = self.read_ahead(wanted)
        failed = {}
        for row, position in zip(rows, wanted, strict=True):
            try:
                decode_into(
                    files[position] if position in files else self._read_image(position),
                    spec,
                    out[row],
                )
            except ImageError as error:
                failed[row] = str(error)
                out[row] = 0
        return failed

    def _read_image(self, position: int) -> bytes:
        if position < 0:
            raise ImageError("no image for this id")
        try:
            return self.read_at(position)
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror or error}") from None


Decoding = Future[dict[int, str]]


def gather(decodings: Sequence[Decoding]) -> dict[int, str]:
    """Waits for what `submit` started. Returns the reason by row for every image that failed, rows ascending."""
    failed: dict[int, str] = {}
    for decoding in decodings:
        failed.update(decoding.result())
    return failed


def _file_bytes(value: Any) -> bytes:
    """Returns the bytes in what h5py read: fixed-length or variable-length, scalar or not."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "O":
        return b"".join(map(_file_bytes, value.ravel()))
    return value if isinstance(value, bytes) else bytes(value.tobytes())


def decode_pool(num_threads: int) -> ThreadPoolExecutor:
    """Threads for decoding. OpenCV's own threads are turned off: they would only get in each other's way.

    So are its messages on standard error: what is wrong with an image stands in its ImageError.
    """
    cv2.setNumThreads(1)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return ThreadPoolExecutor(num_threads, thread_name_prefix="decode")


class FolderImages(ImageStore):
    """A folder of `<isic_id>.jpg` files, at any depth."""

    def __init__(self, folder: Path) -> None:
        paths = sorted((path.stem, path) for path in folder.rglob("*.jpg"))
        super().__init__(folder, np.array([name.encode() for name, _ in paths], dtype=np.bytes_))
        self._paths = [path for _, path in paths]

    def read_at(self, position: int) -> bytes:
        return self._paths[position].read_bytes()

    def sizes(self) -> NDArray[np.int64]:
        return np.array([path.stat().st_size for path in self._paths], np.int64)


class Hdf5Images(ImageStore):
    """The challenge's HDF5 file: one scalar dataset of JPEG bytes per id.

    h5py reads under one lock for the whole library. Where a dataset's bytes lie in the file as they are
    (contiguous storage, no filter, not external), they are read by offset instead, which needs no lock.
    """

    def __init__(self, path: Path) -> None:
        index = _load_index(path)
        super().__init__(path, index["isic_id"])
        self._offsets, self._sizes = index["offset"], index["size"]
        self._file = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def read_at(self, position: int) -> bytes:
        offset = self._offsets[position]
        if offset == NO_OFFSET:
            with h5py.File(self.source, "r") as file:
                return _file_bytes(file[bytes(self._names[position])][()])
        return os.pread(self._file, self._sizes[position], offset)

    def sizes(self) -> NDArray[np.int64]:
        return self._sizes

    def read_ahead(self, positions: Sequence[int]) -> dict[int, bytes]:
        """Reads neighbours in the file with one call."""
        files: dict[int, bytes] = {}
        offsets, sizes = self._offsets[positions].tolist(), self._sizes[positions].tolist()
        places = [
            place
            for place in zip(offsets, sizes, positions, strict=True)
            if place[0] >= 0 <= place[2]
        ]
        if sum(size for _, size, _ in places) > MAX_AHEAD:
            return files
        for span in _neighbours(sorted(places)):
            start, (last, size, _) = span[0][0], span[-1]
            with contextlib.suppress(
                OSError
            ):  # then they are read one by one, and each says why it cannot be
                data = os.pread(self._file, last + size - start, start)
                files |= {
                    position: data[at - start : at - start + size] for at, size, position in span
                }
        return files


DAMAGED = (zipfile.BadZipFile, ValueError, EOFError, KeyError)
"""What numpy raises for an archive that is not one, is cut short or holds something else."""

Place = tuple[int, int, int]
"""Offset, size and position of an image's bytes."""


def _neighbours(places: Sequence[Place]) -> Iterator[list[Place]]:
    """Splits places, sorted by offset, wherever more than MAX_GAP lies between two."""
    span: list[Place] = []
    for place in places:
        if span and place[0] - (span[-1][0] + span[-1][1]) > MAX_GAP:
            yield span
            span = []
        span.append(place)
    if span:
        yield span


def open_images(root: Path, split: str) -> ImageStore | None:
    """Opens the images of `train` or `test` under a dataset's folder: the HDF5 file, else the folder of JPEGs.

    Returns:
        None where the dataset has no images for this split.
    """
    path, folder = root / f"{split}-image.hdf5", root / f"{split}-image"
    if path.is_file():
        return Hdf5Images(path)
    return FolderImages(folder) if folder.is_dir() else None


def index_path(path: Path) -> Path:
    """Where the offset index of an HDF5 file is kept: beside it, or in the user's cache if that is read-only."""
    beside = path.with_name(f".{path.name}.index.npz")
    if beside.exists() or os.access(path.parent, os.W_OK):
        return beside
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "isic-toolkit" / f"{digest(path.resolve())}.index.npz"


Index = dict[str, NDArray[Any]]
"""Where each image's bytes lie, by column, [N] each: `isic_id` UTF-8 (sorted), `offset` and `size` int64, in bytes."""


def build_index(path: Path) -> Index:
    """Reads where each image's bytes lie in an HDF5 file.

    Returns:
        The index; offset -1 where only h5py can read the bytes.

    Raises:
        UserError: the file is truncated or not HDF5, or holds no images.
    """
    try:
        with h5py.File(
            h5py.h5f.open(os.fsencode(path), h5py.h5f.ACC_RDONLY, _frugal_access())
        ) as file:
            index = _locate_all(file.id)
    except (
        OSError,
        RuntimeError,
        KeyError,
    ) as error:  # h5py's, in this order for the file, its tree, a dataset
        reason = str(error).split("(")[-1].rstrip(")")
        raise UserError(
            f"{path} is not a whole HDF5 file ({reason}); copy or download it again"
        ) from None
    if not len(index["isic_id"]):
        raise UserError(f"{path} holds no images; copy or download it again")
    order = np.argsort(index["isic_id"])
    index = {name: column[order] for name, column in index.items()}
    index["offset"][_pointers(index, path)] = NO_OFFSET
    return index


def _frugal_access() -> h5py.h5p.PropFAID:
    """Opens a file with a small cache for its structure: each of a full-size file's headers is looked at once."""
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    cache = access.get_mdc_config()
    cache.set_initial_size = True
    cache.initial_size = cache.min_size = cache.max_size = HDF5_CACHE
    access.set_mdc_config(cache)
    return access


def _locate_all(file: h5py.h5f.FileID) -> Index:
    """Returns the index of every dataset, in one walk: a list of a full-size file's names takes HDF5 100 MB."""
    rows: list[tuple[bytes, int, int]] = []
    slices: list[list[NDArray[Any]]] = []

    def locate(name: bytes) -> None:
        dataset = h5py.h5d.open(file, name)
        offset = dataset.get_offset()  # None unless contiguous, in this file, and allocated
        rows.append((name, NO_OFFSET if offset is None else offset, dataset.get_storage_size()))
        if len(rows) == INDEX_SLICE:
            slices.append(_columns(rows))
            rows.clear()

    file.links.iterate(locate)
    slices.append(_columns(rows))
    names, offsets, sizes = (np.concatenate(parts) for parts in zip(*slices, strict=True))
    return {"isic_id": names, "offset": offsets, "size": sizes}


def _columns(rows: Sequence[tuple[bytes, int, int]]) -> list[NDArray[Any]]:
    kinds = (np.bytes_, np.int64, np.int64)
    return [
        np.array([row[number] for row in rows], dtype=kind) for number, kind in enumerate(kinds)
    ]


def _pointers(index: Index, path: Path) -> list[int]:
    """Returns the rows of variable-length data, where the file holds a pointer instead of the bytes."""
    offsets = index["offset"]
    with open(path, "rb", buffering=0) as file:
        handle = file.fileno()
        inside = np.flatnonzero(offsets >= 0).tolist()
        suspect = [row for row in inside if os.pread(handle, 2, offsets[row]) != JPEG_START]
    if not suspect:
        return []
    with h5py.File(path, "r") as file:
        return [row for row in suspect if file[bytes(index["isic_id"][row])].dtype.kind == "O"]


def _load_index(path: Path) -> Index:
    stat = path.stat()
    key = digest(INDEX_VERSION, stat.st_size, stat.st_mtime_ns)
    cached = index_path(path)
    with (
        contextlib.suppress(FileNotFoundError, *DAMAGED),
        np.load(cached) as archive,
    ):  # a damaged one is built again
        if archive["key"] == key:
            return {name: archive[name] for name in ("isic_id", "offset", "size")}
    index = build_index(path)
    # without a cache it is only slower
    with (
        contextlib.suppress(UserError),
        atomic_path(cached) as temporary,
        open(temporary, "wb") as file,
    ):
        np.savez(file, key=np.array(key), **index)  # type: ignore[arg-type]
    return index
