"""Command lines: one typed function per command, its settings validated before it runs."""

import contextlib
import inspect
import io
import os
import select
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_type_hints

import fire
from fire.decorators import SetParseFn
from pydantic.fields import FieldInfo

from isic import __version__
from isic.runtime.config import Settings, build
from isic.runtime.errors import UserError, did_you_mean

Command = Callable[[Any], int | None]
HELP = {"--help", "-h"}
VERSION = "--version"


def run(commands: Command | Mapping[str, Command], load: Callable[..., Settings] = build) -> None:
    """Run one command, or the one that the first argument names; exits with 2 on a UserError.

    Args:
        commands: a function of one settings argument, or several by name; it returns the exit code.
        load: builds the settings from their type and the flags.
    """
    make_printable()
    try:
        with _exit_quietly_on_broken_pipe():
            _dispatch(commands, load, sys.argv[1:])
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        sys.exit(130)


def make_printable() -> None:
    """Make every print succeed: a command must not end before its results are written.

    Characters that the output's encoding lacks, such as `±` in ASCII, become escape sequences.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        elif stream is None:  # closed before this process started, as by `>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


@contextlib.contextmanager
def _exit_quietly_on_broken_pipe() -> Iterator[None]:
    """Exit with status 1 and no message if stdout is closed early, for example by `| head`."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _stdout_is_closed():
            raise  # some other pipe, such as a worker's
        # Python flushes stdout once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _stdout_is_closed() -> bool:
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _dispatch(
    commands: Command | Mapping[str, Command], load: Callable[..., Settings], arguments: list[str]
) -> None:
    if arguments == [VERSION]:
        print(f"isic-toolkit {__version__}")
        return
    if isinstance(commands, Mapping):
        if not arguments or arguments[0] in HELP:
            _print_commands(commands)
            return
        if arguments[0] not in commands:
            sys.exit(
                _complain(
                    f'unknown command "{arguments[0]}", {did_you_mean(arguments[0], commands)}'
                )
            )
        command, arguments = commands[arguments[0]], arguments[1:]
    else:
        command = commands
    if HELP & set(arguments):
        _print_help(command)
    else:
        fire.Fire(_fire_function(command, load), command=arguments)


def _complain(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _settings_type(command: Command) -> type[Settings]:
    settings: type[Settings] = next(iter(get_type_hints(command).values()))
    return settings


def _fire_function(command: Command, load: Callable[..., Settings]) -> Callable[..., None]:
    """Wrap a command for Fire.

    Fire calls a function before it reports an unknown flag, so the wrapper accepts every flag and
    the settings refuse unknown ones. Values reach pydantic as text.
    """

    def call(*extra: str, **flags: str) -> None:
        try:
            positional = _settings_type(command).positional
            if len(extra) > len(positional):
                raise UserError(
                    f'unexpected argument "{extra[len(positional)]}"; '
                    "options are written --key value"
                )
            code = command(
                load(
                    _settings_type(command), {**dict(zip(positional, extra, strict=False)), **flags}
                )
            )
        except UserError as error:
            code = _complain(str(error))
        except PermissionError as error:
            code = _complain(
                f"no access to {error.filename} ({error.strerror}); change its permissions"
            )
        if code:
            sys.exit(code)

    wrapped: Callable[..., None] = SetParseFn(str)(call)
    return wrapped


def _print_commands(commands: Mapping[str, Command]) -> None:
    for name, command in commands.items():
        print(f"{name:12} {(inspect.getdoc(command) or '').splitlines()[0]}")
    print("\n<command> --help lists a command's keys; --version prints the version")


def _print_help(command: Command) -> None:
    print(f"{inspect.getdoc(command)}\n")
    for name, field in _settings_type(command).flags().items():
        print(f"  --{name:24} {_default(field):20} {field.description or ''}")
    for name, note in _settings_type(command).help_notes().items():
        print(f"  {name:26} {note}")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default is None or field.default == "":
        return "-"
    if isinstance(field.default, tuple):
        return ",".join(map(str, field.default))
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
