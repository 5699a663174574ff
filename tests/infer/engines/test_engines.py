"""The choice of engine and device."""

import pytest

from infer import engines
from infer.engines import device_of


def test_auto_falls_to_the_cpu_with_one_note(
    broken_gpu: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [device_of({"format": "onnx"}) for _ in range(3)] == ["cpu"] * 3
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith("note: onnx runs on the CPU: ")
    assert device_of({"format": "onnx"}, "cuda") == "cuda", "a given device is not replaced"
    assert device_of({"format": "aoti", "device": "cuda"}) == "cuda"


def test_a_machine_without_a_gpu_gets_no_note(capsys: pytest.CaptureFixture[str]) -> None:
    if engines.has_gpu():
        pytest.skip("this machine has a GPU")
    engines.usual_device.cache_clear()
    assert engines.usual_device("onnx") == "cpu"
    assert capsys.readouterr().err == ""
