"""The campaign `kills`: commands that are killed, are terminated or lose power, and then repeated."""

import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Literal

from benchmarks.faults.attempts import Attempt, Outcome
from benchmarks.faults.commands import COMMANDS, INPUTS, OUT, TinyCommand
from benchmarks.faults.operations import Strike, note_operations
from benchmarks.faults.outputs import broken_files, differences
from benchmarks.faults.power import file_states, lose_power
from benchmarks.faults.processes import Ended, Running, run
from benchmarks.faults.tiny import OPERATIONS, Tiny, fresh_folder

Kind = Literal["kill", "terminate", "power"]
KINDS: tuple[Kind, ...] = ("kill", "terminate", "power")
"""SIGKILL, SIGTERM, and SIGKILL with the loss of all that was not synchronised."""
READ = "read"
LIMIT = 60.0
"""Seconds that any run may take, besides many times those of the undisturbed one."""
SLOWER = 20.0
SECOND_SHARE = 0.3
"""Share of the attempts that kill a command twice."""
CLOCK_SHARE = 0.4
"""Share of the kills at a random time."""
READ_SHARE = 0.3
"""Share of the attempts in which another command reads the output of the killed one."""

SHORT = (
    *("train", "train_cached", "train_device", "embed", "fit", "blend", "predict", "bundle"),
    *("submit", "synth", "import", "folds", "check", "report", "explain", "triage"),
)
"""Commands that are a target per kind."""
LONG = (
    *("export", "train_in_two_processes", "embed_with_decoder_processes"),
    *("embed_in_two_processes", "embed_on_ray", "export_aoti"),
)
"""Commands that take half a minute, which share one target."""
LONG_TARGET = "long"


@dataclass(frozen=True)
class Kill:
    """The end of a run before its time."""

    kind: str
    seconds: float | None
    """Its moment by the clock, or else by the file operation before which it comes."""
    operation: int = 0

    def __str__(self) -> str:
        moment = f"before operation {self.operation}"
        if self.seconds is not None:
            moment = f"after {self.seconds:.2f} s"
        return f"{self.kind} {moment}"

    @property
    def number(self) -> signal.Signals:
        return signal.SIGTERM if self.kind == "terminate" else signal.SIGKILL


class KillsCampaign:
    """Kills of each command, at random moments, once or twice."""

    name = "kills"
    targets: Sequence[str] = (
        *(f"{command}-{kind}" for command in SHORT for kind in KINDS),
        LONG_TARGET,
    )

    def prepare(self, folder: Path) -> None:
        self._tiny = Tiny(folder)
        self._tiny.prepare(SHORT)

    def attempt(self, target: str, seed: int, folder: Path) -> Attempt:
        started = time.monotonic()
        random = Random(f"{target} {seed}")
        name, _, kind = target.partition("-")
        if target == LONG_TARGET:
            name = LONG[seed % len(LONG)]
            self._tiny.prepare([name])  # only now, because it takes long
        command = COMMANDS[name]
        facts = self._tiny.facts(name)
        kinds = (kind,) if kind else KINDS[:2] if command.launcher else KINDS
        kills = draw_kills(random, kinds, facts, can_count=not command.launcher)
        fresh_folder(folder, self._tiny.inputs, command)
        limit = LIMIT + SLOWER * facts["seconds"]
        expected = self._tiny.undisturbed(name) / OUT
        exposed = Exposed(command, folder, expected, limit, random)
        problem = exposed.expose(kills)
        detail = (
            f"{name}: {', then '.join(map(str, kills))}: {problem or 'the same bytes in the end'}"
        )
        outcome: Outcome = "failed" if problem else "survived"
        return Attempt(self.name, target, seed, outcome, detail, time.monotonic() - started)


def draw_kills(
    random: Random, kinds: Sequence[str], facts: dict[str, float], can_count: bool
) -> list[Kill]:
    """Draw one kill or two, by the clock or, if operations are counted, before one of them."""
    kills = []
    for _ in range(1 + (random.random() < SECOND_SHARE)):
        kind = random.choice(kinds)
        seconds = random.uniform(0, 1.05 * facts["seconds"])
        operation = random.randint(1, int(facts["operations"])) if can_count else 0
        # Most of a run's time passes without a file operation.
        by_clock = not can_count or random.random() < CLOCK_SHARE
        kills.append(Kill(kind, seconds if by_clock else None, operation))
    return kills


def _noting(folder: Path, strike: Strike | None = None) -> "partial[None]":
    return partial(note_operations, folder / OUT, folder / OPERATIONS, strike)


@dataclass
class Exposed:
    """A command whose runs are killed."""

    command: TinyCommand
    folder: Path
    expected: Path
    """The output of the undisturbed run."""
    limit: float
    """Seconds that a run may take."""
    random: Random

    @property
    def out(self) -> Path:
        return self.folder / OUT

    def expose(self, kills: Sequence[Kill]) -> str | None:
        """Run the command with kills, then to its end. Return the fault, None if there is none."""
        for kill in kills:
            ended, survivors = self._run_killed(kill)
            if survivors:
                return f"{len(survivors)} processes outlive the command"
            problem = self._judge_state(ended, kill)
            if problem or ended.code == 0:
                return problem or self._compare("after an undisturbed end")
        ended = run(self.command, self.folder, self.limit)
        # A command that was killed after its last step may refuse to do it again.
        done = ended.code == 0 or (ended.is_refusal and not differences(self.out, self.expected))
        if not done:
            return f"the same command again: {ended}"
        return self._compare("in the end")

    def _run_killed(self, kill: Kill) -> tuple[Ended, list[int]]:
        place = self.folder / OPERATIONS
        shutil.rmtree(place, ignore_errors=True)
        before = file_states(self.out)
        strike = Strike(kill.operation, kill.number) if kill.seconds is None else None
        hooks = [] if self.command.launcher else [_noting(self.folder, strike)]
        running = Running(self.command, self.folder, hooks)
        if kill.seconds is not None:
            running.wait(kill.seconds)
            running.signal(kill.number)
        running.wait(self.limit)
        survivors = running.survivors()
        ended = running.end(self.limit)
        if kill.kind == "power":
            lose_power(self.out, place, before, self.random)
        return ended, survivors

    def _judge_state(self, ended: Ended, kill: Kill) -> str | None:
        """Return the fault after a kill, None if there is none."""
        if ended.code is None:
            return "the command did not end"
        is_usual = ended.code in {0, -kill.number, 128 + kill.number} and not ended.has_traceback
        # torchrun itself ends with a traceback.
        if not is_usual and not self.command.launcher.startswith("torch"):
            return f"the killed command: {ended}"
        broken = broken_files(self.out)
        if broken:
            return f"after the kill: {', '.join(broken)}"
        return self._read() if self.random.random() < READ_SHARE else None

    def _read(self) -> str | None:
        """Run a command that reads the output. It may refuse."""
        if not self.command.reader:
            return None
        folder = self.folder / READ
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.out, folder / OUT)
        (folder / INPUTS).symlink_to((self.folder / INPUTS).resolve())
        reader = TinyCommand(self.command.reader)
        ended = run(reader, folder, self.limit)
        if ended.code == 0 or ended.is_refusal:
            return None
        return f"`{self.command.reader}`: {ended}"

    def _compare(self, moment: str) -> str | None:
        found = differences(self.out, self.expected)
        return f"{moment}: {', '.join(found[:5])}" if found else None
