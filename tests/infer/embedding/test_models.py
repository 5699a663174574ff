import shutil
from pathlib import Path

import pytest

from tests.support.commands import Cli
from tests.support.fake_run import FakeRun, embed_flags


def test_artifacts_without_their_manifest_or_folds_are_refused(
    exported: Path, synth_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    run = shutil.copytree(exported, tmp_path / "tiny")
    arguments = embed_flags(run, synth_dataset, tmp_path / "out")

    def fails_with(words: str) -> None:
        ended = cli("infer", *arguments)
        assert ended.code == 2
        assert words in ended.err
        assert ended.err.count("\n") == 1

    shutil.copy(run / "fold_1" / "model.onnx", run / "fold_0")
    fails_with("does not match its manifest")
    shutil.copy(run / "fold_1" / "model.onnx.json", run / "fold_0")
    fails_with("is fold 1 of tiny, not fold 0")
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


def test_exchanged_artifacts_of_two_folds_are_refused(
    exported: Path, synth_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    run = shutil.copytree(exported, tmp_path / "tiny")
    for suffix, words in (
        ("", "does not match its manifest"),
        (".json", "is fold 1 of tiny, not fold 0 of tiny"),
    ):
        first = run / "fold_0" / f"model.onnx{suffix}"
        second = run / "fold_1" / f"model.onnx{suffix}"
        first.rename(tmp_path / "other")
        second.rename(first)
        (tmp_path / "other").rename(second)
        ended = cli("infer", *embed_flags(run, synth_dataset, tmp_path / "out"))
        assert ended.code == 2
        assert words in ended.err


@pytest.mark.parametrize("name", ["*", "[a", "", "/etc/passwd", "../fold_0/model.null", "**"])
def test_a_format_is_not_a_path_or_a_pattern(
    fake_run: FakeRun, tmp_path: Path, cli: Cli, name: str
) -> None:
    model_dir = Path(shutil.copytree(fake_run.model_dir, tmp_path / "null"))
    shutil.copytree(model_dir / "fold_0", model_dir / "fold_0_old")
    flags = FakeRun(fake_run.data, model_dir).flags(tmp_path / "out")
    assert cli("infer", *flags).code == 0, "fold_0_old is not a fold"
    ended = cli("infer", *flags, "--force", f"--format={name}")
    assert ended.code == 2
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
