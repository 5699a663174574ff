"""The choice of engine and device."""

import re
from pathlib import Path

import pytest

from infer import engines
from infer.engines import device_of
from isic.runtime.errors import UserError


def test_auto_falls_to_the_cpu_with_one_note(
    broken_gpu: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [device_of({"format": "onnx"}) for _ in range(3)] == ["cpu"] * 3
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith("note: onnx runs on the CPU: ")
    assert device_of({"format": "onnx"}, "cuda") == "cuda", "a given device is not replaced"
    assert device_of({"format": "aoti", "device": "cuda"}) == "cuda"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            r'torch is not installed; run .*"isic-toolkit\[train\]"',
        ),
        (
            ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime"),
            "onnxruntime is not installed; run `pip install isic-toolkit`",
        ),
        (
            OSError("libtorch.so: cannot open shared object file"),
            "AOTInductor does not load .libtorch.so: .*; run `pip install --force-reinstall torch`",
        ),
    ],
)
def test_a_library_that_cannot_be_imported_is_named(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(module: str) -> None:
        raise error

    monkeypatch.setattr(engines, "import_module", fail)
    assert re.match(reason, str(engines.unavailable_reason("aoti", "cpu")))
    with pytest.raises(UserError, match=reason):
        engines.create(Path("model.pt2"), {"format": "aoti"}, "cpu")


def test_without_a_gpu_no_library_is_recommended_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "import_module", lambda module: __import__("no_such_module"))
    monkeypatch.setattr(engines, "no_gpu_reason", lambda: "no GPU; buy one")
    assert engines.unavailable_reason("aoti", "cuda") == "no GPU; buy one"
    assert "no_such_module is not installed" in str(engines.unavailable_reason("aoti", "cpu"))


def test_a_machine_without_a_gpu_gets_no_note(capsys: pytest.CaptureFixture[str]) -> None:
    if engines.has_gpu():
        pytest.skip("this machine has a GPU")
    engines.usual_device.cache_clear()
    assert engines.usual_device("onnx") == "cpu"
    assert capsys.readouterr().err == ""
