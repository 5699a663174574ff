import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks.settings
from benchmarks.__main__ import SETTINGS, load_benchmark
from benchmarks.gpu import FLAGS_OF_PART, engine_flags, part_commands
from benchmarks.record import append_rows
from benchmarks.settings import SHARES, GpuSettings
from tests.support.commands import Cli


def test_a_part_that_fails_or_is_late_has_no_rows(tmp_path: Path, cli: Cli) -> None:
    late = cli("benchmarks", "gpu", "--parts", "train", "--minutes", 0.001, "--data", tmp_path)
    assert late.code == 1
    assert "stopped: no time left" in late.out
    assert cli("benchmarks", "gpu", "--parts", "trian").code == 2


@pytest.mark.slow
def test_the_packed_parts_need_no_booster() -> None:
    modules = [f"benchmarks.{name}" for name in (*SHARES, "gpu", "baselines", "worker")]
    imports = ", ".join([*modules, "infer.embedding.embedder"])
    code = f"import sys; sys.modules['lightgbm'] = None\nimport {imports}"
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_every_flag_of_a_part_is_one_of_its_command(tmp_path: Path) -> None:
    settings = GpuSettings(data=tmp_path, precision=("bf16",), artifacts=tmp_path, results=tmp_path)
    assert set(FLAGS_OF_PART) == set(SHARES)
    for name in FLAGS_OF_PART:
        model = getattr(benchmarks.settings, SETTINGS[name])
        for flags in part_commands(name, settings):
            given = {key: str(value) for key, value in flags.items()}
            load_benchmark(model, given)  # raises UserError for an unknown key or a wrong value


CHECKED = {
    "onnx fp32": {"check": "onnx", "precision": "fp32", "cosine": 1.0},
    "aoti bf16": {"check": "aoti", "precision": "bf16", "cosine": 0.999},
    "step": {"check": "training step", "precision": "bf16", "loss": 0.1},
}
WRONG = {"reason": "a logit is off by 1"}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (["step", "onnx fp32", "aoti bf16"], ("onnx", "fp32")),
        (["step", "onnx fp32 wrong", "aoti bf16"], ("aoti", "bf16")),
        (["onnx fp32", "onnx fp32 wrong", "aoti bf16"], ("aoti", "bf16")),
        (["onnx fp32 wrong", "onnx fp32", "aoti bf16"], ("onnx", "fp32")),
        (["step", "aoti bf16 of another config"], ("aoti", "fp16")),
        (["onnx fp32 wrong", "aoti bf16 wrong"], ("aoti", "fp16")),
        ([], ("aoti", "fp16")),
    ],
)
def test_the_preferred_engine_that_is_correct_is_measured_end_to_end(
    rows: list[str], expected: tuple[str, str], tmp_path: Path
) -> None:
    """Without a correct one, it is one that may work here, in the wanted precision."""
    for text in rows:
        what = "vit_small" if text.endswith("of another config") else "vit_tiny"
        name = text.removesuffix(" of another config").removesuffix(" wrong")
        wrong = WRONG if text.endswith("wrong") else {}
        append_rows("correctness", [{"what": what, **CHECKED[name], **wrong}], tmp_path)
    settings = GpuSettings(results=tmp_path, device="cpu", precision=("fp16",))
    flags = engine_flags("vit_tiny", settings)
    assert (flags["formats"], flags["precision"]) == expected


def test_each_engine_is_timed_in_its_own_precision_and_torch_in_that_of_training() -> None:
    settings = GpuSettings(device="cpu")
    engines, of_torch = part_commands("throughput", settings)
    assert (engines["precision"], engines["formats"]) == ("fp32", "onnx,aoti")
    assert (of_torch["precision"], of_torch["formats"]) == ("fp32", "eager,compile")
    settings = GpuSettings(device="cpu", precision=("bf16", "fp16"))
    assert [
        (flags["precision"], flags["formats"]) for flags in part_commands("throughput", settings)
    ] == [
        ("fp16", "onnx,aoti"),
        ("bf16", "aoti"),
        ("bf16", "eager,compile"),
    ]
    assert [flags["precision"] for flags in part_commands("train", settings)] == ["bf16"] * 3
