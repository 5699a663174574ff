"""A user's own columns: definitions (`--define`) and tables (`--tables`), by set."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from infer.ensemble.features.own_tables import NAME, TableSpec
from isic import schema
from isic.features import FEATURES, SETS
from isic.features.definitions import Definition, parse_definitions
from isic.runtime.config import read_yaml
from isic.runtime.errors import UserError


@dataclass(frozen=True)
class OwnColumns:
    """Own columns by the word that requests a set of them: the stem of its file."""

    definitions: Mapping[str, tuple[Definition, ...]] = field(default_factory=dict)
    tables: Mapping[str, TableSpec] = field(default_factory=dict)

    @property
    def all_definitions(self) -> tuple[Definition, ...]:
        """Every definition in the order of the files, so that later ones can read earlier ones."""
        return tuple(chain.from_iterable(self.definitions.values()))

    @property
    def sets(self) -> dict[str, tuple[str, ...]]:
        """Feature names by set."""
        defined = {
            word: tuple(name for definition in definitions for name in definition.names)
            for word, definitions in self.definitions.items()
        }
        return defined | {word: tuple(table.columns) for word, table in self.tables.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """Every feature, in the order of the boosters' matrix."""
        return tuple(chain.from_iterable(self.sets.values()))

    def to_json(self) -> dict[str, Any]:
        """Return the texts of the definitions, and the columns of the tables."""
        definitions = {
            word: {definition.name: definition.to_json() for definition in part}
            for word, part in self.definitions.items()
        }
        tables = {word: table.to_json() for word, table in self.tables.items()}
        return {"definitions": definitions, "tables": tables}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "OwnColumns":
        """Read the fields of `to_json`; an ensemble without own columns may lack them."""
        definitions = value.get("definitions") or {}
        tables = value.get("tables") or {}
        return cls(
            {word: parse_definitions(part, word) for word, part in definitions.items()},
            {word: TableSpec.from_json(part) for word, part in tables.items()},
        )


def read_definitions(paths: Iterable[Path]) -> dict[str, tuple[Definition, ...]]:
    """Read files of definitions, by their stems. Raise UserError."""
    found: dict[str, tuple[Definition, ...]] = {}
    for path in paths:
        if path.stem in found:
            raise UserError(f"two files of --define are called {path.stem}; rename one of them")
        definitions = parse_definitions(read_yaml(path), str(path))
        if not definitions:
            raise UserError(f"{path} defines nothing; write lines such as `name: expression`")
        found[path.stem] = definitions
    return found


def refuse_clashes(own: OwnColumns, reserved: Collection[str]) -> None:
    """Raise a UserError for a name of a set or feature that something else already has.

    Args:
        reserved: words for image features, whose names begin with the word.
    """
    taken = {*FEATURES, *SETS, *schema.DTYPES, *reserved}
    prefixes = tuple(f"{word}_" for word in reserved)
    counts = Counter([*own.definitions, *own.tables, *own.names])
    for name, count in counts.items():
        if name in taken or name.startswith(prefixes):
            raise UserError(
                f'the name "{name}" of an own column or of its file is taken; choose another one'
            )
        if count > 1:
            raise UserError(
                f'the name "{name}" is given to {count} own columns or files; rename all but one'
            )
        if not NAME.fullmatch(name):
            raise UserError(
                f'"{name}" cannot be a word of --features; use letters, digits, underscores '
                "and dots"
            )
