"""Seeded changes of files: of their bytes, and of the values in formats with a structure."""

import csv
import io
import json
import os
import pickle
import random
import struct
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import polars as pl
import torch

from isic.runtime import yaml12
from isic.tables import parquet_metadata, read_parquet

Random = random.Random
Change = Callable[[bytes, Random], bytes]
"""Returns the changed content of a file."""

DEEP = 200_000
"""Brackets of a nested value, more than any stack holds."""
LONG = 300_000
"""Characters of a long text."""
WEIRD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 0.5, -0.5, 1e-300, 1e308, -1e308, 2**31, 2**63, -(10**30)),
    *(float("nan"), float("inf"), float("-inf"), "", " ", "nan", "1e999", "0", "null", "a\0b", "é"),
    *("\u202e", "../../x", "/dev/zero", "x" * LONG, [], {}, [None], [[]], {"": None}),
    *([1, 2, 3], {"a": {"b": 1}}, list(range(1000))),
)
"""Values of other types, other signs and other magnitudes than the expected ones."""


def pick_range(data: bytes, rng: Random, share: float = 0.2) -> slice:
    """Return a range of at least one byte, at most a share of the content."""
    start = rng.randrange(max(len(data), 1))
    return slice(start, start + rng.randint(1, max(1, int(len(data) * share))))


def flip_bits(data: bytes, rng: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(data: bytes, rng: Random) -> bytes:
    return data[: rng.randrange(len(data))]


def cut_start(data: bytes, rng: Random) -> bytes:
    return data[rng.randint(1, len(data)) :]


def splice(data: bytes, rng: Random) -> bytes:
    """Join the start and the end of the content at two other places."""
    return data[: rng.randrange(len(data))] + data[rng.randrange(len(data)) :]


def repeat_range(data: bytes, rng: Random) -> bytes:
    part = pick_range(data, rng)
    return data[: part.stop] + data[part] * rng.choice((1, 1, 5)) + data[part.stop :]


def swap_ranges(data: bytes, rng: Random) -> bytes:
    first, second, third, fourth = sorted(rng.randrange(len(data) + 1) for _ in range(4))
    middle = data[second:third]
    return data[:first] + data[third:fourth] + middle + data[first:second] + data[fourth:]


def overwrite(data: bytes, rng: Random) -> bytes:
    part = pick_range(data, rng)
    size = len(data[part])
    filled = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))
    return data[: part.start] + filled + data[part.stop :]


def empty(data: bytes, rng: Random) -> bytes:
    return b""


def append_noise(data: bytes, rng: Random) -> bytes:
    return data + rng.choice((b"\0", b"\n", b"}", rng.randbytes(1000), bytes(5000)))


def other_format(data: bytes, rng: Random) -> bytes:
    starts = (b"<!DOCTYPE html>", b"PK\3\4", b"\x1f\x8b\x08", b"\x89PNG\r\n\x1a\n", b"\x89HDF\r\n")
    signs = (*starts, b"PAR1", b"\x80\x02", b"version https://git-lfs.github.com/spec/v1\n")
    return rng.choice(signs) + data[: rng.choice((0, 100, len(data)))]


BYTES: tuple[Change, ...] = (
    *(flip_bits, flip_bits, cut, cut_start, splice, repeat_range, swap_ranges, overwrite),
    *(overwrite, empty, append_noise, other_format),
)
"""Changes of any file."""


def recode(data: bytes, rng: Random) -> bytes:
    text = data.decode("utf-8", "replace")
    kind = rng.choice(("utf-16", "utf-16-le", "utf-32", "latin-1", "utf-8-sig", "utf-7"))
    return (text + "é").encode(kind, "replace")


def insert_text(data: bytes, rng: Random) -> bytes:
    """Insert bytes that are not UTF-8, control characters, or a very long text."""
    at = rng.randrange(len(data) + 1)
    extra = (b"\xff\xfe\x80", b"\xc3", b"\0", b"\x1b[31m", b"x" * LONG, "\u202e\u2028é".encode())
    return data[:at] + rng.choice(extra) + data[at:]


def change_lines(data: bytes, rng: Random) -> bytes:
    """Remove, repeat or swap lines, or change how they end."""
    lines = data.splitlines(keepends=True) or [b""]
    at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.randrange(5)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(other, lines[at])
    elif kind == 2:
        lines[at], lines[other] = lines[other], lines[at]
    ends = {3: b"\r", 4: b"\r\n"}
    return b"".join(lines).replace(b"\n", ends.get(kind, b"\n"))


TEXT: tuple[Change, ...] = (recode, insert_text, change_lines)
"""Changes of a text file."""


def change_tree(value: Any, rng: Random, weird: tuple[Any, ...] = WEIRD) -> Any:
    """Change one entry of nested mappings and lists, in place: its value, its key, its place."""
    parents = list(_parents(value))
    if not parents:
        return rng.choice(weird)
    for _ in range(rng.choice((1, 1, 1, 3))):
        _change_entry(rng.choice(parents), rng, weird)
    return rng.choice(weird) if rng.random() < 0.03 else value


def _parents(value: Any) -> Any:
    """Yield every non-empty mapping and list in a value."""
    if isinstance(value, dict | list) and value:
        yield value
        for part in value.values() if isinstance(value, dict) else value:
            yield from _parents(part)


def _change_entry(parent: Any, rng: Random, weird: tuple[Any, ...]) -> None:
    if not parent:
        return
    keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
    key = rng.choice(keys)
    kind = rng.randrange(8)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[rng.choice((f"{key}x", "", str(key).upper()))] = parent.pop(key)
    elif kind == 2:
        other = rng.choice(keys)
        parent[key], parent[other] = parent[other], parent[key]
    elif kind == 3:
        parent[key] = [parent[key]] if rng.random() < 0.5 else {"a": parent[key]}
    elif kind == 4 and isinstance(parent[key], int | float):
        parent[key] = rng.choice((-parent[key], parent[key] * 10**9, str(parent[key])))
    else:
        parent[key] = rng.choice(weird)


def change_json(data: bytes, rng: Random) -> bytes:
    return json.dumps(change_tree(json.loads(data), rng)).encode("utf-8", "surrogatepass")


def extreme_json(data: bytes, rng: Random) -> bytes:
    """Nest values too deeply, repeat a key, or write a number of too many digits."""
    text = data.decode("utf-8")
    digits = "9" * rng.choice((400, 5000))
    start = text.index("{") + 1
    return rng.choice(
        (
            "[" * DEEP,
            '{"a":' * DEEP,
            f"{text[:start]}{text[start : text.rindex('}')]},{text[start:]}",
            f'{text[:start]}"format": {digits}, {text[start:]}',
            text.replace("1", digits, 1),
            text.replace(":", ": -Infinity, ", 1),
        )
    ).encode()


JSON: tuple[Change, ...] = (*(change_json,) * 12, extreme_json, *TEXT)


def change_yaml(data: bytes, rng: Random) -> bytes:
    changed = change_tree(yaml12.load(data.decode()), rng)
    return yaml12.dump(changed).encode("utf-8", "surrogatepass")


def extreme_yaml(data: bytes, rng: Random) -> bytes:
    """Add tags, anchors that multiply, keys that repeat, or values that nest too deeply."""
    text = data.decode("utf-8")
    laughs = "a0: &a0 [x, x]\n" + "".join(
        f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 10)
    )
    return rng.choice(
        (
            f"{text}\nx: !!python/object/apply:os.system ['touch canary']\n",
            f"{text}\nx: !!python/name:os.system\n",
            f"{text}\nx: !unknown 1\n",
            f"{text}\n{laughs}",
            f"{text}\n{text}",
            f"{text}\n--- \na: 1\n",
            f"{text}\nx: {'[' * DEEP}",
            f"{text}\n? [a, b]\n: 1\n",
            f"{text}\n<<: 1\n",
            f"{text}\nx: &a [*a]\n",
            f"\t{text}",
            f"{text}\nx: 2001-01-01\n",
            f"{text}\nx: 0x{'f' * 6000}\n",
            f"%YAML 3.0\n{text}",
        )
    ).encode()


YAML: tuple[Change, ...] = (*(change_yaml,) * 6, *(extreme_yaml,) * 2, *TEXT)


def change_csv(data: bytes, rng: Random) -> bytes:
    """Change a cell, a row or a column."""
    rows = list(csv.reader(io.StringIO(data.decode("utf-8"))))
    row, column = rng.randrange(len(rows)), rng.randrange(len(rows[0]))
    rng.choice(CSV_CHANGES)(rows, row, column, rng)
    text = io.StringIO()
    csv.writer(text, lineterminator=rng.choice(("\n", "\n", "\r\n"))).writerows(rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


Rows = list[list[str]]
CELLS = (
    *("", " ", "nan", "NaN", "inf", "-inf", "1e999", "-1", "0", "1", "2", "999999999", "1e-320"),
    *("text", "a,b", 'a"b', "a\nb", "é", "\u202e", "\0", "x" * LONG, "1;5", "1,5", "TRUE", "None"),
)


def _set_cell(rows: Rows, row: int, column: int, rng: Random) -> None:
    rows[row][column] = rng.choice(CELLS)


def _set_column(rows: Rows, row: int, column: int, rng: Random) -> None:
    value = rng.choice(CELLS)
    for each in rows[1:]:
        each[column] = value


def _change_id(rows: Rows, row: int, column: int, rng: Random) -> None:
    rows[row][0] = rng.choice((rows[row][0] + "x", rows[-1][0], "", "ISIC_0", "/dev/zero"))


def _repeat_row(rows: Rows, row: int, column: int, rng: Random) -> None:
    rows.insert(rng.randrange(len(rows) + 1), list(rows[row]))


def _drop_row(rows: Rows, row: int, column: int, rng: Random) -> None:
    del rows[row]


def _drop_field(rows: Rows, row: int, column: int, rng: Random) -> None:
    del rows[row][column]


def _add_field(rows: Rows, row: int, column: int, rng: Random) -> None:
    rows[row].insert(column, "1")


def _drop_column(rows: Rows, row: int, column: int, rng: Random) -> None:
    for each in rows:
        del each[column]


def _repeat_column(rows: Rows, row: int, column: int, rng: Random) -> None:
    for each in rows:
        each.append(each[column])


def _swap_names(rows: Rows, row: int, column: int, rng: Random) -> None:
    other = rng.randrange(len(rows[0]))
    rows[0][column], rows[0][other] = rows[0][other], rows[0][column]


def _rename(rows: Rows, row: int, column: int, rng: Random) -> None:
    rows[0][column] = rng.choice((rows[0][column].upper(), f" {rows[0][column]}", "", "x" * LONG))


def _keep_few(rows: Rows, row: int, column: int, rng: Random) -> None:
    del rows[rng.randrange(3) :]


def _shuffle(rows: Rows, row: int, column: int, rng: Random) -> None:
    body = rows[1:]
    rng.shuffle(body)
    rows[1:] = body


CSV_CHANGES = (
    *(_set_cell, _set_cell, _set_column, _change_id, _repeat_row, _drop_row, _drop_field),
    *(_add_field, _drop_column, _repeat_column, _swap_names, _rename, _keep_few, _shuffle),
)


def separate_otherwise(data: bytes, rng: Random) -> bytes:
    return data.replace(b",", rng.choice((b";", b"\t", b"|", b" ")))


CSV: tuple[Change, ...] = (*(change_csv,) * 8, separate_otherwise, *TEXT)


def change_parquet(data: bytes, rng: Random) -> bytes:
    """Change a column, its type, the rows or the metadata of a Parquet file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "table.parquet")
        path.write_bytes(data)
        table, metadata = read_parquet(path), parquet_metadata(path)
    metadata.pop("ARROW:schema", None)
    name = rng.choice(table.columns)
    changed = _change_table(table, name, rng)
    if rng.random() < 0.1:
        metadata = {key: rng.choice(("", "x", value[::-1])) for key, value in metadata.items()}
    written = io.BytesIO()
    changed.write_parquet(written, metadata=metadata, compression="uncompressed")
    return written.getvalue()


def _change_table(table: Any, name: str, rng: Random) -> Any:
    column = table[name]
    row = rng.randrange(max(len(table), 1))
    other = rng.choice(table.columns)
    number = rng.choice((float("nan"), float("inf"), -1.0, 1e300, 0.0, 127.0, 200.0))
    kinds = (pl.String, pl.Float64, pl.Float32, pl.Int64, pl.UInt8)
    changes: tuple[Callable[[], Any], ...] = (
        lambda: table.drop(name),
        lambda: table.rename({name: f"{name}x"}),
        lambda: table.with_columns(_cast(column, rng.choice(kinds))),
        lambda: table.with_columns(pl.lit(number).alias(name)),
        lambda: table.with_columns(pl.lit(None).alias(name)),
        lambda: table.with_columns(
            pl.when(pl.int_range(pl.len()) == row).then(None).otherwise(pl.col(name)).alias(name)
        ),
        lambda: table.with_columns(table[other].alias(name)),
        lambda: table.with_columns(column.shift(1)),
        lambda: table.with_columns(pl.concat_list(pl.col(name)).alias(name)),
        lambda: pl.concat([table, table.slice(row, 1)]),
        table.clear,
        lambda: table.slice(row, 2),
        lambda: table.sample(fraction=1, shuffle=True, seed=row),
        lambda: table.with_columns(pl.lit("x" * LONG).alias(f"{name}_more")),
    )
    return rng.choice(changes)()


def _cast(column: pl.Series, kind: Any) -> pl.Series:
    """Return a column in another type; one of lists as the text of each."""
    if column.dtype.is_nested():
        return pl.Series(column.name, [str(value) for value in column])
    return column.cast(kind, strict=False)


PARQUET: tuple[Change, ...] = (change_parquet,)


def change_hdf5(data: bytes, rng: Random) -> bytes:
    """Replace an entry of an HDF5 file by another kind of entry, or add one."""
    memory = io.BytesIO(data)
    with h5py.File(memory, "r+") as file:
        name = rng.choice(sorted(file))
        content = bytes(file[name][()])
        if rng.random() < 0.8:
            del file[name]
        else:
            name = rng.choice((f"{name}x", "x" * LONG, "é", " ", "a b"))
        changes: tuple[Callable[[], object], ...] = (
            lambda: None,
            lambda: file.create_group(name),
            lambda: file.create_dataset(name, data=np.bytes_(content[: len(content) // 2])),
            lambda: file.create_dataset(name, data=np.bytes_(content + content)),
            lambda: file.create_dataset(name, data=np.frombuffer(content, np.uint8)),
            lambda: file.create_dataset(name, data=np.frombuffer(content, np.int8)),
            lambda: file.create_dataset(
                name, data=np.frombuffer(content, np.uint8), chunks=True, compression="gzip"
            ),
            lambda: file.create_dataset(name, data=np.zeros((8, 8, 3), np.uint8)),
            lambda: file.create_dataset(name, data=np.array([content, content], np.bytes_)),
            lambda: _write_variable(file, name, content),
            lambda: file.create_dataset(name, data=1.5),
            lambda: file.create_dataset(name, data=h5py.Empty("S10")),
            lambda: file.create_dataset(name, shape=(2**36,), dtype="u1", chunks=(2**20,)),
            lambda: file.create_dataset(name, shape=(2**18,) * 2, dtype="S1000", chunks=(1, 99)),
            lambda: file.__setitem__(name, h5py.SoftLink("/nowhere")),
            lambda: file.__setitem__(name, h5py.SoftLink(f"/{name}")),
            lambda: file.__setitem__(name, h5py.ExternalLink("/dev/zero", "/x")),
            lambda: file.__setitem__(name, h5py.ExternalLink("other.hdf5", "/x")),
        )
        rng.choice(changes)()
    return memory.getvalue()


def _write_variable(file: h5py.File, name: str, content: bytes) -> None:
    """Write bytes as a list of variable length."""
    dataset = file.create_dataset(name, (1,), dtype=h5py.vlen_dtype(np.uint8))
    dataset[0] = np.frombuffer(content, np.uint8)


HDF5: tuple[Change, ...] = (change_hdf5,)
SIDES = (0, 1, 7, 65500, 65535)
"""Widths and heights that a header is made to claim, in pixels."""


def resize_png(data: bytes, rng: Random) -> bytes:
    """Claim another size or type in the header of a PNG file, with the right checksum."""
    sides = (rng.choice((*SIDES, 2**31 - 1)) for _ in range(2))
    header = b"IHDR" + struct.pack(">II", *sides)
    depth = data[24:29] if rng.random() < 0.7 else rng.randbytes(5)
    return data[:12] + header + depth + struct.pack(">I", zlib.crc32(header + depth)) + data[33:]


def resize_jpeg(data: bytes, rng: Random) -> bytes:
    at = next(at for marker in (b"\xff\xc0", b"\xff\xc2") if (at := data.find(marker)) > 0)
    sides = struct.pack(">HH", rng.choice(SIDES), rng.choice(SIDES))
    return data[: at + 5] + sides + data[at + 9 :]


def resize_webp(data: bytes, rng: Random) -> bytes:
    return data[:20] + rng.randbytes(rng.randint(1, 10)) + data[30:]


def change_tensors(data: bytes, rng: Random) -> bytes:
    """Change a tensor or another entry of a checkpoint, and save it as torch does."""
    values = torch.load(io.BytesIO(data), weights_only=True)
    if rng.random() < 0.5:
        changed = change_tree(values, rng)
    else:
        changed = values
        holder = rng.choice([part for part in _parents(values) if _tensor_keys(part)])
        key = rng.choice(_tensor_keys(holder))
        tensor = holder[key]
        float_tensor = tensor.float()
        holder[key] = rng.choice(
            (
                float_tensor * float("nan"),
                float_tensor * float("inf"),
                float_tensor * 1e30,
                tensor.reshape(-1),
                tensor[None],
                tensor.to(torch.int8),
                tensor.double(),
                tensor.to_sparse() if tensor.ndim else tensor,
                torch.zeros(0),
                torch.zeros(1, dtype=torch.complex64),
                torch.empty(1).expand(2**33),
            )
        )
    written = io.BytesIO()
    torch.save(changed, written)
    return written.getvalue()


def _tensor_keys(parent: Any) -> list[Any]:
    items = parent.items() if isinstance(parent, dict) else enumerate(parent)
    return [key for key, value in items if hasattr(value, "to_sparse")]


class _Payload:
    """Touches the file `canary` when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch canary",)


def add_code(data: bytes, rng: Random) -> bytes:
    """Put an object into a checkpoint that runs a command when it is unpickled."""
    values = torch.load(io.BytesIO(data), weights_only=True)
    values[rng.choice((*values, "more"))] = _Payload()
    written = io.BytesIO()
    if rng.random() < 0.3:
        pickle.dump(values, written)
    else:
        torch.save(values, written)
    return written.getvalue()


TENSORS: tuple[Change, ...] = (*(change_tensors,) * 4, add_code)


def change_safetensors(data: bytes, rng: Random) -> bytes:
    """Change the header of a safetensors file, or the length that it claims."""
    (length,) = struct.unpack("<Q", data[:8])
    header, content = json.loads(data[8 : 8 + length]), data[8 + length :]
    if rng.random() < 0.15:
        claimed = rng.choice((0, 1, length - 1, length + 1, len(data), 2**40, 2**63))
        return struct.pack("<Q", claimed) + data[8:]
    text = json.dumps(change_tree(header, rng)).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + content


SAFETENSORS: tuple[Change, ...] = (change_safetensors,)
CHANGES: Mapping[str, tuple[Change, ...]] = {
    "bytes": BYTES,
    "text": TEXT,
    "json": JSON,
    "yaml": YAML,
    "csv": CSV,
    "parquet": PARQUET,
    "hdf5": HDF5,
    "png": (resize_png,),
    "jpeg": (resize_jpeg,),
    "webp": (resize_webp,),
    "tensors": TENSORS,
    "safetensors": SAFETENSORS,
}
"""Changes by the format of the file."""
STRUCTURED_SHARE = 0.6
"""Share of the attempts on a format with a structure that change it and not just bytes."""


def break_content(data: bytes, kind: str, rng: Random) -> tuple[str, bytes]:
    """Return the name of a change and the changed content of a file of a format."""
    share = 0.0 if kind == "bytes" else STRUCTURED_SHARE
    change = rng.choice(CHANGES[kind] if rng.random() < share else BYTES)
    return change.__name__, change(data, rng)
