import contextlib
import json
from pathlib import Path

import polars as pl
import pytest

from isic.runtime.errors import UserError
from tests.support.ensembles import (
    predict_rows,
    predict_table,
    read_test_text,
    train_table,
)


def test_the_manifest_has_the_lesions_per_patient(fitted: Path, data: Path) -> None:
    counts = sorted(train_table(data)["patient_id"].value_counts()["count"])
    described = json.loads((fitted / "ensemble.json").read_text())["lesions_per_patient"]
    assert len(counts) == 40
    assert described["patients"] == 40
    percentiles = described["percentiles"]
    assert (percentiles["0"], percentiles["100"]) == (counts[0], counts[-1])
    assert percentiles["5"] == counts[1]
    assert percentiles["50"] == counts[19]


FEW = "3 of the 9 patients have fewer than 2 lesions, percentile 5 of the 40 training patients"


@pytest.mark.parametrize(
    ("ensemble", "relative"),
    [("engineered", True), ("raw+image_tiny", True), ("image_tiny", False), ("raw", False)],
)
def test_patients_with_few_lesions_give_a_warning_or_an_error(
    project: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], ensemble: str, relative: bool
) -> None:
    table = read_test_text(project / "data")
    largest = table["patient_id"].value_counts().sort("count")["patient_id"][-1]
    single = table.filter(patient_id=largest)["isic_id"][:3].implode()
    patient = pl.when(pl.col("isic_id").is_in(single)).then("isic_id").otherwise("patient_id")
    changed = table.with_columns(patient_id=patient)
    chosen = {"ensemble": project / "ensemble" / ensemble}
    before = predict_table(project, ensemble)["target"]
    assert "lesions" not in capfd.readouterr().err
    after = predict_rows(project, tmp_path / "data", changed, **chosen)
    assert (FEW in capfd.readouterr().err) == relative
    assert after.equals(before) == (not relative)
    refused = pytest.raises(UserError, match=FEW) if relative else contextlib.nullcontext()
    with refused:
        predict_rows(project, tmp_path / "again", changed, few="refuse", **chosen)
    assert (tmp_path / "again" / "s.csv").exists() == (not relative)
