"""Commands in processes that are forked from one with all imports, or started anew."""

import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

from benchmarks.faults.commands import TinyCommand
from isic.runtime.cli import Command
from isic.runtime.toolkit import commands_of

PACKAGES = ("isic", "train", "export", "infer")
LAZY = ("lightgbm", "onnx", "onnxruntime", "onnxscript", "torch.onnx", "torch._dynamo")
"""Modules that commands import when they need them."""
CACHE = "cache"
POLL = 0.002
"""Seconds between two looks at a process."""
# Agents of a cluster that Ray has started end a minute after it (seen with Ray 2.60).
GRACE = 90.0
"""Seconds that the descendants of a killed process may take to end."""
MARK = "ISIC_FAULTS_ATTEMPT"
"""Environment variable by which the descendants of a new interpreter are found."""

COMMON = {
    # Before Python 3.13 the fork server does not get sys.path.
    "PYTHONPATH": os.pathsep.join(str(Path(path).absolute()) for path in sys.path if path),
    "OMP_NUM_THREADS": "1",
}
"""Environment variables of all commands."""

Before = Callable[[], None]
"""Called in the new process before its command; can be pickled."""


@dataclass(frozen=True)
class Ended:
    """An ended command."""

    code: int | None
    """Exit code, the negative number of the signal that ended it, None if it took too long."""
    err: str
    seconds: float

    @property
    def is_refusal(self) -> bool:
        """Whether it ended as for bad input: code 2 and one sentence."""
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        return self.code == 2 and len(errors) == 1 and not self.has_traceback

    @property
    def has_traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.err

    @property
    def last_line(self) -> str:
        lines = self.err.strip().splitlines()
        return lines[-1][:300] if lines else ""

    def __str__(self) -> str:
        return f"code {self.code}, {self.last_line or 'no message'}"


def command_modules() -> list[str]:
    """Return the modules of all commands: their imports take most of the time of a short run."""
    found: dict[str, None] = {}
    for package in PACKAGES:
        commands = commands_of(package)
        for command in [commands] if isinstance(commands, Command) else commands.values():
            for name in (command.settings, command.function):
                found[name.partition(":")[0]] = None
    return list(found)


class Running:
    """A started command."""

    def __init__(
        self,
        command: TinyCommand,
        folder: Path,
        before: Sequence[Before] = (),
        env: Mapping[str, str | None] | None = None,
        name: str = "run",
    ) -> None:
        """Start it.

        Args:
            folder: the working directory.
            env: changed environment variables; None removes one.
            name: of the files with its output.
        """
        self.folder = folder
        self._process: BaseProcess | subprocess.Popen[bytes]
        self._logs = (folder / f"{name}.out", folder / f"{name}.err")
        self._started = time.monotonic()
        changed = {"ISIC_CACHE_DIR": str(folder / CACHE), "HF_HUB_OFFLINE": "1", **(env or {})}
        if command.launcher:
            assert not before, "only a forked process can do something before its command"
            self._process = self._launch(command, changed)
        else:
            self._process = self._fork(command, before, changed)
        self.pid = self._process.pid or 0

    def _fork(
        self, command: TinyCommand, before: Sequence[Before], env: Mapping[str, str | None]
    ) -> BaseProcess:
        context = get_context("forkserver")
        context.set_forkserver_preload([__name__, *command_modules(), *LAZY])
        arguments = (command, self.folder, self._logs, before, env)
        process = context.Process(target=_run_forked, args=arguments)
        with _environment(COMMON):  # that of the fork server, which the first one starts
            process.start()
        return process

    def _launch(
        self, command: TinyCommand, env: Mapping[str, str | None]
    ) -> "subprocess.Popen[bytes]":
        words = command.words.split()
        launcher = [] if command.launcher == "-" else ["-m", *command.launcher.split()]
        start = [*launcher, "-m", *words]
        if command.constants:
            arguments = f"{words}, {dict(command.constants)}"
            start = ["-c", f"from {__name__} import run_here; run_here({arguments})"]
        merged = {**os.environ, **COMMON, MARK: str(self.folder), **env}
        with open(self._logs[0], "w") as out, open(self._logs[1], "w") as err:
            return subprocess.Popen(
                [sys.executable, *start],
                cwd=self.folder,
                env={key: value for key, value in merged.items() if value is not None},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    @property
    def code(self) -> int | None:
        """The exit code, None while it runs."""
        if isinstance(self._process, subprocess.Popen):
            return self._process.poll()
        self._process.join(0)
        return self._process.exitcode

    def signal(self, number: int) -> None:
        """Send a signal to the command's main process."""
        if self.code is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait(self, seconds: float) -> bool:
        """Wait for the end. Return False if it takes longer."""
        deadline = time.monotonic() + seconds
        while self.code is None:
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL)
        return True

    def end(self, seconds: float) -> Ended:
        """Wait for the end, and kill the command if it takes longer."""
        in_time = self.wait(seconds)
        self.kill()
        _, errors = self._logs
        text = errors.read_text(encoding="utf-8", errors="replace") if errors.exists() else ""
        return Ended(self.code if in_time else None, text, time.monotonic() - self._started)

    def kill(self) -> None:
        """Kill the command and all of its descendants that are left."""
        self.signal(signal.SIGKILL)
        self.wait(GRACE)
        for pid in self.descendants():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def survivors(self) -> list[int]:
        """Return the descendants that are still there some seconds after the command's end."""
        deadline = time.monotonic() + GRACE
        while (left := self.descendants()) and time.monotonic() < deadline:
            time.sleep(10 * POLL)
        return left

    def descendants(self) -> list[int]:
        """Return the processes of the command's session, or with its mark, but itself."""
        mark = f"{MARK}={self.folder}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                pid = int(path.name)
                state = (path / "stat").read_text().rpartition(")")[2].split()
                is_own = int(state[3]) == self.pid or mark in (path / "environ").read_bytes()
                if is_own and pid != self.pid and state[0] != "Z":
                    found.append(pid)
        return found


@contextmanager
def _environment(changed: Mapping[str, str]) -> Iterator[None]:
    former = {name: os.environ.pop(name, None) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in former.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


def _run_forked(
    command: TinyCommand,
    folder: Path,
    logs: Sequence[Path],
    before: Sequence[Before],
    env: Mapping[str, str | None],
) -> None:
    """Run a command in this process, which was forked for it."""
    os.setsid()
    os.chdir(folder)
    for descriptor, log in enumerate(logs, 1):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    for key, value in env.items():
        os.environ.pop(key, None)
        if value is not None:
            os.environ[key] = value
    for each in before:
        each()
    run_here(command.words.split(), command.constants)


def run_here(words: list[str], constants: Mapping[str, object]) -> None:
    """Run `python -m <words>` in this process, with changed constants."""
    for name, number in constants.items():
        module, _, constant = name.partition(":")
        setattr(import_module(module), constant, number)
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def run(
    command: TinyCommand,
    folder: Path,
    seconds: float,
    before: Sequence[Before] = (),
    env: Mapping[str, str | None] | None = None,
) -> Ended:
    """Run a command to its end, or kill it after some seconds."""
    return Running(command, folder, before, env).end(seconds)
