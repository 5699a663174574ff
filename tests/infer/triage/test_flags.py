"""The flags that `infer triage` shares with `infer predict`: the same scores, and their reasons."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from infer import load_ensemble
from infer.ensemble.blends.write import write_blend
from infer.ensemble.predict import predict_submission
from infer.ensemble.settings import BlendSettings, PredictSettings
from infer.triage.causes import CAUSES
from infer.triage.patients import choose_patients
from infer.triage.reasons import PatientRows, find_reasons
from infer.triage.rows import ScoredRows
from infer.triage.settings import TriageSettings
from infer.triage.triage import open_models, read_rows, triage
from isic import schema
from isic.dataset import Dataset
from isic.runtime.errors import UserError
from isic.runtime.files import read_json
from tests.support.commands import Cli
from tests.support.ensembles import (
    fit_small,
    read_test_text,
    write_all_embeddings,
    write_dataset,
    write_embeddings,
)

NUM_FEW = 3
"""Lesions of the patient who has few."""
FLAGS = [
    {"rows": rows, "few": few, "prevalence": prevalence}
    for rows, few, prevalence in product(("folds", "all"), ("warn", "raw"), (None, 0.01))
]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, embeddings by the folds and by all rows, and a blend.

    The first test patient has few lesions. The blend is of an ensemble of raw features and one that
    compares lesions; it is calibrated, and its members have boosters on all rows.
    """
    root = tmp_path_factory.mktemp("flags")
    data = write_dataset(root / "data", 1200, 150, 90)
    table = read_test_text(data)
    is_first = pl.col(schema.PATIENT) == pl.col(schema.PATIENT).sort().first()
    first = table.filter(is_first).head(NUM_FEW)
    pl.concat([first, table.filter(~is_first)]).write_csv(data / "test-metadata.csv")
    embeddings = write_embeddings(root / "embeddings" / "tiny", data)
    logits = np.random.default_rng(5).standard_normal(len(Dataset(data).metadata("test")))
    write_all_embeddings(root / "embeddings" / "tiny_all", data, logits)
    shared: dict[str, Any] = {"embeddings": embeddings, "num_rounds": 20, "refit": True}
    parts = [
        fit_small(data, root, features=features, **shared)
        for features in ("raw", "engineered,image")
    ]
    write_blend(
        BlendSettings(ensembles=parts, output_dir=root, data=data, name="blend", calibrate="platt")
    )
    return root


def flags_of(project: Path, **more: object) -> dict[str, object]:
    """Return settings that both commands take."""
    run = "tiny_all" if more.get("rows") == "all" else "tiny"
    defaults = {
        "data": project / "data",
        "ensemble": project / "blend",
        "embeddings": project / "embeddings" / run,
        "num_threads": 1,
    }
    return defaults | more


def rows_of(project: Path, **more: object) -> ScoredRows:
    settings = TriageSettings.model_validate(flags_of(project, **more))
    return read_rows(settings, Dataset(settings.data), open_models(settings))


def write_pages(project: Path, output: Path, **more: object) -> dict[str, str]:
    """Run `infer triage`. Returns the patients' pages by file name."""
    triage(TriageSettings.model_validate(flags_of(project, **more) | {"output": output}))
    pages = output.with_suffix("").glob("*.html")
    return {path.stem: path.read_text(encoding="utf-8") for path in pages}


def few_patient(project: Path) -> str:
    return str(Dataset(project / "data").metadata("test")[schema.PATIENT].min())


def words_of(flags: dict[str, object]) -> str:
    return " ".join(str(value) for value in flags.values())


@pytest.mark.parametrize("flags", FLAGS, ids=words_of)
def test_the_scores_are_those_of_predict(
    project: Path, tmp_path: Path, flags: dict[str, object]
) -> None:
    output = tmp_path / "s.csv"
    predict_submission(PredictSettings.model_validate(flags_of(project, **flags, output=output)))
    expected = pl.read_parquet(tmp_path / "s_models.parquet").sort(schema.ID)
    rows = rows_of(project, **flags)
    assert rows.metadata[schema.ID].equals(expected[schema.ID])
    np.testing.assert_allclose(rows.score, expected["blend"], rtol=0, atol=1e-12)
    assert rows.probability is not None
    probability = expected["probability"].fill_null(np.nan)
    np.testing.assert_allclose(rows.probability, probability, rtol=1e-12)


def test_each_flag_changes_what_it_is_for(project: Path) -> None:
    """Or the scores would be equal whatever the flags are."""
    usual = rows_of(project)
    is_few = (usual.metadata[schema.PATIENT] == few_patient(project)).to_numpy()
    assert is_few.sum() == NUM_FEW
    assert (rows_of(project, rows="all").score != usual.score).mean() > 0.9
    raw = rows_of(project, few="raw")
    np.testing.assert_array_equal(raw.score != usual.score, is_few)
    rare = rows_of(project, prevalence=0.01)
    assert usual.probability is not None
    assert rare.probability is not None
    assert (rare.probability < usual.probability / 5).all()
    np.testing.assert_array_equal(rare.score, usual.score)


@pytest.mark.parametrize("rows", ["folds", "all"])
def test_reasons_are_by_the_models_that_score(project: Path, rows: str) -> None:
    """Without a measurement, `load_ensemble` gives the score that the reason names."""
    run = "tiny_all" if rows == "all" else "tiny"
    flags: dict[str, Any] = {"few": "raw", "rows": rows}
    ensemble = load_ensemble(project / "blend")
    embeddings = {"tiny": project / "embeddings" / run}
    found = rows_of(project, **flags)
    table = Dataset(project / "data").metadata("test")
    # Of numbers only: the commonest of categories is not unique.
    columns = {cause.name: cause.columns for cause in CAUSES if {*cause.columns} <= NUMBERS}
    checked = dict.fromkeys((True, False), 0)
    first, second = choose_patients(found, (), 1)[0].name, few_patient(project)
    for patient in choose_patients(found, (first, second), 2):
        of_patient = found.of_row(patient.index[0])
        facts = PatientRows(of_patient, patient.index, of_patient.scorer.training)
        for place, reasons in enumerate(find_reasons(facts, range(min(patient.num_first, 4)))):
            name = patient.names[place]
            for reason in reasons:
                if reason.cause not in columns:
                    continue
                changed = made_ordinary(table, patient.name, name, columns[reason.cause])
                scores = ensemble.score(changed, embeddings=embeddings, num_threads=1, **flags)
                without = scores[changed[schema.ID].to_list().index(name)]
                assert without == pytest.approx(reason.score_without, abs=1e-9)
                checked[patient.name == few_patient(project)] += 1
    assert min(checked.values()) > 0


NUMBERS = {*schema.NUMERIC} - {"age_approx"}


def made_ordinary(
    table: pl.DataFrame, patient: str, name: str, columns: tuple[str, ...]
) -> pl.DataFrame:
    """Return the table with the medians of the patient's other lesions in a lesion's columns."""
    is_it = pl.col(schema.ID) == name
    others = table.filter(pl.col(schema.PATIENT) == patient, ~is_it)
    return table.with_columns(
        pl.when(is_it).then(others[column].median()).otherwise(column).alias(column)
        for column in columns
    )


def test_a_page_names_the_members_that_alone_score_a_patient(project: Path, tmp_path: Path) -> None:
    few = few_patient(project)
    words = "so few, the scores are by raw alone"
    usual = write_pages(project, tmp_path / "u.html")
    assert not any(words in page for page in usual.values())
    assert "Only 3 lesions" in usual[few]
    pages = write_pages(project, tmp_path / "t.html", few="raw")
    assert [name for name, page in pages.items() if words in page] == [few]
    assert "Only 3 lesions" not in pages[few]
    assert "calibrated probability <" not in pages[few]
    assert 'class="why"' in pages[few]


def test_pages_and_manifest_say_how_the_scores_were_made(project: Path, tmp_path: Path) -> None:
    usual = "".join(write_pages(project, tmp_path / "u.html", max_patients=1).values())
    (page,) = write_pages(
        project, tmp_path / "t.html", max_patients=1, rows="all", prevalence=0.01
    ).values()
    for text in ("fitted on every training row", "if 1.0\N{NO-BREAK SPACE}% of the lesions"):
        assert text in page
        assert text in (tmp_path / "t.html").read_text()
        assert text not in usual
    manifest = read_json(tmp_path / "t.html.json")
    assert [manifest[name] for name in ("rows", "few", "prevalence")] == ["all", "warn", 0.01]


@pytest.mark.parametrize("flag", ["--rows all", "--few raw", "--few refuse", "--prevalence 0.01"])
def test_out_of_fold_scores_take_none_of_them(
    project: Path, tmp_path: Path, cli: Cli, flag: str
) -> None:
    where = ("--data", project / "data", "--ensemble", project / "blend")
    output = ("--out", tmp_path / "t.html")
    ended = cli("infer", "triage", *where, *output, "--split", "train", *flag.split())
    assert ended.code == 2
    assert f"{flag.split(maxsplit=1)[0]} is for scores of new rows" in ended.err
    assert ended.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_the_ensemble_lacks_is_refused_as_by_predict(project: Path, tmp_path: Path) -> None:
    data = project / "data"
    root = fit_small(data, tmp_path / "e", features="engineered", num_rounds=2)
    cases = {
        "has no boosters on all rows; fit it again with --refit true": {"rows": "all"},
        "--prevalence is for probabilities": {"prevalence": 0.01},
        "--few raw needs a blend": {"few": "raw"},
        "add their other lesions": {"few": "refuse"},
    }
    for message, flags in cases.items():
        with pytest.raises(UserError, match=message):
            write_pages(
                project, tmp_path / "t.html", **{"ensemble": root, "embeddings": (), **flags}
            )
    with pytest.raises(UserError, match="holds embeddings by the network of all rows"):
        write_pages(project, tmp_path / "t.html", embeddings=project / "embeddings" / "tiny_all")
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


def test_lesions_are_drawn_by_a_network_that_scores_do_not_need(
    project: Path, tmp_path: Path
) -> None:
    pages = write_pages(project, tmp_path / "t.html", ensemble=project / "raw", max_patients=1)
    assert "How the lesions look to the network" in "".join(pages.values())


@pytest.mark.slow
def test_maps_are_by_the_networks_behind_the_scores(
    exported_all: Path,
    embedded: Path,
    embedded_all: Path,
    synth_dataset: Path,
    tmp_path: Path,
) -> None:
    shared: dict[str, Any] = {"embeddings": embedded, "refit": True, "num_rounds": 5}
    root = fit_small(synth_dataset, tmp_path / "e", features="raw,image", **shared)
    where = {"data": synth_dataset, "ensemble": root, "max_patients": 1, "maps": exported_all}
    words = "occlusion map of lesion 1"
    of_folds, of_all = (
        write_pages(tmp_path, tmp_path / f"{rows}.html", rows=rows, embeddings=run, **where)
        for rows, run in (("folds", embedded), ("all", embedded_all))
    )
    assert all(words in page for page in (*of_folds.values(), *of_all.values()))
    (exported_all / "fold_all").rename(tmp_path / "fold_all")
    try:
        with pytest.raises(UserError, match="has no fold_all with an exported model"):
            write_pages(tmp_path, tmp_path / "t.html", rows="all", embeddings=embedded_all, **where)
    finally:
        (tmp_path / "fold_all").rename(exported_all / "fold_all")


def test_a_patient_whose_scores_need_no_network_has_no_maps(project: Path) -> None:
    found = rows_of(project, few="raw")
    uses = [found.of_row(row).uses_network("tiny") for row in range(len(found.score))]
    np.testing.assert_array_equal(uses, found.metadata[schema.PATIENT] != few_patient(project))
