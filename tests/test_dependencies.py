"""Every library that a package imports is declared, in the base install or in an extra."""

import ast
import configparser
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from isic.runtime.extras import EXTRAS
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
    "benchmarks": {"tensorrt", "tensorrt_rtx"},
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


def test_a_missing_library_names_its_extra(tmp_path: Path) -> None:
    from isic.runtime.extras import missing_library

    sentence = missing_library(ModuleNotFoundError("No module named 'timm'", name="timm.data"))
    assert str(sentence) == 'timm is not installed; run pip install "isic-toolkit[train]"'
    assert missing_library(ModuleNotFoundError("No module named 'mine'", name="mine")) is None
