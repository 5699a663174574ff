"""The ways to score a test table, by the networks that they need.

An ensemble needs all of its networks. A blend can also score by those of its members whose networks
are done, so there are candidates for fewer networks too.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from infer.ensemble.blends.artifact import (
    Blend,
    Scorer,
    ensembles_of,
    needed_part,
    networks_of,
    out_of_fold,
    with_members,
)
from isic import schema
from isic.metrics import pauc


@dataclass(frozen=True)
class Candidate:
    """An ensemble, or some members of a blend."""

    folder: str
    """The ensemble's folder within the bundle."""
    members: tuple[str, ...] | None
    """Of a blend; None for all of them, and for an ensemble."""
    networks: tuple[str, ...]
    """Ascending."""
    pauc: float
    """Out of fold."""
    num_boosters: int
    """The time to score grows with them."""

    def __str__(self) -> str:
        by = f" by {', '.join(self.members)}" if self.members else ""
        networks = f"with {', '.join(self.networks)}" if self.networks else "without images"
        return f"{self.folder}{by}, {networks}: out-of-fold pAUC {self.pauc:.4f}"

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Candidate":
        members = value["members"]
        return cls(
            value["folder"],
            None if members is None else tuple(members),
            tuple(value["networks"]),
            value["pauc"],
            value["num_boosters"],
        )

    def of(self, scorer: Scorer) -> Scorer:
        """Return the ensemble as this candidate uses it."""
        if self.members is None:
            return scorer
        assert isinstance(scorer, Blend)
        return with_members(scorer, self.members)


def candidates_of(scorer: Scorer, folder: str) -> list[Candidate]:
    """Return an ensemble's candidates, the one with all of its networks first."""
    every = tuple(sorted(networks_of(scorer)))
    found = [_candidate(needed_part(scorer), folder, None, every)]
    return [*found, *_parts(scorer, folder, every)] if isinstance(scorer, Blend) else found


def _parts(blend: Blend, folder: str, every: tuple[str, ...]) -> list[Candidate]:
    """Return the parts of a blend that need fewer networks than all, the larger ones first.

    Networks are added one by one, the most helpful first. The parts are those for each network that
    is tried at each step, and those that lack one network: all 2^n sets would take minutes.
    """
    needs = {
        name: networks_of(member) for name, member in blend.members.items() if not member.own_tables
    }
    found: dict[tuple[str, ...], Candidate] = {}

    def add(networks: set[str]) -> None:
        members = tuple(name for name, needed in needs.items() if needed <= networks)
        if not members:
            return
        part = needed_part(with_members(blend, members))
        assert isinstance(part, Blend)
        # Fewer networks with the same members are the same candidate.
        used = tuple(sorted(networks_of(part)))
        if used != every and used not in found:
            found[used] = _candidate(part, folder, tuple(part.members), used)

    def best_pauc(networks: set[str]) -> float:
        add(networks)
        parts = (part.pauc for used, part in found.items() if set(used) <= networks)
        return max(parts, default=0.0)

    for name in every:
        add(set(every) - {name})
    done: set[str] = set()
    add(done)
    while len(done) < len(every) - 1:
        left = [name for name in every if name not in done]
        done.add(max(left, key=lambda name: best_pauc({*done, name})))
    return sorted(found.values(), key=lambda part: (-len(part.networks), part.networks))


def _candidate(
    scorer: Scorer, folder: str, members: tuple[str, ...] | None, networks: tuple[str, ...]
) -> Candidate:
    score = pauc(scorer.oof()[schema.TARGET].to_numpy(), out_of_fold(scorer))
    num_boosters = sum(len(ensemble.manifest["boosters"]) for ensemble in ensembles_of(scorer))
    return Candidate(folder, members, networks, score, num_boosters)


def best(candidates: Sequence[Candidate], done: Collection[str]) -> Candidate:
    """Return the first candidate if its networks are done, else the best one whose networks are.

    Args:
        candidates: one of them needs no networks.
        done: names of networks.
    """
    first, *others = candidates
    if set(first.networks) <= set(done):
        return first
    usable = [candidate for candidate in others if set(candidate.networks) <= set(done)]
    return max(usable, key=lambda candidate: candidate.pauc)


def by_use(candidates: Sequence[Candidate]) -> list[str]:
    """Return the networks of the first candidate, the one first that helps most by itself."""
    order: list[str] = []
    left = sorted(candidates[0].networks)
    while left:
        name = max(left, key=lambda name: best(candidates, [*order, name]).pauc)
        order.append(name)
        left.remove(name)
    return order
