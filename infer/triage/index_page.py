"""The index of a triage: the patients, the model, and how the data differ from training."""

from collections.abc import Mapping, Sequence
from urllib.parse import quote

import polars as pl

from infer.ensemble.drift import ALL_COLUMNS, drift_warning
from infer.triage.header import MODEL, caveat
from infer.triage.patient_page import score_text
from infer.triage.patients import Patient
from isic.html import page
from isic.html.markup import Markup, tag


def index_page(
    model: Mapping[str, str],
    patients: Sequence[Patient],
    pages: Mapping[str, str],
    counts: tuple[int, int],
    drift: pl.DataFrame | None,
    style: str,
) -> str:
    """Return the HTML of the index.

    Args:
        model: the result of `model_facts`.
        pages: relative path of each patient's page by name.
        counts: lesions and patients of the split.
        drift: differences from training, see `measure_drift`; None for training rows.
    """
    num_rows, num_patients = counts
    lead = f"{len(patients):,} of {num_patients:,} patients with {num_rows:,} lesions."
    sections = {
        "Patients": page.section("patients", "Patients", _patients(patients, pages, num_rows)),
        "Model": page.section("model", "The model", page.facts(model)),
    }
    if drift is not None:
        content = _drift(drift)
        sections["Drift"] = page.section("drift", "Differences from training", *content)
    header = tag(
        "header",
        tag("p", "Triage", class_="over"),
        tag("h1", model[MODEL]),
        tag("p", lead, class_="lead"),
        caveat(model),
        page.links(sections),
    )
    return page.document("Triage", header, tag("main", *sections.values()), style=style)


def _patients(patients: Sequence[Patient], pages: Mapping[str, str], num_rows: int) -> Markup:
    heading = ("patient", "lesions", "highest score", "rank", "outside experience")
    rows = [
        (
            tag("a", patient.name, href=quote(pages[patient.name])),
            f"{len(patient.index):,}",
            score_text(patient.score[0]),
            f"{patient.rank[0]:,}",
            str(len(patient.unfamiliar) or page.NONE),
        )
        for patient in patients
    ]
    return page.table(
        f"By highest score, and its rank among all {num_rows:,} scores", heading, rows
    )


def _drift(drift: pl.DataFrame) -> list[Markup]:
    columns = drift.filter(pl.col("column") != ALL_COLUMNS)
    differing = columns.filter("differs").sort("errors", descending=True)
    warning = drift_warning(columns)
    if warning is None:
        text = "No column differs from training by more than chance explains."
        return [tag("p", text, *_told_apart(drift))]
    heading = ("column", "standard errors", "KS", "PSI", "unseen", "blank", "blank in training")
    rows = [
        (
            row["column"],
            f"{row['errors']:.1f}",
            *(page.NONE if row[key] is None else f"{row[key]:.2f}" for key in ("ks", "psi")),
            *(
                page.NONE if row[key] is None else page.percent(row[key], 1)
                for key in ("unseen", "blank", "blank_trained")
            ),
        )
        for row in differing.to_dicts()
    ]
    intro = tag("p", f"{warning[0].upper()}{warning[1:]}.", *_told_apart(drift))
    return [intro, page.table("Columns that differ", heading, rows)]


def _told_apart(drift: pl.DataFrame) -> list[str]:
    """Return a sentence on the classifier of these against training rows, if it was fitted."""
    return [
        f" A classifier {'tells' if differs else 'does not tell'} these rows from training rows: "
        f"its AUC is {auc:.2f}, and chance is 0.5."
        for auc, differs in drift.filter(pl.col("column") == ALL_COLUMNS)
        .select("auc", "differs")
        .iter_rows()
    ]
