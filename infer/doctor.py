"""`python -m infer doctor`: what runs on this machine, and what fixes the rest.

Each library is tried in a process of its own, because one that does not fit the machine can crash
or hang. This module itself needs none of them.
"""

import json
import platform
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from infer.formats import AUTO_ORDER, ENGINE_FORMATS, ON_REQUEST, engines_by_title
from isic import __version__
from isic.runtime.config import Settings
from isic.runtime.files import versions
from isic.runtime.machine import num_cores, processor


class DoctorSettings(Settings):
    """Try every engine, provider and library on this machine.

    Prints what runs, in which versions, and one fix for each that does not run.
    """


@dataclass(frozen=True)
class Check:
    """A library, and how it is tried."""

    title: str
    packages: tuple[str, ...]
    """The distributions that it needs; the versions of those that are installed are printed."""
    trial: str
    """A function of `infer.trials` that returns the fields of a Finding."""
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    """The result of a check."""

    reason: str | None
    """Why it does not work, as `cause; fix`; None if it works."""
    cuda: str | None = None
    """The CUDA that the library was built for."""

    @property
    def cause_and_fix(self) -> tuple[str, str]:
        """The two parts of the reason. A cause may quote a library and have semicolons itself."""
        cause, _, fix = (self.reason or "").rpartition("; ")
        return cause, fix


MODULE_CHECKS = (
    Check("NumPy", ("numpy",), "try_module", ("numpy",)),
    Check("OpenCV", ("opencv-python-headless",), "try_module", ("cv2",)),
    Check("HDF5", ("h5py",), "try_module", ("h5py",)),
    Check("Polars", ("polars",), "try_module", ("polars",)),
    Check("Ray", ("ray",), "try_module", ("ray",)),
)

TRIAL = """
import json, sys
from infer import trials
function, *arguments = sys.argv[1:]
print(json.dumps(getattr(trials, function)(*arguments)))
"""
TRIAL_SECONDS = 120
"""A longer trial hangs. Loading CUDA's libraries from a slow disk takes up to a minute."""

FIXES = {
    "SIGILL": 'use a newer CPU, or for Polars run `pip install "polars[rtcompat]"`',
    "libgomp": "run `apt-get install libgomp1`",
    "no answer": "run the doctor again: files load faster the second time",
    "": "run `pip install --force-reinstall {packages}`",
}
"""Fixes of failed trials, by a part of the message; the first match counts."""

WIDTH = 100


class TrialError(Exception):
    """A trial crashed, hung or raised; the message is the cause."""


def doctor(settings: DoctorSettings) -> None:
    """Print this machine, what runs on it, and what `infer embed` would use."""
    print_section("This machine", machine_facts())
    checks = [*engine_checks(), *booster_checks(), *MODULE_CHECKS]
    findings: dict[tuple[str, ...], Finding] = {}
    print("\nWhat runs here")
    width = max(len(check.title) for check in checks)
    with ThreadPoolExecutor(num_cores()) as pool:
        for check, finding in zip(checks, pool.map(examine, checks), strict=True):
            findings[check.arguments] = finding
            print("\n".join(check_lines(check, finding, width)), flush=True)
    print()
    print_section("`infer embed` without flags", embed_defaults(findings))


def machine_facts() -> dict[str, str]:
    """Return facts on this machine, by name."""
    facts = {
        "isic-toolkit": __version__,
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "processor": f"{processor()}; {num_cores()} threads",
    }
    try:
        found = attempt("describe_gpus")
    except TrialError as error:
        return {**facts, "GPU": f"unknown: CUDA's driver {error}"}
    return {
        **facts,
        "NVIDIA driver": found["driver"] or "none",
        "driver's CUDA": found["cuda"] or "none",
        "GPU": "\n".join(found["gpus"]) or f"none: {found['reason']}",
    }


def engine_checks() -> Iterator[Check]:
    """Yield a check of each engine and device that it can run on."""
    for title, name, device in engines_by_title():
        yield Check(title, ENGINE_FORMATS[name].packages, "try_engine", (name, device))


def booster_checks() -> list[Check]:
    """Return a check of each library of boosters; none without NumPy, which has its own check."""
    try:
        packages = attempt("booster_packages")
    except TrialError:
        return []
    return [
        Check(library, (package,), "try_booster", (library,))
        for library, package in packages.items()
    ]


def examine(check: Check) -> Finding:
    """Run a check's trial; a crash and a hang are findings too."""
    try:
        return Finding(**attempt(check.trial, *check.arguments))
    except TrialError as error:
        fix = next(fix for part, fix in FIXES.items() if part in str(error))
        packages = " ".join(versions(*check.packages) or check.packages[:1])
        return Finding(f"{error}; {fix.format(packages=packages)}")


def attempt(trial: str, *arguments: str, seconds: float | None = None) -> Any:
    """Run a function of `infer.trials` in a process of its own and return its result.

    Args:
        trial: name of the function.
        arguments: for the function.
        seconds: time after which it counts as hanging; TRIAL_SECONDS if None.

    Raises:
        TrialError: it crashed, hung or raised.
    """
    seconds = seconds or TRIAL_SECONDS
    try:
        ended = subprocess.run(
            [sys.executable, "-c", TRIAL, trial, *arguments],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TrialError(f"gives no answer within {seconds:.0f} s") from None
    if ended.returncode < 0:
        raise TrialError(f"crashes with {signal.Signals(-ended.returncode).name}")
    succeeded = ended.returncode == 0
    lines = (ended.stdout if succeeded else ended.stderr).strip().splitlines()
    if not succeeded:
        raise TrialError(lines[-1] if lines else f"ends with exit code {ended.returncode}")
    return json.loads(lines[-1])


def embed_defaults(findings: Mapping[tuple[str, ...], Finding]) -> dict[str, str]:
    """Return the choices of `infer embed` without flags, by the engine checks."""
    choices = {"format": "auto: the first in these lists that every fold has"}
    for device, order in AUTO_ORDER.items():
        names = [
            f"{name} {precision}"
            for name, precision in order
            if findings[name, device].reason is None and precision not in ON_REQUEST
        ]
        last, _ = order[-1]
        nothing = f"nothing, because {findings[last, device].cause_and_fix[0]}"
        choices[f"on {device}"] = ", ".join(names) or nothing
    return choices


def print_section(title: str, facts: Mapping[str, str]) -> None:
    """Print a heading, and below it names and values in two columns."""
    print(title)
    width = max(map(len, facts))
    for name, fact in facts.items():
        for number, line in enumerate(fact.split("\n")):
            start = f"  {'' if number else name:{width}}  "
            print("\n".join(wrap(line, start, " " * len(start))), flush=True)


def check_lines(check: Check, finding: Finding, width: int) -> Iterable[str]:
    """Return the lines of a check: its title in a column of a width, yes or no, and versions.

    The cause and the fix of a "no" follow on lines of their own.
    """
    answer = "no" if finding.reason else "yes"
    found = ", ".join(f"{name} {version}" for name, version in versions(*check.packages).items())
    cuda = f", built for CUDA {finding.cuda}" if finding.cuda else ""
    yield f"  {check.title:{width}}  {answer:3}  {found or 'not installed'}{cuda}"
    if finding.reason:
        cause, fix = finding.cause_and_fix
        yield from wrap(cause, " " * 6)
        yield from wrap(f"fix: {fix}", " " * 6)


def wrap(text: str, start: str, indent: str | None = None) -> list[str]:
    """Return a text in lines of at most WIDTH columns, with no break inside of a command."""
    unbroken = re.sub("`[^`]*`", lambda command: command[0].replace(" ", "\0"), text)
    lines = textwrap.wrap(
        unbroken,
        WIDTH,
        initial_indent=start,
        subsequent_indent=start if indent is None else indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace("\0", " ") for line in lines]
