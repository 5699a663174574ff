"""The exported networks that an ensemble was fitted with: find them, check them, copy them."""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infer.embedding.choice import Artifact, find_exported
from infer.embedding.choice import Kind as ExportedKind
from infer.engines.manifest import read_artifact_manifest
from infer.ensemble.blends.artifact import Scorer, ensembles_of, needed_part
from infer.ensemble.settings import SOURCES
from infer.formats import ON_REQUEST, PRECISIONS
from infer.submission.contents import PackedNetwork
from isic.layout import ALL, NONE, Fold, fold_dir
from isic.runtime.errors import UserError
from isic.runtime.files import manifest_path

Kind = tuple[str, str]
"""Format and precision."""
Artifacts = dict[Kind, dict[Fold, Path]]
"""The exported files of a network by kind and fold."""


@dataclass(frozen=True)
class Need:
    """A network as an ensemble needs it."""

    name: str
    flag: str
    tta: str
    checkpoints: Mapping[Fold, str | None]
    """SHA-256 of the checkpoint by fold; None if the ensemble does not know it."""


@dataclass(frozen=True)
class Wanted:
    """The kinds of artifacts to pack; empty: all that are not for special requests."""

    formats: tuple[str, ...]
    precisions: tuple[str, ...]

    def accepts(self, kind: ExportedKind) -> bool:
        precisions = self.precisions or set(PRECISIONS) - set(ON_REQUEST)
        return kind.format in self.formats and kind.precision in precisions


def needs_of(scorer: Scorer, rows: str) -> list[Need]:
    """Return the networks that an ensemble scores a test table with, by name.

    Args:
        rows: `folds`, or `all` for the networks that were trained on every row.

    Raises:
        UserError: two members of a blend need different networks of one name.
    """
    found: dict[str, Need] = {}
    for ensemble in ensembles_of(needed_part(scorer)):
        for flag in SOURCES:
            for name, origin in ensemble.manifest[flag].items():
                need = _need(name, flag, origin, rows)
                if found.setdefault(name, need) != need:
                    raise UserError(
                        f"the members of {scorer.root} were fitted with different networks called "
                        f"{name}; fit them with the same embeddings, or name the networks apart"
                    )
    return [found[name] for name in sorted(found)]


def _need(name: str, flag: str, origin: Mapping[str, Any], rows: str) -> Need:
    if flag == "frozen":
        made_with = origin["made_with"]
        fold: Fold = origin["fold"] if origin["fold"] in (ALL, NONE) else int(origin["fold"])
        return Need(name, flag, made_with["tta"], {fold: made_with["checkpoints"]})
    if rows == ALL:
        return Need(name, flag, origin["tta"], {ALL: None})
    checkpoints: dict[Fold, str | None] = {
        int(fold): digest for fold, digest in origin["checkpoints"].items()
    }
    return Need(name, flag, origin["tta"], checkpoints)


def find_artifacts(need: Need, run: Path, wanted: Wanted) -> Artifacts:
    """Return the artifacts of a network by kind and fold, of the kinds that every fold has.

    Raises:
        UserError: the run is missing, a fold has no artifact of its checkpoint, or an artifact is
            damaged.
    """
    by_fold = {fold: _of_fold(need, run, fold, wanted) for fold in need.checkpoints}
    shared = set.intersection(*(set(found) for found in by_fold.values()))
    lacking = set(wanted.precisions) - {str(kind.precision) for kind in shared}
    if lacking or not shared:
        names = " and ".join(sorted(lacking)) or "one"
        raise UserError(
            f"not every fold of {need.name} in {run} has an artifact in {names}, perhaps because "
            f"one failed its parity check; run `{_export_command(need, wanted)}`, or give another "
            "--precision"
        )
    # Those with the views inside the graph last, so that they replace those without.
    ordered = sorted(shared, key=lambda kind: (kind.tta == need.tta, kind))
    return {
        (kind.format, str(kind.precision)): {
            fold: found[kind].path for fold, found in by_fold.items()
        }
        for kind in ordered
    }


def _of_fold(need: Need, run: Path, fold: Fold, wanted: Wanted) -> dict[ExportedKind, Artifact]:
    """Return a fold's artifacts of the wanted kinds and the ensemble's checkpoint, by kind."""
    found = {}
    changed = False
    for artifact in find_exported(run, fold).get(fold, []):
        kind = artifact.kind
        if not wanted.accepts(kind) or kind.tta not in {"none", need.tta}:
            continue
        manifest = read_artifact_manifest(artifact.path)  # also compares the file with its digest
        expected = need.checkpoints[fold]
        made_from = manifest.get("made_from", manifest)["sha256"]
        if manifest["name"] != need.name or expected not in {None, made_from}:
            changed = True
        else:
            found[kind] = artifact
    if changed and not found:
        raise UserError(
            f"the artifacts in {fold_dir(run, fold)} are of other weights than those that the "
            "ensemble was fitted with; give the --runs of the fit, or embed and fit again"
        )
    if not found:
        raise UserError(
            f"{fold_dir(run, fold)} has no such artifact; run `{_export_command(need, wanted)}`"
        )
    return found


def _export_command(need: Need, wanted: Wanted) -> str:
    network = f"--config {need.name}"
    if NONE in need.checkpoints:
        network = f"--model <model> --pretrained <weights> --name {need.name}"
    command = f"python -m export {network} --formats {','.join(wanted.formats)}"
    if ALL in need.checkpoints:
        command += f" --fold {ALL}"
    return command + (f" --precision {','.join(wanted.precisions)}" if wanted.precisions else "")


def pack_network(need: Need, found: Artifacts, target: Path) -> PackedNetwork:
    """Copy a network's artifacts, with their manifests, into the folder of a bundle."""
    for artifacts in found.values():
        for fold, path in artifacts.items():
            _copy([path, manifest_path(path)], fold_dir(target, fold))
    only: Fold | None = next((fold for fold in (ALL, NONE) if fold in need.checkpoints), None)
    return PackedNetwork(need.name, need.flag, only, need.tta, tuple(found))


def _copy(paths: Iterable[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        shutil.copyfile(path, folder / path.name)
