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
    "tensorrt fp16": {"check": "tensorrt", "precision": "fp16", "cosine": 0.999},
    "step": {"check": "training step", "precision": "bf16", "loss": 0.1},
}
WRONG = {"reason": "a logit is off by 1"}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (["step", "onnx fp32", "aoti bf16", "tensorrt fp16"], ("tensorrt", "fp16")),
        (["onnx fp32", "aoti bf16", "tensorrt fp16 wrong"], ("aoti", "bf16")),
        (["aoti bf16", "aoti bf16 wrong", "onnx fp32"], ("onnx", "fp32")),
        (["aoti bf16 wrong", "aoti bf16"], ("aoti", "bf16")),
        (["step", "onnx fp32 of another config"], ("aoti", "fp32")),
        ([], ("aoti", "fp32")),
    ],
)
def test_the_preferred_engine_that_is_correct_is_measured_end_to_end(
    rows: list[str], expected: tuple[str, str], tmp_path: Path
) -> None:
    for text in rows:
        what = "vit_small" if text.endswith("of another config") else "vit_tiny"
        name = text.removesuffix(" of another config").removesuffix(" wrong")
        wrong = WRONG if text.endswith("wrong") else {}
        append_rows("correctness", [{"what": what, **CHECKED[name], **wrong}], tmp_path)
    settings = GpuSettings(results=tmp_path, device="cpu", precision=("fp32",))
    flags = engine_flags("vit_tiny", settings)
    assert (flags["formats"], flags["precision"]) == expected
