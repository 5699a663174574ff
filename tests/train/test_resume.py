import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import polars as pl
import pytest
import torch

from isic.folds import draw_folds
from isic.layout import BEST_CHECKPOINT, FOLDS_FILE, LAST_CHECKPOINT
from isic.runtime.errors import UserError
from isic.runtime.files import read_json, write_json
from tests.support.commands import TINY, TINY_KEYS, Cli, tiny_settings
from tests.support.datasets import jpeg
from tests.support.training import write_extra
from train.checkpoint import load_checkpoint
from train.config import TrainSettings
from train.deadline import OUT_OF_TIME
from train.model import create_model
from train.resume import refuse_difference
from train.run import choose

TABLE = "train-metadata.csv"


def test_finished_folds_are_skipped_and_other_settings_refused(
    trained: Path, synth_dataset: Path, cli: Cli
) -> None:
    flags = [*TINY, "--data", synth_dataset, "--output_dir", trained.parent, "--num_folds", 3]
    before = (trained / "fold_0" / BEST_CHECKPOINT).stat().st_mtime_ns
    ended = cli("train", *flags, "--epochs", 1)
    assert ended.code == 0
    assert "fold 2 is finished" in ended.out
    assert "pooled" in ended.out
    assert (trained / "fold_0" / BEST_CHECKPOINT).stat().st_mtime_ns == before
    ended = cli("train", *flags, "--epochs", 2)
    assert ended.code == 2
    assert "epochs=1, now it is 2" in ended.err


BOTH_KINDS = "with --lr 0.5, without --extra_data --validate_every"


@pytest.mark.parametrize(
    ("before", "now", "flags"),
    [
        ({"freeze_epochs": 1}, {}, "with --freeze_epochs 1"),
        ({"lr": 0.5, "ema_decay": 0.9}, {}, "with --ema_decay 0.9 --lr 0.5"),
        (
            {},
            {"pretrained": True, "use_sample": True},
            "with --pretrained false --use_sample false",
        ),
        ({"extra_data": "a,b c"}, {}, "with --extra_data 'a,b c'"),
        ({"aux": "mel: iddx_full ~ Mel"}, {}, "with --aux 'mel: iddx_full ~ Mel'"),
        ({"lr": 0.5}, {"extra_data": "x", "validate_every": 3}, BOTH_KINDS),
        ({}, {"validate_every": 3}, "without --validate_every"),
        ({}, {"extra_data": "x"}, "without --extra_data"),
        ({"augmentation": {"transform": {}}}, {}, "with the earlier --augmentation"),
    ],
)
def test_settings_that_differ_are_named_as_the_flags_that_continue(
    before: dict[str, object], now: dict[str, object], flags: str
) -> None:
    saved = tiny_settings(**before).model_dump(mode="json")
    words = rf"; continue {re.escape(flags)}, choose another --name, or train again"
    with pytest.raises(UserError, match=words):
        refuse_difference(Path("config.yaml"), saved, tiny_settings(**now))


def test_a_folder_of_something_else_is_not_trained_into(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    flags = [*TINY, "--data", small_dataset, "--output_dir", tmp_path, "--epochs", 1, "--fold", 0]
    for place in ("tiny/roc.svg", "tiny/fold_0/oof.parquet", "tiny/fold_0/config.yaml"):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine: 1")
        ended = cli("train", *flags, "--force")
        assert ended.code == 2
        assert f"{place} exists and was not written by this" in ended.err
        assert path.read_text() == "mine: 1"
        path.unlink()
    ended = cli("train", *flags, "--output_dir", small_dataset.parent, "--name", small_dataset.name)
    assert ended.code == 2
    assert "holds a dataset" in ended.err
    assert not (small_dataset / "folds.parquet").exists()


def test_epochs_are_not_thrown_away_unasked(small_dataset: Path, tmp_path: Path, cli: Cli) -> None:
    flags = [*TINY, "--data", small_dataset, "--output_dir", tmp_path, "--epochs", 1, "--fold", 0]
    folder = tmp_path / "tiny" / "fold_0"
    assert cli("train", *flags).code == 0
    (folder / "oof.parquet").write_bytes(b"half")
    ended = cli("train", *flags)
    assert ended.code == 2
    assert "oof.parquet is not a Parquet file" in ended.err
    assert "--force" not in ended.err, "the checkpoint is whole"
    (folder / "oof.parquet").unlink()
    ended = cli("train", *flags)
    assert ended.code == 2
    assert "has 1 of 1 epochs; continue with --resume, or start again with --force" in ended.err
    assert cli("train", *flags, "--force").code == 0
    for config in (
        "name: tiny",
        "model: tiny",
        "{model: tiny, epochs: null}",
        "{model: 1, epochs: 1}",
    ):
        (folder / "config.yaml").write_text(config)
        ended = cli("train", *flags)
        assert ended.code == 2
        assert "config.yaml lacks model or epochs" in ended.err


def test_a_resumed_fold_keeps_the_place_of_its_augmentation(
    small_dataset: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ["--data", small_dataset, "--output_dir", tmp_path, "--fold", 0, "--epochs", 2]
    flags = [*TINY, *where]
    folder = tmp_path / "tiny" / "fold_0"
    assert cli("train", *flags, "--max_hours", 1e-9).code == OUT_OF_TIME
    config = (folder / "config.yaml").read_text()
    assert "augment_on: workers\n" in config
    ended = cli("train", *flags, "--resume", "--augment_on", "device")
    assert ended.code == 2
    assert "was made with augment_on=workers, now it is device" in ended.err

    # Of an earlier version, whose images were augmented in the workers.
    (folder / "config.yaml").write_text(config.replace("augment_on: workers\n", ""))
    settings = TrainSettings(**TINY_KEYS, name="tiny", output_dir=tmp_path, resume=True)
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose(settings, 0, gpu).augment_on == "workers"
    assert choose(settings, 1, gpu).augment_on == "device", "a fold of its own"
    assert cli("train", *flags, "--resume").code == 0


def test_a_resumed_fold_keeps_its_precision(
    small_dataset: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ["--data", small_dataset, "--output_dir", tmp_path, "--fold", 0, "--epochs", 2]
    flags = [*TINY, *where]
    folder = tmp_path / "tiny" / "fold_0"
    assert cli("train", *flags, "--bf16", "--max_hours", 1e-9).code == OUT_OF_TIME
    assert load_checkpoint(folder / LAST_CHECKPOINT)["args"]["precision"] == "bf16"
    ended = cli("train", *flags, "--resume", "--precision", "fp32")
    assert ended.code == 2
    assert (
        "was made with precision=bf16, now it is fp32; continue with --precision bf16" in ended.err
    )

    settings = TrainSettings(**TINY_KEYS, name="tiny", output_dir=tmp_path, resume=True)
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(UserError, match=r"^fold 0 was begun in bf16; bfloat16 takes .* --force$"):
        choose(settings, 0, gpu)
    assert choose(settings, 1, gpu).precision == "fp16", "a fold of its own"
    assert choose(settings, 1, gpu).augment_on == "device"

    ended = cli("train", *flags, "--resume")
    assert ended.code == 0, ended.err
    assert "cpu bf16" in ended.out
    assert load_checkpoint(folder / BEST_CHECKPOINT)["args"]["precision"] == "bf16"
    assert "precision: bf16\n" in (folder / "config.yaml").read_text()
    assert "fold 0 is finished" in cli("train", *flags).out, "auto accepts what was used"


def test_rows_of_a_table_that_changed_are_not_forgotten_by_a_resumed_fold(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    extra = write_extra(tmp_path / "extra", [1] * 4 + [0] * 8)
    flags = [*TINY, "--extra_data", extra, "--output_dir", tmp_path, "--fold", 0, "--epochs", 2]
    assert cli("train", *flags, "--data", small_dataset, "--max_hours", 1e-9).code == OUT_OF_TIME
    moved = shutil.move(small_dataset, tmp_path / "moved")
    resumed = [*flags, "--data", moved, "--resume"]
    for table in (extra / TABLE, moved / TABLE):
        content = table.read_text()
        table.write_text(content[: content.rindex("\n", 0, -1) + 1])
        ended = cli("train", *resumed)
        assert ended.code == 2
        assert f"{table} has changed since {tmp_path}/tiny/fold_0/last.pth was trained" in ended.err
        table.write_text(content)
    # Of an earlier version.
    last = tmp_path / "tiny" / "fold_0" / LAST_CHECKPOINT
    saved = load_checkpoint(last)
    del saved["metadata_digests"]
    torch.save(saved, last)
    assert cli("train", *resumed).code == 0


def test_images_that_changed_are_not_forgotten(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    where = ["--data", small_dataset, "--output_dir", tmp_path, "--num_folds", 2, "--epochs", 2]
    flags = [*TINY, *where]
    images = small_dataset / "train-image.hdf5"
    assert cli("train", *flags, "--fold", 0).code == 0
    assert cli("train", *flags, "--fold", 1, "--max_hours", 1e-9).code == OUT_OF_TIME
    with h5py.File(images, "a") as file:
        del file["ISIC_0000007"]
        file["ISIC_0000007"] = np.bytes_(jpeg(40, 17))
    ended = cli("train", *flags, "--fold", 1, "--resume")
    assert ended.code == 2
    assert f"the images have changed since {tmp_path}/tiny/fold_1/last.pth was train" in ended.err
    ended = cli("train", *flags, "--fold", 1, "--force")
    assert "fold_1 was trained with another set of images than fold_0" in ended.err


def test_scores_of_different_recipes_are_not_mixed_without_a_word(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    """Folds that separate commands have trained are compared when their scores are pooled."""
    flags = [*TINY, "--data", small_dataset, "--output_dir", tmp_path, "--epochs", 1]
    assert "warning" not in cli("train", *flags, "--fold", 0, "--num_workers", 0).err
    assert "warning" not in cli("train", *flags, "--fold", 1).err
    ended = cli("train", *flags, "--fold", 2, "--lr", 0.5, "--loss", "bce")
    assert ended.code == 0
    words = (
        "fold_2 was trained with another loss, lr than fold_0, so mean and pooled scores are not"
    )
    assert f"warning: {words}" in ended.err


def test_folds_of_different_tables_are_not_mixed(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    flags = [*TINY, "--output_dir", tmp_path, "--epochs", 1, "--num_folds", 2]
    assert cli("train", *flags, "--data", small_dataset, "--fold", 0).code == 0
    moved = shutil.move(small_dataset, tmp_path / "moved")
    content = (moved / TABLE).read_text()
    pl.read_csv(content.encode()).with_columns(1 - pl.col("target")).write_csv(moved / TABLE)
    run = tmp_path / "tiny"
    for only in ([], ["--fold", 0]):
        ended = cli("train", *flags, *only, "--data", moved)
        assert ended.code == 2
        assert f"{moved / TABLE} has changed since {run}/fold_0 was trained; " in ended.err
    assert not (run / "fold_1").exists()
    (tmp_path / "unmounted").mkdir()
    for without in ("none", tmp_path / "unmounted"):
        assert "fold 0 is finished" in cli("train", *flags, "--fold", 0, "--data", without).out

    manifest = run / "fold_0" / f"{BEST_CHECKPOINT}.json"
    about = read_json(manifest)
    write_json(manifest, {**about, "made_from": 3})
    ended = cli("train", *flags, "--data", moved)
    assert (ended.code, f"{manifest} is damaged (made_from: " in ended.err) == (2, True)
    del about["made_from"]
    write_json(manifest, about)
    ended = cli("train", *flags, "--data", moved)
    assert ended.code == 0, "of an earlier version"
    assert "fold 0 is finished" in ended.out
    assert "warning" not in ended.err, "an unknown table is not another one"


def test_folds_of_different_initial_weights_are_not_mixed(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    """The setting is the same, but not the file that it names."""
    flags = ["--data", small_dataset, "--output_dir", tmp_path, "--epochs", 1, "--num_folds", 2]
    tensors = create_model(tiny_settings()).backbone.state_dict()
    weights = tmp_path / "weights.pth"
    starts = [*TINY, *flags, "--pretrained", weights]
    for fold in range(2):
        torch.save({name: tensor * (1 + fold) for name, tensor in tensors.items()}, weights)
        ended = cli("train", *starts, "--fold", fold)
        assert ended.code == 0
    words = f"fold_1 was trained with another version of the weights {weights} than fold_0"
    assert f"warning: {words}" in ended.err
    assert cli("train", *starts, "--fold", 1).code == 0, "finished, from these weights"
    ended = cli("train", *starts)
    assert ended.code == 2
    assert f"{weights} has changed since {tmp_path}/tiny/fold_0 was trained" in ended.err
    weights.unlink()
    manifest = tmp_path / "tiny" / "fold_1" / f"{BEST_CHECKPOINT}.json"
    about = read_json(manifest)
    write_json(manifest, {**about, "preprocess": {**about["preprocess"], "mean": [0.1] * 3}})
    ended = cli("train", *starts)
    assert ended.code == 0, "the scores are shown without the file"
    assert "fold_1 was trained with another mean, version of the weights" in ended.err


def test_a_plan_that_the_dataset_got_later_is_not_ignored(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    flags = [*TINY, "--data", small_dataset, "--output_dir", tmp_path, "--epochs", 1, "--fold", 0]
    assert cli("train", *flags).code == 0
    pinned = small_dataset / FOLDS_FILE
    shutil.copy(tmp_path / "tiny" / FOLDS_FILE, pinned)
    assert "fold 0 is finished" in cli("train", *flags).out
    draw_folds(pl.read_csv(small_dataset / TABLE), 5, 7).write(pinned)
    for more in ([], ["--force"]):
        ended = cli("train", *flags, *more)
        assert ended.code == 2
        assert f"{pinned} is another fold plan than {tmp_path}/tiny/{FOLDS_FILE}" in ended.err
    assert cli("train", *flags, "--name", "other").code == 0
    assert (tmp_path / "other" / FOLDS_FILE).read_bytes() == pinned.read_bytes()


def test_a_runs_own_config_is_not_a_seed_that_was_given(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    """The dataset's plan is of another seed, which the saved settings do not know."""
    draw_folds(pl.read_csv(small_dataset / TABLE), 5, 7).write(small_dataset / FOLDS_FILE)
    flags = [*TINY, "--data", small_dataset, "--output_dir", tmp_path, "--epochs", 1]
    assert cli("train", *flags, "--fold", 0).code == 0
    saved = tmp_path / "tiny" / "fold_0" / "config.yaml"
    for more in (["--fold", 1], ["--name", "again"]):
        ended = cli("train", "--config", saved, *more)
        assert ended.code == 0, ended.err
    (small_dataset / FOLDS_FILE).unlink()
    ended = cli("train", "--config", saved, "--fold", 2)
    assert ended.code == 0, "the run keeps the plan"
    ended = cli("train", "--config", saved, "--fold", 3, "--split_seed", 42)
    assert ended.code == 2
    assert "is not the plan of --split_seed 42; leave --split_seed out" in ended.err
