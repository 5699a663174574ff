"""A bundle on disk, as `infer bundle` writes it and `infer submit` reads it.

| file | content |
| --- | --- |
| `bundle.json` | the manifest: candidates, networks, sizes and digests, licences; written last |
| `submit.py` | runs `infer submit` on this folder |
| `code/` | the packages `isic` and `infer` |
| `site/` | the packages that they need, unpacked for the machine's Python |
| `ensembles/<name>/` | the ensemble, and those to fall back on |
| `networks/<name>/fold_<k>/` | the exported networks, as in their run |
| `notebook/` | a notebook that runs `submit.py`, and its metadata for Kaggle |
| `dataset-metadata.json` | the metadata of the folder as a dataset on Kaggle |
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from infer.ensemble.artifact import CALIBRATION_FILE
from infer.ensemble.blends.artifact import Blend, Scorer, open_scorer
from infer.submission.candidates import Candidate
from isic.layout import ALL, NONE, Fold
from isic.runtime.errors import UserError
from isic.runtime.fields import Fields, FileName, Index, Share, check_fields
from isic.runtime.files import read_json, sha256
from isic.views import Tta

BUNDLE_FILE = "bundle.json"
FORMAT_VERSION = 1

WRITE_AGAIN = "write it again with `python -m infer bundle`"

CODE_DIR = "code"
SITE_DIR = "site"
ENSEMBLES_DIR = "ensembles"
NETWORKS_DIR = "networks"
SCRIPT = "submit.py"


class CandidateFields(Fields):
    """An entry of the manifest's candidates."""

    folder: FileName
    members: list[str] | None
    networks: list[str]
    pauc: Share
    num_boosters: Index


class NetworkFields(Fields):
    """An entry of the manifest's networks."""

    name: FileName
    flag: Literal["embeddings", "frozen"]
    fold: Fold | None
    tta: Tta
    kinds: list[tuple[str, str] | list[str]]


class BundleFields(Fields):
    """The fields of the manifest that `infer submit` reads."""

    format: int
    python: str
    cuda: str
    rows: Literal["folds", "all"]
    few: Literal["warn", "raw"]
    candidates: list[CandidateFields]
    networks: list[NetworkFields]
    files: dict[FileName, str]

    @model_validator(mode="after")
    def _can_score(self) -> Self:
        known = {network.name for network in self.networks}
        needs = [set(candidate.networks) for candidate in self.candidates]
        if set() not in needs:
            raise ValueError("no candidate is without images")
        if not all(need <= known for need in needs):
            raise ValueError("a candidate needs a network that is not there")
        return self


@dataclass(frozen=True)
class PackedNetwork:
    """A network of a bundle: its exported folds, and how they embed the test images."""

    name: str
    flag: str
    """`embeddings` or `frozen`."""
    fold: Fold | None
    """ALL for the network of all rows, NONE for a backbone, None for the numbered folds that are
    packed."""
    tta: str
    kinds: tuple[tuple[str, str], ...]
    """Format and precision of the artifacts that every fold has."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "PackedNetwork":
        kinds = tuple((kind[0], kind[1]) for kind in value["kinds"])
        fold: Fold | None = value["fold"] if value["fold"] in (ALL, NONE) else None
        return cls(value["name"], value["flag"], fold, value["tta"], kinds)


@dataclass(frozen=True)
class Bundle:
    """A bundle whose manifest has been read."""

    root: Path
    manifest: Mapping[str, Any]

    @cached_property
    def candidates(self) -> list[Candidate]:
        """The ways to score, the preferred one first; one of them needs no networks."""
        return [Candidate.from_json(value) for value in self.manifest["candidates"]]

    @cached_property
    def networks(self) -> dict[str, PackedNetwork]:
        """By name, in the order in which they are to embed."""
        packed = [PackedNetwork.from_json(value) for value in self.manifest["networks"]]
        return {network.name: network for network in packed}

    @cached_property
    def digest(self) -> str:
        return sha256(self.root / BUNDLE_FILE)

    @property
    def expects_gpu(self) -> bool:
        return bool(self.manifest["cuda"] != "none")

    def is_calibrated(self, candidate: Candidate) -> bool:
        """Return whether a candidate has probabilities, which a part of a blend has not."""
        path = f"{ENSEMBLES_DIR}/{candidate.folder}/{CALIBRATION_FILE}"
        return candidate.members is None and path in self.manifest["files"]

    def open(self, candidate: Candidate) -> Scorer:
        """Read and check the ensemble of a candidate. Raise UserError."""
        folder = self.root / ENSEMBLES_DIR / candidate.folder
        self.refuse_changed(folder)
        scorer = open_scorer(folder)
        known = scorer.members.keys() if isinstance(scorer, Blend) else set()
        if candidate.members is not None and not set() < set(candidate.members) <= known:
            raise UserError(
                f"{self.root / BUNDLE_FILE} names members that {folder} has not; {WRITE_AGAIN}"
            )
        return candidate.of(scorer)

    def run_dir(self, network: PackedNetwork) -> Path:
        """Return the folder of a network's exported folds. Raise UserError if one was changed."""
        folder = self.root / NETWORKS_DIR / network.name
        self.refuse_changed(folder)
        return folder

    def refuse_changed(self, folder: Path) -> None:
        """Raise a UserError if a manifest in a folder is not the one of the bundle."""
        # The manifests have the digests of the other files, which are compared when those are read.
        for path in sorted(folder.rglob("*.json")):
            name = path.relative_to(self.root).as_posix()
            expected = self.manifest["files"].get(name)
            if expected is not None and sha256(path) != expected:
                raise UserError(f"{path} does not match {BUNDLE_FILE}; {WRITE_AGAIN}")


def describe(candidates: Sequence[Candidate], networks: Sequence[PackedNetwork]) -> dict[str, Any]:
    """Return the fields of the manifest that `Bundle` reads."""
    return {
        "candidates": [asdict(candidate) for candidate in candidates],
        "networks": [asdict(network) for network in networks],
    }


def open_bundle(root: Path) -> Bundle:
    """Read a bundle's manifest.

    Raises:
        UserError: there is none, or it is of another version.
    """
    if not (root / BUNDLE_FILE).is_file():
        raise UserError(f"{root} is not a bundle; give the folder that `infer bundle` wrote")
    path = root / BUNDLE_FILE
    manifest = read_json(path)
    if manifest.get("format") != FORMAT_VERSION:
        raise UserError(f"{root} was written by another version of the toolkit; {WRITE_AGAIN}")
    check_fields(path, manifest, BundleFields, WRITE_AGAIN)
    return Bundle(root, manifest)
