from pathlib import Path

import pytest

from infer.ensemble.fit_settings import FitSettings
from isic.runtime.config import CONFIG_DIR, build
from isic.runtime.errors import UserError


def test_the_flags_of_libraries_and_the_mapping_are_one_setting() -> None:
    mapping = {"lightgbm": {"max_depth": 3}, "xgboost": {"max_depth": 2}}
    chosen = build(FitSettings, {"library_settings": mapping, "xgboost": "{gamma: 1}"})
    assert chosen.library_settings == {"lightgbm": {"max_depth": 3}, "xgboost": {"gamma": 1}}
    assert build(FitSettings, {"library_settings": chosen.library_settings}) == chosen


def test_flags_win_over_the_file(library_config: Path) -> None:
    chosen = build(
        FitSettings, {"config": str(library_config), "catboost": "{depth: 2}", "seeds": "4"}
    )
    assert chosen.parameters("catboost")["depth"] == 2
    assert chosen.seeds == 4
    assert chosen.features == "raw"


BAD = {
    "unknown library \"xgbost\", did you mean \"xgboost\"": {"libraries": "lightgbm,xgbost"},
    "name each library once": {"libraries": "xgboost,xgboost"},
    "weights needs 2 numbers": {"libraries": "xgboost,lightgbm", "weights": "1,2,3"},
    "weights must be numbers above 0": {"weights": "0"},
    "weights must be numbers above 0; leave": {"weights": "nan"},
    "negatives.*finite": {"negatives": "inf"},
    "image_noise.*finite": {"image_noise": "inf"},
    "lightgbm: max_depth is a whole number, not deep": {"lightgbm": "{max_depth: deep}"},
    "lightgbm: min_data_in_leaf is a whole number, not 1.5": {"lightgbm": "{min_data_in_leaf: 1.5}"},
    "lightgbm: learning_rate is a number, not True": {"lightgbm": "{learning_rate: true}"},
    "lightgbm: extra_trees is true or false, not 1": {"lightgbm": "{extra_trees: 1}"},
    "xgboost: num_rounds is 0; give at least one": {"xgboost": "{num_rounds: 0}"},
    "xgboost has no setting \"max_dept\" here, did you mean \"max_depth\"": {"xgboost": "{max_dept: 3}"},
    "--lightgbm needs a mapping such as .*, got '3'": {"lightgbm": "3"},
    "--catboost: this is not the YAML of a mapping": {"catboost": "{depth: 3"},
    "unknown library \"xgbost\"": {"library_settings": {"xgbost": {}}},
    "--library_settings: .*dictionary": {"library_settings": "3", "lightgbm": "{max_depth: 3}"},
    "unknown key \"lightgb\", did you mean \"lightgbm\"": {"lightgb": "{max_depth: 3}"},
    "no config \"ensembles/thre\", did you mean \"ensembles/three\"": {"config": "ensembles/thre"},
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_settings_are_refused(message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(FitSettings, BAD[message])


def test_a_config_with_an_unknown_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("seds: 3\n")
    with pytest.raises(UserError, match=r'bad\.yaml: unknown key "seds", did you mean "seeds"'):
        build(FitSettings, {"config": str(tmp_path / "bad.yaml")})


@pytest.mark.parametrize(
    "path", sorted((CONFIG_DIR / "ensembles").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_config_is_valid(path: Path) -> None:
    build(FitSettings, {"config": f"ensembles/{path.stem}"})
