"""The names of `infer` for callers from Python, and the examples of docs/python.md."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import infer
from isic.runtime.extras import EXTRAS
from tests.support.commands import ROOT
from tests.support.datasets import jpeg
from tests.support.ensembles import fit_small, predict_table

PAGE = ROOT / "docs" / "python.md"
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
NETWORK = "vit_tiny"
"""The network of the examples, in place of which the test has a smaller one."""

WITHOUT_EXTRAS = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""

CHECKS = """
expected = pl.read_csv("submission.csv")
assert expected["isic_id"].equals(metadata["isic_id"])
np.testing.assert_array_equal(scores, expected["target"])
np.testing.assert_array_equal(scores, again)
assert drops.shape == (2, 7, 7) and np.abs(drops[0]).max() > 0
assert len(mixed) == 3 and list(some.failed) == [1]
"""


def run_python(code: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def workspace(exported: Path, embedded: Path, synth_dataset: Path, tmp_path: Path) -> Path:
    """A folder with the files that the page names."""
    outputs = tmp_path / "outputs"
    (outputs / "embeddings").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "photos").mkdir()
    (outputs / "tiny").symlink_to(exported)
    (outputs / "embeddings" / "tiny").symlink_to(embedded)
    (tmp_path / "data" / "isic-2024").symlink_to(synth_dataset)
    for seed, name in enumerate("ab"):
        (tmp_path / "photos" / f"{name}.jpg").write_bytes(jpeg(60, seed=seed))
    ensemble = outputs / "ensemble"
    fit_small(synth_dataset, ensemble, features="multimodal", embeddings=embedded, num_rounds=10)
    where = {"data": synth_dataset, "embeddings": embedded, "output": tmp_path / "submission.csv"}
    predict_table(tmp_path, ensemble=ensemble, **where)
    return tmp_path


@pytest.mark.slow
def test_the_examples_run_without_torch_and_score_as_predict_does(workspace: Path) -> None:
    blocks = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    assert len(blocks) > 5
    absent = {module for modules in EXTRAS.values() for module in modules}
    assert "torch" in absent
    code = "\n".join([WITHOUT_EXTRAS.format(absent=absent), *blocks, CHECKS])
    ended = run_python(code.replace(NETWORK, "tiny"), workspace)
    assert ended.returncode == 0, ended.stderr
    assert "{1: 'cannot be read: No such file or directory'}" in ended.stdout
    assert "image 1 (photos/absent.jpg) cannot be used" in ended.stdout
    assert "have fewer than" in ended.stdout
    assert "the metadata lacks the column tbp_lv_H" in ended.stdout


def test_every_public_name_is_there_and_documented() -> None:
    for name in infer.__all__:
        assert getattr(infer, name).__doc__
        assert name in dir(infer)
    assert not hasattr(infer, "no_such_name")


def test_importing_the_package_imports_no_library(tmp_path: Path) -> None:
    heavy = {"numpy", "polars", "onnxruntime", "lightgbm", "cv2", "sklearn", "pydantic"}
    code = f"import infer, sys; print(sorted({heavy} & set(sys.modules)))"
    assert run_python(code, tmp_path).stdout == "[]\n"
