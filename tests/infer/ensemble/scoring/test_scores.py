import shutil
from pathlib import Path

import numpy as np
import pytest

from infer.ensemble.artifact import FORMAT_VERSION, clear_ensemble
from infer.ensemble.scoring.scores import format_scores, show_scores, summarise
from infer.ensemble.settings import ScoresSettings
from isic.runtime.errors import UserError
from tests.support.ensembles import read_blend


def test_a_fold_of_one_class_has_no_score_of_its_own() -> None:
    target = np.array([0, 1, 0, 0])
    score = np.array([0.1, 0.9, 0.2, 0.3])
    fold = np.array([0, 0, 1, 1])
    summary = summarise(target, score, fold, patient=np.array(list("abcd")))
    assert summary["pauc"] == pytest.approx(0.2)
    assert summary["pauc_by_fold"] == [pytest.approx(0.2), None]
    assert summary["pauc_std"] is None


def test_finished_ensembles_of_a_folder_are_listed(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show_scores(ScoresSettings(output_dir=fitted.parent))
    assert "engineered" in capsys.readouterr().out
    broken = Path(shutil.copytree(fitted, tmp_path / "broken"))
    clear_ensemble(broken)
    with pytest.raises(UserError, match="holds no finished ensemble"):
        show_scores(ScoresSettings(output_dir=tmp_path))
    with pytest.raises(UserError, match="holds no finished ensemble"):
        show_scores(ScoresSettings(output_dir=fitted))


def test_patients_with_few_lesions_are_noted_below_the_top_15(fitted: Path) -> None:
    summary = read_blend(fitted)
    assert 0 < summary["patients_of_at_most_15"] < summary["patients_with_malignant"]
    sentence = "have at most 15 lesions, so theirs count as found in the top 15 whatever their"
    assert format_scores({"blend": summary}).count(sentence) == 1
    assert sentence not in format_scores({"blend": {**summary, "patients_of_at_most_15": 0}})


def test_scores_of_another_version_are_left_out_with_a_warning(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("old", "new"):
        shutil.copytree(fitted, tmp_path / name)
    path = tmp_path / "old" / "ensemble.json"
    path.write_text(path.read_text().replace(f'"format": {FORMAT_VERSION}', '"format": 3'))
    show_scores(ScoresSettings(output_dir=tmp_path))
    shown = capsys.readouterr()
    assert "\nnew " in shown.out
    assert "\nold " not in shown.out
    assert f"warning: {tmp_path / 'old'} was fitted by another version" in shown.err
