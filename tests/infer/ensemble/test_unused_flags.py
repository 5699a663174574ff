"""Flags without an effect are refused; those of a config file may serve several runs."""

from pathlib import Path

import pytest

from infer.ensemble.features.spec import FeatureSpec
from infer.ensemble.rows import read_rows
from infer.ensemble.settings import FitSettings
from infer.ensemble.unused_flags import OF_BOOSTERS, refuse_unused_flags
from isic.runtime.config import build
from isic.runtime.errors import UserError
from tests.support.commands import Cli
from tests.support.ensembles import fit_settings, predict_table

VAIN: tuple[tuple[dict[str, str], str], ...] = (
    ({"features": "raw", "frozen": "x"}, "--frozen"),
    ({"features": "raw,image", "frozen": "x"}, "--frozen"),
    ({"features": "raw", "image_noise": "5"}, "--image_noise"),
    ({"features": "image", "image_noise": "5"}, "--image_noise"),
    ({"features": "frozen_score", "image_noise": "5"}, "--image_noise"),
    ({"libraries": "xgboost", "lightgbm": "{max_depth: 3}"}, "--lightgbm"),
    ({"libraries": "xgboost", "weights": "3"}, "--weights"),
    ({"blank": "attribution", "blank_share": "0"}, "--blank"),
    ({"features": "image", "libraries": "xgboost"}, "--libraries"),
    ({"features": "multimodal,-engineered", "blank_share": "0.1"}, "--blank_share"),
    ({"features": "image", "lightgbm": "{max_depth: 3}"}, "--lightgbm"),
)
USEFUL: tuple[dict[str, str], ...] = (
    {"features": "raw,frozen_pca", "frozen": "x"},
    {"features": "multimodal", "image_noise": "5", "blank_share": "0.1"},
    {"features": "image", "refit": "true", "calibrate": "platt", "seeds": "2"},
    {"libraries": "xgboost,lightgbm", "weights": "3,1", "lightgbm": "{max_depth: 3}"},
    {"blank": "attribution"},
)


def check(flags: dict[str, str]) -> None:
    settings = build(FitSettings, flags)
    settings.remember_given(flags)
    refuse_unused_flags(settings, FeatureSpec.parse(settings.features))


@pytest.mark.parametrize(("flags", "name"), VAIN)
def test_a_flag_without_an_effect_is_refused(flags: dict[str, str], name: str) -> None:
    with pytest.raises(UserError, match=f"^{name} has no effect, because .*; leave it out$"):
        check(flags)


@pytest.mark.parametrize("flags", USEFUL)
def test_a_flag_with_an_effect_is_accepted(flags: dict[str, str]) -> None:
    check(flags)


@pytest.mark.parametrize(("flags", "name"), VAIN)
def test_a_config_file_may_have_settings_of_other_runs(
    tmp_path: Path, flags: dict[str, str], name: str
) -> None:
    del name
    config = tmp_path / "shared.yaml"
    config.write_text("".join(f"{key}: {value!r}\n" for key, value in flags.items()))
    check({"config": str(config)})


def test_every_such_flag_exists() -> None:
    assert {*OF_BOOSTERS, "frozen", "image_noise"} <= FitSettings.flags().keys()


def test_the_command_knows_its_flags(data: Path, tmp_path: Path, cli: Cli) -> None:
    flags = ("--features", "raw", "--data", data, "--out", tmp_path / "out")
    ended = cli("infer", "fit", *flags, "--frozen", tmp_path / "none")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "--frozen has no effect" in ended.err
    assert not (tmp_path / "out").exists()


def test_embeddings_of_which_only_the_fold_plan_is_read_are_named(
    data: Path, embeddings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = {"features": "raw", "num_folds": None}
    read_rows(fit_settings(data, tmp_path, **chosen, embeddings=embeddings))
    assert "only the fold plan in " in capsys.readouterr().out
    without_plan = fit_settings(data, tmp_path, **chosen, embeddings=tmp_path / "none")
    read_rows(without_plan)  # as from a config file
    assert not capsys.readouterr().out
    without_plan.remember_given(["embeddings"])
    with pytest.raises(UserError, match="has no fold plan"):
        read_rows(without_plan)
    read_rows(fit_settings(data, tmp_path, features="raw,image", embeddings=embeddings))
    assert not capsys.readouterr().out


@pytest.mark.parametrize("flag", ["embeddings", "frozen"])
def test_networks_that_no_ensemble_reads_are_refused(
    project: Path, tmp_path: Path, flag: str
) -> None:
    given = {"embeddings": (), flag: tmp_path / "none", "output": tmp_path / "s.csv"}
    with pytest.raises(UserError, match=f"raw needs no --{flag} to score; leave --{flag} out"):
        predict_table(project, "raw", **given)
    assert not (tmp_path / "s.csv").exists()
