"""Several networks in one ensemble: columns, origins, fold plans, leaks and refusals."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy.stats import spearmanr

from infer.embedding.store import shard_path, write_shard
from infer.ensemble.artifact import open_ensemble
from infer.ensemble.blends.write import write_blend
from infer.ensemble.boosting.libraries import LIBRARIES
from infer.ensemble.images import scores as image_scores
from infer.ensemble.images.features import FORMS
from infer.ensemble.predict import predict_submission
from infer.ensemble.settings import BlendSettings, FitSettings, PredictSettings
from isic import schema
from isic.folds import Folds, draw_folds, read_folds
from isic.layout import TRAINED_ON_FILE, fold_dir
from isic.metrics import roc_auc
from isic.provenance import seen_rows, write_seen
from isic.runtime.config import build
from isic.runtime.errors import UserError
from isic.runtime.files import write_json
from tests.support.ensembles import (
    NUM_FOLDS,
    copy_tree,
    fit_settings,
    fit_small,
    read_blend,
    read_files,
    shuffle_targets,
    train_table,
    write_embeddings,
)

REMEMBERED = 6.0
"""How much of a training image's label a network's logit shows, compared with noise of 1."""


@pytest.fixture(scope="module")
def two(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Embeddings of two networks whose errors are independent."""
    root = tmp_path_factory.mktemp("networks")
    return [write_embeddings(root / name, data, seed=seed) for seed, name in enumerate(("b", "a"))]


@pytest.fixture(scope="module")
def both(data: Path, two: list[Path]) -> Path:
    """An ensemble of two networks and the raw features."""
    return fit_small(data, two[0].parent / "ensemble", features="raw,image", embeddings=two)


def predict(data: Path, ensemble: Path, output: Path, *embeddings: Path) -> pl.DataFrame:
    predict_submission(
        PredictSettings(data=data, ensemble=ensemble, embeddings=embeddings, output=output)
    )
    return pl.read_csv(output)


def read_manifest(ensemble: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((ensemble / "ensemble.json").read_text())
    return manifest


def plan(data: Path, seed: int) -> Folds:
    return draw_folds(train_table(data), NUM_FOLDS, seed)


def test_two_networks_are_better_than_either(data: Path, two: list[Path], both: Path) -> None:
    for root in two:
        one = fit_small(data, two[0].parent / "one", features="raw,image", embeddings=root)
        assert read_blend(both)["auc"] > read_blend(one)["auc"] + 0.01
    averaged = fit_small(data, two[0].parent / "one", features="image", embeddings=two)
    own = read_manifest(averaged)["networks"]["scores"]
    assert read_blend(averaged)["auc"] > max(score["auc"] for score in own.values()) + 0.01


def test_columns_and_origins_are_named_after_the_networks(both: Path) -> None:
    assert both.name == "raw+image_a+b"
    names = open_ensemble(both).state.names
    assert names[-4:] == (
        "image_score.a",
        "image_score_patient_diff.a",
        "image_score.b",
        "image_score_patient_diff.b",
    )
    manifest = read_manifest(both)
    assert {name: origin["config"] for name, origin in manifest["embeddings"].items()} == {
        "a": "a",
        "b": "b",
    }
    assert manifest["frozen"] == {}


def test_the_order_of_the_networks_does_not_matter(
    data: Path, two: list[Path], both: Path, tmp_path: Path
) -> None:
    again = fit_small(data, tmp_path, features="raw,image", embeddings=two[::-1])
    assert read_files(again) == read_files(both)
    first = predict(data, both, tmp_path / "1.csv", *two)
    assert predict(data, both, tmp_path / "2.csv", *two[::-1]).equals(first)
    found = json.loads((tmp_path / "1.csv.json").read_text())
    assert set(found["embeddings"]) == {"a", "b"}


def test_a_missing_or_extra_network_is_named(
    data: Path, two: list[Path], both: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(two[0], tmp_path / "c"))
    for split in ("train", "test"):
        path = other / split / "run.json"
        write_json(path, json.loads(path.read_text()) | {"config": "c"})
    fitted = "the ensemble needs a and b; --embeddings"
    for given, message in (
        (two[:1], f"{fitted} lacks a: give"),
        ([*two, other], f"{fitted} also has c: give"),
        ([two[0], other], f"{fitted} lacks a and also has c: give"),
        ((), "give --embeddings outputs/embeddings/a,outputs/embeddings/b"),
        ([two[0], *two], "are both embeddings of b; give each network once"),
    ):
        with pytest.raises(UserError, match=message):
            predict(data, both, tmp_path / "s.csv", *given)


def test_two_runs_of_one_network_and_unusable_names_are_refused(
    data: Path, two: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="are both embeddings of b; give each network once"):
        fit_small(data, tmp_path, features="image", embeddings=[*two, two[0]])
    odd = Path(shutil.copytree(two[0], tmp_path / "odd"))
    path = odd / "train" / "run.json"
    for name in ("a b", "a,b", 'a"b', "a[0]", "a/b", "ä"):
        write_json(path, json.loads(path.read_text()) | {"config": name})
        with pytest.raises(UserError, match="cannot be part of a column's name"):
            fit_small(data, tmp_path, features="image", embeddings=odd)


@pytest.mark.parametrize("text", ["x/a, x/b", "[x/a, x/b]", "\n  - x/a\n  - x/b"])
def test_a_config_file_lists_networks(tmp_path: Path, text: str) -> None:
    path = tmp_path / "networks.yaml"
    path.write_text(f"embeddings: {text}\nfrozen: x/old\n")
    settings = build(FitSettings, {"config": str(path)})
    assert settings.embeddings == (Path("x/a"), Path("x/b"))
    assert settings.frozen == (Path("x/old"),)
    assert build(FitSettings, {"embeddings": "x/a,x/b"}).embeddings == settings.embeddings


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"checkpoints": {"0": "x", "1": "y", "2": "z"}}, "/a were made with other trained weight"),
        ({"tta": "d4"}, r"/a were made with another --tta \(d4, not none\)"),
        ({"folds_digest": "other"}, "/a were made with the fold plan other, not"),
    ],
)
def test_the_origin_of_every_network_is_checked(
    data: Path, two: list[Path], both: Path, tmp_path: Path, changed: object, message: str
) -> None:
    root = Path(shutil.copytree(two[1], tmp_path / "a"))
    path = root / "test" / "run.json"
    write_json(path, json.loads(path.read_text()) | changed)
    with pytest.raises(UserError, match=message):
        predict(data, both, tmp_path / "s.csv", two[0], root)


def test_the_members_of_a_blend_find_their_own_networks(
    data: Path, two: list[Path], tmp_path: Path
) -> None:
    members = {}
    for root in two:
        chosen = {"features": "raw,image", "embeddings": root, "num_rounds": 5}
        members[root.name] = fit_small(data, tmp_path / "ensembles", **chosen)
    ensembles = tuple(members.values())
    blended = write_blend(
        BlendSettings(ensembles=ensembles, data=data, output_dir=tmp_path, name="blended")
    )
    predict(data, blended, tmp_path / "both.csv", *two)
    found = pl.read_parquet(tmp_path / "both_models.parquet")
    for root in two:
        alone = predict(data, members[root.name], tmp_path / "alone.csv", root)
        assert found[members[root.name].name].to_list() == alone["target"].to_list()
    with pytest.raises(UserError, match="needs a and b; --embeddings lacks a"):
        predict(data, blended, tmp_path / "s.csv", two[0])


def test_ranks_are_columns_only_if_asked_for(data: Path, two: list[Path], tmp_path: Path) -> None:
    ensemble = fit_small(data, tmp_path, features="raw,image,image_ranks", embeddings=two)
    names = open_ensemble(ensemble).state.names
    ranks = [name for name in names if name.startswith("image_score") and "_rank." in name]
    assert len(ranks) == 6
    assert "image_score_patient_location_rank.b" in ranks
    scores = predict(data, ensemble, tmp_path / "s.csv", *two)["target"]
    assert scores.n_unique() > 10
    plain = fit_small(data, tmp_path, features="multimodal", embeddings=two)
    assert not any(
        name.startswith("image") and "_rank." in name for name in open_ensemble(plain).state.names
    )


def test_the_scores_of_the_networks_are_in_the_manifest(
    data: Path, two: list[Path], both: Path
) -> None:
    networks = read_manifest(both)["networks"]
    state = json.loads((both / "state.json").read_text())["image"]["networks"]
    table = train_table(data).sort("isic_id")
    scores = {}
    for root in two:
        logits = pl.concat(
            pl.read_parquet(shard_path(root, "train", k, 0)).select(
                "isic_id", score=(pl.col("logit") - mean) / std
            )
            for k, (mean, std) in enumerate(state[root.name]["scaler"].values())
        )
        score = table.join(logits, on="isic_id", maintain_order="left")["score"]
        found = networks["scores"][f"image_score.{root.name}"]
        assert found["auc"] == pytest.approx(roc_auc(table["target"], score), abs=1e-6)
        scores[root.name] = score.to_numpy()
    (pair,) = networks["correlations"]
    assert pair["pair"] == ["image_score.a", "image_score.b"]
    malignant = table["target"].to_numpy() == 1
    for name, rows in {"all": malignant | True, "malignant": malignant}.items():
        expected = spearmanr(scores["a"][rows], scores["b"][rows]).statistic
        assert pair[name] == pytest.approx(expected)


# Fold plans.


def test_networks_of_different_plans_are_combined(
    data: Path, two: list[Path], tmp_path: Path
) -> None:
    other = write_embeddings(tmp_path / "other", data, plan(data, 7), seed=5)
    given = [two[0], other]
    ensemble = fit_small(data, tmp_path / "e", features="raw,image", embeddings=given)
    own = read_folds(two[0] / "folds.parquet").digest
    manifest = read_manifest(ensemble)
    assert manifest["folds_digest"] == own, "the plan of the first network is the boosters'"
    origins = manifest["embeddings"]
    assert origins["b"]["folds_digest"] == own
    assert origins["other"]["folds_digest"] == plan(data, 7).digest
    assert predict(data, ensemble, tmp_path / "s.csv", *given[::-1])["target"].n_unique() > 10
    alone = fit_small(data, tmp_path / "e", features="raw,image", embeddings=two[0])
    assert read_blend(ensemble)["auc"] > read_blend(alone)["auc"]


@pytest.mark.parametrize("features", ["image", "raw,image", "image_ranks"])
def test_a_network_that_has_seen_held_out_patients_is_refused(
    data: Path, two: list[Path], tmp_path: Path, features: str
) -> None:
    """Its fold plan holds them out, but the models' own lists decide."""
    folds = plan(data, 7)
    leaking = write_embeddings(tmp_path / "leaking", data, folds, seed=5)
    table = train_table(data)
    fold = folds.of(table)
    patient = table.filter(fold == 1)["patient_id"][0]
    inherited = pl.DataFrame({"isic_id": ["ISIC_9999999"], "patient_id": [patient]})
    seen = seen_rows(table.filter(fold != 1), inherited)
    write_seen(fold_dir(leaking / "train", 1) / TRAINED_ON_FILE, seen)
    for given in ([two[0], leaking], [leaking, two[0]]):
        with pytest.raises(UserError, match=r"the model of fold 1 behind .*leaking learned from"):
            fit_small(data, tmp_path, features=features, embeddings=given)


def test_a_plan_with_the_same_digest_does_not_replace_the_check(
    data: Path, two: list[Path], tmp_path: Path
) -> None:
    """A network trained with another plan, next to which the boosters' plan was put."""
    liar = write_embeddings(tmp_path / "liar", data, seed=5)
    table = train_table(data)
    other = plan(data, 7)
    for k in range(NUM_FOLDS):
        seen = seen_rows(table.filter(other.of(table) != k))
        write_seen(fold_dir(liar / "train", k) / TRAINED_ON_FILE, seen)
    assert read_folds(liar / "folds.parquet").digest == read_folds(two[0] / "folds.parquet").digest
    with pytest.raises(UserError, match=r"the model of fold 0 behind .*liar learned from"):
        fit_small(data, tmp_path, features="raw,image", embeddings=[two[0], liar])


def test_a_plan_that_lacks_rows_is_refused(data: Path, two: list[Path], tmp_path: Path) -> None:
    short = write_embeddings(tmp_path / "short", data, plan(data, 7), seed=5)
    folds = Folds(plan(data, 7).table[3:])
    folds.write(short / "folds.parquet")
    path = short / "train" / "run.json"
    write_json(path, json.loads(path.read_text()) | {"folds_digest": folds.digest})
    with pytest.raises(UserError, match="lacks 3 rows of this dataset"):
        fit_small(data, tmp_path, features="raw,image", embeddings=[two[0], short])


# Leaks.


def write_remembering(root: Path, data: Path, folds: Folds, seed: int) -> Path:
    """Write logits of every image by every fold's model: noise, and labels that it has learned."""
    write_embeddings(root, data, folds, seed)
    rng = np.random.default_rng(seed)
    table = train_table(data)
    target = table[schema.TARGET].to_numpy()
    for k in range(NUM_FOLDS):
        seen = folds.of(table).to_numpy() != k
        logits = rng.standard_normal(len(table)) + REMEMBERED * target * seen
        empty = np.zeros((len(table), 4), np.float16)
        ids = table[schema.ID].to_list()
        write_shard(shard_path(root, "train", k, 0), ids, empty, logits.astype(np.float32))
    return root


def rotated(data: Path) -> Folds:
    """Return the first plan with other numbers of the folds."""
    table = plan(data, 42).table
    return Folds(table.with_columns(((pl.col("fold") + 1) % NUM_FOLDS).cast(pl.Int8)))


PLANS: dict[str, Callable[[Path], Folds]] = {
    "the same": partial(plan, seed=42),
    "another": partial(plan, seed=7),
    "rotated": rotated,
}


def mean_auc(data: Path, folder: Path, second: str) -> float:
    """Return the mean AUC over shuffles of the targets, with two networks that remember theirs.

    Args:
        second: the plan of the second network.
    """
    found = []
    for seed in range(4):
        root = folder / str(seed)
        root.mkdir(parents=True)
        shuffle_targets(data, root / "data", seed)
        runs = [
            write_remembering(root / f"net{row}", root / "data", PLANS[name](root / "data"), row)
            for row, name in enumerate(("the same", second))
        ]
        settings = {"features": "raw,image,image_ranks", "embeddings": runs}
        found.append(read_blend(fit_small(root / "data", root, **settings))["auc"])
    return float(np.mean(found))


@pytest.mark.parametrize("second", PLANS)
def test_shuffled_targets_give_chance(data: Path, second: str, tmp_path: Path) -> None:
    assert 0.4 < mean_auc(data, tmp_path, second) < 0.6


def test_scores_by_the_plan_of_another_network_would_leak(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test of chance fails if the second network is read by the first one's folds."""

    def by_boosters_plan(root: Path, metadata: pl.DataFrame, _: Folds) -> pl.DataFrame:
        first = read_folds(root.parent / "net0" / "folds.parquet")
        return honest(root, metadata, first)

    honest = image_scores.oof_logits
    monkeypatch.setattr(image_scores, "oof_logits", by_boosters_plan)
    assert mean_auc(data, tmp_path, "another") > 0.65
    assert mean_auc(data, tmp_path / "rotated", "rotated") > 0.95


# Networks that were trained on other images.


@pytest.fixture(scope="module")
def old(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Embeddings of two networks that were trained on other images of other patients."""
    root = tmp_path_factory.mktemp("old")
    return [write_frozen(root / name, data, seed) for seed, name in enumerate(("old_b", "old_a"))]


def write_frozen(root: Path, data: Path, seed: int) -> Path:
    """Write embeddings of every image by one model, which knows the label with noise."""
    write_embeddings(root, data, seed=seed)
    every = pl.concat(pl.read_parquet(shard_path(root, "train", k, 0)) for k in range(NUM_FOLDS))
    rng = np.random.default_rng(seed)
    target = every.join(train_table(data), on="isic_id", maintain_order="left")["target"].to_numpy()
    logits = (20 + 3 * target + 2 * rng.standard_normal(len(every))).astype(np.float32)
    features = np.zeros((len(every), 4), np.float16)
    write_shard(shard_path(root, "train", 0, 0), every["isic_id"].to_list(), features, logits)
    write_seen(
        fold_dir(root / "train", 0) / TRAINED_ON_FILE, seen_rows(pl.DataFrame({"isic_id": ["x"]}))
    )
    for split in ("train", "test"):
        path = root / split / "run.json"
        run = json.loads(path.read_text()) | {"folds": [0], "num_features": 4}
        write_json(path, run | {"checkpoints": {"0": "a"}})
    return root


def test_the_scores_of_frozen_networks_are_features(
    data: Path, old: list[Path], tmp_path: Path
) -> None:
    chosen = {"features": "raw,frozen_score", "frozen": old, "output_dir": tmp_path}
    ensemble = fit_small(data, **chosen)
    assert ensemble.name == "raw+frozen_score_old_a+old_b"
    names = open_ensemble(ensemble).state.names
    assert names[-4:] == (
        "frozen_score.old_a",
        "frozen_score_patient_diff.old_a",
        "frozen_score.old_b",
        "frozen_score_patient_diff.old_b",
    )
    assert open_ensemble(ensemble).is_relative
    raw = fit_small(data, tmp_path, features="raw")
    assert read_blend(ensemble)["auc"] > read_blend(raw)["auc"] + 0.02
    state = json.loads((ensemble / "state.json").read_text())["image"]["frozen"]["old_a"]
    ((mean, std),) = state["scaler"].values()
    assert mean == pytest.approx(20.45, abs=0.4)
    assert std == pytest.approx(2.25, abs=0.3)
    settings = {"data": data, "ensemble": ensemble, "output": tmp_path / "s.csv"}
    predict_submission(PredictSettings(frozen=old[::-1], **settings))
    with pytest.raises(UserError, match="needs old_a and old_b; --frozen lacks old_a"):
        predict_submission(PredictSettings(frozen=old[:1], **settings))
    with pytest.raises(UserError, match="give --frozen outputs/embeddings/old_a,outputs"):
        predict_submission(PredictSettings(**settings))


def test_a_frozen_network_that_has_seen_the_rows_is_refused(
    data: Path, old: list[Path], tmp_path: Path
) -> None:
    knowing = Path(shutil.copytree(old[0], tmp_path / "knowing"))
    patient = train_table(data)["patient_id"][0]
    seen = seen_rows(pl.DataFrame({"isic_id": ["x"], "patient_id": [patient]}))
    write_seen(fold_dir(knowing / "train", 0) / TRAINED_ON_FILE, seen)
    for given in ([knowing], [old[1], knowing]):
        with pytest.raises(UserError, match=r"the frozen model behind .*knowing learned from"):
            fit_small(data, tmp_path, features="raw,frozen_score", frozen=given)


def test_every_form_of_two_networks(data: Path, tmp_path: Path) -> None:
    """Their columns do not clash, and prediction finds them all."""
    folds = plan(data, 42)
    usable = ("a.b+c", "x-1_y")
    runs = [write_remembering(tmp_path / n, data, folds, seed) for seed, n in enumerate(usable)]
    rng = np.random.default_rng(0)
    for root in runs:
        for split in ("train", "test"):
            path = root / split / "run.json"
            run = json.loads(path.read_text()) | {"folds_mode": "all", "num_features": 4}
            write_json(path, run)
            for k in range(NUM_FOLDS):
                part = shard_path(root, split, k, 0)
                table = pl.read_parquet(part)
                features = rng.standard_normal((len(table), 4)).astype(np.float32)
                write_shard(part, table["isic_id"].to_list(), features, table["logit"].to_numpy())
    old = write_frozen(tmp_path / "old", data, 3)
    features = ",".join(FORMS)
    chosen = {"embeddings": runs, "frozen": old, "num_rounds": 4, "libraries": tuple(LIBRARIES)}
    ensemble = fit_small(data, tmp_path / "e", features=features, name="all", **chosen)
    names = open_ensemble(ensemble).state.names
    assert len(names) == len(set(names)) == 2 * (2 + 3 + 4) + 2 + 4 + 4 + 5
    expected = {"aligned_003.x-1_y", "frozen_000.old", "frozen_score.old", "frozen_pca_003.old"}
    assert {*expected, "frozen_distance_nearest.old"} < set(names)
    predict_submission(
        PredictSettings(
            data=data, ensemble=ensemble, embeddings=runs, frozen=old, output=tmp_path / "s.csv"
        )
    )


def test_an_unreadable_image_of_one_network_is_scored_by_the_others(
    data: Path, two: list[Path], tmp_path: Path
) -> None:
    ensemble = fit_small(data, tmp_path, features="image", embeddings=two)
    root = copy_tree(two[1].parent, tmp_path, "a")
    everything = predict(data, ensemble, tmp_path / "all.csv", *two)
    name = everything["isic_id"][4]
    for k in range(NUM_FOLDS):
        path = shard_path(root, "test", k, 0)
        pl.read_parquet(path).filter(pl.col("isic_id") != name).write_parquet(path)
    skipped = pl.DataFrame({"isic_id": [name], "reason": ["truncated JPEG"]})
    skipped.write_parquet(root / "test" / "errors.parquet")
    found = predict(data, ensemble, tmp_path / "s.csv", two[0], root)
    one = fit_small(data, tmp_path, features="image", embeddings=two[0], name="one")
    alone = predict(data, one, tmp_path / "one.csv", two[0])
    same = pl.col("isic_id") == name
    assert found.filter(~same).equals(everything.filter(~same))
    assert found.filter(same)["target"][0] == pytest.approx(alone.filter(same)["target"][0])


def test_embeddings_are_compared_with_their_own_settings(data: Path, tmp_path: Path) -> None:
    settings = fit_settings(data, tmp_path, embeddings=Path("x"))
    assert settings.sources.embeddings == (Path("x"),)
    assert settings.sources.frozen == ()
