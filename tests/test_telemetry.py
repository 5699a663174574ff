"""No process of this toolkit reports its use to anybody, or writes an identifier for that."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from isic import NO_TELEMETRY

ROOT = Path(__file__).parents[1]
PACKAGES = ("isic", "train", "export", "infer", "benchmarks")
LIBRARIES = (
    "albumentations",
    "catboost",
    "cv2",
    "h5py",
    "huggingface_hub",
    "lightgbm",
    "onnx",
    "onnxruntime",
    "polars",
    "ray",
    "sklearn",
    "tensorboard",
    "timm",
    "torch",
    "xgboost",
)
IMPORTS = """
import importlib, sys, threading
def refuse(event, arguments):
    if event in {"socket.connect", "socket.getaddrinfo"}:
        sys.exit(f"{event} {arguments}")
sys.addaudithook(refuse)
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def clean(home: Path) -> dict[str, str]:
    """The environment of a user who has switched nothing off, with an empty home."""
    home.mkdir()
    dropped = {*NO_TELEMETRY, "XDG_CACHE_HOME", "HF_HUB_OFFLINE"}
    kept = {key: text for key, text in os.environ.items() if key not in dropped}
    return kept | {"HOME": str(home), "PYTHONPATH": str(ROOT)}


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_session_leaves_no_identifier_and_connects_to_nobody(tmp_path: Path) -> None:
    """An engine loads a graph and runs it; strace, if there is one, shows connections."""
    code = (
        "from infer.engines import unavailable_reason as reason; import time; "
        "print(reason('onnx', 'cpu')); time.sleep(1)"
    )
    trace = tmp_path / "trace"
    strace = shutil.which("strace")
    traced = [strace, "-f", "-qq", "-e", "trace=connect", "-o", str(trace)] if strace else []
    command = [*traced, sys.executable, "-c", code]
    environment = clean(tmp_path / "home")
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.stdout == "None\n", ended.stderr
    assert files(tmp_path / "home") == []
    assert not trace.is_file() or "AF_INET" not in trace.read_text()


@pytest.mark.slow
def test_the_libraries_connect_to_nobody_when_they_are_imported(tmp_path: Path) -> None:
    names = [name for name in LIBRARIES if find_spec(name)]
    command = [sys.executable, "-c", IMPORTS, "train", *names]
    environment = clean(tmp_path / "home")
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert files(tmp_path / "home") == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_switches_telemetry_off_before_it_imports_a_library(
    package: str, tmp_path: Path
) -> None:
    code = (
        f"import os, sys, {package}; print([os.environ.get(name) for name in sys.argv[1:]]); "
        "print({'onnxruntime', 'albumentations', 'ray', 'huggingface_hub'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", code, *NO_TELEMETRY]
    environment = clean(tmp_path / "home")
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout == f"{[*NO_TELEMETRY.values()]}\nset()\n"


def test_a_value_that_the_user_has_set_stays(tmp_path: Path) -> None:
    environment = clean(tmp_path / "home") | {"RAY_USAGE_STATS_ENABLED": "1"}
    code = "import os, infer; print(os.environ['RAY_USAGE_STATS_ENABLED'])"
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert ended.stdout == "1\n"
