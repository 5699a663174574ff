"""Command lines: settings are validated before anything else is imported or run."""

import contextlib
import inspect
import io
import os
import re
import select
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pkgutil import resolve_name
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import fire
from fire.decorators import SetParseFn
from pydantic.fields import FieldInfo

from isic import __version__
from isic.runtime.config import Settings, build
from isic.runtime.errors import UserError, did_you_mean
from isic.runtime.extras import missing_library
from isic.runtime.files import disk_error, is_of_writing
from isic.runtime.inputs import one_command
from isic.runtime.remote import fetch

HELP = {"--help", "-h"}
VERSION = "--version"
NO_THREAD = "can't start new thread"
"""Python's words for too little memory, or too many threads of this user."""
MEMORY_IS_FULL = "the memory is full; end other programs, or raise a limit of `ulimit -a`"
MAX_MESSAGE = 800
"""Characters of an error message that are printed; of a longer one both ends."""


@dataclass(frozen=True)
class Command:
    """A command by the names of its parts, so that its help needs no heavy library."""

    settings: str
    """`module:Class` of its settings. The docstring of the class is the command's help."""
    function: str
    """`module:function` that takes the settings and returns an exit code or None."""
    load: Callable[..., Settings] = build
    """Builds the settings from their type and the flags."""
    extra: str | None = None
    """The extra of this package that installs all that the command needs, None for the base."""

    @property
    def settings_type(self) -> type[Settings]:
        settings: type[Settings] = resolve_name(self.settings)
        return settings


def run(commands: Command | Mapping[str, Command]) -> None:
    """Run one command, or the one that the first argument names; exit with 2 on a UserError."""
    make_printable()
    try:
        with exit_quietly_on_broken_pipe():
            _dispatch(commands, sys.argv[1:])
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        sys.exit(130)


def make_printable() -> None:
    """Make every print succeed; characters that the output's encoding lacks become escapes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        elif stream is None:  # closed before this process started, as by `>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


@contextlib.contextmanager
def exit_quietly_on_broken_pipe() -> Iterator[None]:
    """Exit with status 1 and no message if stdout is closed early, as by `| head`."""
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


def _dispatch(commands: Command | Mapping[str, Command], arguments: list[str]) -> None:
    if arguments == [VERSION]:
        print_version()
        return
    if isinstance(commands, Mapping):
        if not arguments or arguments[0] in HELP:
            _print_commands(commands)
            return
        name, *arguments = arguments
        if name not in commands:
            sys.exit(report_error(f'unknown command "{name}", {did_you_mean(name, commands)}'))
        command = commands[name]
    else:
        command = commands
    if HELP & set(arguments):
        _print_help(command)
    else:
        fire.Fire(_fire_function(command), command=arguments)


def print_version() -> None:
    print(f"isic-toolkit {__version__}")


def report_error(message: str) -> int:
    """Print the message of a UserError. Return the exit code."""
    print(f"error: {one_line(message)}", file=sys.stderr)
    return 2


def one_line(message: str) -> str:
    """Return a message as a person can read it, whatever a file holds that it quotes."""
    # Control characters could start a new line, or command the terminal.
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
    if len(text) <= MAX_MESSAGE:
        return text
    return f"{text[: MAX_MESSAGE // 2]} ... {text[-MAX_MESSAGE // 2 :]}"


def _fire_function(command: Command) -> Callable[..., None]:
    # Fire calls a function before it reports an unknown flag, so this one accepts every flag and
    # the settings refuse unknown ones. Values reach pydantic as text.
    def call(*extra: str, **flags: str) -> None:
        try:
            code = _call(command, extra, flags)
        except (UserError, OSError, MemoryError, RuntimeError) as error:
            sentence = _sentence(error)
            if sentence is None:
                raise
            code = report_error(sentence)
        if code:
            sys.exit(code)

    wrapped: Callable[..., None] = SetParseFn(str)(call)
    return wrapped


def _sentence(error: Exception) -> str | None:
    """Return the message on a problem that the user can fix, None for a bug."""
    match error:
        case UserError():
            return str(error)
        case PermissionError():
            reason = f"no access to {error.filename} ({error.strerror})"
            return f"{reason}; change its permissions"
        case OSError() if is_of_writing(error):
            return str(disk_error(error.filename2 or error.filename or "a file", error))
        case MemoryError():
            return MEMORY_IS_FULL
        case RuntimeError() if NO_THREAD in str(error):
            return MEMORY_IS_FULL
    return None


def _call(command: Command, extra: tuple[str, ...], flags: Mapping[str, str]) -> int | None:
    settings_type = command.settings_type
    by_position = _by_position(settings_type, extra)
    settings = command.load(settings_type, {**by_position, **flags})
    settings.remember_given({**by_position, **flags})
    try:
        for path, wanted in settings.paths_to_fetch():
            fetch(path, wanted)
        # Imported only now: settings are checked before heavy libraries take seconds to load.
        function: Callable[[Settings], int | None] = resolve_name(command.function)
        with one_command():
            return function(settings)
    except ModuleNotFoundError as error:
        problem = missing_library(error, command.extra)
        if problem:
            raise problem from None
        raise


def _by_position(settings_type: type[Settings], extra: tuple[str, ...]) -> dict[str, Any]:
    """Return the values of the arguments without a key. Raise a UserError if one has no use."""
    if settings_type.repeated is not None:
        return {settings_type.repeated: extra} if extra else {}
    positional = settings_type.positional
    if len(extra) > len(positional):
        unexpected = extra[len(positional)]
        raise UserError(f'unexpected argument "{unexpected}"; options are written --key value')
    return dict(zip(positional, extra, strict=False))


def _print_commands(commands: Mapping[str, Command]) -> None:
    for name, command in commands.items():
        print(f"{name:12} {_summary(command)}")
    print("\n<command> --help lists a command's keys; --version prints the version")


def _summary(command: Command) -> str:
    return (inspect.getdoc(command.settings_type) or "").splitlines()[0]


def _print_help(command: Command) -> None:
    settings_type = command.settings_type
    print(f"{inspect.getdoc(settings_type)}\n")
    for name, field in settings_type.flags().items():
        print(f"  --{name:24} {_default(field):20} {_described(field)}")
    for name, note in settings_type.help_notes().items():
        print(f"  {name:26} {note}")


def _described(field: FieldInfo) -> str:
    """Return the description, with the values of a choice that it does not name."""
    text = field.description or ""
    choices = [str(value) for value in _choices(field.annotation)]
    is_complete = all(re.search(rf"\b{re.escape(value)}\b", text) for value in choices)
    return text if is_complete else f"{text}; one of {', '.join(choices)}"


def _choices(annotation: Any) -> tuple[Any, ...]:
    """Return the values of a Literal, also of one that may be None, else none."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    match [part for part in get_args(annotation) if part is not NoneType]:
        case [part]:
            return _choices(part)
    return ()


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default in (None, "", ()):
        return "-"
    if isinstance(field.default, tuple):
        return ",".join(map(str, field.default))
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
