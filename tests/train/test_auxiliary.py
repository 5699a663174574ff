"""The grammar of auxiliary targets, in flags and config files."""

import subprocess
import sys
from pathlib import Path

import pytest

from isic.runtime import yaml12
from isic.runtime.config import build
from isic.runtime.errors import UserError
from tests.support.commands import TINY_KEYS, tiny_settings
from train.auxiliary import DEFAULT_WEIGHT, AuxTarget
from train.checkpoint import checkpoint_settings
from train.config import TrainSettings, load_settings

MEL = AuxTarget("mel", "iddx_full", "Melanoma")
SEEN = AuxTarget("seen", "lesion_id")


@pytest.mark.parametrize(
    ("value", "targets"),
    [
        ("mel: iddx_full ~ Melanoma; seen: lesion_id", (MEL, SEEN)),
        (" mel :iddx_full~Melanoma ;seen:lesion_id; ", (MEL, SEEN)),
        ({"seen": "lesion_id", "mel": "iddx_full ~ Melanoma"}, (SEEN, MEL)),
        (
            "nos: iddx_full ~ Nevus, NOS: a ~ b",
            (AuxTarget("nos", "iddx_full", "Nevus, NOS: a ~ b"),),
        ),
        ("", ()),
        (None, ()),
        ((MEL,), (MEL,)),
    ],
)
def test_definitions_are_parsed_and_saved_as_text(
    value: object, targets: tuple[AuxTarget, ...]
) -> None:
    settings = tiny_settings(aux=value)
    assert settings.aux == targets
    saved = settings.model_dump(mode="json")
    assert saved["aux"] is None or isinstance(saved["aux"], str)
    again = yaml12.load(yaml12.dump(saved))
    assert TrainSettings(**again).aux == targets


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("mel", 'separated by semicolons; "mel" has no colon'),
        ("mel iddx: x; seen: lesion_id", '"mel iddx" is no name of a target'),
        (": lesion_id", '"" is no name of a target'),
        ("mel:", 'the target "mel" has no column'),
        ("mel: ~ Melanoma", 'the target "mel" has no column'),
        ("mel: iddx_full ~", 'the target "mel" has no text'),
        ("a: lesion_id; a: iddx_1", 'two targets have the name "a"; rename one'),
        ({"a": "iddx_full ~ x; y"}, 'the target "a" has a semicolon'),
        (7, "valid tuple"),
        (["a: b"], "AuxTarget"),
    ],
)
def test_a_wrong_definition_is_one_sentence(value: object, words: str) -> None:
    with pytest.raises(UserError) as refused:
        build(TrainSettings, {**TINY_KEYS, "aux": value})
    assert words in str(refused.value)
    assert str(refused.value).startswith("--aux")
    assert "\n" not in str(refused.value)


def test_a_weight_takes_targets() -> None:
    with pytest.raises(ValueError, match="--aux_weight is the weight of --aux; give both"):
        tiny_settings(aux_weight=0.5)
    with pytest.raises(ValueError, match="aux_weight"):
        tiny_settings(aux="seen: lesion_id", aux_weight=0)
    assert tiny_settings(aux="seen: lesion_id").aux_factor == DEFAULT_WEIGHT
    assert tiny_settings(aux="seen: lesion_id", aux_weight=2).aux_factor == 2


def test_a_config_may_have_a_mapping_and_a_flag_replaces_it(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("model: test_vit\naux:\n  mel: iddx_full ~ Melanoma\n  seen: lesion_id\n")
    named = {"config": str(config)}
    assert load_settings(TrainSettings, named).aux == (MEL, SEEN)
    assert load_settings(TrainSettings, {**named, "aux": "seen: lesion_id"}).aux == (SEEN,)
    assert load_settings(TrainSettings, {**named, "aux": ""}).aux == ()


def test_checkpoints_of_earlier_versions_have_no_targets() -> None:
    saved = tiny_settings().model_dump(mode="json")
    del saved["aux"], saved["aux_weight"]
    assert checkpoint_settings(Path("a.pth"), {"args": saved}).aux == ()


def test_settings_need_no_table_library() -> None:
    code = "import sys, train.config\nassert not {'torch', 'polars', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
