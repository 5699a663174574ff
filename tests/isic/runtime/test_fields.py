"""Fields of JSON files are checked before they are used."""

import json
from pathlib import Path
from typing import Any

import pytest

from isic.runtime.errors import UserError
from isic.runtime.fields import Count, Fields, FileName, Share, read_fields
from isic.runtime.files import write_json


class Example(Fields):
    count: Count
    share: Share
    name: FileName
    parts: dict[str, int]


VALID: dict[str, Any] = {"count": 2, "share": 0.5, "name": "a.txt", "parts": {"a": 1}, "more": []}


def read(path: Path, value: dict[str, Any]) -> dict[str, Any]:
    path.write_text(json.dumps(value))
    return read_fields(path, Example, "make it again")


def test_valid_fields_and_others_are_returned_as_they_are(tmp_path: Path) -> None:
    assert read(tmp_path / "a.json", VALID) == VALID


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"count": "2"}, "count"),
        ({"count": True}, "count"),
        ({"count": 0}, "count"),
        ({"count": 10**30}, "count"),
        ({"share": float("nan")}, "share"),
        ({"share": float("inf")}, "share"),
        ({"share": -0.1}, "share"),
        ({"name": "a\0b"}, "name"),
        ({"name": ""}, "name"),
        ({"name": None}, "name"),
        ({"parts": [1]}, "parts"),
        ({"parts": {"a": "1"}}, "parts.a"),
    ],
)
def test_a_wrong_field_is_named(changed: dict[str, Any], key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"a\.json is damaged \({key}: .*\); make it again"):
        read(tmp_path / "a.json", VALID | changed)


@pytest.mark.parametrize("key", Example.model_fields)
def test_a_missing_field_is_named(key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{key}: Field required"):
        read(tmp_path / "a.json", {name: VALID[name] for name in VALID if name != key})


def test_a_long_key_is_cut(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path / "a.json", VALID | {"parts": {"x" * 100_000: None}})
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        (f'{{"a": {"9" * 5000}}}', "4300 digits"),
        ("{'a': 1}", "property name"),
        ("", "Expecting value"),
    ],
)
def test_a_text_that_is_no_json_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=rf"a\.json is not valid JSON \(.*{words}"):
        read_fields(tmp_path / "a.json", Example, "make it again")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", VALID)
    assert read_fields(tmp_path / "a.json", Example, "make it again") == VALID
