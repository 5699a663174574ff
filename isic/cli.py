"""Command lines: Fire over one typed function a command, settings validated before anything runs."""

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_type_hints

import fire
from fire.decorators import SetParseFn

from isic.config import Settings, build
from isic.errors import UserError, did_you_mean

SettingsT = TypeVar("SettingsT", bound=Settings)
Command = Callable[[Any], int | None]


class _Required:
    def __repr__(self) -> str:
        return "required"


def run(commands: Command | Mapping[str, Command], load: Callable[..., Settings] = build) -> None:
    """Runs one command, or the one of several that the first argument names; exits 2 on a UserError.

    Args:
        commands: a function of one settings argument, or several by name. Its return value is the exit code.
        load: builds the settings from their type and the flags.
    """
    arguments = sys.argv[1:]
    wants_help = bool({"--help", "-h"} & set(arguments))
    component: Any
    if isinstance(commands, Mapping):
        if arguments and not wants_help and arguments[0] not in commands:
            sys.exit(_complain(f'unknown command "{arguments[0]}", {did_you_mean(arguments[0], commands)}'))
        component = {name: _fire_function(command, load) for name, command in commands.items()}
        named = [word for word in arguments[:1] if word in commands]
    else:
        component, named = _fire_function(commands, load), []
    # A command that takes every flag takes --help too, unless it stands behind Fire's own separator.
    fire.Fire(component, command=[*named, "--", "--help"] if wants_help else arguments)


def _complain(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _fire_function(command: Command, load: Callable[..., Settings]) -> Callable[..., None]:
    """Wraps a command for Fire.

    Fire calls a function before it complains of a flag it does not know, so the wrapper takes everything and
    leaves it to the settings to refuse. Values reach pydantic as the text that was typed.
    """
    settings_type: type[Settings] = next(iter(get_type_hints(command).values()))

    def call(*extra: str, **flags: str) -> None:
        try:
            if extra:
                raise UserError(f'unexpected argument "{extra[0]}"; options are written --key value')
            code = command(load(settings_type, flags))
        except UserError as error:
            code = _complain(str(error))
        if code:
            sys.exit(code)

    fields = settings_type.model_fields.items()
    parameters = [inspect.Parameter("extra", inspect.Parameter.VAR_POSITIONAL)]
    for name, field in fields:
        default = _Required() if field.is_required() else field.get_default(call_default_factory=False)
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default))
    parameters.append(inspect.Parameter("overrides", inspect.Parameter.VAR_KEYWORD))
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    arguments = "\n".join(f"    {name}: {field.description or ''}" for name, field in fields)
    call.__doc__ = f"{inspect.getdoc(command) or ''}\n\nArgs:\n{arguments}"
    wrapped: Callable[..., None] = SetParseFn(str)(call)
    return wrapped
