import json
import shutil
from pathlib import Path

import pytest

from infer.ensemble.artifact import open_ensemble
from isic.runtime.errors import UserError
from isic.runtime.files import sha256, write_json
from tests.support.ensembles import (
    copy_tree,
    fit_small,
    predict_table,
)


def test_a_parent_folder_is_enough_if_it_has_one_ensemble(project: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"several ensembles, choose one: .*engineered.*image_tiny"):
        predict_table(project, ensemble="")
    shutil.copytree(project / "ensemble" / "engineered", tmp_path / "ensemble" / "engineered")
    expected = predict_table(project, "engineered")
    assert predict_table(project, ensemble=tmp_path / "ensemble", embeddings=()).equals(expected)
    with pytest.raises(UserError, match="holds no finished ensemble"):
        predict_table(project, ensemble=tmp_path / "nowhere")


def test_an_ensemble_without_its_manifest_is_not_finished(project: Path, tmp_path: Path) -> None:
    root = copy_tree(project, tmp_path, "ensemble/engineered")
    (root / "ensemble.json").unlink()
    with pytest.raises(UserError, match="holds no finished ensemble"):
        predict_table(project, ensemble=root)


@pytest.mark.parametrize(
    "name", ["lightgbm_fold_1_seed_0.txt", "state.json", "folds.parquet", "oof.parquet"]
)
def test_a_damaged_or_missing_file_is_refused(project: Path, tmp_path: Path, name: str) -> None:
    root = copy_tree(project, tmp_path, "ensemble/multimodal_tiny")
    (root / name).write_bytes((root / name).read_bytes()[:-40])
    with pytest.raises(UserError, match=f"{name} does not match ensemble.json"):
        predict_table(project, ensemble=root)
    (root / name).unlink()
    with pytest.raises(UserError, match=f"no such file: .*{name}"):
        predict_table(project, ensemble=root)


def forge(root: Path, **changes: object) -> None:
    """Changes fields of the state, with the digest in the manifest."""
    state = json.loads((root / "state.json").read_text()) | changes
    (root / "state.json").write_text(json.dumps(state))
    manifest = json.loads((root / "ensemble.json").read_text())
    manifest["files"]["state.json"] = sha256(root / "state.json")
    (root / "ensemble.json").write_text(json.dumps(manifest))


def test_a_changed_feature_list_is_refused(project: Path, tmp_path: Path) -> None:
    root = copy_tree(project, tmp_path, "ensemble/engineered")
    names = json.loads((root / "state.json").read_text())["names"]
    forge(root, names=[*names[:-1], "gone"])
    message = r"was fitted on 200 features, .*different: gone, patient_lof"
    with pytest.raises(UserError, match=message):
        predict_table(project, ensemble=root)
    forge(root, names=names[::-1])
    with pytest.raises(UserError, match="their order"):
        predict_table(project, ensemble=root)


@pytest.mark.parametrize("changed", [{"format": 4}, {"format": None}])
def test_a_manifest_of_another_version_is_refused(
    project: Path, tmp_path: Path, changed: dict[str, object]
) -> None:
    root = copy_tree(project, tmp_path, "ensemble/engineered")
    manifest = json.loads((root / "ensemble.json").read_text())
    write_json(root / "ensemble.json", manifest | changed)
    with pytest.raises(UserError, match=r"is of another version .*; fit the ensemble again"):
        predict_table(project, ensemble=root)
    chosen = {"features": "engineered", "num_rounds": 2}
    with pytest.raises(UserError, match=r"of another version of the toolkit; choose another"):
        fit_small(project / "data", tmp_path, **chosen)
    fit_small(project / "data", tmp_path, **chosen, force=True)


def test_features_of_an_earlier_version_are_refused(data: Path, tmp_path: Path) -> None:
    fit_small(data, tmp_path, features="sex", num_rounds=2)
    manifest = json.loads((tmp_path / "sex" / "ensemble.json").read_text())
    write_json(tmp_path / "sex" / "ensemble.json", manifest | {"features": "sex,components"})
    with pytest.raises(UserError, match='unknown features "components"'):
        open_ensemble(tmp_path / "sex")
