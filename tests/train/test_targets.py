"""Auxiliary targets of rows: read from tables, checked, learned and scored."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from isic.metrics import roc_auc
from isic.runtime.errors import UserError
from tests.support.commands import TINY, Cli, tiny_settings
from tests.support.datasets import jpeg, small_table, write_hdf5
from tests.support.training import write_extra
from train.auxiliary import AuxTarget, parse_targets
from train.rows import load_data
from train.targets import (
    flag_columns,
    refuse_single_class,
    target_matrix,
    target_scores,
    with_targets,
)

PATH = Path("train-metadata.csv")


def read(values: list[object], definition: str = "x", flags: frozenset[str] | None = None) -> list:
    """Return the targets of a column `x`."""
    table = pl.DataFrame({"x": values}, strict=False)
    targets = parse_targets(f"t: {definition}")
    if flags is None:
        flags = flag_columns(table, targets, PATH)
    return with_targets(table, targets, flags, PATH)["aux.t"].to_list()


@pytest.mark.parametrize(
    ("values", "definition", "expected"),
    [
        (["IL_1", None, "", "NA", " - ", "b"], "x", [1, 0, 0, 0, 0, 1]),
        (["a Nevus", "NEVUS", None, "", "x"], "x ~ nevus", [1, 1, 0, 0, 0]),
        (["a.b", "axb"], "x ~ A.B", [1, 0]),
        ([1, 0, None], "x", [1, 0, None]),
        ([1.0, 0.0, float("nan")], "x", [1, 0, None]),
        ([True, False, None], "x", [1, 0, None]),
        (["1", "0", "", "nan"], "x", [1, 0, None, None]),
        (["TRUE", "False", "1.0", "0.0"], "x", [1, 0, 1, 0]),
        # Without a 0, a blank says no.
        (["1", None, "1"], "x", [1, 0, 1]),
        ([0, 1, 2], "x", [1, 1, 1]),
        ([0.8, None], "x", [1, 0]),
        ([10, 0, None], "x ~ 1", [1, 0, 0]),
        ([None, None], "x", [0, 0]),
    ],
)
def test_columns_become_targets(
    values: list[object], definition: str, expected: list[float | None]
) -> None:
    assert read(values, definition) == expected


def test_a_column_of_an_extra_dataset_has_the_meaning_of_the_datasets() -> None:
    """There too a blank in a column of 0 and 1 is no target."""
    assert read(["1", None], flags=frozenset({"x"})) == [1, None]
    with pytest.raises(
        UserError, match='the column x has "maybe", but only 0 and 1 in the dataset'
    ):
        read(["1", "maybe"], flags=frozenset({"x"}))
    assert read(["1", "maybe"], "x ~ may", flags=frozenset({"x"})) == [0, 1]


def test_a_column_that_is_missing_is_named_with_the_nearest() -> None:
    table = pl.DataFrame({"isic_id": ["a"], "iddx_full": ["Benign"]})
    words = 'train-metadata.csv has no column "idx_full", did you mean "iddx_full"'
    with pytest.raises(UserError, match=words):
        flag_columns(table, parse_targets("a: idx_full ~ x"), PATH)


def test_rows_without_a_target_do_not_count_in_its_score() -> None:
    targets = parse_targets("a: x; b: y; c: z")
    values = np.array([[1, 0, 0], [0, np.nan, 0], [np.nan, 1, 0], [0, 1, 0]], np.float32)
    logits = np.array([[2, 0, 1], [1, 9, 1], [-5, 1, 1], [3, -1, 1]], np.float32)
    assert target_scores(values, logits, targets) == {"auc.a": 0.5, "auc.b": 0.5}
    logits[0, 2] = np.nan
    with pytest.raises(UserError, match="auxiliary logits of held-out images are not finite"):
        target_scores(values, logits, targets)


@pytest.mark.parametrize(
    ("values", "definition", "words"),
    [
        ([0.0] * 6, "x ~ Nevuss", 'no x of a training row of fold 1 contains "Nevuss"; correct'),
        ([1.0] * 6, "x ~ e", "the target of every training row of fold 1 is 1, so"),
        # Only fold 1, which is held out, has the other class.
        ([0.0, 1.0, 0.0, 0.0, 1.0, 0.0], "x", "the target of every training row of fold 1 is 0"),
        ([None, 1.0, None, None, 0.0, None], "x", "no training row of fold 1 has a value in x"),
    ],
)
def test_a_target_of_one_class_in_training_rows_is_refused(
    values: list[float | None], definition: str, words: str
) -> None:
    table = pl.DataFrame({"aux.t": pl.Series(values, dtype=pl.Float32)})
    fold = np.array([0, 1, 2, 0, 1, -1], np.int8)
    targets = parse_targets(f"t: {definition}")
    with pytest.raises(UserError, match=f"^--aux t: {words}"):
        refuse_single_class(table, {1: fold == 1}, targets)
    mixed = table.with_columns(pl.Series("aux.t", [0, 1, 1, 1, 0, None], pl.Float32))
    refuse_single_class(mixed, {k: fold == k for k in range(3)}, targets)


@pytest.fixture
def shades(small_dataset: Path) -> Path:
    """The small dataset with a diagnosis, and a column of 0 and 1 of which a quarter is blank.

    Both follow the brightness of the images.
    """
    path = small_dataset / "train-metadata.csv"
    row = pl.int_range(pl.len())
    dark = pl.col("target") == 1
    pl.read_csv(path).with_columns(
        iddx_full=pl.when(dark).then(pl.lit("Malignant::Melanoma")).otherwise(pl.lit("Benign")),
        pale=pl.when(row % 4 > 0).then((~dark).cast(pl.Int8)),
    ).write_csv(path)
    return small_dataset


AUX = "mel: iddx_full ~ MELANOMA; pale: pale"


def test_learnable_targets_are_learned_scored_and_kept(
    shades: Path, tmp_path: Path, cli: Cli
) -> None:
    flags = ["--data", shades, "--output_dir", tmp_path, "--fold", 0, "--aux", AUX]
    more = "--epochs 12 --batch_size 16 --lr 3e-3 --lr_backbone 3e-3 --ema_decay 0.8"
    ended = cli("train", *TINY, *flags, *more.split(), "--aux_weight", 1)
    assert ended.code == 0, ended.err
    fold = tmp_path / "tiny" / "fold_0"
    last = json.loads((fold / "history.jsonl").read_text().splitlines()[-1])
    oof = pl.read_parquet(fold / "oof.parquet")
    data = load_data(tiny_settings(data=shades, output_dir=tmp_path, aux=AUX))
    known = oof.join(data.table.drop("target"), on="isic_id", suffix=".target")
    assert oof.columns == ["isic_id", "target", "fold", "logit", "aux.mel", "aux.pale"]
    assert oof.schema["aux.mel"] == pl.Float32
    for name in ("mel", "pale"):
        rows = known.filter(pl.col(f"aux.{name}.target").is_not_null())
        auc = roc_auc(rows[f"aux.{name}.target"], rows[f"aux.{name}"])
        assert last[f"auc.{name}"] == auc
        assert auc > 0.9
        assert f"of {name} {auc:.4f}, " in ended.out
    assert len(rows) < len(oof), "some rows have no target"
    assert json.loads((fold / "best_model.pth.json").read_text())["aux"] == {
        "mel": "iddx_full ~ MELANOMA",
        "pale": "pale",
    }
    events = b"".join(path.read_bytes() for path in (fold / "tensorboard").glob("*"))
    assert b"auc.pale" in events


def test_another_definition_is_refused_on_resume(shades: Path, tmp_path: Path, cli: Cli) -> None:
    flags = ["--data", shades, "--output_dir", tmp_path, "--fold", 0, "--epochs", 2]
    assert cli("train", *TINY, *flags, "--aux", AUX, "--max_hours", 1e-9).code == 75
    for aux, words in (
        ("pale: pale; mel: iddx_full ~ MELANOMA", "was made with aux=mel: iddx_full ~ MELANOMA; "),
        ("", "now it is None"),
    ):
        ended = cli("train", *TINY, *flags, "--resume", "--aux", aux)
        assert ended.code == 2
        assert words in ended.err
    weight = cli("train", *TINY, *flags, "--resume", "--aux", AUX, "--aux_weight", 2)
    assert "was made with aux_weight=None, now it is 2.0" in weight.err
    assert cli("train", *TINY, *flags, "--resume", "--aux", AUX).code == 0


@pytest.mark.parametrize(
    "flags",
    [
        "--mixup 0.4 --cutmix 1.0 --batch_size 8",
        "--positives_per_batch 3 --batch_size 8 --accumulation_steps 2 --bf16",
        "--freeze_epochs 1 --batch_size 8 --select_epoch best",
    ],
)
def test_targets_go_with_other_settings(flags: str, shades: Path, tmp_path: Path, cli: Cli) -> None:
    where = ["--data", shades, "--output_dir", tmp_path, "--fold", 0, "--epochs", 2]
    ended = cli("train", *TINY, *where, "--aux", AUX, *flags.split())
    assert ended.code == 0, ended.err
    assert pl.read_parquet(tmp_path / "tiny/fold_0/oof.parquet")["aux.pale"].is_finite().all()


@pytest.mark.parametrize(
    ("aux", "words"),
    [
        ("mel: iddx_ful ~ x", "train-metadata.csv has no column"),
        ("mel: iddx_full ~ Melanomma", 'contains "Melanomma"; correct the text'),
        ("any: iddx_full", "the target of every training row of fold 0 is 1"),
        ("mel", "has no colon"),
    ],
)
def test_a_refused_target_writes_nothing(
    aux: str, words: str, shades: Path, tmp_path: Path, cli: Cli
) -> None:
    out = tmp_path / "out"
    ended = cli("train", *TINY, "--data", shades, "--output_dir", out, "--aux", aux)
    assert ended.code == 2
    assert words in ended.err
    assert ended.err.count("\n") == 1
    assert not out.exists()


def test_rows_of_an_extra_dataset_without_the_column_have_no_target(
    shades: Path, tmp_path: Path, cli: Cli
) -> None:
    extra = write_extra(tmp_path / "old", [0, 1, 0, 1])
    run = {"data": shades, "output_dir": tmp_path, "extra_data": [extra], "aux": AUX}
    targets = target_matrix(load_data(tiny_settings(**run)).table, parse_targets(AUX))
    assert targets.dtype == np.float32
    assert targets.shape == (64, 2)
    assert np.isnan(targets[60:]).all()
    assert np.isnan(targets[:60]).sum(axis=0).tolist() == [0, 15]
    flags = ["--data", shades, "--output_dir", tmp_path, "--fold", 0, "--epochs", 1, "--aux", AUX]
    ended = cli("train", *TINY, *flags, "--extra_data", extra)
    assert ended.code == 0, ended.err
    note = f"note: {extra / PATH} lacks columns of --aux, so that its rows have no target mel, pale"
    assert ended.out.count(note) == 1


def test_skipped_images_keep_the_targets_of_the_others(tmp_path: Path) -> None:
    table = small_table(30).with_columns(seen=pl.int_range(30) % 2)
    table.write_csv(tmp_path / PATH)
    ids = table["isic_id"].to_list()
    write_hdf5(tmp_path / "train-image.hdf5", {name: jpeg(20) for name in ids if name != ids[4]})
    run = {"data": tmp_path, "output_dir": tmp_path / "out", "num_folds": 3, "on_error": "skip"}
    data = load_data(tiny_settings(**run, aux="seen: seen"))
    expected = [row % 2 for row in range(30) if row != 4]
    target = AuxTarget("seen", "seen")
    assert target_matrix(data.table, [target])[:, 0].tolist() == expected
