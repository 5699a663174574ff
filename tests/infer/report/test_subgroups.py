"""Groups of lesions, their scores, and the section and file with them."""

import math
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from playwright.sync_api import Browser

from infer.ensemble.artifact import clear_ensemble
from infer.ensemble.blends.artifact import open_scorer
from infer.report.scored import GROUP, read_scored
from infer.report.subgroups import Grouping, group_rows, score_groups, skin_tone
from infer.report.write import write_report
from isic.metrics import pauc, triage
from isic.runtime.errors import UserError
from tests.support.browser import inspect
from tests.support.commands import Cli

BY = ("ita", "sex", "age", "attribution", "tbp_lv_areaMM2")


@pytest.fixture(scope="module")
def report(fitted: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with subgroups."""
    copy = shutil.copytree(fitted, tmp_path_factory.mktemp("subgroups") / "copy")
    return write_report(Path(copy), data, by=BY)


@pytest.fixture(scope="module")
def groups(report: Path) -> pl.DataFrame:
    return pl.read_csv(report.with_name("subgroups.csv"))


def test_every_lesion_is_in_one_group_per_property(groups: pl.DataFrame, oof: pl.DataFrame) -> None:
    assert groups["by"].unique(maintain_order=True).to_list() == ["all", *BY]
    sums = groups.group_by("by").agg(pl.sum("lesions", "malignant"))
    assert set(sums["lesions"]) == {len(oof)}
    assert set(sums["malignant"]) == {oof["target"].sum()}


def test_the_scores_are_those_of_the_groups_rows_at_one_threshold(
    groups: pl.DataFrame, oof: pl.DataFrame, data: Path
) -> None:
    threshold = triage(oof["target"], oof["blend"], 0.9).threshold
    train = pl.read_csv(data / "train-metadata.csv", infer_schema_length=None)
    joined = oof.join(train.select("isic_id", "sex"), on="isic_id")
    scored = groups.filter(pl.col("by") == "sex", pl.col("pauc").is_not_null())
    assert len(scored) >= 2
    for row in scored.iter_rows(named=True):
        rows = joined.filter(sex=row["group"])
        malignant = rows.filter(target=1)["blend"]
        benign = rows.filter(target=0)["blend"]
        assert row["patients"] == rows["patient_id"].n_unique()
        assert row["pauc"] == pytest.approx(pauc(rows["target"], rows["blend"]))
        assert row["sensitivity"] == pytest.approx((malignant >= threshold).mean())
        assert row["specificity"] == pytest.approx((benign < threshold).mean())
        for metric in ("pauc", "sensitivity", "specificity"):
            assert row[f"{metric}_low"] <= row[metric] <= row[f"{metric}_high"]


def test_a_group_with_too_few_malignant_lesions_has_no_score(
    groups: pl.DataFrame, report: Path
) -> None:
    few = groups.filter(pl.col("malignant") < 10)
    assert len(few) > 0
    assert few["pauc"].null_count() == few["sensitivity"].null_count() == len(few)
    assert groups.filter(pl.col("malignant") >= 10)["sensitivity"].null_count() == 0
    assert report.read_text().count("<td>too few malignant</td>") == len(few)


def test_a_group_that_the_model_fails_on_has_a_lower_sensitivity(fitted: Path, data: Path) -> None:
    """The scores of every fifth patient are lowered: their interval is below that of the others."""
    scored = read_scored(open_scorer(fitted), data)
    is_hard = pl.col(GROUP) % 5 == 0
    oof = scored.oof.with_columns(
        blend=pl.when(is_hard).then(pl.col("blend") / 100).otherwise("blend")
    )
    label = oof.select(pl.when(is_hard).then(pl.lit("hard")).otherwise(pl.lit("easy"))).to_series()
    found = score_groups(oof, [Grouping("kind", label, ("easy", "hard"))])
    high = found.filter(group="hard")["sensitivity_high"][0]
    assert high < found.filter(group="easy")["sensitivity_low"][0]


def test_skin_tones_have_the_usual_limits() -> None:
    degrees = {-60: "dark", -29: "brown", 9: "brown", 11: "tan", 29: "intermediate", 42: "light"}
    degrees |= {56: "very light", 27: "tan"}
    angle = [math.radians(value) for value in degrees]
    table = pl.DataFrame(
        {
            "tbp_lv_Lext": [*(50 + 20 * math.sin(value) for value in angle), None],
            "tbp_lv_Bext": [*(20 * math.cos(value) for value in angle), 15.0],
        }
    )
    label, _ = skin_tone(table)
    assert label.to_list() == [*degrees.values(), None]


def test_blanks_are_a_group_and_numbers_have_quartiles() -> None:
    table = pl.DataFrame(
        {
            "age_approx": [5.0, 59.0, 60.0, None],
            "size": [1.0, 1.0, 1.0, 2.0],
            "sex": ["f", "f", "m", None],
        }
    )
    age, size, sex = group_rows(table, ["age", "size", "sex"])
    assert age.order == ("0 to 9", "50 to 59", "60 to 69", "unknown")
    assert sex.order == ("f", "m", "unknown")
    assert sex.group.to_list() == ["f", "f", "m", "unknown"]
    assert sum(size.group == size.order[0]) == 3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("atribution", 'no column "atribution", did you mean "attribution"'),
        ("isic_id", "no column"),
        ("target", "no column"),
        ("code", r"code has 50 values, and at most 40"),
    ],
)
def test_unsuitable_columns_are_refused(name: str, words: str) -> None:
    values = {"attribution": ["a"] * 50, "code": list(map(str, range(50)))}
    ids = {"isic_id": list(map(str, range(50))), "target": np.arange(50) % 2}
    with pytest.raises(UserError, match=words):
        group_rows(pl.DataFrame(ids | values), ["attribution", name])


def test_the_command(fitted: Path, data: Path, tmp_path: Path, cli: Cli) -> None:
    root = Path(shutil.copytree(fitted, tmp_path / "copy"))
    (root / "report.html").unlink(missing_ok=True)
    flags = ["report", "--ensemble", root, "--data", data, "--by"]
    ended = cli("infer", *flags, "ita,sexx")
    assert ended.code == 2
    assert 'did you mean "sex"?' in ended.err
    assert not (root / "report.html").exists()
    ended = cli("infer", *flags, "ita,sex")
    assert ended.out.splitlines()[-1] == f"subgroups: {root / 'subgroups.csv'}"
    page = (root / "report.html").read_text()
    assert "The lighting of the photographs is not calibrated" in page
    assert 'id="subgroups"' in page
    clear_ensemble(root)
    assert not (root / "subgroups.csv").exists()


def test_groups_that_only_a_diagnosis_tells_are_named(
    fitted: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(fitted, tmp_path / "copy"))
    note = "the groups by mel_thick_mm, iddx_1 are known only after the diagnosis"
    for by, is_late in ((("sex", "mel_thick_mm", "iddx_1"), True), (("sex", "age"), False)):
        page = write_report(copy, data, by=by).read_text()
        assert (f"warning: {note}" in capsys.readouterr().err) == is_late
        assert (f"Note that {note}" in page) == is_late


def test_without_by_there_is_no_section(page: str) -> None:
    assert 'id="subgroups"' not in page


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
def test_it_is_sound_in_a_browser(browser: Browser, report: Path, width: int) -> None:
    inspect(browser, report, width).assert_sound()
