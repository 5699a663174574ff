"""URLs of remote files, each with a path in the cache folder that stands for it in a setting.

Commands work on local files only. A key that takes a URL therefore holds a path: that of the local
copy of an input (`remote.fetch`), or of the files of an output that are not uploaded yet
(`remote.upload`). The path contains the URL, so nothing else needs to remember it:
`<cache>/<area>/s3%3A%2F%2Fbucket%2Fisic-2024/isic-2024/train-metadata.csv`.
"""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, unquote

from isic.runtime.errors import UserError
from isic.runtime.files import FOLDER_VARIABLE, cache_folder

Area = Literal["fetched", "staged"]
"""Folders in the cache: local copies of inputs, and outputs that are to be uploaded."""


@dataclass(frozen=True)
class Wanted:
    """The files that are fetched of a URL; names may have `*`, and `**` is a folder's content."""

    below: tuple[tuple[str, ...], ...]
    """Names below a folder; of each group the first one that exists."""
    beside: tuple[str, ...] = ()
    """Names of files next to the URL that are fetched too, if they exist."""
    may_be_file: bool = False
    """Whether the URL may be that of a file."""

    def includes(self, path: str) -> bool:
        """Return whether a path below the folder is one of a wanted file."""
        return any(fnmatchcase(path, name) for group in self.below for name in group)


URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)")
AS_PATH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""Beginning of a URL that was made a path, which has one slash: `s3:/bucket`."""
PASSWORD = re.compile(r"[^/@]*:[^/@]*@")
SAFE = " !@$&'()+,-.=_~"
"""Characters that the name of a folder keeps, besides letters and digits."""
MAX_NAME = 255
"""Bytes in the name of a folder."""


def local_path(url: str, area: Area) -> Path:
    """Return the path that stands for a URL, or the path of a `file://` URL.

    Raises:
        ValueError: it is no URL, is too long, or holds `..` or a password.
    """
    matched = URL.fullmatch(url.rstrip("/"))
    if matched is None:
        raise ValueError("no such URL; write it as s3://bucket/folder")
    scheme, rest = matched.groups()
    if scheme.lower() == "file":
        return Path(rest)
    if {"", ".", ".."} & set(rest.split("/")):
        raise ValueError("a URL has a name between any two slashes, neither . nor ..")
    if PASSWORD.match(rest):
        raise ValueError("leave the password out of the URL, because settings are saved as text")
    quoted = quote(f"{scheme.lower()}://{rest}", safe=SAFE)
    if len(quoted) > MAX_NAME:
        raise ValueError(f"the URL is too long by {len(quoted) - MAX_NAME} characters")
    return _area_folder(area) / quoted / rest.rsplit("/", 1)[-1]


def url_of(path: str | Path, area: Area | None = None) -> str | None:
    """Return the URL that a path stands for, None for any other path.

    Args:
        area: None for both.
    """
    try:
        cache = _cache()
        found, quoted, _, *below = Path(path).relative_to(cache).parts
    except (UserError, ValueError):
        return None
    if found not in (("fetched", "staged") if area is None else (area,)):
        return None
    return "/".join((unquote(quoted), *below))


def shown(path: str | Path) -> str:
    """Return a path as a message shows it: as the URL that it stands for, if there is one."""
    return url_of(path) or str(path)


def without_urls(value: Any, area: Area) -> Any:
    """Return a setting's value with the paths that stand for URLs in place of these."""
    if isinstance(value, list | tuple):
        return type(value)(without_urls(part, area) for part in value)
    return str(local_path(value, area)) if isinstance(value, str) and "://" in value else value


def with_urls(value: Any) -> Any:
    """Return a setting's value with the URLs in place of the paths that stand for them."""
    if isinstance(value, list | tuple):
        return type(value)(map(with_urls, value))
    return (url_of(value) if isinstance(value, str | Path) else None) or value


def _area_folder(area: Area) -> Path:
    return _cache() / area


def _cache() -> Path:
    folder = cache_folder()
    if folder is None:
        raise UserError(f"there is no cache folder for remote files; set {FOLDER_VARIABLE}")
    # Commands resolve paths, which must be recognised afterwards.
    return folder.resolve()
