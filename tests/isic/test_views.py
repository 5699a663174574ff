import sys
import threading

import numpy as np
import pytest

from isic.preprocess import Pixels, write_views
from isic.views import VIEWS, View


def numpy_view(image: Pixels, view: View) -> Pixels:
    """Return a view of an image by its definition."""
    turns, mirrored = view
    turned = np.rot90(image, turns)
    return turned[:, ::-1] if mirrored else turned


def random_image(size: int) -> Pixels:
    return np.random.default_rng(size).integers(0, 256, (size, size, 3), np.uint8)


@pytest.mark.parametrize("tta", VIEWS)
@pytest.mark.parametrize("size", [1, 2, 3, 15, 16, 17, 63, 224, 337])
def test_views_are_numpys_to_the_bit(tta: str, size: int) -> None:
    image = random_image(size)
    out = np.zeros((len(VIEWS[tta]), size, size, 3), np.uint8)
    write_views(image, tta, out)
    expected = np.stack([numpy_view(image, view) for view in VIEWS[tta]])
    np.testing.assert_array_equal(out, expected)
    assert image.tobytes() == random_image(size).tobytes()


@pytest.mark.parametrize("tta", VIEWS)
def test_the_first_row_may_be_the_image_itself(tta: str) -> None:
    """The rows are those of a batch with all images of a view together, as engines read them."""
    batch = np.zeros((len(VIEWS[tta]), 5, 9, 9, 3), np.uint8)
    batch[0, 3] = random_image(9)
    rows = list(batch[:, 3])
    write_views(rows[0], tta, rows)
    expected = [numpy_view(random_image(9), view) for view in VIEWS[tta]]
    np.testing.assert_array_equal(batch[:, 3], expected)
    assert not batch[:, [0, 1, 2, 4]].any()


def test_rows_that_opencv_would_not_write_into_are_refused() -> None:
    image = random_image(8)
    wrong = {
        "size": np.zeros((4, 7, 7, 3), np.uint8),
        "type": np.zeros((4, 8, 8, 3), np.float32),
        "layout": np.zeros((4, 8, 8, 6), np.uint8)[..., ::2],
    }
    for out in wrong.values():
        with pytest.raises(AssertionError):
            write_views(image, "flips", out)
    with pytest.raises(ValueError):
        write_views(image, "d4", np.zeros((4, 8, 8, 3), np.uint8))


def test_sets_of_views_are_groups_so_the_average_is_the_same_for_every_view() -> None:
    image = random_image(4)
    for name, views in VIEWS.items():
        assert views[0] == (0, False)
        variants = {numpy_view(image, view).tobytes() for view in views}
        assert len(variants) == len(views)
        for view in views:
            turned = numpy_view(image, view)
            assert {numpy_view(turned, other).tobytes() for other in views} == variants, name


def test_other_threads_run_while_views_are_written() -> None:
    """The interpreter never takes the GIL from a thread here, so a thread must release it."""
    image = np.zeros((2048, 2048, 3), np.uint8)
    out = np.zeros((8, *image.shape), np.uint8)
    about_to_write = threading.Event()
    events = []

    def write() -> None:
        about_to_write.set()
        write_views(image, "d4", out)
        events.append("written")

    usual = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        thread = threading.Thread(target=write)
        thread.start()
        about_to_write.wait()
        events.append("other thread")
        thread.join()
    finally:
        sys.setswitchinterval(usual)
    assert events == ["other thread", "written"]
