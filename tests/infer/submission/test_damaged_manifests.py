"""Every field of every manifest may be missing or of another type: that is a sentence at most."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from infer.embedding.models import find_models
from infer.embedding.run_spec import earlier_engines
from infer.embedding.store import read_run
from infer.ensemble.blends.artifact import open_scorer
from infer.ensemble.scoring.scores import show_scores
from infer.ensemble.settings import ScoresSettings
from infer.submission.contents import open_bundle
from isic.runtime.errors import UserError
from tests.infer.submission.conftest import Project

VALUES: tuple[Any, ...] = (None, True, -1, 1.5, "", "x", "a\0b", [], [None], {}, {"": None})
MISSING = object()


def damaged(value: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield copies in which one entry, at any depth of mappings, is missing or another value."""
    values = cycle(VALUES)
    for path in list(_paths(value)):
        for new in (next(values), next(values), MISSING):
            changed = copy.deepcopy(value)
            parent = changed
            for key in path[:-1]:
                parent = parent[key]
            if new is MISSING:
                del parent[path[-1]]
            else:
                parent[path[-1]] = new
            yield f"{'.'.join(path)} = {'missing' if new is MISSING else repr(new)}", changed


def _paths(value: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for key, part in value.items():
        yield (key,)
        if isinstance(part, dict):
            yield from ((key, *rest) for rest in _paths(part))


def count_refusals(path: Path, use: Callable[[], object]) -> int:
    """Return how many damaged copies of a file are refused; other exceptions are failures."""
    text = path.read_text()
    found = 0
    for change, value in damaged(json.loads(text)):
        path.write_text(json.dumps(value))
        try:
            use()
        except UserError:
            found += 1
        except Exception as error:
            raise AssertionError(f"{path.name} with {change}") from error
    path.write_text(text)
    use()
    return found


@pytest.fixture
def copied(project: Project, made: Path, tmp_path: Path) -> Path:
    """A copy of the project, and of its bundle."""
    folders = {
        "runs": project.runs,
        "embeddings": project.embeddings,
        "ensembles": project.ensembles,
    }
    for name, folder in {**folders, "bundle": made}.items():
        shutil.copytree(folder, tmp_path / name, ignore=shutil.ignore_patterns("code"))
    return tmp_path


def test_manifests_of_ensembles(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("both", "final"):
        root = copied / "ensembles" / name
        assert count_refusals(root / "ensemble.json", lambda root=root: open_scorer(root)) > 50
    settings = ScoresSettings(output_dir=copied / "ensembles")
    path = copied / "ensembles" / "tables" / "ensemble.json"
    assert count_refusals(path, lambda: show_scores(settings)) > 50
    capsys.readouterr()


def test_manifests_of_artifacts(copied: Path) -> None:
    run = copied / "runs" / "tiny"

    def find() -> None:
        models = find_models(run, "tiny", "onnx", device="cpu")
        assert models.num_features > 0
        assert models.checkpoints
        assert models.weights

    assert count_refusals(run / "fold_0" / "model.onnx.json", find) > 20


def test_manifests_of_embeddings(copied: Path) -> None:
    root = copied / "embeddings" / "tiny"
    assert count_refusals(root / "test" / "run.json", lambda: read_run(root, "test")) > 40
    assert count_refusals(root / "train" / "plan.json", lambda: earlier_engines(root)) > 40


def test_a_run_that_was_changed_after_it_was_written(copied: Path) -> None:
    root = copied / "embeddings" / "tiny"
    path = root / "test" / "run.json"
    path.write_text(path.read_text().replace('"tta": "none"', '"tta": "d4"'))
    with pytest.raises(UserError, match=r"run\.json was changed after it was written"):
        read_run(root, "test")


def test_manifests_of_bundles(copied: Path) -> None:
    bundle = copied / "bundle"

    def use() -> None:
        opened = open_bundle(bundle)
        assert opened.networks is not None
        for candidate in opened.candidates:
            opened.open(candidate)

    assert count_refusals(bundle / "bundle.json", use) > 10


@pytest.mark.parametrize(
    "name", ["ensembles/final/ensemble.json", "networks/tiny/fold_0/model.onnx.json"]
)
def test_a_manifest_in_a_bundle_that_is_not_the_bundle_s_is_refused(
    name: str, copied: Path
) -> None:
    opened = open_bundle(copied / "bundle")
    path = copied / "bundle" / name
    path.write_text(path.read_text() + " ")
    with pytest.raises(UserError, match=r"does not match bundle\.json; write it again"):
        opened.open(opened.candidates[0])
        opened.run_dir(opened.networks["tiny"])


@pytest.mark.parametrize("members", [[], ["none"], ["tables", "none"]])
def test_a_candidate_of_members_that_are_not_there_is_refused(
    members: list[str], copied: Path
) -> None:
    path = copied / "bundle" / "bundle.json"
    manifest = json.loads(path.read_text())
    manifest["candidates"][-1]["members"] = members
    path.write_text(json.dumps(manifest))
    opened = open_bundle(copied / "bundle")
    with pytest.raises(UserError, match=r"bundle\.json names members that .* has not"):
        opened.open(opened.candidates[-1])
