"""The fields of an exported artifact's manifest that engines and commands read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from infer.formats import ENGINE_FORMATS
from isic.preprocess import PreprocessSpec
from isic.runtime.fields import Count, Fields, FileName, Index, check_fields
from isic.runtime.files import manifest_path, read_manifest
from isic.views import Tta

EXPORT_AGAIN = "export it again"


class MadeFrom(Fields):
    """The checkpoint or the weights of an artifact."""

    sha256: str


class PlanFields(Fields):
    """The TensorRT and the GPU that a plan was built for."""

    version: str
    architectures: list[str]
    version_compatible: bool
    cuda_graph: bool


class ArtifactFields(Fields):
    """The fields of a manifest; those that earlier versions did not write have defaults."""

    artifact: FileName
    sha256: str
    format: str
    name: str
    fold: Index | Literal["all", "none"]
    num_features: Count
    preprocess: PreprocessSpec
    folds_digest: str | None = None
    trained_on: str | None = None
    precision: str | None = None
    tta: Tta = "none"
    device: str = "cpu"
    batch_size: Count | None = None
    max_batch: Count | None = None
    images_per_second: float | None = None
    architecture: str | None = None
    cpu_features: list[str] = Field([])
    num_classes: Count | None = None
    mask_stride: Count | None = None
    aux: dict[str, str] = Field({})
    options: dict[str, Any] = Field({})
    versions: dict[str, str] = Field({})
    parity: dict[str, Any] | None = None
    pretrained: dict[str, Any] | None = None
    made_from: MadeFrom = Field(default_factory=lambda: MadeFrom(sha256=""))
    plan: PlanFields | None = None
    model: str = ""

    @model_validator(mode="after")
    def _has_fields_of_format(self) -> Self:
        if self.format == "aoti" and None in (self.architecture, self.max_batch):
            raise ValueError("a package needs architecture and max_batch")
        return self


def is_artifact(manifest: Mapping[str, Any]) -> bool:
    """Return whether a JSON object is the manifest of an artifact that an engine runs."""
    name = manifest.get("format")
    return isinstance(name, str) and name in ENGINE_FORMATS


def check_artifact_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raise a UserError if a field of a manifest, read from `path`, is missing or damaged."""
    check_fields(path, manifest, ArtifactFields, EXPORT_AGAIN)


def read_artifact_manifest(artifact: Path) -> dict[str, Any]:
    """Read and check the manifest of an artifact, and the artifact's sha256.

    Raises:
        UserError: no artifact, no manifest, a damaged one, or one of other bytes.
    """
    manifest = read_manifest(artifact)
    if is_artifact(manifest):
        check_artifact_manifest(manifest_path(artifact), manifest)
    return manifest
