"""The definitions of auxiliary targets, parsed from the text of `--aux`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

from isic.layout import AUX_PREFIX

DEFAULT_WEIGHT = 0.3
"""Weight of the auxiliary loss if none is given."""
GRAMMAR = '"name: column" or "name: column ~ text", separated by semicolons'


@dataclass(frozen=True)
class AuxTarget:
    """A yes-or-no question about a row that a network learns in addition to the target."""

    name: str
    """An identifier."""
    column: str
    """The column of the training table that answers it."""
    text: str | None = None
    """The answer is whether the column contains this text, in any case. If None, it is the value
    of a column of 0 and 1, or whether another column has a value."""

    @property
    def definition(self) -> str:
        return self.column if self.text is None else f"{self.column} ~ {self.text}"

    @property
    def key(self) -> str:
        """The name of its columns in tables."""
        return AUX_PREFIX + self.name


def parse_targets(value: Any) -> Any:
    """Return the targets of a text in the GRAMMAR, or of a mapping from names to definitions.

    Raises:
        ValueError: a definition does not follow the grammar, or two have one name.
    """
    if value is None:
        return ()
    if isinstance(value, Mapping):
        pairs = [(str(name), str(definition)) for name, definition in value.items()]
    elif isinstance(value, str):
        pairs = [_split_name(part) for part in value.split(";") if part.strip()]
    else:
        return value
    targets = tuple(parse_target(name.strip(), definition.strip()) for name, definition in pairs)
    names = [target.name for target in targets]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f'two targets have the name "{name}"; rename one')
    return targets


def _split_name(part: str) -> tuple[str, str]:
    name, colon, definition = part.partition(":")
    if not colon:
        raise ValueError(f'write {GRAMMAR}; "{part.strip()}" has no colon')
    return name, definition


def parse_target(name: str, definition: str) -> AuxTarget:
    """Return the target of a name and of `column` or `column ~ text`. Raise ValueError."""
    column, tilde, text = (part.strip() for part in definition.partition("~"))
    if not name.isidentifier():
        raise ValueError(
            f'"{name}" is no name of a target; use letters, digits and underscores, as in {GRAMMAR}'
        )
    if not column or (tilde and not text):
        missing = "text" if column else "column"
        raise ValueError(f'the target "{name}" has no {missing}; write {GRAMMAR}')
    # Saved settings have all targets in one text.
    if ";" in definition:
        raise ValueError(f'the target "{name}" has a semicolon, which ends a definition')
    return AuxTarget(name, column, text or None)


def format_targets(targets: tuple[AuxTarget, ...]) -> str | None:
    """Return the text that `parse_targets` makes into the targets, None for none."""
    return "; ".join(f"{target.name}: {target.definition}" for target in targets) or None


def manifest_of_targets(targets: tuple[AuxTarget, ...]) -> dict[str, dict[str, str]]:
    """Return the field `aux` of a manifest: definitions by name; no field for no targets."""
    definitions = {target.name: target.definition for target in targets}
    return {"aux": definitions} if definitions else {}


AuxTargets = Annotated[
    tuple[AuxTarget, ...], BeforeValidator(parse_targets), PlainSerializer(format_targets)
]
"""A setting's type; it is saved as text, which keeps the order of the network's outputs."""
