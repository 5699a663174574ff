from pathlib import Path

import pytest

from export.options import ExportSettings
from infer.ensemble.settings import BlendSettings, FitSettings, PredictSettings, SelectSettings
from infer.submission.settings import SubmitSettings
from isic.runtime.config import CONFIG_DIR, Settings, build
from isic.runtime.errors import UserError
from isic.settings import FoldsSettings
from train.config import TrainSettings, load_settings


def test_the_flags_of_libraries_are_merged_into_the_mapping() -> None:
    mapping = {"lightgbm": {"max_depth": 3}, "xgboost": {"max_depth": 2}}
    chosen = build(FitSettings, {"library_settings": mapping, "xgboost": "{gamma: 1}"})
    xgboost = {"max_depth": 2, "gamma": 1}
    assert chosen.library_settings == {"lightgbm": {"max_depth": 3}, "xgboost": xgboost}
    assert build(FitSettings, {"library_settings": chosen.library_settings}) == chosen


def test_flags_take_precedence_over_the_file(library_config: Path) -> None:
    flags = {"config": str(library_config), "catboost": "{depth: 2}", "seeds": "4"}
    chosen = build(FitSettings, flags)
    assert chosen.parameters("catboost")["depth"] == 2
    assert chosen.seeds == 4
    assert chosen.features == "raw"


def test_a_librarys_flag_keeps_the_other_settings_of_the_file(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(
        "lightgbm: {num_rounds: 500, learning_rate: 0.02, extra: {min_data_in_bin: 5}}\n"
        "xgboost: {gamma: 1}\n"
    )
    flag = "{max_depth: 6, learning_rate: 0.1, extra: {max_delta_step: 1}}"
    chosen = build(FitSettings, {"config": str(config), "lightgbm": flag})
    assert chosen.library_settings == {
        "lightgbm": {
            **{"num_rounds": 500, "learning_rate": 0.1, "max_depth": 6},
            "extra": {"min_data_in_bin": 5, "max_delta_step": 1},
        },
        "xgboost": {"gamma": 1},
    }


@pytest.mark.parametrize(
    ("file", "flags", "num_rounds"),
    [
        ("num_rounds: 100", {"lightgbm": "{num_rounds: 50}"}, 50),
        ("num_rounds: 100", {"lightgbm": "{max_depth: 3}"}, 100),
        ("seeds: 2", {"num_rounds": "100", "lightgbm": "{num_rounds: 50}"}, 50),
        ("num_rounds: 100\nlightgbm: {num_rounds: 50}", {}, 50),
        ("num_rounds: 100\nlightgbm: {num_rounds: 50}", {"num_rounds": "7"}, 7),
        ("lightgbm: {num_rounds: 50}", {"num_rounds": "7", "lightgbm": "{max_depth: 3}"}, 7),
        ("library_settings: {lightgbm: {num_rounds: 50}}", {"num_rounds": "7"}, 7),
    ],
)
def test_the_rounds_of_a_flag_come_before_the_files_and_a_librarys_before_all(
    tmp_path: Path, file: str, flags: dict[str, str], num_rounds: int
) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(file)
    chosen = build(FitSettings, {"config": str(config), **flags})
    assert chosen.parameters("lightgbm")["num_rounds"] == num_rounds


@pytest.mark.parametrize("features", ["[raw, sex]", "'raw,sex'"])
def test_features_may_be_a_list_in_a_config(tmp_path: Path, features: str) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(f"features: {features}\n")
    assert build(FitSettings, {"config": str(config)}).features == "raw,sex"


@pytest.mark.parametrize("name", ["..", ".", "a/b", "../a", "/tmp/a"])
@pytest.mark.parametrize(
    ("settings", "others"),
    [
        (FitSettings, {}),
        (SelectSettings, {}),
        (BlendSettings, {"ensembles": "a,b"}),
        (ExportSettings, {"model": "test_vit"}),
    ],
)
def test_a_name_is_that_of_a_single_folder(
    settings: type[Settings], others: dict[str, str], name: str
) -> None:
    with pytest.raises(UserError, match="--name: this names a single folder or file"):
        build(settings, {**others, "name": name})
    with pytest.raises(UserError, match="--name names a single folder"):
        load_settings(TrainSettings, {"model": "test_vit", "name": name})
    for good in ("a", "a.b", "raw+image_vit", "..a"):
        build(settings, {**others, "name": good})


@pytest.mark.parametrize(
    ("settings", "others", "ending", "other"),
    [
        (PredictSettings, {}, ".csv", ".parquet"),
        (SubmitSettings, {"bundle": "bundle"}, ".csv", ".parquet"),
        (FoldsSettings, {"data": "data", "group": "attribution"}, ".parquet", ".csv"),
    ],
)
def test_an_output_is_named_like_its_format(
    settings: type[Settings], others: dict[str, str], ending: str, other: str
) -> None:
    for good in (f"a{ending}", f"b/a.c{ending.upper()}"):
        build(settings, {**others, "output": good})
    for bad in ("a", f"a{other}", f"a{ending}.gz"):
        with pytest.raises(UserError, match=f"--output: give a name that ends in {ending}"):
            build(settings, {**others, "output": bad})


@pytest.mark.parametrize("in_file", ["out", "output_dir"])
@pytest.mark.parametrize("flag", ["out", "output_dir"])
def test_both_names_of_the_output_folder_take_precedence_over_the_file(
    tmp_path: Path, in_file: str, flag: str
) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(f"{in_file}: file\n")
    assert build(FitSettings, {"config": str(config)}).output_dir == Path("file")
    chosen = build(FitSettings, {"config": str(config), flag: "flag"})
    assert chosen.output_dir == Path("flag")


BAD_SETTINGS: tuple[tuple[dict[str, object], str], ...] = (
    ({"libraries": "lightgbm,xgbost"}, 'unknown library "xgbost", did you mean "xgboost"'),
    ({"libraries": "xgboost,xgboost"}, "name each library once"),
    ({"libraries": "xgboost,lightgbm", "weights": "1,2,3"}, "weights needs 2 numbers"),
    ({"weights": "0"}, "weights must be numbers above 0"),
    ({"weights": "nan"}, "weights must be numbers above 0; leave"),
    ({"negatives": "inf"}, "negatives.*finite"),
    ({"image_noise": "inf"}, "image_noise.*finite"),
    ({"lightgbm": "{max_depth: deep}"}, "lightgbm: max_depth is a whole number, not deep"),
    (
        {"lightgbm": "{min_data_in_leaf: 1.5}"},
        "lightgbm: min_data_in_leaf is a whole number, not 1.5",
    ),
    ({"lightgbm": "{learning_rate: true}"}, "lightgbm: learning_rate is a number, not True"),
    ({"lightgbm": "{extra_trees: 1}"}, "lightgbm: extra_trees is true or false, not 1"),
    ({"xgboost": "{num_rounds: 0}"}, "xgboost: num_rounds is 0; give at least one"),
    (
        {"xgboost": "{max_dept: 3}"},
        'xgboost has no setting "max_dept" here, did you mean "max_depth"',
    ),
    ({"lightgbm": "3"}, "--lightgbm needs a mapping such as .*, got '3'"),
    ({"catboost": "{depth: 3"}, "--catboost: this is not the YAML of a mapping"),
    ({"library_settings": {"xgbost": {}}}, 'unknown library "xgbost"'),
    ({"library_settings": "3", "lightgbm": "{max_depth: 3}"}, "--library_settings: .*dictionary"),
    ({"lightgb": "{max_depth: 3}"}, 'unknown key "lightgb", did you mean "lightgbm"'),
    ({"config": "ensembles/thre"}, 'no config "ensembles/thre", did you mean "ensembles/three"'),
)


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS)
def test_bad_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(FitSettings, settings)


def test_a_config_with_an_unknown_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("seds: 3\n")
    with pytest.raises(UserError, match=r'bad\.yaml: unknown key "seds", did you mean "seeds"'):
        build(FitSettings, {"config": str(tmp_path / "bad.yaml")})


@pytest.mark.parametrize(
    "path", sorted((CONFIG_DIR / "ensembles").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_config_is_valid(path: Path) -> None:
    build(FitSettings, {"config": f"ensembles/{path.stem}"})
