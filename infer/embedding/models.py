"""Find the exported model of each fold of a training run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infer.engines import manifest_spec
from infer.formats import ENGINE_FORMATS
from isic.layout import fold_dirs
from isic.preprocess import PreprocessSpec
from isic.runtime.errors import UserError
from isic.runtime.files import read_json, read_manifest


@dataclass(frozen=True)
class Models:
    """The exported models of a run, with one preprocessing for all."""

    artifacts: dict[int, Path]
    """By fold."""
    manifests: dict[int, dict[str, Any]]
    """By fold."""
    spec: PreprocessSpec

    @property
    def folds(self) -> list[int]:
        return list(self.artifacts)

    @property
    def first_manifest(self) -> Mapping[str, Any]:
        """One manifest, for the fields that are equal in all."""
        return self.manifests[self.folds[0]]

    @property
    def num_features(self) -> int:
        return int(self.first_manifest["num_features"])

    @property
    def batch_size(self) -> int | None:
        """The batch size that the artifacts were built for, None if any will do."""
        return self.first_manifest.get("batch_size")


def find_models(
    model_dir: Path, config: str, format_or_file: str, precision: str | None = None
) -> Models:
    """Find the exported model of every fold that has one.

    Args:
        format_or_file: a format of artifacts, or the file name of one.
        precision: of the artifact if `format_or_file` is a format; None for any.

    Raises:
        UserError: no fold has one, a fold has several, one belongs to another config or fold, or
            they differ in preprocessing.
    """
    if format_or_file not in ENGINE_FORMATS and Path(format_or_file).name != format_or_file:
        raise UserError(
            f"--format {format_or_file!r} is a path; give a file name in each fold's folder"
        )
    artifacts: dict[int, Path] = {}
    for fold, folder in fold_dirs(model_dir).items():
        path = _find_artifact(folder, format_or_file, precision)
        if path is not None:
            # Absolute, because workers may have another working directory.
            artifacts[fold] = path.resolve()
    if not artifacts:
        raise UserError(_no_artifact(model_dir, config, format_or_file, precision))
    manifests = {fold: read_manifest(path) for fold, path in artifacts.items()}
    for fold, manifest in manifests.items():
        _refuse_other_fold(artifacts[fold], manifest, config, fold)
    # Each image is decoded once for the engines of all folds.
    specs = {manifest_spec(manifest) for manifest in manifests.values()}
    if len(specs) > 1:
        raise UserError(
            f"the folds in {model_dir} differ in their preprocessing; train and export them alike"
        )
    return Models(artifacts, manifests, specs.pop())


def _find_artifact(folder: Path, format_or_file: str, precision: str | None) -> Path | None:
    """Return the artifact in a fold's folder. Raise UserError if there are several."""
    if format_or_file not in ENGINE_FORMATS:
        path = folder / format_or_file
        return path if path.is_file() else None
    found = artifacts_of_format(folder, format_or_file, precision)
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(
            f"{folder} has {names}; choose with --precision, or give a file name as --format"
        )
    return found[0] if found else None


def _refuse_other_fold(path: Path, manifest: Mapping[str, Any], config: str, fold: int) -> None:
    """Raise a UserError if an artifact belongs to another config or fold than its folder."""
    if (manifest["name"], manifest["fold"]) != (config, fold):
        raise UserError(
            f"{path} is fold {manifest['fold']} of {manifest['name']}, "
            f"not fold {fold} of {config}; export it again"
        )


def artifacts_of_format(folder: Path, format_name: str, precision: str | None) -> list[Path]:
    """Return the artifacts of a format in a fold's folder, according to their manifests."""
    # Manifests, because a file name does not have the format.
    manifests = [read_json(path) for path in sorted(folder.glob("*.json"))]
    return [
        folder / manifest["artifact"]
        for manifest in manifests
        if manifest.get("format") == format_name and precision in {None, manifest.get("precision")}
    ]


def _no_artifact(model_dir: Path, config: str, format_or_file: str, precision: str | None) -> str:
    """Return the error message if no fold has an artifact."""
    missing = f"{format_or_file} in {precision}" if precision else format_or_file
    command = f"python -m export --config {config}"
    if format_or_file in ENGINE_FORMATS:
        command += f" --formats {format_or_file}"
    if precision:
        command += f" --precision {precision}"
    return f"{model_dir} has no fold_<k> with {missing}; run `{command}` first"
