"""The campaign `resources`: commands that lack disk, memory, files or time, or share their folder."""

import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random

from benchmarks.faults.attempts import Attempt, Outcome
from benchmarks.faults.commands import COMMANDS, INPUTS, OUT, TinyCommand
from benchmarks.faults.mounts import can_mount, enter_mounts, mounted, read_only, resize
from benchmarks.faults.operations import Strike, note_operations
from benchmarks.faults.outputs import broken_files, differences, files_of
from benchmarks.faults.processes import Before, Ended, Running, run
from benchmarks.faults.tiny import Tiny, fresh_folder
from isic.runtime.machine import cores

SHM = Path("/dev/shm")
SHM_BYTES = 64 * 2**20
PLENTY = 2**30
"""Bytes of a disk that is no longer full."""
MAX_FILES = 256
MEMORY_BYTES = 2**30
"""Bytes that a command may take in addition to those of its imports."""
TEN_DAYS = 864_000.0
DATA = "data"
ODD_NAME = "a folder, märz 'übung' 病変 $HOME"
BLOCKER = "a file in place of the folder"


@dataclass
class Setting:
    """The circumstances of a run; a condition changes them."""

    command: TinyCommand
    folder: Path
    random: Random
    expected: Path
    """The output of the undisturbed run."""
    facts: Mapping[str, float]
    """Seconds and file operations of the undisturbed run."""
    always: Sequence[Before] = ()
    """Called in every process, also in one without a fault."""
    before: list[Before] = field(default_factory=list)
    env: dict[str, str | None] = field(default_factory=dict)
    note: str = ""
    """The fault in numbers."""
    others: list[Running] = field(default_factory=list)
    """Runs at the same time."""
    lift: Callable[[], object] = tuple
    """Ends the fault, so that the command can be repeated."""
    others_expected: Callable[[], Path] | None = None
    """Makes another output that is as right as the undisturbed one."""
    during: tuple[float, Callable[[], object]] | None = None
    """Seconds after the start, and what happens then."""

    @property
    def out(self) -> Path:
        return self.folder / OUT

    @property
    def output_bytes(self) -> int:
        """Bytes that the command writes, about."""
        sizes = [path.stat().st_size for path in files_of(self.expected).values()]
        return sum(sizes) - sum(path.stat().st_size for path in files_of(self.out).values())

    @property
    def limit(self) -> float:
        return 60 + 20 * self.facts["seconds"]

    def start(self, name: str = "run") -> Running:
        """Start the command in these circumstances."""
        before = [] if self.command.launcher else [*self.always, *self.before]
        return Running(self.command, self.folder, before, self.env, name)

    def run(self) -> Ended:
        """Run the command in these circumstances."""
        running = self.start()
        if self.during:
            seconds, act = self.during
            running.wait(seconds)
            act()
        return running.end(self.limit)

    def run_plain(self) -> Ended:
        """Run the command again, without a fault."""
        before = [] if self.command.launcher else self.always
        return run(self.command, self.folder, self.limit, before)


Condition = Callable[[Setting], AbstractContextManager[None]]


@contextmanager
def full_disk(setting: Setting) -> Iterator[None]:
    with mounted(setting.out, PLENTY):
        setting.command.copy_inputs(setting.folder)
        free = int(setting.random.uniform(0, 1.2) * setting.output_bytes)
        setting.note = f"{free} bytes free"
        resize(setting.out, _used_bytes(setting.out) + free)
        setting.lift = partial(resize, setting.out, PLENTY)
        yield


def _used_bytes(folder: Path) -> int:
    found = os.statvfs(folder)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


@contextmanager
def large_files_refused(setting: Setting) -> Iterator[None]:
    largest = max(path.stat().st_size for path in files_of(setting.expected).values())
    limit = int(setting.random.uniform(0, 1.2) * largest)
    setting.note = f"files of {limit} bytes at most"
    setting.before.append(partial(limit_resource, resource.RLIMIT_FSIZE, limit))
    yield


def limit_resource(number: int, limit: int) -> None:
    resource.setrlimit(number, (limit, limit))


@contextmanager
def read_only_folder(setting: Setting) -> Iterator[None]:
    with read_only(setting.out) as lift:
        setting.lift = lift
        yield


@contextmanager
def file_for_folder(setting: Setting) -> Iterator[None]:
    shutil.rmtree(setting.out)
    setting.out.write_text(BLOCKER)
    setting.lift = partial(_replace_by_folder, setting)
    yield


def _replace_by_folder(setting: Setting) -> None:
    setting.out.unlink()
    setting.out.mkdir()
    setting.command.copy_inputs(setting.folder)


@contextmanager
def no_home(setting: Setting) -> Iterator[None]:
    setting.env |= {"HOME": None, "ISIC_CACHE_DIR": None, "XDG_CACHE_HOME": None}
    yield


@contextmanager
def missing_home(setting: Setting) -> Iterator[None]:
    setting.env |= {"HOME": "/nonexistent/home", "ISIC_CACHE_DIR": None, "XDG_CACHE_HOME": None}
    yield


@contextmanager
def small_shared_memory(setting: Setting) -> Iterator[None]:
    with mounted(SHM, SHM_BYTES):
        yield


@contextmanager
def few_files(setting: Setting) -> Iterator[None]:
    setting.before.append(partial(limit_resource, resource.RLIMIT_NOFILE, MAX_FILES))
    yield


@contextmanager
def one_core(setting: Setting) -> Iterator[None]:
    setting.before.append(partial(os.sched_setaffinity, 0, cores()[:1]))
    yield


@contextmanager
def little_memory(setting: Setting) -> Iterator[None]:
    setting.before.append(partial(limit_memory, MEMORY_BYTES))
    yield


def limit_memory(more: int) -> None:
    """Limit the memory of this process to its present size plus `more` bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    limit_resource(resource.RLIMIT_DATA, pages * resource.getpagesize() + more)


@contextmanager
def clock_set_back(setting: Setting) -> Iterator[None]:
    """Kill a run, and date its files ten days later than the next run."""
    operation = setting.random.randint(1, int(setting.facts["operations"]))
    setting.note = f"killed before operation {operation}"
    hook = partial(
        note_operations, setting.out, setting.folder / "operations", Strike(operation, 9)
    )
    setting.before.append(hook)
    setting.run()
    setting.before.remove(hook)
    later = time.time() + TEN_DAYS
    for path in setting.folder.rglob("*"):
        os.utime(path, (later, later), follow_symlinks=False)
    yield


@contextmanager
def c_locale(setting: Setting) -> Iterator[None]:
    setting.command = replace(setting.command, launcher="-")
    setting.env |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    yield


@contextmanager
def odd_path(setting: Setting) -> Iterator[None]:
    odd = setting.folder / ODD_NAME
    odd.mkdir()
    fresh_folder(odd, setting.folder / INPUTS, setting.command)
    setting.folder = odd
    yield


@contextmanager
def two_at_once(setting: Setting) -> Iterator[None]:
    delay = setting.random.uniform(0, setting.facts["seconds"])
    setting.note = f"another run began {delay:.2f} s before"
    other = setting.start("other")
    setting.others.append(other)
    other.wait(delay)
    yield


@contextmanager
def tables_replaced(setting: Setting) -> Iterator[None]:
    """Replace the tables by shorter ones during the run, and expect the result of either."""
    inputs = setting.folder / INPUTS
    prepared = inputs.resolve()
    inputs.unlink()
    inputs.mkdir()
    for path in prepared.iterdir():
        if path.name != DATA:
            (inputs / path.name).symlink_to(path)
    shutil.copytree(prepared / DATA, inputs / DATA)
    delay = setting.random.uniform(0, setting.facts["seconds"])
    setting.note = f"tables replaced after {delay:.2f} s"
    setting.during = (delay, partial(shorten_tables, inputs / DATA))
    setting.others_expected = partial(_result_of_shorter, setting)
    yield


def shorten_tables(data: Path) -> None:
    """Replace each table of a dataset by one without its last row, in one step."""
    for name in ("train-metadata.csv", "test-metadata.csv", "sample_submission.csv"):
        lines = (data / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (data / "new").write_text("".join(lines[:-1]), encoding="utf-8")
        (data / "new").replace(data / name)


def _result_of_shorter(setting: Setting) -> Path:
    """Run the command on the shorter tables alone. Return its output."""
    folder = setting.folder / "shorter"
    folder.mkdir()
    fresh_folder(folder, setting.folder / INPUTS, setting.command)
    run(setting.command, folder, setting.limit, setting.always)
    return folder / OUT


CONDITIONS: Mapping[str, Condition] = {
    "full_disk": full_disk,
    "large_files_refused": large_files_refused,
    "read_only_folder": read_only_folder,
    "file_for_folder": file_for_folder,
    "no_home": no_home,
    "missing_home": missing_home,
    "small_shared_memory": small_shared_memory,
    "few_files": few_files,
    "one_core": one_core,
    "little_memory": little_memory,
    "clock_set_back": clock_set_back,
    "c_locale": c_locale,
    "odd_path": odd_path,
    "two_at_once": two_at_once,
    "tables_replaced": tables_replaced,
}
MOUNTED = {"full_disk", "read_only_folder", "small_shared_memory"}
"""Conditions that need a file system of their own, for which a process must be root."""
EXPOSED = (
    *("train", "export", "embed", "fit", "blend", "predict", "bundle", "submit"),
    *("synth", "import", "folds", "check", "report", "explain", "triage"),
)


class ResourcesCampaign:
    """Each condition, to which the commands are exposed in turns of the seeds."""

    name = "resources"

    @property
    def targets(self) -> Sequence[str]:
        return [name for name in CONDITIONS if name not in MOUNTED or can_mount()]

    def prepare(self, folder: Path) -> None:
        can_mount()
        self._tiny = Tiny(folder)
        self._tiny.prepare(EXPOSED)

    def attempt(self, target: str, seed: int, folder: Path) -> Attempt:
        started = time.monotonic()
        turn, number = divmod(seed, len(EXPOSED))
        name = EXPOSED[number]
        undisturbed = self._tiny.undisturbed(name)
        fresh_folder(folder, self._tiny.inputs, COMMANDS[name])
        always = [partial(enter_mounts, os.getpid())] if can_mount() else []
        random = Random(f"{name}-{target} {turn}")
        expected, facts = undisturbed / OUT, self._tiny.facts(name)
        setting = Setting(COMMANDS[name], folder, random, expected, facts, always)
        outcome, detail = expose(setting, target)
        detail = ": ".join(filter(None, (name, setting.note, detail)))
        return Attempt(self.name, target, seed, outcome, detail, time.monotonic() - started)


def expose(setting: Setting, condition: str) -> tuple[Outcome, str]:
    """Run a command in a condition. Return the outcome and its reason."""
    with CONDITIONS[condition](setting):
        runs = [setting.run(), *(other.end(setting.limit) for other in setting.others)]
        for ended in runs:
            if ended.code != 0 and not ended.is_refusal:
                return "failed", str(ended)
        if not all(ended.is_refusal for ended in runs):
            found = differences(setting.out, setting.expected)
            if found and setting.others_expected:
                # Each file may be of the tables before or after, but not of both.
                others = differences(setting.out, setting.others_expected())
                found = sorted({*found} & {*others})
            reason = ", ".join(found[:5]) or "the same bytes"
            return ("failed" if found else "survived"), reason
        return _judge_refusal(setting, runs[0])


def _judge_refusal(setting: Setting, ended: Ended) -> tuple[Outcome, str]:
    broken = broken_files(setting.out)
    if broken:
        return "failed", f"{ended.last_line}; {', '.join(broken)}"
    if setting.others_expected:  # the tables are no longer those of the undisturbed run
        return "refused", ended.last_line
    setting.lift()
    again = setting.run_plain()
    found = differences(setting.out, setting.expected)
    if again.code and (found or not again.is_refusal):
        return "failed", f"{ended.last_line}; the same command without the fault: {again}"
    if found:
        return "failed", f"{ended.last_line}; without the fault: {', '.join(found[:5])}"
    return "refused", ended.last_line
