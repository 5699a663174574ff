"""Images that occur more than once: the same bytes, the same pixels, or nearly the same ones.

Nearly the same are images whose difference hashes of 256 bits differ in at most MAX_DISTANCE:
copies that were compressed again, scaled, or made a little brighter. Turned, mirrored and cropped
copies are not found.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import polars as pl
from numpy.typing import NDArray

from isic.images import ImageStore, decode_pool
from isic.preprocess import Pixels, decode

HASH_SIDE = 16
NUM_WORDS = HASH_SIDE * HASH_SIDE // 64
# Of 33 million pairs of 8,166 crops of different lesions none differs in fewer than 25 bits. Copies
# at half or twice the size, or as JPEG of quality 90, differ in at most 18, of quality 50 in 13.
MAX_DISTANCE = 24
"""Bits in which hashes of nearly the same image may differ."""
NUM_BANDS = 16
"""Parts of a hash. Two that differ in fewer bits than this have a part in common."""
FLAT = 4
"""Range of grey values below which an image has no structure to compare."""
MAX_NEIGHBOURS = 4096
"""Images with one part in common that each is compared with, which bounds the time."""
DIGEST_BYTES = 16
CHUNK = 64
"""Images per task."""

BYTES, PIXELS, NEAR = "same bytes", "same pixels", "nearly the same"
KINDS = (BYTES, PIXELS, NEAR)
PAIR_COLUMNS = ("kind", "source", "isic_id", "other_source", "other_id", "distance")

Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class Prints:
    """The fingerprints of N images that decode."""

    source: str
    """Their name in messages, such as `train`."""
    store: ImageStore
    ids: list[str]
    digests: NDArray[np.bytes_]
    """[N] of the file's bytes, DIGEST_BYTES long."""
    hashes: Hashes
    """[N, 4] bits of `difference_hash`."""
    is_flat: NDArray[np.bool_]
    """[N] whether the image has no structure."""

    def __len__(self) -> int:
        return len(self.ids)


def difference_hash(image: Pixels) -> tuple[Hashes, bool]:
    """Return [4] uint64, whether each of 16 x 16 cells is darker than its neighbour, and flatness.

    Args:
        image: uint8 [height, width, 3].
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    cells = cv2.resize(grey, (HASH_SIDE + 1, HASH_SIDE), interpolation=cv2.INTER_AREA)
    bits = np.packbits(cells[:, 1:] > cells[:, :-1])
    return bits.view(np.uint64), int(cells.max()) - int(cells.min()) < FLAT


def fingerprint(
    source: str, store: ImageStore, ids: Sequence[str], num_threads: int
) -> tuple[Prints, dict[str, str]]:
    """Decode images once and return their fingerprints, and the reason for each that fails."""
    digests = np.zeros((len(ids), DIGEST_BYTES), np.uint8)
    hashes = np.zeros((len(ids), NUM_WORDS), np.uint64)
    is_flat = np.zeros(len(ids), np.bool_)

    def look(start: int) -> dict[int, str]:
        def use(row: int, data: bytes, size: tuple[int, int]) -> None:
            hashes[start + row], is_flat[start + row] = difference_hash(decode(data, size))
            found = hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()
            digests[start + row] = np.frombuffer(found, np.uint8)

        failed = store.each(ids[start : start + CHUNK], use)
        return {start + row: reason for row, reason in failed.items()}

    with decode_pool(num_threads) as pool:
        parts = list(pool.map(look, range(0, len(ids), CHUNK)))
    failed = {row: reason for part in parts for row, reason in part.items()}
    good = np.ones(len(ids), np.bool_)
    good[list(failed)] = False
    names = [name for name, is_good in zip(ids, good.tolist(), strict=True) if is_good]
    # Void, because numpy drops zero bytes at the end of its byte strings.
    whole = digests[good].view(f"V{DIGEST_BYTES}")[:, 0]
    prints = Prints(source, store, names, whole, hashes[good], is_flat[good])
    return prints, {ids[row]: failed[row] for row in sorted(failed)}


def find_pairs(found: Sequence[Prints], num_threads: int) -> pl.DataFrame:
    """Return the pairs of images that are alike, of the same and of different sources.

    Of several files of the same bytes in a source only the first is compared with others: each
    further one is paired with it, and with the first one of every earlier source.

    Returns:
        PAIR_COLUMNS, by kind; `distance` is the number of bits, 0 for the same bytes or pixels.
    """
    members = _members(found)
    # The first image of each group in each source, in the order of the sources.
    firsts = members.unique(["group", "number"], keep="first", maintain_order=True)
    copies = (
        firsts.join(members, on="group", suffix="_other")
        .filter(pl.col("number") <= pl.col("number_other"), pl.col("row") != pl.col("row_other"))
        .select("row", "row_other", kind=pl.lit(BYTES), distance=pl.lit(0, pl.Int64))
    )
    near = _near_groups(found, members)
    near = (
        near.join(firsts, on="group")
        .join(firsts, left_on="other", right_on="group", suffix="_other")
        .with_columns(
            row=pl.min_horizontal("row", "row_other"),
            row_other=pl.max_horizontal("row", "row_other"),
        )
        .select("row", "row_other", "distance")
        .sort("row", "row_other")
    )
    # Equal pixels have equal hashes.
    candidates = near.filter(distance=0).select("row", "row_other").rows()
    with decode_pool(num_threads) as pool:
        is_equal = pool.map(lambda pair: _same_pixels(found, *pair), candidates)
        equal = dict(zip(candidates, is_equal, strict=True))
    kinds = [PIXELS if equal.get(pair) else NEAR for pair in near["row", "row_other"].rows()]
    near = near.select("row", "row_other", pl.Series("kind", kinds, pl.String), "distance")
    return _named(found, pl.concat([copies, near]))


def _members(found: Sequence[Prints]) -> pl.DataFrame:
    """Return row over all sources, number of the source, and group of the same bytes."""
    digests = np.concatenate([prints.digests for prints in found])
    _, group = np.unique(digests, return_inverse=True)
    numbers = np.repeat(np.arange(len(found)), [len(prints) for prints in found])
    return pl.DataFrame({"row": np.arange(len(digests)), "number": numbers, "group": group})


def _near_groups(found: Sequence[Prints], members: pl.DataFrame) -> pl.DataFrame:
    """Return `group`, `other` and `distance` of groups of nearly the same images."""
    one_each = members.unique("group", keep="first", maintain_order=True)
    rows = one_each["row"].to_numpy()
    has_structure = ~np.concatenate([prints.is_flat for prints in found])[rows]
    hashes = np.concatenate([prints.hashes for prints in found])[rows[has_structure]]
    groups = one_each["group"].to_numpy()[has_structure]
    pairs, distances = near_pairs(hashes)
    first, second = groups[pairs].T
    return pl.DataFrame({"group": first, "other": second, "distance": distances})


def _named(found: Sequence[Prints], pairs: pl.DataFrame) -> pl.DataFrame:
    """Return PAIR_COLUMNS of pairs of rows."""
    ids = pl.Series([name for prints in found for name in prints.ids], dtype=pl.String)
    sources = pl.Series([p.source for p in found for _ in range(len(p))], dtype=pl.String)
    first, second = pairs["row"], pairs["row_other"]
    columns = (
        pairs["kind"].cast(pl.Enum(KINDS)),
        *(sources.gather(first), ids.gather(first), sources.gather(second), ids.gather(second)),
        pairs["distance"],
    )
    table = pl.DataFrame(dict(zip(PAIR_COLUMNS, columns, strict=True)))
    return table.sort("kind", "distance", maintain_order=True)


def _same_pixels(found: Sequence[Prints], *rows: int) -> bool:
    one, two = (decode(_read(found, row)) for row in rows)
    return np.array_equal(one, two)


def _read(found: Sequence[Prints], row: int) -> bytes:
    """Return the bytes of an image by its number over all sources."""
    for prints in found:
        if row < len(prints):
            return prints.store.read([prints.ids[row]])[0]
        row -= len(prints)
    raise AssertionError(row)


def near_pairs(hashes: Hashes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return [P, 2] rows of [N, 4] hashes at most MAX_DISTANCE bits apart, and [P] the bits.

    Of pairs that differ in NUM_BANDS bits or more some 1 % are missed, and of those with fewer only
    some whose equal part is also that of more than MAX_NEIGHBOURS images.
    """
    pairs = np.zeros((0, 2), np.int64)
    if not len(hashes):
        return pairs, np.zeros(0, np.int64)
    for part in _parts(hashes).T:
        order = np.argsort(part, kind="stable")
        near = [_near(hashes, order[at], order[at + step]) for at, step in _equal(part[order])]
        pairs = np.unique(np.concatenate([pairs, *near]), axis=0)
    return pairs, distance(hashes, *pairs.T)


def _parts(hashes: Hashes) -> NDArray[np.uint16]:
    """Return [N, 16] parts, each of bits from all over the image."""
    # Neighbours are alike, so adjacent bits would make a few parts that most images have.
    bits = np.unpackbits(hashes.view(np.uint8), axis=1)
    mixed = bits.reshape(len(hashes), -1, NUM_BANDS)
    parts = np.packbits(mixed.swapaxes(1, 2), axis=2)
    return parts.reshape(len(hashes), -1).view(np.uint16)


def _equal(values: NDArray[np.uint16]) -> Iterator[tuple[NDArray[np.int64], int]]:
    """Yield positions, and a step, such that sorted values are equal at both ends of the step."""
    at = np.arange(len(values))
    for step in range(1, MAX_NEIGHBOURS):
        at = at[at + step < len(values)]
        at = at[values[at] == values[at + step]]
        if not len(at):
            return
        yield at, step


def _near(hashes: Hashes, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return [P, 2] of the pairs [M] those that are near, the smaller row first."""
    # Word by word: most pairs are too far apart by the first.
    bits = np.zeros(len(first), np.int64)
    for word in range(NUM_WORDS):
        bits += popcount(hashes[first, word] ^ hashes[second, word])
        keep = bits <= MAX_DISTANCE
        first, second, bits = first[keep], second[keep], bits[keep]
    return np.stack([np.minimum(first, second), np.maximum(first, second)], axis=1)


def distance(
    hashes: Hashes, first: NDArray[np.int64], second: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return [P] the number of bits in which pairs of rows differ."""
    bits: NDArray[np.int64] = popcount(hashes[first] ^ hashes[second]).sum(axis=1)
    return bits


def popcount(words: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the number of ones in each word."""
    # numpy.bitwise_count is of numpy 2. Sums of 2, 4 and 8 bits, then of all bytes (Warren,
    # Hacker's Delight, 5-1).
    one, two, four = (np.uint64(shift) for shift in (1, 2, 4))
    words = words - ((words >> one) & np.uint64(0x5555555555555555))
    pairs = np.uint64(0x3333333333333333)
    words = (words & pairs) + ((words >> two) & pairs)
    words = (words + (words >> four)) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return ((words * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(np.int64)
