"""The installed command `isic-toolkit`: the packages as verbs, and completion for bash and zsh."""

import runpy
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from isic.runtime.cli import (
    HELP,
    VERSION,
    Command,
    exit_quietly_on_broken_pipe,
    make_printable,
    print_version,
    report_error,
)
from isic.runtime.config import describe_configs
from isic.runtime.errors import did_you_mean

PACKAGES = {
    "isic": "check or import a dataset, or write a synthetic one",
    "train": "train the folds of a model config",
    "export": "export trained folds to ONNX and other engines",
    "infer": "embed images, fit ensembles, predict, compare, report",
    "benchmarks": "measure every step",
}
"""Packages with a command line, in the order of the pipeline."""

COMPLETE = "--complete"
"""Prints the candidates for the last of the words that follow it; the shells' functions call it."""

SCRIPTS = {
    "bash": f"""_isic_toolkit() {{
    local IFS=$'\\n'
    COMPREPLY=($(compgen -W "$(isic-toolkit {COMPLETE} "${{COMP_WORDS[@]:1:COMP_CWORD}}")" -- \\
        "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _isic_toolkit isic-toolkit""",
    "zsh": f"""_isic_toolkit() {{
    local -a found
    found=(${{(f)"$(isic-toolkit {COMPLETE} "${{(@)words[2,CURRENT]}}")"}})
    (( ${{#found}} )) && compadd -a found || _files
}}
compdef _isic_toolkit isic-toolkit""",
}
"""Completion functions by shell. Without candidates a shell completes file names."""


def main() -> None:
    """Run `isic-toolkit <package> ...` like `python -m <package> ...`."""
    make_printable()
    with exit_quietly_on_broken_pipe():
        _dispatch(sys.argv[1:])


def _dispatch(arguments: list[str]) -> None:
    match arguments:
        case []:
            _print_help()
        case [word] if word in HELP:
            _print_help()
        case [word] if word == VERSION:
            print_version()
        case [word, *words] if word == COMPLETE:
            print("\n".join(candidates(words)))
        case ["completion", shell] if shell in SCRIPTS:
            print(SCRIPTS[shell])
        case [package, *rest] if package in PACKAGES:
            sys.argv = [f"isic-toolkit {package}", *rest]
            runpy.run_module(package, run_name="__main__")
        case [word, *_]:
            known = [*PACKAGES, *(f"completion {shell}" for shell in SCRIPTS)]
            hint = did_you_mean(" ".join(arguments[:2]) if word == "completion" else word, known)
            sys.exit(report_error(f'unknown command "{word}", {hint}'))


def _print_help() -> None:
    for package, summary in PACKAGES.items():
        print(f"{package:12} {summary}")
    print(
        "\ncompletion bash | zsh prints a completion script: source <(isic-toolkit completion bash)"
    )
    print("<package> --help lists the commands or keys; --version prints the version")


def commands_of(package: str) -> Command | Mapping[str, Command]:
    """Return the command of a package, or its commands by name."""
    commands: Command | Mapping[str, Command] = import_module(f"{package}.__main__").COMMANDS
    return commands


def command_lines() -> list[str]:
    """Return the words of every command, such as `train` and `infer embed`."""
    lines = []
    for package in PACKAGES:
        commands = commands_of(package)
        names = [] if isinstance(commands, Command) else list(commands)
        lines += [f"{package} {name}" for name in names] or [package]
    return lines


def candidates(words: list[str]) -> list[str]:
    """Return the completions of the last of `words`; the shell drops those that do not match."""
    match words:
        case [] | [_]:
            return [*PACKAGES, "completion"]
        case ["completion", *_]:
            return list(SCRIPTS)
        case [package, *arguments] if package in PACKAGES:
            # Only the table of commands is imported: a completion must take no time.
            return _command_candidates(commands_of(package), arguments)
    return []


def _command_candidates(
    commands: Command | Mapping[str, Command], arguments: list[str]
) -> list[str]:
    if isinstance(commands, Command):
        return _flags_or_values(commands, arguments)
    if len(arguments) == 1:
        return list(commands)
    name, *rest = arguments
    return _flags_or_values(commands[name], rest) if name in commands else []


def _flags_or_values(command: Command, arguments: list[str]) -> list[str]:
    flags = command.settings_type.flags()
    previous = arguments[-2].removeprefix("--") if len(arguments) > 1 else ""
    if previous == "config":
        return list(describe_configs())
    if previous in flags and not arguments[-1].startswith("--"):
        return _values(flags[previous])
    return [f"--{name}" for name in flags]


def _values(field: FieldInfo) -> list[str]:
    """Return the values that a key accepts if they are few and known."""
    if field.annotation is bool:
        return ["true", "false"]
    return [
        str(value)
        for value in get_args(field.annotation)
        if get_origin(field.annotation) is Literal
    ]
