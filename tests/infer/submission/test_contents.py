"""The checks of a bundle's files read no more than they need."""

from pathlib import Path

import pytest

from infer.submission import contents
from infer.submission.contents import Bundle


def test_each_manifest_is_digested_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("listed.json", "other.json"):
        (tmp_path / name).touch()

    def sha256(path: Path) -> str:
        digested.append(path.name)
        return "its digest"

    digested: list[str] = []
    monkeypatch.setattr(contents, "sha256", sha256)
    Bundle(tmp_path, {"files": {"listed.json": "its digest"}}).refuse_changed(tmp_path)
    assert digested == ["listed.json"]
