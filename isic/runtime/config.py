"""Settings of a command: a pydantic model of defaults < YAML file < flags without unknown keys."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
)
from pydantic.fields import FieldInfo

from isic.runtime import yaml12
from isic.runtime.errors import UserError, did_you_mean, first_line
from isic.runtime.files import read_text
from isic.runtime.urls import AS_PATH, Area, Wanted, with_urls, without_urls

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"
BASE = "base"
"""A config's key, and the folder of the files that it can name."""


class Settings(BaseModel):
    """Base of every command's settings: checked on construction and frozen afterwards."""

    positional: ClassVar[tuple[str, ...]] = ()
    """Keys whose values may also be given by position."""
    repeated: ClassVar[str | None] = None
    """Key of several values that all arguments without a key are the values of."""
    remote_inputs: ClassVar[Mapping[str, Wanted]] = {}
    """Keys that take URLs of inputs, with the files that a command fetches before it starts."""
    remote_outputs: ClassVar[tuple[str, ...]] = ()
    """Keys that take the URL of an output, which the command uploads."""

    @classmethod
    def help_notes(cls) -> Mapping[str, str]:
        """Return extra entries for `--help`, such as the values that a key accepts."""
        return {}

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=()
    )

    _given: frozenset[str] = PrivateAttr(frozenset())

    @property
    def given(self) -> frozenset[str]:
        """The keys of the command line, without those of a config file; none in Python."""
        return self._given

    def remember_given(self, keys: Iterable[str]) -> None:
        """Set `given`."""
        self._given = frozenset(keys)

    @field_validator("*")
    @classmethod
    def _expand_home(cls, value: Any) -> Any:
        # Shells leave `~` in --data=~/isic, and YAML files always do.
        if isinstance(value, tuple):
            return tuple(map(cls._expand_home, value))
        if not isinstance(value, Path) or not str(value).startswith("~"):
            return value
        try:
            return value.expanduser()
        except RuntimeError:
            raise ValueError("there is no such home folder; write the path out") from None

    @field_validator("*", mode="before")
    @classmethod
    def _path_of_url(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        if name not in (*cls.remote_inputs, *cls.remote_outputs):
            return value
        area: Area = "fetched" if name in cls.remote_inputs else "staged"
        if get_origin(cls.model_fields[name].annotation) is tuple:
            value = _split(value)
        return without_urls(value, area)

    @field_validator("*")
    @classmethod
    def _refuse_url(cls, value: Any) -> Any:
        # As a path, `s3://bucket` is the folder `s3:` of this machine.
        paths = value if isinstance(value, tuple) else (value,)
        if any(isinstance(path, Path) and AS_PATH.match(str(path)) for path in paths):
            raise ValueError("a URL cannot be used here; give a path on this machine")
        return value

    @model_serializer(mode="wrap")
    def _saved_with_urls(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Saved settings must not depend on the place of the cache.
        values: dict[str, Any] = handler(self)
        remote = {*self.remote_inputs, *self.remote_outputs} & values.keys()
        return values | {key: with_urls(values[key]) for key in remote}

    def paths_to_fetch(self) -> Iterator[tuple[Path, Wanted]]:
        """Yield the paths that may stand for the URLs of inputs, with the files to fetch."""
        for name, wanted in self.remote_inputs.items():
            value = getattr(self, name)
            for path in value if isinstance(value, tuple) else (value,):
                if isinstance(path, Path | str):
                    yield Path(path), wanted

    @classmethod
    def flags(cls) -> dict[str, FieldInfo]:
        """Return the accepted keys, with default and help."""
        return cls.model_fields


def _split(value: Any) -> Any:
    if isinstance(value, Path):
        return (value,)
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


_ItemT = TypeVar("_ItemT")
Several = Annotated[tuple[_ItemT, ...], BeforeValidator(_split)]
"""Values that a command line writes with commas between them."""


def is_path(name: str) -> bool:
    """Return whether a name would lead into another folder than the one it is to be in."""
    return name in (".", "..") or "/" in name


def _refuse_path(value: str) -> str:
    if is_path(value):
        raise ValueError("this names a single folder or file; leave out / and ..")
    return value


Name = Annotated[str, AfterValidator(_refuse_path)]
"""The name of a folder or file that a command makes in the output folder."""


def ends_in(*endings: str) -> AfterValidator:
    """Return the check that the name of a file to write, if any, ends like its format."""

    def check(path: Path | None) -> Path | None:
        if path is not None and path.suffix.lower() not in endings:
            raise ValueError(f"give a name that ends in {' or '.join(endings)}")
        return path

    return AfterValidator(check)


YAML_ENDINGS = (".yaml", ".yml")


def _run_of(config: str) -> str:
    return Path(config).stem if config.endswith(YAML_ENDINGS) else config


RunName = Annotated[str, AfterValidator(_run_of)]
"""The name of a training run, or the config file that training took the name from."""

SettingsT = TypeVar("SettingsT", bound=Settings)


def build(model: type[SettingsT], values: Mapping[str, Any], source: str = "") -> SettingsT:
    """Validate `values` into `model`.

    Raises:
        UserError: lists every wrong key or value, after `source` (such as a file name).
    """
    try:
        return model(**values)
    except ValidationError as error:
        problems = "; ".join(_sentence(model, dict(problem)) for problem in error.errors())
        raise UserError(f"{source}: {problems}" if source else problems) from None


def _sentence(model: type[Settings], problem: Mapping[str, Any]) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f'unknown key "{key}", {did_you_mean(key, model.flags())}'
    if problem["type"] == "missing":
        return f"--{key} is required"
    if problem["input"] == "True":
        return f"--{key} needs a value"  # a flag without one reads as true
    if problem["type"] == "too_short":
        return f"--{key} needs at least {problem['ctx']['min_length']}"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    return f"--{key}: {message}, got {problem['input']!r}" if key else message


def find_config(name: str) -> Path:
    """Return the YAML file for a name in `configs/` or a path to one."""
    if name.endswith(YAML_ENDINGS):
        path = Path(name)
        if not path.is_file():
            raise UserError(
                f"no config file {name}; give a name in {CONFIG_DIR.name}/ or a path that exists"
            )
        return path
    path = CONFIG_DIR / f"{name}.yaml"
    if not path.is_file():
        # Files in `base/` are parts of configs.
        files = (file for file in CONFIG_DIR.rglob("*.yaml") if file.parent.name != BASE)
        known = (file.relative_to(CONFIG_DIR).with_suffix("").as_posix() for file in files)
        raise UserError(f'no config "{name}", {did_you_mean(name, known)}')
    return path


def yaml_reason(error: yaml.YAMLError) -> str:
    """Return why a text is not YAML, in a few words."""
    return getattr(error, "problem", None) or first_line(error)


def describe_configs() -> dict[str, str]:
    """Return the first line of each model config's comment, by name."""
    return {
        path.stem: path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        for path in sorted(CONFIG_DIR.glob("*.yaml"))
    }


def read_config(path: Path) -> dict[str, Any]:
    """Read a config file over its base: `base: x` names `configs/base/x.yaml`.

    Raises:
        UserError: a file is missing or not a YAML mapping.
    """
    values = read_yaml(path)
    base = values.pop(BASE, None)
    if base is None:
        return values
    base_path = CONFIG_DIR / BASE / f"{base}.yaml"
    if not base_path.is_file():
        known = (file.stem for file in base_path.parent.glob("*.yaml"))
        raise UserError(f'{path}: no base "{base}", {did_you_mean(str(base), known)}')
    return {**read_yaml(base_path), **values}


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; an empty file is an empty mapping. Raise UserError."""
    try:
        values = yaml12.load(read_text(path))
    except yaml.YAMLError as error:
        raise UserError(
            f"{path} is not valid YAML ({yaml_reason(error)}); correct it or name another config"
        ) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f'{path} must hold "key: value" lines, found a {type(values).__name__}')
    for key in values:
        if not isinstance(key, str):
            raise UserError(f"{path} has the key {key!r}, which is no text; write it in quotes")
    return values
