"""Gradient-boosted trees of several libraries: fitted to a text, and loaded from it to score.

A new library is one row of `LIBRARIES`. Each booster is fitted on one thread, so its bytes do not
depend on the number of threads.
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from infer.ensemble.boosting.column_parameters import (
    GROUPS,
    NUMBERS,
    by_position,
    on_columns,
    refuse_other_form,
)
from isic.layout import Fold
from isic.runtime.errors import UserError, did_you_mean, first_line
from isic.runtime.extras import install_command
from isic.runtime.files import write_text

Matrix = NDArray[np.float32]
Parameters = Mapping[str, Any]
Predict = Callable[[Matrix, int], NDArray[np.float64]]
"""Score a matrix on a number of threads, 0 for all: [N] float64 in [0, 1]."""
Contribute = Callable[[Matrix], NDArray[np.float64]]
"""Return [N, D] how much each feature of a row adds to its log-odds: SHAP values of the trees.

Source: Lundberg et al. 2020, From local explanations to global understanding with explainable AI
for trees, Nature Machine Intelligence 2:56.
"""
Gains = NDArray[np.float64]
KeyT = TypeVar("KeyT", bound=tuple[str, Fold, int])
"""Library, fold and seed of a booster."""

# 314 positives with 100 negatives each.
REFERENCE_ROWS = 31_700
"""Rows that a booster of the challenge is fitted on."""

REFERENCE_MIN_DATA = 85
SMALLEST_MIN_DATA = 10

# Wide use samples 0.77 of the rows every fourth round; here it is half of them in every round.
# Changes of the pAUC by that, without blanks, as `infer compare` judges them (* more than noise):
#
# - 885 real rows, ten seeds, split seeds 7, 11 and 13: raw +0.0013, +0.0022*, +0.0009; engineered
#   +0.0005, +0.0004, -0.0008. Split seed 42, as reported: +0.0011 and +0.0012.
# - 3,000 synthetic rows, five seeds: raw +0.0034*, +0.0044, +0.0033; engineered +0.0017, +0.0010,
#   +0.0012.
LIGHTGBM: Parameters = {
    "num_rounds": 200,
    "learning_rate": 0.0323,
    "max_depth": 4,
    "num_leaves": 103,
    "min_data_in_leaf": None,
    "lambda_l1": 0.088,
    "lambda_l2": 0.004,
    "feature_fraction": 0.83,
    "feature_fraction_bynode": 0.40,
    "bagging_fraction": 0.5,
    "bagging_freq": 1,
    "scale_pos_weight": 2.8,
    "max_bin": 255,
    "path_smooth": 0.0,
    "extra_trees": False,
}
"""The settings in wide use for the challenge, except bagging and `min_data`."""

XGBOOST: Parameters = {
    "num_rounds": 200,
    "learning_rate": 0.085,
    "max_depth": 6,
    "max_leaves": 0,
    "min_child_weight": 1.0,
    "gamma": 0.0,
    "reg_lambda": 8.9,
    "reg_alpha": 0.68,
    "subsample": 0.60,
    "colsample_bytree": 0.84,
    "colsample_bylevel": 0.55,
    "colsample_bynode": 0.99,
    "scale_pos_weight": 3.3,
    "max_bin": 256,
}
"""The settings in wide use for the challenge."""

CATBOOST: Parameters = {
    "num_rounds": 250,
    "learning_rate": 0.069,
    "depth": 7,
    "l2_leaf_reg": 6.2,
    "subsample": 0.63,
    "rsm": 1.0,
    "random_strength": 1.0,
    "border_count": 254,
    "scale_pos_weight": 2.6,
}
"""As in wide use, but `min_data_in_leaf`, which has no effect on symmetric trees."""


def min_data(num_rows: int) -> int:
    """Return the default `min_data_in_leaf`: 85 per 31,700 rows, between 10 and 85."""
    # With 85 rows of 700, a leaf could not separate the rare malignant lesions.
    proportional = round(REFERENCE_MIN_DATA * num_rows / REFERENCE_ROWS)
    return min(max(proportional, SMALLEST_MIN_DATA), REFERENCE_MIN_DATA)


def fit_lightgbm(
    matrix: Matrix,
    target: NDArray[np.integer],
    names: Sequence[str],
    parameters: Parameters,
    seed: int,
) -> str:
    """Fit one booster and return it in LightGBM's text format."""
    given = parameters["min_data_in_leaf"]
    options = {
        **_by_position(own_options(parameters, LIGHTGBM_GPU), names),
        "min_data_in_leaf": min_data(len(target)) if given is None else given,
        "objective": "binary",
        "seed": seed,
        "num_threads": 1,
        "deterministic": True,
        # Otherwise LightGBM picks row- or column-wise histograms by timing, and the text differs
        # between runs. Needed until `deterministic` implies it (lightgbm-org/LightGBM#6731).
        "force_row_wise": True,
        "verbosity": -1,
    }
    num_rounds = options.pop("num_rounds")
    lightgbm = _import("lightgbm")
    data = lightgbm.Dataset(matrix, target, feature_name=list(names), params=options)
    text: str = lightgbm.train(options, data, num_boost_round=num_rounds).model_to_string()
    return text


def _by_position(options: Parameters, names: Sequence[str]) -> dict[str, Any]:
    """Return parameters with the positions of columns in place of their names."""
    forms = {key: LIGHTGBM_COLUMNS[key] for key in options if key in LIGHTGBM_COLUMNS}
    changed = {
        key: by_position(options[key], form, names, LIGHTGBM_OTHERS.get(key, 0))
        for key, form in forms.items()
    }
    return {**options, **changed}


LIGHTGBM_END = "\npandas_categorical:null\n"
"""The last line of a complete model that was fitted on a matrix."""


def _open_lightgbm(text: str) -> Any:
    lightgbm = _import("lightgbm")
    try:
        # LightGBM aborts the process on half a model (seen with lightgbm 4.7; no report found).
        if not text.endswith(LIGHTGBM_END):
            raise ValueError("it is cut short")
        return lightgbm.Booster(model_str=text)
    except (ValueError, lightgbm.basic.LightGBMError) as error:
        raise _broken("LightGBM", error) from None


def load_lightgbm(text: str) -> Predict:
    """Return the function that scores a C-ordered float32 matrix."""
    booster = _open_lightgbm(text)

    def predict(matrix: Matrix, num_threads: int) -> NDArray[np.float64]:
        assert matrix.dtype == np.float32
        assert matrix.flags.c_contiguous
        return np.asarray(booster.predict(matrix, num_threads=num_threads), dtype=np.float64)

    return predict


class NoContributions(UserError):
    """A library does not explain the scores of a booster."""


LINEAR_TREE = "\nis_linear=1\n"
"""Part of a model whose leaves are linear functions."""


def lightgbm_contributions(text: str) -> Contribute:
    """Return the function that explains the scores of a matrix."""
    if LINEAR_TREE in text:
        raise NoContributions("LightGBM does not explain the scores of linear trees (linear_tree)")
    booster = _open_lightgbm(text)
    # The last column is the mean log-odds.
    return lambda matrix: np.asarray(booster.predict(matrix, pred_contrib=True))[:, :-1]


def lightgbm_gains(text: str, num_features: int) -> Gains:
    """Return [D] total gain of the splits on each feature."""
    booster = _import("lightgbm").Booster(model_str=text)
    return np.asarray(booster.feature_importance("gain"), dtype=np.float64)


def fit_xgboost(
    matrix: Matrix,
    target: NDArray[np.integer],
    names: Sequence[str],
    parameters: Parameters,
    seed: int,
) -> str:
    """Fit one booster and return it in XGBoost's JSON format."""
    xgboost = _import("xgboost")
    options = {
        "device": "cpu",
        **own_options(parameters, XGBOOST_GPU),
        "objective": "binary:logistic",
        "tree_method": "hist",
        "seed": seed,
        "nthread": 1,
    }
    num_rounds = options.pop("num_rounds")
    data = xgboost.QuantileDMatrix(
        matrix, target, feature_names=list(names), max_bin=parameters["max_bin"], nthread=1
    )
    return bytes(xgboost.train(options, data, num_rounds).save_raw("json")).decode()


def _open_xgboost(text: str) -> Any:
    xgboost = _import("xgboost")
    booster = xgboost.Booster()
    try:
        # XGBoost aborts the process on an empty text (seen with xgboost 3.2; no report found).
        json.loads(text)["learner"]["gradient_booster"]
        booster.load_model(bytearray(text, "utf-8"))
    except (ValueError, LookupError, TypeError, xgboost.core.XGBoostError) as error:
        raise _broken("XGBoost", error) from None
    return booster


def load_xgboost(text: str) -> Predict:
    """Return the function that scores a matrix."""
    booster = _open_xgboost(text)

    def predict(matrix: Matrix, num_threads: int) -> NDArray[np.float64]:
        booster.set_param({"nthread": num_threads})
        return np.asarray(booster.inplace_predict(matrix), dtype=np.float64)

    return predict


def xgboost_contributions(text: str) -> Contribute:
    """Return the function that explains the scores of a matrix."""
    booster = _open_xgboost(text)

    def contribute(matrix: Matrix) -> NDArray[np.float64]:
        data = _import("xgboost").DMatrix(matrix, feature_names=booster.feature_names)
        return np.asarray(booster.predict(data, pred_contribs=True), dtype=np.float64)[:, :-1]

    return contribute


def xgboost_gains(text: str, num_features: int) -> Gains:
    """Return [D] total loss reduction by the splits on each feature."""
    gains = np.zeros(num_features)
    booster = json.loads(text)["learner"]["gradient_booster"]
    # The booster `dart` holds one of trees.
    for tree in booster.get("gbtree", booster)["model"]["trees"]:
        is_split = np.array(tree["left_children"]) >= 0  # a node without children is a leaf
        features = np.array(tree["split_indices"])[is_split]
        np.add.at(gains, features, np.array(tree["loss_changes"])[is_split])
    return gains


UNREPEATED = ("model_guid", "train_finish_time")
"""Fields of CatBoost's JSON that differ between fits of the same data (seen with catboost 1.2)."""


def fit_catboost(
    matrix: Matrix,
    target: NDArray[np.integer],
    names: Sequence[str],
    parameters: Parameters,
    seed: int,
) -> str:
    """Fit one booster and return it in CatBoost's JSON format, without UNREPEATED."""
    catboost = _import("catboost")
    options = {
        **own_options(parameters, CATBOOST_GPU),
        "loss_function": "Logloss",
        "bootstrap_type": "Bernoulli",
        "random_seed": seed,
        "thread_count": 1,
        "logging_level": "Silent",
        "allow_writing_files": False,
    }
    model = catboost.CatBoost({"iterations": options.pop("num_rounds"), **options})
    model.fit(catboost.Pool(matrix, target, feature_names=list(names), thread_count=1))
    # CatBoost writes JSON only to files (catboost/catboost#2714).
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.json"
        model.save_model(str(path), format="json")
        content = json.loads(path.read_text(encoding="utf-8"))
    for key in UNREPEATED:
        content["model_info"].pop(key, None)
    return json.dumps(content)


def _open_catboost(text: str) -> Any:
    catboost = _import("catboost")
    model = catboost.CatBoost()
    try:
        # CatBoost loads an incomplete model without an error and fails when it scores
        # (catboost/catboost#3137, seen with catboost 1.2).
        content = json.loads(text)
        (content.get("oblivious_trees") or content["trees"])[0]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.json"
            path.write_text(text, encoding="utf-8")
            model.load_model(str(path), format="json")
    except (ValueError, LookupError, TypeError, catboost.CatBoostError) as error:
        raise _broken("CatBoost", error) from None
    return model


def load_catboost(text: str) -> Predict:
    """Return the function that scores a matrix."""
    model = _open_catboost(text)

    def predict(matrix: Matrix, num_threads: int) -> NDArray[np.float64]:
        scores = model.predict(
            matrix, prediction_type="Probability", thread_count=num_threads or -1
        )
        return np.asarray(scores, dtype=np.float64)[:, 1]

    return predict


def catboost_contributions(text: str) -> Contribute:
    """Return the function that explains the scores of a matrix."""
    model = _open_catboost(text)

    def contribute(matrix: Matrix) -> NDArray[np.float64]:
        pool = _import("catboost").Pool(matrix)
        values = model.get_feature_importance(pool, type="ShapValues")
        return np.asarray(values, dtype=np.float64)[:, :-1]

    return contribute


def catboost_gains(text: str, num_features: int) -> Gains:
    """Return [D] PredictionValuesChange: how much the splits on each feature move the prediction.

    Source: CatBoost's documentation of feature importance.
    """
    # All nodes at one depth of a symmetric tree share a split; bit d of a leaf's number is its side
    # of split d. A split's part is the weighted variance between leaves that differ only in it.
    gains = np.zeros(num_features)
    content = json.loads(text)
    for tree in content.get("trees", ()):
        _add_gains(tree, gains)
    for tree in content.get("oblivious_trees", ()):
        shape = (2,) * len(tree["splits"])
        values = np.reshape(tree["leaf_values"], shape, order="F")
        weights = np.reshape(tree["leaf_weights"], shape, order="F")
        for depth, split in enumerate(tree["splits"]):
            low, high = np.moveaxis(values, depth, 0)
            num_low, num_high = np.moveaxis(weights, depth, 0)
            total = np.where(num_low + num_high > 0, num_low + num_high, 1)
            variance = (high - low) ** 2 * num_low * num_high / total
            gains[split["float_feature_index"]] += variance.sum()
    return gains


def _add_gains(node: Mapping[str, Any], gains: Gains) -> tuple[float, float]:
    """Add the gains of a tree that is not symmetric. Return its mean value and its weight."""
    if "split" not in node:
        return node["value"], node["weight"]
    low, num_low = _add_gains(node["left"], gains)
    high, num_high = _add_gains(node["right"], gains)
    total = num_low + num_high or 1
    gains[node["split"]["float_feature_index"]] += (high - low) ** 2 * num_low * num_high / total
    return (low * num_low + high * num_high) / total, num_low + num_high


EXTRA, DEVICE = "extra", "device"
"""The keys of `parameters_of` that are not parameters of a library."""
LIGHTGBM_GPU: Parameters = {"device_type": "cuda"}
XGBOOST_GPU: Parameters = {"device": "cuda"}
CATBOOST_GPU: Parameters = {"task_type": "GPU"}


def own_options(parameters: Parameters, on_gpu: Parameters) -> dict[str, Any]:
    """Return the parameters of a library: its settings, the extra ones, and those of the device."""
    options = {key: value for key, value in parameters.items() if key not in (EXTRA, DEVICE)}
    options |= parameters.get(EXTRA, {})
    return options | dict(on_gpu) if parameters.get(DEVICE) == "cuda" else options


def _import(library: str) -> Any:
    """Import a library when it is used. Raise UserError with the command that installs it."""
    try:
        return import_module(library)
    except ImportError:
        row = LIBRARIES[library]
        command = install_command(row.extra) if row.extra else f"pip install {row.package}"
        raise UserError(f"{library} is not installed; run `{command}`") from None


def _broken(library: str, error: Exception) -> UserError:
    return UserError(
        f"the {library} model does not load ({first_line(error)}); fit the ensemble again"
    )


LIGHTGBM_COLUMNS = {
    "monotone_constraints": NUMBERS,
    "feature_contri": NUMBERS,
    "cegb_penalty_feature_lazy": NUMBERS,
    "cegb_penalty_feature_coupled": NUMBERS,
    "interaction_constraints": GROUPS,
}
LIGHTGBM_OTHERS = {"feature_contri": 1.0}
"""The number of a column that a parameter does not name, if it is not 0."""
XGBOOST_COLUMNS = {"monotone_constraints": NUMBERS, "interaction_constraints": GROUPS}
CATBOOST_COLUMNS = {
    "monotone_constraints": NUMBERS,
    "feature_weights": NUMBERS,
    "first_feature_use_penalties": NUMBERS,
    "per_object_feature_penalties": NUMBERS,
}

ROUNDS = ("num_boost_round", "n_estimators", "iterations", "num_iterations", "num_trees")
"""Other names of `num_rounds`."""
LIGHTGBM_FIXED = (
    *("objective", "seed", "num_threads", "deterministic", "force_row_wise", "force_col_wise"),
    *("verbosity", "device_type", *ROUNDS),
)
XGBOOST_FIXED = (
    *("objective", "tree_method", "device", "seed", "random_state", "nthread", "n_jobs"),
    *("verbosity", *ROUNDS),
)
XGBOOST_ALIASES = {
    "eta": "learning_rate",
    "min_split_loss": "gamma",
    "lambda": "reg_lambda",
    "alpha": "reg_alpha",
}
# CatBoost itself refuses two names of one parameter.
CATBOOST_FIXED = (
    *("loss_function", "objective", "bootstrap_type", "random_seed", "random_state"),
    *("thread_count", "logging_level", "verbose", "silent", "verbose_eval"),
    *("allow_writing_files", "train_dir", "task_type", "devices", *ROUNDS),
    # They choose which rows are malignant: `class_names: [1, 0]` would turn the scores around.
    *("class_names", "target_border"),
)

UNUSED = "has no effect here"
BY_POSITION = "takes positions of columns, which differ between fits"
SEVERAL_MACHINES = "is for training on several machines"
CONSTANT = "scores all rows alike here"
LIGHTGBM_METRICS = (
    *("metric", "metric_freq", "is_provide_training_metric", "eval_at", "multi_error_top_k"),
    "auc_mu_weights",
)
LIGHTGBM_OBJECTIVES = (
    *("reg_sqrt", "alpha", "fair_c", "poisson_max_delta_step", "tweedie_variance_power"),
    *("lambdarank_truncation_level", "lambdarank_norm", "label_gain", "objective_seed"),
    "lambdarank_position_bias_regularization",
)
"""Parameters of other objectives than the binary one."""
LIGHTGBM_CATEGORIES = (
    *("cat_l2", "cat_smooth", "max_cat_threshold", "max_cat_to_onehot"),
    "min_data_per_group",
)
"""Parameters of categories, which are codes here, and split as numbers are."""
LIGHTGBM_REFUSED = {
    **dict.fromkeys(
        (
            *("data", "valid", "header", "two_round", "save_binary", "parser_config_file"),
            *("label_column", "weight_column", "group_column", "ignore_column"),
            *("task", "input_model", "output_model", "output_result", "snapshot_freq"),
            *("convert_model", "convert_model_language", "early_stopping_round"),
            *("early_stopping_min_delta", "first_metric_only", "predict_raw_score"),
            *("predict_leaf_index", "predict_contrib", "predict_disable_shape_check"),
            *("pred_early_stop", "pred_early_stop_freq", "pred_early_stop_margin"),
            *("start_iteration_predict", "num_iteration_predict", "refit_decay_rate"),
            *("precise_float_parser", *LIGHTGBM_METRICS, *LIGHTGBM_OBJECTIVES),
            *LIGHTGBM_CATEGORIES,
        ),
        UNUSED,
    ),
    **dict.fromkeys(
        (
            *("categorical_feature", "max_bin_by_feature"),
            *("forcedsplits_filename", "forcedbins_filename"),
        ),
        BY_POSITION,
    ),
    **dict.fromkeys(
        (
            *("num_machines", "machines", "machine_list_filename", "local_listen_port"),
            *("time_out", "pre_partition"),
        ),
        SEVERAL_MACHINES,
    ),
    "bagging_by_query": CONSTANT,
}
XGBOOST_REFUSED = dict.fromkeys(
    (
        *("eval_metric", "disable_default_eval_metric", "validate_parameters"),
        *("max_cat_to_onehot", "max_cat_threshold"),
    ),
    UNUSED,
)
CATBOOST_CATEGORIES = (
    *("one_hot_max_size", "max_ctr_complexity", "simple_ctr", "combinations_ctr"),
    *("per_feature_ctr", "ctr_description", "counter_calc_method", "ctr_leaf_count_limit"),
    *("store_all_simple_ctr", "ctr_history_unit", "final_ctr_computation_mode"),
    "model_size_reg",
)
CATBOOST_REFUSED = {
    **dict.fromkeys(
        (
            *("custom_metric", "custom_loss", "name", "mvs_reg", "roc_file", "snapshot_file"),
            *("snapshot_interval", *CATBOOST_CATEGORIES),
        ),
        UNUSED,
    ),
    "per_float_feature_quantization": BY_POSITION,
    "ignored_features": "is what --features is for",
}
CATBOOST_NEEDS = dict.fromkeys(
    (
        *("eval_metric", "metric_period", "use_best_model"),
        *("early_stopping_rounds", "od_type", "od_wait", "od_pval"),
    ),
    "eval_fraction",
)
"""They choose the number of trees by the rows that `eval_fraction` holds back."""


@dataclass(frozen=True, kw_only=True)
class Library:
    """A library of gradient-boosted trees."""

    fit: Callable[[Matrix, NDArray[np.integer], Sequence[str], Parameters, int], str]
    """See `fit_booster`."""
    load: Callable[[str], Predict]
    """From a booster's text. Raises UserError if it is not a whole model."""
    contributions: Callable[[str], Contribute]
    """From a booster's text. Raises UserError if it is not a whole model, NoContributions if the
    library does not explain such trees."""
    gains: Callable[[str, int], Gains]
    """[D] gain of each feature, from a booster's text and D."""
    defaults: Parameters
    """Every setting that may be changed, with its default; None if `fit` derives it."""
    suffix: str
    """Of the booster's file."""
    package: str
    """The distribution that has the module."""
    fixed: tuple[str, ...]
    """Parameters that `fit` sets, under all their names."""
    aliases: Mapping[str, str]
    """Names in `defaults` by other names that the library accepts without an error."""
    columns: Mapping[str, str]
    """Parameters that name columns, and their form: NUMBERS or GROUPS."""
    refused: Mapping[str, str]
    """Other parameters that `extra` must not have, and why."""
    needs: Mapping[str, str]
    """Parameters that have an effect only beside another one, and that one."""
    extra: str | None
    """The extra of this toolkit that installs the package; None if it is always installed."""


LIBRARIES = {
    "lightgbm": Library(
        fit=fit_lightgbm,
        load=load_lightgbm,
        contributions=lightgbm_contributions,
        gains=lightgbm_gains,
        defaults=LIGHTGBM,
        suffix=".txt",
        package="lightgbm",
        fixed=LIGHTGBM_FIXED,
        aliases={},
        columns=LIGHTGBM_COLUMNS,
        refused=LIGHTGBM_REFUSED,
        needs={},
        extra=None,
    ),
    "xgboost": Library(
        fit=fit_xgboost,
        load=load_xgboost,
        contributions=xgboost_contributions,
        gains=xgboost_gains,
        defaults=XGBOOST,
        suffix=".json",
        package="xgboost-cpu",
        fixed=XGBOOST_FIXED,
        aliases=XGBOOST_ALIASES,
        columns=XGBOOST_COLUMNS,
        refused=XGBOOST_REFUSED,
        needs={},
        extra="boosters",
    ),
    "catboost": Library(
        fit=fit_catboost,
        load=load_catboost,
        contributions=catboost_contributions,
        gains=catboost_gains,
        defaults=CATBOOST,
        suffix=".json",
        package="catboost",
        fixed=CATBOOST_FIXED,
        aliases={},
        columns=CATBOOST_COLUMNS,
        refused=CATBOOST_REFUSED,
        needs=CATBOOST_NEEDS,
        extra="boosters",
    ),
}
"""By the name of the library's module, which is also the flag of `infer fit` for its settings."""

TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false"}
"""Names of the types of settings in error messages."""


def parameters_of(library: str, changes: Parameters) -> dict[str, Any]:
    """Return a library's settings with changes. Raise UserError for an unknown name or type.

    EXTRA holds any other parameters of the library, which only the library can check.
    """
    defaults = LIBRARIES[library].defaults
    for key, value in changes.items():
        if key == EXTRA:
            _check_extra(library, value)
            continue
        if key not in defaults:
            raise UserError(
                f'{library} has no setting "{key}" here, {did_you_mean(key, (*defaults, EXTRA))}'
            )
        kind = int if defaults[key] is None else type(defaults[key])
        # Not isinstance: a bool is an int.
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(
                f"{library}: {key} is {TYPE_NAMES[kind]}, not {value}; change --{library}"
            )
    if changes.get("num_rounds", 1) < 1:
        raise UserError(f"{library}: num_rounds is {changes['num_rounds']}; give at least one")
    return {**defaults, **changes}


def _check_extra(library: str, extra: Any) -> None:
    """Raise a UserError if extra parameters are no mapping, or have a place of their own."""
    if not isinstance(extra, Mapping) or not all(isinstance(key, str) for key in extra):
        raise UserError(
            f"{library}: extra needs a mapping such as {{extra: {{name: 1}}}}, not {extra}"
        )
    row = LIBRARIES[library]
    for key, value in extra.items():
        refuse_parameter(library, key, row.aliases.get(key, key))
        if key in row.needs and row.needs[key] not in extra:
            raise UserError(
                f"{library}: {key} has no effect without {row.needs[key]}; leave it out of extra"
            )
        if key in row.columns:
            refuse_other_form(library, key, value, row.columns[key])


def refuse_parameter(library: str, key: str, name: str) -> None:
    """Raise a UserError if a parameter has no place in `extra`.

    Args:
        key: as the user calls it.
        name: as the tables of this module call it.
    """
    row = LIBRARIES[library]
    if name in row.defaults:
        raise UserError(f"{library}: {key} in extra is a setting of its own; write {name}: ...")
    if name in row.fixed:
        raise UserError(f"{library}: {key} is set by this toolkit; leave it out of extra")
    if name in row.refused:
        raise UserError(f"{library}: {key} {row.refused[name]}; leave it out of extra")


def _on_columns(library: str, parameters: Parameters, names: Sequence[str]) -> dict[str, Any]:
    """Return parameters whose extra ones are on these columns only, without any that are empty."""
    extra = dict(parameters.get(EXTRA, {}))
    for key, form in LIBRARIES[library].columns.items():
        if key in extra:
            extra[key] = on_columns(extra[key], form, names)
            if not extra[key]:
                del extra[key]
    return {**parameters, EXTRA: extra}


def fit_booster(
    library: str,
    matrix: Matrix,
    target: NDArray[np.integer],
    names: Sequence[str],
    parameters: Parameters,
    seed: int,
) -> str:
    """Fit one booster and return it as text.

    Args:
        matrix: [N, D].
        target: [N], 0 or 1.
        names: [D] columns.
        parameters: as `parameters_of` returns them; extra ones may name other columns too.

    Raises:
        UserError: the library is not installed, or refuses a setting's value.
    """
    parameters = _on_columns(library, parameters, names)
    try:
        return LIBRARIES[library].fit(matrix, target, names, parameters, seed)
    except Exception as error:
        # An optional library's own error types cannot be named here. CatBoost's come from the
        # extension module `_catboost`.
        if not type(error).__module__.startswith((library, f"_{library}")):
            raise
        message = f"{library} does not fit ({first_line(error)}); change --{library}"
        raise UserError(message) from None


def booster_file_name(library: str, fold: Fold, seed: int) -> str:
    return f"{library}_fold_{fold}_seed_{seed}{LIBRARIES[library].suffix}"


def write_boosters(root: Path, boosters: Mapping[KeyT, str]) -> list[str]:
    """Write the texts of boosters by library, fold and seed. Return the names of their files."""
    files = {booster_file_name(*key): text for key, text in boosters.items()}
    for name, text in files.items():
        write_text(root / name, text)
    return list(files)


def booster_entries(keys: Iterable[tuple[str, Fold, int]]) -> list[dict[str, Any]]:
    """Return a manifest's entries of boosters by library, fold and seed."""
    return [
        {
            "file": booster_file_name(library, fold, seed),
            "library": library,
            "fold": fold,
            "seed": seed,
        }
        for library, fold, seed in keys
    ]


def read_booster(path: Path, library: str) -> Predict:
    """Load a booster from its file. Raise UserError if it is missing or not a whole model."""
    return LIBRARIES[library].load(read_booster_text(path))


def read_booster_text(path: Path) -> str:
    """Return the text of a booster. Raise UserError if the file is missing."""
    if not path.is_file():
        raise UserError(f"{path} is missing; fit the ensemble again")
    return path.read_text(encoding="utf-8")
