"""Fitting the ensemble: what it writes, that it repeats itself, that it does not leak, and what it refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from infer.embedding.store import shard_path
from infer.ensemble.artifact import clear_ensemble
from infer.ensemble.boosters import LIBRARIES, min_data, parameters_of, read_booster
from infer.ensemble.fit import fit_ensemble
from infer.ensemble.image_scores import fit_logit_scaler, image_features
from infer.ensemble.out_of_fold import undersample
from infer.ensemble.scores import ScoresSettings, format_scores, show_scores, summarise
from isic import schema
from isic.dataset import Dataset
from isic.folds import draw_folds, read_folds
from isic.metrics import pauc
from isic.runtime.errors import UserError
from tests.support.ensembles import fit_settings, write_dataset, write_embeddings, write_run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("fit") / "data")


@pytest.fixture(scope="module")
def embeddings(data: Path) -> Path:
    return write_embeddings(data.parent / "embeddings" / "tiny", data)


@pytest.fixture(scope="module")
def fitted(data: Path) -> Path:
    fit_ensemble(fit_settings(data, data.parent / "ensemble", features="engineered", seeds=2))
    return data.parent / "ensemble" / "engineered"


def train_table(data: Path) -> pl.DataFrame:
    return Dataset(data).metadata("train")


def with_train(data: Path, root: Path, table: pl.DataFrame) -> Path:
    """A dataset with another training table."""
    root.mkdir()
    table.write_csv(root / "train-metadata.csv")
    return root


def files(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


def test_the_folder_holds_all_that_the_manifest_names(fitted: Path, data: Path) -> None:
    manifest = json.loads((fitted / "ensemble.json").read_text())
    assert set(manifest["files"]) == {path.name for path in fitted.iterdir()} - {"ensemble.json"}
    names = {f"lightgbm_fold_{k}_seed_{seed}.txt" for k in range(3) for seed in range(2)}
    assert names == {entry["file"] for entry in manifest["boosters"]}
    assert (fitted / "lightgbm_fold_0_seed_0.txt").read_text().startswith("tree\n")
    assert manifest["folds_digest"] == draw_folds(train_table(data), 3, 42).digest
    assert read_folds(fitted / "folds.parquet").digest == manifest["folds_digest"]


def test_out_of_fold_scores_are_one_a_model_and_their_mean(fitted: Path, data: Path) -> None:
    oof = pl.read_parquet(fitted / "oof.parquet")
    assert oof.columns == [
        "isic_id",
        "fold",
        "target",
        "lightgbm_seed_0",
        "lightgbm_seed_1",
        "blend",
    ]
    assert oof["isic_id"].to_list() == sorted(train_table(data)["isic_id"])
    np.testing.assert_allclose(oof["blend"], (oof["lightgbm_seed_0"] + oof["lightgbm_seed_1"]) / 2)
    assert oof["blend"].is_between(0, 1).all() and oof["blend"].n_unique() > 100
    scores = json.loads((fitted / "scores.json").read_text())
    assert scores["blend"]["pauc"] == pauc(oof["target"], oof["blend"])
    assert len(scores["blend"]["pauc_by_fold"]) == 3 and set(scores) == set(oof.columns[3:])


def test_the_planted_signal_is_found(fitted: Path) -> None:
    assert json.loads((fitted / "scores.json").read_text())["blend"]["auc"] > 0.75


def test_fold_members_of_held_out_rows_were_fitted_without_them(
    fitted: Path, data: Path, tmp_path: Path
) -> None:
    """Flips every label of fold 0's rows: the boosters of fold 0, and the scores of its rows, stay the same."""
    table = train_table(data)
    plan = read_folds(fitted / "folds.parquet")
    flipped = table.with_columns(
        pl.when(plan.of(table) == 0).then(1 - pl.col("target")).otherwise("target").alias("target")
    )
    root = with_train(data, tmp_path / "flipped", flipped)
    plan.write(root / "folds.parquet")
    fit_ensemble(fit_settings(root, tmp_path / "out", features="engineered"))
    again = tmp_path / "out" / "engineered"
    for k, equal in ((0, True), (1, False), (2, False)):
        name = f"lightgbm_fold_{k}_seed_0.txt"
        assert ((again / name).read_bytes() == (fitted / name).read_bytes()) == equal
    scores = [
        pl.read_parquet(root / "oof.parquet").filter(fold=0)["lightgbm_seed_0"]
        for root in (again, fitted)
    ]
    assert scores[0].equals(scores[1])


def test_shuffled_labels_give_chance(data: Path, embeddings: Path, tmp_path: Path) -> None:
    table = train_table(data)
    shuffled = table.with_columns(
        table["target"].sample(fraction=1, shuffle=True, seed=1).alias("target")
    )
    root = with_train(data, tmp_path / "shuffled", shuffled)
    plan = draw_folds(shuffled, 3, 42)
    test = pl.read_csv(data / "test-metadata.csv", infer_schema=False)
    test.write_csv(root / "test-metadata.csv")
    label_free = write_embeddings(tmp_path / "embeddings" / "blind", root, plan, strength=0.0)
    fit_ensemble(
        fit_settings(root, tmp_path / "out", features="multimodal", embeddings=label_free, seeds=2)
    )
    scores = json.loads((tmp_path / "out" / "multimodal_blind" / "scores.json").read_text())
    assert 0.38 < scores["blend"]["auc"] < 0.62


def test_two_fits_give_the_same_bytes_whatever_the_threads_and_the_order_of_rows(
    fitted: Path, data: Path, tmp_path: Path
) -> None:
    fit_ensemble(
        fit_settings(data, tmp_path / "threads", features="engineered", seeds=2, num_threads=3)
    )
    assert files(tmp_path / "threads" / "engineered") == files(fitted)
    mixed = with_train(
        data, tmp_path / "mixed", train_table(data).sample(fraction=1, shuffle=True, seed=4)
    )
    fit_ensemble(fit_settings(mixed, tmp_path / "order", features="engineered", seeds=2))
    again, before = files(tmp_path / "order" / "engineered"), files(fitted)
    differing = {name for name in before if again[name] != before[name]}
    assert differing == {"ensemble.json"}  # it has the digest of the metadata file


def test_another_seed_gives_other_boosters(fitted: Path, data: Path, tmp_path: Path) -> None:
    fit_ensemble(fit_settings(data, tmp_path, features="engineered", seed=7))
    other = pl.read_parquet(tmp_path / "engineered" / "oof.parquet")
    assert "lightgbm_seed_7" in other.columns
    assert not other["blend"].equals(pl.read_parquet(fitted / "oof.parquet")["blend"])


def test_a_second_fit_into_the_folder_leaves_nothing_of_the_first(
    data: Path, tmp_path: Path
) -> None:
    root = tmp_path / "numeric"
    fit_ensemble(fit_settings(data, tmp_path, features="numeric", seeds=2, num_rounds=2))
    before = {path.name: path.read_bytes() for path in root.iterdir()}
    for other, words in (
        ({"seeds": 1}, "settings.seeds = 2, now it is 1"),
        ({"lightgbm": {"max_depth": 3}}, "parameters.lightgbm.max_depth = 4, now it is 3"),
        ({"libraries": "lightgbm,xgboost"}, "weights.xgboost = None, now it is 1.0"),
    ):
        with pytest.raises(
            UserError, match=f"{words}; choose another --name, or replace it with --force"
        ):
            fit_ensemble(
                fit_settings(
                    data, tmp_path, features="numeric", **{"seeds": 2, "num_rounds": 2} | other
                )
            )
    fit_ensemble(fit_settings(data, tmp_path, features="numeric", seeds=2, num_rounds=2))
    assert before == {path.name: path.read_bytes() for path in root.iterdir()}
    fit_ensemble(
        fit_settings(data, tmp_path, features="numeric", seeds=1, num_rounds=2, force=True)
    )
    assert not (root / "lightgbm_fold_0_seed_1.txt").exists()


def test_categories_alone_are_features_enough(data: Path, tmp_path: Path) -> None:
    fit_ensemble(fit_settings(data, tmp_path, features="sex", num_rounds=2))
    assert (tmp_path / "sex" / "ensemble.json").is_file()


def test_an_output_folder_that_is_a_file_is_a_sentence(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"cannot write .*; choose another output folder"):
        fit_ensemble(fit_settings(data, tmp_path / "file", features="sex", num_rounds=2))


def test_the_image_score_alone_and_with_the_rest(
    data: Path, embeddings: Path, tmp_path: Path
) -> None:
    for features in ("image", "raw", "multimodal"):
        fit_ensemble(fit_settings(data, tmp_path, features=features, embeddings=embeddings))
    image, raw, both = (
        json.loads((tmp_path / name / "scores.json").read_text())["blend"]["auc"]
        for name in ("image_tiny", "raw", "multimodal_tiny")
    )
    assert both > max(image, raw) and not list((tmp_path / "image_tiny").glob("lightgbm*"))
    manifest = json.loads((tmp_path / "multimodal_tiny" / "ensemble.json").read_text())
    assert manifest["embeddings"]["config"] == "tiny"
    state = json.loads((tmp_path / "multimodal_tiny" / "state.json").read_text())
    assert state["names"][-2:] == ["image_score", "image_score_patient_diff"] and set(
        state["image"]
    ) == {"0", "1", "2"}


def test_the_embeddings_fold_plan_is_the_one_used(data: Path, tmp_path: Path) -> None:
    plan = draw_folds(train_table(data), 4, 9)
    embeddings = write_embeddings(tmp_path / "four", data, plan)
    chosen = {"features": "numeric", "embeddings": embeddings, "num_folds": None}
    fit_ensemble(fit_settings(data, tmp_path, **chosen, num_rounds=2))
    assert read_folds(tmp_path / "numeric" / "folds.parquet").digest == plan.digest


def test_fold_scores_are_standardised_each_by_its_own_fold() -> None:
    ids = [f"ISIC_{i}" for i in range(6)]
    logits = pl.DataFrame(
        {
            "isic_id": ids,
            "fold": pl.Series([0, 0, 0, 1, 1, 1], dtype=pl.Int8),
            "logit": [1.0, 2.0, 3.0, -20.0, -10.0, 0.0],
        }
    )
    scaler = fit_logit_scaler(logits)
    assert scaler.folds == {0: (2.0, 1.0), 1: (-10.0, 10.0)}
    metadata = pl.DataFrame({"isic_id": ids[::-1], "patient_id": ["p", "p", "q", "q", "q", "r"]})
    found = image_features(logits, scaler, metadata)
    assert found["isic_id"].to_list() == ids[::-1]
    assert found["image_score"].to_list() == [1, 0, -1, 1, 0, -1]
    assert found["image_score_patient_diff"].to_list() == pytest.approx([0.5, -0.5, -1, 1, 0, 0])


def test_negatives_are_drawn_only_where_there_are_more_than_wanted() -> None:
    target = np.array([1] * 3 + [0] * 50)
    rows = np.arange(1, 53)
    drawn = undersample(target, rows, 5, (0, 0))
    assert (
        drawn[:2].tolist() == [1, 2]
        and len(drawn) == 12
        and len(set(drawn)) == 12
        and drawn.max() < 53
    )
    assert undersample(target, rows, 5, (0, 0)).tolist() == drawn.tolist()
    assert undersample(target, rows, 5, (1, 0)).tolist() != drawn.tolist()
    assert undersample(target, rows, 100, (0, 0)).tolist() == rows.tolist()
    assert (
        target[undersample(target, rows, 0.01, (0, 0))].sum()
        == 2
        < len(undersample(target, rows, 0.01, (0, 0)))
    )


def test_min_data_is_in_proportion_to_the_rows() -> None:
    assert [min_data(n) for n in (10, 700, 10_000, 31_700, 320_000)] == [10, 10, 27, 85, 85]


@pytest.fixture(scope="module")
def booster_texts() -> dict[str, str]:
    """A booster of every library that knows the sign of the first of four columns."""
    parts = {
        name: (*library_rows(), list("abcd"), parameters_of(name, {"num_rounds": 20}), 0)
        for name in LIBRARIES
    }
    return {name: LIBRARIES[name].fit(*arguments) for name, arguments in parts.items()}


def library_rows() -> tuple[np.ndarray, np.ndarray]:
    matrix = np.random.default_rng(0).standard_normal((300, 4)).astype(np.float32)
    return matrix, (matrix[:, 0] > 0).astype(np.int8)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_booster_read_back_scores_the_same_whatever_the_batch(
    booster_texts: dict[str, str], library: str
) -> None:
    matrix, target = library_rows()
    predict = LIBRARIES[library].load(booster_texts[library])
    whole = predict(matrix, 2)
    assert (
        np.array_equal(whole[5:6], predict(matrix[5:6], 1))
        and whole[target == 1].min() > whole[target == 0].max()
    )
    assert whole.dtype == np.float64 and whole.min() >= 0 and whole.max() <= 1


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_same_seed_gives_the_same_text_and_another_another(
    booster_texts: dict[str, str], library: str
) -> None:
    arguments = (*library_rows(), list("abcd"), parameters_of(library, {"num_rounds": 20}))
    assert (
        LIBRARIES[library].fit(*arguments, 0)
        == booster_texts[library]
        != LIBRARIES[library].fit(*arguments, 1)
    )


@pytest.mark.parametrize("cut", [0, 30, 0.5])
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_booster_cut_short_is_refused(
    booster_texts: dict[str, str], library: str, cut: float, tmp_path: Path
) -> None:
    """Half a file makes each of the libraries abort, so one that gets that far would end these tests."""
    text = booster_texts[library]
    kept = {0: "", 30: text[:-30], 0.5: text[: len(text) // 2]}[cut]
    (tmp_path / "model").write_text(kept)
    with pytest.raises(UserError, match="model does not load"):
        read_booster(tmp_path / "model", library)
    with pytest.raises(UserError, match="is missing"):
        read_booster(tmp_path / "gone", library)


def test_a_fold_of_one_class_has_no_score_of_its_own() -> None:
    summary = summarise(
        np.array([0, 1, 0, 0]),
        np.array([0.1, 0.9, 0.2, 0.3]),
        np.array([0, 0, 1, 1]),
        np.array(list("abcd")),
    )
    assert summary["pauc"] == pytest.approx(0.2) and summary["pauc_by_fold"] == [
        pytest.approx(0.2),
        None,
    ]
    assert summary["pauc_std"] is None


def test_all_finished_ensembles_of_a_folder_in_one_table(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show_scores(ScoresSettings(output_dir=fitted.parent))
    assert "engineered" in capsys.readouterr().out
    broken = Path(shutil.copytree(fitted, tmp_path / "broken"))
    clear_ensemble(broken)
    with pytest.raises(UserError, match="holds no finished ensemble"):
        show_scores(ScoresSettings(output_dir=tmp_path))
    with pytest.raises(UserError, match="holds no finished ensemble"):
        show_scores(ScoresSettings(output_dir=fitted))


def test_a_blank_column_is_noted_and_fitting_goes_on(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blank = train_table(data).with_columns(
        pl.lit(None).alias("age_approx"), pl.lit(None).alias("sex")
    )
    fit_ensemble(
        fit_settings(
            with_train(data, tmp_path / "blank", blank), tmp_path, features="raw", num_rounds=2
        )
    )
    assert (
        "note: 2 features are blank in every row, the first is age_approx"
        in capsys.readouterr().out
    )


BAD_TABLES = {
    "lacks the column tbp_lv_H": lambda t: t.drop("tbp_lv_H"),
    "lacks the column patient_id": lambda t: t.drop("patient_id"),
    "lacks the column target": lambda t: t.drop("target"),
    "every target is 0": lambda t: t.with_columns(target=pl.lit(0)),
    "2 patients with a positive row are too few for 3 folds": lambda t: t.with_columns(
        target=pl.col("patient_id")
        .is_in(t.filter(target=1)["patient_id"].unique().sort()[:2].implode())
        .cast(pl.Int8)
    ),
    "too few for 3 folds": lambda t: t.with_columns(patient_id=pl.lit("IP_1")),
    "every target is 1": lambda t: t.filter(target=1)[:1],
    "must hold finite numbers": lambda t: t.with_columns(tbp_lv_H=pl.lit(float("inf"))),
}


@pytest.mark.parametrize("message", BAD_TABLES)
def test_bad_tables_are_refused(data: Path, tmp_path: Path, message: str) -> None:
    root = with_train(data, tmp_path / "bad", BAD_TABLES[message](train_table(data)))
    with pytest.raises(UserError, match=message):
        fit_ensemble(fit_settings(root, tmp_path, features="engineered"))
    assert not (tmp_path / "engineered").exists()


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ("lesion_id", "lesion_id exists only in the training table"),
        ("engineerd", 'did you mean "engineered"'),
        ("multimodl", 'did you mean "multimodal"'),
        ("multimodal", "need --embeddings"),
        ("image", "need --embeddings"),
        ("raw,aligned", "need --embeddings"),
        ("raw,frozen", "need --frozen"),
    ],
)
def test_bad_features_are_refused(data: Path, tmp_path: Path, features: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fit_ensemble(fit_settings(data, tmp_path, features=features))


def test_embeddings_that_lack_rows_are_refused(data: Path, tmp_path: Path) -> None:
    root = write_embeddings(tmp_path / "gaps", data)
    path = shard_path(root, "train", 1, 0)
    part = pl.read_parquet(path)
    part[3:].write_parquet(path)
    missing = sorted(part["isic_id"][:3])
    message = f"lacks the train embeddings of 3 of 400 images, the first is {missing[0]} for fold 1"
    with pytest.raises(UserError, match=message):
        fit_ensemble(fit_settings(data, tmp_path, features="multimodal", embeddings=root))
    skipped = pl.DataFrame({"isic_id": missing, "reason": ["truncated JPEG"] * 3})
    skipped.write_parquet(root / "train" / "errors.parquet")
    fit_ensemble(fit_settings(data, tmp_path, features="multimodal", embeddings=root, num_rounds=2))
    fit_ensemble(fit_settings(data, tmp_path, features="image", embeddings=root))


def test_embeddings_of_another_fold_plan_are_refused(data: Path, tmp_path: Path) -> None:
    root = write_embeddings(tmp_path / "other", data)
    write_run(root, "train", draw_folds(train_table(data), 3, 1))
    with pytest.raises(UserError, match="were made with the fold plan"):
        fit_ensemble(fit_settings(data, tmp_path, features="image", embeddings=root))


def test_logits_that_are_not_numbers_or_stand_twice_are_refused(data: Path, tmp_path: Path) -> None:
    root = write_embeddings(tmp_path / "nan", data)
    path = shard_path(root, "train", 0, 0)
    part = pl.read_parquet(path)
    pl.concat([part, part[:1]]).write_parquet(path)
    with pytest.raises(UserError, match="has more than one train logit of fold 0"):
        fit_ensemble(fit_settings(data, tmp_path, features="image", embeddings=root))
    part.with_columns(pl.lit(float("nan"), dtype=pl.Float32).alias("logit")).write_parquet(path)
    with pytest.raises(UserError, match="train logits are not finite"):
        fit_ensemble(fit_settings(data, tmp_path, features="image", embeddings=root))


def test_a_dataset_of_ids_targets_and_patients_can_be_scored_by_its_images(
    data: Path, tmp_path: Path
) -> None:
    plain = with_train(
        data, tmp_path / "plain", train_table(data).select(schema.ID, schema.TARGET, schema.PATIENT)
    )
    Dataset(data).metadata("test").select(schema.ID).write_csv(plain / "test-metadata.csv")
    fit_ensemble(
        fit_settings(
            plain, tmp_path, features="image", embeddings=write_embeddings(tmp_path / "e", plain)
        )
    )
    assert (tmp_path / "image_e" / "ensemble.json").is_file()


def test_real_rows_beat_the_known_baseline_of_raw_numbers(real_data: Path, tmp_path: Path) -> None:
    fit_ensemble(
        fit_settings(
            real_data / "real-tabular", tmp_path, features="numeric", num_folds=5, num_rounds=200
        )
    )
    assert json.loads((tmp_path / "numeric" / "scores.json").read_text())["blend"]["auc"] > 0.92


def test_settings_that_contradict_the_fold_plan_are_refused(
    data: Path, embeddings: Path, tmp_path: Path
) -> None:
    pinned = with_train(data, tmp_path / "pinned", train_table(data))
    draw_folds(train_table(data), 3, 7).write(pinned / "folds.parquet")
    image = {"features": "image", "embeddings": embeddings}
    for root, given in ((data, image), (pinned, {"features": "tbp_lv_H"})):
        for contradiction in ({"num_folds": 5}, {"num_folds": 3, "split_seed": 8}):
            with pytest.raises(UserError, match=r"folds\.parquet .*; leave --\w+ out"):
                fit_ensemble(fit_settings(root, tmp_path / "out", **given, **contradiction))
    assert not (tmp_path / "out").exists()


def test_the_manifest_records_the_folds_that_were_used(data: Path, tmp_path: Path) -> None:
    pinned = with_train(data, tmp_path / "pinned", train_table(data))
    draw_folds(train_table(data), 4, 7).write(pinned / "folds.parquet")
    recorded = {}
    for name, root, given in (
        ("plan", pinned, {"num_folds": None}),
        ("same", pinned, {"num_folds": 4, "split_seed": 7}),
        ("drawn", data, {"split_seed": 7}),
        ("default", data, {"num_folds": None}),
    ):
        chosen = {"features": "tbp_lv_H", "num_rounds": 2, "name": name}
        fit_ensemble(fit_settings(root, tmp_path / "out", **chosen, **given))
        manifest = json.loads((tmp_path / "out" / name / "ensemble.json").read_text())
        used = manifest["settings"]
        recorded[name] = (used["num_folds"], used.get("split_seed"))
    assert recorded == {"plan": (4, None), "same": (4, None), "drawn": (3, 7), "default": (5, 42)}


def test_the_manifest_has_the_lesions_per_patient(fitted: Path, data: Path) -> None:
    counts = sorted(train_table(data)["patient_id"].value_counts()["count"])
    described = json.loads((fitted / "ensemble.json").read_text())["lesions_per_patient"]
    assert described["patients"] == len(counts) == 40
    percentiles = described["percentiles"]
    assert (percentiles["0"], percentiles["100"]) == (counts[0], counts[-1])
    assert percentiles["5"] == counts[1] and percentiles["50"] == counts[19]


def test_a_patient_of_few_lesions_is_noted_beside_the_top_15(fitted: Path) -> None:
    summary = json.loads((fitted / "scores.json").read_text())["blend"]
    assert 0 < summary["patients_of_at_most_15"] < summary["patients_with_malignant"]
    sentence = "have at most 15 lesions, so theirs count as found in the top 15 whatever their"
    assert format_scores({"blend": summary}).count(sentence) == 1
    assert sentence not in format_scores({"blend": {**summary, "patients_of_at_most_15": 0}})


def test_scores_of_another_version_are_left_out_with_a_warning(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("old", "new"):
        shutil.copytree(fitted, tmp_path / name)
    path = tmp_path / "old" / "ensemble.json"
    path.write_text(path.read_text().replace('"format": 4', '"format": 3'))
    show_scores(ScoresSettings(output_dir=tmp_path))
    shown = capsys.readouterr()
    assert "\nnew " in shown.out and "\nold " not in shown.out
    assert f"warning: {tmp_path / 'old'} was fitted by another version" in shown.err


def test_a_folder_of_something_else_is_not_written_into(data: Path, tmp_path: Path) -> None:
    """A trained run has a fold plan too, and a dataset would take one for its own."""
    run = tmp_path / "demo"
    run.mkdir()
    (run / "folds.parquet").write_bytes(b"the plan of a run")
    with pytest.raises(UserError, match=r"folds\.parquet exists and was not written by this"):
        fit_ensemble(fit_settings(data, tmp_path, name="demo", features="raw"))
    assert (run / "folds.parquet").read_bytes() == b"the plan of a run"
    own = Path(shutil.copytree(data, tmp_path / "own"))
    with pytest.raises(UserError, match="holds a dataset; choose another --output_dir or --name"):
        fit_ensemble(fit_settings(data, tmp_path, name="own", features="raw"))
    assert sorted(path.name for path in own.iterdir()) == sorted(p.name for p in data.iterdir())


def test_a_fit_that_was_killed_is_repeated(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("infer.ensemble.fit.write_ensemble_manifest", killed)
        fit_ensemble(fit_settings(data, tmp_path, name="raw", features="raw", num_rounds=2))
    assert (tmp_path / "raw" / "oof.parquet").is_file()
    fit_ensemble(fit_settings(data, tmp_path, name="raw", features="raw", num_rounds=2))
    assert not (tmp_path / "raw" / "begun.json").exists()
