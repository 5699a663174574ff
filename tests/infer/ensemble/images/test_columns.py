"""Embeddings as columns: fold models are aligned, labels do not leak, bad input is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from infer import load_ensemble
from infer.embedding.store import shard_path, write_shard
from infer.ensemble.images.columns import (
    ALIGNED,
    AffineMap,
    AffineMaps,
    column_names,
    fit_aligned,
    mapped_columns,
    procrustes,
    read_affine_maps,
    write_affine_maps,
)
from infer.ensemble.images.distances import DISTANCES
from infer.ensemble.images.features import FORMS, FROZEN_FORMS, fit_images
from infer.ensemble.images.frozen import FROZEN, PCA
from infer.ensemble.predict import predict_submission
from infer.ensemble.settings import PredictSettings
from isic.dataset import SPLITS, Dataset, Split
from isic.folds import Folds, draw_folds, read_folds
from isic.metrics import roc_auc
from isic.provenance import seen_rows, write_seen
from isic.runtime.errors import UserError
from isic.runtime.files import write_json
from tests.support.ensembles import (
    NUM_FOLDS,
    fit_small,
    outputs_of,
    read_blend,
    read_files,
    read_test_text,
    shuffle_targets,
    train_table,
)
from tests.support.fold_embeddings import (
    REMEMBERED,
    WIDTH,
    seen_list,
    spaces,
    write_fold_embeddings,
)

EMBEDDED_FROZEN = (FROZEN, PCA, DISTANCES)
"""Forms of the embeddings of a network that was trained on other images."""
NAMES = column_names(ALIGNED, "tiny", WIDTH)


def read_features(run: Path, split: Split, fold: int) -> np.ndarray:
    return pl.read_parquet(shard_path(run, split, fold, 0))["features"].to_numpy()


def columns_of(run: Path, table: pl.DataFrame, fold: int, maps: AffineMaps) -> np.ndarray:
    """Return the columns of some training rows by the model of one fold, [N, D]."""
    names = column_names(ALIGNED, "tiny", len(maps[0].offset))
    return mapped_columns(run, "train", names, table, {fold: maps[fold]}).to_numpy()


def test_an_image_gets_the_same_columns_from_every_model(
    data: Path, run: Path, folds: Folds
) -> None:
    metadata = train_table(data)
    maps, _ = fit_aligned(run, "tiny", metadata, folds)
    by_fold = [columns_of(run, metadata, k, maps) for k in maps]
    assert by_fold[0].shape == (len(metadata), WIDTH)
    assert by_fold[0].dtype == np.float32
    for other in by_fold[1:]:
        assert np.abs(other - by_fold[0]).mean() < 0.2 * by_fold[0].std()


def test_a_training_row_has_the_columns_of_the_model_that_held_it_out(
    data: Path, run: Path, folds: Folds
) -> None:
    metadata = train_table(data).reverse()
    maps, columns = fit_aligned(run, "tiny", metadata, folds)
    assert tuple(columns.columns) == NAMES
    fold = folds.of(metadata)
    for k in range(NUM_FOLDS):
        expected = columns_of(run, metadata.filter(fold == k), k, maps)
        np.testing.assert_array_equal(columns.filter(fold == k).to_numpy(), expected)


def test_a_test_row_has_the_mean_over_the_models(
    data: Path, run: Path, folds: Folds, tmp_path: Path
) -> None:
    maps, _ = fit_aligned(run, "tiny", train_table(data), folds)
    write_affine_maps(tmp_path / "maps.parquet", maps)
    again = read_affine_maps(tmp_path / "maps.parquet")
    test = Dataset(data).metadata("test")
    found = mapped_columns(run, "test", NAMES, test, again)
    assert found.columns[:2] == ["aligned_000.tiny", "aligned_001.tiny"]
    mapped = [maps[k].apply(read_features(run, "test", k)) for k in maps]
    np.testing.assert_allclose(found.to_numpy(), np.mean(mapped, axis=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", [ALIGNED, FROZEN, PCA])
def test_embeddings_improve_scores_and_a_row_alone_scores_the_same(
    data: Path, run: Path, frozen: Path, mode: str, tmp_path: Path
) -> None:
    sources = {"embeddings": run, "frozen": frozen}
    images = fit_small(data, tmp_path, features=f"raw,{mode}", name="images", **sources)
    raw = fit_small(data, tmp_path, features="raw", name="raw", embeddings=run)
    assert read_blend(images)["auc"] > read_blend(raw)["auc"] + 0.02
    (tmp_path / "one").mkdir()
    test = read_test_text(data)
    row = test.filter(patient_id=test["patient_id"][3])[:1]
    row.write_csv(tmp_path / "one" / "test-metadata.csv")
    used = "embeddings" if mode == ALIGNED else "frozen"
    chosen = {"ensemble": images, used: sources[used]}
    predict_submission(PredictSettings(data=data, output=tmp_path / "all.csv", **chosen))
    predict_submission(PredictSettings(data=tmp_path / "one", output=tmp_path / "1.csv", **chosen))
    scores = pl.read_csv(tmp_path / "all.csv")
    alone = pl.read_csv(tmp_path / "1.csv")
    assert alone.rows() == scores.filter(isic_id=row["isic_id"][0]).rows()


@pytest.mark.parametrize("mode", [ALIGNED, PCA])
def test_two_fits_give_the_same_bytes(
    data: Path, run: Path, frozen: Path, mode: str, tmp_path: Path
) -> None:
    sources = {"embeddings": run, "frozen": frozen}
    chosen = {"features": f"raw,{mode}", "name": "same", **sources}
    first = read_files(fit_small(data, tmp_path / "a", **chosen))
    assert first == read_files(fit_small(data, tmp_path / "b", **chosen))
    network = run if mode == ALIGNED else frozen
    assert f"maps_{mode}_{network.name}.parquet" in first


@pytest.mark.parametrize("mode", FORMS)
def test_the_columns_do_not_read_the_targets(
    data: Path, run: Path, frozen: Path, mode: str
) -> None:
    metadata = train_table(data)
    flipped = metadata.with_columns(target=1 - pl.col("target"))
    states, rows = zip(
        *(fit_images([mode], [run], [frozen], table) for table in (metadata, flipped)), strict=True
    )
    assert states[0].to_json() == states[1].to_json()
    tables = [pl.concat(part.tables(), how="horizontal") for part in rows]
    assert tables[0].columns == list(states[0].names)
    assert tables[0].equals(tables[1])


@pytest.mark.parametrize("mode", FORMS)
def test_shuffled_targets_give_chance(data: Path, mode: str, tmp_path: Path) -> None:
    """Embeddings that know a label only if the model was trained on the image."""
    found = [read_blend(fit_shuffled(data, tmp_path / str(seed), mode, seed)) for seed in range(3)]
    assert np.mean([scores["pauc"] for scores in found]) < 0.06  # 0.02 is chance, 0.2 perfect
    assert 0.4 < np.mean([scores["auc"] for scores in found]) < 0.6


def fit_shuffled(data: Path, folder: Path, mode: str, seed: int) -> Path:
    """Fit one form of image features on targets in random order."""
    folder.mkdir()
    shuffled = shuffle_targets(data, folder / "data", seed)
    folds = draw_folds(shuffled, NUM_FOLDS, 42)
    remembered = 0.0 if mode in FROZEN_FORMS else REMEMBERED
    run = write_fold_embeddings(folder / "blind", folder / "data", folds, 0.0, remembered)
    source = {"embeddings": run}
    if mode in FROZEN_FORMS:
        write_seen(seen_list(run, 0), seen_rows(pl.DataFrame({"isic_id": ["other"]})))
        source = {"frozen": run}
    features = "raw,image" if mode == "image" else mode
    return fit_small(folder / "data", folder, features=features, seeds=3, **source)


def test_maps_do_not_carry_labels_over(data: Path, tmp_path: Path) -> None:
    """Looks at the direction in which models remember labels, in rows that each has not seen.

    A map that is fitted on held-out images too would leak.
    """
    width = 100
    ours, leaky = [], []
    for seed in range(6):
        table = shuffle_targets(data, tmp_path / f"data{seed}", seed)
        folds = draw_folds(table, NUM_FOLDS, 42)
        run = write_fold_embeddings(
            tmp_path / f"run{seed}", tmp_path / f"data{seed}", folds, 0.0, REMEMBERED, width
        )
        maps, _ = fit_aligned(run, "tiny", table, folds)
        ours.append(remembered_auc(run, table, folds, maps))
        leaky.append(remembered_auc(run, table, folds, fit_on_held_out(run, width)))
    assert abs(np.mean(ours) - 0.5) < 0.025
    assert np.mean(leaky) > np.mean(ours) + 0.02


def fit_on_held_out(run: Path, width: int) -> AffineMaps:
    """Fit rotations as `fit_aligned` must not: on all images."""
    features = [read_features(run, "train", k) for k in range(NUM_FOLDS)]
    centred = [matrix - matrix.mean(axis=0) for matrix in features]
    return {
        k: AffineMap(procrustes(centred[k], centred[0]), np.zeros(width)) for k in range(NUM_FOLDS)
    }


def remembered_auc(run: Path, table: pl.DataFrame, folds: Folds, maps: AffineMaps) -> float:
    """Return the AUC, within folds, of the direction in which the first model remembers."""
    memory = spaces(len(maps[0].offset))[0][1]
    found = []
    for k in range(1, NUM_FOLDS):
        held_out = table.filter(folds.of(table) == k)
        found.append(roc_auc(held_out["target"], columns_of(run, held_out, k, maps) @ memory))
    return float(np.mean(found))


def test_blocks_and_shards_do_not_change_a_bit(
    data: Path, run: Path, folds: Folds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the order of the shards nor the rows that are read and mapped together."""
    metadata = train_table(data)
    maps, columns = fit_aligned(run, "tiny", metadata, folds)
    root = Path(shutil.copytree(run, tmp_path / "tiny"))
    for k in range(NUM_FOLDS):
        path = shard_path(root, "train", k, 0)
        whole = pl.read_parquet(path).sample(fraction=1, shuffle=True, seed=k)
        whole[:150].write_parquet(path)
        whole[150:].write_parquet(shard_path(root, "train", k, 1))
    monkeypatch.setattr("infer.ensemble.images.columns.READ_ROWS", 77)
    monkeypatch.setattr("infer.ensemble.images.columns.MAX_MAPPED_ROWS", 13)
    again, in_parts = fit_aligned(root, "tiny", metadata, folds)
    assert in_parts.equals(columns)
    for k, affine_map in maps.items():
        np.testing.assert_array_equal(again[k].matrix, affine_map.matrix)
    for split in SPLITS:
        table = Dataset(data).metadata(split)
        expected = mapped_columns(run, split, NAMES, table, maps)
        assert mapped_columns(root, split, NAMES, table, maps).equals(expected)


def test_embeddings_of_held_out_images_only_are_refused(
    data: Path, run: Path, folds: Folds, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(run, tmp_path / "tiny"))
    path = root / "train" / "run.json"
    write_json(path, json.loads(path.read_text()) | {"folds_mode": "oof"})
    message = "aligned needs every training image embedded by every fold model"
    with pytest.raises(UserError, match=message):
        fit_small(data, tmp_path, features="aligned", embeddings=root)


def test_too_few_images_for_the_features_are_refused(
    data: Path, folds: Folds, tmp_path: Path
) -> None:
    wide = write_fold_embeddings(tmp_path / "wide", data, folds, 0.0, 0.0, width=200)
    with pytest.raises(UserError, match=r"1\d\d shared images are too few to align 200 features"):
        fit_small(data, tmp_path, features="aligned", embeddings=wide)


def test_missing_and_broken_embeddings_are_refused(data: Path, run: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(run, tmp_path / "tiny"))
    path = shard_path(root, "train", 2, 0)
    shard = pl.read_parquet(path)
    shard[3:].write_parquet(path)
    message = r"lacks the train embeddings of \d+ of \d+ images, .* for fold 2"
    with pytest.raises(UserError, match=message):
        fit_small(data, tmp_path, features="aligned", embeddings=root)
    bad = np.full((len(shard), WIDTH), np.nan, np.float32)
    write_shard(path, shard["isic_id"].to_list(), bad, shard["logit"].to_numpy())
    with pytest.raises(UserError, match="embeddings are not finite"):
        fit_small(data, tmp_path, features="aligned", embeddings=root)


@pytest.mark.filterwarnings("ignore::infer.ResultWarning")
@pytest.mark.parametrize("mode", [ALIGNED, *EMBEDDED_FROZEN])
def test_embeddings_in_memory_score_as_those_on_disk(
    data: Path, run: Path, frozen: Path, mode: str, tmp_path: Path
) -> None:
    sources = {"embeddings": run, "frozen": frozen}
    root = fit_small(data, tmp_path, features=f"raw,{mode}", num_rounds=5, **sources)
    given = {"embeddings": run} if mode == ALIGNED else {"frozen": frozen}
    settings = {"data": data, "ensemble": root, "output": tmp_path / "s.csv", **given}
    predict_submission(PredictSettings.model_validate(settings))
    metadata = Dataset(data).metadata("test")
    outputs = {
        flag: {path.name: outputs_of(path, metadata["isic_id"])} for flag, path in given.items()
    }
    scores = load_ensemble(root).score(metadata, **outputs)
    np.testing.assert_array_equal(scores, pl.read_csv(tmp_path / "s.csv")["target"])


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


@pytest.mark.parametrize("features", ["image", "raw,aligned"])
def test_a_fold_model_that_has_seen_its_rows_is_refused(
    data: Path, run: Path, tmp_path: Path, features: str
) -> None:
    """The fold folds holds the rows out, but the initial weights had seen one patient."""
    root = Path(shutil.copytree(run, tmp_path / "leaking"))
    metadata = train_table(data)
    fold = read_folds(root / "folds.parquet").of(metadata)
    patient = metadata.filter(fold == 2)["patient_id"][0]
    inherited = metadata.filter(pl.col("patient_id") == patient).head(1)
    write_seen(seen_list(root, 2), seen_rows(metadata.filter(fold != 2), seen_rows(inherited)))
    with pytest.raises(UserError, match=r"the model of fold 2 behind .* learned from"):
        fit_small(data, tmp_path, features=features, embeddings=root)
