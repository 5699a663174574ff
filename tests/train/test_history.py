import json
from pathlib import Path

import pytest

from isic.runtime.errors import UserError
from tests.support.commands import TINY, Cli
from train.history import EpochStats, Validation, last_epoch, log_epoch, read_history
from train.optim import BACKBONE, HEAD


def test_an_empty_history_has_no_last_epoch(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").touch()
    assert last_epoch(read_history(tmp_path / "history.jsonl")) == 0


@pytest.mark.parametrize("text", ["half\n", "[1]\n", '{"loss": 1}\n'])
def test_a_file_that_is_no_history_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "history.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"history\.jsonl"):
        read_history(tmp_path / "history.jsonl")


def test_the_history_holds_the_rate_of_every_group(
    small_dataset: Path, tmp_path: Path, cli: Cli
) -> None:
    flags = ["--data", small_dataset, "--output_dir", tmp_path, "--fold", 0, "--batch_size", 8]
    rates = ["--epochs", 4, "--freeze_epochs", 2, "--lr", 0.01, "--lr_backbone", 0.001]
    assert cli("train", *TINY, *flags, *rates, "--layer_decay", 0.9).code == 0
    lines = (tmp_path / "tiny" / "fold_0" / "history.jsonl").read_text().splitlines()
    history = [json.loads(line) for line in lines]
    head = [entry[f"lr_{HEAD}"] for entry in history]
    # A patch embedding and six blocks; the last layer has the backbone's own rate.
    names = [f"lr_{BACKBONE}_layer_{number}" for number in range(7)]
    assert [key for key in history[0] if key.startswith("lr_")] == [*names, f"lr_{HEAD}"]
    last = [entry[names[-1]] for entry in history]
    assert head[0] == 0.01
    assert head[1:] == sorted(head[1:], reverse=True)
    assert last[:2] == [0, 0]
    assert last[2:] == pytest.approx([rate / 10 for rate in head[2:]])
    for entry in history:
        rates = [entry[name] for name in names]
        assert rates[:-1] == pytest.approx([0.9 * rate for rate in rates[1:]])


def test_a_backbone_without_layer_decay_has_one_rate(trained: Path) -> None:
    (entry,) = read_history(trained / "fold_0" / "history.jsonl")
    assert [key for key in entry if key.startswith("lr_")] == [f"lr_{BACKBONE}", f"lr_{HEAD}"]


@pytest.mark.parametrize(("num_rows", "validated"), [(2_080, "subset"), (80_212, "all")])
def test_scores_of_a_subset_are_marked(
    num_rows: int, validated: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stats = EpochStats([0.5], num_images=8, seconds=1.0)
    scores = {"pauc": 0.15, "auc": 0.9, "auc.mel": 0.8}
    validation = Validation(scores, num_rows, 80_212)
    log_epoch(tmp_path, 0, 1, 3, stats, validation, {})
    (entry,) = read_history(tmp_path / "history.jsonl")
    assert entry["validated"] == validated
    assert entry["validated_rows"] == num_rows
    printed = capsys.readouterr().out
    assert "pAUC 0.1500, AUC 0.9000, AUC of mel 0.8000, " in printed
    assert ("on 2,080 of 80,212 rows" in printed) == (validated == "subset")
    events = [path.read_bytes() for path in (tmp_path / "tensorboard").glob("*")]
    assert all((b"pauc_subset" in event) == (validated == "subset") for event in events)
