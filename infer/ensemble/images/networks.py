"""Embedding runs by the name of their network, which is that of their config."""

import re
from collections.abc import Collection, Sequence
from typing import TypeVar

from infer.embedding.store import Embeddings, read_run
from isic.dataset import Split
from isic.runtime.errors import UserError

# The name becomes part of columns and files. LightGBM refuses the characters of JSON in a column's
# name, XGBoost < and [, and neither keeps blanks.
USABLE_NAME = re.compile(r"[\w.+-]+", re.ASCII)

RunT = TypeVar("RunT", bound=Embeddings)


def by_network(roots: Sequence[RunT], split: Split) -> dict[str, RunT]:
    """Return embedding runs by the name of their network, in the order of the names.

    Raises:
        UserError: a run is not finished, two are of one network, or a name is not usable.
    """
    found: dict[str, RunT] = {}
    for root in roots:
        name = read_run(root, split)["config"]
        if not USABLE_NAME.fullmatch(name):
            raise UserError(
                f'the network of {root} is called "{name}", which cannot be part of a column\'s '
                "name; train it with another --name of letters, digits, _, -, + and ."
            )
        if name in found:
            raise UserError(
                f"{found[name]} and {root} are both embeddings of {name}; give each network once, "
                "and train another network under another --name"
            )
        found[name] = root
    return dict(sorted(found.items()))


def match_networks(
    flag: str, roots: Sequence[RunT], split: Split, fitted: Collection[str]
) -> dict[str, RunT]:
    """Return embedding runs as `by_network` does, of exactly the networks of an ensemble.

    Args:
        flag: the name of the flag that gave `roots`.
        fitted: the names of the ensemble's networks.

    Raises:
        UserError: as there, or a network is missing or is not one of the ensemble's.
    """
    found = by_network(roots, split)
    lacking = [name for name in fitted if name not in found]
    extra = [name for name in found if name not in fitted]
    problems = []
    if lacking:
        problems.append(f"lacks {listed(lacking)}")
    if extra:
        problems.append(f"also has {listed(extra)}")
    if problems:
        raise UserError(
            f"the ensemble needs {listed(fitted)}; --{flag} {' and '.join(problems)}: "
            "give the embeddings of all of its networks and no others"
        )
    return found


def listed(names: Collection[str]) -> str:
    """Return names as in a sentence: "a, b and c"."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
