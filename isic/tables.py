"""Read and write tables; refuse truncated files and other formats.

This is the only module that calls the readers of polars: by default they treat a path as a glob
pattern and fill a short row with blanks.
"""

import contextlib
import csv
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from isic.runtime.errors import UserError, first_line, warn_once
from isic.runtime.files import COMPRESSED, atomic_path

CSV_BLOCK = 4 * 1024 * 1024
"""Bytes of a CSV that are held in memory while it is checked or one column is read."""
LONGEST_ROW = 4 * CSV_BLOCK
"""Bytes after which a row without an end has an open quote."""

QUOTE, COMMA, NEWLINE = b'",\n'
Positions = NDArray[np.int64]

PARQUET = b"PAR1"
"""The first and the last four bytes of a Parquet file."""
UNPACK = "decompress it first"
AGAIN = "copy or download it again"
SIGNATURES = {
    **{sign: f"is compressed with {name}; {UNPACK}" for sign, name in COMPRESSED.items()},
    b"\x04\x22\x4d\x18": f"is compressed with lz4; {UNPACK}",
    b"x\x01": f"is compressed with zlib; {UNPACK}",
    b"x\x9c": f"is compressed with zlib; {UNPACK}",
    b"x\xda": f"is compressed with zlib; {UNPACK}",
    b"7z\xbc\xaf\x27\x1c": f"is a 7z archive; {UNPACK}",
    b"Rar!": f"is a RAR archive; {UNPACK}",
    b"PK\x03\x04": "is a ZIP archive or an Excel workbook; unpack it, or save the sheet as CSV",
    b"\xd0\xcf\x11\xe0": "is an Excel workbook; save the sheet as CSV",
    b"\x89HDF": "is an HDF5 file; give a CSV or Parquet file",
    b"\x93NUMPY": "is a NumPy array; give a CSV or Parquet file",
    b"ARROW1": "is an Arrow file; save it as CSV or Parquet",
    b"ORC": "is an ORC file; save it as CSV or Parquet",
    b"\xff\xfe": "is text in UTF-16; save it in UTF-8",
    b"\xfe\xff": "is text in UTF-16; save it in UTF-8",
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself; run `git lfs pull`",
    b"%PDF": "is a PDF; give a CSV or Parquet file",
    b"{": f"is JSON, perhaps an error message of a server; {AGAIN}",
    b"<": f"is a web page, perhaps an error message of a server; {AGAIN}",
}
"""First bytes of other formats that are found in place of a table, with a description and a fix."""
UTF8_MARK = b"\xef\xbb\xbf"


@contextlib.contextmanager
def reading(source: Path | str) -> Iterator[None]:
    """Turn errors of polars and of the operating system inside the block into a UserError.

    For the `collect` of a LazyFrame too, which reads the files.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no such file: {source}") from None
    except IsADirectoryError:
        raise UserError(f"{source} is a folder; a file is expected there") from None
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"cannot read {source} ({reason}); check its permissions and the disk"
        ) from None
    except pl.exceptions.PanicException:  # its text is of polars' code, not of the file
        raise UserError(f"{source} is not a readable table: it is damaged; {AGAIN}") from None
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        reason = first_line(error, "no content")
        raise UserError(f"{source} is not a readable table: {reason}") from None


def first_bytes(path: Path, count: int = 64) -> bytes:
    """Return the first bytes of a file. Raise UserError if it is missing or cannot be opened."""
    with reading(path):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(f"{path} is not a regular file; give a CSV or Parquet file")
        with open(path, "rb") as file:
            return file.read(count)


def read_table(path: Path) -> pl.DataFrame:
    """Read a table: Parquet if the name ends in `.parquet`, else a CSV, whose columns stay text.

    Raises:
        UserError: no such file, another format under that name, or a truncated table.
    """
    return read_parquet(path) if is_parquet(path) else read_csv(path)


def read_names(path: Path) -> list[str]:
    """Return the names of a table's columns, without reading its rows. Raise UserError."""
    if is_parquet(path):
        _refuse_other_than_parquet(path)
        with reading(path):
            return list(pl.read_parquet_schema(path))
    with reading(path), _open_csv(path) as file:
        return _read_header(file, path)[1]


def read_column(path: Path, name: str) -> pl.Series | None:
    """Read one column as `read_table` does, without holding the others in memory.

    Returns:
        None if the table lacks it.
    """
    if is_parquet(path):
        _refuse_other_than_parquet(path)
        with reading(path):
            frame = pl.scan_parquet(path, glob=False).select(pl.col(f"^{name}$")).collect()
        return frame.to_series() if frame.width else None
    with reading(path), _open_csv(path) as file:
        header, names = _read_header(file, path)
        if name not in names:
            return None
        column = [names.index(name)]
        parts = [
            # Each block gets the header in front, so that polars finds the column.
            pl.read_csv(header + rows, columns=column, infer_schema=False).to_series()
            for rows in _whole_rows(file, path, len(names))
        ]
    empty = pl.Series(name, [], pl.String)
    return pl.concat([empty, *(part.alias(name) for part in parts)])


def is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def read_csv(path: Path) -> pl.DataFrame:
    """Read a CSV as text, so that no type depends on the first rows; an empty field is null.

    Raises:
        UserError: no such file, another format, a repeated column, other separators than commas,
            text that is not UTF-8, or a row with too few or too many fields.
    """
    with reading(path), _open_csv(path) as file:
        _, names = _read_header(file, path)
        for _ in _whole_rows(file, path, len(names)):
            pass
        return pl.read_csv(path, infer_schema=False, glob=False).rename(str.strip)


def read_tsv(path: Path) -> pl.DataFrame:
    """Read a table with tabs between its fields as stripped text. Raise UserError."""
    with reading(path):
        table = pl.read_csv(path, separator="\t", infer_schema=False, glob=False)
    return table.select(pl.all().str.strip_chars().name.map(str.strip))


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """Read a Parquet file, or some of its columns. Raise UserError."""
    _refuse_other_than_parquet(path)
    with reading(path):
        return pl.read_parquet(path, columns=list(columns) if columns else None, glob=False)


def parquet_metadata(path: Path) -> dict[str, str]:
    """Read the key-value metadata of a Parquet file. Raise UserError."""
    _refuse_other_than_parquet(path)
    with reading(path), open(path, "rb") as file:
        return pl.read_parquet_metadata(file)


def write_parquet(
    path: Path,
    table: pl.DataFrame,
    metadata: dict[str, str] | None = None,
    compression: Literal["zstd", "lz4"] = "zstd",
) -> None:
    """Write a table as Parquet, atomically; equal tables give equal bytes."""
    # Encoded in memory: the error that polars raises for a full disk is not an OSError.
    encoded = io.BytesIO()
    table.write_parquet(encoded, compression=compression, statistics=False, metadata=metadata)
    with atomic_path(path) as temporary:
        temporary.write_bytes(encoded.getvalue())


def scan_parquet(paths: Iterable[Path]) -> pl.LazyFrame:
    """Open Parquet files as one lazy table; collect it inside `reading`. Raise UserError."""
    paths = list(paths)
    for path in paths:
        _refuse_other_than_parquet(path)
    return pl.scan_parquet(paths, glob=False)


def _refuse_other_than_parquet(path: Path) -> None:
    start = first_bytes(path)
    if not start:
        raise UserError(f"{path} is empty; {AGAIN}")
    if not start.startswith(PARQUET):
        default = "is not a Parquet file; restore it, or name it .csv if it is one"
        raise UserError(f"{path} {_other_format(start) or default}")
    with reading(path), open(path, "rb") as file:
        file.seek(-len(PARQUET), os.SEEK_END)
        if file.read() != PARQUET:
            raise UserError(f"{path} is damaged: it does not end as a Parquet file does; {AGAIN}")


def _other_format(start: bytes) -> str | None:
    """Return the format of a file's first bytes, None if it may be a CSV."""
    for signature, description in SIGNATURES.items():
        if start.startswith(signature):
            return description
    text = start.removeprefix(UTF8_MARK).lstrip()
    return SIGNATURES.get(text[:1])


@contextlib.contextmanager
def _open_csv(path: Path) -> Iterator[BinaryIO]:
    """Open a file that may be a CSV. Raise UserError if its first bytes are of another format."""
    start = first_bytes(path)
    if start.startswith(PARQUET):
        raise UserError(f"{path} is a Parquet file; give it a name that ends in .parquet")
    description = _other_format(start)
    if description:
        raise UserError(f"{path} {description}")
    with open(path, "rb") as file:
        yield file


def _read_header(file: BinaryIO, path: Path) -> tuple[bytes, list[str]]:
    """Read the first row of a CSV. Return its bytes and the stripped names of the columns."""
    line = file.readline()
    while line and not line.removeprefix(UTF8_MARK).strip():
        line = file.readline()
    # A quoted name may contain line breaks.
    while line.count(b'"') % 2 and (more := file.readline()):
        line += more
    _refuse_other_text(line, path)
    text = line.removeprefix(UTF8_MARK).decode().strip("\r\n")
    if not text:
        raise UserError(f"{path} is not a readable table: it is empty; {AGAIN}")
    if "\r" in text and '"' not in text:
        raise UserError(f"{path} has CR line ends, as on old Macs; save it with LF line ends")
    try:
        names = [name.strip() for name in next(csv.reader([text]))]
    except csv.Error as error:
        raise UserError(f"{path} has a header that is no row of a CSV ({error}); {AGAIN}") from None
    _refuse_header(names, path)
    return (line if line.endswith(b"\n") else line + b"\n"), names


def _refuse_header(names: Sequence[str], path: Path) -> None:
    repeated = next((name for name in names if name and names.count(name) > 1), None)
    if repeated:
        raise UserError(f'{path} has two columns "{repeated}"; remove or rename one of them')
    separators = {";": "semicolons", "\t": "tabs", "|": "bars"}
    other = next((word for sign, word in separators.items() if sign in names[0]), None)
    if other and len(names) == 1:
        raise UserError(f"{path} separates its columns by {other}; save it with commas")


def _refuse_other_text(block: bytes, path: Path, before: int = 0) -> None:
    """Raise a UserError if a block of a CSV is not UTF-8; `before` is the number of rows ahead."""
    if b"\0" in block:
        row = before + block.count(b"\n", 0, block.index(b"\0"))
        raise UserError(f"{path}: line {row + 1} holds zero bytes, which no CSV has; {AGAIN}")
    try:
        if not block.isascii():
            block.decode()
    except UnicodeDecodeError as error:
        row = before + block.count(b"\n", 0, error.start)
        raise UserError(
            f"{path}: line {row + 1} is not text in UTF-8; save the file in that encoding"
        ) from None


def _whole_rows(file: BinaryIO, path: Path, num_fields: int) -> Iterator[bytes]:
    """Yield the rows of a CSV after its header in blocks of whole rows.

    Raises:
        UserError: text that is not UTF-8, more or fewer fields than in the header, an open quote.
    """
    block = b""
    number = 0
    while more := file.read(CSV_BLOCK):
        block += more
        end = block.rfind(b"\n") + 1
        # With an odd number of quotes, that line end is inside a quoted text.
        if end and block.count(b'"', 0, end) % 2 == 0:
            number += _check_rows(block[:end], path, num_fields, number)
            yield block[:end]
            block = block[end:]
        elif len(block) > LONGEST_ROW:
            break
    if block.count(b'"') % 2:
        raise UserError(
            f"{path} is truncated or has a quote too many: "
            f"a quote after line {number + 1} is never closed; {AGAIN}"
        )
    if block:
        _check_rows(block + b"\n", path, num_fields, number, is_last=True)
        warn_once(f"{path} has no line break at its end; if it is truncated, so is its last value")
        yield block


def _check_rows(
    rows: bytes, path: Path, num_fields: int, before: int, is_last: bool = False
) -> int:
    """Return the number of rows in a block. Raise UserError for another number of fields.

    Args:
        before: rows ahead of the block, for messages.
        is_last: whether these are the last rows of a file without a final line break.
    """
    _refuse_other_text(rows, path, before + 1)
    data = np.frombuffer(rows, np.uint8)
    # Quotes come in pairs; a doubled quote inside a text closes and opens it again.
    opening, closing = np.flatnonzero(data == QUOTE).reshape(-1, 2).T
    _refuse_stray_quotes(data, opening, path, before)
    ends = np.flatnonzero(data == NEWLINE)
    # Line breaks inside quotes do not end a row.
    ends = ends[np.searchsorted(opening, ends) == np.searchsorted(closing, ends)]
    found = _count_fields(np.flatnonzero(data == COMMA), ends, opening, closing)
    wrong = np.flatnonzero(found != num_fields)
    if len(wrong):
        row = int(wrong[0])
        line = before + row + 2
        start = ends[row - 1] + 1 if row else 0
        if not rows[start : ends[row]].strip():
            raise UserError(f"{path}: line {line} is blank; remove it")
        if is_last and row == len(ends) - 1 and found[row] < num_fields:
            raise UserError(
                f"{path} is truncated: "
                f"its last row has {found[row]} of {num_fields} fields; {AGAIN}"
            )
        raise UserError(
            f"{path}: line {line} has {found[row]} fields, the header has {num_fields}; "
            "correct the file"
        )
    return len(ends)


def _count_fields(
    commas: Positions, ends: Positions, opening: Positions, closing: Positions
) -> Positions:
    """Return [R] the number of fields of each row: its commas outside quotes plus one."""
    up_to_end = np.searchsorted(commas, ends)
    in_quotes = np.searchsorted(commas, closing) - np.searchsorted(commas, opening)
    quoted = np.concatenate([[0], np.cumsum(in_quotes)])[np.searchsorted(opening, ends)]
    return np.asarray(np.diff(up_to_end - quoted, prepend=0) + 1)


def _refuse_stray_quotes(
    data: NDArray[np.uint8], opening: Positions, path: Path, before: int
) -> None:
    """Raise a UserError if a quote opens inside a field."""
    # polars would read all rows up to the next quote as one text.
    inner = opening[opening > 0]
    stray = inner[~np.isin(data[inner - 1], [COMMA, NEWLINE, QUOTE])]
    if len(stray):
        line = before + np.count_nonzero(data[: stray[0]] == NEWLINE) + 2
        raise UserError(
            f"{path}: line {line} has a quote inside a field; "
            "put the field in quotes and double those inside"
        )
