import subprocess
from pathlib import Path

import polars as pl
import pytest
import torch

from isic.runtime.errors import UserError
from tests.support.commands import ROOT, TINY, Cli, tiny_settings
from tests.support.processes import command
from tests.support.training import CPU, random_batch
from train.memory import fit_parts, memory_errors
from train.model import Classifier
from train.predict import predict
from train.state import create_state


def test_parts_are_doubled_until_they_fit(capsys: pytest.CaptureFixture[str]) -> None:
    tried = []

    def run(num_parts: int) -> str:
        tried.append(num_parts)
        if num_parts < 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "result"

    assert fit_parts(run, 2, 20, CPU) == ("result", 8)
    assert tried == [2, 4, 8]
    assert "cpu is out of memory: continuing with 3 images at a time" in capsys.readouterr().out
    with pytest.raises(UserError, match="out of memory with 1 images at a time; lower"):
        fit_parts(run, 1, 3, CPU)
    tried.clear()
    with pytest.raises(UserError, match="out of memory with 10 images at a time; lower"):
        fit_parts(run, 2, 20, CPU, may_split=False)
    assert tried == [2]


def test_only_full_memory_becomes_a_sentence() -> None:
    words = r"^cpu is out of memory; use another$"
    with pytest.raises(UserError, match=words), memory_errors(CPU, "use another"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="something else"), memory_errors(CPU):
        raise RuntimeError("something else")


def flags(dataset: Path, output: Path) -> list[object]:
    run = ["--fold", 0, "--epochs", 2, "--batch_size", 8, "--augmentation", "none"]
    return ["--data", dataset, "--output_dir", output, *run]


@pytest.mark.parametrize(
    ("num_fitting", "remedy"),
    [(0, "choose a smaller --model than test_vit"), (1, "lower --batch_size or --image_size")],
)
def test_an_optimizer_that_does_not_fit_is_one_sentence(
    num_fitting: int,
    remedy: str,
    small_dataset: Path,
    tmp_path: Path,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When the moments are allocated, and in a later step."""
    step = torch.optim.AdamW.step
    calls = []

    def limited(self: torch.optim.AdamW, closure: None = None) -> None:
        calls.append(None)
        if len(calls) > num_fitting:
            raise torch.OutOfMemoryError("CUDA out of memory")
        step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", limited)
    ended = cli("train", *TINY, *flags(small_dataset, tmp_path))
    assert ended.code == 2
    assert f"error: cpu is out of memory; {remedy}" in ended.err
    assert len(ended.err.splitlines()) == 1


def test_validation_that_does_not_fit_takes_smaller_parts(
    small_dataset: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("train", *TINY, *flags(small_dataset, tmp_path / "whole")).code == 0
    limit_evaluation(monkeypatch, 3)
    ended = cli("train", *TINY, *flags(small_dataset, tmp_path / "parts"))
    assert ended.code == 0, ended.err
    assert "cpu is out of memory: continuing with 2 images at a time" in ended.out
    whole, parts = (
        pl.read_parquet(tmp_path / name / "tiny" / "fold_0" / "oof.parquet")
        for name in ("whole", "parts")
    )
    assert whole["isic_id"].equals(parts["isic_id"])
    assert (whole["logit"] - parts["logit"]).abs().max() < 1e-5  # type: ignore[operator]


def test_an_image_that_cannot_be_validated_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tiny_settings()
    model = create_state(settings, CPU, 0).model
    limit_evaluation(monkeypatch, 0)
    with pytest.raises(UserError, match="cpu is out of memory with 1 images at a time; lower"):
        predict(model, [random_batch(4)], CPU, settings.precision)


def limit_evaluation(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Make every network run out of memory in eval mode with more than `limit` images."""
    forward = Classifier.forward

    def limited(self: Classifier, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if not self.training and len(images) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, images)

    monkeypatch.setattr(Classifier, "forward", limited)


FULL = """
import runpy
import torch
from train.model import Classifier

forward = Classifier.forward


def limited(self, images):
    if len(images) > {limit} and self.training == {training}:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return forward(self, images)


Classifier.forward = limited
runpy.run_module("train", run_name="__main__")
"""
"""A command whose network does not fit more than some images."""


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["validation", "training"])
def test_each_of_two_processes_reports_its_full_memory(
    training: bool, small_dataset: Path, tmp_path: Path
) -> None:
    script = tmp_path / "full.py"
    script.write_text(FULL.format(limit=3, training=training))
    run = command(*flags(small_dataset, tmp_path), num_processes=2)
    at = run.index("train")
    run[at - 1 : at + 1] = [str(script)]  # in place of `-m train`
    ended = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    if training:
        assert ended.returncode != 0
        assert "error: cpu is out of memory with 8 images at a time; lower" in ended.stderr
    else:
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.count("cpu is out of memory: continuing with") >= 2
