"""Columns of networks that words of `--features` leave out, in fits and wherever they score."""

import json
from pathlib import Path

import polars as pl
import pytest

from infer.ensemble.artifact import open_ensemble
from infer.ensemble.blends.write import write_blend
from infer.ensemble.features.spec import FeatureSpec
from infer.ensemble.images.column_words import form_of, refuse_idle_words
from infer.ensemble.images.features import FORMS, FROZEN_SCORE, ImageState, Network
from infer.ensemble.images.frozen import FrozenModel
from infer.ensemble.predict import predict_submission
from infer.ensemble.settings import BlendSettings, PredictSettings
from infer.report.write import write_report
from isic.runtime.errors import UserError
from tests.support.ensembles import fit_small, write_embeddings


@pytest.fixture(scope="module")
def two(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Embeddings of two networks."""
    root = tmp_path_factory.mktemp("networks")
    return [write_embeddings(root / name, data, seed=seed) for seed, name in enumerate(("a", "b"))]


def fit_images_of(data: Path, root: Path, networks: list[Path], words: str) -> Path:
    return fit_small(data, root, features=words, embeddings=networks, num_rounds=5)


def image_columns(ensemble: Path) -> list[str]:
    """Return the columns of networks among those of the boosters, as an ensemble is opened."""
    return [name for name in open_ensemble(ensemble).state.names if "." in name]


def predict(data: Path, ensemble: Path, output: Path, networks: list[Path]) -> pl.Series:
    predict_submission(
        PredictSettings(data=data, ensemble=ensemble, embeddings=networks, output=output)
    )
    return pl.read_csv(output)["target"]


def test_one_column_is_left_out(data: Path, two: list[Path], tmp_path: Path) -> None:
    words = "sex,image,-image_score.a,-image_score_patient_diff.b"
    ensemble = fit_images_of(data, tmp_path, two, words)
    assert image_columns(ensemble) == ["image_score_patient_diff.a", "image_score.b"]
    assert json.loads((ensemble / "ensemble.json").read_text())["features"] == words
    booster = (ensemble / "lightgbm_fold_0_seed_0.txt").read_text()
    assert "feature_names=sex image_score_patient_diff.a image_score.b\n" in booster
    scores = predict(data, ensemble, tmp_path / "s.csv", two)
    every = fit_images_of(data, tmp_path, two, "sex,image")
    assert not scores.equals(predict(data, every, tmp_path / "every.csv", two))


def test_a_column_is_left_out_of_every_network(data: Path, two: list[Path], tmp_path: Path) -> None:
    ensemble = fit_images_of(data, tmp_path, two, "sex,image,image_ranks,-image_score")
    found = image_columns(ensemble)
    assert len(found) == 8
    assert not {"image_score.a", "image_score.b"} & {*found}


def test_names_and_first_parts_leave_out_the_same(
    data: Path, two: list[Path], tmp_path: Path
) -> None:
    by_name = "sex,image,-image_score_patient_diff.a,-image_score_patient_diff.b"
    first, second = (
        fit_images_of(data, tmp_path / str(number), two, words)
        for number, words in enumerate((by_name, "-image_score_patient_diff,sex,image"))
    )
    for name in ("oof.parquet", "lightgbm_fold_0_seed_0.txt", "state.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_scores_alone_compare_no_lesions(data: Path, two: list[Path], tmp_path: Path) -> None:
    words = "sex,image,-image_score_patient_diff"
    ensemble = fit_images_of(data, tmp_path, two, words)
    assert not open_ensemble(ensemble).is_relative
    assert open_ensemble(fit_images_of(data, tmp_path, two, "sex,image")).is_relative
    with pytest.raises(UserError, match="--thin_patients needs features relative to the patient"):
        fit_small(data, tmp_path, features=words, embeddings=two, thin_patients=0.5)


def test_blends_and_reports_know_what_is_left_out(
    data: Path, two: list[Path], tmp_path: Path
) -> None:
    parts = [
        fit_images_of(data, tmp_path, two, "sex,image,-image_score.a"),
        fit_images_of(data, tmp_path, two, "sex,image"),
    ]
    page = write_report(parts[0], data).read_text()
    assert "image_score_patient_diff.a" in page
    settings = BlendSettings(ensembles=parts, output_dir=tmp_path, data=data)
    blended = write_blend(settings)
    assert "image_score.a" not in image_columns(blended / "members" / parts[0].name)
    assert predict(data, blended, tmp_path / "s.csv", two).n_unique() > 1


BAD = (
    ("sex,image,-image_score.c", 'unknown features "image_score.c", did you mean "image_score.'),
    ("sex,image,-image_scor.a", 'unknown features "image_scor.a", did you mean "image_score"'),
    ("sex,-image_score.a", '"-image_score.a" leaves nothing out of sex,-image_score.a'),
    ("sex,image,-frozen_score.a", '"-frozen_score.a" leaves nothing out'),
    ("image,-image_score.a", '"-image_score.a" leaves nothing out .* mean of the networks'),
    ("sex,image_score.a", "image_score.a is not requested by itself; request image, and leave"),
    ("sex,image,-image_score,-image_score_patient_diff", "every column of image; write -image "),
    (
        "sex,image,-image_score.a,-image_score_patient_diff.a",
        "every column of a, which would be read for nothing; remove a from --embeddings, and its",
    ),
)


@pytest.mark.parametrize(("words", "message"), BAD)
def test_bad_words_are_refused(
    data: Path, two: list[Path], tmp_path: Path, words: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        fit_images_of(data, tmp_path / "out", two, words)
    assert not (tmp_path / "out").exists()


def test_a_column_of_an_embedding_can_be_left_out(data: Path, run: Path, tmp_path: Path) -> None:
    ensemble = fit_images_of(data, tmp_path, [run], "sex,aligned,-aligned_000.tiny,-aligned_001")
    assert image_columns(ensemble)[0] == "aligned_002.tiny"
    with pytest.raises(UserError, match='unknown features "aligned_999", did you mean "aligned_0'):
        fit_images_of(data, tmp_path, [run], "sex,aligned,-aligned_999")


def test_every_column_is_a_word(data: Path, run: Path, frozen: Path, tmp_path: Path) -> None:
    words = ",".join(("sex", *FORMS))
    ensemble = fit_small(
        data, tmp_path, features=words, embeddings=run, frozen=frozen, num_rounds=1
    )
    columns = image_columns(ensemble)
    assert {form_of(name) for name in columns} == {*FORMS}
    image = open_ensemble(ensemble).state.image
    for name in columns:
        left = FeatureSpec.parse(f"{words},-{name}").image_names(image)
        assert left == tuple(each for each in columns if each != name)


def test_a_frozen_network_of_the_same_name_is_another_one() -> None:
    networks = {name: Network("digest") for name in ("a", "b")}
    frozen = {"a": FrozenModel("a", 0, {}, 4)}
    state = ImageState(("image", FROZEN_SCORE), networks, frozen)
    left_out = ["image_score.a", "image_score_patient_diff.a"]
    with pytest.raises(UserError, match="remove a from --embeddings"):
        refuse_idle_words("raw,image,frozen_score", left_out, state)
    refuse_idle_words("raw,image,frozen_score", left_out[:1], state)
