import pytest

from tests.support.commands import tiny_settings


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mixup": 0.2, "batch_size": 7}, "make --batch_size 7 even"),
        ({"cutmix": 0.2, "mask_weight": 1.0}, "not their masks"),
    ],
)
def test_settings_that_exclude_each_other(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny_settings(**values)


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
