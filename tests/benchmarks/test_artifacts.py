from pathlib import Path

import pytest

from benchmarks import artifacts
from benchmarks.artifacts import ArtifactStore, BuildFailed, open_store
from benchmarks.untrained import create_untrained
from infer.engines import create


def test_an_artifact_is_built_once(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    untrained = create_untrained(str(tiny))
    first = ArtifactStore(tmp_path).get(untrained, "onnx", "fp32", "cpu", 4)
    monkeypatch.setattr(artifacts, "export_untrained", None)
    again = ArtifactStore(tmp_path).get(untrained, "onnx", "fp32", "cpu", 4)
    assert again == first
    assert create(again.path, again.manifest, "cpu").device == "cpu"
    assert [path.name for path in again.path.parents[1].iterdir()] == ["tiny-onnx-fp32-cpu-4"]


@pytest.mark.parametrize("other", [("onnx", "fp16", 4), ("onnx", "fp32", 8)], ids=str)
def test_another_request_is_another_artifact(
    other: tuple[str, str, int], tiny: Path, tmp_path: Path
) -> None:
    untrained = create_untrained(str(tiny))
    store = ArtifactStore(tmp_path)
    name, precision, batch = other
    paths = {
        store.get(untrained, "onnx", "fp32", "cpu", 4).path,
        store.get(untrained, name, precision, "cpu", batch).path,
    }
    assert len(paths) == 2


def test_a_failure_is_remembered_and_an_interrupted_build_is_not(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    untrained = create_untrained(str(tiny))
    errors: list[BaseException] = [KeyboardInterrupt(), OSError("no compiler")]

    def fail(*_: object, **__: object) -> None:
        raise errors.pop(0)

    monkeypatch.setattr(artifacts, "export_untrained", fail)
    store = ArtifactStore(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        store.get(untrained, "onnx", "fp32", "cpu")
    for _ in range(2):
        with pytest.raises(BuildFailed, match="OSError: no compiler"):
            store.get(untrained, "onnx", "fp32", "cpu")
    assert not errors


def test_a_store_without_a_folder_is_temporary(tmp_path: Path) -> None:
    with open_store(None) as store:
        assert store.root.is_dir()
    assert not store.root.exists()
    with open_store(tmp_path) as store:
        assert store.root == tmp_path
