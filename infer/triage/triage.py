"""`python -m infer triage`: a page per patient and an index, as HTML files without scripts."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import polars as pl
from numpy.typing import NDArray

from infer.embedding.image_embedder import ImageEmbedder
from infer.embedding.store import scan_embeddings
from infer.ensemble.artifact import ENSEMBLE_FILE
from infer.ensemble.blends.artifact import Scorer, ensembles_of, needed_part, open_scorer
from infer.ensemble.boosting.libraries import NoContributions
from infer.ensemble.drift import drift_warning
from infer.ensemble.features.own_tables import read_test_tables
from infer.ensemble.predict import TestTable, choose_models, drift_of, score_rows
from infer.ensemble.settings import HOW_TO_SCORE, SOURCES, EmbeddingSources
from infer.explain.explain import safe_names
from infer.report.cases import Picture, pictures
from infer.report.occlusion import Network, draw_maps, open_network
from infer.report.write import REPORT_STYLE
from infer.triage.header import model_facts
from infer.triage.index_page import index_page
from infer.triage.patient_page import Shown, patient_page
from infer.triage.patients import Patient, choose_patients
from infer.triage.reasons import PatientRows, find_reasons
from infer.triage.rows import ScoredRows, read_out_of_fold, read_test
from infer.triage.settings import TriageSettings
from isic import schema
from isic.dataset import Dataset
from isic.folds import read_folds
from isic.images import ImageStore
from isic.layout import ALL, FOLDS_FILE, Fold
from isic.metadata import with_patient
from isic.runtime.errors import UserError, warn
from isic.runtime.files import (
    atomic_path,
    holds,
    manifest_path,
    read_json,
    refuse_foreign,
    sha256,
    versions,
    write_manifest,
    write_text,
)
from isic.runtime.only_writer import only_writer
from isic.tables import reading

TRIAGE_STYLE = Path(__file__).with_name("triage.css")
# Larger than in CSS pixels, for screens of high density.
LARGE = 192
SMALL = 72
"""Sides of the pictures in pixels."""


def triage(settings: TriageSettings) -> None:
    """Run `infer triage`, which its settings describe."""
    refuse_other_name(settings.output)
    dataset = Dataset(settings.data)
    scorer = open_models(settings)
    fold: Fold | None = ALL if settings.rows == "all" else None
    network = open_network(scorer, settings.maps, settings.trust, fold) if settings.maps else None
    rows = read_rows(settings, dataset, scorer)
    patients = choose_patients(rows, settings.patient, settings.max_patients)
    names = _page_names(settings.output, patients)
    _refuse_foreign(settings.output, names.values())
    images = dataset.find_images(settings.split)
    if images is None:
        warn(f"{settings.data} has no {settings.split} images; the pages are without pictures")
    drift = _drift(rows, dataset) if settings.split == "test" else None
    counts = len(rows.metadata), with_patient(rows.metadata)[schema.PATIENT].n_unique()
    style = "".join(path.read_text(encoding="utf-8") for path in (REPORT_STYLE, TRIAGE_STYLE))
    back = quote(f"../{settings.output.name}")
    model = model_facts(scorer, settings.rows, settings.prevalence)
    features = _read_features(settings, patients)
    has_reasons = _has_reasons(rows)
    with only_writer(settings.output), _opened(network) as embedder:
        # One at a time: a page has the pictures of all of a patient's lesions.
        texts = (
            patient_page(
                model,
                patient,
                _show(rows, patient, images, features, network, embedder, has_reasons),
                counts[0],
                back,
                style,
            )
            for patient in patients
        )
        _write(
            settings.output,
            index_page(model, patients, names, counts, drift, style),
            zip(names.values(), texts, strict=True),
            list(names.values()),
            {
                "ensemble": sha256(scorer.root / ENSEMBLE_FILE),
                **settings.model_dump(include={"split", *HOW_TO_SCORE}),
            },
        )
    print(f"triage: {settings.output} ({len(patients):,} of {counts[1]:,} patients have a page)")
    if drift is not None and drift_warning(drift):
        warn(f"{drift_warning(drift)}; see {settings.output}")


def _page_names(output: Path, patients: Sequence[Patient]) -> dict[str, str]:
    """Return the path of each patient's page, relative to the index, by name."""
    safe = safe_names([patient.name for patient in patients])
    return {name: f"{output.with_suffix('').name}/{file}.html" for name, file in safe.items()}


def _write(
    output: Path,
    index: str,
    pages: Iterable[tuple[str, str]],
    names: Sequence[str],
    facts: Mapping[str, Any],
) -> None:
    """Write the index, the pages and a manifest of both, and remove an earlier run's other pages.

    Args:
        pages: path and text of each page.
        names: the paths.
        facts: more fields of the manifest.
    """
    stale = _earlier_pages(output) - {*names}
    facts = {**facts, "versions": versions("isic-toolkit", "numpy", "polars")}
    with atomic_path(output) as temporary:
        temporary.write_text(index, encoding="utf-8")
        # The manifest comes before the files get their names: it shows that they are this
        # command's own, so a run that is killed in between can be repeated.
        write_manifest(output, temporary, pages=sorted({*names, *stale}), **facts)
        for name, text in pages:
            write_text(output.parent / name, text)
    for name in stale:
        (output.parent / name).unlink(missing_ok=True)
    if stale:
        write_manifest(output, pages=sorted(names), **facts)


def refuse_other_name(output: Path) -> None:
    """Raise a UserError if the output is not called like an HTML file."""
    if output.suffix != ".html":
        raise UserError(f"--output names an HTML file such as triage.html, not {output}")


def open_models(settings: TriageSettings) -> Scorer:
    """Open the ensemble, for new rows with the models that the settings choose."""
    scorer = open_scorer(settings.ensemble)
    if settings.split == "train":
        return scorer  # an out-of-fold score may weigh every member
    return choose_models(scorer, settings, _scored_sources(settings, scorer))


def read_rows(settings: TriageSettings, dataset: Dataset, scorer: Scorer) -> ScoredRows:
    """Read the rows of the split, new ones with the scores of `infer predict`.

    Args:
        scorer: the result of `open_models`.
    """
    metadata = dataset.metadata(settings.split).sort(schema.ID)
    own_tables = read_test_tables(settings.tables, scorer.own_tables)
    threads = settings.num_threads
    if settings.split == "train":
        return read_out_of_fold(scorer, metadata, settings.sources, own_tables, threads)
    sources = _scored_sources(settings, scorer)
    path = dataset.metadata_path("test")
    found = score_rows(scorer, settings, sources, metadata, own_tables, path)
    return read_test(found, scorer, metadata, sources, own_tables, threads)


def _scored_sources(settings: TriageSettings, scorer: Scorer) -> EmbeddingSources:
    """Return the embeddings that scores need; the pages only draw those of other networks."""
    needed = [*ensembles_of(needed_part(scorer))]
    return EmbeddingSources(
        **{
            flag: getattr(settings, flag)
            for flag in SOURCES
            if any(ensemble.manifest[flag] for ensemble in needed)
        }
    )


def _refuse_foreign(output: Path, pages: Iterable[str]) -> None:
    """Raise a UserError if a file would be replaced that `infer triage` did not write."""
    manifest = manifest_path(output)
    refuse_foreign([output, manifest], _is_own(output), "--output")
    earlier = _earlier_pages(output)
    for page in pages:
        refuse_foreign([output.parent / page], page in earlier, "--output")
    folder = output.with_suffix("")
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"{folder}, the folder of the pages, is a file; choose another --output")


def _is_own(output: Path) -> bool:
    return holds(manifest_path(output), "artifact", "ensemble", "pages")


def _earlier_pages(output: Path) -> set[str]:
    """Return the pages of an earlier run."""
    return set(read_json(manifest_path(output))["pages"]) if _is_own(output) else set()


def _has_reasons(rows: ScoredRows) -> bool:
    """Return whether the scores can be explained; warn if not."""
    try:
        for member in rows.members.values():
            member.refuse_unexplained()
    except NoContributions as error:
        warn(f"{error}; the pages are without reasons")
        return False
    return True


def _drift(rows: ScoredRows, dataset: Dataset) -> pl.DataFrame:
    path = dataset.metadata_path("test")
    table = TestTable(dataset, path, rows.metadata, rows.metadata.select(schema.ID))
    return drift_of(rows.scorer, table, rows.score, rows.own)


@contextmanager
def _opened(network: Network | None) -> Iterator[ImageEmbedder | None]:
    if network is None:
        yield None
        return
    with network.open() as embedder:
        yield embedder


def _show(
    rows: ScoredRows,
    patient: Patient,
    images: ImageStore | None,
    features: pl.DataFrame | None,
    network: Network | None,
    embedder: ImageEmbedder | None,
    has_reasons: bool,
) -> Shown:
    """Return the pictures and explanations of a patient's lesions."""
    first = patient.names[: patient.num_first]
    of_patient = rows.of_row(patient.index[0])
    facts = PatientRows(of_patient, patient.index, of_patient.scorer.training)
    maps = {}
    if network and embedder and images and of_patient.uses_network(network.name):
        maps = draw_maps(embedder, images, network.folds_of(first, rows.split), LARGE)
    return Shown(
        reasons=find_reasons(facts, range(patient.num_first)) if has_reasons else None,
        pictures=_pictures(images, patient) if images else {},
        maps=maps,
        features=None if features is None else _features_of(features, patient),
        probability=None if rows.probability is None else rows.probability[patient.index],
    )


def _pictures(images: ImageStore, patient: Patient) -> dict[str, Picture]:
    first, others = patient.names[: patient.num_first], patient.names[patient.num_first :]
    return pictures(images, first, LARGE) | (pictures(images, others, SMALL) if others else {})


def _read_features(settings: TriageSettings, patients: Sequence[Patient]) -> pl.DataFrame | None:
    """Return `isic_id` and `features` of the patients' lesions by the first network, if any.

    Those of a train image are by the model that held it out, those of a test image by the first
    fold's. A frozen network has learned from neither: its first fold's model makes both.
    """
    roots = (*settings.embeddings, *settings.frozen)
    if not roots:
        return None
    stored = scan_embeddings(roots[0], settings.split, ["features"])
    # Of all patients at once: a scan reads the embeddings of all images.
    wanted = pl.concat(patient.metadata.select(schema.ID) for patient in patients)
    if settings.split == "train" and settings.embeddings:
        # A run may hold every image by every fold's model.
        wanted = wanted.with_columns(read_folds(roots[0] / FOLDS_FILE).find(wanted).alias("fold"))
    with reading(roots[0]):
        return (
            wanted.lazy()
            .join(stored, on=wanted.columns)
            # Of a test image there is a row per fold.
            .sort("fold")
            .unique(schema.ID, keep="first")
            .select(schema.ID, "features")
            .collect()
        )


def _features_of(features: pl.DataFrame, patient: Patient) -> NDArray[np.float32] | None:
    """Return [n, D] the embeddings of a patient's lesions, NaN for an unreadable image.

    None if no image is readable.
    """
    ids = patient.metadata.select(schema.ID)
    table = ids.join(features, on=schema.ID, how="left", maintain_order="left")
    known = table["features"].is_not_null()
    if not known.any():
        return None
    values = table["features"].filter(known).to_numpy().astype(np.float32)
    found = np.full((len(table), values.shape[1]), np.nan, np.float32)
    found[known.to_numpy()] = values
    return found
