"""`python -m infer bundle`: write a bundle and test it."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from infer.ensemble.artifact import ENSEMBLE_FILE, MEMBERS_DIR, Ensemble
from infer.ensemble.blends.artifact import (
    Scorer,
    columns_of,
    ensembles_of,
    needed_part,
    networks_of,
    open_scorer,
)
from infer.ensemble.blends.write import copy_ensemble
from infer.ensemble.boosting.libraries import LIBRARIES
from infer.ensemble.boosting.refit import refuse_without_refit
from infer.ensemble.scoring.chosen import choice_notes
from infer.submission import kaggle
from infer.submission.candidates import Candidate, by_use, candidates_of
from infer.submission.contents import (
    BUNDLE_FILE,
    CODE_DIR,
    ENSEMBLES_DIR,
    FORMAT_VERSION,
    NETWORKS_DIR,
    SCRIPT,
    SITE_DIR,
    describe,
)
from infer.submission.networks import Wanted, find_artifacts, needs_of, pack_network
from infer.submission.rehearsal import FULL_ROWS, Rehearsal, rehearse
from infer.submission.settings import BundleSettings
from isic import __version__, schema
from isic.layout import ALL
from isic.runtime.errors import UserError
from isic.runtime.files import megabytes, new_folder, sha256, write_json
from isic.runtime.installed import TOOLKIT, install, licences, pinned, requirements
from isic.runtime.only_writer import only_writer
from isic.runtime.progress import duration

CODE = Path(__file__).resolve().parents[2]
PACKAGES = ("isic", "infer")
LAUNCHER = Path(__file__).with_name("launcher.py")
OWN_LICENCE = "Apache-2.0"
OF_DATA = "that of the data they were trained on"
"""The licence of networks and ensembles."""


def bundle(settings: BundleSettings) -> None:
    """Run `infer bundle`, which its settings describe."""
    target = settings.output_dir
    if target.exists():
        raise UserError(f"{target} exists already; choose another --output_dir")
    scorer = open_scorer(settings.ensemble)
    scorers = choose_ensembles(scorer, settings)
    candidates = [
        candidate for name, each in scorers.items() for candidate in candidates_of(each, name)
    ]
    own = _own_columns(scorers.values(), settings)
    needs = needs_of(scorer, settings.rows)
    wanted = Wanted(settings.format, settings.precision)
    # All of them before the first is copied and before packages are downloaded.
    artifacts = {
        need.name: (need, find_artifacts(need, settings.runs / need.name, wanted)) for need in needs
    }
    with only_writer(target), new_folder(target) as folder:
        # In the order in which they are to embed.
        networks = [
            pack_network(*artifacts[name], folder / NETWORKS_DIR / name)
            for name in by_use(candidates)
        ]
        for name, each in scorers.items():
            copy_scorer(each, folder / ENSEMBLES_DIR / name)
        copy_code(folder)
        if settings.packages:
            print(f"packages for Python {settings.python}", flush=True)
            install_packages(scorers.values(), settings, folder / SITE_DIR)
        kaggle.write(folder, settings)
        manifest = {
            "format": FORMAT_VERSION,
            "version": __version__,
            "python": settings.python,
            "cuda": settings.cuda,
            "rows": settings.rows,
            "few": settings.few,
            **describe(candidates, networks),
            "licences": _licences(folder),
            "sizes_mb": sizes(folder),
            "files": digests(folder),
        }
        write_json(folder / BUNDLE_FILE, manifest)
        rehearsal = rehearse(folder, settings, synthetic=not own) if settings.test else None
        if rehearsal:
            write_json(folder / BUNDLE_FILE, {**manifest, "rehearsal": rehearsal.to_json()})
    report(target, manifest, candidates, choice_notes(scorer.root.name, scorer.manifest))
    if rehearsal:
        report_rehearsal(rehearsal)


def choose_ensembles(scorer: Scorer, settings: BundleSettings) -> dict[str, Scorer]:
    """Return the ensembles of a bundle by name: the wanted one, then those to fall back on.

    Raises:
        UserError: one cannot score hidden rows, or none does without images.
    """
    scorers = [scorer, *map(open_scorer, settings.fallback)]
    if not any(_works_without_images(each) for each in scorers):
        scorers.append(_find_fallback(scorer))
    networks = networks_of(scorer)
    found: dict[str, Scorer] = {}
    for each in scorers:
        _refuse_unusable(each, networks, settings.rows)
        name = each.root.resolve().name
        if name in found:
            raise UserError(f"two ensembles are called {name}; rename the folder of one of them")
        found[name] = each
    return found


def _own_columns(scorers: Iterable[Scorer], settings: BundleSettings) -> list[str]:
    """Return the columns beyond the challenge's that the features read.

    Raises:
        UserError: there are some, and the bundle's test has no rows with them.
    """
    columns = (name for scorer in scorers for name in columns_of(scorer))
    own = [name for name in columns if name not in schema.DTYPES]
    if own and settings.test and not settings.data:
        raise UserError(
            f"the ensemble reads {own[0]}, which the synthetic rows of the bundle's test lack; add "
            "--data with a test table that has it, or --test false"
        )
    return own


def _works_without_images(scorer: Scorer) -> bool:
    return any(not ensemble.uses_images for ensemble in ensembles_of(scorer))


def _find_fallback(scorer: Scorer) -> Scorer:
    """Return the best ensemble without images beside another one, of the same folds."""
    found = []
    for path in sorted(scorer.root.resolve().parent.glob(f"*/{ENSEMBLE_FILE}")):
        try:
            other = open_scorer(path.parent)
        except UserError:  # of another version, or damaged
            continue
        same_plan = other.manifest["folds_digest"] == scorer.manifest["folds_digest"]
        if same_plan and not other.uses_images and not _tables(other):
            found.append(other)
    if not found:
        raise UserError(
            f"{scorer.root} needs images, and there is no ensemble to fall back on if they fail; "
            "run `python -m infer fit --features engineered` on the same folds, or give --fallback"
        )
    return max(found, key=lambda other: candidates_of(other, "")[0].pauc)


def _tables(scorer: Scorer) -> list[str]:
    needed = ensembles_of(needed_part(scorer))
    return sorted({name for ensemble in needed for name in ensemble.own_tables})


def _refuse_unusable(scorer: Scorer, networks: set[str], rows: str) -> None:
    if _tables(scorer):
        raise UserError(
            f"{scorer.root} needs the tables {', '.join(_tables(scorer))}, which hidden test rows "
            "do not have; fit without --tables"
        )
    others = sorted(networks_of(scorer) - networks)
    if others:
        raise UserError(
            f"{scorer.root} needs {', '.join(others)}, which the ensemble to submit does not; give "
            "a --fallback that needs fewer networks"
        )
    if rows == ALL and scorer.uses_images:
        for ensemble in ensembles_of(needed_part(scorer)):
            refuse_without_refit(ensemble)


def copy_scorer(scorer: Scorer, target: Path) -> None:
    """Copy the files of an ensemble, or of a blend with its members, without reports."""
    if isinstance(scorer, Ensemble):
        copy_ensemble(scorer, target)
        return
    for name, member in scorer.members.items():
        copy_ensemble(member, target / MEMBERS_DIR / name)
    for name in (*scorer.manifest["files"], ENSEMBLE_FILE):
        shutil.copyfile(scorer.root / name, target / name)


def copy_code(folder: Path) -> None:
    """Copy the packages of inference and the script that starts them."""
    ignore = shutil.ignore_patterns("__pycache__")
    for name in PACKAGES:
        shutil.copytree(CODE / name, folder / CODE_DIR / name, ignore=ignore)
    shutil.copyfile(LAUNCHER, folder / SCRIPT)


def install_packages(scorers: Iterable[Scorer], settings: BundleSettings, target: Path) -> None:
    """Install what the base install and the ensembles need, for the other machine."""
    packages = [pinned(name) for name in requirements() if not name.startswith("onnxruntime")]
    packages.append(onnxruntime(settings))
    packages += [pinned(name) for name in _booster_packages(scorers)]
    install(packages, target, settings.python, settings.platform, with_dependencies=True)
    for name in ("bin", "share"):
        shutil.rmtree(target / name, ignore_errors=True)


def onnxruntime(settings: BundleSettings) -> str:
    """Return the requirement of ONNX Runtime for a machine's CUDA."""
    if settings.cuda == "none":
        return pinned("onnxruntime-gpu").replace("-gpu", "")
    (requirement,) = requirements(f"cuda{settings.cuda}").values()
    return requirement if settings.cuda_libraries else requirement.replace("[cuda,cudnn]", "")


def _booster_packages(scorers: Iterable[Scorer]) -> list[str]:
    used = {
        entry["library"]
        for scorer in scorers
        for ensemble in ensembles_of(scorer)
        for entry in ensemble.manifest["boosters"]
    }
    return [LIBRARIES[name].package for name in sorted(used)]


def _licences(folder: Path) -> dict[str, str]:
    own = {TOOLKIT: OWN_LICENCE, "networks and ensembles": OF_DATA}
    return own | licences(folder / SITE_DIR)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def sizes(folder: Path) -> dict[str, float]:
    """Return the megabytes of each entry of a folder."""
    return {path.name: round(megabytes(path), 1) for path in sorted(folder.iterdir())}


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file but those of packages, by path."""
    return {
        path.relative_to(folder).as_posix(): sha256(path)
        for path in _files(folder)
        if path.relative_to(folder).parts[0] != SITE_DIR
    }


def report(
    target: Path, manifest: Mapping[str, Any], candidates: Iterable[Candidate], notes: list[str]
) -> None:
    """Print the content of a bundle."""
    by_part = manifest["sizes_mb"]
    parts = ", ".join(f"{name} {by_part[name]:.1f}" for name in by_part if by_part[name] >= 0.1)
    print(f"bundle: {target}, {sum(by_part.values()):.0f} MB ({parts})")
    for number, candidate in enumerate(candidates):
        print(f"{'falls back on' if number else 'submits'} {candidate}")
    for note in notes:
        print(note)


def report_rehearsal(rehearsal: Rehearsal) -> None:
    """Print the result of a bundle's test."""
    print(
        f"tested as {rehearsal.user} with Python {rehearsal.python}, without network and PyTorch: "
        f"{', '.join(f'{name} {rows} rows' for name, rows in rehearsal.rows.items())}"
    )
    for name, rate in rehearsal.images_per_second.items():
        hours = duration(FULL_ROWS / rate)
        print(f"{name}: {rate:.0f} images/s here, {hours} for {FULL_ROWS:,} images")
