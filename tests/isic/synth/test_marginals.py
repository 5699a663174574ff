"""Sampled columns have the published marginals."""

import numpy as np
import polars as pl
import pytest

from isic import schema
from isic.synth import marginals

PUBLISHED = {
    "tbp_lv_L": (27.89, 42.34, 56.57),
    "tbp_lv_A": (15.12, 19.80, 24.81),
    "tbp_lv_B": (21.67, 28.17, 34.98),
    "tbp_lv_C": (27.50, 34.82, 41.90),
    "tbp_lv_H": (47.90, 55.04, 61.19),
    "tbp_lv_Hext": (53.75, 61.11, 68.18),
    "tbp_lv_minorAxisMM": (1.49, 2.27, 3.89),
    "tbp_lv_areaMM2": (3.21, 5.69, 15.86),
    "tbp_lv_perimeterMM": (7.48, 10.02, 18.37),
    "tbp_lv_deltaLB": (5.77, 8.70, 14.20),
    "tbp_lv_deltaLBnorm": (5.06, 6.95, 10.85),
}
"""10 %, 50 % and 90 % of the columns that are derived from others, not sampled."""


@pytest.mark.parametrize("name", marginals.KNOTS)
def test_marginals(large: pl.DataFrame, name: str) -> None:
    percent = np.array(marginals.KNOT_PERCENT[3:15])
    values = np.array(marginals.KNOTS[name][3:15])
    sampled = np.percentile(large[name].drop_nulls().to_numpy(), percent)
    assert np.abs(sampled - values)[:-2].max() < 0.06 * (values[9] - values[0])


@pytest.mark.parametrize("name", PUBLISHED)
def test_marginals_of_columns_that_follow_from_others(large: pl.DataFrame, name: str) -> None:
    published = np.array(PUBLISHED[name])
    sampled = np.percentile(large[name].to_numpy(), [10, 50, 90])
    assert np.abs(sampled - published).max() < 0.15 * (published[2] - published[0])


def test_blanks(large: pl.DataFrame) -> None:
    blank = {name: large[name].null_count() / len(large) for name in schema.DTYPES}
    assert blank["sex"] == pytest.approx(0.0287)
    assert blank["age_approx"] == pytest.approx(0.0070)
    assert blank["anatom_site_general"] == pytest.approx(0.0144, abs=0.0002)
    unknown = large["tbp_lv_location_simple"] == "Unknown"
    assert large["anatom_site_general"].is_null().equals(unknown)
    assert not any(share for name, share in blank.items() if name.startswith("tbp_lv"))


def test_categories(large: pl.DataFrame) -> None:
    is_white = pl.col("tbp_tile_type") == "3D: white"
    white = dict(large.group_by("attribution").agg(is_white.mean()).iter_rows())
    assert white[marginals.MSKCC] > 0.7
    assert max(white[name] for name in white if name != marginals.MSKCC) < 0.4
    licence = dict(large.select("attribution", "copyright_license").unique().iter_rows())
    assert len(licence) == 7
    assert licence[marginals.ACEMID] == "CC-0"
    assert licence[marginals.BASEL] == "CC-BY-NC"
    for name, (count, *_) in marginals.LOCATIONS.items():
        found = (large["tbp_lv_location"] == name).mean()
        assert found == pytest.approx(count / marginals.FULL_ROWS, abs=2e-4)
    sex = large["sex"].drop_nulls()
    assert (sex == "male").mean() == pytest.approx(0.682, abs=0.02)
    assert set(large["age_approx"].drop_nulls() % 5) == {0}
