"""`python -m infer doctor`."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from infer import doctor, trials
from infer.doctor import Check, Finding, attempt, check_lines, examine
from infer.engines import unavailable_reason
from infer.ensemble.boosting.libraries import LIBRARIES
from infer.formats import engines_by_title
from isic.runtime.machine import has_gpu
from tests.support import fake_driver

CHECK = Check("a library", ("numpy",), "try_module", ("numpy",))


def report(environment: dict[str, str] | None = None) -> str:
    """Return what the command prints in an environment."""
    command = [sys.executable, "-m", "infer", "doctor"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert ended.stderr == ""
    # A path cannot be broken, and those of tests are long.
    wide = [line for line in ended.stdout.splitlines() if len(line) > doctor.WIDTH]
    assert all("/" in line for line in wide)
    return ended.stdout


def rows(text: str) -> dict[str, tuple[str, str]]:
    """Return the answer of each row, and the rest of it, as one line."""
    section = text.split("What runs here\n")[1].split("\n\n", maxsplit=1)[0]
    found = re.findall(r"^  (\S.*?)  +(yes|no) +((?:.|\n      )*)", section, re.MULTILINE)
    return {title: (answer, " ".join(rest.split())) for title, answer, rest in found}


@pytest.mark.parametrize(
    ("code", "finding"),
    [
        (
            "import os; os.kill(os.getpid(), 11)",
            "crashes with SIGSEGV; run `pip install --force-reinstall numpy`",
        ),
        (
            "import os; os.kill(os.getpid(), 4)",
            "crashes with SIGILL; use a newer CPU, or for Polars run "
            '`pip install "polars[rtcompat]"`',
        ),
        (
            "import time; time.sleep(60)",
            "gives no answer within 1 s; run the doctor again: files load faster the second time",
        ),
        (
            "raise OSError('libgomp.so.1: cannot open')",
            "OSError: libgomp.so.1: cannot open; run `apt-get install libgomp1`",
        ),
        (
            "raise SystemExit(3)",
            "ends with exit code 3; run `pip install --force-reinstall numpy`",
        ),
        ("""print('noise'); print('{"reason": null}')""", None),
    ],
)
def test_a_crash_and_a_hang_are_findings(
    code: str, finding: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "TRIAL", code)
    if "sleep" in code:  # the others may start as slowly as the machine is
        monkeypatch.setattr(doctor, "TRIAL_SECONDS", 1)
    assert examine(CHECK) == Finding(finding)


def test_each_library_of_boosters_is_tried() -> None:
    checks = doctor.booster_checks()
    assert {check.arguments[0] for check in checks} == set(LIBRARIES)
    assert [examine(check).reason for check in checks] == [None] * len(checks)


def test_a_booster_that_scores_wrongly_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(LIBRARIES["lightgbm"], load=lambda text: lambda matrix, threads: np.zeros(9))
    monkeypatch.setitem(LIBRARIES, "lightgbm", wrong)
    with pytest.raises(ArithmeticError, match="does not tell the classes apart"):
        trials.try_booster("lightgbm")


def test_a_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    finding = Finding(**trials.try_module("ray"))
    cause, fix = finding.cause_and_fix
    assert cause == "ray is not installed"
    assert 'pip install "isic-toolkit[ray]"' in fix


def test_a_row_has_a_cause_and_a_fix_within_the_width() -> None:
    command = '`pip install "isic-toolkit[cuda12]"`'
    reason = f"{'word; ' * 30}the end; {'do this, then ' * 4}run {command}"
    title, *lines = check_lines(CHECK, Finding(reason, cuda="13.0"), 12)
    assert re.fullmatch(r"  a library     no   numpy [\d.]+, built for CUDA 13\.0", title)
    assert max(map(len, lines)) <= doctor.WIDTH
    assert any(line.endswith(" end") for line in lines)
    assert any(command in line for line in lines), "a command is not broken"


def test_what_embed_would_use() -> None:
    def defaults(cuda: str | None, **reasons: str | None) -> dict[str, str]:
        engines = [(name, device) for _, name, device in engines_by_title()]
        of_gpu = {engine: Finding(cuda if engine[1] == "cuda" else None) for engine in engines}
        return doctor.embed_defaults(
            of_gpu | {(name, "cuda"): Finding(reason) for name, reason in reasons.items()}
        )

    assert defaults(None)["on cuda"].startswith("tensorrt fp16, tensorrt_rtx fp16, aoti bf16, ")
    without = defaults(None, tensorrt="not installed; install it")
    assert without["on cuda"].startswith("tensorrt_rtx fp16, ")
    assert "tensorrt " not in without["on cuda"]
    assert "int8" not in without["on cuda"], "it changes scores"
    no_gpu = defaults("no GPU; buy one")
    assert no_gpu["on cuda"] == "nothing, because no GPU"
    assert no_gpu["on cpu"].startswith("onnx fp32, aoti fp32, ")


@pytest.mark.slow
def test_the_report_of_this_machine() -> None:
    text = report()
    found = rows(text)
    assert found["ONNX Runtime, CPU"][0] == "yes"
    for library in (*LIBRARIES, "NumPy", "OpenCV", "HDF5", "Polars"):
        assert found[library][0] == "yes"
    for title, (answer, rest) in found.items():
        assert (" fix: " in rest) == (answer == "no"), title
    if not has_gpu():
        assert " has no NVIDIA GPU fix: " in found["TensorRT-RTX"][1]
        assert re.search("on cuda +nothing, because this .* has no NVIDIA GPU", text)


@pytest.mark.slow
def test_the_report_with_a_driver_that_does_not_load(tmp_path: Path) -> None:
    if has_gpu():
        pytest.skip("this machine has a GPU")
    text = report(fake_driver.install_broken(tmp_path))
    for title in ("ONNX Runtime, CUDA", "AOTInductor, CUDA", "TensorRT", "TensorRT-RTX"):
        answer, rest = rows(text)[title]
        assert answer == "no"
        assert "NVIDIA's driver does not load" in rest
        assert rest.endswith("fix: restart the machine, or install NVIDIA's driver again")


@pytest.mark.slow
def test_the_report_with_a_driver_for_an_older_cuda(tmp_path: Path) -> None:
    if has_gpu():
        pytest.skip("this machine has a GPU")
    built_for = attempt("try_engine", "onnx", "cpu")["cuda"]
    if built_for is None or not built_for.startswith("13."):
        pytest.skip("this ONNX Runtime was not built for CUDA 13")
    text = report(fake_driver.install(tmp_path, cuda=12060))
    assert re.search(r"NVIDIA driver +560\.35\.03\n +driver's CUDA +12\.6\n", text)
    assert re.search(r"GPU +NVIDIA Fake, compute capability 8\.9\n", text)
    found = rows(text)
    assert found["ONNX Runtime, CPU"][0] == "yes"
    answer, rest = found["ONNX Runtime, CUDA"]
    assert answer == "no"
    assert f"was built for CUDA {built_for}, and the NVIDIA driver runs CUDA up to 12.6" in rest
    assert rest.endswith(
        'fix: run `pip install "isic-toolkit[cuda12]"`, or install NVIDIA driver 580 or newer'
    )
    assert re.search("on cuda +nothing, because ONNX Runtime .* was built for CUDA 13", text)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["onnx", "tensorrt", "tensorrt_rtx"])
def test_the_reason_of_every_engine_has_a_fix(name: str, device: str) -> None:
    reason = unavailable_reason(name, device)
    assert reason is None or "; " in reason


def test_the_module_imports_no_library() -> None:
    code = "import sys, infer.doctor; print({'numpy', 'onnxruntime', 'torch'} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "set()\n"
