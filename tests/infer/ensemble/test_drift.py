"""Drift: its measures, and that real differences are reported and chance is not."""

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from infer.ensemble.drift import (
    ALL_COLUMNS,
    Shares,
    drift_warning,
    measure_drift,
    summarise_own,
    summarise_table,
    summary_from_json,
    summary_to_json,
)
from isic import schema
from isic.synth.rows import draw_rows
from tests.support.ensembles import predict_rows, predict_table, read_test_text

NAMES = (*schema.NUMERIC, *schema.CATEGORICAL)
NONE = np.zeros(3)


def population(seed: int, num_rows: int, num_patients: int) -> pl.DataFrame:
    """Draw a table of other patients of the same synthetic population."""
    ids = [f"ISIC_{row:07d}" for row in range(num_rows)]
    patients = [f"IP_{patient:07d}" for patient in range(num_patients)]
    return draw_rows(ids, patients, num_rows // 50, np.random.default_rng(seed)).table


def drift(train: pl.DataFrame, test: pl.DataFrame) -> pl.DataFrame:
    return measure_drift(summarise_table(train, NAMES), test, NONE, NONE)


@pytest.mark.parametrize("seed", range(4))
def test_only_real_differences_are_reported(seed: int) -> None:
    train = population(seed, 3000, 400)
    test = population(seed + 100, 1500, 200)
    assert drift_warning(drift(train, test)) is None
    camera = test.with_columns(pl.col("tbp_lv_L") + 5)
    hospital = test.with_columns(attribution=pl.lit("Another hospital"))
    for changed, name in ((camera, "tbp_lv_L"), (hospital, "attribution")):
        found = drift(train, changed)
        assert found.filter("differs")["column"].to_list() == [name]
        assert f"more than chance explains in {name}, so" in (drift_warning(found) or "")


def test_a_few_patients_are_not_taken_for_a_difference() -> None:
    """Lesions of one patient are alike; counted as independent they would differ."""
    train = population(0, 1000, 60)
    for seed in range(5):
        found = drift(train, population(seed + 200, 60, 1))
        assert not found["differs"].any()
        assert found["ks"].drop_nulls().to_numpy().max() > 0.3


def test_the_error_of_a_share_is_its_spread_over_samples_of_patients() -> None:
    """Shares of patients who are alike vary as the formula says."""
    random = np.random.default_rng(0)

    def sample(num_patients: int) -> Shares:
        sizes = random.integers(1, 20, num_patients)
        patient = np.repeat(np.arange(num_patients), sizes)
        level = np.repeat(random.normal(size=num_patients), sizes)
        values = level + random.normal(size=len(patient))
        return Shares.of((values <= 0.5)[None], patient)

    train = sample(3000)
    distances = np.array([train.distance(sample(40)) for _ in range(600)])
    assert np.sqrt(np.mean(distances**2)) == pytest.approx(1, abs=0.12)


def test_the_measures_of_a_column() -> None:
    train = population(1, 2000, 200)
    area = train["tbp_lv_areaMM2"]
    edges = np.quantile(area, np.arange(1, 20) / 20, method="inverted_cdf")
    test = train[:500].with_columns(
        pl.col("tbp_lv_areaMM2") * 2,
        sex=pl.when(pl.int_range(500) < 50).then(pl.lit("x")).otherwise("sex"),
        age_approx=pl.when(pl.int_range(500) < 400).then(None).otherwise("age_approx"),
    )
    rows = {row["column"]: row for row in drift(train, test).iter_rows(named=True)}
    first, second = (
        np.array([(values <= edge).mean() for edge in edges])
        for values in (area.to_numpy(), test["tbp_lv_areaMM2"].to_numpy())
    )
    assert rows["tbp_lv_areaMM2"]["ks"] == pytest.approx(np.abs(first - second).max())
    p, q = (np.maximum(np.diff(each, prepend=0, append=1), 1e-4) for each in (first, second))
    assert rows["tbp_lv_areaMM2"]["psi"] == pytest.approx(np.sum((q - p) * np.log(q / p)))
    assert rows["sex"]["unseen"] == pytest.approx(50 / test["sex"].count())
    assert rows["sex"]["ks"] is None
    assert rows["age_approx"]["blank"] >= 0.8 > rows["age_approx"]["blank_trained"]
    assert rows["age_approx"]["differs"]


@pytest.mark.parametrize(
    ("ages", "median"),
    [
        ([*[60] * 51, *range(61, 86), *range(61, 85)], 60),
        ([*[60] * 50, *range(36, 61), *range(61, 86)], 60),
        ([30] * 3 + [70] * 97, 70),
        ([30] * 97 + [70] * 3, 30),
        ([5, 10, 15], 10),
        ([45], 45),
        ([None] * 40 + [50] * 9 + [80] * 2, 50),
    ],
)
def test_the_middle_of_a_number_is_its_median(ages: list[int | None], median: int) -> None:
    table = pl.DataFrame(
        {
            schema.ID: [f"ISIC_{row}" for row in range(len(ages))],
            "age_approx": pl.Series(ages, dtype=pl.Float64),
        }
    )
    assert summarise_table(table, ["age_approx"])["age_approx"].middle == median


@pytest.mark.parametrize("seed", range(4))
def test_the_middle_of_every_number_is_its_median(seed: int) -> None:
    train = population(seed, 3000, 400)
    for name, column in summarise_table(train, schema.NUMERIC).items():
        known = train[name].drop_nulls()
        assert column.middle == known.quantile(0.5, "lower")


def test_columns_without_values() -> None:
    train = population(1, 300, 20).with_columns(pl.lit(None, pl.Float64).alias("tbp_lv_x"))
    test = population(2, 100, 9).with_columns(
        pl.lit(None, pl.Float64).alias("tbp_lv_y"), pl.lit(None, pl.String).alias("sex")
    )
    rows = {row["column"]: row for row in drift(train, test).iter_rows(named=True)}
    assert "tbp_lv_x" not in rows
    assert rows["tbp_lv_y"]["ks"] is rows["sex"]["psi"] is None
    assert rows["tbp_lv_y"]["blank"] == 1
    assert rows["tbp_lv_y"]["differs"]


def test_the_summary_survives_json_and_has_no_rows() -> None:
    train = population(3, 3000, 100)
    summary = summarise_table(train, NAMES)
    text = json.dumps(summary_to_json(summary))
    assert len(text) < 60_000
    assert "ISIC_" not in text
    test = population(4, 100, 9)
    again = measure_drift(summary_from_json(json.loads(text)), test, NONE, NONE)
    assert again.equals(measure_drift(summary, test, NONE, NONE))


def test_means_over_folds_may_vary_less_but_not_be_on_another_scale() -> None:
    random = np.random.default_rng(0)
    train, test = population(3, 3000, 400), population(4, 1500, 200)
    own = pl.DataFrame({"mine.m": random.standard_normal(3000)})
    values = random.standard_normal(1500)
    for averaged, factor, differs in (
        ((), 0.6, True),
        (("mine.m",), 0.6, False),
        (("mine.m",), 100, True),
        (("mine.m",), 0.01, True),
    ):
        summary = summarise_own(own, train, averaged)
        table = test.with_columns(pl.Series("mine.m", values * factor))
        found = measure_drift(summary, table, NONE, NONE)
        assert found["differs"][0] == differs


def test_own_columns_of_many_texts_are_left_out() -> None:
    train = population(3, 300, 30)
    names = pl.Series([f"name {row}" for row in range(300)])
    own = pl.DataFrame({"mine.name": names, "mine.clinic": train["attribution"]})
    assert list(summarise_own(own, train, ())) == ["mine.clinic"]


def test_summaries_of_earlier_versions_are_read() -> None:
    train = population(3, 300, 30)
    written = summary_to_json(summarise_table(train, NAMES))
    for column in written.values():
        del column["is_averaged"]
    test = population(4, 100, 9)
    found = measure_drift(summary_from_json(written), test, NONE, NONE)
    assert found.equals(drift(train, test))


def test_it_is_written_beside_the_submission(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict_table(project, "raw", embeddings=(), output=tmp_path / "s.csv")
    assert "than chance explains" not in capsys.readouterr().err
    found = pl.read_parquet(tmp_path / "s_drift.parquet")
    assert found["column"].to_list()[-1] == "score"
    assert "attribution" in found["column"].to_list()
    table = read_test_text(project / "data").with_columns(attribution=pl.lit("Another"))
    predict_rows(project, tmp_path / "new", table, ensemble="raw", embeddings=())
    shown = capsys.readouterr().err
    assert shown.count("than chance explains in attribution") == 1
    assert str(tmp_path / "new" / "s_drift.parquet") in shown


def test_a_classifier_is_fitted_if_the_training_table_is_beside_the_rows(
    project: Path, tmp_path: Path
) -> None:
    predict_table(project, "raw", embeddings=(), output=tmp_path / "s.csv")
    (row,) = (
        pl.read_parquet(tmp_path / "s_drift.parquet")
        .filter(pl.col("column") == ALL_COLUMNS)
        .to_dicts()
    )
    assert 0 < row["auc"] < 1
    # Another training table would be another question.
    shutil.copytree(project / "data", tmp_path / "other")
    table = tmp_path / "other" / "train-metadata.csv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))
    output = tmp_path / "other.csv"
    predict_table(project, "raw", data=tmp_path / "other", embeddings=(), output=output)
    assert ALL_COLUMNS not in pl.read_parquet(tmp_path / "other_drift.parquet")["column"]
