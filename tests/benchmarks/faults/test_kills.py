"""Commands that are killed or lack something, on a few of each, and faults that must be noticed."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.faults import kills, resources
from benchmarks.faults.attempts import Attempt, Campaign
from benchmarks.faults.commands import COMMANDS, FIT, OUT, TinyCommand
from benchmarks.faults.kills import KINDS, KillsCampaign
from benchmarks.faults.resources import CONDITIONS, MOUNTED, ResourcesCampaign

FIT_TABLES = TinyCommand(f"{FIT} --features raw --output_dir {OUT}")
NAMES = ("train", "import", "fit_tables", "careless_import")
REFUSED = {"large_files_refused", "file_for_folder", "tables_replaced"}
SURVIVED = {"no_home", "few_files", "one_core", "clock_set_back", "odd_path", "two_at_once"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the inputs and the undisturbed results of a few commands."""
    # An import that writes as the others, but without fsync.
    careless = {"isic.runtime.files:sync": id}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(COMMANDS, "fit_tables", FIT_TABLES)
        patch.setitem(COMMANDS, "careless_import", replace(COMMANDS["import"], constants=careless))
        patch.setattr(kills, "SHORT", NAMES)
        patch.setattr(kills, "LONG", ())
        patch.setattr(resources, "EXPOSED", NAMES)
        patch.setattr(resources, "can_mount", lambda: False)  # would change this process's mounts
        yield tmp_path_factory.mktemp("faults")


def expose(campaign: Campaign, target: str, seeds: range, folder: Path) -> list[Attempt]:
    campaign.prepare(folder)
    attempts = []
    for seed in seeds:
        scratch = folder / "scratch"
        scratch.mkdir()
        attempts.append(campaign.attempt(target, seed, scratch))
        shutil.rmtree(scratch)
    return attempts


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["train", "import", "fit_tables"])
def test_a_killed_command_ends_with_the_same_bytes(name: str, kind: str, folder: Path) -> None:
    seeds = range(2 if name == "import" else 1)
    for attempt in expose(KillsCampaign(), f"{name}-{kind}", seeds, folder):
        assert attempt.outcome == "survived", attempt


@pytest.mark.slow
def test_files_that_a_loss_of_power_damages_are_noticed(folder: Path) -> None:
    attempts = expose(KillsCampaign(), "careless_import-power", range(6), folder)
    assert "failed" in [attempt.outcome for attempt in attempts]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "condition"),
    [
        *(("import", condition) for condition in sorted(REFUSED | SURVIVED)),
        *(("fit_tables", condition) for condition in ("tables_replaced", "two_at_once")),
    ],
)
def test_a_command_without_a_resource_refuses_or_succeeds(
    name: str, condition: str, folder: Path
) -> None:
    seed = NAMES.index(name)
    (attempt,) = expose(ResourcesCampaign(), condition, range(seed, seed + 1), folder)
    allowed = {"survived"} if condition in SURVIVED else {"survived", "refused"}
    assert attempt.outcome in allowed, attempt


def test_every_condition_is_in_the_test_or_needs_root() -> None:
    others = {"missing_home", "small_shared_memory", "little_memory", "c_locale"}
    assert REFUSED | SURVIVED | MOUNTED | others == set(CONDITIONS)
