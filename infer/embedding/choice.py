"""The choice among the exported artifacts of a run: the kind that this machine is best at."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from infer.engines import cudart, import_engine, unavailable_reason
from infer.engines.manifest import check_artifact_manifest, is_artifact
from infer.formats import AUTO, AUTO_ORDER, ENGINE_FORMATS, ON_REQUEST
from infer.trust import is_trusted
from isic.layout import Fold, fold_dirs, fold_name
from isic.runtime.errors import UserError
from isic.runtime.files import manifest_path, read_json
from isic.runtime.machine import gpu_architecture, has_gpu

DEVICE_NAMES = {"cpu": "CPU", "cuda": "GPU"}
UNTRUSTED = "it is native code that you have not exported here, which takes --trust true"
FIRST_BFLOAT16 = "sm80"
"""The architecture of the first GPUs that compute in bfloat16."""


class Kind(NamedTuple):
    """The artifacts of one kind have equal outputs, but for rounding."""

    format: str
    precision: str | None
    """None for a format that runs no network."""
    tta: str
    """The views inside the graph."""

    def __str__(self) -> str:
        name = f"{self.format} {self.precision or ''}".strip()
        return name if self.tta == "none" else f"{name} with {self.tta} inside"


@dataclass(frozen=True)
class Artifact:
    """An exported file and its manifest, which may belong to other bytes."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def kind(self) -> Kind:
        manifest = self.manifest
        return Kind(manifest["format"], manifest.get("precision"), manifest.get("tta", "none"))


Found = Mapping[Fold, list[Artifact]]
"""Artifacts by fold."""


@dataclass(frozen=True)
class Request:
    """The artifacts that a command accepts."""

    format: str
    """A format, or AUTO."""
    precision: str | None = None
    """None for any but those of ON_REQUEST."""
    tta: str = "none"
    """The views to average over; if the graph has none, they are made on the host."""
    device: str = "auto"
    earlier: frozenset[str] = frozenset()
    """Digests of the artifacts that a run to resume was made with, which AUTO keeps."""
    trust: bool = False
    """Whether to take native code that this user has not exported."""

    def accepts(self, kind: Kind) -> bool:
        """Return whether a kind may be used. Views other than the requested ones never may."""
        if kind.tta not in {self.tta, "none"} or self.precision not in {None, kind.precision}:
            return False
        if kind.precision in ON_REQUEST and self.precision is None:
            return False
        if self.format != AUTO:
            return kind.format == self.format
        return any((kind.format, kind.precision) in order for order in AUTO_ORDER.values())


@dataclass(frozen=True)
class Choice:
    """The chosen artifacts, all of one kind."""

    artifacts: dict[Fold, Artifact]
    """By fold."""
    reason: str


def find_exported(model_dir: Path, only: Fold | None = None) -> Found:
    """Return the artifacts in the folders of a run's folds, according to their manifests.

    Args:
        only: as in `fold_dirs`.

    Raises:
        UserError: a fold's only artifacts have no manifest.
    """
    found = {}
    for fold, folder in fold_dirs(model_dir, only).items():
        # Manifests, because a file name does not have the format.
        files = {path: read_json(path) for path in sorted(folder.glob("*.json"))}
        manifests = {path: value for path, value in files.items() if is_artifact(value)}
        for path, manifest in manifests.items():
            check_artifact_manifest(path, manifest)
        artifacts = [
            Artifact(folder / manifest["artifact"], manifest) for manifest in manifests.values()
        ]
        found[fold] = [artifact for artifact in artifacts if artifact.path.is_file()]
        if not found[fold]:
            _refuse_without_manifest(folder)
    return found


def _refuse_without_manifest(folder: Path) -> None:
    """Raise a UserError if a fold has an artifact that only lacks its manifest."""
    suffixes = {row.suffix for row in ENGINE_FORMATS.values()}
    for path in sorted(folder.glob("[!.]*")):
        if path.suffix in suffixes:
            read_json(manifest_path(path))


def choose(found: Found, request: Request) -> Choice | None:
    """Choose the best kind that every fold has and that runs here, None if there is none.

    If none runs here, the best one is chosen, so that its engine reports the cause and the fix.

    Args:
        found: folds without an accepted artifact are left out.

    Raises:
        UserError: a format is requested that the artifacts have in several precisions.
    """
    accepted = {
        fold: [artifact for artifact in artifacts if request.accepts(artifact.kind)]
        for fold, artifacts in found.items()
    }
    accepted = {fold: artifacts for fold, artifacts in accepted.items() if artifacts}
    kept = _earlier(accepted, request)
    if kept:
        return kept
    skipped: dict[Kind, str] = {}
    unusable: Choice | None = None
    for device, kind in _candidates(accepted, request):
        of_kind = _of_kind(accepted, kind)
        usable = {
            fold: _usable(artifacts, device, request.trust) for fold, artifacts in of_kind.items()
        }
        if all(usable.values()):
            best = {fold: artifacts[0] for fold, artifacts in usable.items()}
            return Choice(best, _sentence(kind, device, skipped))
        lacking = next(fold for fold in usable if not usable[fold])
        reason = _why_not(lacking, of_kind[lacking], device)
        skipped.setdefault(kind, reason)
        if unusable is None and all(of_kind.values()):
            first = {fold: artifacts[0] for fold, artifacts in of_kind.items()}
            unusable = Choice(first, f"{kind}, although {_cause(reason)}")
    return unusable


def _earlier(accepted: Found, request: Request) -> Choice | None:
    """Return the artifacts of the kind that a run to resume was made with, if they still exist."""
    kinds = {
        artifact.manifest["sha256"]: artifact.kind
        for artifacts in accepted.values()
        for artifact in artifacts
    }
    if request.format != AUTO or not request.earlier or not request.earlier <= kinds.keys():
        return None
    kind = kinds[min(request.earlier)]
    of_kind = _of_kind(accepted, kind)
    if not all(of_kind.values()):
        return None
    artifacts = {
        fold: max(found, key=lambda artifact: artifact.manifest["sha256"] in request.earlier)
        for fold, found in of_kind.items()
    }
    return Choice(artifacts, f"{kind}: the run to resume was made with it")


def _of_kind(found: Found, kind: Kind) -> dict[Fold, list[Artifact]]:
    return {
        fold: [artifact for artifact in artifacts if artifact.kind == kind]
        for fold, artifacts in found.items()
    }


def _candidates(accepted: Found, request: Request) -> Iterator[tuple[str, Kind]]:
    """Yield the kinds that some fold has, with a device for each, the best first."""
    kinds = {artifact.kind for artifacts in accepted.values() for artifact in artifacts}
    # Without a GPU its kinds come last, and are the choice only if there is nothing else.
    devices = ("cuda", "cpu") if has_gpu() else ("cpu", "cuda")
    for device in devices if request.device == "auto" else (request.device,):
        if request.format == AUTO:
            order: tuple[tuple[str, str | None], ...] = AUTO_ORDER[device]
        else:
            order = ((request.format, _only_precision(accepted)),)
        for name, precision in order:
            # Views inside the graph cost no work on the host.
            for tta in dict.fromkeys((request.tta, "none")):
                kind = Kind(name, precision, tta)
                if kind in kinds:
                    yield device, kind


def _only_precision(accepted: Found) -> str | None:
    """Return the precision of all artifacts. Raise UserError if a fold has several."""
    for artifacts in accepted.values():
        if len({artifact.kind.precision for artifact in artifacts}) > 1:
            names = ", ".join(artifact.path.name for artifact in artifacts)
            raise UserError(
                f"{artifacts[0].path.parent} has {names}; choose with --precision, or give a file "
                "name as --format"
            )
    return next((artifacts[0].kind.precision for artifacts in accepted.values()), None)


def _why_not(fold: Fold, artifacts: list[Artifact], device: str) -> str:
    """Return why a fold has no usable artifact of a kind, of which it has these."""
    if not artifacts:
        return f"{fold_name(fold)} has none"
    return unusable_reason(artifacts[0], device) or UNTRUSTED


def _usable(artifacts: list[Artifact], device: str, trust: bool) -> list[Artifact]:
    """Return the artifacts that may run on a device here, the fastest (those for one GPU) first.

    Args:
        trust: whether native code that this user has not exported may.
    """
    usable = [
        artifact
        for artifact in artifacts
        if unusable_reason(artifact, device) is None and (trust or is_trusted(artifact.manifest))
    ]
    return sorted(usable, key=_is_compatible)


def _is_compatible(artifact: Artifact) -> bool:
    options = artifact.manifest.get("options", {})
    return any(options.get(name) for name in ("version_compatible", "hardware_compatible"))


def _sentence(kind: Kind, device: str, skipped: Mapping[Kind, str]) -> str:
    """Return a line on a choice and on the better kinds that it could not be."""
    if not skipped:
        return f"{kind}: the best exported artifact for the {DEVICE_NAMES[device]}"
    causes = [
        f"not {'on a GPU' if other == kind else other}, because {_cause(reason)}"
        for other, reason in skipped.items()
    ]
    return f"{kind} on the {DEVICE_NAMES[device]}: {'; '.join(causes)}"


def _cause(reason: str) -> str:
    """Return the first part of a reason, which is `cause; fix`."""
    return reason.partition("; ")[0]


def unusable_reason(artifact: Artifact, device: str) -> str | None:
    """Return why an artifact cannot run on `cpu` or `cuda` here, None if it probably can.

    It is not loaded, so its engine may still refuse it.
    """
    manifest = artifact.manifest
    row = ENGINE_FORMATS[manifest["format"]]
    if device not in row.devices:
        return f"{row.title} does not run on a {DEVICE_NAMES[device]}"
    if not row.any_device and manifest.get("device", device) != device:
        return f"it was exported for the {DEVICE_NAMES[manifest['device']]}"
    if device == "cuda" and manifest.get("precision") == "bf16" and not _has_bfloat16():
        return f"this GPU has no bfloat16, which takes {FIRST_BFLOAT16} (Ampere) or newer"
    reason = unavailable_reason(manifest["format"], device)
    if reason:
        return reason
    check = MISMATCHES.get(manifest["format"])
    return check(artifact, device) if check else None


def _has_bfloat16() -> bool:
    architecture = gpu_architecture()
    return architecture is None or _number(architecture) >= _number(FIRST_BFLOAT16)


def _number(architecture: str) -> int:
    return int(architecture.removeprefix("sm"))


def _package_mismatch(artifact: Artifact, device: str) -> str | None:
    """Return why an AOTInductor package is not for this machine, None if it is."""
    reason: str | None = import_engine("aoti").mismatch(artifact.manifest, device)
    return f"it {reason}" if reason else None


def _plan_mismatch(artifact: Artifact, device: str) -> str | None:
    """Return why a TensorRT plan is not for this library and GPU, None if it is."""
    path, manifest = artifact.path, artifact.manifest
    module = import_engine(manifest["format"])
    version = module.import_runtime(manifest["format"]).__version__
    try:
        module.check_manifest(path, manifest, version, "export it again")
        built_for = manifest["plan"]["architectures"]
        module.check_architecture(path, built_for, cudart.architecture(), "export it again")
    except UserError as error:
        return str(error)
    return None


MISMATCHES = {
    "aoti": _package_mismatch,
    "tensorrt": _plan_mismatch,
    "tensorrt_rtx": _plan_mismatch,
}
"""Functions that compare an artifact's manifest with this machine, for formats that need it."""
