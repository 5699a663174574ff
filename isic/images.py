"""Image stores: read images by id from an HDF5 file or a folder, and decode them in threads."""

import contextlib
import hashlib
import itertools
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from isic import cache
from isic.hdf5 import H5PY_ERRORS, NO_OFFSET, as_text, brief, open_file, read_dataset
from isic.headers import IMAGE_SUFFIXES, UNKNOWN_SIZE, ImageError
from isic.preprocess import Pixels, PreprocessSpec, decode_into
from isic.runtime.arithmetic import ceil_div
from isic.runtime.errors import UserError

NO_IMAGE = "no image for this id"
IGNORED = frozenset({"__MACOSX", "@eaDir", "lost+found", "Thumbs.db", "desktop.ini"})
"""Names that operating systems put into folders. Hidden files are ignored too."""
UNCOMPRESSED = (".bmp", ".tif", ".tiff")
"""Endings of files that may be uncompressed."""

# Few enough to balance threads, enough to read neighbours together.
CHUNK = 32
"""Images per task."""
LOOK_ROWS = 256
"""Rows per task when images are only checked."""
MAX_GAP = 16 * 1024
"""Largest gap, in bytes, that is read through rather than skipped with a second pread."""
MAX_AHEAD = 8 * 1024 * 1024
"""Bytes of a chunk above which its images are read one by one, to bound memory."""


class ImageStore(ABC):
    """Images by `isic_id`.

    Safe to read from several threads, from a forked process, and from one that received it pickled.
    """

    def __init__(
        self, source: Path, names: NDArray[np.bytes_], rejected: Mapping[str, str]
    ) -> None:
        """Store the ids.

        Args:
            names: [N] ids in UTF-8, sorted by their bytes.
            rejected: the reason by name for each entry that is not an image.
        """
        self.source = source
        self.rejected = rejected
        # UTF-8 takes a quarter of the memory of numpy's strings.
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    @property
    def ids(self) -> NDArray[np.str_]:
        """[N] str, sorted; a new array on each call."""
        return np.char.decode(self._names, "utf-8", "backslashreplace")

    def locate(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Return the position of each id in `self.ids`, -1 for an id without an image."""
        if not len(self):
            return np.full(len(ids), -1)
        encoded = [name.encode("utf-8", "surrogatepass") for name in ids]
        wanted = np.array(encoded, dtype=self._names.dtype)
        # numpy cuts longer bytes and drops zero bytes at the end of fixed-width ones.
        whole = np.char.str_len(wanted) == [len(name) for name in encoded]
        position = np.searchsorted(self._names, wanted)
        position = np.minimum(position, len(self) - 1)  # ids after the last one
        return np.where(whole & (self._names[position] == wanted), position, -1)

    def missing(self, ids: Sequence[str]) -> list[str]:
        """Return the ids without an image in this store."""
        return [name for name, position in zip(ids, self.locate(ids), strict=True) if position < 0]

    def reason(self, name: str) -> str:
        return self.rejected.get(name, NO_IMAGE)

    def read(self, ids: Sequence[str]) -> list[bytes]:
        """Return the bytes of each image file.

        Raises:
            UserError: an id has no image, or its image cannot be read.
        """
        files, failed = self.read_each(ids)
        if failed:
            row, reason = min(failed.items())
            raise UserError(
                f"{self.source}: {len(failed)} of {len(ids)} images cannot be read, "
                f"the first is {ids[row]} ({reason}); run `python -m isic check` for the whole list"
            )
        return files

    def read_each(self, ids: Sequence[str]) -> tuple[list[bytes], dict[int, str]]:
        """Return the bytes of each image file, empty on failure, and the reason per failed row."""
        files, failed = [], {}
        for row, position in enumerate(self.locate(ids).tolist()):
            try:
                files.append(self._read_image(position, ids[row]))
            except ImageError as error:
                files.append(b"")
                failed[row] = str(error)
        self.refuse_changes()
        return files, failed

    def refuse_changes(self) -> None:
        """Raise UserError if the source was changed since it was opened and bytes may be wrong."""
        return  # files in a folder are opened by name for each read

    @abstractmethod
    def read_at(self, position: int) -> bytes:
        """Return the bytes of the image at a position of `self.ids`. Raise ImageError."""

    @abstractmethod
    def sizes(self) -> NDArray[np.int64]:
        """Return [N] the size of each image in bytes, in the order of `self.ids`."""

    def sizes_digest(self) -> str:
        """Return a digest of all file sizes, which detects replaced images without reading them.

        Of files that may be uncompressed it includes the bytes.
        """
        return hashlib.sha256(self.sizes().astype("<i8").tobytes()).hexdigest()[:16]

    def load(self, ids: Sequence[str], spec: PreprocessSpec) -> tuple[Pixels, dict[int, str]]:
        """Return the images of N ids, uint8 [N, size, size, 3], and the reason per failed row.

        The pixels of an image that is absent or does not decode are zero.
        """
        pixels = np.empty((len(ids), spec.size, spec.size, 3), dtype=np.uint8)
        with decode_pool(1) as pool:
            failed = self.decode(ids, spec, pixels, pool)
        return pixels, failed

    def decode(
        self,
        ids: Sequence[str],
        spec: PreprocessSpec,
        out: Pixels,
        pool: ThreadPoolExecutor | None = None,
    ) -> dict[int, str]:
        """Decode and resize the images of `ids` into `out`.

        Args:
            out: contiguous uint8 [N, size, size, 3]; failed rows are zeroed.
            pool: decodes in its threads instead of in this one.

        Returns:
            The reason per row for every image that is absent or does not decode.
        """
        if pool is None:
            return self._decode(ids, spec, out)
        # At least one chunk per thread, also of a small batch.
        size = max(1, min(CHUNK, ceil_div(len(ids), pool._max_workers)))
        starts = range(0, len(ids), size)

        def decode(start: int) -> dict[int, str]:
            rows = slice(start, start + size)
            failed = self._decode(ids[rows], spec, out[rows])
            return {start + row: reason for row, reason in failed.items()}

        return {
            row: reason for failed in pool.map(decode, starts) for row, reason in failed.items()
        }

    def read_ahead(self, positions: Sequence[int]) -> dict[int, bytes]:
        """Read images that are cheaper to read together; `read_at` reads the others."""
        return {}

    def header_sizes(self, positions: Sequence[int]) -> Iterable[tuple[int, int]]:
        """Return height and width of each image, UNKNOWN_SIZE for one whose header was not read."""
        return itertools.repeat(UNKNOWN_SIZE, len(positions))

    def each(
        self, ids: Sequence[str], use: Callable[[int, bytes, tuple[int, int]], None]
    ) -> dict[int, str]:
        """Call `use` with row, bytes, and height and width (or UNKNOWN_SIZE) of each image.

        Returns:
            The reason per row for every image that is absent, or for which `use` raises ImageError.
        """
        positions: list[int] = self.locate(ids).tolist()
        files = self.read_ahead(positions)
        sizes = self.header_sizes(positions)
        failed = {}
        for row, (position, size) in enumerate(zip(positions, sizes, strict=True)):
            try:
                data = files.get(position)
                if data is None:
                    data = self._read_image(position, ids[row])
                use(row, data, size)
            except ImageError as error:
                failed[row] = str(error)
        self.refuse_changes()
        return failed

    def _decode(self, ids: Sequence[str], spec: PreprocessSpec, out: Pixels) -> dict[int, str]:
        failed = self.each(ids, lambda row, data, size: decode_into(data, spec, out[row], size))
        for row in failed:
            out[row] = 0
        return failed

    def _read_image(self, position: int, name: str) -> bytes:
        if position < 0:
            raise ImageError(self.reason(name))
        return self.read_at(position)


def decode_pool(num_threads: int) -> ThreadPoolExecutor:
    """Return threads for decoding, with OpenCV's own threads and messages turned off."""
    quiet_opencv()
    return ThreadPoolExecutor(num_threads, thread_name_prefix="decode")


def quiet_opencv() -> None:
    """Turn off OpenCV's own threads and messages in this process."""
    cv2.setNumThreads(1)  # its threads would compete for the same cores
    # The ImageError of an image has the reason.
    if hasattr(cv2, "setLogLevel"):  # up to OpenCV 4.12, which lacks cv2.utils.logging
        cv2.setLogLevel(0)
    else:
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def failures(
    look: Callable[[int], object], rows: Sequence[int], num_threads: int
) -> dict[int, str]:
    """Call `look` per row in threads. Return the reason for each row that raises ImageError."""

    def reasons(chunk: Sequence[int]) -> dict[int, str]:
        found = {}
        for row in chunk:
            try:
                look(row)
            except ImageError as error:
                found[row] = str(error)
        return found

    # One task per row would take more memory than the files do.
    chunks = [rows[start : start + LOOK_ROWS] for start in range(0, len(rows), LOOK_ROWS)]
    failed: dict[int, str] = {}
    with decode_pool(num_threads) as pool:
        for found in pool.map(reasons, chunks):
            failed.update(found)
    return failed


class FileImages(ImageStore):
    """Images that are files, each with an id."""

    def __init__(
        self, source: Path, files: Iterable[tuple[bytes, str]], rejected: Mapping[str, str]
    ) -> None:
        """Store the files.

        Args:
            source: the folder or list that they are of, for messages.
            files: id in UTF-8 and path of each.
            rejected: the reason by name for each entry that is not an image.
        """
        found = sorted(files)
        super().__init__(source, np.array([name for name, _ in found], dtype=np.bytes_), rejected)
        self._paths = [path for _, path in found]

    def read_at(self, position: int) -> bytes:
        try:
            return Path(self._paths[position]).read_bytes()
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror or error}") from None

    def sizes(self) -> NDArray[np.int64]:
        return np.array([_size(path) for path in self._paths], np.int64)

    def sizes_digest(self) -> str:
        of_sizes = super().sizes_digest()
        uncompressed = [
            position
            for position, path in enumerate(self._paths)
            if path.lower().endswith(UNCOMPRESSED)
        ]
        if not uncompressed:
            return of_sizes
        # Uncompressed images of one camera all have one size. Their times would not do: a run must
        # resume on a copy of the folder.
        digest = hashlib.sha256(of_sizes.encode())
        with ThreadPoolExecutor() as pool:
            for of_content in pool.map(self._sha256, uncompressed):
                digest.update(of_content)
        return digest.hexdigest()[:16]

    def _sha256(self, position: int) -> bytes:
        """Return the digest of an image file, empty if it cannot be read."""
        try:
            return hashlib.sha256(self.read_at(position)).digest()
        except ImageError:
            return b""


class FolderImages(FileImages):
    """A folder of `<isic_id>.jpg` files, or of other IMAGE_SUFFIXES, at any depth."""

    def __init__(self, folder: Path) -> None:
        """List the folder. Raise UserError if it cannot be read or an id has two files."""
        found: list[tuple[bytes, str]] = []
        rejected: dict[str, str] = {}
        self.other_files: Counter[str] = Counter()
        """Number of files that are not images, by suffix."""
        for entry in _walk(folder):
            suffix = Path(entry.name).suffix
            if suffix.lower() not in IMAGE_SUFFIXES:
                self.other_files[suffix or "without suffix"] += 1
                continue
            name = self._id(folder, Path(entry.path))
            reason = _not_a_file(entry)
            if reason:
                rejected[as_text(name)] = reason
            else:
                found.append((name, entry.path))
        super().__init__(folder, found, rejected)
        self._refuse_duplicates()
        if not found:
            raise UserError(
                f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)}){self._content()}"
            )

    def _id(self, folder: Path, path: Path) -> bytes:
        return os.fsencode(path.stem)

    def _refuse_duplicates(self) -> None:
        second = np.flatnonzero(self._names[1:] == self._names[:-1]) + 1
        if len(second):
            first = second[0]
            raise UserError(
                f"{self.source}: {len(second)} images have the id of another one, the first are "
                f"{self._paths[first - 1]} and {self._paths[first]}; keep one image per id in this "
                "folder and move the others elsewhere"
            )

    def _content(self) -> str:
        if self.rejected:
            (name, reason), *_ = self.rejected.items()
            return f"; the first of {len(self.rejected)} that cannot be used is {name} ({reason})"
        others = ", ".join(f"{count} {suffix}" for suffix, count in self.other_files.most_common(5))
        return f"; it has other files: {others}" if others else ""


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:
        return -1


def _walk(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield all files below a folder, links included. Raise UserError for an unreadable folder."""
    pending = [os.fspath(folder)]
    # Each folder once, even if links form a loop.
    seen = {_identity(parent) for parent in Path(os.path.realpath(folder)).parents}
    while pending:
        current = pending.pop()
        try:
            with os.scandir(current) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"{current} cannot be read: {error.strerror}") from None
        identity = _identity(current)
        if identity in seen:
            continue
        seen.add(identity)
        for entry in entries:
            if entry.name.startswith(".") or entry.name in IGNORED:
                continue
            if _is_folder(entry):
                pending.append(entry.path)
            else:
                yield entry


def _identity(folder: str | Path) -> tuple[int, int] | None:
    """Return device and inode, the same for every path to a folder; None if it is out of reach."""
    try:
        found = Path(folder).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads back to itself or into a folder without permission
        return False


def _not_a_file(entry: os.DirEntry[str]) -> str | None:
    try:
        if entry.is_file():
            return None
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if entry.is_symlink():
        return f"a link to {Path(entry.path).readlink()}, which does not exist"
    return "not a regular file"


class Hdf5Images(ImageStore):
    """The challenge's HDF5 file: one scalar dataset per id, the bytes of an image file."""

    # h5py holds one lock for the whole library while it reads. Bytes that are stored unchanged
    # (contiguous, no filter, in this file) are therefore read by offset.

    def __init__(self, path: Path) -> None:
        """Open a file and read its index. Raise UserError if either fails."""
        self._file = open_file(path)
        self._state = cache.state(self._file)
        index = cache.load_index(path, self._file)
        rejected = dict(zip(index.rejected.tolist(), index.reasons.tolist(), strict=True))
        super().__init__(path, index.ids, rejected)
        self._offsets = index.offsets
        self._sizes = index.sizes
        self._heights = index.heights
        self._widths = index.widths

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the descriptor, which has no meaning in another process."""
        return {name: value for name, value in vars(self).items() if name != "_file"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the file again. Raise UserError if it is absent or no longer the same file."""
        vars(self).update(state)
        self._file = open_file(self.source)
        self.refuse_changes()

    def refuse_changes(self) -> None:
        if cache.state(self._file) != self._state:
            raise UserError(
                f"{self.source} was changed on disk while it was in use; run the same command again"
            )

    def read_at(self, position: int) -> bytes:
        offset = self._offsets[position]
        try:
            if offset == NO_OFFSET:
                return read_dataset(self.source, bytes(self._names[position]))
            return os.pread(self._file, self._sizes[position], offset)
        except H5PY_ERRORS as error:
            raise ImageError(f"cannot be read: {brief(error)}") from None

    def sizes(self) -> NDArray[np.int64]:
        return self._sizes

    def header_sizes(self, positions: Sequence[int]) -> Iterable[tuple[int, int]]:
        return zip(self._heights[positions].tolist(), self._widths[positions].tolist(), strict=True)

    def read_ahead(self, positions: Sequence[int]) -> dict[int, bytes]:
        """Read images that are neighbours in the file with one system call per group."""
        files: dict[int, bytes] = {}
        offsets = self._offsets[positions].tolist()
        sizes = self._sizes[positions].tolist()
        places = [
            place
            for place in zip(offsets, sizes, positions, strict=True)
            if place[0] != NO_OFFSET and place[2] >= 0
        ]
        if sum(size for _, size, _ in places) > MAX_AHEAD:
            return files
        with contextlib.suppress(OSError):  # read_at will fail with the reason for each image
            for start, stop, group in _neighbours(sorted(places)):
                data = os.pread(self._file, stop - start, start)
                for offset, size, position in group:
                    files[position] = data[offset - start : offset - start + size]
        return files


# Not a named tuple, because making one takes several times as long.
Place = tuple[int, int, int]
"""Offset and size of an image in bytes, and the image's position in `ids`."""


def _neighbours(places: Sequence[Place]) -> Iterator[tuple[int, int, list[Place]]]:
    """Yield start, stop and places of groups without a gap above MAX_GAP bytes.

    Args:
        places: sorted by offset.
    """
    group: list[Place] = []
    stop = 0
    for place in places:
        offset, size, _ = place
        if group and offset - stop > MAX_GAP:
            yield group[0][0], stop, group
            group = []
        group.append(place)
        stop = offset + size
    if group:
        yield group[0][0], stop, group


def open_images(root: Path, split: str) -> ImageStore | None:
    """Open a split's images: the HDF5 file, else the folder of image files, else None.

    Raises:
        UserError: the file or folder exists but cannot be used.
    """
    images = open_hdf5(root / f"{split}-image.hdf5")
    return images if images is not None else open_folder(root / f"{split}-image")


def open_hdf5(path: Path) -> Hdf5Images | None:
    """Open an HDF5 file of images or masks. Return None if there is none. Raise UserError."""
    return Hdf5Images(path) if os.path.lexists(path) else None


def open_folder(folder: Path) -> FolderImages | None:
    """Open a folder of image files. Return None if there is none. Raise UserError."""
    return FolderImages(folder) if os.path.lexists(folder) else None
