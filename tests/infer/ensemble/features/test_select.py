"""Choosing features: nested in the folds, reproducible, and read back by `infer fit`."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from infer.ensemble.artifact import open_ensemble
from infer.ensemble.boosting.libraries import LIBRARIES
from infer.ensemble.features import select as module
from infer.ensemble.features.select import select
from infer.ensemble.settings import SelectSettings
from isic import schema
from isic.folds import draw_folds
from isic.runtime.config import build
from isic.runtime.errors import UserError
from isic.runtime.files import sha256
from tests.support.commands import Cli
from tests.support.ensembles import (
    NUM_FOLDS,
    fit_small,
    shuffle_targets,
    train_table,
    write_train,
)

NUM_NOISE = 12


def choose(data: Path, output: Path, **more: object) -> dict:
    """Run a selection of a second. Returns its manifest."""
    small = {"seeds": 1, "num_folds": NUM_FOLDS, "num_rounds": 20, "num_threads": 1, "repeats": 6}
    given = {"data": data, "output": output, "features": "numeric", **more}
    select(build(SelectSettings, small | given))
    return json.loads(output.with_name(f"{output.name}.json").read_text())


@pytest.fixture(scope="module")
def planted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A table of columns without meaning, and one that knows the target with noise."""
    rows = train_table(data)
    random = np.random.default_rng(5)
    columns = {f"noise_{i}": random.standard_normal(len(rows)) for i in range(NUM_NOISE)}
    known = rows[schema.TARGET].to_numpy() * 2 + random.standard_normal(len(rows))
    path = tmp_path_factory.mktemp("planted") / "planted.parquet"
    rows.select(schema.ID).with_columns(**columns, known=pl.Series(known)).write_parquet(path)
    return f"label_free:{path}"


@pytest.mark.parametrize("by", ["null_importance", "gain"])
def test_columns_without_meaning_are_dropped(
    data: Path, planted: str, tmp_path: Path, by: str
) -> None:
    output = tmp_path / "chosen.txt"
    given = {"features": "planted", "tables": planted, "by": by}
    number = {"num_features": 3} if by == "gain" else {}
    manifest = choose(data, output, **given, **number)
    assert manifest["chosen"][0] == "known"
    assert manifest["median_rank"]["known"] == 0
    assert all("known" in part for part in manifest["by_fold"].values())
    assert len(manifest["chosen"]) <= (3 if number else NUM_NOISE / 2)
    assert manifest["sha256"] == sha256(output)
    assert manifest["nested"]["pauc_by_fold_lists"] > 0.08
    # The same list can be read, and does not need the file later.
    words = {"features": f"@{output}", "tables": planted}
    root = fit_small(data, tmp_path, **words, num_rounds=2)
    assert set(json.loads((root / "state.json").read_text())["names"]) == set(manifest["chosen"])
    before = output.read_bytes()
    choose(data, output, **given, **number)
    assert output.read_bytes() == before


def test_the_rows_of_a_fold_do_not_change_its_list(data: Path, tmp_path: Path) -> None:
    table = train_table(data)
    folds = draw_folds(table, NUM_FOLDS, 42)
    held_out = folds.of(table) == 0
    changed = table.with_columns(
        pl.when(held_out)
        .then(1 - pl.col(schema.TARGET))
        .otherwise(schema.TARGET)
        .cast(pl.Int8)
        .alias(schema.TARGET),
        pl.when(held_out).then(pl.col("tbp_lv_H") * 2 + 1).otherwise("tbp_lv_H").alias("tbp_lv_H"),
    )
    lists = []
    for name, rows in (("before", table), ("after", changed)):
        root = write_train(tmp_path / name, rows)
        folds.write(root / "folds.parquet")
        lists.append(choose(root, tmp_path / f"{name}.txt", repeats=3)["by_fold"])
    assert lists[0]["0"] == lists[1]["0"]
    assert lists[0]["1"] != lists[1]["1"]


@pytest.mark.slow
def test_shuffled_targets_give_chance_on_each_folds_own_list(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lists that had seen the held-out rows would not."""
    shuffle_targets(data, tmp_path / "data")
    random = np.random.default_rng(2)
    rows = train_table(tmp_path / "data").select(schema.ID)
    noise = {f"n{i}": pl.Series(random.standard_normal(len(rows))) for i in range(200)}
    rows.with_columns(**noise).write_parquet(tmp_path / "many.parquet")
    given = {
        "features": "many",
        "tables": f"label_free:{tmp_path / 'many.parquet'}",
        "by": "gain",
        "num_features": 8,
        "seeds": 2,
    }
    honest = choose(tmp_path / "data", tmp_path / "honest.txt", **given)["nested"]

    right = module._gains

    def leaky(rows: module.Rows, _: int, settings: SelectSettings) -> object:
        return right(rows, NUM_FOLDS, settings)

    monkeypatch.setattr(module.Rows, "outside", lambda rows, _: rows)
    monkeypatch.setattr(module, "_gains", leaky)
    leaked = choose(tmp_path / "data", tmp_path / "leaked.txt", **given)["nested"]
    assert honest["pauc_by_fold_lists"] < 0.05  # 0.02 is chance, 0.2 perfect
    assert leaked["pauc_by_fold_lists"] > honest["pauc_by_fold_lists"] + 0.02


def test_image_features_are_kept(data: Path, embeddings: Path, tmp_path: Path) -> None:
    given = {"features": "raw,image", "embeddings": embeddings, "by": "gain", "repeats": 1}
    manifest = choose(data, tmp_path / "list.txt", **given)
    assert not any(name.startswith("image") for name in manifest["chosen"])
    words = f"@{tmp_path / 'list.txt'}"
    root = fit_small(data, tmp_path, features=words, embeddings=embeddings, num_rounds=2)
    names = json.loads((root / "state.json").read_text())["names"]
    assert names[-2:] == ["image_score.tiny", "image_score_patient_diff.tiny"]
    assert len(names) == len(manifest["chosen"]) + 2


def test_columns_of_networks_stay_left_out(data: Path, embeddings: Path, tmp_path: Path) -> None:
    words = "raw,image,-image_score_patient_diff"
    choose(data, tmp_path / "list.txt", features=words, embeddings=embeddings, by="gain", repeats=1)
    assert (tmp_path / "list.txt").read_text().endswith("\n-image_score_patient_diff\n")
    chosen = f"@{tmp_path / 'list.txt'}"
    root = fit_small(data, tmp_path, features=chosen, embeddings=embeddings, num_rounds=2)
    images = [name for name in open_ensemble(root).state.names if name.endswith(".tiny")]
    assert images == ["image_score.tiny"]


def test_a_config_of_fit_can_be_used(data: Path, tmp_path: Path, cli: Cli) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(f"features: category\nname: mine\nout: {tmp_path / 'no'}\nnum_rounds: 2\n")
    flags = ("--config", config, "--data", data, "--num_folds", 3, "--seeds", 1, "--repeats", 1)
    ended = cli("infer", "select", *flags, "--by", "gain", "--out", tmp_path, "--name", "chosen")
    assert ended.code == 0, ended.err
    assert (tmp_path / "chosen.txt").is_file()
    assert "pAUC out of fold" in ended.out
    assert not (tmp_path / "no").exists()


def test_constraints_may_name_columns_that_are_left_out(data: Path, tmp_path: Path) -> None:
    extra = "{extra: {monotone_constraints: {tbp_lv_A: 1, tbp_lv_B: 1, age_approx: -1}}}"
    given = {"features": "tbp_lv_A,tbp_lv_B,age_approx", "num_rounds": 3, "repeats": 1}
    settings = {**given, "libraries": tuple(LIBRARIES), **dict.fromkeys(LIBRARIES, extra)}
    manifest = choose(data, tmp_path / "one.txt", **settings, by="gain", num_features=1)
    assert all(len(part) == 1 for part in manifest["by_fold"].values())


def test_bad_choices_are_refused(data: Path, embeddings: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no features to choose among"):
        choose(data, tmp_path / "list.txt", features="image", embeddings=embeddings)
    with pytest.raises(UserError, match="--num_features 500 are more than the 34 features of num"):
        choose(data, tmp_path / "list.txt", num_features=500)
    (tmp_path / "list.txt").write_text("mine\n")
    with pytest.raises(UserError, match="exists and was not written by this command"):
        choose(data, tmp_path / "list.txt")
    for given, message in (
        ({"by": "gains"}, "by"),
        ({"refit": True}, "--refit is not a key"),
        ({"output": "a.txt", "name": "b"}, "leave --output_dir and --name out"),
    ):
        with pytest.raises(UserError, match=message):
            build(SelectSettings, given)


def test_a_list_of_other_settings_is_replaced_by_force_only(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "list.txt"
    given = {"features": "tbp_lv_A,tbp_lv_B,sex", "by": "gain", "repeats": 1, "num_rounds": 2}
    first = choose(data, output, **given, num_features=1)
    before = output.read_bytes()
    # Settings that do not matter for the list may differ.
    assert choose(data, output, **given, num_features=1, num_threads=2) == first
    for key, now in (("num_features", 2), ("seed", 3), ("features", "tbp_lv_A,tbp_lv_B")):
        other = {**given, "num_features": 1, key: now}
        with pytest.raises(UserError, match=rf"list.txt holds a list with .*{key} = .*, now it"):
            choose(data, output, **other)
        assert output.read_bytes() == before
    assert choose(data, output, **given, num_features=2, force=True)["num_features"] == 2


def test_a_category_to_blank_need_not_be_in_every_list(data: Path, tmp_path: Path) -> None:
    given = {"features": "sex,attribution,tbp_lv_A", "blank": "sex,attribution"}
    manifest = choose(data, tmp_path / "one.txt", **given, by="gain", num_features=1, repeats=1)
    assert all(len(part) == 1 for part in manifest["by_fold"].values())
    assert manifest["settings"]["blank"] == ["sex", "attribution"]


def test_an_unknown_category_to_blank_is_refused_first(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "choose_by_fold", None)
    with pytest.raises(UserError, match='no category "atribution" among the features'):
        choose(data, tmp_path / "one.txt", features="raw", blank="atribution")
