from pathlib import Path

import pytest

from tests.support.commands import TINY_KEYS, tiny_settings
from train.config import TrainSettings, load_settings


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mixup": 0.2, "batch_size": 7}, "make --batch_size 7 even"),
        ({"cutmix": 0.2, "mask_weight": 1.0}, "not their masks"),
        ({"label_smoothing": 0.1}, "--label_smoothing is for --loss bce and asl"),
        ({"positives_per_batch": 8, "batch_size": 8}, "leaves no negative in a batch of 8"),
        (
            {"augment_on": "device", "augmentation": "heavy"},
            "runs only light and medium, not --augmentation heavy; choose one of them",
        ),
        (
            {"augment_on": "device", "augmentation": {"transform": {}}},
            "not --augmentation of a file",
        ),
        ({"augmentation": "ligth"}, 'no such level, did you mean "light"'),
        ({"extra_negatives_per_positive": 2}, "is for --extra_data; give both"),
        ({"fp16": True, "bf16": True}, "choose one of --fp16 and --bf16"),
        ({"fp16": True, "precision": "fp32"}, "--fp16 contradicts --precision fp32; choose one"),
        ({"bf16": True, "precision": "fp16"}, "--bf16 contradicts --precision fp16; choose one"),
    ],
)
def test_settings_that_exclude_each_other(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny_settings(**values)


@pytest.mark.parametrize(
    ("values", "precision"),
    [
        ({}, "auto"),
        ({"fp16": "true"}, "fp16"),
        ({"bf16": True}, "bf16"),
        ({"bf16": True, "precision": "bf16"}, "bf16"),
        ({"fp16": False}, "auto"),
        ({"fp16": False, "bf16": True}, "bf16"),
        # As earlier versions saved their settings.
        ({"fp16": False, "bf16": False}, "fp32"),
        ({"fp16": True, "bf16": False}, "fp16"),
    ],
)
def test_shorthands_choose_a_precision_and_are_not_saved(
    values: dict[str, object], precision: str
) -> None:
    settings = TrainSettings.model_validate({**TINY_KEYS, **values})
    saved = settings.model_dump(mode="json")
    assert saved["precision"] == precision
    assert not {"fp16", "bf16"} & saved.keys()
    assert TrainSettings(**saved).precision == precision


def test_a_flag_of_a_precision_overrides_that_of_the_config(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("model: test_vit\nfp16: true\nepochs: 3\n")

    def chosen(**flags: object) -> str:
        settings = load_settings(TrainSettings, {"config": str(config), **flags})
        assert settings.epochs == 3
        return settings.precision

    assert chosen() == "fp16"
    assert chosen(precision="bf16") == chosen(bf16="true") == "bf16"
    assert chosen(precision="auto") == chosen(fp16="false") == "auto"


@pytest.mark.parametrize(
    ("values", "epochs"),
    [
        ({}, [5]),
        ({"select_epoch": "best"}, [1, 2, 3, 4, 5]),
        ({"validate_every": 2}, [2, 4, 5]),
        ({"validate_every": 2, "select_epoch": "best"}, [2, 4, 5]),
        ({"validate_every": 9}, [5]),
    ],
)
def test_epochs_that_are_validated_on_all_rows(
    values: dict[str, object], epochs: list[int]
) -> None:
    settings = tiny_settings(epochs=5, **values)
    assert [epoch for epoch in range(1, 6) if settings.validates_all(epoch)] == epochs
