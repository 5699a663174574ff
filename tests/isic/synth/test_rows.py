"""Relations between the columns of a synthetic table."""

import numpy as np
import polars as pl
import pytest

from isic import schema
from isic.folds import draw_folds
from isic.metrics import pauc
from isic.synth import marginals
from isic.synth.rows import SyntheticRows, default_positives, lesions_per_patient, num_patients
from tests.support.synthetic import draw_synthetic, out_of_fold


def test_identities(large: pl.DataFrame) -> None:
    t = {name.removeprefix("tbp_lv_"): large[name].to_numpy() for name in schema.NUMERIC}
    for end in ("", "ext"):
        chroma = np.hypot(t[f"A{end}"], t[f"B{end}"])
        np.testing.assert_allclose(t[f"C{end}"], chroma, atol=2e-6)
        hue = np.degrees(np.arctan2(t[f"B{end}"], t[f"A{end}"]))
        np.testing.assert_allclose(t[f"H{end}"], hue, atol=2e-6)
    for axis in "LAB":
        np.testing.assert_allclose(t[f"delta{axis}"], t[axis] - t[f"{axis}ext"], atol=2e-6)
    area_perim_ratio = t["perimeterMM"] ** 2 / t["areaMM2"]
    np.testing.assert_allclose(t["area_perim_ratio"], area_perim_ratio, atol=2e-6)
    assert np.all(t["symm_2axis_angle"] % 5 == 0)
    assert np.ptp(t["symm_2axis_angle"]) == 175
    assert np.array_equal(t["norm_color"] == 0, t["color_std_mean"] == 0)
    assert 0.07 < np.mean(t["norm_color"] == 0) < 0.11
    assert t["deltaL"].max() < 0 < t["L"].min()


def test_approximate_identities(large: pl.DataFrame) -> None:
    t = {name.removeprefix("tbp_lv_"): large[name].to_numpy() for name in schema.NUMERIC}
    relative = t["deltaLB"] / np.hypot(t["deltaL"], t["deltaB"])
    assert np.quantile(relative, 0.01) > 1
    assert np.quantile(relative, 0.99) < 1.08
    axes = np.sqrt(1 - (t["minorAxisMM"] / t["clin_size_long_diam_mm"]) ** 2)
    assert np.corrcoef(axes, t["eccentricity"])[0, 1] > 0.9


def test_related_columns_correlate(large: pl.DataFrame) -> None:
    pairs = [
        ("tbp_lv_L", "tbp_lv_Lext", 0.85),
        ("clin_size_long_diam_mm", "tbp_lv_areaMM2", 0.75),
        ("tbp_lv_color_std_mean", "tbp_lv_norm_color", 0.9),
    ]
    for one, other, least in pairs:
        assert large.select(pl.corr(one, other, method="spearman")).item() > least


def test_train_only_columns(large: pl.DataFrame) -> None:
    malignant = large.filter(pl.col("target") == 1)
    benign = large.filter(pl.col("target") == 0)
    assert malignant["lesion_id"].null_count() == 0
    assert benign["lesion_id"].is_not_null().mean() == pytest.approx(0.054, abs=0.006)
    assert set(malignant["iddx_1"]) == {"Malignant"}
    assert set(benign["iddx_1"]) == {"Benign"}
    assert set(large["mel_mitotic_index"].drop_nulls()) <= set(marginals.MITOSES)
    assert malignant["mel_mitotic_index"].drop_nulls().len() > 0
    assert large["tbp_lv_dnn_lesion_confidence"].null_count() == 0


def test_full_size_figures() -> None:
    sizes = lesions_per_patient(
        marginals.FULL_ROWS, num_patients(marginals.FULL_ROWS), np.random.default_rng(0)
    )
    assert sizes.sum() == marginals.FULL_ROWS
    assert len(sizes) == 1_042
    assert np.median(sizes) == pytest.approx(241.5, rel=0.05)
    assert sizes.max() == pytest.approx(9_184, rel=0.05)
    assert default_positives(marginals.FULL_ROWS) == 393
    assert default_positives(3_000) == 150


@pytest.mark.parametrize("num_positives", [1, 7, 60])
def test_the_number_of_positives_is_kept(num_positives: int) -> None:
    assert draw_synthetic(120, num_positives).table["target"].sum() == num_positives


@pytest.mark.parametrize("images", [50, 120])
def test_the_smallest_table_still_has_five_folds(images: int) -> None:
    rows = draw_synthetic(images, default_positives(images))
    assert draw_folds(rows.table, 5, 42).num_folds == 5


def test_the_patients_other_lesions_add_to_the_row(learnable: SyntheticRows) -> None:
    table = learnable.table
    raw = table.select(schema.NUMERIC)
    centred = pl.col(schema.NUMERIC) - pl.col(schema.NUMERIC).mean().over(schema.PATIENT)
    relative = table.select(centred / (pl.col(schema.NUMERIC).std().over(schema.PATIENT) + 1e-5))
    target = table["target"].to_numpy()
    both = np.hstack([raw.to_numpy(), relative.to_numpy()])
    row_score = pauc(target, out_of_fold(table, raw.to_numpy()))
    relative_score = pauc(target, out_of_fold(table, both))
    assert 0.10 < row_score < 0.15
    assert row_score + 0.01 < relative_score < 0.18
