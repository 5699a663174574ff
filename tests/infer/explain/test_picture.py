import numpy as np

from infer.explain.picture import BENIGN, LEAST_SCALE, MALIGNANT, SIDE, draw, overlay, scale_of


def drops_with(value: float, row: int = 2, column: int = 5) -> np.ndarray:
    drops = np.zeros((7, 7), np.float32)
    drops[row, column] = value
    return drops


def coloured(picture: np.ndarray) -> np.ndarray:
    """Return [h, w] the difference between the channels of each pixel."""
    return np.ptp(picture.astype(int), axis=2)


def test_the_colour_is_at_the_patch_and_has_the_sign_of_the_value() -> None:
    image = np.random.default_rng(0).integers(0, 256, (70, 70, 3), dtype=np.uint8)
    for value, colour in ((1.5, MALIGNANT), (-1.5, BENIGN)):
        shown = overlay(image, drops_with(value))
        row, column = np.unravel_index(coloured(shown).argmax(), (70, 70))
        assert (row // 10, column // 10) == (2, 5)
        centre = shown[25, 55].astype(int)
        assert np.argmax(centre) == np.argmax(colour)
        assert coloured(shown)[50:, :30].max() == 0


def test_changes_too_small_to_count_stay_faint() -> None:
    image = np.full((70, 70, 3), 90, np.uint8)
    assert scale_of(drops_with(0.01)) == LEAST_SCALE
    assert scale_of(drops_with(-2.0)) == 2.0
    faint = coloured(overlay(image, drops_with(0.01))).max()
    assert faint < coloured(overlay(image, drops_with(1.0))).max() / 5
    assert coloured(overlay(image, drops_with(0.0))).max() == 0


def test_dark_and_light_skin_have_the_same_colours() -> None:
    texture = np.random.default_rng(1).integers(0, 40, (70, 70, 1), dtype=np.uint8)
    dark, light = (np.repeat(texture + base, 3, axis=2) for base in (10, 200))
    found = [overlay(image, drops_with(1.0)).astype(int) for image in (dark, light)]
    assert np.abs(found[0] - found[1]).max() <= 2


def test_the_crop_is_beside_the_map_and_the_scale() -> None:
    image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    picture = draw(image, drops_with(1.0), "logit +1.00, fold 0")
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(picture[12 : 12 + SIDE, 12 : 12 + SIDE], image)
    beside = picture[12 : 12 + SIDE, 24 + SIDE : 24 + 2 * SIDE]
    np.testing.assert_array_equal(beside, overlay(image, drops_with(1.0)))
    bar = picture[12 : 12 + SIDE, 36 + 2 * SIDE + 5].astype(int)
    assert bar[0, 0] > bar[0, 2]
    assert bar[-1, 2] > bar[-1, 0]
    assert (picture[:, -80:] < 100).any(), "the labels"
