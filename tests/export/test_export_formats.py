"""`python -m export` with several formats, and what `infer` makes of what it leaves."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Cli

from infer.engines import load
from isic.errors import UserError
from isic.files import read_manifest

FLAGS = ("--formats", "onnx,aoti,tensorrt_rtx", "--precision", "fp32,fp16", "--max_batch", 16, "--opt_batch", 8)


@pytest.fixture(scope="module")
def run(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(trained, tmp_path_factory.mktemp("formats") / "tiny")


@pytest.fixture(scope="module")
def first(run: Path) -> Path:
    """One fold in many formats."""
    from conftest import run_module

    run_module("export", "--config", "tiny", "--model_dir", run, "--fold", 0, *FLAGS)
    return run / "fold_0"


def names(folder: Path) -> set[str]:
    return {json.loads(path.read_text())["artifact"] for path in folder.glob("*.*.json") if path.name != "parity.json"}


def test_one_command_makes_them_all(first: Path) -> None:
    made = names(first)
    assert {"model.onnx", "model.fp16.onnx"} <= made
    assert len([name for name in made if name.endswith(".pt2")]) == 2
    assert len([name for name in made if name.endswith(".plan")]) == 2
    results = json.loads((first / "parity.json").read_text())
    assert all(result["passed"] for result in results.values())
    assert set(results) == {name for name in made if not name.endswith(".plan")}, "no GPU has run the plans"
    images = np.random.default_rng(3).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    exact, *others = (load(first / name, "auto").run(images)[0] for name in sorted(results))
    assert all(np.abs(exact - other).max() < 0.1 for other in others)


def test_what_is_up_to_date_stays_until_an_option_changes(run: Path, first: Path, cli: Cli) -> None:
    base = ("export", "--config", "tiny", "--model_dir", run, "--fold", 0, "--formats", "onnx,tensorrt_rtx")
    assert cli(*base, "--max_batch", 16, "--opt_batch", 8).out.count("up to date") == 2
    ended = cli(*base, "--max_batch", 32, "--opt_batch", 8)
    assert ended.code == 0 and ended.out.count("up to date") == 1, "the batch profile is no matter of the ONNX file"
    assert "not gated" in ended.out


def test_a_plan_that_no_gpu_has_run_is_not_used(first: Path) -> None:
    plan = next(first.glob("*.plan"))
    assert read_manifest(plan)["parity"] is None
    with pytest.raises(UserError, match="has not passed the parity gate"):
        load(plan)


def test_a_package_for_another_machine_is_not_loaded(first: Path, tmp_path: Path) -> None:
    package = next(first.glob("*.fp32.*.pt2"))
    manifest = json.loads((first / f"{package.name}.json").read_text())
    copy = Path(shutil.copy(package, tmp_path))
    (tmp_path / f"{package.name}.json").write_text(json.dumps({**manifest, "architecture": "cpu-sparc"}))
    with pytest.raises(UserError, match=r"was compiled for cpu-sparc, this is cpu-.*--formats aoti --device cpu"):
        load(copy)
    with pytest.raises(UserError, match="no NVIDIA GPU"):
        load(package, "cuda")


def test_check_gates_what_is_there(run: Path, first: Path, cli: Cli) -> None:
    base = ("export", "--config", "tiny", "--model_dir", run, "--fold", 0, "--check")
    before = read_manifest(first / "model.onnx")
    assert cli(*base).code == 0
    after = read_manifest(first / "model.onnx")
    assert after["parity"].keys() == before["parity"].keys() and after["made_from"] == before["made_from"]
    ended = cli(*base, "--fold", 1)
    assert ended.code == 2 and "no such file" in ended.err
