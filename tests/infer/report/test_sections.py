import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from infer.ensemble.blends.artifact import mean_probability, open_scorer
from infer.ensemble.blends.write import write_blend
from infer.ensemble.fit import fit_ensemble
from infer.ensemble.settings import BlendSettings
from infer.report.write import write_report
from isic.dataset import Dataset
from isic.folds import draw_folds
from isic.metrics import pauc, roc_auc, top_k
from tests.support.ensembles import NUM_FOLDS, fit_settings, fit_small, write_embeddings


def score_cells(name: str, rows: pl.DataFrame, model: str) -> str:
    """Return the HTML of the first cells of a line: its name and four scores of a model."""
    top = top_k(rows["target"], rows[model], rows["patient_id"])
    cells = (
        f"{pauc(rows['target'], rows[model]):.4f}",
        f"{roc_auc(rows['target'], rows[model]):.4f}",
        f"{100 * top.by_lesion:.1f}\N{NO-BREAK SPACE}%",
        f"{100 * top.by_patient:.1f}\N{NO-BREAK SPACE}%",
    )
    return f'<th scope="row">{name}</th>' + "".join(f"<td>{cell}</td>" for cell in cells)


def test_the_tables_hold_the_scores(page: str, oof: pl.DataFrame) -> None:
    for (fold,), rows in oof.group_by("fold"):
        counts = f"<td>{len(rows)}</td><td>{rows['target'].sum()}</td>"
        assert score_cells(str(fold), rows, "blend") + counts in page
    for model in ("lightgbm_seed_0", "lightgbm_seed_1", "blend"):
        assert score_cells(model, oof, model) in page
    assert score_cells("pooled", oof, "blend") in page


def test_the_score_by_lesions_is_shown_if_it_is_known(
    page: str, data: Path, tmp_path: Path
) -> None:
    caption = "If only some lesions of a patient are known"
    assert caption in page
    raw = fit_ensemble(fit_settings(data, tmp_path, features="numeric", num_rounds=2))
    assert caption not in write_report(raw, data).read_text()


def test_without_trees_and_without_images(data: Path, embeddings: Path, tmp_path: Path) -> None:
    image = fit_ensemble(fit_settings(data, tmp_path, features="image", embeddings=embeddings))
    assert "There are no trees" in write_report(image, data).read_text()
    tabular = fit_ensemble(fit_settings(data, tmp_path, features="numeric", num_rounds=2))
    assert "so there is no map" in write_report(tabular, data, [embeddings]).read_text()


@pytest.mark.parametrize(
    ("features", "sentence"),
    [
        ("numeric", "by boosters that were fitted without the patient."),
        ("image", "by an image model that was trained without the patient."),
        ("numeric,image", "so the independence is not complete."),
    ],
)
def test_the_report_does_not_claim_more_independence_than_there_is(
    data: Path, embeddings: Path, tmp_path: Path, features: str, sentence: str
) -> None:
    chosen = {"features": features, "embeddings": embeddings, "num_rounds": 2, "name": "it"}
    page = write_report(fit_ensemble(fit_settings(data, tmp_path, **chosen)), data).read_text()
    assert sentence in page
    assert "never saw the patient" not in page


def test_the_networks_and_their_correlation_are_shown(
    data: Path, embeddings: Path, tmp_path: Path
) -> None:
    """With two networks of different fold plans, each has its own maps."""
    table = Dataset(data).metadata("train")
    other = write_embeddings(tmp_path / "other", data, draw_folds(table, 3, 7), seed=4)
    runs = [embeddings, other]
    root = fit_ensemble(fit_settings(data, tmp_path, features="image", embeddings=runs))
    page = write_report(root, data, runs).read_text()
    assert "the mean of 2 image networks" in page
    networks = json.loads((root / "ensemble.json").read_text())["networks"]
    for name, score in networks["scores"].items():
        cells = f"<td>{score['pauc']:.4f}</td><td>{score['auc']:.4f}</td>"
        assert f'<th scope="row">{name}</th>{cells}' in page
    (pair,) = networks["correlations"]
    cells = f"<td>{pair['all']:.2f}</td><td>{pair['malignant']:.2f}</td>"
    assert f'<th scope="row">image_score.other and image_score.tiny</th>{cells}' in page
    for name in ("other", "tiny"):
        assert f"<h3>{name}, fold 2</h3>" in page
    assert "<h3>other, fold 2</h3>" not in write_report(root, data, runs[:1]).read_text()
    tabular = fit_ensemble(fit_settings(data, tmp_path, features="numeric", num_rounds=2))
    assert "uses no network&#x27;s score" in write_report(tabular, data).read_text()


def test_the_calibration_is_of_probabilities_if_the_score_is_of_ranks(
    data: Path, tmp_path: Path
) -> None:
    libraries = ("lightgbm", "xgboost")
    members = tuple(
        fit_small(data, tmp_path, features=features, libraries=libraries, num_rounds=4)
        for features in ("raw", "numeric")
    )
    root = write_blend(BlendSettings(ensembles=members, output_dir=tmp_path, data=data))
    probabilities = [
        pl.read_parquet(member / "oof.parquet")
        .select(pl.mean_horizontal("^.*_seed_0$"))
        .to_series()
        for member in members
    ]
    found = mean_probability(open_scorer(root))
    np.testing.assert_allclose(found, (probabilities[0] + probabilities[1]) / 2)
    np.testing.assert_allclose(mean_probability(open_scorer(members[0])), probabilities[0])


def test_columns_of_oof_tables_limit_the_independence_too(data: Path, tmp_path: Path) -> None:
    train = Dataset(data).metadata("train")
    fold = draw_folds(train, NUM_FOLDS, 42).of(train).alias("fold")
    train.select("isic_id", fold, x=pl.col("age_approx")).write_parquet(tmp_path / "own.parquet")
    given = {"features": "raw,own", "tables": f"oof:{tmp_path / 'own.parquet'}", "num_rounds": 2}
    page = write_report(fit_small(data, tmp_path, **given), data).read_text()
    assert "rows have columns of oof tables from the other folds" in page


def test_the_number_needed_to_triage_is_that_of_the_scores(page: str, fitted: Path) -> None:
    found = json.loads((fitted / "scores.json").read_text())["blend"]["triage"]["0.95"]
    cells = (
        f"{found['lesions']:,}",
        f"{found['malignant']:,}",
        f"{found['number_needed']:.1f}",
        f"{found['low']:.1f} to {found['high']:.1f}",
    )
    row = "".join(f"<td>{cell}</td>" for cell in cells)
    assert f'<th scope="row">95\N{NO-BREAK SPACE}%</th>{row}' in page
