"""The number needed to triage in `scores.json` and in the printed scores."""

from pathlib import Path

import numpy as np
import polars as pl

from infer.ensemble.scoring.scores import format_scores
from infer.ensemble.scoring.triage import TRIAGE, format_triage, summarise_triage
from tests.support.ensembles import read_blend


def test_it_is_computed_from_the_out_of_fold_scores(fitted: Path) -> None:
    oof = pl.read_parquet(fitted / "oof.parquet")
    found = read_blend(fitted)[TRIAGE]
    assert list(found) == ["0.8", "0.9", "0.95"]
    for sensitivity, at in found.items():
        chosen = oof.filter(pl.col("blend") >= at["threshold"])
        assert at["lesions"] == len(chosen)
        assert at["malignant"] == chosen["target"].sum() >= float(sensitivity) * 60
        assert at["number_needed"] == at["lesions"] / at["malignant"]
        assert at["low"] < at["number_needed"] < at["high"]
    numbers = [at["number_needed"] for at in found.values()]
    assert numbers == sorted(numbers), "more sensitivity costs more"


def test_an_interval_is_wider_if_lesions_of_a_patient_are_alike() -> None:
    random = np.random.default_rng(0)
    alike = np.repeat(random.normal(size=60), 10)
    target = (random.random(600) < 1 / (1 + np.exp(2 - alike))).astype(int)
    score = alike + 0.1 * random.normal(size=600)
    widths = {
        name: summarise_triage(target, score, patient)["0.9"]
        for name, patient in {"own": np.arange(600), "shared": np.repeat(np.arange(60), 10)}.items()
    }
    width = {name: at["high"] - at["low"] for name, at in widths.items()}
    assert width["shared"] > 1.3 * width["own"]


def test_it_is_printed_below_the_scores(fitted: Path) -> None:
    summary = read_blend(fitted)
    model = {key: value for key, value in summary.items() if key != TRIAGE}
    lines = format_scores({"lightgbm_seed_0": model, "blend": summary}).splitlines()
    heading = lines.index("lesions to look at per malignant one found (95 % interval):")
    at = summary[TRIAGE]["0.9"]
    assert "at 90% sensitivity" in lines[heading + 1]
    assert f"{at['number_needed']:.1f} ({at['low']:.1f} to {at['high']:.1f})" in lines[heading + 2]
    assert len({len(line) for line in lines[heading + 1 : heading + 3]}) == 1, "aligned"
    assert max(map(len, lines[: heading + 3])) <= 100


def test_ensembles_of_earlier_fits_have_none(fitted: Path) -> None:
    summary = read_blend(fitted)
    del summary[TRIAGE]
    assert format_triage({"old": summary}) == []
    assert "look at" not in format_scores({"old": summary})
