"""Choices on the rows that a score is reported on are noted wherever the score is shown."""

import shutil
from pathlib import Path

import polars as pl
import pytest

from infer.ensemble.artifact import open_ensemble
from infer.ensemble.blends.write import write_blend
from infer.ensemble.scoring.chosen import (
    CHOSEN_KEY,
    choice_notes,
    choices_of_blend,
    choices_of_lists,
    selected_on,
)
from infer.ensemble.settings import BlendSettings
from isic.runtime.files import read_json, write_json
from tests.support.commands import Cli
from tests.support.ensembles import fit_small, train_table, write_train

NOTE = "note: final: the weights were searched on these rows"


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chosen")
    for name, features in (("a", "numeric"), ("b", "raw"), ("poor", "tbp_lv_x")):
        fit_small(data, root, features=features, name=name, num_rounds=4, seeds=2)
    shutil.copytree(root / "a", root / "copy_of_a")
    return root


@pytest.mark.parametrize(
    ("weights", "other", "searched"),
    [("search", "poor", True), ("search", "copy_of_a", False), ("equal", "b", False)],
)
def test_searched_weights_are_noted(
    folder: Path, data: Path, weights: str, other: str, searched: bool, cli: Cli
) -> None:
    """A search between equal ensembles is rejected."""
    flags = ["--data", data, "--output_dir", folder, "--name", "final", "--force"]
    ended = cli("infer", "blend", folder / "a", folder / other, f"--weights={weights}", *flags)
    assert ended.code == 0, ended.err
    assert ("accepted" in ended.out) == searched
    assert (NOTE in ended.out) == searched
    for command in (
        ["scores", "--output_dir", folder],
        ["compare", folder / "a", folder / "final", "--data", data, "--draws", 100],
    ):
        assert (NOTE in cli("infer", *command).out) == searched
    page = (folder / "final" / "report.html").read_text()
    assert ("But the weights were searched on these rows" in page) == searched


def test_a_blend_inherits_the_choices_of_its_members(folder: Path, data: Path) -> None:
    manifest = folder / "a" / "ensemble.json"
    before = read_json(manifest)
    selected = "the features were selected on these rows"
    write_json(manifest, {**before, CHOSEN_KEY: [selected]})
    settings = BlendSettings(
        ensembles=(folder / "a", folder / "b"), output_dir=folder, name="both", data=data
    )
    root = write_blend(settings)
    write_json(manifest, before)
    chosen = read_json(root / "ensemble.json")
    assert choice_notes("both", chosen) == [f"note: both: {selected}, so its score may be too high"]
    assert choices_of_blend(True, [chosen, chosen])[1:] == [selected]


def test_features_that_were_selected_on_the_same_rows_are_noted(
    data: Path, tmp_path: Path, cli: Cli
) -> None:
    chosen = tmp_path / "chosen.txt"
    small = ["--features", "numeric", "--by", "gain", "--repeats", 1, "--seeds", 1]
    selected = [*small, "--num_features", 4, "--num_rounds", 4, "--num_folds", 3]
    ended = cli("infer", "select", "--data", data, "--output", chosen, *selected)
    assert ended.code == 0, ended.err
    others = write_train(tmp_path / "others", train_table(data).sample(300, seed=1))
    by_hand = tmp_path / "by_hand.txt"
    by_hand.write_text("tbp_lv_H\n")
    copied = Path(shutil.copyfile(chosen, tmp_path / "copied.txt"))
    reordered = write_train(tmp_path / "reordered", train_table(data).reverse())
    for rows, words, is_noted in (
        (data, chosen, True),
        (data, copied, True),
        (reordered, chosen, True),
        (others, chosen, False),
        (data, by_hand, False),
    ):
        note = f"the features of @{words} were selected on these rows, so its score may be too high"
        flags = ["--output_dir", tmp_path / "out", "--name", "it", "--num_rounds", 4, "--force"]
        ended = cli("infer", "fit", "--data", rows, "--features", f"@{words}", *flags)
        assert ended.code == 0, ended.err
        assert (f"note: it: {note}" in ended.out) == is_noted
        assert (note in cli("infer", "scores", "--output_dir", tmp_path / "out").out) == is_noted


def test_lists_of_earlier_versions_and_of_other_targets(data: Path, tmp_path: Path) -> None:
    rows = train_table(data)
    chosen = tmp_path / "chosen.txt"
    chosen.write_text(f"# {selected_on(rows)}\nsex\n")
    assert choices_of_lists([f"@{chosen}"], rows, "this")
    others = rows.with_columns(target=1 - pl.col("target"))
    assert not choices_of_lists([f"@{chosen}"], others, "other")
    chosen.write_text("sex\n")
    write_json(tmp_path / "chosen.txt.json", {"by": "gain", "metadata_sha256": "this"})
    assert choices_of_lists([f"@{chosen}"], rows, "this")
    assert not choices_of_lists([f"@{chosen}"], rows, "other")


def test_a_manifest_without_choices_has_no_notes(folder: Path) -> None:
    assert choice_notes("a", open_ensemble(folder / "a").manifest) == []
