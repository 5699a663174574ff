"""Columns relative to the patient's lesions, and the noise on the scores of training rows."""

import numpy as np
import polars as pl
import pytest

from infer.ensemble.images.relative_scores import (
    DIFFERENCE,
    RANKS,
    ImageScores,
    group_lesions,
    score_column,
)
from isic.runtime.errors import UserError

ALL = ("", DIFFERENCE, *RANKS)
ROWS = pl.DataFrame(
    {
        "isic_id": ["a", "b", "c", "d", "e", "f"],
        "patient_id": ["q", "p", "q", "p", "p", None],
        "anatom_site_general": ["torso", "head", "torso", "head", None, None],
        "tbp_lv_location": ["left", "left", "right", "left", "left", "left"],
        "net": [1.0, 5.0, 3.0, 4.0, 3.0, 7.0],
    }
)


def compare(table: pl.DataFrame, relatives: tuple[str, ...] = ALL) -> ImageScores:
    """Return the scores in the column `net`."""
    metadata = table.drop("net")
    return ImageScores(
        "image_score", table.select("net"), group_lesions(metadata, relatives), relatives
    )


def many_rows(num_rows: int = 4000) -> pl.DataFrame:
    rng = np.random.default_rng(0)
    return pl.DataFrame(
        {
            "isic_id": [f"{row:05d}" for row in range(num_rows)],
            "patient_id": rng.integers(0, 100, num_rows).astype(str),
            "anatom_site_general": rng.choice(["torso", "head"], num_rows),
            "tbp_lv_location": rng.choice(["left", "right", "back"], num_rows),
            "net": rng.standard_normal(num_rows),
        }
    )


def test_a_score_is_compared_with_the_patients_others() -> None:
    found = compare(ROWS).columns()
    assert found.columns == [
        "image_score.net",
        "image_score_patient_diff.net",
        "image_score_patient_rank.net",
        "image_score_patient_site_rank.net",
        "image_score_patient_location_rank.net",
    ]
    _, diff, rank, site, location = (column.to_list() for column in found)
    assert diff == [-1, 1, 1, 0, -1, 0]
    assert rank == pytest.approx([0.5, 1, 1, 2 / 3, 1 / 3, 1])
    assert site == [0.5, 1, 1, 0.5, 1, 1]
    assert location == pytest.approx([1, 1, 1, 2 / 3, 1 / 3, 1])


def test_a_lesion_without_a_score_is_blank_and_does_not_count() -> None:
    blank = ROWS.with_columns(net=pl.when(pl.col("isic_id") != "b").then("net"))
    found = compare(blank).columns()
    assert found.row(1) == (None,) * len(ALL)
    assert found["image_score_patient_rank.net"].to_list()[3:5] == [1, 0.5]


def test_the_order_of_the_rows_does_not_change_a_bit() -> None:
    rows = many_rows()
    shuffled = rows.sample(fraction=1, shuffle=True, seed=1)
    ids = rows.select("isic_id").hstack(compare(rows).columns())
    again = shuffled.select("isic_id").hstack(compare(shuffled).columns())
    assert again.sort("isic_id").equals(ids)


def test_a_column_that_a_rank_needs_is_named() -> None:
    with pytest.raises(UserError, match="the metadata lacks the column tbp_lv_location; add it"):
        compare(ROWS.drop("tbp_lv_location"))
    compare(ROWS.drop("tbp_lv_location", "anatom_site_general"), ("", DIFFERENCE))


def test_a_network_may_have_the_name_of_a_column() -> None:
    names = ("_row", "_patient", "anatom_site_general")
    scores = ROWS.select(*(pl.col("net").alias(name) for name in names))
    lesions = group_lesions(ROWS, ALL)
    found = ImageScores("image_score", scores, lesions, ALL).columns()
    expected = compare(ROWS).columns()
    assert found.columns[:1] == ["image_score._row"]
    for name in names:
        mine = found.select(pl.col(score_column("image_score", name, part)) for part in ALL)
        assert mine.rows() == expected.rows()


def test_relative_columns_follow_from_the_noisy_scores() -> None:
    """A rank or a difference of the exact scores would show the order that noise is to hide."""
    rows = many_rows()
    exact = compare(rows).columns()
    noisy = compare(rows).noisy_columns(0.5, (3, 1))
    score = noisy["image_score.net"]
    assert not noisy["image_score_patient_rank.net"].equals(exact["image_score_patient_rank.net"])
    again = compare(rows.with_columns(net=score.cast(pl.Float64))).columns()
    for mine, expected in zip(noisy, again, strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-6)


def test_the_noise_of_a_network_is_independent_of_the_others() -> None:
    rows = many_rows()
    lesions = group_lesions(rows.drop("net"), ("",))
    two = rows.select(pl.col("net").alias("a"), pl.col("net").alias("b"))
    noisy = ImageScores("image_score", two, lesions, ("",)).noisy_columns(0.5, (0, 0))
    noise = noisy.to_numpy() - two.to_numpy()
    np.testing.assert_allclose(noise.std(axis=0), 0.5, rtol=0.05)
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.05
    alone = ImageScores("image_score", two.select("b"), lesions, ("",))
    assert alone.noisy_columns(0.5, (0, 0)).equals(noisy.select("image_score.b"))
    assert not alone.noisy_columns(0.5, (0, 1)).equals(noisy.select("image_score.b"))
    assert not alone.noisy_columns(0.5, (1, 0)).equals(noisy.select("image_score.b"))
