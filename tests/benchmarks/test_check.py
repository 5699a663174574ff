from pathlib import Path

import pytest

from benchmarks import record
from tests.support.commands import Cli


def write(folder: Path, *rates: tuple[float, float, float], **columns: object) -> None:
    """Append rows of throughput with the median, the least and the most of the repeats."""
    for median, low, high in rates:
        row = {
            "what": "vit",
            "engine": "onnx",
            "precision": "fp32",
            "batch": 1,
            "device": "cpu",
            "input": "noise",
            "images_per_second": median,
            "min": low,
            "max": high,
            "matmul_gflops": 50,
            **columns,
        }
        record.append_rows("throughput", [row], folder)


@pytest.mark.parametrize(
    ("before", "last", "code"),
    [
        ((100, 95, 105), (80, 76, 84), 1),
        ((100, 95, 105), (92, 88, 97), 0),  # the ranges meet
        ((100, 99.5, 100.5), (97, 96.5, 97.5), 0),  # they do not, but it is within the tolerance
        ((100, 95, 105), (200, 190, 210), 0),
    ],
)
def test_only_a_slowdown_beyond_noise_fails(
    before: tuple[float, float, float],
    last: tuple[float, float, float],
    code: int,
    tmp_path: Path,
    cli: Cli,
) -> None:
    write(tmp_path, before, last)
    ended = cli("benchmarks", "check", "--results", tmp_path)
    assert ended.code == code, ended.out
    assert f"{last[0] / before[0]:.2f}" in ended.out
    assert "1 compared" in ended.out


def test_other_machines_and_measurements_are_not_compared(
    tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, (100, 99, 101))
    write(tmp_path, (10, 9, 11), batch=2)
    write(tmp_path, (None, None, None), reason="not here")  # type: ignore[arg-type]
    monkeypatch.setattr(record, "accelerator", lambda: "a GPU")
    write(tmp_path, (1, 0.9, 1.1))
    ended = cli("benchmarks", "check", "--results", tmp_path)
    assert ended.code == 0
    assert "0 compared" in ended.out


def test_a_machine_at_half_its_speed_is_no_slowdown(tmp_path: Path, cli: Cli) -> None:
    write(tmp_path, (100, 99, 101), matmul_gflops=50)
    write(tmp_path, (50, 49, 51), matmul_gflops=25)
    ended = cli("benchmarks", "check", "--results", tmp_path)
    assert ended.code == 0
    assert "1.00 (0.97 to 1.03)" in ended.out
    write(tmp_path, (50, 49, 51), matmul_gflops=50)
    assert cli("benchmarks", "check", "--results", tmp_path).code == 1


def test_rates_without_repeats_have_the_given_noise(tmp_path: Path, cli: Cli) -> None:
    for share in (1.0, 0.85):
        row = {"what": "null", "data": "d", "images": 9, "share": share}
        record.append_rows("embed", [row], tmp_path)
    assert cli("benchmarks", "check", "--results", tmp_path).code == 1
    assert cli("benchmarks", "check", "--results", tmp_path, "--noise", 0.3).code == 0


def test_an_unknown_benchmark_is_refused(tmp_path: Path, cli: Cli) -> None:
    ended = cli("benchmarks", "check", "--benchmark", "throughputs", "--results", tmp_path)
    assert ended.code == 2
    assert 'did you mean "throughput"?' in ended.err
