"""Encoding of categories and blanks."""

import numpy as np
import polars as pl

from isic.features import (
    Encoding,
    fit_encoding,
)
from isic.features.encoding import BLANK
from tests.support.tables import EXTENDED


def test_codes_follow_frequency_and_an_unseen_category_is_a_blank() -> None:
    text = ["b", "a", "b", None, "c", "a", "b"]
    features = pl.DataFrame(
        {"sex": text, "age_approx": pl.Series([None, 1, 2, 3, 4, None, 10], dtype=pl.Float32)}
    )
    encoding = fit_encoding(features, ("age_approx", "sex"))
    new = pl.DataFrame(
        {"sex": ["b", "a", "c", "new", None], "age_approx": pl.Series([None] * 5, dtype=pl.Float32)}
    )
    matrix = encoding.transform(new)
    assert matrix.dtype == np.float32
    assert matrix.flags.c_contiguous
    assert matrix[:, 1].tolist() == [0, 1, 2, -1, -1]
    assert matrix[:, 0].tolist() == [3.0] * 5


def test_a_column_blank_in_every_training_row_is_zero() -> None:
    features = pl.DataFrame(
        {"sex": [None], "age_approx": [None]}, schema={"sex": pl.String, "age_approx": pl.Float32}
    )
    encoding = fit_encoding(features, ("age_approx", "sex"))
    assert encoding.transform(features).tolist() == [[0, -1]]
    assert encoding.transform(features.with_columns(sex=pl.lit("male"))).tolist() == [[0, -1]]


def test_only_the_named_categories_are_blanked() -> None:
    features = pl.DataFrame({"sex": ["male"] * 200, "attribution": ["a"] * 200})
    encoding = fit_encoding(features, ("sex", "attribution"))
    for names, blanked in {(): [True, True], ("attribution",): [False, True]}.items():
        matrix = encoding.transform(features)
        encoding.blank_categories(matrix, 0.5, np.random.default_rng(0), names)
        assert (matrix == BLANK).any(axis=0).tolist() == blanked
        assert not (matrix == BLANK).all(axis=0).any()


def test_an_encoding_survives_its_file_form_bit_for_bit(extended: pl.DataFrame) -> None:
    encoding = fit_encoding(extended, EXTENDED)
    again = Encoding.from_json(EXTENDED, encoding.to_json())
    np.testing.assert_array_equal(again.transform(extended), encoding.transform(extended))
