"""Several libraries in one ensemble: their settings, how they are blended, and that prediction follows."""

import json
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from benchmarks.record import PACKAGES
from infer.ensemble.blend import blend, rank_in, seeds_of
from infer.ensemble.boosters import LIBRARIES, parameters_of
from infer.ensemble.fit import fit_ensemble
from infer.ensemble.fit_settings import FitSettings
from infer.ensemble.predict import PredictSettings, predict_submission
from isic.runtime.config import CONFIG_DIR, build
from isic.runtime.errors import UserError
from isic.runtime.files import sha256, versions
from tests.support.commands import Cli
from tests.support.ensembles import NUM_FOLDS, fit_settings, write_dataset

QUICK = {"num_rounds": 8}


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_row_of_the_registry_is_complete(name: str, cli: Cli) -> None:
    library = LIBRARIES[name]
    parameters = parameters_of(name, {"num_rounds": 20})
    matrix = np.random.default_rng(0).standard_normal((300, 4)).astype(np.float32)
    target = (matrix[:, 2] > 0).astype(np.int8)
    lacks = []
    if library.package not in versions(library.package):
        lacks.append(f"the package {library.package} is not installed")
    if library.package not in (Path(__file__).parents[2] / "setup.cfg").read_text():
        lacks.append(f"setup.cfg requires no {library.package}")
    if library.package not in PACKAGES:
        lacks.append(f"benchmarks/record.py records no version of {library.package}")
    if not library.suffix.startswith("."):
        lacks.append("the suffix does not begin with a dot")
    if not {"num_rounds", "learning_rate", "scale_pos_weight"} <= set(library.defaults):
        lacks.append("defaults without num_rounds, learning_rate or scale_pos_weight")
    if f"--{name} " not in cli("infer", "fit", "--help").out:
        lacks.append(f"infer fit has no flag --{name}")
    if build(FitSettings, {name: "{num_rounds: 3}"}).parameters(name)["num_rounds"] != 3:
        lacks.append(f"--{name} changes nothing")
    text = library.fit(matrix, target, list("abcd"), parameters, 0)
    if text != library.fit(matrix, target, list("abcd"), parameters, 0):
        lacks.append("fit returns another text for the same seed")
    score = library.load(text)(matrix, 1)
    if score.dtype != np.float64 or not score[target == 1].min() > score[target == 0].max():
        lacks.append("load does not return float64 scores that are high for target 1")
    gains = library.gains(text, 4)
    if gains.shape != (4,) or gains.argmax() != 2:
        lacks.append("gains are not [D] with the only useful feature in front")
    try:
        library.load("")
        lacks.append("load accepts an empty text")
    except UserError:
        pass
    assert not lacks, f"the row {name} of LIBRARIES is incomplete: {'; '.join(lacks)}"


def test_the_flags_of_libraries_and_the_mapping_are_one_setting() -> None:
    mapping = {"lightgbm": {"max_depth": 3}, "xgboost": {"max_depth": 2}}
    chosen = build(FitSettings, {"library_settings": mapping, "xgboost": "{gamma: 1}"})
    assert chosen.library_settings == {"lightgbm": {"max_depth": 3}, "xgboost": {"gamma": 1}}
    assert build(FitSettings, {"library_settings": chosen.library_settings}) == chosen


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("libraries") / "data")


@pytest.fixture(scope="module")
def config(data: Path) -> Path:
    """Settings of all three libraries in a file, one of them changed."""
    path = data.parent / "mine.yaml"
    path.write_text(
        "features: raw\nlibraries: lightgbm, xgboost, catboost\nweights: 2, 1, 1\nseeds: 2\nnum_folds: 3\n"
        "num_rounds: 8\ncatboost: {depth: 3}\n"
    )
    return path


@pytest.fixture(scope="module")
def fitted(data: Path, config: Path) -> Path:
    fit_ensemble(
        FitSettings(
            config=str(config), data=data, output_dir=data.parent, name="three", num_threads=1
        )
    )
    return data.parent / "three"


def test_every_library_has_its_boosters_scores_and_settings(fitted: Path) -> None:
    manifest = json.loads((fitted / "ensemble.json").read_text())
    assert {entry["library"] for entry in manifest["boosters"]} == set(LIBRARIES)
    assert len(manifest["boosters"]) == 3 * NUM_FOLDS * 2 and manifest["weights"]["lightgbm"] == 2
    assert (
        manifest["parameters"]["catboost"]["depth"] == 3
        and manifest["parameters"]["xgboost"]["num_rounds"] == 8
    )
    assert json.loads((fitted / "xgboost_fold_0_seed_1.json").read_text())["learner"]
    assert json.loads((fitted / "catboost_fold_0_seed_1.json").read_text())["oblivious_trees"]
    oof = pl.read_parquet(fitted / "oof.parquet")
    models = [f"{library}_seed_{seed}" for library in LIBRARIES for seed in range(2)]
    assert oof.columns == ["isic_id", "fold", "target", *models, "blend"]
    assert {"lightgbm", "xgboost-cpu", "catboost"} < set(manifest["versions"])


def test_the_blend_is_the_weighted_mean_of_ranks(fitted: Path) -> None:
    oof = pl.read_parquet(fitted / "oof.parquet")
    ranks = {}
    for library in LIBRARIES:
        mean = (oof[f"{library}_seed_0"] + oof[f"{library}_seed_1"]) / 2
        ranks[library] = (mean.rank("average") - 0.5) / len(mean)
    expected = (2 * ranks["lightgbm"] + ranks["xgboost"] + ranks["catboost"]) / 4
    np.testing.assert_allclose(oof["blend"], expected, atol=1e-12)


def test_another_number_of_threads_gives_the_same_bytes(
    data: Path, config: Path, fitted: Path, cli: Cli
) -> None:
    flags = [
        "--data",
        data,
        "--output_dir",
        data.parent / "threads",
        "--name",
        "three",
        "--num_threads",
        3,
    ]
    ended = cli("infer", "fit", "--config", config, *flags)
    assert ended.code == 0, ended.err
    roots = (data.parent / "threads" / "three", fitted)
    again, before = ({path.name: path.read_bytes() for path in root.iterdir()} for root in roots)
    report = again.pop("report.html").decode()
    assert again == before
    assert "<h1>three</h1>" in report
    assert ended.out.endswith(f"report: {roots[0] / 'report.html'}\n")


def test_flags_win_over_the_file(config: Path) -> None:
    chosen = build(FitSettings, {"config": str(config), "catboost": "{depth: 2}", "seeds": "4"})
    assert (
        chosen.parameters("catboost")["depth"] == 2
        and chosen.seeds == 4
        and chosen.features == "raw"
    )


def test_prediction_blends_as_fitting_did_and_one_row_scores_what_it_scores_among_others(
    data: Path, fitted: Path, tmp_path: Path
) -> None:
    where = {"ensemble": fitted, "num_threads": 2}
    predict_submission(PredictSettings(data=data, output=tmp_path / "s.csv", **where))
    models, submission = (
        pl.read_parquet(tmp_path / "s_models.parquet"),
        pl.read_csv(tmp_path / "s.csv"),
    )
    oof = pl.read_parquet(fitted / "oof.parquet")
    assert models.columns == ["isic_id", *oof.columns[3:]]
    assert models["blend"].equals(submission["target"], check_names=False)
    columns = [
        {name: frame[name].to_numpy() for name in oof.columns[3:-1]} for frame in (models, oof)
    ]
    np.testing.assert_array_equal(
        models["blend"],
        blend(columns[0], dict.fromkeys(LIBRARIES, 1) | {"lightgbm": 2}, columns[1]),
    )
    manifest = json.loads((tmp_path / "s.csv.json").read_text())
    assert manifest["models"] == {
        "file": "s_models.parquet",
        "sha256": sha256(tmp_path / "s_models.parquet"),
    }
    one = tmp_path / "one"
    one.mkdir()
    pl.read_csv(data / "test-metadata.csv", infer_schema=False)[:1].write_csv(
        one / "test-metadata.csv"
    )
    predict_submission(PredictSettings(data=one, output=one / "s.csv", **where))
    again = pl.read_parquet(one / "s_models.parquet").row(0, named=True)
    assert again == models.filter(isic_id=again["isic_id"]).row(0, named=True)


def test_compare_blends_seed_by_seed(data: Path, fitted: Path, cli: Cli) -> None:
    fit_ensemble(fit_settings(data, data.parent, features="raw", seeds=2, name="one", **QUICK))
    ended = cli("infer", "compare", data.parent / "one", fitted, "--data", data, "--draws", 100)
    assert ended.code == 0, ended.err
    assert "of 2\n" in ended.out and "second against first" in ended.out


def test_ranks_keep_every_order_and_reach_beyond_what_was_seen() -> None:
    reference = np.array([0.2, 0.4, 0.4, 0.6])
    score = np.array([0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 1.0])
    ranks = rank_in(score, reference)
    assert (np.diff(ranks) > 0).all() and ranks.min() > 0 and ranks.max() < 1
    assert ranks[[2, 4, 5]].tolist() == [0.125, 0.5, 0.875]


def test_a_library_alone_keeps_its_probabilities() -> None:
    models = {"lightgbm_seed_3": np.array([0.1, 0.9]), "lightgbm_seed_4": np.array([0.3, 0.7])}
    assert blend(models, {"lightgbm": 5.0}, {}).tolist() == pytest.approx([0.2, 0.8])
    assert seeds_of([*models, "xgboost_seed_4"], ["lightgbm", "xgboost"]) == [4]


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


@pytest.mark.parametrize(
    ("library", "setting"),
    [
        ("lightgbm", "{bagging_fraction: 2}"),
        ("lightgbm", "{num_leaves: 1}"),
        ("lightgbm", "{scale_pos_weight: 0}"),
        ("xgboost", "{subsample: 2}"),
        ("xgboost", "{max_depth: -3}"),
        ("catboost", "{depth: 40}"),
        ("catboost", "{subsample: 2}"),
    ],
)
def test_a_value_that_a_library_refuses_is_a_sentence(
    data: Path, tmp_path: Path, library: str, setting: str
) -> None:
    flags = {"features": "raw", "libraries": library, library: setting, "num_rounds": 2}
    with pytest.raises(UserError, match=rf"^{library} does not fit \(.+\); change --{library}$"):
        fit_ensemble(fit_settings(data, tmp_path, **flags))
    assert not list(tmp_path.iterdir())


def test_a_config_with_an_unknown_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("seds: 3\n")
    with pytest.raises(UserError, match=r'bad\.yaml: unknown key "seds", did you mean "seeds"'):
        build(FitSettings, {"config": str(tmp_path / "bad.yaml")})


@pytest.mark.parametrize(
    "path", sorted((CONFIG_DIR / "ensembles").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_config_is_valid(path: Path) -> None:
    build(FitSettings, {"config": f"ensembles/{path.stem}"})


def test_a_library_that_is_not_installed_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "catboost", None)
    with pytest.raises(UserError, match="catboost is not installed; run `pip install"):
        LIBRARIES["catboost"].load("{}")
