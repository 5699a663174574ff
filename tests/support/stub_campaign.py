"""A campaign without files: the outcome of an attempt follows from its target and seed."""

import os
import time
from pathlib import Path

from benchmarks.faults.attempts import Attempt, Outcome

SOURCE = "tests.support.stub_campaign:StubCampaign"
SECOND_SOURCE = "tests.support.stub_campaign:SecondStubCampaign"
OUTCOME: dict[int, Outcome] = {0: "survived", 1: "refused", 2: "failed"}
"""Outcome by the seed's remainder of a division by three."""

served: set[str] = set()
"""Campaigns that this process has served."""


class StubCampaign:
    """Two quick targets, one whose worker dies, one that raises, and one that never ends."""

    name = "stub"
    targets = ("first", "second", "killer", "raiser", "sleeper")

    def prepare(self, folder: Path) -> None:
        assert folder.is_absolute()
        with open(folder / "prepared", "a") as file:
            file.write("once\n")

    def attempt(self, target: str, seed: int, folder: Path) -> Attempt:
        served.add(self.name)
        assert served == {self.name}
        assert folder.is_dir()
        assert folder.is_absolute()
        assert not list(folder.iterdir())
        (folder / "left").touch()
        if target == "killer":
            os._exit(9)
        if target == "raiser":
            raise LookupError("no such thing")
        if target == "sleeper":
            time.sleep(600)
        return Attempt(self.name, target, seed, OUTCOME[seed % 3], "as planned", 0.5)


class SecondStubCampaign(StubCampaign):
    name = "second_stub"
