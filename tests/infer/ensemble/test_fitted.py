"""Scores from Python: those of `infer predict`, its warnings, and its refusals."""

from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest

from infer import EmbeddedImages, FoldOutputs, ResultWarning, UserError, load_ensemble
from infer.ensemble.blends.write import write_blend
from infer.ensemble.settings import BlendSettings
from isic.dataset import Dataset
from isic.layout import ALL
from tests.support.ensembles import (
    fit_small,
    outputs_of,
    predict_table,
    read_test_text,
    write_embeddings,
)

pytestmark = pytest.mark.filterwarnings("ignore::infer.ResultWarning")


@pytest.fixture
def metadata(project: Path) -> pl.DataFrame:
    return pl.read_csv(project / "data" / "test-metadata.csv")


@pytest.fixture
def embedded(project: Path, metadata: pl.DataFrame) -> dict[str, EmbeddedImages]:
    return {"tiny": outputs_of(project / "embeddings" / "tiny", metadata["isic_id"])}


@pytest.mark.parametrize("name", ["engineered", "image_tiny", "multimodal_tiny", "raw+image_tiny"])
def test_scores_are_those_of_predict_in_the_given_order(
    project: Path, metadata: pl.DataFrame, embedded: dict[str, EmbeddedImages], name: str
) -> None:
    expected = predict_table(project, name)
    ensemble = load_ensemble(project / "ensemble" / name)
    uses_images = name != "engineered"
    assert ensemble.embeddings == (["tiny"] if uses_images else [])
    given = embedded if uses_images else {}
    np.testing.assert_array_equal(ensemble.score(metadata, embeddings=given), expected["target"])
    order = np.random.default_rng(0).permutation(len(metadata))
    shuffled = metadata[order]
    root = project / "embeddings" / "tiny"
    other = {"tiny": outputs_of(root, shuffled["isic_id"])} if uses_images else {}
    found = ensemble.score(shuffled, embeddings=other)
    np.testing.assert_array_equal(found, expected["target"].to_numpy()[order])
    from_files = ensemble.score(shuffled, embeddings={"tiny": root} if uses_images else None)
    np.testing.assert_array_equal(from_files, found)


def test_a_blend_and_its_choices_for_few_lesions(
    project: Path, metadata: pl.DataFrame, embedded: dict[str, EmbeddedImages], tmp_path: Path
) -> None:
    members = tuple(project / "ensemble" / name for name in ("raw", "multimodal_tiny"))
    settings = {"ensembles": members, "data": project / "data", "output_dir": tmp_path}
    blend = load_ensemble(write_blend(BlendSettings.model_validate(settings)))
    where = {"ensemble": tmp_path / "blend", "embeddings": project / "embeddings" / "tiny"}
    for few in ("warn", "raw"):
        expected = predict_table(project, few=few, **where)["target"]
        scores = blend.score(metadata, embeddings=embedded, few=few)
        np.testing.assert_array_equal(scores, expected)


def test_pandas_and_texts_score_the_same(project: Path, metadata: pl.DataFrame) -> None:
    ensemble = load_ensemble(project / "ensemble" / "engineered")
    changed = metadata.with_columns(
        age_approx=pl.when(pl.int_range(pl.len()) != 1).then(pl.col("age_approx")),
        sex=pl.when(pl.int_range(pl.len()) != 2).then(pl.col("sex")),
    )
    expected = ensemble.score(changed)
    frame = pd.DataFrame(changed.to_dict(as_series=False))
    np.testing.assert_array_equal(ensemble.score(frame), expected)
    frame["sex"] = frame["sex"].astype("category")
    frame["attribution"] = frame["attribution"].astype("string")
    frame["age_approx"] = frame["age_approx"].astype("Int64")
    np.testing.assert_array_equal(ensemble.score(frame), expected)
    with pytest.raises(UserError, match="two columns called sex"):
        ensemble.score(pd.concat([frame, frame[["sex"]]], axis=1))
    as_text = read_test_text(project / "data")
    np.testing.assert_array_equal(ensemble.score(as_text), ensemble.score(metadata))


def test_doubts_are_python_warnings_at_the_callers_line(
    project: Path, metadata: pl.DataFrame, capfd: pytest.CaptureFixture[str]
) -> None:
    ensemble = load_ensemble(project / "ensemble" / "engineered")
    with pytest.warns(ResultWarning) as caught:
        ensemble.score(metadata[:1])
    messages = [str(warning.message) for warning in caught]
    assert any("1 of the 1 patients have fewer than" in message for message in messages)
    assert any('"An institution never seen" (1 rows)' in message for message in messages)
    assert {warning.filename for warning in caught} == {__file__}
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    with pytest.raises(UserError, match="have fewer than"):
        ensemble.score(metadata[:1], few="refuse")


def test_other_tables_and_networks_are_refused(
    project: Path, metadata: pl.DataFrame, embedded: dict[str, EmbeddedImages], tmp_path: Path
) -> None:
    ensemble = load_ensemble(project / "ensemble" / "multimodal_tiny")
    assert "tbp_lv_H" in ensemble.needed_columns
    cases: list[tuple[pl.DataFrame, dict[str, object], str]] = [
        (metadata.drop("tbp_lv_H"), embedded, "the metadata lacks the column tbp_lv_H"),
        (metadata.drop("isic_id"), embedded, "the metadata lacks the column isic_id"),
        (metadata[:0], {}, "the metadata has no rows"),
        (pl.concat([metadata, metadata[:1]]), embedded, "1 duplicate isic_id"),
        (metadata[:3], embedded, "tiny has the outputs of 30 images for 3 rows"),
        (metadata, {}, "give --embeddings outputs/embeddings/tiny"),
        (metadata, {"huge": embedded["tiny"]}, "is by the network tiny, not huge"),
        (metadata, {"tiny": tmp_path}, "has no finished test embeddings"),
    ]
    for table, given, message in cases:
        with pytest.raises(UserError, match=message):
            ensemble.score(table, embeddings=given)  # type: ignore[arg-type]
    changed = dict(embedded["tiny"].origin) | {"checkpoints": {"0": "x"}}
    other = EmbeddedImages(embedded["tiny"].by_fold, {}, changed)
    with pytest.raises(UserError, match="the test embeddings in the embeddings of tiny were made"):
        ensemble.score(metadata, embeddings={"tiny": other})
    with pytest.raises(UserError, match="by network"):
        ensemble.score(metadata, embeddings=[embedded["tiny"]])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="a table is a polars or pandas DataFrame, not a list"):
        ensemble.score([])  # type: ignore[arg-type]
    with pytest.raises(UserError, match='few is "never"'):
        ensemble.score(metadata, few="never")  # type: ignore[arg-type]
    with pytest.raises(UserError, match='rows is "some"'):
        ensemble.score(metadata, rows="some")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="holds no finished ensemble"):
        load_ensemble(tmp_path)


def test_an_image_that_failed_is_scored_without_its_score(
    project: Path, metadata: pl.DataFrame, embedded: dict[str, EmbeddedImages]
) -> None:
    ensemble = load_ensemble(project / "ensemble" / "raw+image_tiny")
    whole = embedded["tiny"]
    by_fold = {}
    for fold, outputs in whole.by_fold.items():
        logits = outputs.logits.copy()
        logits[4] = np.nan
        by_fold[fold] = FoldOutputs(outputs.features, logits)
    some = EmbeddedImages(by_fold, {4: "truncated JPEG"}, whole.origin)
    scores = ensemble.score(metadata, embeddings={"tiny": some})
    before = ensemble.score(metadata, embeddings=embedded)
    assert np.isfinite(scores).all()
    assert scores[4] != before[4]


def test_tables_of_own_columns(project: Path, metadata: pl.DataFrame, tmp_path: Path) -> None:
    data = project / "data"
    train = Dataset(data).metadata("train").select("isic_id")
    values = {"distance": pl.int_range(pl.len()) % 7, "group": pl.lit("a")}
    train.with_columns(**values).write_csv(tmp_path / "mine.csv")
    own = metadata.select("isic_id").with_columns(**values)
    (tmp_path / "test").mkdir()
    own.write_csv(tmp_path / "test" / "mine.csv")
    table = f"label_free:{tmp_path / 'mine.csv'}"
    fit_small(data, tmp_path / "ensemble", features="raw,mine", tables=table, num_rounds=5)
    ensemble = load_ensemble(tmp_path / "ensemble")
    assert ensemble.tables == ["mine"]
    expected = predict_table(
        project,
        ensemble=tmp_path / "ensemble",
        embeddings=(),
        tables=(str(tmp_path / "test" / "mine.csv"),),
        output=tmp_path / "s.csv",
    )
    found = ensemble.score(metadata, tables={"mine": own})
    np.testing.assert_array_equal(found, expected["target"])
    with pytest.raises(UserError, match='was fitted with the table "mine"'):
        ensemble.score(metadata)
    with pytest.raises(
        UserError, match="no table yours is needed to score; the tables that are: mine"
    ):
        ensemble.score(metadata, tables={"mine": own, "yours": own})
    with pytest.raises(UserError, match="mine lacks 1 of the 30 rows"):
        ensemble.score(metadata, tables={"mine": own[1:]})


def test_the_models_of_all_rows(project: Path, metadata: pl.DataFrame, tmp_path: Path) -> None:
    data = project / "data"
    root = write_embeddings(tmp_path / "tiny", data, seed=4)
    fit_small(
        data, tmp_path / "e", features="multimodal", embeddings=root, refit=True, num_rounds=5
    )
    ensemble = load_ensemble(tmp_path / "e")
    whole = outputs_of(root, metadata["isic_id"])
    by_all = {"folds": [ALL], "checkpoints": {"all": "z"}}
    one = EmbeddedImages({ALL: whole.by_fold[0]}, {}, dict(whole.origin) | by_all)
    scores = ensemble.score(metadata, embeddings={"tiny": one}, rows="all")
    assert scores.shape == (30,)
    with pytest.raises(UserError, match="holds embeddings by the network of all rows"):
        ensemble.score(metadata, embeddings={"tiny": one})
    with pytest.raises(UserError, match="--rows all needs embeddings by the network of all rows"):
        ensemble.score(metadata, embeddings={"tiny": whole}, rows="all")
