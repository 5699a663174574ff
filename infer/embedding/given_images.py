"""Images that a caller hands over: paths, the bytes of image files, or arrays."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from infer.embedding.decoders import Recipe
from isic.headers import ImageError
from isic.preprocess import Pixels, PreprocessSpec, decode_into, resize, write_views
from isic.runtime.errors import UserError

GivenImage: TypeAlias = str | os.PathLike[str] | bytes | NDArray[np.uint8]
"""A path, the bytes of an image file, or RGB pixels uint8 [height, width, 3]."""


def refuse_other_types(image: Any, index: int) -> None:
    """Raise a UserError for anything that is no GivenImage."""
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size:
            return
        found = f"an array {image.dtype} {list(image.shape)}"
    elif isinstance(image, str | os.PathLike | bytes):
        return
    else:
        found = f"a {type(image).__name__}"
    raise UserError(
        f"image {index} is {found}; give a path, the bytes of an image file, or an array uint8 "
        "[height, width, 3] of RGB"
    )


def name_of(image: GivenImage, index: int) -> str:
    """Return the name of an image in messages: its index and, if it has one, its path."""
    if isinstance(image, str | os.PathLike):
        return f"image {index} ({os.fspath(image)})"
    return f"image {index}"


def decode_images(
    images: Sequence[GivenImage], recipe: Recipe, pool: ThreadPoolExecutor
) -> tuple[Pixels, dict[int, str]]:
    """Decode N images, each with V views, in the threads of a pool.

    Returns:
        uint8 [V * N, size, size, 3], view by view, zero in failed rows; and the reason for each
        row of the first view that cannot be used.
    """
    size = recipe.spec.size
    views = np.empty((recipe.num_views, len(images), size, size, 3), np.uint8)

    def decode(row: int) -> str | None:
        try:
            write_image(images[row], recipe.spec, views[0, row])
        except ImageError as error:
            views[:, row] = 0
            return str(error)
        write_views(views[0, row], recipe.tta, [views[0, row], *views[1:, row]])
        return None

    reasons = enumerate(pool.map(decode, range(len(images))))
    failed = {row: reason for row, reason in reasons if reason is not None}
    return views.reshape(-1, size, size, 3), failed


def write_image(image: GivenImage, spec: PreprocessSpec, out: Pixels) -> None:
    """Write an image as the network sees it into `out`, contiguous uint8 [size, size, 3].

    Raises:
        ImageError: the file cannot be read, or the image cannot be decoded.
    """
    if isinstance(image, np.ndarray):
        # OpenCV takes no negative strides, as those of `bgr[..., ::-1]`.
        resize(np.ascontiguousarray(image), spec, out)
        return
    decode_into(image if isinstance(image, bytes) else _read(image), spec, out)


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = error.strerror if isinstance(error, OSError) else None
        raise ImageError(f"cannot be read: {reason or error}") from None
