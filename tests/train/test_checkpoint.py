import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from isic.layout import LAST_CHECKPOINT
from isic.runtime.errors import UserError
from tests.support.datasets import small_disk
from train.checkpoint import CHECKPOINT_KEYS, load_checkpoint, save_checkpoint

VALUES: dict[str, Any] = {
    "model_state_dict": {},
    "optimizer_state_dict": {},
    "best_pauc": float("-inf"),
    "epoch": 1,
    "config": {},
    "args": {},
}
"""The least that a checkpoint holds."""


def test_a_full_disk_leaves_the_last_checkpoint_readable(tmp_path: Path) -> None:
    path = tmp_path / "disk" / LAST_CHECKPOINT
    with small_disk(path.parent, "1m"):
        save_checkpoint(path, **VALUES, weights=torch.ones(100_000))
        with pytest.raises(UserError, match=r"the disk is full, so .*last\.pth was not written"):
            save_checkpoint(path, **VALUES, weights=torch.zeros(400_000))
        assert load_checkpoint(path)["weights"].sum() == 100_000
        assert list(path.parent.iterdir()) == [path]


class Malicious:
    """An object that runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("executed",))


def test_a_checkpoint_that_holds_code_is_refused_unexecuted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model_state_dict": Malicious()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="more than tensors and plain values"):
        load_checkpoint(tmp_path / "evil.pth")
    assert "executed" not in capsys.readouterr().out


def test_a_checkpoint_of_something_else_or_cut_short_is_refused(tmp_path: Path) -> None:
    torch.save({"state": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(
        UserError, match="is not a checkpoint of this toolkit: it lacks model_state_dict"
    ):
        load_checkpoint(tmp_path / "other.pth")
    save_checkpoint(tmp_path / "cut.pth", **dict.fromkeys(CHECKPOINT_KEYS, torch.zeros(1000)))
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:-700])
    with pytest.raises(UserError, match="is damaged"):
        load_checkpoint(tmp_path / "cut.pth")
    for content in (b"", b"hello\nworld", b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(100)):
        (tmp_path / "cut.pth").write_bytes(content)
        with pytest.raises(UserError, match=r"is damaged|is not loaded"):
            load_checkpoint(tmp_path / "cut.pth")
    with pytest.raises(UserError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "none.pth")


@pytest.mark.parametrize("key", CHECKPOINT_KEYS)
@pytest.mark.parametrize("value", [torch.zeros(2), "x", [1], -1, {1: 2}])
def test_an_entry_of_another_type_is_refused_or_of_no_effect(
    key: str, value: object, tmp_path: Path
) -> None:
    path = tmp_path / "a.pth"
    save_checkpoint(path, **VALUES)
    assert load_checkpoint(path) == VALUES
    save_checkpoint(path, **{**VALUES, key: value})
    if key == "best_pauc" and isinstance(value, int):
        assert load_checkpoint(path)[key] == value
        return
    with pytest.raises(UserError, match=rf"a\.pth is damaged \({key}.*; train this fold again"):
        load_checkpoint(path)


def test_warnings_of_torch_on_a_damaged_file_are_not_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"a": Malicious()}, protocol=4))
    with pytest.raises(UserError, match="more than tensors"):
        load_checkpoint(tmp_path / "a.pth")
    assert not recwarn.list
    assert capsys.readouterr() == ("", "")


def test_equal_values_give_equal_bytes(tmp_path: Path) -> None:
    """A run that is resumed has loaded its optimizer, with other objects of equal content."""
    weights = torch.nn.Linear(2, 2)
    groups = [{"params": [part], "name": "head"} for part in weights.parameters()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
    files = []
    for number in range(3):
        path = tmp_path / str(number)
        save_checkpoint(
            path,
            model_state_dict=weights.state_dict(),
            optimizer_state_dict=optimizer.state_dict(),
            best_pauc=0.1,
            epoch=1,
            config={"name": "head"},
            args={"name": "head", "model": "vit"},
        )
        optimizer.load_state_dict(load_checkpoint(path)["optimizer_state_dict"])
        files.append(path.read_bytes())
    assert files[0] == files[1] == files[2]
