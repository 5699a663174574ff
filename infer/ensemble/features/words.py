"""The words of `--features`: features to use, features to leave out (`-word`), lists (`@file`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from isic.layout import OUTPUT_DIR
from isic.runtime.errors import UserError
from isic.runtime.files import read_text

LIST, MINUS, COMMENT = "@", "-", "#"
LISTS_DIR = OUTPUT_DIR / "features"
"""The folder of lists that are given by their names, as `infer select --name` writes them."""

Lists = Mapping[str, list[str]]
"""The words of each list, by `@file`."""


@dataclass(frozen=True)
class FeatureWords:
    """The words of `--features`, with those of its lists in place of the lists."""

    text: str
    """As the user wrote it."""
    wanted: tuple[str, ...]
    unwanted: tuple[str, ...]
    lists: Lists

    @property
    def label(self) -> str:
        """A name for the choice that can name a folder."""
        return label(self.text)


def label(text: str) -> str:
    """Return the words of `--features` as a name for a file or folder."""
    return "+".join(_label(word) for word in _split(text))


def parse_words(text: str, lists: Lists | None = None) -> FeatureWords:
    """Parse a comma-separated list of words.

    Args:
        lists: the words of lists that were read before; without it their files are read.

    Raises:
        UserError: a word is blank, or a list is missing or empty, or names another list.
    """
    wanted: list[str] = []
    unwanted: list[str] = []
    found: dict[str, list[str]] = {}
    if not text.strip():
        raise UserError("--features names no features; give at least one word")
    for word in _split(text):
        if not word:
            raise UserError(
                f'--features "{text}" has no word before or after a comma; add it, or remove the '
                "comma"
            )
        name = word.removeprefix(MINUS)
        words = [name]
        if name.startswith(LIST):
            words = lists[name] if lists and name in lists else read_list(name)
            found[name] = words
        for each in words:
            # In a list that is left out, "-word" would be a word that stays.
            side = unwanted if word.startswith(MINUS) or each.startswith(MINUS) else wanted
            side.append(each.removeprefix(MINUS))
    return FeatureWords(text, tuple(wanted), tuple(unwanted), found)


def _split(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def _label(word: str) -> str:
    if LIST not in word:
        return word
    sign, _, path = word.partition(LIST)
    return sign + Path(path).stem


def find_list(name: str) -> Path:
    """Return the file of `@file`, or of `@name`, a list in LISTS_DIR. Raise UserError."""
    path = Path(name.removeprefix(LIST)).expanduser()
    in_lists = LISTS_DIR / f"{path.name}.txt"
    if not path.is_file() and not path.suffix and in_lists.is_file():
        path = in_lists
    if not path.is_file():
        raise UserError(f"no list of features {path}; give the path of a text file after @")
    return path


def read_list(name: str) -> list[str]:
    """Read the list that `find_list` finds: a word per line, # starts a comment.

    Raises:
        UserError: no such file, not text, no words, or another list in it.
    """
    path = find_list(name)
    lines = (line.partition(COMMENT)[0].strip() for line in read_text(path).splitlines())
    words = [line for line in lines if line]
    if not words:
        raise UserError(f"{path} names no features; write one per line")
    nested = next((word for word in words if LIST in word or "," in word), None)
    if nested:
        raise UserError(f'{path} has the line "{nested}"; write one set, group or feature per line')
    return words
