"""HDF5 files of images: the byte range of each image, and why a file or entry is unusable."""

import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from isic.headers import JPEG_START, PNG_START, UNKNOWN_SIZE, header_size
from isic.runtime.errors import UserError
from isic.runtime.files import COMPRESSED

NO_OFFSET = -1
MAX_NAME = 255
"""Bytes of an id. No file system allows longer names, and all ids are padded to the longest."""
METADATA_CACHE = 1024 * 1024
HEADER_BYTES = 512
"""Bytes read for the height and width of an image; a JPEG without a profile needs about 170."""
MAX_HEADER_BYTES = 1024 * 1024
"""Bytes read if they are further in. Bounds the memory, since a damaged file may claim any size."""
MAX_BYTES = 2**30
"""Bytes of the largest image file."""
# All 401,059 rows as Python objects would fragment the heap.
INDEX_SLICE = 32768
"""Rows held as Python objects at once."""

SIGNATURE = b"\x89HDF\r\n\x1a\n"
FIRST_USER_BLOCK = 512
"""The signature is at byte 0 or, after a user block, at 512, 1024, 2048 and so on."""

OTHER_FORMATS = (
    (b"version https://git-lfs", "is a Git LFS pointer; fetch the file with `git lfs pull`"),
    (b"PK\x03\x04", "is a zip archive; unpack it"),
    *((sign, f"is compressed with {name}; unpack it") for sign, name in COMPRESSED.items()),
    (b"7z\xbc\xaf\x27\x1c", "is a 7-Zip archive; unpack it"),
    (b"Rar!", "is a RAR archive; unpack it"),
    (b"<", "is a web page or XML; a download that needs a login saves such a page, sign in first"),
)
"""First bytes of other formats that are found in place of an HDF5 file, with a description."""

H5PY_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError)
"""Raised by h5py for a file, its tree, a link, a storage layout or a type that it cannot read."""

FILE_OF_BYTES = {h5py.h5t.STRING, h5py.h5t.OPAQUE}
"""Types of a dataset that holds the bytes of a file, apart from lists of bytes."""


class Index(NamedTuple):
    """The byte range of each of N images, and M entries that are not images."""

    ids: NDArray[np.bytes_]
    """[N] UTF-8, sorted."""
    offsets: NDArray[np.int64]
    """[N] bytes; NO_OFFSET for an image that only HDF5 can read."""
    sizes: NDArray[np.int64]
    """[N] bytes."""
    heights: NDArray[np.uint32]
    """[N] pixels, from the header; 0 if the header cannot be read by offset."""
    widths: NDArray[np.uint32]
    """[N] pixels, likewise."""
    rejected: NDArray[np.str_]
    """[M] names."""
    reasons: NDArray[np.str_]
    """[M] the reason that each is not an image."""


IndexRow = tuple[bytes, int, int]
"""Name, offset and size of one image."""


def build_index(path: Path) -> Index:
    """Read the byte range of every image in an HDF5 file.

    An image is a dataset at the top level that holds the bytes of an image file. Groups, dead
    links and arrays of pixels, whose colour order is undefined, are rejected.

    Raises:
        UserError: the file is truncated, damaged or locked, or holds no images.
    """
    try:
        handle = h5py.h5f.open(os.fsencode(path), h5py.h5f.ACC_RDONLY, _access())
        with h5py.File(handle) as file:
            index = _read_index(file.id, path)
    except H5PY_ERRORS as error:
        raise _unreadable(path, error) from None
    if not len(index.ids):
        raise UserError(f"{path} holds no images{_first_rejected(index)}")
    return index


def open_file(path: Path) -> int:
    """Open an HDF5 file for reading by offset and return the descriptor.

    Raises:
        UserError: the file cannot be opened or is not HDF5.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "folder" if stat.S_ISDIR(mode) else "device or pipe"
            raise UserError(f"{path} is a {kind}, not an HDF5 file")
        with open(path, "rb", buffering=0) as file:
            if any(data == SIGNATURE for data in _possible_signatures(file.fileno())):
                # A copy, because leaving the block closes the original.
                return os.dup(file.fileno())
            start = os.pread(file.fileno(), 512, 0)
    except OSError as error:
        raise _unreadable(path, error) from None
    raise UserError(f"{path} is {_describe(start)}")


def _describe(start: bytes) -> str:
    if not start:
        return "not a whole HDF5 file (0 bytes); copy or download it again"
    for first_bytes, description in OTHER_FORMATS:
        if start.lstrip().startswith(first_bytes):
            return f"not an HDF5 file, it {description}"
    return f"not an HDF5 file, its first bytes are {start[:12]!r}"


def _possible_signatures(file: int) -> Iterator[bytes]:
    yield os.pread(file, len(SIGNATURE), 0)
    size = os.fstat(file).st_size
    offset = FIRST_USER_BLOCK
    while offset < size:
        yield os.pread(file, len(SIGNATURE), offset)
        offset *= 2


def _unreadable(path: Path, error: Exception) -> UserError:
    text = str(error.args[-1] if error.args else error)
    if "lock file" in text:
        return _locked(path, text)
    cut = re.search(r"eof = (\d+).*stored_eof = (\d+)", text)
    if cut:
        sizes = f"{int(cut[1]):,} of {int(cut[2]):,} bytes"
        return UserError(f"{path} is not a whole HDF5 file ({sizes}); copy or download it again")
    if "already open for write" in text:
        return UserError(
            f"{path} is marked as open for writing; close it in the other program or, if that has "
            f"crashed, clear the mark with `h5clear -s {path}`"
        )
    if isinstance(error, FileNotFoundError) and path.is_symlink():
        return UserError(f"{path} is a link to {path.readlink()}, which does not exist")
    if isinstance(error, OSError) and error.errno:
        return UserError(f"{path} cannot be read: {os.strerror(error.errno)}")
    return UserError(
        f"{path} cannot be read as HDF5 ({brief(error)}); "
        "compare its size or checksum with the original's"
    )


def _locked(path: Path, text: str) -> UserError:
    number = re.search(r"errno = (\d+)", text)
    if number and int(number[1]) in {11, 13, 35}:  # EAGAIN, EACCES, and EAGAIN of BSD
        return UserError(
            f"{path} is open for writing in another program; close it there and try again "
            "(on a file system without locks, set HDF5_USE_FILE_LOCKING=FALSE)"
        )
    reason = os.strerror(int(number[1])) if number else "no reason given"
    return UserError(
        f"{path} cannot be locked ({reason}); "
        "if its file system has no locks, set HDF5_USE_FILE_LOCKING=FALSE"
    )


def brief(error: Exception) -> str:
    """Return the reason in an error of h5py."""
    # "Unable to open file (the reason)"
    text = str(error.args[-1] if error.args else error)
    return text.split("(", 1)[-1].removesuffix(")").split("\n")[0]


def _first_rejected(index: Index) -> str:
    """Return the end of the sentence that a file holds no images."""
    if not len(index.rejected):
        return ""
    first = f"{index.rejected[0]} ({index.reasons[0]})"
    return f" at its top level; the first of its {len(index.rejected):,} entries is {first}"


def _access() -> h5py.h5p.PropFAID:
    # A small metadata cache, because each header is read only once.
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    cache = access.get_mdc_config()
    cache.set_initial_size = True
    cache.initial_size = cache.min_size = cache.max_size = METADATA_CACHE
    access.set_mdc_config(cache)
    return access


def _read_index(file: h5py.h5f.FileID, path: Path) -> Index:
    ids, offsets, sizes, rejected = _visit(file)
    with open(path, "rb", buffering=0) as raw:
        heights, widths, without_header = _read_headers(raw.fileno(), offsets, sizes)
        for row in without_header:
            dataset = h5py.h5d.open(file, bytes(ids[row]))
            reason = _not_a_file(dataset)
            if reason:
                rejected[as_text(ids[row])] = reason
                sizes[row] = NO_OFFSET
            elif _has_variable_length(dataset.get_type()):
                offsets[row] = NO_OFFSET  # the byte range holds a pointer to the bytes
    order = np.argsort(ids)
    order = order[sizes[order] != NO_OFFSET]
    return Index(
        ids[order],
        offsets[order],
        sizes[order],
        heights[order],
        widths[order],
        rejected=np.array(list(rejected), str),
        reasons=np.array(list(rejected.values()), str),
    )


def _visit(
    file: h5py.h5f.FileID,
) -> tuple[NDArray[np.bytes_], NDArray[np.int64], NDArray[np.int64], dict[str, str]]:
    """Return ids, offsets and sizes of the datasets, and the reason by name for other entries."""
    rows: list[IndexRow] = []
    slices: list[list[NDArray[Any]]] = []
    rejected: dict[str, str] = {}

    def visit(name: bytes, link: h5py.h5l.LinkInfo) -> None:
        try:
            # Opened during the walk: afterwards, each would load the table of all names again.
            dataset = h5py.h5d.open(file, name)
            offset = dataset.get_offset()  # None unless contiguous, in this file, and allocated
            if offset is None or link.type != h5py.h5l.TYPE_HARD:  # it may be in another file
                offset = NO_OFFSET
            if len(name) > MAX_NAME:
                rejected[as_text(name[:MAX_NAME])] = f"a name of more than {MAX_NAME} bytes"
            else:
                rows.append((name, offset, dataset.get_storage_size()))
        except H5PY_ERRORS as error:
            rejected[as_text(name)] = _not_a_dataset(file, name, link.type, error)
        if len(rows) == INDEX_SLICE:
            slices.append(_columns(rows))
            rows.clear()

    _iterate(file, visit)
    slices.append(_columns(rows))
    ids, offsets, sizes = (np.concatenate(parts) for parts in zip(*slices, strict=True))
    return ids, offsets, sizes, rejected


def _iterate(file: h5py.h5f.FileID, visit: Any) -> None:
    """Call `visit` with each link's name and description."""
    # h5py turns an exception inside the iteration, such as a signal's, into a SystemError
    # (h5py/h5py#1740), so it is kept and raised afterwards.
    stopped: list[BaseException] = []

    def guarded(name: bytes, link: h5py.h5l.LinkInfo) -> bool | None:
        try:
            visit(name, link)
        except BaseException as error:
            stopped.append(error)
            return True
        return None

    file.links.iterate(guarded, info=True)
    if stopped:
        raise stopped[0]


def _columns(rows: Sequence[IndexRow]) -> list[NDArray[Any]]:
    kinds = (np.bytes_, np.int64, np.int64)
    return [
        np.array([row[number] for row in rows], dtype=kind) for number, kind in enumerate(kinds)
    ]


def _read_headers(
    file: int, offsets: NDArray[np.int64], sizes: NDArray[np.int64]
) -> tuple[NDArray[np.uint32], NDArray[np.uint32], list[int]]:
    """Return [N] heights and widths, 0 if unknown, and the rows without an image header.

    The byte range of such a row is unknown or does not start like a JPEG or PNG file.
    """
    heights, widths = np.zeros((2, len(offsets)), np.uint32)
    without = []
    for row, (offset, size) in enumerate(zip(offsets.tolist(), sizes.tolist(), strict=True)):
        start = os.pread(file, min(size, HEADER_BYTES), offset) if offset >= 0 else b""
        if not start.startswith((JPEG_START, PNG_START)):
            without.append(row)
            continue
        found = header_size(start)
        if found == UNKNOWN_SIZE and size > HEADER_BYTES:
            found = header_size(os.pread(file, min(size, MAX_HEADER_BYTES), offset))
        heights[row], widths[row] = found
    return heights, widths, without


def _not_a_dataset(file: h5py.h5f.FileID, name: bytes, link_type: int, error: Exception) -> str:
    try:
        found = h5py.h5o.open(file, name)
    except H5PY_ERRORS:
        return _dead_link(file, name, link_type, error)
    return {h5py.h5g.GroupID: "a group"}.get(type(found), "not a dataset")


def _dead_link(file: h5py.h5f.FileID, name: bytes, link_type: int, error: Exception) -> str:
    if link_type == h5py.h5l.TYPE_SOFT:
        return f"a link to {as_text(file.links.get_val(name))}, which cannot be opened"
    if link_type == h5py.h5l.TYPE_EXTERNAL:
        other, target = map(as_text, file.links.get_val(name))
        return f"a link to {target} in {other}, which cannot be opened"
    return f"cannot be opened: {brief(error)}"


def _not_a_file(dataset: h5py.h5d.DatasetID) -> str | None:
    """Return the reason that a dataset does not hold the bytes of a file, None if it does."""
    kind = dataset.get_type()
    shape = dataset.shape
    if kind.get_class() in FILE_OF_BYTES:
        return None
    element = kind.get_super() if kind.get_class() == h5py.h5t.VLEN else kind
    is_list = shape is None or len(shape) <= 1
    if is_list and element.get_class() == h5py.h5t.INTEGER and element.get_size() == 1:
        return None
    size = " x ".join(map(str, shape or ())) or "one"
    return f"an array of {size} values, not the bytes of an image file"


def _has_variable_length(kind: h5py.h5t.TypeID) -> bool:
    if kind.get_class() == h5py.h5t.STRING:
        return bool(kind.is_variable_str())
    return bool(kind.get_class() == h5py.h5t.VLEN)


def as_text(name: bytes) -> str:
    """Return a name as text; bytes that are not UTF-8 become escapes."""
    return name.decode("utf-8", "backslashreplace")


def read_dataset(path: Path, name: bytes) -> bytes:
    """Read the bytes of one image through HDF5. Raise one of H5PY_ERRORS."""
    with h5py.File(path, "r") as file:
        if file[name].nbytes > MAX_BYTES:  # a damaged file may claim any size
            raise ValueError(f"it claims {file[name].nbytes:,} bytes, more than {MAX_BYTES:,}")
        return _file_bytes(file[name][()])


def _file_bytes(value: Any) -> bytes:
    """Return the bytes in a value of h5py: fixed or variable length, scalar or array, or empty."""
    if isinstance(value, h5py.Empty):
        return b""
    if isinstance(value, np.ndarray) and value.dtype.kind == "O":
        return b"".join(map(_file_bytes, value.ravel()))
    return value if isinstance(value, bytes) else bytes(value.tobytes())
