"""Views for test-time augmentation: the quarter turns and mirror images of a square image."""

from typing import Literal

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


def is_transposed(view: View) -> bool:
    """Return whether a view's rows are columns of the image."""
    return view[0] % 2 == 1
