from pathlib import Path

import polars as pl
import pytest

from infer.report.cases import NUM_CASES, NUM_OTHERS, worst_false_alarms, worst_misses
from isic.dataset import Dataset
from isic.metadata import with_patient


def test_the_worst_are_shown_with_their_patients_other_lesions(
    oof: pl.DataFrame, data: Path
) -> None:
    metadata = Dataset(data).metadata("train")
    misses, alarms = worst_misses(oof, metadata), worst_false_alarms(oof, metadata)
    assert len(misses) == len(alarms) == NUM_CASES
    scores = {label: rows["blend"].sort() for (label,), rows in oof.group_by("target")}
    assert [case.lesion.score for case in misses] == scores[1].head(NUM_CASES).to_list()
    assert [case.lesion.score for case in alarms] == scores[0].tail(NUM_CASES).reverse().to_list()
    for case in (*misses, *alarms):
        mine = oof.filter(patient_id=case.patient).sort("blend", descending=True)
        assert case.num_lesions == len(mine)
        assert mine["isic_id"][case.rank - 1] == case.lesion.name
        others = mine.filter(pl.col("isic_id") != case.lesion.name).head(NUM_OTHERS)
        assert [lesion.name for lesion in case.others] == others["isic_id"].to_list()
        assert case.row["isic_id"] == case.lesion.name
        beaten = oof.filter(pl.col("target") != case.lesion.target)["blend"] < case.lesion.score
        assert case.beaten == pytest.approx(beaten.mean())


def test_a_lesion_of_nobody_is_its_own_patient() -> None:
    metadata = pl.DataFrame(
        {"isic_id": ["a", "b", "c"], "target": [1, 0, 0], "patient_id": [None, "p", "p"]}
    )
    scored = with_patient(metadata).with_columns(blend=pl.Series([0.1, 0.9, 0.2]))
    (miss,) = worst_misses(scored, metadata)
    assert (miss.patient, miss.rank, miss.num_lesions, miss.others) == (None, 1, 1, ())
