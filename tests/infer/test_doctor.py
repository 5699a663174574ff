"""`python -m infer doctor`."""

import pytest

from infer import doctor


@pytest.mark.parametrize(
    ("code", "answer"),
    [
        ("import os; os.kill(os.getpid(), 11)", "does not work: it crashes with SIGSEGV"),
        ("import time; time.sleep(60)", "does not work: no answer within 1 s"),
        ("raise OSError('libnvinfer.so')", "does not work: OSError: libnvinfer.so"),
        ("print('noise'); print('works')", "works"),
    ],
)
def test_a_crash_and_a_hang_are_answers(
    code: str, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "TRIAL", code)
    assert doctor.try_engine("onnx", "cuda", seconds=1) == answer


@pytest.mark.slow
def test_engines_that_run_here_work() -> None:
    assert doctor.try_engine("onnx", "cpu") == "works"
    assert doctor.try_engine("null", "cpu") == "works"
