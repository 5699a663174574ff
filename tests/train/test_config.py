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
