from pathlib import Path

from tests.support.commands import Cli
from tests.support.fake_run import (
    FakeRun,
)


def test_a_precision_is_of_a_format(fake_run: FakeRun, tmp_path: Path, cli: Cli) -> None:
    ended = cli("infer", *fake_run.flags(tmp_path, "--precision", "int8"))
    assert ended.code == 2 and "add --format onnx" in ended.err
    ended = cli("infer", *fake_run.flags(tmp_path, "--format", "onnx", "--precision", "int8"))
    assert (
        ended.code == 2
        and "export --config null --formats onnx --precision int8` first" in ended.err
    )


def test_settings_that_contradict_each_other_are_refused(
    fake_run: FakeRun, tmp_path: Path, cli: Cli
) -> None:
    ended = cli("infer", *fake_run.flags(tmp_path, "--ray", "local", "--num_processes", 2))
    assert ended.code == 2 and "leave out --num_processes" in ended.err
