"""Every library that a package imports is declared, in the base install or in an extra."""

import ast
import configparser
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.__main__ import load_benchmark
from benchmarks.settings import IngestSettings, SlowdownSettings, TablesSettings
from isic.runtime.errors import UserError
from isic.runtime.extras import EXTRAS, missing_library
from tests.support.commands import ROOT

DISTRIBUTIONS = {
    "PIL": "pillow",
    "cuda": "cuda-bindings",
    "cv2": "opencv-python-headless",
    "sklearn": "scikit-learn",
    "xgboost": "xgboost-cpu",
    "yaml": "pyyaml",
}
"""Names on PyPI that differ from the module's."""
OWN = {"isic", "train", "export", "infer", "benchmarks"}
INSTALLED_FOR = {
    "isic": ("install_requires",),
    "infer": ("install_requires",),
    "train": ("install_requires", "train"),
    "export": ("install_requires", "train", "export"),
    "benchmarks": ("install_requires", "train", "export", "boosters", "benchmarks"),
}
"""The lists of setup.cfg that are installed for each package."""
OPTIONAL = {
    "infer": {"torch", "tensorrt", "tensorrt_rtx", "cuda", "ray", "xgboost", "catboost"},
    "train": {"torch_xla", "tensorboard"},
    "export": {"tensorrt", "tensorrt_rtx", "tritonclient"},
    "benchmarks": {"tensorrt", "tensorrt_rtx", "ray"},
}
"""Modules that a package imports only if they are needed."""


def requirements(name: str) -> list[Requirement]:
    """Return the requirements of a list in setup.cfg, without this package's own extras."""
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    section = "options" if name == "install_requires" else "options.extras_require"
    lines = [line.strip() for line in setup[section][name].splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith(("#", "isic-"))]


def imported(package: str) -> set[str]:
    """Return the top-level names of the libraries that a package imports anywhere."""
    names: set[str] = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - OWN


@pytest.mark.parametrize("package", INSTALLED_FOR)
def test_every_import_is_declared(package: str) -> None:
    declared = {need.name for name in INSTALLED_FOR[package] for need in requirements(name)}
    needed = imported(package) - OPTIONAL.get(package, set())
    assert {DISTRIBUTIONS.get(name, name) for name in needed} - declared == set()


def test_the_base_install_has_neither_torch_nor_onnx() -> None:
    base = {need.name for need in requirements("install_requires")}
    assert base.isdisjoint({"torch", "torchvision", "timm", "albumentations", "onnx", "onnxscript"})


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_installs_the_modules_that_it_is_named_for(extra: str) -> None:
    declared = {need.name for need in requirements(extra)}
    for module in EXTRAS[extra]:
        assert DISTRIBUTIONS.get(module, module) in declared, module


def test_cuda_12_and_13_get_a_fitting_onnx_runtime() -> None:
    admits = {cuda: requirements(cuda)[0].specifier for cuda in ("cuda12", "cuda13")}
    assert "1.26.0" in admits["cuda12"]
    assert "1.27.0" not in admits["cuda12"]
    assert "1.26.0" not in admits["cuda13"]
    assert "1.31.1" in admits["cuda13"]
    for need in requirements("install_requires"):
        if need.name == "onnxruntime-gpu":
            assert "1.26.0" in need.specifier
            assert "1.31.1" in need.specifier


def test_a_missing_library_names_its_extra() -> None:
    missing = ModuleNotFoundError("No module named 'timm'", name="timm.data")
    text = 'timm is not installed; run `pip install "isic-toolkit[{}]"`'
    assert str(missing_library(missing)) == text.format("train")
    assert str(missing_library(missing, "export")) == text.format("export")
    assert missing_library(ModuleNotFoundError("No module named 'mine'", name="mine")) is None


BASE_ONLY = """
import importlib.abc, runpy, sys

absent = set(sys.argv.pop(1).split(","))
sys.argv = sys.argv[1:]

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
runpy.run_module(sys.argv[0], run_name="__main__")
"""


def run_base(folder: Path, *words: object) -> "subprocess.CompletedProcess[str]":
    """Runs a command in another folder as if only the base install were there."""
    absent = ",".join(module for modules in EXTRAS.values() for module in modules)
    command = [sys.executable, "-c", BASE_ONLY, absent, *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_inference_needs_the_base_install_only(
    exported: Path, synth_dataset: Path, tmp_path: Path
) -> None:
    data = ("--data", synth_dataset)
    places = ("--model_dir", exported, "--output_dir", tmp_path)
    embedded = run_base(tmp_path, "infer", "embed", "--config", "tiny", *data, *places)
    assert embedded.returncode == 0, embedded.stderr
    runs = ("--embeddings", tmp_path / "tiny", "--output_dir", tmp_path / "ensemble")
    fitted = run_base(
        tmp_path, "infer", "fit", "--features", "multimodal", "--seeds", 1, *data, *runs
    )
    assert fitted.returncode == 0, fitted.stderr
    flags = ("--ensemble", tmp_path / "ensemble", "--embeddings", tmp_path / "tiny")
    predicted = run_base(tmp_path, "infer", "predict", *flags, *data)
    assert predicted.returncode == 0, predicted.stderr
    assert (tmp_path / "submission.csv").is_file()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("train --config demo", 'run `pip install "isic-toolkit[train]"'),
        ("export --config demo", 'run `pip install "isic-toolkit[export]"'),
        ("benchmarks tabular --results .", 'run `pip install "isic-toolkit[benchmarks]"'),
        ("infer fit --features raw --libraries xgboost --data {data}", "[boosters]"),
        ("infer embed --config tiny --model_dir {run} --data {data} --ray local", "[ray]"),
        ("isic check --data s3://bucket/isic-2024", "[remote]"),
    ],
)
def test_a_command_names_the_extra_that_it_needs(
    words: str, sentence: str, exported: Path, synth_dataset: Path, tmp_path: Path
) -> None:
    ended = run_base(tmp_path, *words.format(data=synth_dataset, run=exported).split())
    assert ended.returncode == 2, ended.stderr
    assert sentence in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_an_installed_package_has_no_place_for_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.__main__.IS_CHECKOUT", False)
    for settings, flags in ((IngestSettings, {}), (SlowdownSettings, {})):
        with pytest.raises(UserError, match="give --results"):
            load_benchmark(settings, flags)
    with pytest.raises(UserError, match="in a checkout"):
        load_benchmark(TablesSettings, {})
    assert load_benchmark(IngestSettings, {"results": "here"})


def test_the_constraints_satisfy_every_requirement() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines)
    by_name = {canonicalize_name(name): version for name, version in pinned.items()}
    named = ["install_requires", "train", "export", "boosters", "remote", "tensorboard", "dev"]
    for requirement in (each for name in named for each in requirements(name)):
        if requirement.marker and not requirement.marker.evaluate():
            continue
        version = by_name.get(canonicalize_name(requirement.name))
        assert version, f"constraints.txt lacks {requirement.name}; run `make constraints`"
        assert requirement.specifier.contains(version, prereleases=True), requirement
