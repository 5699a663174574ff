import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from infer.ensemble import fit
from infer.ensemble.artifact import open_ensemble
from infer.ensemble.lesions import count_lesions
from infer.ensemble.score_table import score_models
from infer.ensemble.scoring.few_lesions import SIZES, format_by_lesions, split_by_lesions
from isic import schema
from isic.metrics import pauc
from tests.support.ensembles import fit_small, train_table, write_embeddings


def by_lesions(ensemble: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((ensemble / "ensemble.json").read_text())[
        "pauc_by_lesions"
    ]
    return found


def test_sizes_that_no_patient_exceeds_are_left_out(data: Path) -> None:
    table = train_table(data).filter(pl.int_range(pl.len()).over(schema.PATIENT) < 5)
    groups = dict(split_by_lesions(table))
    assert list(groups) == [1, 2, 3]
    for size, part in groups.items():
        assert count_lesions(part).max() == size
    assert groups[3].equals(dict(split_by_lesions(table))[3])


def test_the_manifest_has_the_score_by_lesions(fitted: Path) -> None:
    found = by_lesions(fitted)
    assert list(found) == [*map(str, SIZES), "all"]
    oof = pl.read_parquet(fitted / "oof.parquet")
    assert found["all"] == pauc(oof["target"], oof["blend"])
    assert len(set(found.values())) == len(found)


def test_one_lesion_is_scored_as_in_a_table_without_patients(fitted: Path, data: Path) -> None:
    ensemble = open_ensemble(fitted)
    oof = ensemble.oof()
    rows = train_table(data).sort(schema.ID).with_columns(pl.col(schema.ID).alias(schema.PATIENT))
    table = ensemble.spec.frame(rows, ())
    score = np.zeros(len(rows))
    for k, encoding in ensemble.state.encodings.items():
        of_fold = replace(ensemble, state=replace(ensemble.state, encodings={k: encoding}))
        models = score_models(of_fold, table, 1)
        held_out = (oof["fold"] == k).to_numpy()
        score[held_out] = np.mean(list(models.values()), axis=0)[held_out]
    assert by_lesions(fitted)["1"] == pytest.approx(pauc(oof["target"], score), abs=1e-12)


def test_features_that_compare_no_lesions_have_no_table(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ensemble = fit_small(data, tmp_path, features="raw", num_rounds=2, few_table=True)
    assert by_lesions(ensemble) == {}
    assert "lesions scored" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("few_table", "max_rows", "printed"),
    [(None, 400, True), (None, 399, False), (True, 399, True), (False, 400, False)],
)
def test_the_table_is_printed_for_few_rows_or_if_asked_for(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    few_table: bool | None,
    max_rows: int,
    printed: bool,
) -> None:
    monkeypatch.setattr(fit, "MAX_ROWS_OF_FEW_TABLE", max_rows)
    chosen = {"features": "raw,patient_count", "num_rounds": 2, "few_table": few_table}
    assert bool(by_lesions(fit_small(data, tmp_path, **chosen))) == printed
    assert ("lesions scored together" in capsys.readouterr().out) == printed


def test_image_scores_are_compared_within_the_lesions(data: Path, tmp_path: Path) -> None:
    embeddings = write_embeddings(tmp_path / "embeddings" / "tiny", data)
    chosen = {"features": "raw,image", "embeddings": embeddings}
    found = by_lesions(fit_small(data, tmp_path, **chosen))
    assert len(set(found.values())) > 4


def test_the_values_are_below_their_numbers() -> None:
    first, second = format_by_lesions({"1": 0.1, "20": 0.15, "all": 0.16}).splitlines()
    assert first.split()[-3:] == ["1", "20", "all"]
    assert second.split()[-3:] == ["0.1000", "0.1500", "0.1600"]
    assert len(first) == len(second)
