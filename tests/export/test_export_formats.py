"""`python -m export` with several formats, and what `infer` makes of what it leaves."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from infer.engines import load
from isic.runtime.errors import UserError
from isic.runtime.files import read_manifest
from tests.support.commands import Cli

FLAGS = (
    "--formats",
    "onnx,aoti,tensorrt_rtx",
    "--precision",
    "fp16",
    "--max_batch",
    16,
    "--opt_batch",
    8,
)


@pytest.fixture(scope="module")
def run(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(exported, tmp_path_factory.mktemp("formats") / "tiny")


@pytest.fixture(scope="module")
def first(run: Path) -> Path:
    """One fold in many formats."""
    from tests.support.commands import run_module

    run_module("export", "--config", "tiny", "--model_dir", run, "--fold", 0, *FLAGS)
    return run / "fold_0"


def names(folder: Path) -> set[str]:
    """Returns the exported artifacts that have a manifest."""
    manifests = [json.loads(path.read_text()) for path in folder.glob("*.*.json")]
    return {manifest["artifact"] for manifest in manifests if "format" in manifest}


def test_one_command_makes_them_all(first: Path) -> None:
    made = names(first)
    package, plan = (
        next(name for name in made if name.endswith(suffix)) for suffix in (".pt2", ".plan")
    )
    assert made == {"model.onnx", "model.fp16.onnx", package, plan}
    results = json.loads((first / "parity.json").read_text())
    assert all(result["passed"] for result in results.values())
    assert set(results) == made - {plan}, "no GPU has run the plan"
    images = np.random.default_rng(3).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    exact, *others = (
        load(first / name).run(images)[0] for name in ("model.onnx", "model.fp16.onnx", package)
    )
    assert all(0 < np.abs(exact - other).max() < 0.05 for other in others)


def test_what_is_up_to_date_stays_until_an_option_changes(run: Path, first: Path, cli: Cli) -> None:
    base = (
        "export",
        "--config",
        "tiny",
        "--model_dir",
        run,
        "--fold",
        0,
        "--formats",
        "onnx,tensorrt_rtx",
    )
    base = (*base, "--precision", "fp16")
    assert cli(*base, "--max_batch", 16, "--opt_batch", 8).out.count("up to date") == 2
    ended = cli(*base, "--max_batch", 32, "--opt_batch", 8)
    assert ended.code == 0 and ended.out.count("up to date") == 1, (
        "the batch profile is no matter of the ONNX file"
    )
    assert "not checked" in ended.out


def test_a_plan_that_no_gpu_has_run_is_not_used(first: Path) -> None:
    plan = next(first.glob("*.plan"))
    assert read_manifest(plan)["parity"] is None
    with pytest.raises(UserError, match="has not passed the parity check"):
        load(plan)


def test_a_package_for_another_machine_is_not_loaded(first: Path, tmp_path: Path) -> None:
    package = next(first.glob("*.pt2"))
    manifest = json.loads((first / f"{package.name}.json").read_text())
    copy = Path(shutil.copy(package, tmp_path))
    (tmp_path / f"{package.name}.json").write_text(
        json.dumps({**manifest, "architecture": "cpu-sparc"})
    )
    with pytest.raises(
        UserError, match=r"was compiled for cpu-sparc, this is cpu-.*--formats aoti --device cpu"
    ):
        load(copy)
    with pytest.raises(UserError, match="no NVIDIA GPU"):
        load(package, "cuda")


def test_embed_takes_the_engine_that_is_named(
    run: Path, first: Path, synth_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    base = (
        "infer",
        "embed",
        "--config",
        "tiny",
        "--model_dir",
        run,
        "--data",
        synth_dataset,
        "--split",
        "test",
    )
    base = (*base, "--output_dir", tmp_path)
    ended = cli(*base, "--engine", "onnx")
    assert (
        ended.code == 2 and "has model.fp16.onnx, model.onnx; choose with --precision" in ended.err
    )
    ended = cli(*base, "--engine", "onnx", "--precision", "int8")
    assert ended.code == 2 and "no fold_<k> with onnx in int8; run `python -m export" in ended.err
    ended = cli(*base, "--engine", "tensorrt_rtx")
    assert ended.code == 2 and "has not passed the parity check" in ended.err
    assert cli(*base, "--engine", "aoti").code == 0
    assert (tmp_path / "tiny" / "test" / "run.json").is_file()


def test_check_gates_what_is_there(run: Path, first: Path, cli: Cli) -> None:
    base = ("export", "--config", "tiny", "--model_dir", run, "--fold", 0, "--check")
    before = read_manifest(first / "model.onnx")
    assert cli(*base).code == 0
    after = read_manifest(first / "model.onnx")
    assert (
        after["parity"].keys() == before["parity"].keys()
        and after["made_from"] == before["made_from"]
    )
    ended = cli(*base, "--fold", 1, "--precision", "fp16")
    assert ended.code == 2 and "no such file" in ended.err
