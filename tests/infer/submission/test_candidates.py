"""The parts of a blend that a bundle lists, by the networks that they need."""

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest

from infer.ensemble.artifact import Ensemble
from infer.ensemble.blends.artifact import Blend
from infer.submission import candidates
from infer.submission.candidates import best, by_use, candidates_of
from isic.layout import OOF_FILE

BlendOf = Callable[[int], Blend]
SPEC = SimpleNamespace(own=SimpleNamespace(tables={}), compares_lesions=bool, images=True)


@pytest.fixture
def blend_of(tmp_path: Path) -> BlendOf:
    def make(num_networks: int) -> Blend:
        """Return a blend of a member without images, and one per network; some have two."""
        random = np.random.default_rng(0)
        needs = {f"m{i}": {f"n{i}", f"n{i - i % 3}"} for i in range(num_networks)}
        needs = {"tables": set(), **needs}
        target = np.arange(200) % 5 == 0
        scores = {name: random.random(200) + target * random.random() for name in needs}
        oof = pl.DataFrame({"fold": np.arange(200) % 2, "target": target.astype(int), **scores})
        oof.write_parquet(tmp_path / OOF_FILE)
        members = {
            name: Ensemble(
                tmp_path,
                {"embeddings": dict.fromkeys(networks), "frozen": {}, "boosters": []},
                *(SimpleNamespace(image=None), SPEC),
            )
            for name, networks in needs.items()
        }
        weights = dict.fromkeys(needs, 1 / len(needs))
        by_fold = {"0": weights, "1": weights}
        about = {"members": dict.fromkeys(needs), "weights": weights, "weights_by_fold": by_fold}
        return Blend(tmp_path, {**about, "files": {}}, members)

    return make


def test_few_networks_have_a_candidate_for_every_set(blend_of: BlendOf) -> None:
    found = candidates_of(blend_of(3), "final")
    assert [each.networks for each in found] == [
        ("n0", "n1", "n2"),
        ("n0", "n1"),
        ("n0", "n2"),
        ("n0",),
        (),
    ]
    assert [each.members for each in found[1:4:2]] == [("tables", "m0", "m1"), ("tables", "m0")]


def test_a_network_that_only_a_member_without_a_weight_uses_is_in_no_candidate(
    blend_of: BlendOf,
) -> None:
    blend = blend_of(3)
    shares = {"weights": {**blend.weights, "m0": 0.0}}
    found = candidates_of(replace(blend, manifest={**blend.manifest, **shares}), "final")
    # The one member that n0 is enough for has no weight.
    assert [each.networks for each in found] == [("n0", "n1", "n2"), ("n0", "n1"), ("n0", "n2"), ()]
    assert all("m0" not in (each.members or ()) for each in found)


def test_many_networks_have_candidates_in_their_order_of_use(
    blend_of: BlendOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = []
    pauc = candidates.pauc
    monkeypatch.setattr(candidates, "pauc", lambda *given: computed.append(given) or pauc(*given))
    found = candidates_of(blend_of(10), "final")
    assert len(computed) == len(found) < 70
    order = by_use(found)
    assert set(order) == set(found[0].networks)
    # As each network is done, and if any one of them is lost, the part for these is there.
    done = [set(order[:k]) for k in range(11)] + [{*order} - {name} for name in order]
    needs = {name: {name, f"n{int(name[1:]) // 3 * 3}"} for name in order}
    for networks in done:
        usable = [name for name in order if needs[name] <= networks]
        assert set(best(found, networks).networks) <= networks
        assert any(set(each.networks) == set().union(*map(needs.get, usable)) for each in found)
    for networks in combinations(order, 5):
        assert set(best(found, networks).networks) <= set(networks)
