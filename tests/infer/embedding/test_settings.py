from pathlib import Path

from infer.embedding.settings import EmbedSettings
from isic.runtime.config import build
from tests.support.commands import Cli
from tests.support.fake_run import FakeRun


def test_a_precision_needs_a_format(fake_run: FakeRun, tmp_path: Path, cli: Cli) -> None:
    ended = cli("infer", *fake_run.flags(tmp_path, "--precision", "int8"))
    assert ended.code == 2
    assert "add --format onnx" in ended.err
    ended = cli("infer", *fake_run.flags(tmp_path, "--format", "onnx", "--precision", "int8"))
    assert ended.code == 2
    assert "export --config null --formats onnx --precision int8` first" in ended.err


def test_settings_that_contradict_each_other_are_refused(
    fake_run: FakeRun, tmp_path: Path, cli: Cli
) -> None:
    ended = cli("infer", *fake_run.flags(tmp_path, "--ray", "local", "--num_processes", 2))
    assert ended.code == 2
    assert "leave out --num_processes" in ended.err


def test_other_names_of_flags_are_understood_and_not_shown(cli: Cli) -> None:
    flags = {"model_config": "a", "engine": "onnx", "out": "there"}
    settings = build(EmbedSettings, flags)
    assert (settings.config, settings.format, settings.output_dir) == ("a", "onnx", Path("there"))
    assert build(EmbedSettings, {"config": "my/a.yaml"}).config == "a", "as train names the run"
    shown = cli("infer", "embed", "--help").out
    assert "--format " in shown
    assert "--engine " not in shown
    assert "--out " not in shown
