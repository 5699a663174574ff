"""The reasons for a score: true, complete, and for every kind of ensemble."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from infer import load_ensemble
from infer.ensemble.blends.artifact import open_scorer
from infer.ensemble.blends.write import write_blend
from infer.ensemble.boosting.libraries import LIBRARIES
from infer.ensemble.features.own_tables import read_test_tables
from infer.ensemble.score_table import score_table
from infer.ensemble.settings import BlendSettings, EmbeddingSources
from infer.triage.causes import CAUSES, UNUSUAL, WORDS, Cause
from infer.triage.patients import choose_patients
from infer.triage.reasons import PatientRows, find_reasons, odds
from infer.triage.rows import ScoredRows, read_out_of_fold, read_test
from infer.triage.settings import TriageSettings
from infer.triage.triage import _drift as triage_drift
from infer.triage.triage import triage
from isic import schema
from isic.dataset import Dataset
from isic.features import Encoding
from isic.runtime.errors import UserError
from tests.support.ensembles import fit_small, write_dataset, write_embeddings

NUM_EXAMPLES = 100
BY_NAME = {cause.name: cause for cause in (*CAUSES, UNUSUAL)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables with 40 lesions for each of 6 test patients."""
    return write_dataset(tmp_path_factory.mktemp("triage") / "data", 1200, 150, 240)


@pytest.fixture(scope="module")
def embeddings(data: Path) -> Path:
    return write_embeddings(data.parent / "embeddings" / "tiny", data)


def read_rows(data: Path, ensemble: Path, split: str = "test", **more: Any) -> ScoredRows:
    metadata = Dataset(data).metadata(split).sort(schema.ID)
    scorer = open_scorer(ensemble)
    sources = EmbeddingSources(more.get("embeddings", ()), more.get("frozen", ()))
    tables = read_test_tables(more.get("tables", ()), scorer.own_tables)
    if split == "train":
        return read_out_of_fold(scorer, metadata, sources, tables, 1)
    found = score_table(scorer, metadata, sources, tables, 1)
    return read_test(found, scorer, metadata, sources, tables, 1)


def reasons_of(rows: ScoredRows, most: int = 100) -> list[tuple[str, str, float, float, str]]:
    """Return id, cause, score, score without and text of every reason of the top lesions."""
    found = []
    for patient in choose_patients(rows, (), most):
        facts = PatientRows(rows, patient.index, rows.scorer.training)
        for place, reasons in enumerate(find_reasons(facts, range(patient.num_first))):
            found += [
                (
                    patient.names[place],
                    each.cause,
                    patient.score[place],
                    each.score_without,
                    each.text,
                )
                for each in reasons
            ]
    return found


def without(table: pl.DataFrame, name: str, cause: Cause, trained: pl.DataFrame) -> pl.DataFrame:
    """Return a patient's rows with a lesion made ordinary in a property."""
    others = trained if cause.of_patient else table.filter(pl.col(schema.ID) != name)
    is_changed = pl.lit(True) if cause.of_patient else pl.col(schema.ID) == name
    values = {}
    for column in cause.columns:
        known = others[column].drop_nulls()
        values[column] = known.median() if known.dtype.is_numeric() else known.mode().sort()[0]
    return table.with_columns(
        pl.when(is_changed).then(pl.lit(value)).otherwise(pl.col(column)).alias(column)
        for column, value in values.items()
    )


@pytest.mark.parametrize("features", ["engineered", "raw"])
def test_without_a_named_cause_the_score_falls(data: Path, tmp_path: Path, features: str) -> None:
    root = fit_small(data, tmp_path, features=features)
    rows = read_rows(data, root)
    found = reasons_of(rows)
    step = max(len(found) // NUM_EXAMPLES, 1)
    chosen = found[::step][:NUM_EXAMPLES]
    assert len(chosen) >= 0.6 * NUM_EXAMPLES
    trained = Dataset(data).metadata("train")
    table = Dataset(data).metadata("test")
    ensemble = load_ensemble(root)
    falls = [
        score_without(ensemble, table, name, BY_NAME[cause], trained) < score - 1e-9
        for name, cause, score, *_ in chosen
    ]
    assert np.mean(falls) >= 0.95
    # Any other property would not do: this is not a test that cannot fail.
    named = {(name, cause) for name, cause, *_ in found}
    scores = {name: score for name, _, score, *_ in found}
    others = [
        (name, cause) for name in scores for cause in CAUSES if (name, cause.name) not in named
    ]
    unnamed = [
        odds(score_without(ensemble, table, name, cause, trained)) < 0.9 * odds(scores[name])
        for name, cause in others[:: max(len(others) // 60, 1)]
    ]
    assert np.mean(unnamed) < 0.2


def score_without(
    ensemble: Any, table: pl.DataFrame, name: str, cause: Cause, trained: pl.DataFrame
) -> float:
    (patient,) = table.filter(pl.col(schema.ID) == name)[schema.PATIENT]
    rows = table.filter(pl.col(schema.PATIENT) == patient)
    changed = without(rows, name, cause, trained)
    place = changed[schema.ID].to_list().index(name)
    return float(ensemble.score(changed, num_threads=1)[place])


@pytest.mark.parametrize("library", LIBRARIES)
def test_contributions_add_up_to_the_difference_of_log_odds(library: str) -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((300, 5)).astype(np.float32)
    target = (matrix[:, 0] + matrix[:, 1] * matrix[:, 2] > 0.3).astype(int)
    row = LIBRARIES[library]
    parameters = {**row.defaults, "num_rounds": 20}
    text = row.fit(matrix, target, [f"f{i}" for i in range(5)], parameters, 0)
    contributions = row.contributions(text)(matrix)
    assert contributions.shape == matrix.shape
    probability = row.load(text)(matrix, 1)
    log_odds = np.log(probability / (1 - probability))
    sums = contributions.sum(axis=1)
    np.testing.assert_allclose(sums - sums[0], log_odds - log_odds[0], atol=1e-4)


def test_contributions_of_an_ensemble_are_in_log_odds(
    data: Path, embeddings: Path, tmp_path: Path
) -> None:
    """As much as its score differs between lesions: not once per fold, seed and library."""
    root = fit_small(data, tmp_path, features="raw", seeds=2)
    rows = read_rows(data, root)
    (member,) = rows.members.values()
    table = member.features(rows.metadata, member.given)
    total = sum(rows.contributions({root.name: table}, None).causes.values())
    log_odds = np.log(rows.score / (1 - rows.score))
    assert np.corrcoef(total, log_odds)[0, 1] > 0.97
    assert 0.8 < np.std(total) / np.std(log_odds) < 1.25


def test_a_training_rows_reasons_are_by_its_fold_alone(
    data: Path, embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the weights, encodings and boosters that its score is by."""
    rows = read_rows(data, _blend(data, tmp_path, embeddings), "train", embeddings=[embeddings])
    first, *others = rows.members
    of_fold = {str(fold): {first: 1.0, **dict.fromkeys(others, 0.0)} for fold in range(5)}
    scorer = replace(rows.scorer, manifest={**rows.scorer.manifest, "weights_by_fold": of_fold})
    tables = {
        name: member.features(rows.metadata[:20], member.given[:20])
        for name, member in rows.members.items()
    }
    transform, encoded = Encoding.transform, []

    def counted(self: Encoding, table: pl.DataFrame) -> Any:
        encoded.append(self)
        return transform(self, table)

    monkeypatch.setattr(Encoding, "transform", counted)
    found = replace(rows, scorer=scorer).contributions(tables, [0])
    assert len(encoded) == len(rows.members)
    alone = rows.members[first].contributions(tables[first], [0])
    for cause, values in alone.causes.items():
        np.testing.assert_allclose(found.causes[cause], values)


def test_every_measurement_has_one_cause_and_words() -> None:
    columns = [column for cause in CAUSES for column in cause.columns]
    assert sorted(columns) == sorted((*schema.NUMERIC, *schema.CATEGORICAL))
    assert set(WORDS) == set(columns)


def test_the_example_of_a_sentence(data: Path, tmp_path: Path) -> None:
    """Deviations are those of the table, in the direction of the words."""
    rows = read_rows(data, fit_small(data, tmp_path, features="engineered"))
    found = reasons_of(rows)
    texts = [text for *_, text in found]
    assert any("of training lesions" in text for text in texts)
    assert not any("nan" in text or "None" in text for text in texts)
    table = Dataset(data).metadata("test")
    pattern = re.compile(
        r"^(diameter|hue) ([\d.]+) standard deviations (larger|smaller|redder|yellower)"
    )
    columns = {"diameter": "clin_size_long_diam_mm", "hue": "tbp_lv_H"}
    matches = [(name, match) for name, *_, text in found if (match := pattern.match(text))]
    assert len(matches) > 3
    for name, match in matches:
        noun, size, word = match.groups()
        (patient,) = table.filter(pl.col(schema.ID) == name)[schema.PATIENT]
        lesions = table.filter(pl.col(schema.PATIENT) == patient)
        is_it = pl.col(schema.ID) == name
        value = lesions.filter(is_it)[columns[noun]][0]
        others = lesions.filter(~is_it)[columns[noun]].to_numpy()
        deviation = (value - others.mean()) / others.std(ddof=1)
        assert float(size) == pytest.approx(abs(deviation), abs=0.051)
        assert (word in ("larger", "yellower")) == (deviation > 0)


def kinds(data: Path, embeddings: Path, folder: Path) -> dict[str, Callable[[], Path]]:
    own = folder / "own.yaml"
    own.write_text("squared: clin_size_long_diam_mm * clin_size_long_diam_mm\n")
    for split in ("train", "test"):
        ids = Dataset(data).metadata(split).select(schema.ID)
        (folder / split).mkdir()
        ids.with_columns(extra=pl.int_range(pl.len()) % 7).write_csv(folder / split / "more.csv")
    shared: dict[str, Any] = {"data": data, "output_dir": folder, "num_rounds": 10}
    with_images = {**shared, "embeddings": [embeddings]}
    tables = [f"label_free:{folder / 'train' / 'more.csv'}"]
    return {
        "image": lambda: fit_small(**with_images, features="image"),
        "multimodal": lambda: fit_small(**with_images, features="raw,image,image_ranks"),
        "difference": lambda: fit_small(**with_images, features="raw,image,-image_score.tiny"),
        "own": lambda: fit_small(
            **shared, features="raw,own,more", define=[own], tables=tables, name="own"
        ),
        "libraries": lambda: fit_small(
            **shared, features="raw", libraries=["lightgbm", "xgboost"], name="two"
        ),
        "blend": lambda: _blend(data, folder, embeddings),
    }


def _blend(data: Path, folder: Path, embeddings: Path) -> Path:
    parts = [
        fit_small(data, folder / "parts", features=features, embeddings=[embeddings])
        for features in ("raw", "engineered,image")
    ]
    return write_blend(BlendSettings(ensembles=parts, output_dir=folder, data=data))


def test_a_member_without_a_weight_needs_no_embeddings(data: Path, tmp_path: Path) -> None:
    misled = write_embeddings(tmp_path / "embeddings" / "misled", data, strength=-2.0)
    parts = [
        fit_small(data, tmp_path, features="raw"),
        fit_small(data, tmp_path, features="image", embeddings=misled, name="misled"),
    ]
    settings = BlendSettings(ensembles=parts, output_dir=tmp_path, data=data, weights="search")
    page = tmp_path / "triage.html"
    triage(TriageSettings(data=data, ensemble=write_blend(settings), output=page, max_patients=1))
    assert page.is_file()


def test_own_columns_are_compared_with_training(
    data: Path, embeddings: Path, tmp_path: Path
) -> None:
    root = kinds(data, embeddings, tmp_path)["own"]()
    path = tmp_path / "test" / "more.csv"
    pl.read_csv(path).with_columns(pl.col("extra") * 100).write_csv(path)
    rows = read_rows(data, root, tables=[str(path)])
    assert "more.extra" in triage_drift(rows, Dataset(data))["column"]


@pytest.mark.parametrize("split", ["test", "train"])
@pytest.mark.parametrize("kind", ["image", "multimodal", "difference", "own", "libraries", "blend"])
def test_every_kind_of_ensemble_has_reasons(
    data: Path, embeddings: Path, tmp_path: Path, kind: str, split: str
) -> None:
    root = kinds(data, embeddings, tmp_path)[kind]()
    uses_images = open_scorer(root).uses_images
    more: dict[str, Any] = {"embeddings": [embeddings]} if uses_images else {}
    if kind == "own":
        more["tables"] = [str(tmp_path / split / "more.csv")]
    # In the training split, this also shows that the scores are those of the fit.
    found = reasons_of(read_rows(data, root, split, **more), most=3)
    assert found
    for _, _, score, score_without, text in found:
        assert score_without < score
        assert text
    if kind == "image":
        assert {cause for _, cause, *_ in found} == {"tiny"}
    if kind == "difference":
        texts = {text for _, cause, *_, text in found if cause == "tiny"}
        assert texts == {"its image, as tiny describes it"}


def test_embeddings_of_another_fit_are_refused(
    data: Path, embeddings: Path, tmp_path: Path
) -> None:
    root = fit_small(data, tmp_path, features="raw,image", embeddings=[embeddings])
    other = write_embeddings(tmp_path / "other" / "tiny", data, seed=5)
    rows = read_rows(data, root, "train", embeddings=[other])
    with pytest.raises(UserError, match="not those of the fit"):
        reasons_of(rows, most=1)


def test_other_training_rows_are_refused(data: Path, tmp_path: Path) -> None:
    root = fit_small(data, tmp_path, features="raw")
    smaller = tmp_path / "smaller"
    smaller.mkdir()
    pl.read_csv(data / "train-metadata.csv", infer_schema=False)[1:].write_csv(
        smaller / "train-metadata.csv"
    )
    with pytest.raises(UserError, match="these are not the 1,200 training rows"):
        read_rows(smaller, root, "train")


def test_a_patient_with_one_lesion_is_compared_with_training(data: Path, tmp_path: Path) -> None:
    root = fit_small(data, tmp_path, features="raw")
    single = tmp_path / "single"
    single.mkdir()
    table = pl.read_csv(data / "test-metadata.csv", infer_schema=False)
    table.with_columns(patient_id=pl.col(schema.ID)).write_csv(single / "test-metadata.csv")
    found = reasons_of(read_rows(single, root))
    assert found
    assert not any("other lesions" in text for *_, text in found)
