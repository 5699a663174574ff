"""Native code is loaded only if this user has exported it or says so."""

from pathlib import Path

import pytest

from infer.formats import ENGINE_FORMATS
from infer.trust import refuse_untrusted, remember, trust_file
from isic.runtime.errors import UserError

CODE = [name for name, row in ENGINE_FORMATS.items() if row.runs_code]


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def manifest(name: str, digest: str = "ab" * 32) -> dict[str, str]:
    return {"format": name, "sha256": digest}


def test_formats_of_native_code() -> None:
    assert CODE == ["aoti", "tensorrt", "tensorrt_rtx"]


@pytest.mark.parametrize("name", CODE)
def test_native_code_needs_trust_once(name: str) -> None:
    artifacts = {Path("model"): manifest(name)}
    with pytest.raises(UserError, match=r"model is native code for .* add --trust true"):
        refuse_untrusted(artifacts, trust=False)
    refuse_untrusted(artifacts, trust=True)
    refuse_untrusted(artifacts, trust=False)
    with pytest.raises(UserError):  # trust is in bytes, not in a name
        refuse_untrusted({Path("model"): manifest(name, "cd" * 32)}, trust=False)


def test_data_needs_none(state: Path) -> None:
    refuse_untrusted({Path("model"): manifest("onnx")}, trust=False)
    remember([manifest("onnx")])
    assert not state.exists()


def test_one_untrusted_artifact_of_several_is_enough() -> None:
    remember([manifest("aoti")])
    artifacts = {Path("a"): manifest("aoti"), Path("b"): manifest("aoti", "cd" * 32)}
    with pytest.raises(UserError, match=r"^b is native code"):
        refuse_untrusted(artifacts, trust=False)


def test_digests_are_written_once(state: Path) -> None:
    for _ in range(3):
        remember([manifest("aoti")])
    assert trust_file().read_text() == "ab" * 32 + "\n"


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"ab ab"])
def test_a_damaged_file_trusts_nothing(content: bytes) -> None:
    trust_file().parent.mkdir(parents=True)
    trust_file().write_bytes(content)
    with pytest.raises(UserError):
        refuse_untrusted({Path("model"): manifest("aoti")}, trust=False)


def test_a_user_without_a_writable_home_is_asked_again(state: Path) -> None:
    state.write_text("a file")
    refuse_untrusted({Path("model"): manifest("aoti")}, trust=True)
    with pytest.raises(UserError):
        refuse_untrusted({Path("model"): manifest("aoti")}, trust=False)
