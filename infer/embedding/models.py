"""Find the exported model of each fold of a training run."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from infer.embedding.choice import Found, Kind, Request, choose, find_exported
from infer.engines import device_of, manifest_spec, network_command
from infer.engines.contract import AUX
from infer.engines.manifest import is_artifact, read_artifact_manifest
from infer.formats import AUTO, ENGINE_FORMATS
from infer.trust import refuse_untrusted
from isic.layout import (
    ALL,
    BEST_CHECKPOINT,
    LAST_CHECKPOINT,
    NONE,
    Fold,
    fold_files,
    fold_name,
    is_backbone,
)
from isic.preprocess import PreprocessSpec
from isic.runtime.errors import UserError, warn
from isic.runtime.files import manifest_path, read_json


@dataclass(frozen=True)
class Models:
    """The exported models of a run, with one preprocessing for all."""

    artifacts: dict[Fold, Path]
    """By fold."""
    manifests: dict[Fold, dict[str, Any]]
    """By fold."""
    spec: PreprocessSpec
    reason: str | None = None
    """The kind of the artifacts and why they were chosen; None if they were named."""

    @property
    def folds(self) -> list[Fold]:
        return list(self.artifacts)

    @property
    def first_manifest(self) -> Mapping[str, Any]:
        """One manifest, for the fields that are equal in all."""
        return self.manifests[self.folds[0]]

    @property
    def is_backbone(self) -> bool:
        """Whether it is a backbone without a lesion head, which belongs to no fold plan."""
        return self.folds == [NONE]

    @property
    def holds_out(self) -> bool:
        """Whether the networks are of folds, which hold out rows of their training table."""
        return not {ALL, NONE} & {*self.folds}

    @property
    def weights(self) -> dict[str, Any]:
        """Source and digests of the weights that each network started from, by fold.

        A fold whose artifact is of an earlier version lacks them.
        """
        found = {str(fold): manifest.get("pretrained") for fold, manifest in self.manifests.items()}
        return {fold: weights for fold, weights in found.items() if weights}

    @property
    def num_features(self) -> int:
        return int(self.first_manifest["num_features"])

    @property
    def aux(self) -> dict[str, str]:
        """The definitions of the auxiliary targets by name, in the order of the outputs."""
        return dict(self.first_manifest.get(AUX, {}))

    @property
    def engines(self) -> dict[str, str]:
        """The digests of the artifacts by fold, as JSON has them."""
        return {str(fold): manifest["sha256"] for fold, manifest in self.manifests.items()}

    @property
    def checkpoints(self) -> dict[str, str]:
        """The digests of the checkpoints behind the artifacts by fold, as JSON has them."""
        return {
            str(fold): manifest.get("made_from", manifest)["sha256"]
            for fold, manifest in self.manifests.items()
        }

    @property
    def batch_size(self) -> int | None:
        """The batch size that the artifacts were built for, None if any will do."""
        return self.first_manifest.get("batch_size")

    @property
    def tta(self) -> str:
        """The views inside the graph, over which the outputs are means; `none` for none."""
        return str(self.first_manifest.get("tta", "none"))

    def host_tta(self, tta: str) -> str:
        """Return the views that must be made on the host to average over those of `tta`."""
        return "none" if self.tta == tta else tta


def find_models(
    model_dir: Path,
    config: str,
    format_or_file: str,
    precision: str | None = None,
    tta: str = "none",
    device: str = "auto",
    earlier: frozenset[str] = frozenset(),
    fold: Fold | None = None,
    trust: bool = False,
) -> Models:
    """Find the exported model of every fold that has one.

    Args:
        format_or_file: a format of artifacts, AUTO, or the file name of one.
        precision: of the artifact if `format_or_file` is no file name; None for any.
        tta: the views to average over, in the graph or on the host.
        device: `cpu`, `cuda` or `auto`.
        earlier: digests of the artifacts that a run to resume was made with, which AUTO keeps.
        fold: the only fold to look at; None for all that have a number, or for NONE if the run is
            a backbone.
        trust: whether to load native code that this user has not exported.

    Raises:
        UserError: no fold has one, a fold has several, one belongs to another config, fold or
            checkpoint, or averages over other views, or they differ in preprocessing, network or
            auxiliary targets.
    """
    fold = _fold_or_backbone(model_dir, fold)
    if format_or_file in (AUTO, *ENGINE_FORMATS):
        request = Request(format_or_file, precision, tta, device, earlier, trust)
        found = find_exported(model_dir, fold)
        choice = choose(found, request)
        if choice is None:
            raise UserError(_none_chosen(model_dir, config, found, request, fold))
        paths = {k: artifact.path for k, artifact in choice.artifacts.items()}
        reason = choice.reason if format_or_file == AUTO else None
    else:
        paths, reason = _named_files(model_dir, config, format_or_file, fold), None
    # Absolute, because workers may have another working directory.
    artifacts = {k: path.resolve() for k, path in paths.items()}
    manifests = {k: read_artifact_manifest(path) for k, path in artifacts.items()}
    for k, manifest in manifests.items():
        _refuse_other_fold(artifacts[k], manifest, config, k)
        _refuse_other_views(artifacts[k], manifest, tta)
        _refuse_earlier(artifacts[k], manifest)
    _refuse_other_targets(model_dir, manifests)
    refuse_untrusted({artifacts[k]: manifests[k] for k in artifacts}, trust)
    # Each image is decoded once for the engines of all folds.
    specs = {manifest_spec(manifest) for manifest in manifests.values()}
    networks = {(each.get("model"), each["num_features"]) for each in manifests.values()}
    if len(specs) > 1 or len(networks) > 1:
        what = "preprocessing" if len(specs) > 1 else "network"
        raise UserError(
            f"the folds in {model_dir} differ in their {what}; train and export them alike"
        )
    return Models(artifacts, manifests, specs.pop(), reason)


def open_artifact(path: Path, tta: str = "none", trust: bool = False) -> Models:
    """Return the model of one fold by the path of its artifact.

    Args:
        tta: the views to average over, in the graph or on the host.
        trust: whether to load native code that this user has not exported.

    Raises:
        UserError: there is no artifact or no manifest, the manifest is of other bytes or of another
            file than an artifact, the graph averages over other views, it is of an earlier
            checkpoint, or it is not trusted.
    """
    manifest = read_artifact_manifest(path)
    if not is_artifact(manifest):
        raise UserError(
            f"{path} is not an exported artifact; give one, such as model.onnx, or the run's folder"
        )
    _refuse_other_views(path, manifest, tta)
    _refuse_earlier(path, manifest)
    refuse_untrusted({path: manifest}, trust)
    fold = manifest["fold"]
    return Models({fold: path.resolve()}, {fold: manifest}, manifest_spec(manifest))


def config_of(model_dir: Path, fold: Fold | None = None) -> str:
    """Return the config that a run's artifacts name; without any, the name of the folder."""
    for artifacts in find_exported(model_dir, _fold_or_backbone(model_dir, fold)).values():
        for artifact in artifacts:
            return str(artifact.manifest["name"])
    return model_dir.resolve().name


def _fold_or_backbone(model_dir: Path, fold: Fold | None) -> Fold | None:
    """Return the fold to look at; NONE if none is given and the run is a backbone."""
    return NONE if fold is None and is_backbone(model_dir) else fold


def _named_files(model_dir: Path, config: str, name: str, fold: Fold | None) -> dict[Fold, Path]:
    """Return the file of a name by fold. Raise UserError if it is a path or no fold has one."""
    if Path(name).name != name:
        raise UserError(f"--format {name!r} is a path; give a file name in each fold's folder")
    found = fold_files(model_dir, name, fold)
    if not found:
        command = _export_command(config, fold)
        raise UserError(f"{model_dir} has no {_folders(fold)} with {name}; run `{command}` first")
    return found


def _refuse_other_fold(path: Path, manifest: Mapping[str, Any], config: str, fold: Fold) -> None:
    """Raise a UserError if an artifact belongs to another config or fold than its folder."""
    if (manifest["name"], manifest["fold"]) != (config, fold):
        raise UserError(
            f"{path} is fold {manifest['fold']} of {manifest['name']}, "
            f"not fold {fold} of {config}; export it again"
        )


def _refuse_earlier(artifact: Path, manifest: Mapping[str, Any]) -> None:
    """Raise a UserError if the fold was trained again since an artifact was exported, or is now."""
    checkpoint = artifact.with_name(BEST_CHECKPOINT)
    if artifact.with_name(LAST_CHECKPOINT).is_file() and not checkpoint.is_file():
        raise UserError(
            f"{artifact} was exported before {artifact.parent} was trained again, which is not "
            "finished; finish it with --resume and export it again"
        )
    record = manifest_path(checkpoint)
    made_from = manifest.get("made_from", {}).get("sha256")
    if made_from and record.is_file() and read_json(record).get("sha256") != made_from:
        raise UserError(
            f"{artifact} was exported before {checkpoint.name} was trained again; export it again"
        )


def _refuse_other_views(path: Path, manifest: Mapping[str, Any], tta: str) -> None:
    """Raise a UserError if an artifact averages over other views than the requested ones."""
    inside = manifest.get("tta", "none")
    if inside not in {"none", tta}:
        raise UserError(
            f"the outputs of {path} are means over the views of {inside}; add --tta {inside}, or "
            "choose another --format"
        )


def _refuse_other_targets(model_dir: Path, manifests: Mapping[Fold, Mapping[str, Any]]) -> None:
    """Raise a UserError if the folds differ in their auxiliary targets."""
    first, *others = manifests
    for fold in others:
        # As lists, because the order is that of the outputs.
        found = [list(manifests[each].get(AUX, {}).items()) for each in (first, fold)]
        if found[0] != found[1]:
            raise UserError(
                f"{fold_name(first)} and {fold_name(fold)} in {model_dir} differ in their "
                "auxiliary targets; train and export them alike"
            )


def _none_chosen(
    model_dir: Path, config: str, found: Found, request: Request, fold: Fold | None
) -> str:
    """Return the error message if no artifact can be chosen."""
    command = _export_command(config, fold)
    name = "an exported model"
    if request.format != AUTO:
        command += f" --formats {request.format}"
        name = request.format
    if request.precision:
        command += f" --precision {request.precision}"
        name += f" in {request.precision}"
    kinds = {artifact.kind for artifacts in found.values() for artifact in artifacts}
    kinds = {kind for kind in kinds if request.format in {AUTO, kind.format}}
    names = ", ".join(sorted(map(str, kinds)))
    if any(map(request.accepts, kinds)):
        return f"no fitting one of {names} is in every fold of {model_dir}; run `{command}` first"
    only = f" for these flags, only {names}" if names else ""
    flags = sorted(filter(None, (_flags_for(kind, request) for kind in kinds)))
    fix = f"use {' or '.join(flags)}, or run `{command}`" if flags else f"run `{command}` first"
    return f"{model_dir} has no {_folders(fold)} with {name}{only}; {fix}"


def _flags_for(kind: Kind, request: Request) -> str:
    """Return the flags that make a request accept a kind; none if it asks for another precision."""
    views = request.tta if kind.tta == "none" else kind.tta
    fitting = replace(request, precision=kind.precision, tta=views)
    if request.precision not in {None, kind.precision} or not fitting.accepts(kind):
        return ""
    wanted = {"precision": kind.precision, "tta": views}
    return " ".join(f"--{k} {wanted[k]}" for k in wanted if wanted[k] != getattr(request, k))


def _export_command(config: str, fold: Fold | None) -> str:
    """Return the command that exports the networks of a config, without flags of a format."""
    if fold == NONE:  # without an artifact, its model and weights are not known here
        return f"python -m export --model <model> --pretrained <weights> --name {config}"
    return f"python -m export --config {config}" + ("" if fold is None else f" --fold {fold}")


def _folders(fold: Fold | None) -> str:
    return "fold_<k>" if fold is None else fold_name(fold)


def choose_device(models: Models, device: str, uses_ray: bool) -> str:
    """Return the device of all processes; with Ray the given one, because nodes may differ."""
    if uses_ray:
        return device
    chosen = device_of(models.first_manifest, device)
    if chosen == "cpu":
        for manifest in models.manifests.values():
            _warn_of_other_cpu(manifest)
    return chosen


def _warn_of_other_cpu(manifest: Mapping[str, Any]) -> None:
    """Warn if an int8 artifact passed the parity check on another CPU architecture."""
    # Integer products are exact on every CPU, but libraries may scale activations differently.
    checked_on = ((manifest.get("parity") or {}).get("cpu") or {}).get("architecture")
    here = platform.machine()
    if manifest.get("precision") == "int8" and checked_on not in {None, here}:
        flag = f" --fold {ALL}" if manifest["fold"] == ALL else ""
        warn(
            f"fold {manifest['fold']} in int8 was checked on {checked_on}, this is {here}; run "
            f"`{network_command(manifest)}{flag} --precision int8 --check` here",
        )
