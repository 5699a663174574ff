"""Fixtures: two exported networks, ensembles with none, one and both of them, and their bundle."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from infer.submission.make import bundle
from infer.submission.settings import BundleSettings
from isic.runtime.files import manifest_path, read_json, write_json
from tests.support.commands import run_module

NETWORKS = ("tiny", "tiny_b")
FIT = ("--seeds", 1, "--num_rounds", 20, "--num_threads", 1)


@dataclass(frozen=True)
class Project:
    """Folders of a small project."""

    data: Path
    runs: Path
    embeddings: Path
    ensembles: Path

    def settings(self, out: Path, ensemble: str = "final", **more: object) -> BundleSettings:
        """Return the settings of a bundle without packages that is not tested."""
        values = {
            "ensemble": self.ensembles / ensemble,
            "output_dir": out,
            "runs": self.runs,
            "packages": False,
            "test": False,
        }
        return BundleSettings.model_validate(values | more)

    def bundle(self, out: Path, ensemble: str = "final", **more: object) -> Path:
        bundle(self.settings(out, ensemble, **more))
        return out


@pytest.fixture(scope="session")
def project(
    exported: Path, synth_dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> Project:
    root = tmp_path_factory.mktemp("submission")
    found = Project(synth_dataset, root / "runs", root / "embeddings", root / "ensembles")
    for name in NETWORKS:
        _copy_run(exported, found.runs / name)
        where = ("--model_dir", found.runs / name, "--data", synth_dataset)
        run_module("infer", "embed", "--config", name, *where, "--out", found.embeddings)
    for name, features, networks in (
        ("tables", "engineered", NETWORKS[:1]),
        ("one", "multimodal", NETWORKS[:1]),
        ("both", f"multimodal,-image_score_patient_diff.{NETWORKS[1]}", NETWORKS),
    ):
        roots = ",".join(str(found.embeddings / network) for network in networks)
        flags = ("--name", name, "--features", features, "--embeddings", roots, *FIT)
        run_module("infer", "fit", "--data", synth_dataset, "--out", found.ensembles, *flags)
    members = [found.ensembles / name for name in ("tables", "one", "both")]
    flags = ("--data", synth_dataset, "--out", found.ensembles, "--name", "final")
    run_module("infer", "blend", *members, *flags)
    return found


def _copy_run(run: Path, target: Path) -> None:
    """Copy a run under another name."""
    shutil.copytree(run, target, ignore=shutil.ignore_patterns("embeddings"))
    for path in target.glob("fold_*/model.onnx"):
        manifest = manifest_path(path)
        write_json(manifest, {**read_json(manifest), "name": target.name})


@pytest.fixture(scope="session")
def made(project: Project) -> Path:
    """A bundle of the blend. Copy it before a change."""
    return project.bundle(project.runs.parent / "bundle")
