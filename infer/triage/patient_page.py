"""The page of a patient: the lesions to look at first and why, and all others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infer.ensemble.images.networks import listed
from infer.report.case_cards import photo
from infer.report.cases import Picture
from infer.report.occlusion import MapPicture
from infer.report.sections import MAP_KEY
from infer.triage.charts import body_figure, embedding_figure
from infer.triage.header import caveat
from infer.triage.patients import Patient
from infer.triage.reasons import Reason
from isic.features.formulas import LOCATION, SITE
from isic.html import page
from isic.html.markup import Markup, tag

SECTIONS = ("First", "Overview", "Others", "Model")
SHOWN = {
    "Place": ((LOCATION, SITE), ""),
    "Diameter": (("clin_size_long_diam_mm",), " mm"),
}
"""Label, columns of which the first that is known is shown, and unit."""


@dataclass(frozen=True)
class Shown:
    """The pictures and explanations of a patient's lesions."""

    reasons: Sequence[Sequence[Reason]] | None
    """Of the lesions to look at first; None if the scores cannot be explained."""
    pictures: Mapping[str, Picture] = field(default_factory=dict)
    """By id; empty if the dataset has no images."""
    maps: Mapping[str, MapPicture] = field(default_factory=dict)
    """Occlusion maps by id."""
    features: NDArray[np.float32] | None = None
    """[n, D] embeddings, NaN for unreadable images."""
    probability: NDArray[np.float64] | None = None
    """[n] calibrated probabilities."""


def patient_page(
    model: Mapping[str, str],
    patient: Patient,
    shown: Shown,
    num_rows: int,
    index: str,
    style: str,
) -> str:
    """Return the HTML of a patient's page.

    Args:
        model: the result of `model_facts`.
        num_rows: lesions of all patients, which the scores are compared with.
        index: relative URL of the page that lists the patients.
    """
    first = [_card(patient, shown, place, num_rows) for place in range(patient.num_first)]
    title = f"Patient {patient.name}"
    body = [
        page.section(
            SECTIONS[0],
            "To look at first",
            tag("p", _first_text(patient, shown)),
            *([tag("p", *MAP_KEY)] if shown.maps else []),
            tag("ol", *first, class_="cases"),
        ),
        page.section(SECTIONS[1], "Among the patient's lesions", _figures(patient, shown)),
        page.section(SECTIONS[2], "The other lesions", *_others(patient, shown)),
        page.section(SECTIONS[3], "The model", page.facts(model)),
    ]
    back = tag("a", "All patients", href=index)
    header = tag(
        "header",
        tag("p", back, class_="over"),
        tag("h1", title),
        tag("p", _lead(patient), class_="lead"),
        caveat(model),
        *_unfamiliar(patient),
        page.links(SECTIONS),
    )
    return page.document(f"{title}: triage", header, tag("main", *body), style=style)


def _lead(patient: Patient) -> str:
    facts = [f"{len(patient.index):,} lesion{'s' if len(patient.index) > 1 else ''}"]
    for name, text in {"age_approx": "age {:g}", "sex": "{}"}.items():
        if name in patient.metadata.columns:
            facts += map(text.format, patient.metadata[name].drop_nulls()[:1])
    return ", ".join(facts) + "."


def _unfamiliar(patient: Patient) -> list[Markup]:
    if not patient.unfamiliar:
        return []
    items = [tag("li", text) for text in patient.unfamiliar]
    heading = tag("p", "Outside the model's experience, so the scores are less reliable:")
    return [tag("div", heading, tag("ul", *items), class_="unfamiliar")]


def _first_text(patient: Patient, shown: Shown) -> str:
    number = len(patient.index)
    which = f"The {patient.num_first} highest scores of {number:,} lesions."
    text = "The only lesion." if number == 1 else which
    if patient.scored_by:
        text += (
            f" As the patient has so few, the scores are by {listed(patient.scored_by)} alone, "
            "without comparing lesions, on the scale of the other patients' scores; they have no "
            "calibrated probability."
        )
    if shown.reasons is None:
        text += " The models cannot explain their scores, so there are no reasons."
    else:
        text += (
            " A reason is a property that raises the score: if the lesion were ordinary in it, "
            "like this patient's other lesions, or for properties of the patient like the training "
            "lesions, the score would be the second number."
        )
    if shown.maps:
        text += (
            " Below a photo is its occlusion map: the change of the network's logit if a patch is "
            "hidden."
        )
    return text


def _card(patient: Patient, shown: Shown, place: int, num_rows: int) -> Markup:
    name = patient.names[place]
    number = place + 1
    photos = []
    if name in shown.pictures:
        photos.append(photo(shown.pictures[name], f"lesion {number}, {name}"))
    if name in shown.maps:
        photos.append(photo(shown.maps[name].picture, f"occlusion map of lesion {number}"))
    heading = tag("h3", f"{number}. ", tag("span", name, class_="id"))
    facts = page.facts(_facts(patient.metadata.row(place, named=True)), "row")
    content = (
        heading,
        _standing(patient, shown, place, num_rows),
        facts,
        *([] if shown.reasons is None else _why(shown.reasons[place], patient.score[place])),
    )
    parts = [tag("div", *photos, class_="photos")] if photos else []
    card = tag("article", *parts, tag("div", *content), class_="lesion" if photos else None)
    return tag("li", card, id=f"lesion-{number}")


def _standing(patient: Patient, shown: Shown, place: int, num_rows: int) -> Markup:
    text = f"score {score_text(patient.score[place])}, rank {patient.rank[place]:,} of all "
    text += f"{num_rows:,} lesions"
    if shown.probability is not None and np.isfinite(shown.probability[place]):
        text += f"; calibrated probability {page.percent(shown.probability[place])}"
    return tag("p", text, class_="standing")


def _facts(row: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for label, (columns, unit) in SHOWN.items():
        value = next((row[name] for name in columns if row.get(name) is not None), None)
        if value is not None:
            found[label] = (value if isinstance(value, str) else f"{value:.1f}") + unit
    return found


def _why(reasons: Sequence[Reason], score: float) -> list[Markup]:
    if not reasons:
        return [tag("p", "No single property explains the score.", class_="why")]
    items = [
        tag(
            "li",
            f"{reason.text} ",
            tag("small", f"({score_text(score)} → {score_text(reason.score_without)})"),
        )
        for reason in reasons
    ]
    return [tag("ul", *items, class_="why")]


def _figures(patient: Patient, shown: Shown) -> Markup:
    ranked = {place: place + 1 for place in range(patient.num_first)}
    charts = [body_figure(patient.metadata, ranked)]
    if shown.features is not None and np.isfinite(shown.features).all(axis=1).any():
        charts.append(embedding_figure(shown.features, ranked))
    return tag("div", *charts, class_="figures")


def _others(patient: Patient, shown: Shown) -> list[Markup]:
    places = range(patient.num_first, len(patient.index))
    if not places:
        return [tag("p", "There are none.")]
    intro = tag("p", f"{len(places):,} lesions by falling score.")
    items = [_small(patient, shown, place) for place in places]
    return [intro, tag("ol", *items, class_="sheet", start=float(places[0] + 1))]


def _small(patient: Patient, shown: Shown, place: int) -> Markup:
    name = patient.names[place]
    label = f"lesion {place + 1}, {name}"
    image = photo(shown.pictures[name], label) if name in shown.pictures else ""
    text = f"{place + 1}: {score_text(patient.score[place])}"
    return tag("li", image, text, title=name)


def score_text(score: float) -> str:
    """Return a score with two or three digits, and more close to 1."""
    if score < 0.1:
        return f"{score:.2g}"
    return f"{score:.3f}" if score < 0.99 else f"{score:.4f}"
