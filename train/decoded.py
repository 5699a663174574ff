"""Decoded and resized images of a run's rows, of which those shown often are kept."""

import mmap
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from isic.images import decode_pool
from isic.preprocess import MASK_THRESHOLD, Pixels, PreprocessSpec, decode, decode_mask, resize
from isic.runtime.errors import warn
from isic.runtime.machine import available_memory, num_cores
from train import distributed
from train.rows import Rows

FREE_SHARE = 0.5
"""Share of the free memory, or disk space, that kept images may take."""
# The first write to a page of memory costs as much as decoding its part of an image, so that a row
# that is shown twice would gain nothing.
MIN_USES = 3
"""Uses from which a row is kept."""
CHUNK = 64
"""Rows per task of a decoding thread."""
NOT_KEPT = -1
PLACES = {"memory": "memory", "disk": "a temporary file"}
"""Places of kept images, in words."""


class DecodedImages:
    """Images and masks of N rows: decoded on request, or once and then kept as pixels."""

    def __init__(self, rows: Rows, spec: PreprocessSpec) -> None:
        self.files = rows.images
        self.mask_files = rows.masks
        self.spec = spec
        num_rows = len(rows.images)
        masks = rows.masks
        self.has_mask = np.zeros(num_rows, bool) if masks is None else ~masks.is_empty
        self.slots = np.full(num_rows, NOT_KEPT, np.int32)
        """[N], the position of each row in `kept_images` and `kept_masks`, or NOT_KEPT."""
        self.kept_images: Pixels = np.empty((0, spec.size, spec.size, 3), np.uint8)
        self.kept_masks: Pixels = np.empty((0, spec.size, spec.size), np.uint8)

    def __getitem__(self, row: int) -> dict[str, Pixels]:
        """Return `image` [size, size, 3] and, if the row has one, `mask` [size, size] of 0 and 1.

        The caller must not write into them.
        """
        slot = self.slots[row]
        if slot == NOT_KEPT:
            return self._decode(row)
        pixels = {"image": self.kept_images[slot]}
        if self.has_mask[row]:
            pixels["mask"] = self.kept_masks[slot]
        return pixels

    def _decode(self, row: int) -> dict[str, Pixels]:
        image = resize(decode(self.files[row]), self.spec)
        mask = self._decode_mask(row)
        return {"image": image} if mask is None else {"image": image, "mask": mask}

    def _decode_mask(self, row: int) -> Pixels | None:
        if self.mask_files is None or not self.has_mask[row]:
            return None
        mask = resize(decode_mask(self.mask_files[row]), self.spec)[..., 0] > MASK_THRESHOLD
        return mask.astype(np.uint8)

    @property
    def row_bytes(self) -> int:
        """Bytes that a kept row takes."""
        num_channels = 3 if self.mask_files is None else 4
        return num_channels * self.spec.size**2

    def keep(self, rows: NDArray[np.int64], memory: mmap.mmap) -> None:
        """Decode rows in threads and keep their pixels.

        Args:
            rows: [M], row numbers.
            memory: M * `row_bytes` bytes.
        """
        side = self.spec.size
        pixels = np.frombuffer(memory, np.uint8)
        num_image_bytes = 3 * len(rows) * side**2
        images = pixels[:num_image_bytes].reshape(-1, side, side, 3)
        masks = pixels[num_image_bytes:].reshape(-1, side, side)

        def fill(start: int) -> None:
            for slot, row in enumerate(rows[start : start + CHUNK].tolist(), start):
                resize(decode(self.files[row]), self.spec, out=images[slot])
                mask = self._decode_mask(row)
                if mask is not None:
                    masks[slot] = mask

        num_threads = max(1, num_cores() // distributed.local_world_size())
        with decode_pool(num_threads) as pool:
            for _ in pool.map(fill, range(0, len(rows), CHUNK)):
                pass
        # Last of all: until then `_decode` serves every row.
        self.kept_images, self.kept_masks = images, masks
        self.slots[rows] = np.arange(len(rows), dtype=np.int32)


def rows_to_keep(uses: NDArray[np.int64], num_fitting: int) -> NDArray[np.int64]:
    """Return the rows with MIN_USES or more uses, ascending; of too many those used most.

    Args:
        uses: [N], number of uses per row.
    """
    by_use = np.argsort(-uses, kind="stable")
    num_repeated = int((uses >= MIN_USES).sum())
    return np.sort(by_use[: min(num_repeated, num_fitting)])


def free_bytes(cache: str, folder: Path) -> int:
    """Return the bytes of memory, or of the folder's disk, that this process's images may take.

    Args:
        cache: `memory` or `disk`.
        folder: exists if `cache` is `disk`.
    """
    free = shutil.disk_usage(folder).free if cache == "disk" else available_memory() or 0
    return int(FREE_SHARE * free) // distributed.local_world_size()


def allocate(num_bytes: int, cache: str, folder: Path) -> mmap.mmap:
    """Return zeroed memory that loader processes share, or a file on disk that is mapped to it.

    Raises:
        OSError: there is too little of it.
    """
    if cache == "memory":
        return mmap.mmap(-1, num_bytes)
    # Without a name, so that nothing is left behind when the run is killed.
    with tempfile.TemporaryFile(dir=folder) as file:
        # A disk that is too full is an error here. Without this, it would end the run later, by
        # SIGBUS.
        os.posix_fallocate(file.fileno(), 0, num_bytes)
        return mmap.mmap(file.fileno(), num_bytes)


def keep_repeated(
    decoded: DecodedImages, uses: NDArray[np.int64], cache: str, folder: Path, title: str
) -> None:
    """Keep the pixels of the rows with MIN_USES or more uses, and print how many bytes they take.

    Args:
        uses: [N], number of uses per row from now on.
        cache: `memory`, `disk` or `none`.
        folder: of the file on disk, which has no name; created if it is needed and missing.
        title: beginning of the printed line.
    """
    num_repeated = int((uses >= MIN_USES).sum())
    if cache == "none" or not num_repeated:
        return
    if cache == "disk":
        folder.mkdir(parents=True, exist_ok=True)
    rows = rows_to_keep(uses, free_bytes(cache, folder) // decoded.row_bytes)
    num_bytes = len(rows) * decoded.row_bytes
    place = PLACES[cache]
    if distributed.is_main():
        size = f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
        share = "" if len(rows) == num_repeated else f"of {num_repeated:,} "
        print(
            f"{title}: {len(rows):,} {share}images that are shown {MIN_USES} times or more are "
            f"decoded once and kept in {place} ({size})",
            flush=True,
        )
    if not len(rows):
        return
    try:
        memory = allocate(num_bytes, cache, folder)
    except OSError as error:
        warn(f"decoded images cannot be kept in {place} ({error.strerror}); continuing without")
        return
    decoded.keep(rows, memory)
