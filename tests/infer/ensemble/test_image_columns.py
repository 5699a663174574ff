"""Embeddings as columns: fold models are aligned, labels do not leak, bad input is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from infer.embedding.store import shard_path, write_shard
from infer.ensemble.image_columns import (
    ALIGNED,
    EMBEDDING_MODES,
    AffineMap,
    fit_affine_maps,
    mapped_columns,
    procrustes,
    read_affine_maps,
    write_affine_maps,
)
from infer.ensemble.predict import PredictSettings, predict_submission
from isic import schema
from isic.dataset import Dataset
from isic.folds import Folds, draw_folds, read_folds
from isic.metrics import pauc, roc_auc
from isic.provenance import seen_rows, write_seen
from isic.runtime.errors import UserError
from isic.runtime.files import write_json
from tests.support.ensembles import (
    ENGINES,
    NUM_FOLDS,
    fit_small,
    read_test_text,
    train_table,
    write_seen_lists,
)

WIDTH = 12


REMEMBERED = 6.0
"""How strongly an overfitted model writes the label of an image that it was trained on into the image's embedding."""


def spaces(width: int) -> list[np.ndarray]:
    """Orthogonal matrices, one a fold model."""
    rng = np.random.default_rng(6)
    return [np.linalg.qr(rng.standard_normal((width, width)))[0] for _ in range(NUM_FOLDS)]


def write_full_run(
    root: Path, split: str, plan: Folds, engines: dict[str, str] = ENGINES, width: int = WIDTH
) -> None:
    run = {
        "config": root.name,
        "folds": [int(k) for k in engines],
        "folds_digest": plan.digest,
        "engines": engines,
    }
    run |= {"checkpoints": engines, "tta": "none", "preprocess": {"size": 8}}
    write_json(root / split / "run.json", {**run, "folds_mode": "all", "num_features": width})


def write_fold_embeddings(
    root: Path, data: Path, plan: Folds, strength: float, remembered: float, width: int = WIDTH
) -> Path:
    """Writes what fold models say of every image: the same of each, in a space of their own, less noise.

    Args:
        strength: how far a malignant lesion looks malignant.
        remembered: how far a model knows the label of an image that it was trained on.
    """
    rng = np.random.default_rng(5)
    plan.write(root / "folds.parquet")
    for split in ("train", "test"):
        table = Dataset(data).metadata("train" if split == "train" else "test")
        target = table[schema.TARGET].to_numpy() if split == "train" else np.zeros(len(table))
        fold = plan.of(table).to_numpy() if split == "train" else np.full(len(table), -1)
        looks = rng.standard_normal((len(table), width)) * np.linspace(3, 1, width)
        looks[:, 0] += strength * target
        for k, turn in enumerate(spaces(width)):
            seen = (fold != k) & (fold >= 0)
            own = looks + 0.1 * rng.standard_normal(looks.shape)
            own[:, 1] += remembered * target * seen
            features = (own @ turn + k).astype(np.float32)
            write_shard(
                shard_path(root, split, k, 0),
                table[schema.ID].to_list(),
                features,
                own[:, 0].astype(np.float32),
            )
        write_full_run(root, split, plan, width=width)
    write_seen_lists(root, train_table(data), plan)
    return root


def seen_list(root: Path, fold: int = 1) -> Path:
    return root / "train" / f"fold_{fold}" / "trained_on.parquet"


@pytest.fixture(scope="module")
def plan(data: Path) -> Folds:
    return draw_folds(train_table(data), NUM_FOLDS, 42)


@pytest.fixture(scope="module")
def run(data: Path, plan: Folds) -> Path:
    return write_fold_embeddings(data.parent / "tiny", data, plan, strength=4.0, remembered=0.0)


@pytest.fixture(scope="module")
def frozen(data: Path, run: Path) -> Path:
    """A run of a model that was trained on other images."""
    root = data.parent / "elsewhere"
    shutil.copytree(run, root)
    other = Folds(pl.DataFrame({"isic_id": ["ISIC_9"], "fold": pl.Series([0], dtype=pl.Int8)}))
    other.write(root / "folds.parquet")
    write_seen(seen_list(root), seen_rows(other.table))
    for split in ("train", "test"):
        write_full_run(root, split, other, {"1": "b"})
    return root


def auc(root: Path) -> float:
    return float(json.loads((root / "scores.json").read_text())["blend"]["auc"])


def test_an_image_gets_the_same_columns_from_every_model(
    data: Path, run: Path, plan: Folds
) -> None:
    metadata = train_table(data)
    maps = fit_affine_maps(run, metadata, plan)
    by_fold = [
        mapped_columns(run, "train", ALIGNED, metadata, maps, pl.Series([k] * len(metadata)))
        .drop("isic_id")
        .to_numpy()
        for k in range(NUM_FOLDS)
    ]
    assert by_fold[0].shape == (len(metadata), WIDTH)
    assert by_fold[0].dtype == np.float32
    for other in by_fold[1:]:
        assert np.abs(other - by_fold[0]).mean() < 0.2 * by_fold[0].std()


def test_a_test_row_has_the_mean_over_the_models(
    data: Path, run: Path, plan: Folds, tmp_path: Path
) -> None:
    maps = fit_affine_maps(run, train_table(data), plan)
    write_affine_maps(tmp_path / "maps.parquet", maps)
    again = read_affine_maps(tmp_path / "maps.parquet")
    test = Dataset(data).metadata("test")
    found = mapped_columns(run, "test", ALIGNED, test, again, None)
    assert found["isic_id"].to_list() == test["isic_id"].to_list()
    one = [
        maps[k].apply(pl.read_parquet(shard_path(run, "test", k, 0))["features"].to_numpy())
        for k in maps
    ]
    np.testing.assert_allclose(
        found.drop("isic_id").to_numpy(), np.mean(one, axis=0), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("mode", EMBEDDING_MODES)
def test_what_the_images_show_is_found_and_predicted(
    data: Path, run: Path, frozen: Path, mode: str, tmp_path: Path
) -> None:
    fit_small(data, tmp_path, features=f"raw,{mode}", embeddings=run, frozen=frozen, name="with")
    fit_small(data, tmp_path, features="raw", name="without", embeddings=run)
    assert auc(tmp_path / "with") > auc(tmp_path / "without") + 0.02
    where = {"ensemble": tmp_path / "with", "embeddings": run, "frozen": frozen}
    predict_submission(PredictSettings(data=data, output=tmp_path / "all.csv", **where))
    (tmp_path / "one").mkdir()
    test = read_test_text(data)
    alone = test.filter(patient_id=test["patient_id"][3])[:1]
    alone.write_csv(tmp_path / "one" / "test-metadata.csv")
    predict_submission(PredictSettings(data=tmp_path / "one", output=tmp_path / "one.csv", **where))
    one, every = (pl.read_csv(tmp_path / name) for name in ("one.csv", "all.csv"))
    assert one.rows() == every.filter(isic_id=alone["isic_id"][0]).rows()


def test_two_fits_give_the_same_bytes(data: Path, run: Path, tmp_path: Path) -> None:
    for name in "ab":
        fit_small(data, tmp_path / name, features="raw,aligned", embeddings=run, name="same")
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "same").iterdir()}
        for name in "ab"
    )
    assert first == second
    assert "maps_aligned.parquet" in first


def shuffle_labels(data: Path, root: Path, seed: int = 1) -> pl.DataFrame:
    """Writes the dataset with its labels in another order and returns the training table."""
    table = train_table(data)
    shuffled = table.with_columns(
        table["target"].sample(fraction=1, shuffle=True, seed=seed).alias("target")
    )
    root.mkdir()
    shuffled.write_csv(root / "train-metadata.csv")
    shutil.copy(data / "test-metadata.csv", root)
    return shuffled


@pytest.mark.parametrize("mode", [*EMBEDDING_MODES, "image"])
def test_shuffled_labels_give_chance(data: Path, mode: str, tmp_path: Path) -> None:
    """Embeddings that show nothing of the label, but for those of images that the model was trained on."""
    shuffled = shuffle_labels(data, tmp_path / "data")
    plan = draw_folds(shuffled, NUM_FOLDS, 42)
    run = write_fold_embeddings(
        tmp_path / "blind", tmp_path / "data", plan, 0.0, 0.0 if mode == "frozen" else REMEMBERED
    )
    elsewhere: dict[str, object] = {"embeddings": run}
    if mode == "frozen":
        write_seen(seen_list(run, 0), seen_rows(pl.DataFrame({"isic_id": ["other"]})))
        elsewhere = {"frozen": run}
    features = "raw,image" if mode == "image" else mode
    fit_small(tmp_path / "data", tmp_path, features=features, name="shuffled", seeds=3, **elsewhere)
    blend = pl.read_parquet(tmp_path / "shuffled" / "oof.parquet")
    assert pauc(blend["target"], blend["blend"]) < 0.06  # 0.02 is chance, 0.2 perfect
    assert 0.4 < auc(tmp_path / "shuffled") < 0.6


def test_a_map_fitted_on_held_out_images_would_leak_and_ours_does_not(
    data: Path, tmp_path: Path
) -> None:
    """Looks along the one direction in which models remember labels, at rows whose own model has not seen theirs."""
    width, found = 100, {"ours": [], "leaky": []}
    for seed in range(6):
        table = shuffle_labels(data, tmp_path / f"data{seed}", seed)
        plan = draw_folds(table, NUM_FOLDS, 42)
        run = write_fold_embeddings(
            tmp_path / f"run{seed}", tmp_path / f"data{seed}", plan, 0.0, REMEMBERED, width
        )
        maps = fit_affine_maps(run, table, plan)
        parts = [
            pl.read_parquet(shard_path(run, "train", k, 0))["features"].to_numpy()
            for k in range(NUM_FOLDS)
        ]
        centred = [part - part.mean(axis=0) for part in parts]
        leaky = {
            k: AffineMap(procrustes(centred[k], centred[0]), np.zeros(width))
            for k in range(NUM_FOLDS)
        }
        for name, used in (("ours", maps), ("leaky", leaky)):
            columns = (
                mapped_columns(run, "train", "aligned", table, used, plan.of(table))
                .drop("isic_id")
                .to_numpy()
            )
            of_fold = [plan.of(table).to_numpy() == k for k in (1, 2)]
            memory = columns @ spaces(width)[0][1]
            found[name].append(
                np.mean(
                    [roc_auc(table["target"].to_numpy()[rows], memory[rows]) for rows in of_fold]
                )
            )
    assert abs(np.mean(found["ours"]) - 0.5) < 0.025
    assert np.mean(found["leaky"]) > np.mean(found["ours"]) + 0.02


def test_embeddings_of_held_out_images_alone_are_refused(
    data: Path, run: Path, plan: Folds, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(run, tmp_path / "tiny"))
    write_json(
        root / "train" / "run.json",
        json.loads((root / "train" / "run.json").read_text()) | {"folds_mode": "oof"},
    )
    with pytest.raises(
        UserError, match="aligned needs every training image embedded by every fold model"
    ):
        fit_small(data, tmp_path, features="aligned", embeddings=root)


def test_too_few_images_for_the_features_are_refused(
    data: Path, plan: Folds, tmp_path: Path
) -> None:
    wide = write_fold_embeddings(tmp_path / "wide", data, plan, 0.0, 0.0, width=200)
    with pytest.raises(UserError, match=r"1\d\d shared images are too few to align 200 features"):
        fit_small(data, tmp_path, features="aligned", embeddings=wide)


def test_missing_and_broken_embeddings_are_refused(data: Path, run: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(run, tmp_path / "tiny"))
    path = shard_path(root, "train", 2, 0)
    part = pl.read_parquet(path)
    part[3:].write_parquet(path)
    with pytest.raises(
        UserError, match=r"lacks the train embeddings of \d+ of \d+ images, .* for fold 2"
    ):
        fit_small(data, tmp_path, features="aligned", embeddings=root)
    bad = np.full((len(part), WIDTH), np.nan, np.float32)
    write_shard(path, part["isic_id"].to_list(), bad, part["logit"].to_numpy())
    with pytest.raises(UserError, match="embeddings are not finite"):
        fit_small(data, tmp_path, features="aligned", embeddings=root)


def test_an_image_that_could_not_be_read_has_blank_columns(
    data: Path, run: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(run, tmp_path / "tiny"))
    name = Dataset(data).metadata("test")["isic_id"][2]
    for k in range(NUM_FOLDS):
        path = shard_path(root, "test", k, 0)
        pl.read_parquet(path).filter(pl.col("isic_id") != name).write_parquet(path)
    skipped = pl.DataFrame({"isic_id": [name], "reason": ["truncated JPEG"]})
    skipped.write_parquet(root / "test" / "errors.parquet")
    fit_small(
        data, tmp_path, features="multimodal,aligned", embeddings=root, num_rounds=4, name="m"
    )
    predict_submission(
        PredictSettings(
            data=data, ensemble=tmp_path / "m", embeddings=root, output=tmp_path / "s.csv"
        )
    )
    assert pl.read_csv(tmp_path / "s.csv")["target"].null_count() == 0


def test_a_backbone_that_has_seen_the_labels_is_not_frozen(
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
    lesions = (metadata["patient_id"] == patient).sum()
    only_the_patient = pl.DataFrame({"isic_id": ["ISIC_9"], "patient_id": [patient]})
    write_seen(seen_list(root), seen_rows(only_the_patient))
    with pytest.raises(UserError, match=f"learned from {lesions} of the 400 held-out rows"):
        fit_small(data, tmp_path, features="frozen", frozen=root)


@pytest.mark.parametrize("features", ["image", "raw,aligned"])
def test_scores_of_a_model_that_met_the_rows_are_not_out_of_fold(
    data: Path, run: Path, tmp_path: Path, features: str
) -> None:
    """The plan holds the rows out, but the weights that the model started from had met one patient."""
    root = Path(shutil.copytree(run, tmp_path / "leaking"))
    metadata, plan = train_table(data), read_folds(root / "folds.parquet")
    fold = plan.of(metadata)
    patient = metadata.filter(fold == 2)["patient_id"][0]
    inherited = metadata.filter(pl.col("patient_id") == patient).head(1)
    write_seen(seen_list(root, 2), seen_rows(metadata.filter(fold != 2), seen_rows(inherited)))
    with pytest.raises(UserError, match=r"the model of fold 2 behind .* learned from"):
        fit_small(data, tmp_path, features=features, embeddings=root)


def test_the_frozen_model_must_be_the_same_one(data: Path, frozen: Path, tmp_path: Path) -> None:
    fit_small(data, tmp_path, features="raw,frozen", frozen=frozen, num_rounds=2, name="f")
    root = Path(shutil.copytree(frozen, tmp_path / "elsewhere"))
    said = json.loads((root / "test" / "run.json").read_text())
    write_json(root / "test" / "run.json", said | {"checkpoints": {"1": "another"}})
    with pytest.raises(UserError, match="were made with other trained weights"):
        predict_submission(
            PredictSettings(
                data=data, ensemble=tmp_path / "f", frozen=root, output=tmp_path / "s.csv"
            )
        )
    with pytest.raises(UserError, match="give --frozen outputs/embeddings/elsewhere"):
        predict_submission(
            PredictSettings(data=data, ensemble=tmp_path / "f", output=tmp_path / "s.csv")
        )
