"""YAML 1.2: which words are numbers, truth values and text."""

import pytest
import yaml

from isic.runtime import yaml12

VALUES = {
    "1e-2": 0.01,
    "1E5": 1e5,
    "-1.5e+3": -1500.0,
    ".5": 0.5,
    "1.": 1.0,
    ".inf": float("inf"),
    "1_000": 1000,
    "401_059": 401_059,
    "010": 10,
    "0o10": 8,
    "0x1F": 31,
    "true": True,
    "False": False,
    "null": None,
    "~": None,
    "": None,
    **{word: word for word in ("yes", "no", "on", "off", "None", "nan", "1e", "e5", "1.2.3")},
    **{word: word for word in ("12:30:45", "2024-01-31", "2024_01_31", "1__0")},
}


@pytest.mark.parametrize("text", VALUES)
def test_a_plain_word_has_its_type_of_version_1_2(text: str) -> None:
    value = yaml12.load(f"key: {text}")["key"]
    assert value == VALUES[text]
    assert type(value) is type(VALUES[text])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("{a: " * 100_000, "nested too deeply"),
        ("9" * 5000, "4300 digits"),
        (f"0x{'f' * 6000}", "a number of 6,002 digits"),
        ("!!timestamp 2024-13-45", "month must be in"),
        ("!!int one", "invalid literal"),
    ],
)
def test_a_value_that_python_cannot_hold_is_no_yaml(text: str, words: str) -> None:
    with pytest.raises(yaml.YAMLError, match=words):
        yaml12.load(f"key: {text}")


@pytest.mark.parametrize("value", [*VALUES, 1e-5, 1e22, 7, True, None, "<<", "plain words"])
def test_what_is_written_is_read_back(value: object) -> None:
    """By readers of version 1.1 too."""
    text = yaml12.dump({"key": value})
    assert yaml12.load(text) == yaml.safe_load(text) == {"key": value}
