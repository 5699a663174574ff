import configparser
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from benchmarks.record import RECORDED_PACKAGES
from infer.ensemble.boosting.checks import check_library
from infer.ensemble.boosting.column_parameters import GROUPS, NUMBERS
from infer.ensemble.boosting.libraries import (
    LIBRARIES,
    Library,
    NoContributions,
    fit_booster,
    min_data,
    parameters_of,
    read_booster,
)
from infer.ensemble.settings import FitSettings
from isic.runtime.config import build
from isic.runtime.errors import UserError
from isic.runtime.files import versions
from tests.support.commands import ROOT, Cli
from tests.support.ensembles import fit_small

NAMES = list("abcd")
REFUSED = {
    "lightgbm": ("{bagging_fraction: 2}", "{num_leaves: 1}", "{scale_pos_weight: 0}"),
    "xgboost": ("{subsample: 2}", "{max_depth: -3}"),
    "catboost": ("{depth: 40}", "{subsample: 2}"),
}
"""Settings per library that the library itself refuses."""


def library_rows() -> tuple[np.ndarray, np.ndarray]:
    """Return four columns, and a target that is the sign of the first."""
    matrix = np.random.default_rng(0).standard_normal((300, 4)).astype(np.float32)
    return matrix, (matrix[:, 0] > 0).astype(np.int8)


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_row_of_the_registry_is_complete(name: str, cli: Cli) -> None:
    """List everything that a new row lacks, not only the first."""
    library = LIBRARIES[name]
    lacks = [
        *missing_metadata(name, library),
        *missing_flag(name, cli),
        *broken_functions(library, parameters_of(name, {"num_rounds": 20})),
    ]
    assert not lacks, f"the row {name} of LIBRARIES is incomplete: {'; '.join(lacks)}"


def missing_metadata(name: str, library: Library) -> list[str]:
    lacks = []
    if library.package not in versions(library.package):
        lacks.append(f"the package {library.package} is not installed")
    if library.package not in required_packages(library.extra):
        place = f"the extra {library.extra}" if library.extra else "install_requires"
        lacks.append(f"{place} in setup.cfg does not require {library.package}")
    if library.package not in RECORDED_PACKAGES:
        lacks.append(f"benchmarks/record.py records no version of {library.package}")
    if not library.suffix.startswith("."):
        lacks.append("the suffix does not begin with a dot")
    if not library.fixed:
        lacks.append("no parameter is fixed")
    if not {"num_rounds", "learning_rate", "scale_pos_weight"} <= set(library.defaults):
        lacks.append("defaults lack num_rounds, learning_rate or scale_pos_weight")
    if name not in REFUSED:
        lacks.append("these tests have no setting that it refuses")
    return lacks


def required_packages(extra: str | None) -> str:
    """Return the requirements of an extra in setup.cfg, or those of the toolkit without one."""
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    if extra is None:
        return setup["options"]["install_requires"]
    return setup["options.extras_require"].get(extra, "")


def missing_flag(name: str, cli: Cli) -> list[str]:
    lacks = []
    if f"--{name} " not in cli("infer", "fit", "--help").out:
        lacks.append(f"infer fit has no flag --{name}")
    changed = build(FitSettings, {name: "{num_rounds: 3}"}).parameters(name)
    if changed["num_rounds"] != 3:
        lacks.append(f"--{name} changes nothing")
    return lacks


def broken_functions(library: Library, parameters: dict[str, object]) -> list[str]:
    lacks = []
    matrix, target = library_rows()
    text = library.fit(matrix, target, NAMES, parameters, 0)
    if text != library.fit(matrix, target, NAMES, parameters, 0):
        lacks.append("fit returns another text for the same seed")
    score = library.load(text)(matrix, 1)
    if score.dtype != np.float64:
        lacks.append("load does not return float64 scores")
    if not score[target == 1].min() > score[target == 0].max():
        lacks.append("load does not return scores that are high for target 1")
    gains = library.gains(text, len(NAMES))
    if gains.shape != (len(NAMES),):
        lacks.append("gains are not [D]")
    elif gains.argmax() != 0:
        lacks.append("gains are not highest for the only useful feature")
    try:
        library.load("")
        lacks.append("load accepts an empty text")
    except UserError:
        pass
    return lacks


def test_min_data_is_in_proportion_to_the_rows() -> None:
    assert [min_data(n) for n in (10, 700, 10_000, 31_700, 320_000)] == [10, 10, 27, 85, 85]


@pytest.fixture(scope="module")
def booster_texts() -> dict[str, str]:
    """A booster of every library that knows the sign of the first column."""
    texts = {}
    for name, library in LIBRARIES.items():
        parameters = parameters_of(name, {"num_rounds": 20})
        texts[name] = library.fit(*library_rows(), NAMES, parameters, 0)
    return texts


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_booster_read_back_scores_the_same_whatever_the_batch(
    booster_texts: dict[str, str], library: str
) -> None:
    matrix, target = library_rows()
    predict = LIBRARIES[library].load(booster_texts[library])
    scores = predict(matrix, 2)
    np.testing.assert_array_equal(scores[5:6], predict(matrix[5:6], 1))
    assert scores[target == 1].min() > scores[target == 0].max()
    assert scores.dtype == np.float64
    assert scores.min() >= 0
    assert scores.max() <= 1


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_same_seed_gives_the_same_text_and_another_another(
    booster_texts: dict[str, str], library: str
) -> None:
    arguments = (*library_rows(), NAMES, parameters_of(library, {"num_rounds": 20}))
    assert LIBRARIES[library].fit(*arguments, 0) == booster_texts[library]
    assert LIBRARIES[library].fit(*arguments, 1) != booster_texts[library]


@pytest.mark.parametrize("cut", [0, 30, 0.5])
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_booster_cut_short_is_refused(
    booster_texts: dict[str, str], library: str, cut: float, tmp_path: Path
) -> None:
    """Half a file makes each library abort, so one that gets that far would end these tests."""
    text = booster_texts[library]
    kept = {0: "", 30: text[:-30], 0.5: text[: len(text) // 2]}[cut]
    (tmp_path / "model").write_text(kept)
    with pytest.raises(UserError, match="model does not load"):
        read_booster(tmp_path / "model", library)
    with pytest.raises(UserError, match="is missing"):
        read_booster(tmp_path / "gone", library)


@pytest.mark.parametrize(
    ("library", "setting"), [(name, value) for name in REFUSED for value in REFUSED[name]]
)
def test_a_value_that_a_library_refuses_is_a_user_error(
    data: Path, tmp_path: Path, library: str, setting: str
) -> None:
    flags = {"features": "raw", "libraries": library, library: setting, "num_rounds": 2}
    with pytest.raises(UserError, match=rf"^{library} does not fit \(.+\); change --{library}$"):
        fit_small(data, tmp_path, **flags)
    assert not list(tmp_path.iterdir())


EXTRA = {
    "lightgbm": (
        "{boosting: dart}",
        "{linear_tree: true}",
        "{min_data_in_bin: 60, boost_from_average: false}",
    ),
    "xgboost": (
        "{booster: dart, rate_drop: 0.5}",
        "{grow_policy: lossguide, num_parallel_tree: 2}",
    ),
    "catboost": ("{grow_policy: Lossguide, max_leaves: 5}", "{leaf_estimation_iterations: 9}"),
}
"""Parameters per library that are no settings here."""


@pytest.mark.parametrize(("library", "extra"), [(k, v) for k in EXTRA for v in EXTRA[k]])
def test_any_parameter_of_a_library_can_be_given(library: str, extra: str) -> None:
    parameters = build(FitSettings, {library: f"{{num_rounds: 9, extra: {extra}}}"})
    chosen = parameters.parameters(library)
    check_library(library, chosen, NAMES)
    row = LIBRARIES[library]
    matrix, target = library_rows()
    text = row.fit(matrix, target, NAMES, chosen, 0)
    assert text != row.fit(matrix, target, NAMES, parameters_of(library, {"num_rounds": 9}), 0)
    score = row.load(text)(matrix, 1)
    assert score[target == 1].mean() > score[target == 0].mean() + 0.1
    assert row.gains(text, len(NAMES)).argmax() == 0
    try:
        contributions = row.contributions(text)(matrix)
    except NoContributions:
        assert "linear_tree" in extra
    else:
        assert contributions.shape == matrix.shape


BAD_EXTRA = (
    ("lightgbm", "{min_data_in_bim: 5}", 'no parameter "min_data_in_bim", did you mean "min_data'),
    ("lightgbm", "{reg_alpha: 1}", "reg_alpha in extra is a setting of its own; write lambda_l1"),
    ("lightgbm", "{max_depth: 1}", "max_depth in extra is a setting of its own"),
    ("lightgbm", "{random_state: 1}", "random_state is set by this toolkit"),
    ("lightgbm", "{boosting: sideways}", r"does not fit \(Unknown boosting type sideways\)"),
    ("lightgbm", "{early_stopping_rounds: 5}", "early_stopping_rounds has no effect here; leave"),
    ("lightgbm", "{weight: 0}", "weight has no effect here"),
    ("lightgbm", "{metrics: auc}", "metrics has no effect here"),
    ("lightgbm", "{bagging_by_query: true}", "bagging_by_query scores all rows alike here"),
    ("lightgbm", "{workers: 'a:1,b:1'}", "workers is for training on several machines"),
    ("lightgbm", "{min_gain_to_split: 1.0e+9}", "alike with the extra parameters min_gain_to_spl"),
    ("lightgbm", "{cat_feature: [0]}", "cat_feature takes positions of columns"),
    (
        "lightgbm",
        "{tree_learner: {serial: 1}}",
        r"extra parameters tree_learner \(Unknown type of parameter:tree_learner",
    ),
    ("lightgbm", "{mc: {tbp_lv_A: 1}}", "mc in extra has another name here; write monotone_con"),
    (
        "lightgbm",
        "{monotone_constraints: [1, 0]}",
        "names columns, such as {monotone_constraints: {",
    ),
    ("xgboost", "{monotone_constraints: {tbp_lv_AA: 1}}", 'names "tbp_lv_AA", .* mean "tbp_lv_A"'),
    ("xgboost", "{monotone_constraints: {tbp_lv_A: yes}}", "names columns, such as"),
    ("xgboost", "{interaction_constraints: [[tbp_lv_AA]]}", 'mean "tbp_lv_A"'),
    ("xgboost", "{interaction_constraints: [[0, 1]]}", "names columns, such as"),
    ("catboost", "{class_names: [1, 0]}", "class_names is set by this toolkit"),
    ("catboost", "{ignored_features: [0]}", "ignored_features is what --features is for"),
    ("catboost", "{monotone_constraints: '(1,0)'}", "names columns, such as"),
    ("lightgbm", "3", "extra needs a mapping such as"),
    ("xgboost", "{num_paralel_tree: 2}", 'has no parameter "num_paralel_tree"'),
    ("xgboost", "{eta: 2}", "eta in extra is a setting of its own; write learning_rate"),
    ("xgboost", "{nthread: 2}", "nthread is set by this toolkit"),
    ("xgboost", "{booster: gblinear}", "does not fit"),
    ("catboost", "{eval_metric: AUC}", "eval_metric has no effect without eval_fraction; leave"),
    ("catboost", "{grow_polici: Lossguide}", r"Unknown option \{grow_polici\}"),
    ("catboost", "{max_depth: 2}", "only one of the parameters depth, max_depth"),
    ("catboost", "{bootstrap_type: Bayesian}", "bootstrap_type is set by this toolkit"),
)


@pytest.mark.parametrize(("library", "extra", "message"), BAD_EXTRA)
def test_bad_extra_parameters_are_refused(
    data: Path, tmp_path: Path, library: str, extra: str, message: str
) -> None:
    flags = {"features": "raw", "libraries": library, library: f"{{extra: {extra}}}"}
    # Settings are checked before, with a ValidationError.
    with pytest.raises((UserError, ValidationError), match=message):
        fit_small(data, tmp_path, **flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "extra"),
    [
        ({}, {"min_sum_hessian_in_leaf": 60}),
        ({"min_data_in_leaf": 30_000}, {"min_data_in_bin": 5}),
        ({}, {"monotone_constraints": dict.fromkeys(NAMES, -1)}),
    ],
    ids=["many rows", "the setting", "falling"],
)
def test_parameters_that_only_seem_to_score_all_rows_alike_are_tried(
    settings: dict[str, object], extra: dict[str, object]
) -> None:
    check_library("lightgbm", parameters_of("lightgbm", {**settings, "extra": extra}), NAMES)


WITHOUT_EFFECT = {
    "lightgbm": {
        "metric": "auc",
        "metric_freq": 5,
        "is_provide_training_metric": True,
        "eval_at": [1],
        "multi_error_top_k": 2,
        "reg_sqrt": True,
        "alpha": 0.1,
        "fair_c": 3.0,
        "poisson_max_delta_step": 0.1,
        "tweedie_variance_power": 1.2,
        "lambdarank_truncation_level": 3,
        "lambdarank_norm": False,
        "lambdarank_position_bias_regularization": 1.0,
        "label_gain": [0, 1],
        "objective_seed": 3,
        "cat_l2": 1.0,
        "cat_smooth": 1.0,
        "max_cat_threshold": 3,
        "max_cat_to_onehot": 30,
        "min_data_per_group": 3,
        "refit_decay_rate": 0.1,
        "precise_float_parser": True,
        "predict_disable_shape_check": True,
        "pred_early_stop_freq": 1,
        "pred_early_stop_margin": 1.0,
        "num_machines": 2,
        "time_out": 1,
    },
    "xgboost": {
        "eval_metric": "auc",
        "disable_default_eval_metric": True,
        "max_cat_to_onehot": 1,
        "max_cat_threshold": 2,
        "validate_parameters": False,
    },
    "catboost": {
        "eval_metric": "AUC",
        "metric_period": 5,
        "early_stopping_rounds": 2,
        "od_wait": 2,
        "use_best_model": False,
        "custom_metric": ["AUC"],
        "custom_loss": ["AUC"],
        "name": "x",
        "mvs_reg": 9.0,
        "roc_file": "roc.tsv",
        "snapshot_file": "snapshot",
        "snapshot_interval": 3,
        "one_hot_max_size": 5,
        "max_ctr_complexity": 2,
        "simple_ctr": ["Borders"],
        "combinations_ctr": ["Borders"],
        "counter_calc_method": "Full",
        "ctr_leaf_count_limit": 3,
        "store_all_simple_ctr": True,
        "final_ctr_computation_mode": "Skip",
        "model_size_reg": 90.0,
    },
}
"""Refused parameters per library, with values that are not the defaults."""

WITH_EFFECT: dict[str, tuple[dict[str, object], ...]] = {
    "lightgbm": ({"use_missing": False}, {"sigmoid": 2.0}, {"boost_from_average": False}),
    "xgboost": ({"max_delta_step": 0.1}, {"base_score": 0.3}),
    "catboost": (
        {"nan_mode": "Max"},
        {"eval_fraction": 0.2},
        {"eval_fraction": 0.2, "eval_metric": "Accuracy"},
        {"eval_fraction": 0.2, "eval_metric": "Accuracy", "metric_period": 7},
        {"eval_fraction": 0.2, "eval_metric": "Accuracy", "early_stopping_rounds": 2},
    ),
}
"""Parameters per library of which one might think the same, each with another effect."""


def scores_with_blanks(library: str, extra: dict[str, object]) -> tuple[float, ...]:
    """Return the scores of rows with blanks, by a booster that was fitted on them."""
    matrix, _ = library_rows()
    random = np.random.default_rng(1)
    target = (matrix[:, 0] + random.standard_normal(len(matrix)) > 0).astype(np.int8)
    matrix[random.random(matrix.shape) < 0.3] = np.nan
    row = LIBRARIES[library]
    parameters = {**parameters_of(library, {"num_rounds": 30}), "extra": extra}
    return tuple(row.load(row.fit(matrix, target, NAMES, parameters, 0))(matrix, 1))


@pytest.mark.parametrize("library", LIBRARIES)
def test_parameters_are_refused_exactly_if_they_have_no_effect(library: str) -> None:
    plain = scores_with_blanks(library, {})
    for name, value in WITHOUT_EFFECT[library].items():
        assert scores_with_blanks(library, {name: value}) == plain, name
        with pytest.raises(UserError, match=f"{name} .*; leave it out of extra"):
            parameters_of(library, {"extra": {name: value}})
    found = {plain}
    for extra in WITH_EFFECT[library]:
        check_library(library, parameters_of(library, {"extra": extra}), NAMES)
        found.add(scores_with_blanks(library, extra))
    assert len(found) == 1 + len(WITH_EFFECT[library])


@pytest.mark.parametrize("error", [TypeError, ValueError, AttributeError, RuntimeError])
@pytest.mark.parametrize("part", ["fit", "load", "gains"])
def test_any_error_at_extra_parameters_is_one_sentence(
    part: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error("bad value\nin detail")

    row = LIBRARIES["lightgbm"]
    monkeypatch.setitem(LIBRARIES, "lightgbm", replace(row, **{part: fail}))
    parameters = parameters_of("lightgbm", {"extra": {"min_data_in_bin": 5}})
    message = r"^lightgbm .+ parameters min_data_in_bin \(bad value\); change --lightgbm$"
    with pytest.raises(UserError, match=message):
        check_library("lightgbm", parameters, NAMES)


NAMED = {NUMBERS: {"a": -1}, GROUPS: [["a", "b"], ["c"]]}
"""Values of parameters on columns, by form."""


@pytest.mark.parametrize(
    ("library", "name"),
    [(library, name) for library in LIBRARIES for name in LIBRARIES[library].columns],
)
def test_parameters_on_columns_are_by_name_and_may_name_others(library: str, name: str) -> None:
    """`infer select` fits fewer columns than are named."""
    row = LIBRARIES[library]
    value = NAMED[row.columns[name]]
    if name != "monotone_constraints" and isinstance(value, dict):
        value = {"a": 5.0}
    plain = parameters_of(library, {"num_rounds": 3})
    named = {**plain, "extra": {name: value}}
    check_library(library, named, NAMES)
    matrix, target = library_rows()
    plain_text, text = (fit_booster(library, matrix, target, NAMES, p, 0) for p in (plain, named))
    assert text != plain_text
    fewer = (np.ascontiguousarray(matrix[:, 3:]), target, NAMES[3:])
    assert fit_booster(library, *fewer, named, 0) == fit_booster(library, *fewer, plain, 0)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_constraint_by_name_is_on_that_column(library: str) -> None:
    """The target rises with column a, so the scores must not follow it."""
    falling = {"num_rounds": 20, "extra": {"monotone_constraints": {"a": -1, "z": 1}}}
    matrix, target = library_rows()
    reversed_names = (np.ascontiguousarray(matrix[:, ::-1]), target, NAMES[::-1])
    for column, given in ((0, (matrix, target, NAMES)), (3, reversed_names)):
        text = fit_booster(library, *given, parameters_of(library, falling), 0)
        rows = np.repeat(given[0][:1], 50, axis=0)
        rows[:, column] = np.linspace(-3, 3, 50)
        assert (np.diff(LIBRARIES[library].load(text)(rows, 1)) <= 0).all()


@pytest.mark.parametrize("library", LIBRARIES)
def test_parameters_without_a_place_in_extra_are_refused(library: str) -> None:
    row = LIBRARIES[library]
    for name in row.fixed:
        with pytest.raises(UserError, match="is set by this toolkit"):
            parameters_of(library, {"extra": {name: 1}})
    for name, reason in row.refused.items():
        with pytest.raises(UserError, match=f"{name} {reason}; leave it out of extra"):
            parameters_of(library, {"extra": {name: 1}})
    for name, other in row.needs.items():
        with pytest.raises(UserError, match=f"{name} has no effect without {other}"):
            parameters_of(library, {"extra": {name: 1}})
    for alias, name in row.aliases.items():
        assert name in row.defaults
        with pytest.raises(UserError, match="is a setting of its own"):
            parameters_of(library, {"extra": {alias: 1}})


def test_extra_parameters_are_recorded_and_change_the_ensemble(data: Path, tmp_path: Path) -> None:
    chosen = {"features": "numeric", "num_rounds": 3, "lightgbm": "{extra: {min_data_in_bin: 50}}"}
    root = fit_small(data, tmp_path, **chosen)
    manifest = json.loads((root / "ensemble.json").read_text())
    assert manifest["parameters"]["lightgbm"]["extra"] == {"min_data_in_bin": 50}
    fit_small(data, tmp_path, **chosen)
    with pytest.raises(UserError, match=r"extra\.min_data_in_bin = 50, now it is None"):
        fit_small(data, tmp_path, **{**chosen, "lightgbm": "{}"})


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_gpu_that_a_library_cannot_use_is_refused(
    data: Path, tmp_path: Path, library: str, cli: Cli
) -> None:
    """Not only without a GPU: the builds that the extras install have no CUDA, but CatBoost's."""
    flags = ("--data", data, "--features", "raw", "--out", tmp_path, "--num_folds", 3)
    ended = cli("infer", "fit", *flags, "--libraries", library, "--device", "cuda")
    if library == "catboost" and not ended.code:
        pytest.skip("CatBoost has found a GPU")
    assert ended.code == 2
    assert ended.err.startswith(f"error: --device cuda: {library} ")
    assert ended.err.endswith(f"use --device cpu, or install {library} built for CUDA\n")
    assert ended.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_library_that_is_not_installed_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "catboost", None)
    with pytest.raises(UserError, match=r'pip install "isic-toolkit\[boosters\]"'):
        LIBRARIES["catboost"].load("{}")
