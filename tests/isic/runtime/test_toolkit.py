"""The installed command `isic-toolkit`, and how little is imported before a command runs."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks.start import SHOW_MODULES
from isic.runtime.toolkit import PACKAGES, SCRIPTS, candidates, command_lines
from tests.support.commands import ROOT

HEAVY = {"torch", "torchvision", "timm", "sklearn", "scipy", "polars", "cv2", "onnxruntime", "onnx"}
HEAVY |= {"lightgbm", "h5py", "albumentations", "pandas"}
EVERY_COMMAND = [line.split() for line in command_lines()]


def heavy_modules(*words: str) -> tuple[int, set[str]]:
    """Runs `python -m <words>`. Returns its exit code and the heavy modules it loaded."""
    command = [sys.executable, "-c", SHOW_MODULES, *words]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return ended.returncode, HEAVY & set(ended.stderr.split())


@pytest.mark.parametrize("words", EVERY_COMMAND, ids=" ".join)
def test_help_imports_no_heavy_library(words: list[str]) -> None:
    assert heavy_modules(*words, "--help") == (0, set())


@pytest.mark.parametrize("words", EVERY_COMMAND, ids=" ".join)
def test_an_unknown_key_is_refused_before_a_heavy_library_is_imported(words: list[str]) -> None:
    assert heavy_modules(*words, "--no_such_key", "1") == (2, set())


@pytest.mark.parametrize(
    "words", [["isic", "--version"], ["infer", "--help"], ["isic", "check", "--data", "/nowhere"]]
)
def test_other_quick_answers(words: list[str]) -> None:
    code, heavy = heavy_modules(*words)
    assert code == (2 if "check" in words else 0)
    assert heavy == set()


def run_toolkit(*words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", "from isic.runtime.toolkit import main; main()", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_packages_are_verbs() -> None:
    assert run_toolkit("--version").stdout == f"isic-toolkit {version('isic-toolkit')}\n"
    listed = run_toolkit("--help").stdout
    for package in PACKAGES:
        assert f"\n{package} " in f"\n{listed}"
    assert run_toolkit("isic", "--help").stdout.startswith("synth ")
    ended = run_toolkit("trian")
    assert ended.returncode == 2
    assert ended.stderr == 'error: unknown command "trian", did you mean "train"?\n'


def test_a_closed_output_is_no_error(shell_environment: dict[str, str]) -> None:
    script = "isic-toolkit completion bash | head -1; isic-toolkit --help | true"
    ended = subprocess.run(
        ["bash", "-c", script], env=shell_environment, capture_output=True, text=True, check=False
    )
    assert ended.stderr == ""


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["tr"], "train"),
        (["infer", ""], "predict"),
        (["infer", "embed", "--"], "--batch_size"),
        (["train", "--"], "--lr_backbone"),
        (["train", "--config", ""], "eva02_base"),
        (["infer", "embed", "--on_error", ""], "skip"),
        (["train", "--bf16", ""], "true"),
        (["completion", ""], "zsh"),
    ],
)
def test_completions(words: list[str], found: str) -> None:
    assert found in candidates(words)


def test_nothing_is_offered_for_a_path_or_an_unknown_command() -> None:
    assert candidates(["train", "--data", ""]) == []
    assert candidates(["infer", "fly", "--"]) == []
    assert candidates(["fly", ""]) == []


@pytest.fixture
def shell_environment(tmp_path: Path) -> dict[str, str]:
    """The environment of a shell that finds the command, which need not be installed."""
    run = f'exec {sys.executable} -c "from isic.runtime.toolkit import main; main()" "$@"'
    command = tmp_path / "isic-toolkit"
    command.write_text(f"#!/bin/sh\n{run}\n")
    command.chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def test_bash_completes_by_the_script(shell_environment: dict[str, str]) -> None:
    script = SCRIPTS["bash"] + (
        "\nCOMP_WORDS=(isic-toolkit infer embed --f); COMP_CWORD=3; _isic_toolkit\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    ended = subprocess.run(
        ["bash", "-c", script], env=shell_environment, capture_output=True, text=True, check=False
    )
    assert set(ended.stdout.split()) == {"--fold", "--folds", "--force", "--format"}


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_completes_by_the_script(shell_environment: dict[str, str]) -> None:
    """With fakes of zsh's `compadd` and `_files`, which exist only while it completes."""
    script = (
        "compdef() { : }; compadd() { print -l -- ${(P)2} }; _files() { print files }\n"
        + SCRIPTS["zsh"]
        + '\nwords=(isic-toolkit infer ""); CURRENT=3; _isic_toolkit'
        + '\nwords=(isic-toolkit train --data ""); CURRENT=4; _isic_toolkit'
    )
    ended = subprocess.run(
        ["zsh", "-fc", script], env=shell_environment, capture_output=True, text=True, check=False
    )
    found = ended.stdout.split()
    assert found[:2] == ["embed", "fit"], ended.stderr
    assert found[-1] == "files"
