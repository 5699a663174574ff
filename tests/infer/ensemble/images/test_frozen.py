"""Embeddings of networks trained on other images: components, distances, leaks and refusals."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sklearn.decomposition import PCA as SklearnPCA

from infer.embedding.store import shard_path
from infer.ensemble.artifact import open_ensemble
from infer.ensemble.images import distances, features
from infer.ensemble.images.columns import AffineMap
from infer.ensemble.images.features import ImageState, fit_images, read_image_rows
from infer.ensemble.images.frozen import FrozenModel
from infer.ensemble.predict import predict_submission
from infer.ensemble.settings import EmbeddingSources, PredictSettings
from isic import schema
from isic.folds import draw_folds
from isic.layout import Fold
from isic.provenance import seen_rows, write_seen
from isic.runtime.errors import UserError
from isic.runtime.files import write_json
from tests.support.ensembles import (
    NUM_FOLDS,
    fit_small,
    read_blend,
    read_test_text,
    shuffle_targets,
    train_table,
)
from tests.support.fold_embeddings import seen_list, write_fold_embeddings

FORMS = ("frozen_pca", "frozen_distances")


def columns_of(frozen: Path, metadata: pl.DataFrame, form: str) -> pl.DataFrame:
    _, rows = fit_images((form,), (), (frozen,), metadata)
    (columns,) = rows.tables()
    return columns


def embeddings_of(frozen: Path, metadata: pl.DataFrame, fold: Fold = 1) -> np.ndarray:
    stored = pl.read_parquet(shard_path(frozen, "train", fold, 0))
    rows = metadata.select("isic_id").join(stored, on="isic_id", maintain_order="left", how="left")
    return rows["features"].to_numpy()


def without_image(frozen: Path, root: Path, name: str) -> Path:
    """Copy a run, without the embedding of an image that could not be read."""
    shutil.copytree(frozen, root)
    path = shard_path(root, "train", 1, 0)
    pl.read_parquet(path).filter(pl.col("isic_id") != name).write_parquet(path)
    skipped = pl.DataFrame({"isic_id": [name], "reason": ["truncated JPEG"]})
    skipped.write_parquet(root / "train" / "errors.parquet")
    return root


def test_components_are_scikit_learns_and_have_a_sign(data: Path, frozen: Path) -> None:
    metadata = train_table(data)
    found = columns_of(frozen, metadata, "frozen_pca")
    assert found.columns[:2] == ["frozen_pca_000.elsewhere", "frozen_pca_001.elsewhere"]
    assert set(found.dtypes) == {pl.Float32}
    embeddings = embeddings_of(frozen, metadata).astype(np.float64)
    theirs = SklearnPCA(whiten=True).fit_transform(embeddings)
    np.testing.assert_allclose(np.abs(found.to_numpy()), np.abs(theirs), rtol=2e-3, atol=2e-3)
    state, _ = fit_images(("frozen_pca",), (), (frozen,), metadata)
    matrix = state.frozen["elsewhere"].components.matrix
    assert (matrix[np.abs(matrix).argmax(axis=0), np.arange(matrix.shape[1])] > 0).all()


def test_only_so_many_components_and_a_sample_of_the_rows(
    data: Path, frozen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = train_table(data).sort("isic_id")
    every = columns_of(frozen, metadata, "frozen_pca")
    monkeypatch.setattr("infer.ensemble.images.frozen.NUM_COMPONENTS", 3)
    found = columns_of(frozen, metadata, "frozen_pca").to_numpy()
    np.testing.assert_allclose(found, every.to_numpy()[:, :3], atol=1e-5)
    half, _ = fit_images(("frozen_pca",), (), (frozen,), metadata[::2])
    monkeypatch.setattr("infer.ensemble.images.columns.MAX_ANCHORS", 200)
    sampled, rows = fit_images(("frozen_pca",), (), (frozen,), metadata)
    assert len(rows.tables()[0]) == len(metadata)
    matrices = [state.frozen["elsewhere"].components.matrix for state in (sampled, half)]
    np.testing.assert_array_equal(*matrices)


@pytest.mark.parametrize("form", FORMS)
def test_neither_order_nor_labels_nor_blocks_change_a_bit(
    data: Path, frozen: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = train_table(data)
    expected = columns_of(frozen, metadata, form)
    assert columns_of(frozen, metadata.drop(schema.TARGET), form).equals(expected)
    order = np.random.default_rng(0).permutation(len(metadata))
    monkeypatch.setattr("infer.ensemble.images.columns.READ_ROWS", 77)
    monkeypatch.setattr("infer.ensemble.images.columns.MAX_MAPPED_ROWS", 13)
    monkeypatch.setattr("infer.ensemble.images.distances.BLOCK", 20)
    assert columns_of(frozen, metadata[order], form).equals(expected[order])


@pytest.mark.parametrize("form", FORMS)
def test_the_same_rows_have_the_same_columns_when_they_are_scored(
    data: Path, frozen: Path, form: str, tmp_path: Path
) -> None:
    metadata = train_table(data)
    state, fitted = fit_images((form,), (), (frozen,), metadata)
    assert state.write(tmp_path) == ["maps_frozen_pca_elsewhere.parquet"]
    value = json.loads(json.dumps(state.to_json()))
    again = ImageState.read(tmp_path, value)
    assert again.names == state.names == tuple(fitted.tables()[0].columns)
    rows = read_image_rows(again, EmbeddingSources(frozen=(frozen,)), "train", metadata)
    for ours, theirs in zip(rows.tables(), fitted.tables(), strict=True):
        assert ours.equals(theirs)


def test_the_state_of_an_earlier_version_has_no_components(data: Path, frozen: Path) -> None:
    state, _ = fit_images(("frozen",), (), (frozen,), train_table(data))
    value = state.to_json()["frozen"]["elsewhere"]
    del value["components"]
    assert FrozenModel.read(frozen, value) == state.frozen["elsewhere"]


def test_distances_are_those_between_the_lesions_of_a_patient(data: Path, frozen: Path) -> None:
    metadata = train_table(data)
    points = columns_of(frozen, metadata, "frozen_pca").to_numpy().astype(np.float64)
    found = columns_of(frozen, metadata, "frozen_distances")
    assert found.columns == [
        f"frozen_distance_{name}.elsewhere"
        for name in ("nearest", "mean", "farthest", "center", "lof")
    ]
    patient = metadata["patient_id"].to_numpy()
    assert len(np.unique(patient)) > 20
    for row in range(0, len(metadata), 7):
        others = points[(patient == patient[row]) & (np.arange(len(patient)) != row)]
        apart = np.linalg.norm(others - points[row], axis=1)
        center = np.linalg.norm(others.mean(axis=0) - points[row])
        expected = [apart.min(), apart.mean(), apart.max(), center]
        np.testing.assert_allclose(found.row(row)[:4], expected, rtol=1e-5)


def test_an_only_lesion_and_an_unreadable_image_have_no_distances(
    data: Path, frozen: Path, tmp_path: Path
) -> None:
    metadata = train_table(data)
    patient = metadata["patient_id"][0]
    of_patient = metadata.filter(patient_id=patient)
    name = of_patient["isic_id"][0]
    others = metadata.filter((pl.col("patient_id") != patient) | pl.col("isic_id").is_in([name]))
    alone = columns_of(frozen, others, "frozen_distances").filter(others["isic_id"] == name)
    assert alone.row(0) == (None,) * 5
    root = without_image(frozen, tmp_path / "elsewhere", name)
    found = columns_of(root, metadata, "frozen_distances")
    assert found.filter(metadata["isic_id"] == name).row(0) == (None,) * 5
    rest = metadata.filter(pl.col("isic_id") != name)
    expected = columns_of(root, rest, "frozen_distances")
    assert found.filter(metadata["isic_id"] != name).equals(expected)
    blank = columns_of(root, metadata, "frozen_pca").filter(metadata["isic_id"] == name)
    assert set(blank.row(0)) == {None}


def test_distances_depend_on_the_patients_of_the_rows(
    data: Path, frozen: Path, tmp_path: Path
) -> None:
    """Thinned patients have other distances; few lesions are warned of, and the table is made."""
    metadata = train_table(data)
    _, rows = fit_images(FORMS, (), (frozen,), metadata)
    single = rows.with_patients(metadata.drop("patient_id"))
    compared, components = single.tables()
    assert compared.null_count().row(0) == (len(metadata),) * 5
    assert components.equals(rows.tables()[1])
    chosen = {"features": "raw,frozen_distances", "frozen": frozen, "num_rounds": 5}
    plain = fit_small(data, tmp_path / "a", **chosen)
    manifest = json.loads((plain / "ensemble.json").read_text())
    assert {"1", "5", "all"} < set(manifest["pauc_by_lesions"])
    thinned = fit_small(data, tmp_path / "b", thin_patients=1.0, **chosen)
    assert read_blend(thinned)["pauc"] != read_blend(plain)["pauc"]
    assert open_ensemble(plain).is_relative
    (tmp_path / "one").mkdir()
    read_test_text(data)[:1].write_csv(tmp_path / "one" / "test-metadata.csv")
    settings = {"data": tmp_path / "one", "ensemble": plain, "output": tmp_path / "s.csv"}
    with pytest.raises(UserError, match="1 of the 1 patients have fewer than"):
        predict_submission(PredictSettings(frozen=frozen, few="refuse", **settings))


def test_components_compare_no_lesions(data: Path, frozen: Path, tmp_path: Path) -> None:
    ensemble = fit_small(data, tmp_path, features="raw,frozen_pca", frozen=frozen, num_rounds=2)
    assert not open_ensemble(ensemble).is_relative


def fit_directions(root: Path, metadata: pl.DataFrame, model: FrozenModel) -> AffineMap:
    """Fit a discriminant, as `fit_components` must not: it reads the labels of all rows."""
    values = embeddings_of(root, metadata, model.fold).astype(np.float64)
    target = metadata[schema.TARGET].to_numpy()
    apart = values[target == 1].mean(axis=0) - values[target == 0].mean(axis=0)
    direction = np.linalg.solve(np.cov(values.T), apart)[:, None]
    return AffineMap(direction, -values.mean(axis=0) @ direction)


def to_benign_ones(metadata: pl.DataFrame) -> Callable[..., np.ndarray]:
    """Return a measure of distances to the patient's benign lesions, which reads their labels."""
    target = metadata.sort("patient_id", "isic_id")[schema.TARGET].to_numpy()

    def measure(points: np.ndarray, patient: np.ndarray) -> np.ndarray:
        found = np.full((len(points), 5), np.nan, np.float32)
        for row, point in enumerate(points):
            benign = points[(patient == patient[row]) & (target == 0)]
            if len(benign):
                found[row] = np.linalg.norm(benign - point, axis=1).min()
        return found

    return measure


@pytest.mark.parametrize("form", FORMS)
def test_forms_that_read_labels_would_leak(
    data: Path, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests of chance fail for components or distances that know the labels."""
    table = shuffle_targets(data, tmp_path / "data")
    folds = draw_folds(table, NUM_FOLDS, 42)
    run = write_fold_embeddings(tmp_path / "blind", tmp_path / "data", folds, 0.0, 0.0, width=100)
    write_seen(seen_list(run, 0), seen_rows(pl.DataFrame({"isic_id": ["other"]})))
    monkeypatch.setattr(features, "fit_components", fit_directions)
    if form == "frozen_distances":
        monkeypatch.undo()
        monkeypatch.setattr(distances, "measure_distances", to_benign_ones(table))
    ensemble = fit_small(tmp_path / "data", tmp_path, features=form, frozen=run)
    assert read_blend(ensemble)["auc"] > 0.7


def test_a_frozen_model_that_has_seen_the_rows_is_refused(
    data: Path, frozen: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(frozen, tmp_path / "knowing"))
    metadata = train_table(data)
    seen_list(root).unlink()
    with pytest.raises(UserError, match=r"trained_on.parquet is missing"):
        fit_small(data, tmp_path, features="frozen", frozen=root)
    write_seen(seen_list(root), seen_rows(metadata))
    with pytest.raises(UserError, match="learned from 400 of the 400 held-out rows or from their"):
        fit_small(data, tmp_path, features="frozen", frozen=root)
    patient = metadata["patient_id"][0]
    num_lesions = (metadata["patient_id"] == patient).sum()
    only_the_patient = pl.DataFrame({"isic_id": ["ISIC_9"], "patient_id": [patient]})
    write_seen(seen_list(root), seen_rows(only_the_patient))
    with pytest.raises(UserError, match=f"learned from {num_lesions} of the 400 held-out rows"):
        fit_small(data, tmp_path, features="frozen", frozen=root)


def test_another_frozen_model_is_refused(data: Path, frozen: Path, tmp_path: Path) -> None:
    ensemble = fit_small(data, tmp_path, features="raw,frozen", frozen=frozen, num_rounds=2)
    root = Path(shutil.copytree(frozen, tmp_path / "elsewhere"))
    path = root / "test" / "run.json"
    write_json(path, json.loads(path.read_text()) | {"checkpoints": {"1": "another"}})
    chosen = {"data": data, "ensemble": ensemble, "output": tmp_path / "s.csv"}
    with pytest.raises(UserError, match="were made with other trained weights"):
        predict_submission(PredictSettings(frozen=root, **chosen))
    with pytest.raises(UserError, match="give --frozen outputs/embeddings/elsewhere"):
        predict_submission(PredictSettings(**chosen))
