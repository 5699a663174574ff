"""A bundle is tested in a process of its own before it gets its name."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import polars as pl
import pytest

from infer.submission.rehearsal import NUM_OWN, NUM_SYNTHETIC, rehearse
from isic.runtime.errors import UserError
from isic.runtime.files import read_json
from isic.runtime.installed import this_python
from tests.infer.submission.conftest import Project
from tests.support.commands import Cli, run_module


@pytest.mark.slow
def test_a_bundle_submits_before_it_gets_its_name(
    project: Project, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--ensemble", project.ensembles / "final", "--runs", project.runs)
    made = tmp_path / "bundle"
    monkeypatch.chdir(tmp_path)
    ended = cli(
        *("infer", "bundle", *flags, "--out", made.name, "--packages", "false"),
        *("--data", project.data),
    )
    assert ended.code == 0, ended.err
    rehearsal = read_json(made / "bundle.json")["rehearsal"]
    assert rehearsal["rows"] == {"synthetic": NUM_SYNTHETIC, "own": NUM_OWN}
    assert set(rehearsal["images_per_second"]) == {"tiny", "tiny_b"}
    assert "without network and PyTorch" in ended.out
    assert "for 500,000 images" in ended.out
    assert not list(made.rglob("__pycache__"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import socket; socket.create_connection(('127.0.0.1', 9))", "uses the network"),
        ("import torch", "no module in this test: torch|torch is not installed"),
        ("open(__file__, 'a').write('#')", "writes into a read-only folder|no access to"),
        ("raise SystemExit(7)", "does not submit synthetic rows"),
    ],
    ids=["network", "torch", "write", "exit"],
)
def test_a_bundle_that_needs_more_than_the_other_machine_has_is_refused(
    code: str, reason: str, made: Path, project: Project, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(made, tmp_path / "bundle"))
    path = broken / "code" / "infer" / "submission" / "submit.py"
    path.write_text(f"{path.read_text()}\n{code}\n")
    settings = project.settings(tmp_path / "b")
    with pytest.raises(UserError, match=reason):
        rehearse(broken, settings)


@pytest.mark.slow
def test_an_ensemble_that_reads_an_own_column_is_tested_on_own_rows(
    project: Project, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(project.data, tmp_path / "data"))
    for split in ("train", "test"):
        table = pl.read_csv(data / f"{split}-metadata.csv", infer_schema=False)
        rows = pl.int_range(pl.len()) % 7
        table.with_columns(clinic=rows).write_csv(data / f"{split}-metadata.csv")
    (tmp_path / "own.yaml").write_text("room: CAST(clinic AS DOUBLE) / 2")
    run_module(
        *("infer", "fit", "--data", data, "--out", tmp_path / "ensembles", "--name", "own"),
        *("--define", tmp_path / "own.yaml", "--features", "raw,own", "--num_folds", 3),
        *("--seeds", 1, "--num_rounds", 5),
    )
    own = tmp_path / "ensembles" / "own"
    with pytest.raises(
        UserError, match=r"reads clinic, which the synthetic rows .* lack; add --data"
    ):
        project.bundle(tmp_path / "a", own, data=None, test=True)  # type: ignore[arg-type]
    made = project.bundle(tmp_path / "b", own, data=data, test=True)  # type: ignore[arg-type]
    rehearsal = read_json(made / "bundle.json")["rehearsal"]
    assert rehearsal["rows"] == {"own": NUM_OWN}
    assert rehearsal["images_per_second"] == {}


@pytest.mark.slow
def test_the_notebook_submits_in_a_folder_like_the_competitions(
    project: Project, tmp_path: Path
) -> None:
    inputs = tmp_path / "input"
    made = project.bundle(inputs / "isic-2024-bundle", "both")
    shutil.copytree(project.data, inputs / "isic-2024-challenge")
    working = tmp_path / "working"
    working.mkdir()
    notebook = nbformat.read(made / "notebook" / "submit.ipynb", as_version=4)
    nbformat.validate(notebook)
    environment = {**os.environ, "KAGGLE_INPUT": str(inputs)}
    client = nbclient.NotebookClient(
        notebook, timeout=240, resources={"metadata": {"path": working}}
    )
    client.execute(env=environment)
    sample = pl.read_csv(project.data / "sample_submission.csv")
    submission = pl.read_csv(working / "submission.csv")
    assert submission["isic_id"].equals(sample["isic_id"])
    assert submission["target"].n_unique() > 10
    assert {path.suffix for path in working.iterdir()} == {".csv", ".json", ".parquet"}


def test_the_packages_of_another_python_are_refused(made: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(made, tmp_path / "bundle"))
    (other / "site").mkdir()
    manifest = read_json(other / "bundle.json")
    (other / "bundle.json").write_text(json.dumps({**manifest, "python": "3.99"}))
    ended = subprocess.run(
        [sys.executable, str(other / "submit.py")], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert ended.stderr == (
        f"error: this bundle has the packages of Python 3.99, this is {this_python()}; run it with "
        f"python3.99, or write it again with --python {this_python()}\n"
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("package_index")
def test_a_bundle_with_packages_needs_none_of_the_machine(
    project: Project, tmp_path: Path, cli: Cli
) -> None:
    made = tmp_path / "bundle"
    flags = ("--ensemble", project.ensembles / "one", "--runs", project.runs)
    ended = cli("infer", "bundle", *flags, "--out", made, "--test", "false")
    assert ended.code == 0, ended.err
    licences = read_json(made / "bundle.json")["licences"]
    assert any(name.startswith("onnxruntime ") for name in licences)
    assert not any(name.startswith("onnxruntime-gpu") for name in licences)
    output = tmp_path / "submission.csv"
    # -S: without the site-packages of this Python.
    ended_there = subprocess.run(
        [
            *(sys.executable, "-S", str(made / "submit.py"), "--data", str(project.data)),
            *("--output", str(output), "--strict", "true"),
        ],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended_there.returncode == 0, ended_there.stderr
    assert len(pl.read_csv(output)) == 30
