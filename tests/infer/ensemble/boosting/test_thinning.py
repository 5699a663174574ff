import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from infer.ensemble.boosting.out_of_fold import fit_boosters, score_held_out
from infer.ensemble.boosting.thinning import ThinnedTables, draw_sizes, split_patients
from infer.ensemble.boosting.training_table import TrainingTable
from infer.ensemble.features.spec import FeatureSpec
from infer.ensemble.lesions import count_lesions
from infer.ensemble.rows import read_train
from isic import schema
from isic.folds import draw_folds
from isic.metadata import with_patient
from isic.runtime.errors import UserError
from tests.support.ensembles import (
    fit_settings,
    fit_small,
    read_blend,
    read_files,
    shuffle_targets,
    train_table,
    write_embeddings,
    write_train,
)

PATIENTS = ["a"] * 12 + ["b"] * 10 + ["c"]
TABLE = pl.DataFrame({schema.ID: [f"ISIC_{i:02d}" for i in range(23)], schema.PATIENT: PATIENTS})


def read_ensemble(root: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((root / "ensemble.json").read_text())
    return manifest


def split(table: pl.DataFrame, size: int | np.ndarray, seed: int = 0) -> pl.DataFrame:
    return split_patients(table, size, np.random.default_rng(seed))


def test_groups_hold_every_lesion_once_and_one_patient() -> None:
    groups = split(TABLE, 5)
    assert groups[schema.ID].equals(TABLE[schema.ID])
    pairs = pl.DataFrame({"group": groups[schema.PATIENT], "patient": PATIENTS})
    assert (pairs.group_by("group").agg(pl.col("patient").n_unique())["patient"] == 1).all()
    assert sorted(pairs["group"].value_counts()["count"]) == [1, 2, 5, 5, 5, 5]
    assert not groups.equals(split(TABLE, 5, seed=1))


def test_each_patient_has_its_own_size() -> None:
    groups = split(TABLE, np.array([12, 3, 1]))
    sizes = groups.with_columns(patient=pl.Series(PATIENTS)).group_by("patient", schema.PATIENT)
    counts = sizes.len().group_by("patient").agg(pl.col("len").sort())
    assert dict(counts.iter_rows()) == {"a": [12], "b": [1, 3, 3, 3], "c": [1]}


def test_groups_are_random_and_not_neighbours_in_the_table() -> None:
    table = pl.DataFrame({schema.ID: [f"ISIC_{i:04d}" for i in range(1000)]})
    table = table.with_columns(patient_id=pl.lit("a"))
    group = split(table, 500)[schema.PATIENT]
    in_first_half = (group[:500] == group[0]).sum()
    assert 200 < in_first_half < 300


def test_groups_depend_on_the_rows_and_not_on_their_order() -> None:
    shuffled = TABLE.sample(fraction=1, shuffle=True, seed=2)
    assert split(shuffled, 4).sort(schema.ID).equals(split(TABLE, 4))


def test_a_group_has_no_other_patients_name() -> None:
    names = pl.Series(schema.PATIENT, ["0", "0", "0-0", "0-0"])
    table = pl.DataFrame({schema.ID: list("wxyz")}).with_columns(names)
    assert split(table, 2)[schema.PATIENT].n_unique() == 2


def test_groups_do_not_read_the_targets(data: Path) -> None:
    table = train_table(data)
    flipped = table.with_columns(target=1 - pl.col(schema.TARGET))
    for size in (1, 3, draw_sizes(count_lesions(table), 0.5, np.random.default_rng(1))):
        groups = split(table, size)[schema.PATIENT]
        assert groups.equals(split(flipped, size)[schema.PATIENT])


def test_a_row_without_a_patient_is_a_group() -> None:
    table = TABLE.with_columns(patient_id=pl.lit(None, pl.String))
    assert split(table, 5)[schema.PATIENT].n_unique() == len(table)


def test_sizes_are_log_uniform_for_a_share_of_the_patients() -> None:
    counts = np.full(40_000, 100)
    sizes = draw_sizes(counts, 0.5, np.random.default_rng(0))
    assert sizes.min() == 1
    assert sizes.max() == 100
    changed = sizes[sizes < 100]
    # One in ln 101 = 4.6 of the random sizes is in any range whose ends differ by a factor e.
    assert len(changed) == pytest.approx(20_000, rel=0.03)
    for low, high in ((1, 3), (3, 9), (9, 27)):
        share = np.mean((changed >= low) & (changed < high))
        assert share == pytest.approx(np.log(high / low) / np.log(101), rel=0.1)
    assert draw_sizes(counts, 0.0, np.random.default_rng(0)).tolist() == counts.tolist()
    assert draw_sizes(np.ones(50, int), 1.0, np.random.default_rng(0)).tolist() == [1] * 50


def thinned_of(data: Path) -> ThinnedTables:
    spec = FeatureSpec.parse("engineered")
    return ThinnedTables(
        read_train(data, spec), lambda rows: TrainingTable(spec.frame(rows, ())), 0.5
    )


def test_relative_features_are_those_of_the_smaller_patients(data: Path) -> None:
    thinned = thinned_of(data)
    table = thinned.compute(3).features
    assert table[schema.ID].equals(thinned.metadata[schema.ID])
    whole = thinned.table(thinned.metadata).features
    split_rows = (table["patient_num_lesions"] != whole["patient_num_lesions"]).to_numpy()
    assert 0.2 < split_rows.mean() < 0.8
    single = table.filter(pl.col("patient_num_lesions") == 1)
    assert len(single)
    assert (single["tbp_lv_A_patient_z"] == 0).all()
    assert (single["patient_lof"] == -1).all()
    # Nothing else changes, and nothing at all for a patient that is not split.
    raw = FeatureSpec.parse("raw").tabular
    assert table.select(raw).equals(whole.select(raw))
    patient = with_patient(thinned.metadata)[schema.PATIENT]
    unchanged = ~patient.is_in(patient.filter(split_rows).unique().implode())
    assert unchanged.any()
    assert table.filter(unchanged).equals(whole.filter(unchanged))
    assert not table.equals(thinned.compute(4).features)


def test_a_table_is_computed_once_for_all_threads_and_freed_after_the_last_use(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thinned = thinned_of(data)
    computed = []
    monkeypatch.setattr(
        thinned, "compute", lambda seed: (computed.append(seed), thinned.metadata)[1]
    )
    threads = [threading.Thread(target=thinned.take, args=(7, 4)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert computed == [7]
    assert thinned.take(7, 4) is thinned.metadata
    assert not thinned._tables


def test_threads_and_the_order_of_rows_do_not_change_the_bytes(data: Path, tmp_path: Path) -> None:
    embeddings = write_embeddings(tmp_path / "embeddings" / "tiny", data)
    chosen = {"features": "multimodal", "embeddings": embeddings, "num_rounds": 5}
    chosen |= {"seeds": 2, "libraries": "lightgbm,xgboost", "thin_patients": 0.5}
    expected = read_files(fit_small(data, tmp_path / "one", **chosen))
    assert read_files(fit_small(data, tmp_path / "three", num_threads=3, **chosen)) == expected
    table = train_table(data).sample(fraction=1, shuffle=True, seed=4)
    shuffled = write_train(tmp_path / "shuffled", table)
    again = read_files(fit_small(shuffled, tmp_path / "order", **chosen))
    assert {name for name in expected if again[name] != expected[name]} == {"ensemble.json"}


def test_held_out_rows_are_scored_as_whole_patients(data: Path) -> None:
    thinned = thinned_of(data)
    table = thinned.table(thinned.metadata)
    folds = draw_folds(thinned.metadata, 3, 42).of(thinned.metadata).to_numpy()
    target = thinned.metadata[schema.TARGET].to_numpy()
    settings = fit_settings(data, data, thin_patients=0.5, seeds=2)
    result = fit_boosters(
        table, FeatureSpec.parse("engineered").tabular, target, folds, settings, thinned
    )
    scores = score_held_out(result, table.features, folds)
    assert list(scores) == list(result.scores)
    for name, score in scores.items():
        np.testing.assert_array_equal(score, result.scores[name])
        assert score.all()


def test_the_manifest_has_the_share_only_if_it_is_given(data: Path, tmp_path: Path) -> None:
    """So that a fit repeats one of an earlier version without --force."""
    chosen = {"features": "engineered", "num_rounds": 5}
    whole = read_ensemble(fit_small(data, tmp_path / "whole", **chosen))
    thin = read_ensemble(fit_small(data, tmp_path / "thin", thin_patients=1.0, **chosen))
    assert thin["settings"] == {**whole["settings"], "thin_patients": 1.0}
    assert thin["scores"] != whole["scores"]


def test_shuffled_targets_give_chance(data: Path, tmp_path: Path) -> None:
    shuffle_targets(data, tmp_path / "shuffled")
    chosen = {"features": "engineered", "seeds": 2, "thin_patients": 1.0}
    ensemble = fit_small(tmp_path / "shuffled", tmp_path / "out", **chosen)
    assert 0.38 < read_blend(ensemble)["auc"] < 0.62


def test_features_that_compare_no_lesions_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--features raw has none; leave it out"):
        fit_small(data, tmp_path, features="raw", thin_patients=0.5)


def test_lesion_counts_are_in_the_order_of_names() -> None:
    assert count_lesions(TABLE.reverse()).tolist() == [12, 10, 1]
