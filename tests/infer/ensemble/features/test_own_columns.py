"""Own columns from fit to submission: definitions, tables, and columns that are refused."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from infer.ensemble.features.own_tables import (
    IMPLAUSIBLE_AUC,
    read_test_tables,
    read_train_tables,
    separation,
)
from infer.ensemble.lesions import patient_codes
from infer.ensemble.predict import predict_submission
from infer.ensemble.rows import read_rows
from infer.ensemble.settings import PredictSettings
from isic import schema
from isic.dataset import Dataset
from isic.features import FEATURES, compute
from isic.folds import draw_folds
from isic.runtime.errors import UserError, collect_warnings
from isic.runtime.files import sha256
from tests.support.commands import Cli
from tests.support.ensembles import (
    NUM_FOLDS,
    fit_settings,
    fit_small,
    read_blend,
    shuffle_targets,
    train_table,
    write_train,
)

MINE = """
norm_L: {expr: (tbp_lv_stdL + tbp_lv_color_std_mean) / tbp_lv_L, relative: [patient_z]}
place: CONCAT(sex, '_', anatom_site_general)
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(MINE)
    return path


def own_table(data: Path, split: str = "train") -> pl.DataFrame:
    """Return values by id: a number with blanks, a text, and in training the fold."""
    rows = Dataset(data).metadata(split)
    random = np.random.default_rng(8)
    number = pl.Series(random.standard_normal(len(rows)))
    table = rows.select(
        schema.ID,
        distance=pl.when(number > -1).then(number),
        group=pl.when(number > 0).then(pl.lit("far")).otherwise(pl.lit("near")),
    )
    return table if split == "test" else table.with_columns(plan(data).alias("fold"))


def plan(data: Path) -> pl.Series:
    table = train_table(data)
    return draw_folds(table, NUM_FOLDS, 42).of(table)


def predict(root: Path, data: Path, output: Path, **more: object) -> pl.DataFrame:
    settings = PredictSettings.model_validate(
        {"ensemble": root, "data": data, "output": output, **more}
    )
    predict_submission(settings)
    return pl.read_csv(output)


def test_a_fitted_ensemble_needs_no_file_of_definitions(
    data: Path, mine: Path, tmp_path: Path
) -> None:
    (tmp_path / "some.txt").write_text("sex\ntbp_lv_H\n")
    features = f"@{tmp_path}/some.txt,mine"
    root = fit_small(data, tmp_path / "out", features=features, define=str(mine))
    assert root.name == "some+mine"
    manifest = json.loads((root / "ensemble.json").read_text())
    assert manifest["definitions"]["mine"]["place"] == "CONCAT(sex, '_', anatom_site_general)"
    state = json.loads((root / "state.json").read_text())
    assert state["names"] == ["tbp_lv_H", "sex", "norm_L", "norm_L_patient_z", "place"]
    assert "place" in state["encodings"]["0"]["categories"]
    mine.unlink()
    (tmp_path / "some.txt").unlink()
    scores = predict(root, data, tmp_path / "s.csv")["target"]
    assert scores.n_unique() > 10


def test_changed_definitions_are_another_ensemble(data: Path, mine: Path, tmp_path: Path) -> None:
    chosen = {"features": "sex,mine", "define": str(mine), "num_rounds": 2}
    fit_small(data, tmp_path, **chosen)
    fit_small(data, tmp_path, **chosen)
    mine.write_text(MINE.replace("'_'", "'-'"))
    with pytest.raises(UserError, match=r"definitions\.mine\.place = CONCAT.*choose another"):
        fit_small(data, tmp_path, **chosen)


def test_few_lesions_are_noticed_with_relative_definitions(
    data: Path, mine: Path, tmp_path: Path
) -> None:
    chosen = {"define": str(mine), "num_rounds": 2}
    relative = fit_small(data, tmp_path / "a", features="mine", **chosen)
    alone = fit_small(data, tmp_path / "b", features="mine,-norm_L_patient_z", **chosen)
    one = tmp_path / "one"
    one.mkdir()
    Dataset(data).metadata("test")[:1].write_csv(one / "test-metadata.csv")
    predict(alone, one, tmp_path / "s.csv", few="refuse")
    with pytest.raises(UserError, match="fewer than"):
        predict(relative, one, tmp_path / "s.csv", few="refuse")


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_table_is_used_in_fit_and_predict(data: Path, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"scores.{ending}"
    write(own_table(data).sample(fraction=1, shuffle=True, seed=1), path)
    root = fit_small(data, tmp_path, features="sex,scores", tables=f"oof:{path}")
    manifest = json.loads((root / "ensemble.json").read_text())
    kinds = {"distance": "number", "group": "category"}
    assert manifest["tables"]["scores"] == {
        "kind": "oof",
        "columns": kinds,
        "sha256": sha256(path),
    }
    test = tmp_path / "test" / f"scores.{ending}"
    test.parent.mkdir()
    write(own_table(data, "test"), test)
    first = predict(root, data, tmp_path / "s.csv", tables=str(test))
    written = json.loads((tmp_path / "s.csv.json").read_text())
    assert written["tables"] == {"scores": sha256(test)}
    write(own_table(data, "test").with_columns(pl.col("distance") + 9), test)
    assert not first.equals(predict(root, data, tmp_path / "s.csv", tables=f"oof:{test}"))


def noise(data: Path, split: str, factor: float = 1.0) -> pl.DataFrame:
    """Return normally distributed values `m` by id, of `factor` as deviation."""
    ids = Dataset(data).metadata(split)[schema.ID]
    random = np.random.default_rng(len(ids))
    return pl.DataFrame({schema.ID: ids, "m": factor * random.standard_normal(len(ids))})


def names_drift(data: Path, root: Path, output: Path, tables: tuple[Path, ...] = ()) -> bool:
    """Score the test rows. Returns whether `m` of `mine` is warned of, and checks the table."""
    with collect_warnings() as messages:
        predict(root, data, output, tables=list(map(str, tables)))
    drift = pl.read_parquet(output.with_name(f"{output.stem}_drift.parquet"))
    differs = drift.filter(column="mine.m")["differs"].item()
    assert differs == any("chance explains in mine.m" in message for message in messages)
    return bool(differs)


@pytest.mark.parametrize(
    ("kind", "factor", "differs"),
    [
        ("label_free", 1, False),
        ("label_free", 100, True),
        ("label_free", 0.01, True),
        ("oof", 1, False),
        ("oof", 0.6, False),  # as a mean over folds
        ("oof", 100, True),
        ("oof", 0.01, True),
    ],
)
def test_a_table_on_another_scale_is_noticed(
    data: Path, tmp_path: Path, kind: str, factor: float, differs: bool
) -> None:
    train = noise(data, "train").with_columns(plan(data).alias("fold"))
    path = write(train if kind == "oof" else train.drop("fold"), tmp_path / "mine.csv")
    chosen = {"features": "sex,mine", "tables": f"{kind}:{path}", "num_rounds": 2}
    root = fit_small(data, tmp_path, **chosen)
    (tmp_path / "test").mkdir()
    test = write(noise(data, "test", factor), tmp_path / "test" / "mine.csv")
    assert names_drift(data, root, tmp_path / "s.csv", (test,)) == differs


@pytest.mark.parametrize("factor", [1, 100])
def test_a_defined_column_on_another_scale_is_noticed(
    data: Path, tmp_path: Path, factor: float
) -> None:
    """Its inputs may be columns that only this dataset has, which are not compared themselves."""
    changed = tmp_path / "data"
    changed.mkdir()
    for split, times in (("train", 1.0), ("test", factor)):
        table = pl.read_csv(data / f"{split}-metadata.csv", infer_schema=False)
        gauge = noise(data, split, times)["m"].alias("gauge")
        table.with_columns(gauge).write_csv(changed / f"{split}-metadata.csv")
    path = tmp_path / "mine.yaml"
    path.write_text("m: {expr: CAST(gauge AS DOUBLE), relative: [patient_z]}")
    chosen = {"features": "sex,mine", "define": str(path), "num_rounds": 2}
    root = fit_small(changed, tmp_path, **chosen)
    assert names_drift(changed, root, tmp_path / "s.csv") == (factor == 100)


@pytest.mark.parametrize("missing", ["NA", "nan", " NULL ", "-"])
def test_a_text_that_means_no_value_is_a_blank(data: Path, tmp_path: Path, missing: str) -> None:
    """As R and pandas write blanks (`write.csv`, `to_csv(na_rep="NA")`)."""
    scores = []
    for name, null_value in (("blank", ""), ("words", missing)):
        train, test = (tmp_path / name / split / "scores.csv" for split in ("train", "test"))
        for path, split in ((train, "train"), (test, "test")):
            path.parent.mkdir(parents=True)
            table = own_table(data, split).drop("fold", strict=False)
            table.write_csv(path, null_value=null_value)
        chosen = {"features": "sex,scores", "num_rounds": 5}
        root = fit_small(data, tmp_path / name, **chosen, tables=f"label_free:{train}")
        table = json.loads((root / "ensemble.json").read_text())["tables"]["scores"]
        assert table["columns"] == {"distance": "number", "group": "category"}
        scores.append(predict(root, data, tmp_path / "s.csv", tables=str(test)))
    assert scores[0].equals(scores[1])


@pytest.mark.parametrize(
    ("values", "warning"),
    [
        ([f"{row},5" for row in range(99)] + ["NA"], 'are different.* such as "0,5"'),
        (["0.25", "0.5", "0.75"] * 33 + ["failed"], 'are numbers.* "failed" blank'),
        ([f"{row / 7}" if row % 7 else "not done" for row in range(99)], '"not done" blank'),
        ([f"{row / 7}" if row % 9 > 3 else "-1 cm" for row in range(99)], '"-1 cm" blank'),
        ([f"{row / 7}" if row % 9 > 4 else "not done" for row in range(99)], None),
        (["NA"] * 50, "has no values"),
        (["+", "-", "unclear"] * 50, r'has "\+", which counts as blank'),
        (["yes", "none", "NA"] * 50, 'has "none", which counts as blank'),
        (["yes", "no", "NA", "nan"] * 25, None),
        (["1", "2", "3a", "3b"] * 25, None),
        ([f"place {row}" for row in range(20)], None),
    ],
    ids=[
        *("decimal commas", "another word", "a seventh", "four ninths", "five ninths"),
        *("blanks", "signs", "none", "usual blanks", "codes", "few rows"),
    ],
)
def test_texts_that_are_hardly_categories_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], values: list[str], warning: str | None
) -> None:
    path = tmp_path / "mine.csv"
    ids = [f"ISIC_{row}" for row in range(len(values))]
    pl.DataFrame({"isic_id": ids, "x": values}).write_csv(path)
    read_train_tables([f"label_free:{path}"])
    warned = capsys.readouterr().err
    assert re.search(f"column x.* {warning}", warned) if warning else not warned


NUMBERS = np.arange(300) % 60
COMPUTED = NUMBERS / 10 + np.arange(300) / 7 - np.arange(300) / 7  # the last digits are noise


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize(
    ("values", "left"),
    [
        (1_600_000_000 + NUMBERS, "60 different numbers, which are 1 after"),
        (1_600_000_000.0 + NUMBERS, "60 different numbers, which are 1 after"),
        (2**24 + NUMBERS, "60 different numbers, which are 31 after"),
        (1_600_000_000 + 86_400 * NUMBERS, None),
        (NUMBERS / 7, None),
        (COMPUTED, None),
        (np.random.default_rng(0).standard_normal(300), None),
    ],
    ids=["codes", "floats", "half", "days", "small", "computed", "normal"],
)
def test_numbers_that_are_equal_in_32_bits_are_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    values: NDArray[np.generic],
    left: str | None,
    ending: str,
) -> None:
    ids = [f"ISIC_{row}" for row in range(len(values))]
    path = write(pl.DataFrame({"isic_id": ids, "x": values}), tmp_path / f"big.{ending}")
    read_train_tables([f"label_free:{path}"])
    warned = capsys.readouterr().err
    assert f"column x has {left}" in warned if left else not warned


def write(table: pl.DataFrame, path: Path) -> Path:
    if path.suffix == ".csv":
        table.write_csv(path)
    else:
        table.write_parquet(path)
    return path


@pytest.mark.parametrize("words", ["true false", "True False", "TRUE FALSE", "1 0"])
def test_booleans_may_be_words_in_the_rows_to_score(tmp_path: Path, words: str) -> None:
    """As polars, pandas and R write them, after a fit on a Parquet file."""
    ids = [f"ISIC_{row}" for row in range(4)]
    train = pl.DataFrame({"isic_id": ids, "x": [True, False, None, True]})
    fitted = read_train_tables([f"label_free:{write(train, tmp_path / 'mine.parquet')}"])["mine"]
    yes, no = words.split()
    test = write(train.with_columns(x=pl.Series([yes, no, "", yes])), tmp_path / "mine.csv")
    found = read_test_tables([str(test)], {"mine": fitted.spec})["mine"]
    assert found.rows.equals(fitted.rows)
    assert found.rows["x"].to_list() == [1, 0, None, 1]


def test_a_table_of_another_plan_is_refused(data: Path, tmp_path: Path) -> None:
    """As a table with in-sample scores would be: its folds are not those of the plan."""
    table = train_table(data)
    known = table.select(schema.ID, knows=pl.col(schema.TARGET) + 0.0)
    for fold in (
        draw_folds(table, NUM_FOLDS, 7).of(table),
        plan(data).set(pl.Series(np.arange(len(table)) == 5), 9),
        pl.Series([None] * len(table)).cast(pl.Int8),
        pl.Series(["first"] * len(table)),
    ):
        path = tmp_path / "known.parquet"
        known.with_columns(fold.alias("fold")).write_parquet(path)
        with pytest.raises(UserError, match="another fold than in the fold plan"):
            fit_small(data, tmp_path / "out", features="sex,known", tables=f"oof:{path}")
    known.write_parquet(path)
    with pytest.raises(UserError, match="declared oof but has no column `fold`"):
        fit_small(data, tmp_path / "out", features="sex,known", tables=f"oof:{path}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["fold", "Fold", "FOLD"])
def test_a_column_of_folds_belongs_to_an_oof_table_in_any_case(
    data: Path, tmp_path: Path, name: str
) -> None:
    path = write(own_table(data).rename({"fold": name}), tmp_path / "scores.csv")
    with pytest.raises(UserError, match=f"declared label_free but has a column {name}; declare"):
        read_train_tables([f"label_free:{path}"])
    table = read_train_tables([f"oof:{path}"])["scores"]
    assert list(table.spec.columns) == ["distance", "group"]
    assert "fold" in table.rows.columns
    write(own_table(data).with_columns(plan(data).alias("fOLD")), path)
    with pytest.raises(UserError, match="has the columns fold and fOLD; remove"):
        read_train_tables([f"oof:{path}"])


BAD_TABLES = {
    "does not say how: write oof:": ("", lambda t: t),
    "exists only in the training table": ("oof:", lambda t: t.with_columns(target=0)),
    "a column Iddx_1, which exists only": ("label_free:", lambda t: t.with_columns(Iddx_1=0)),
    "duplicate isic_id": ("oof:", lambda t: pl.concat([t, t[:1]])),
    "lacks 1 of the 400 rows, the first is": ("label_free:", lambda t: t[1:]),
    "lacks the column isic_id": ("oof:", lambda t: t.drop("isic_id")),
    'the name "tbp_lv_H" of an own column': ("oof:", lambda t: t.with_columns(tbp_lv_H=0)),
    'the name "patient_id" of an own': ("oof:", lambda t: t.with_columns(patient_id=0)),
    'the name "image_score" of an own': ("oof:", lambda t: t.with_columns(image_score=0)),
    "has no column but isic_id and fold": ("oof:", lambda t: t.select("isic_id", "fold")),
    'has a column "a b"': ("oof:", lambda t: t.with_columns(pl.lit(1).alias("a b"))),
    "holds Date": ("oof:", lambda t: t.with_columns(x=pl.date(2020, 1, 1))),
}


@pytest.mark.parametrize("message", BAD_TABLES)
def test_bad_tables_are_refused(data: Path, tmp_path: Path, message: str) -> None:
    kind, change = BAD_TABLES[message]
    path = tmp_path / "scores.parquet"
    table = change(own_table(data))
    (table.drop("fold") if kind == "label_free:" else table).write_parquet(path)
    with pytest.raises(UserError, match=message):
        fit_small(data, tmp_path / "out", features="sex,scores", tables=f"{kind}{path}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["raw", "image", "sex", "a,b", "a b"])
def test_names_of_files_that_are_taken_are_refused(data: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.yaml"
    path.write_text(MINE)
    with pytest.raises(UserError, match=r"is taken|cannot be a word"):
        fit_small(data, tmp_path / "out", features="sex", define=[path])


def test_names_that_are_given_twice_are_refused(data: Path, mine: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.yaml"
    path.write_text("place: sex")
    with pytest.raises(UserError, match='"place" is given to 2 own columns'):
        fit_small(data, tmp_path, features="mine,other", define=f"{mine},{path}")
    with pytest.raises(UserError, match="two files of --define are called mine"):
        fit_small(data, tmp_path, features="mine", define=f"{mine},{mine}")
    path.write_text("")
    with pytest.raises(UserError, match="defines nothing"):
        fit_small(data, tmp_path, features="other", define=str(path))


BAD_TEST_TABLES = {
    "fitted with the table": ("other.parquet", lambda t: t),
    "lacks the column group": ("scores.parquet", lambda t: t.drop("group")),
    "column group holds": ("scores.parquet", lambda t: t.with_columns(group=1.0)),
    "column distance must hold numbers": (
        "scores.parquet",
        lambda t: t.with_columns(distance=pl.lit("near")),
    ),
    "lacks 2 of the 30 rows": ("scores.parquet", lambda t: t[2:]),
}


@pytest.mark.parametrize("message", BAD_TEST_TABLES)
def test_tables_to_score_must_be_like_those_of_the_fit(
    data: Path, tmp_path: Path, message: str
) -> None:
    path = write(own_table(data).drop("fold"), tmp_path / "scores.parquet")
    root = fit_small(data, tmp_path, features="scores", tables=f"label_free:{path}", num_rounds=2)
    with pytest.raises(UserError, match="give its values of these rows by --tables"):
        predict(root, data, tmp_path / "s.csv")
    with pytest.raises(UserError, match="declared label_free at the fit, not oof"):
        predict(root, data, tmp_path / "s.csv", tables=f"oof:{path}")
    name, change = BAD_TEST_TABLES[message]
    (tmp_path / "test").mkdir()
    bad = write(change(own_table(data, "test")), tmp_path / "test" / name)
    with pytest.raises(UserError, match=message):
        predict(root, data, tmp_path / "s.csv", tables=str(bad))
    assert not (tmp_path / "s.csv").exists()


def test_a_definition_that_reads_the_target_is_refused(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for text in ("target", "tbp_lv_H + AVG(target) OVER (PARTITION BY sex)", "COLUMNS('target')"):
        path.write_text(f'knows: "{text}"')
        with pytest.raises(UserError, match=r"reads target|by its name"):
            fit_small(data, tmp_path / "out", features="sex,mine", define=str(path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize(
    "text", ["{x: diagnosis}", "{x: {expr: LENGTH(diagnosis)}, y: x + tbp_lv_H}", "{y: diagnosis}"]
)
def test_a_definition_of_a_column_that_the_test_table_lacks_is_warned_of(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, ending: str
) -> None:
    """As far as features need it, and with a test table beside the training table."""
    table = train_table(data).with_columns(diagnosis=pl.lit("nevus"))
    root = write_train(tmp_path / "data", table)
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    chosen = {"features": "sex,mine", "define": str(path), "num_rounds": 2}
    read_rows(fit_settings(root, tmp_path, **chosen))
    write(Dataset(data).metadata("test"), root / f"test-metadata.{ending}")
    assert "reads diagnosis" not in capsys.readouterr().err
    read_rows(fit_settings(root, tmp_path, **chosen))
    words = rf"warning: .*reads diagnosis, which .*metadata.{ending} lacks"
    assert re.search(words, capsys.readouterr().err)
    path.write_text(f"{text[:-1]}, w: tbp_lv_H, z: w * hue_contrast}}")
    read_rows(fit_settings(root, tmp_path, **{**chosen, "features": "sex,z"}))
    assert "reads diagnosis" not in capsys.readouterr().err


def with_scores(data: Path, out_of_fold: bool, root: Path) -> Path:
    """Write scores of nearest neighbours, of each row from the other folds or from all rows."""
    table = train_table(data)
    fold = plan(data).to_numpy()
    numbers = table.select(schema.NUMERIC).fill_null(0).to_numpy()
    numbers = (numbers - numbers.mean(axis=0)) / (numbers.std(axis=0) + 1e-9)
    distance = np.square(numbers[:, None] - numbers[None]).sum(axis=2)
    if out_of_fold:
        distance[fold[:, None] == fold[None]] = np.inf
    nearest = distance.argmin(axis=1)
    score = table[schema.TARGET].to_numpy()[nearest].astype(float)
    path = root / "scores.parquet"
    table.select(schema.ID, neighbor=pl.Series(score), fold=pl.Series(fold)).write_parquet(path)
    return path


@pytest.mark.slow
def test_shuffled_targets_give_chance(data: Path, mine: Path, tmp_path: Path) -> None:
    """With defined columns and an honest table; a table of in-sample scores shows the leak."""
    shuffle_targets(data, tmp_path / "data")
    chosen = {"features": "raw,mine,scores", "define": str(mine), "seeds": 3}
    found = {}
    for out_of_fold in (True, False):
        path = with_scores(tmp_path / "data", out_of_fold, tmp_path)
        root = fit_small(
            tmp_path / "data", tmp_path, **chosen, tables=f"oof:{path}", name=str(out_of_fold)
        )
        found[out_of_fold] = read_blend(root)
    assert found[True]["pauc"] < 0.06  # 0.02 is chance, 0.2 perfect
    assert 0.4 < found[True]["auc"] < 0.6
    assert found[False]["auc"] > 0.95


def test_a_label_free_table_that_knows_the_target_is_noticed(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = train_table(data)
    noise = np.random.default_rng(1).standard_normal(len(table))
    target = table[schema.TARGET].to_numpy()
    path = tmp_path / "old.parquet"
    honest = {"honest": target + noise, "reverse": -target + 0.1 * noise}
    table.select(schema.ID, **{k: pl.Series(v) for k, v in honest.items()}).write_parquet(path)
    chosen = {"features": "sex,old", "num_rounds": 2}
    fit_small(data, tmp_path, **chosen, tables=f"label_free:{path}")
    warning = capsys.readouterr().err
    assert "reverse of old has an AUC of 1.000 on its own" in warning
    assert "honest" not in warning


@pytest.mark.parametrize("kind", ["oof", "label_free"])
def test_every_form_of_a_copy_of_the_target_is_noticed(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """As a number, a text with many values or a code, with the fold plan joined on."""
    table = train_table(data)
    target = table[schema.TARGET]
    code = pl.Series(np.arange(len(table)) % 12)
    columns = {
        "score": target + 0.01 * pl.Series(np.random.default_rng(1).standard_normal(len(table))),
        "dx": target.replace_strict({0: "benign", 1: "malignant"}) + " type " + code.cast(str),
        "code": 2 * code + target,
    }
    copy = table.select(schema.ID, **columns, fold=plan(data))
    path = write(copy if kind == "oof" else copy.drop("fold"), tmp_path / "old.parquet")
    fit_small(data, tmp_path, features="sex,old", num_rounds=2, tables=f"{kind}:{path}")
    warned = re.findall(r"(\w+) of old has an AUC", capsys.readouterr().err)
    assert warned == list(columns)


FOLDS = np.arange(100) % 5


def test_separation_sees_values_texts_and_blanks() -> None:
    target = np.repeat([0, 1], 50)
    text = pl.Series(["benign"] * 50 + ["malignant"] * 50)
    blank = pl.Series([None] * 50 + [1.0] * 50)
    unknown = pl.Series(np.random.default_rng(0).standard_normal(100))
    for column in (pl.Series(-target), text, blank):
        assert separation(column, target, FOLDS) == 1
    assert separation(unknown, target, FOLDS) < 0.7 < IMPLAUSIBLE_AUC
    few = slice(0, 55)  # five positives prove nothing
    assert separation(pl.Series(target[few]), target[few], FOLDS[few]) == 0.5


@pytest.mark.parametrize("num_values", [1, 2, 20, 50, 100])
def test_texts_that_know_nothing_are_not_suspected(num_values: int) -> None:
    target = np.random.default_rng(0).permutation(np.repeat([0, 1], 50))
    text = pl.Series([f"id {i % num_values}" for i in range(100)])
    assert separation(text, target, FOLDS) < 0.75
    # A fold of one class has no text that the rest would know.
    assert separation(text, np.sort(target), np.repeat([0, 1], 50)) < 0.75


def test_no_feature_of_the_real_tables_looks_like_a_copy_of_the_target(real_data: Path) -> None:
    metadata = Dataset(real_data / "real-tabular").metadata("train")
    table = compute(metadata, tuple(FEATURES)).drop(schema.ID)
    target = metadata[schema.TARGET].to_numpy()
    fold = patient_codes(metadata) % NUM_FOLDS
    highest = max(separation(column, target, fold) for column in table)
    assert highest < IMPLAUSIBLE_AUC - 0.1
    assert separation(metadata["lesion_id"], target, fold) > IMPLAUSIBLE_AUC


def test_the_commands_take_own_columns(data: Path, mine: Path, tmp_path: Path, cli: Cli) -> None:
    train = write(own_table(data), tmp_path / "scores.parquet")
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    flags = ("--data", folder, "--num_folds", NUM_FOLDS, "--seeds", 1, "--num_rounds", 5)
    own = ("--define", mine, "--tables", f"oof:{train}")
    words = ("--features", "raw,-attribution,mine,scores")
    ended = cli("infer", "fit", *flags, *own, *words, "--out", tmp_path, "--name", "own")
    assert ended.code == 0, ended.err
    assert "own columns" in (tmp_path / "own" / "report.html").read_text()
    test = tmp_path / "test" / "scores.parquet"
    test.parent.mkdir()
    write(own_table(data, "test"), test)
    paths = ("--ensemble", tmp_path / "own", "--output", tmp_path / "s.csv")
    ended = cli("infer", "predict", "--data", folder, *paths, "--tables", test)
    assert ended.code == 0, ended.err
    ended = cli("infer", "predict", "--data", folder, *paths)
    assert ended.code == 2
    assert ended.err.count("\n") == 1


def test_boosters_of_all_rows_take_own_columns(data: Path, mine: Path, tmp_path: Path) -> None:
    train = write(own_table(data), tmp_path / "scores.parquet")
    chosen = {"features": "sex,mine,scores", "define": str(mine), "tables": f"oof:{train}"}
    root = fit_small(data, tmp_path, **chosen, refit=True, num_rounds=5)
    (tmp_path / "test").mkdir()
    test = write(own_table(data, "test"), tmp_path / "test" / "scores.parquet")
    folds, everything = (
        predict(root, data, tmp_path / f"{rows}.csv", tables=str(test), rows=rows)["target"]
        for rows in ("folds", "all")
    )
    assert not folds.equals(everything)


def test_own_columns_of_other_rows_are_refused(data: Path, mine: Path, tmp_path: Path) -> None:
    small = write_train(tmp_path / "small", train_table(data).drop("tbp_lv_stdL"))
    with pytest.raises(UserError, match=r'unknown column "tbp_lv_stdL"|lacks the column'):
        fit_small(small, tmp_path, features="sex,mine", define=str(mine))
