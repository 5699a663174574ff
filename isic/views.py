"""Views for test-time augmentation: the quarter turns and mirror images of a square image."""

from collections.abc import Sequence
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from isic.preprocess import Pixels

Tta = Literal["none", "flips", "d4"]
"""The sets of views that test-time augmentation averages over."""
View = tuple[int, bool]
"""Quarter turns counterclockwise, and whether left and right are then swapped."""

# Each set is a group, so an image and any of its views have the same average.
VIEWS: dict[str, tuple[View, ...]] = {
    "none": ((0, False),),
    "flips": ((0, False), (0, True), (2, True), (2, False)),
    "d4": tuple((turns, mirrored) for mirrored in (False, True) for turns in range(4)),
}
"""The views by their set's name. The first one is the image itself."""

REVERSED_AXES: dict[View, tuple[int, ...]] = {
    (0, False): (),
    (0, True): (1,),
    (1, False): (0,),
    (1, True): (0, 1),
    (2, False): (0, 1),
    (2, True): (0,),
    (3, False): (1,),
    (3, True): (),
}
"""The axes (0 for rows, 1 for columns) to reverse for a view, after any transposition."""
TRANSPOSED: View = (3, True)
"""The view with rows and columns swapped, and no more."""
FLIP_CODES = {(0,): 0, (1,): 1, (0, 1): -1}
"""OpenCV's code of a flip by the axes that it reverses."""


def is_transposed(view: View) -> bool:
    """Return whether a view's rows are columns of the image."""
    return view[0] % 2 == 1


def write_views(image: Pixels, tta: str, out: Sequence[Pixels] | NDArray[np.uint8]) -> None:
    """Write every view of a square image in the order of `VIEWS[tta]`, without the GIL.

    Args:
        image: uint8 [size, size, 3].
        tta: a key of VIEWS.
        out: contiguous uint8 [V, size, size, 3], or a sequence of V such rows. `out[0]` may be
            `image` itself, which is then not copied.
    """
    rows = dict(zip(VIEWS[tta], out, strict=True))
    for row in rows.values():
        # Otherwise OpenCV would silently write into new memory.
        assert row.shape == image.shape and row.dtype == np.uint8 and row.flags.c_contiguous
    # At 224 px a transposition takes 10 us, a flip 2 to 4 us and a rotation 11 to 13 us, so the
    # quarter turns are flips of one transposition.
    if TRANSPOSED in rows:
        cv2.transpose(image, rows[TRANSPOSED])
    for view, row in rows.items():
        axes = REVERSED_AXES[view]
        if axes:
            cv2.flip(rows[TRANSPOSED] if is_transposed(view) else image, FLIP_CODES[axes], row)
    if out[0] is not image:
        np.copyto(out[0], image)
