"""The command: its results, refusals and interruptions."""

import json
import os
import signal
import time
from pathlib import Path

import polars as pl
import pytest
import torch

import benchmarks.train
from benchmarks.settings import TrainRateSettings
from isic.layout import BEST_CHECKPOINT, LAST_CHECKPOINT
from isic.metrics import pauc
from isic.runtime.errors import UserError
from tests.support.commands import ROOT, TINY, Cli, tiny_settings
from tests.support.processes import LONG_EPOCHS, history, started, wait_for
from tests.support.training import CPU
from train.checkpoint import load_checkpoint
from train.machine import check_bfloat16
from train.run import train_folds

KEPT_FILES = {"config.yaml", "history.jsonl", "last.pth", "tensorboard"}
"""Files of a fold that is not finished."""
SEED_LINES = [
    "--model_config vit_tiny --epochs 5 --batch_size 32 --fold 0 --use_sample",
    "--model_config eva02_base --epochs 20 --batch_size 24 --accumulation_steps 3 --fp16",
    "--config configs/eva02_production.yaml --epochs 10",
    "--model_config vit_tiny --lr 5e-4 --lr_backbone 1e-5",
    "--model_config vit_tiny --augmentation heavy",
    "--model_config vit_tiny --batch_size 16 --accumulation_steps 4",
]


@pytest.mark.parametrize("line", SEED_LINES)
def test_the_documented_command_lines_run(
    line: str, small_dataset: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As written, but on a tiny network and for two epochs."""
    monkeypatch.chdir(ROOT)
    small = [*TINY, "--data", small_dataset, "--output_dir", tmp_path, "--fold", 0, "--epochs", 2]
    ended = cli("train", *line.split(), *small)
    assert ended.code == 0, ended.err
    config = (tmp_path / "tiny" / "fold_0" / "config.yaml").read_text()
    words = line.split()
    for key in ("batch_size", "accumulation_steps", "augmentation"):
        if f"--{key}" in words:
            assert f"{key}: {words[words.index(f'--{key}') + 1]}\n" in config


@pytest.mark.parametrize(
    "flags",
    [
        "--mixup 0.4 --cutmix 1.0 --batch_size 8",
        "--augment_on device --augmentation medium --mixup 0.4 --batch_size 8 "
        "--accumulation_steps 2 --bf16 --ema_decay 0.9 --num_workers 1",
        "--layer_decay 0.7 --grad_checkpointing true --global_pool avg",
        "--model test_convnext --image_size 64 --global_pool avgmax --drop_path_rate 0.1",
    ],
)
def test_optional_settings_train(flags: str, small_dataset: Path, tmp_path: Path, cli: Cli) -> None:
    fixed = ["--data", small_dataset, "--output_dir", tmp_path, "--fold", 0, "--epochs", 2]
    ended = cli("train", *TINY, *fixed, *flags.split())
    assert ended.code == 0, ended.err


@pytest.mark.parametrize(
    "flags",
    [
        "--epochs 2 --batch_size 32 --fold 0 --use_sample",
        "--epochs 1 --batch_size 24 --accumulation_steps 3 --fp16 --fold 1",
        "--epochs 1 --bf16 --fold 0 --select_epoch best",
        "--lr 5e-4 --lr_backbone 1e-5 --epochs 2 --freeze_epochs 1 --fold 0",
        "--augmentation heavy --epochs 1 --fold 0 --num_workers 2",
        "--batch_size 16 --accumulation_steps 4 --epochs 1 --fold 0",
    ],
)
def test_command_lines_run(small_dataset: Path, tmp_path: Path, cli: Cli, flags: str) -> None:
    fixed = ["--data", small_dataset, "--output_dir", tmp_path]
    ended = cli("train", *TINY, *fixed, *flags.split())
    assert ended.code == 0, ended.err
    assert "checkpoints in" in ended.out


def test_it_learns_a_learnable_target(small_dataset: Path, tmp_path: Path, cli: Cli) -> None:
    """Malignant images are dark here: a model that learns at all gets them right."""
    flags = ["--data", small_dataset, "--output_dir", tmp_path, "--fold", 0]
    hyperparameters = (
        "--epochs 12 --batch_size 16 --lr 3e-3 --lr_backbone 3e-3 --ema_decay 0.8 --focal_alpha 0.5"
    )
    ended = cli("train", *TINY, *flags, *hyperparameters.split())
    assert ended.code == 0
    oof = pl.read_parquet(tmp_path / "tiny" / "fold_0" / "oof.parquet")
    assert pauc(oof["target"], oof["logit"]) > 0.19


def test_equal_seeds_give_equal_scores(small_dataset: Path, tmp_path: Path, cli: Cli) -> None:
    flags = "--fold 0 --epochs 3 --batch_size 8 --augmentation medium --ema_decay 0.9"
    scores = []
    for name in ("one", "two"):
        output = tmp_path / name
        ended = cli("train", *TINY, "--data", small_dataset, "--output_dir", output, *flags.split())
        assert ended.code == 0, ended.err
        scores.append((output / "tiny" / "fold_0" / "oof.parquet").read_bytes())
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_masks_are_learnt_scored_and_exported(
    synth_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    flags = "--config multitask_demo --name mt --num_workers 0 --fold 0 --epochs 3 --num_folds 3"
    where = ["--data", synth_dataset, "--output_dir", tmp_path]
    ended = cli("train", *flags.split(), *where)
    assert ended.code == 0, ended.err
    assert "Dice 0." in ended.out
    fold = tmp_path / "mt" / "fold_0"
    last = json.loads((fold / "history.jsonl").read_text().splitlines()[-1])
    assert last["dice"] == pytest.approx(pl.read_parquet(fold / "oof.parquet")["dice"].mean())
    ended = cli("export", "--config", "mt", "--model_dir", tmp_path / "mt")
    assert ended.code == 0, ended.out + ended.err
    manifest = json.loads((fold / "model.onnx.json").read_text())
    assert manifest["mask_stride"] == 2
    assert manifest["parity"]["batch_2"]["max_mask_error"] < 1e-3


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--extra_data", "nowhere"], "nowhere"),
        (
            ["--image_size", "30"],
            "test_vit does not take images of 30 px (Input height (30) should be divisible by "
            "patch size (16)); --image_size 32 fits, the size of its own config is 160",
        ),
        (
            ["--model", "efficientformer_l1", "--image_size", "128"],
            "efficientformer_l1 does not take images of 128 px",
        ),
        (["--model", "test_vit.r160_in1kk"], "known tags are: r160_in1k"),
        (["--mask_weight", "1"], "has no mask"),
        (["--pretrained", "nowhere.safetensors"], "no weights at"),
        (["--epochs"], "--epochs needs a value"),
        (["--name", ""], "--name"),
    ],
)
def test_a_refused_command_writes_nothing(
    small_dataset: Path, tmp_path: Path, cli: Cli, flags: list[str], words: str
) -> None:
    ended = cli("train", *TINY, "--data", small_dataset, "--output_dir", tmp_path / "out", *flags)
    assert ended.code == 2, ended.err
    assert words in ended.err, ended.err
    assert not (tmp_path / "out").exists(), ended.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--force", "--resume"], "choose one"),
        (
            ["--model", "vit_tinny_patch16_224"],
            'timm has no model "vit_tinny_patch16_224", did you mean',
        ),
        (["--image_size", "40"], "should be divisible by patch size (16)"),
        (["--model", "test_vit.r160_in1kk"], 'timm has no weights "r160_in1kk" for test_vit'),
        (["--device", "cuda"], "no GPU that torch can use"),
        (["--num_folds", "40"], "are too few for 40 folds"),
    ],
)
def test_settings_that_do_not_fit_are_user_errors(
    cli: Cli, small_dataset: Path, tmp_path: Path, flags: list[str], words: str
) -> None:
    if torch.cuda.is_available() and "cuda" in flags:
        pytest.skip("this machine has a GPU")
    ended = cli("train", *TINY, "--data", small_dataset, "--output_dir", tmp_path, *flags)
    assert ended.code == 2
    assert words in ended.err
    assert ended.err.count("\n") == 1


def test_bfloat16_is_refused_on_a_gpu_that_emulates_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a fake GPU, so that the test runs without one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    settings = tiny_settings(bf16=True, output_dir=tmp_path / "outputs", data=tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    words = (
        r"^--precision bf16: bfloat16 takes a GPU of .*8\.0 .*, and Tesla T4 has 7\.5; "
        "use --precision fp16$"
    )
    with pytest.raises(UserError, match=words):
        train_folds(settings, torch.device("cuda", 0))
    rate = TrainRateSettings(**settings.model_dump())
    with pytest.raises(UserError, match=words):
        benchmarks.train.train(rate)
    assert not settings.output_dir.exists()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    check_bfloat16(torch.device("cuda", 0))
    check_bfloat16(CPU)


def test_images_that_break_the_gradient_are_named(
    small_dataset: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(logits: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return logits.sum() * torch.nan

    monkeypatch.setattr("train.losses.focal_loss", broken)
    flags = [*TINY, "--data", small_dataset, "--output_dir", tmp_path, "--fold", 0, "--epochs", 1]
    for precision in ("--bf16", "--fp16"):
        ended = cli(
            "train", *flags, precision, "--force", "--batch_size", 4, "--positive_repeats", 9
        )
        assert ended.code == 2
        assert "not finite" in ended.err
        assert "on the images ISIC_00000" in ended.err
    assert load_checkpoint(tmp_path / "tiny" / "fold_0" / LAST_CHECKPOINT)["epoch"] == 0


@pytest.mark.parametrize("flags", ["--cache memory", "--cache disk", "--num_workers 2"])
def test_kept_images_change_no_result(
    flags: str, small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    fixed = ["--data", small_dataset, "--fold", 0, "--epochs", 3, "--augmentation", "heavy"]
    results = []
    for name, each in (("without", "--cache none"), ("with", flags)):
        ended = cli("train", *TINY, *fixed, "--output_dir", tmp_path / name, *each.split())
        assert ended.code == 0, ended.err
        assert ("60 images" in ended.out) == (name == "with")
        fold = tmp_path / name / "tiny" / "fold_0"
        weights = load_checkpoint(fold / BEST_CHECKPOINT)["model_state_dict"]
        results.append(
            (
                weights,
                (fold / "oof.parquet").read_bytes(),
                sorted(path.name for path in fold.iterdir()),
            )
        )
    (weights, oof, names), (other_weights, other_oof, other_names) = results
    assert all(torch.equal(weights[key], other_weights[key]) for key in weights)
    assert oof == other_oof
    assert names == other_names, "the temporary file has no name"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cache", "augment_on"), [("memory", "workers"), ("disk", "workers"), ("memory", "device")]
)
def test_a_run_killed_within_an_epoch_resumes_to_the_same_result(
    cache: str, augment_on: str, small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    flags = [*LONG_EPOCHS.split(), "--data", small_dataset, "--augmentation", "medium"]
    flags += ["--cache", cache, "--augment_on", augment_on]
    assert cli("train", *TINY, *flags, "--output_dir", tmp_path / "whole").code == 0
    whole, halves = (tmp_path / name / "tiny" / "fold_0" for name in ("whole", "halves"))
    with started(*flags, "--output_dir", tmp_path / "halves") as process:
        wait_for(halves / "history.jsonl", process)
        while load_checkpoint(halves / LAST_CHECKPOINT)["epoch"] < 1:
            time.sleep(0.005)
        time.sleep(0.1)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert len(history(halves)) == 1, "it was killed in the second epoch"
    assert not (halves / BEST_CHECKPOINT).exists(), "it was killed in the second epoch"
    assert {path.name for path in halves.iterdir()} <= KEPT_FILES

    resumed = (*flags, "--output_dir", tmp_path / "halves", "--resume")
    ended = cli("train", *TINY, *resumed, "--lr", 0.5)
    assert ended.code == 2
    assert "lr=" in ended.err
    assert cli("train", *TINY, *resumed).code == 0
    assert (whole / "oof.parquet").read_bytes() == (halves / "oof.parquet").read_bytes()
    assert history(whole) == history(halves)
    states = [
        load_checkpoint(folder / BEST_CHECKPOINT)["model_state_dict"] for folder in (whole, halves)
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.slow
@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 0), (signal.SIGINT, 1)])
def test_a_signal_ends_a_run_cleanly(
    number: signal.Signals, workers: int, small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    where = ["--data", small_dataset, "--output_dir", tmp_path]
    flags = [*LONG_EPOCHS.split(), *where, "--num_workers", workers]
    last = tmp_path / "tiny" / "fold_0" / LAST_CHECKPOINT
    with started(*flags) as process:
        wait_for(last, process)
        time.sleep(0.2)
        os.killpg(process.pid, number)  # a terminal signals the loader's processes too
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"stopped by {number.name}; the same command with --resume continues" in err
    assert "Traceback" not in err
    assert load_checkpoint(last)["epoch"] == 0
    assert cli("train", *TINY, *flags, "--num_workers", 0, "--resume").code == 0
