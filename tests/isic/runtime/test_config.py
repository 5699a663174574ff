"""Settings from YAML files and flags."""

from pathlib import Path

import pytest

from infer.ensemble.settings import FitSettings
from isic.runtime import config
from isic.runtime.config import Settings, Several, build, describe_configs, read_config, read_yaml
from isic.runtime.errors import UserError
from tests.support.commands import Cli


def test_a_key_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("lr: 1e-3\nepochs: 3\nlr: 1e-4\n")
    with pytest.raises(UserError, match='the key "lr" is given twice'):
        read_yaml(path)
    path.write_text("base: &base {lr: 1e-3}\nother: {<<: *base, lr: 1e-4}\n")
    assert read_yaml(path)["other"] == {"lr": 1e-4}, "a merged key may be replaced"


def test_numbers_of_a_library_are_read_from_a_flag() -> None:
    for text, value in (("1e-2", 0.01), ("5E-2", 0.05), ("1", 1)):
        settings = build(FitSettings, {"lightgbm": f"{{learning_rate: {text}}}"})
        assert settings.parameters("lightgbm")["learning_rate"] == value
    for text, words in (
        ("{max_depth: 5, max_depth: 6}", 'the key "max_depth" is given twice'),
        ("{max_depth: [}", "this is not the YAML of a mapping"),
        ("{extra_trees: yes}", "extra_trees is true or false, not yes"),
    ):
        with pytest.raises(UserError, match=words):
            build(FitSettings, {"lightgbm": text})


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    class Paths(Settings):
        one: Path
        several: Several[Path] = ()

    monkeypatch.setenv("HOME", "/home/me")
    settings = build(Paths, {"one": "~/data", "several": "~,b/~"})
    assert settings.one == Path("/home/me/data")
    assert settings.several == (Path("/home/me"), Path("b/~"))
    with pytest.raises(UserError, match="there is no such home folder"):
        build(Paths, {"one": "~nobody-of-this-name/data"})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "large.yaml").write_text("epochs: 9\nlr: 0.1\n")
    monkeypatch.setattr(config, "CONFIG_DIR", tmp_path)
    return tmp_path


def test_a_config_overrides_its_base(folder: Path) -> None:
    (folder / "mine.yaml").write_text("# Mine.\nbase: large\nlr: 0.2\nmodel: vit\n")
    assert read_config(folder / "mine.yaml") == {"epochs": 9, "lr": 0.2, "model": "vit"}
    assert describe_configs() == {"mine": "Mine."}


@pytest.mark.parametrize("key", ["1", "true", "null", "1.5"])
def test_a_key_that_is_no_text_is_named(folder: Path, key: str) -> None:
    path = folder / "mine.yaml"
    path.write_text(f"a: 1\n{key}: tbp_lv_A\n")
    with pytest.raises(UserError, match=r"mine\.yaml has the key .*; write it in quotes"):
        read_yaml(path)


def test_an_unknown_base_names_the_nearest(folder: Path) -> None:
    (folder / "mine.yaml").write_text("base: larg\n")
    with pytest.raises(UserError, match=r'mine\.yaml: no base "larg", did you mean "large"'):
        read_config(folder / "mine.yaml")


def test_help_lists_the_configs(cli: Cli) -> None:
    shown = cli("train", "--help").out
    assert "--config vit_tiny" in shown
    assert "ViT-Tiny/16 at 224 px" in shown
