import shutil
from pathlib import Path

import pytest

from tests.support.commands import Cli
from tests.support.fake_run import (
    FakeRun,
    embed_flags,
)


def test_engines_that_do_not_belong_are_refused(
    exported: Path, synth_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    run = shutil.copytree(exported, tmp_path / "tiny")
    arguments = embed_flags(run, synth_dataset, tmp_path / "out")

    def fails_with(words: str) -> None:
        ended = cli("infer", *arguments)
        assert ended.code == 2 and words in ended.err and ended.err.count("\n") == 1

    for suffix in ("", ".json"):
        shutil.copy(run / "fold_1" / f"model.onnx{suffix}", run / "fold_0" / f"model.onnx{suffix}")
        fails_with("does not match its manifest" if not suffix else "is fold 1 of tiny, not fold 0")
    (run / "fold_0" / "model.onnx").write_bytes(b"truncated")
    fails_with("does not match its manifest")
    (run / "fold_0" / "model.onnx.json").unlink()
    fails_with("model.onnx.json is missing")
    (run / "fold_0" / "model.onnx").unlink()
    (run / "folds.parquet").unlink()
    fails_with("no fold plan")
    for fold in (1, 2):
        (run / f"fold_{fold}" / "model.onnx").unlink()
    fails_with("run `python -m export --config tiny` first")


def test_two_folds_that_traded_their_engines_are_found_out(
    exported: Path, synth_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    run = shutil.copytree(exported, tmp_path / "tiny")
    for suffix, words in (
        ("", "does not match its manifest"),
        (".json", "is fold 1 of tiny, not fold 0 of tiny"),
    ):
        first, second = (run / f"fold_{fold}" / f"model.onnx{suffix}" for fold in (0, 1))
        first.rename(tmp_path / "traded")
        second.rename(first)
        (tmp_path / "traded").rename(second)
        ended = cli("infer", *embed_flags(run, synth_dataset, tmp_path / "out"))
        assert ended.code == 2 and words in ended.err


@pytest.mark.parametrize("name", ["*", "[a", "", "/etc/passwd", "../fold_0/model.null", "**"])
def test_an_engine_is_a_file_name_and_no_pattern(
    fake_run: FakeRun, tmp_path: Path, cli: Cli, name: str
) -> None:
    model_dir = Path(shutil.copytree(fake_run.model_dir, tmp_path / "null"))
    shutil.copytree(model_dir / "fold_0", model_dir / "fold_0_old")
    flags = FakeRun(fake_run.data, model_dir).flags(tmp_path / "out")
    assert cli("infer", *flags).code == 0, "a copy of a fold is no fold"
    ended = cli("infer", *flags, "--force", f"--format={name}")
    assert ended.code == 2 and ended.err.startswith("error: ") and ended.err.count("\n") == 1
