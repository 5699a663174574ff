"""Words of `--features`: sets, features left out, and lists."""

from pathlib import Path

import pytest

from infer.ensemble.features.own_columns import OwnColumns
from infer.ensemble.features.spec import FeatureSpec
from isic.features import SETS
from isic.features.definitions import parse_definitions
from isic.runtime.errors import UserError

MINE = {
    "norm_L": {"expr": "tbp_lv_stdL / tbp_lv_L", "relative": ["patient_z"]},
    "two": "2 * tbp_lv_A",
}
OWN = OwnColumns({"mine": parse_definitions(MINE, "mine.yaml")})


def names(text: str, own: OwnColumns | None = None) -> tuple[str, ...]:
    return FeatureSpec.parse(text, own).table_names


def test_words_can_be_left_out() -> None:
    assert names("raw,-attribution") == tuple(n for n in SETS["raw"] if n != "attribution")
    assert names("engineered,-patient_z,-patient_rank") == tuple(
        n for n in SETS["engineered"] if n not in {*SETS["patient_z"], *SETS["patient_rank"]}
    )
    assert names("raw,-category") == SETS["numeric"]
    assert names("-sex,raw") == names("raw,-sex")


def test_images_can_be_left_out() -> None:
    spec = FeatureSpec.parse("multimodal,aligned,-image")
    assert spec.forms == ("aligned",)
    assert spec.tabular == SETS["engineered"]


def test_own_columns_are_requested_by_set_or_name() -> None:
    assert names("sex,mine", OWN) == ("sex", "norm_L", "norm_L_patient_z", "two")
    assert names("sex,two", OWN) == ("sex", "two")
    assert names("mine,-norm_L_patient_z", OWN) == ("norm_L", "two")


def test_a_list_is_read_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "chosen.txt"
    path.write_text("# chosen by hand\nsex\n\ntbp_lv_H  # hue\nmine\n")
    spec = FeatureSpec.parse(f"@{path},age_approx", OWN)
    assert spec.table_names == ("age_approx", "tbp_lv_H", "sex", *OWN.names)
    assert spec.words.label == "chosen+age_approx"
    path.unlink()
    again = FeatureSpec.parse(f"@{path},age_approx", OWN, spec.words.lists)
    assert again.table_names == spec.table_names


def test_a_list_can_be_left_out_and_leave_out(tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("sex\nattribution\n")
    (tmp_path / "most.txt").write_text("raw\n-sex\n")
    assert names(f"category,-@{tmp_path}/some.txt") == tuple(
        n for n in SETS["category"] if n not in ("sex", "attribution")
    )
    assert names(f"@{tmp_path}/most.txt") == tuple(n for n in SETS["raw"] if n != "sex")


def test_a_list_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infer.ensemble.features.words.LISTS_DIR", tmp_path)
    (tmp_path / "chosen.txt").write_text("sex\n")
    assert names("@chosen") == ("sex",)


@pytest.mark.parametrize("word", ["mine", "two", "-two", "norm_L_patient_z"])
def test_a_list_with_own_columns_names_the_missing_flags(tmp_path: Path, word: str) -> None:
    path = tmp_path / "chosen.txt"
    path.write_text(f"raw\n{word}\n")
    with pytest.raises(UserError, match=rf'"{word.lstrip("-")}" in @.*--define or --tables'):
        FeatureSpec.parse(f"@{path}")


BAD = (
    ("raw,-attributio", 'unknown features "attributio", did you mean "attribution"'),
    ("numeric,-attribution", '"-attribution" leaves nothing out of numeric,-attribution'),
    ("raw,-image", '"-image" leaves nothing out'),
    ("raw,-raw", "no features are left"),
    ("sex,-target", "target exists only in the training table"),
    ("raw,,sex", '"raw,,sex" has no word before or after a comma'),
    ("raw, ", '"raw, " has no word before or after a comma'),
    ("", "features names no features"),
    ("@missing.txt", "no list of features missing.txt"),
    ("sex", "requests nothing of mine; add it: --features sex,mine"),
)


@pytest.mark.parametrize(("text", "message"), BAD)
def test_bad_words_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        FeatureSpec.parse(text, OWN if "mine" in message else None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("# nothing\n", "names no features"),
        ("sex\n@other.txt\n", 'has the line "@other.txt"'),
        ("sex,age_approx\n", 'has the line "sex,age_approx"'),
        ("sexx\n", 'unknown features "sexx"'),
        ("raw\n-image_scor.a\n", 'unknown features "image_scor.a".*did you mean "image_score"'),
        ("target\n", "exists only in the training table"),
    ],
)
def test_bad_lists_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "bad.txt").write_text(content)
    with pytest.raises(UserError, match=message):
        names(f"@{tmp_path / 'bad.txt'}")
