"""Properties of a lesion that may raise its score, as data, and the features that depend on them.

The features of a table are hundreds of formulas of a few measurements, so a score is explained by
groups of measurements that belong together: the causes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from infer.ensemble.artifact import Ensemble
from infer.ensemble.images.features import FROZEN_SCORE, SCORE
from infer.ensemble.images.relative_scores import score_column
from isic import schema
from isic.arrays import Floats
from isic.features import FEATURES, needed_columns
from isic.features.definitions import columns_of_definitions
from isic.features.formulas import LOCATION, SITE
from isic.features.outlier import NAME as LOF
from isic.features.outlier import OUTLIER_COLUMNS


@dataclass(frozen=True)
class Words:
    """Words for a measurement."""

    noun: str
    higher: str = "higher"
    lower: str = "lower"
    unit: str = ""


@dataclass(frozen=True)
class Cause:
    """A property that may raise a score."""

    name: str
    columns: tuple[str, ...] = ()
    """Columns of the metadata that it consists of."""
    features: tuple[str, ...] = ()
    """Features that it consists of, if they do not follow from the metadata."""
    of_patient: bool = False
    """Whether all lesions of a patient share it."""


CAUSES = (
    Cause(
        "size",
        (
            "clin_size_long_diam_mm",
            "tbp_lv_areaMM2",
            "tbp_lv_perimeterMM",
            "tbp_lv_minorAxisMM",
        ),
    ),
    Cause("shape", ("tbp_lv_eccentricity", "tbp_lv_symm_2axis", "tbp_lv_symm_2axis_angle")),
    Cause("border", ("tbp_lv_norm_border", "tbp_lv_area_perim_ratio")),
    Cause(
        "colour",
        (
            "tbp_lv_A",
            "tbp_lv_B",
            "tbp_lv_C",
            "tbp_lv_H",
            "tbp_lv_L",
            "tbp_lv_deltaA",
            "tbp_lv_deltaB",
            "tbp_lv_deltaL",
            "tbp_lv_deltaLB",
            "tbp_lv_deltaLBnorm",
        ),
    ),
    Cause(
        "variation of colour",
        (
            "tbp_lv_norm_color",
            "tbp_lv_color_std_mean",
            "tbp_lv_radial_color_std_max",
            "tbp_lv_stdL",
        ),
    ),
    Cause("likeness to a nevus", ("tbp_lv_nevi_confidence",)),
    Cause(
        "skin around",
        (
            "tbp_lv_Aext",
            "tbp_lv_Bext",
            "tbp_lv_Cext",
            "tbp_lv_Hext",
            "tbp_lv_Lext",
            "tbp_lv_stdLExt",
        ),
    ),
    Cause(
        "place",
        (LOCATION, "tbp_lv_location_simple", SITE, "tbp_lv_x", "tbp_lv_y", "tbp_lv_z"),
    ),
    Cause("age and sex", ("age_approx", "sex"), of_patient=True),
    Cause(
        "origin of the photograph",
        ("attribution", "copyright_license", "image_type", "tbp_tile_type"),
        of_patient=True,
    ),
)
"""The causes in the metadata; each column is in one of them."""

UNUSUAL = Cause("all of its appearance", OUTLIER_COLUMNS)
"""The cause of features that count unusual measurements."""
UNUSUAL_FEATURES = (LOF, "num_patient_outliers", "num_patient_location_outliers")

WORDS: Mapping[str, Words] = {
    "clin_size_long_diam_mm": Words("diameter", "larger", "smaller", "mm"),
    "tbp_lv_areaMM2": Words("area", "larger", "smaller", "mm²"),
    "tbp_lv_perimeterMM": Words("perimeter", "longer", "shorter", "mm"),
    "tbp_lv_minorAxisMM": Words("width", "larger", "smaller", "mm"),
    "tbp_lv_eccentricity": Words("shape", "more elongated", "rounder"),
    "tbp_lv_symm_2axis": Words("shape", "less symmetric", "more symmetric"),
    "tbp_lv_symm_2axis_angle": Words("angle of the axis of symmetry", "larger", "smaller", "°"),
    "tbp_lv_norm_border": Words("border", "more irregular", "more regular"),
    "tbp_lv_area_perim_ratio": Words("outline", "more jagged", "smoother"),
    "tbp_lv_A": Words("colour", "redder", "less red"),
    "tbp_lv_B": Words("colour", "yellower", "bluer"),
    "tbp_lv_C": Words("colour", "more vivid", "duller"),
    "tbp_lv_H": Words("hue", "yellower", "redder", "°"),
    "tbp_lv_L": Words("colour", "lighter", "darker"),
    "tbp_lv_deltaA": Words("redness against the skin around it"),
    "tbp_lv_deltaB": Words("yellowness against the skin around it"),
    "tbp_lv_deltaL": Words("lightness against the skin around it"),
    "tbp_lv_deltaLB": Words("contrast to the skin around it"),
    "tbp_lv_deltaLBnorm": Words("contrast to the skin around it"),
    "tbp_lv_norm_color": Words("colour", "more varied", "more even"),
    "tbp_lv_color_std_mean": Words("colour", "more varied", "more even"),
    "tbp_lv_radial_color_std_max": Words("colour", "less symmetric", "more symmetric"),
    "tbp_lv_stdL": Words("lightness", "more varied", "more even"),
    "tbp_lv_nevi_confidence": Words("likeness to a nevus"),
    "tbp_lv_Aext": Words("skin around it", "redder", "less red"),
    "tbp_lv_Bext": Words("skin around it", "yellower", "bluer"),
    "tbp_lv_Cext": Words("skin around it", "more vivid", "duller"),
    "tbp_lv_Hext": Words("hue of the skin around it", "yellower", "redder", "°"),
    "tbp_lv_Lext": Words("skin around it", "lighter", "darker"),
    "tbp_lv_stdLExt": Words("skin around it", "more varied", "more even"),
    "tbp_lv_x": Words(
        "place across the body", "more towards one side", "more towards the other side", "mm"
    ),
    "tbp_lv_y": Words("place on the body", "higher up", "lower down", "mm"),
    "tbp_lv_z": Words("depth in the body's frame", "larger", "smaller", "mm"),
    "age_approx": Words("age", "higher", "lower", "years"),
    LOCATION: Words("place"),
    "tbp_lv_location_simple": Words("place"),
    SITE: Words("place"),
    "sex": Words("sex"),
    "attribution": Words("source of the photograph"),
    "copyright_license": Words("licence of the photograph"),
    "image_type": Words("kind of photograph"),
    "tbp_tile_type": Words("lighting of the photograph"),
}
"""Words for every column; those of a category need only the noun."""


@dataclass(frozen=True, eq=False)
class Attribution:
    """The causes of an ensemble's features."""

    causes: tuple[Cause, ...]
    of_features: Floats
    """[D, C] share of each feature's contribution that a cause gets; a row's sum is 0 or 1."""
    columns: tuple[str, ...]
    of_columns: Floats
    """[D, K] share that each metadata column gets."""


def find_causes(ensemble: Ensemble) -> Attribution:
    """Return the causes of the features of an ensemble, in the order of its matrix."""
    names = ensemble.state.names
    roots = [_columns(ensemble, name) for name in names]
    columns = tuple(schema.DTYPES)
    of_columns = np.array([_shares(columns, found) for found in roots]).reshape(-1, len(columns))
    causes = (*CAUSES, UNUSUAL, *_given_causes(ensemble))
    of_features = np.array(
        [
            _shares(causes, _causes_of(name, found, causes))
            for name, found in zip(names, roots, strict=True)
        ]
    ).reshape(-1, len(causes))
    return Attribution(causes, of_features, columns, of_columns)


def _shares(items: Sequence[object], found: Sequence[object]) -> list[float]:
    return [1 / len(found) if item in found else 0.0 for item in items]


def _columns(ensemble: Ensemble, name: str) -> list[str]:
    """Return the metadata columns that a feature describes; none for that of an image or table."""
    if name in FEATURES:
        columns = needed_columns([name])
        relative = FEATURES[name].relative
    else:
        own = ensemble.spec.own.all_definitions
        defined = {each for definition in own for each in definition.names}
        columns = columns_of_definitions(own, [name]) if name in defined else ()
        relative = schema.PATIENT in columns
    described = [column for column in columns if column not in (schema.ID, schema.PATIENT)]
    # A relative feature reads the site only to choose the lesions to compare with.
    compared = [column for column in described if column not in (SITE, LOCATION)]
    return compared if relative and compared else described


def _causes_of(name: str, columns: Sequence[str], causes: Iterable[Cause]) -> list[Cause]:
    if name in UNUSUAL_FEATURES:
        return [UNUSUAL]
    return [
        cause
        for cause in causes
        if cause is not UNUSUAL and (name in cause.features or {*columns} & {*cause.columns})
    ]


def _given_causes(ensemble: Ensemble) -> list[Cause]:
    """Return a cause per network, and one per column of own tables."""
    image = ensemble.state.image
    networks = (*image.networks, *image.frozen)
    names = ensemble.spec.image_names(image)
    causes = [
        Cause(network, features=tuple(name for name in names if name.endswith(f".{network}")))
        for network in networks
    ]
    tables = ensemble.own_tables.values()
    return causes + [Cause(name, features=(name,)) for spec in tables for name in spec.columns]


def score_of(cause: Cause) -> str | None:
    """Return the column of a network's score, None if the cause has none."""
    scores = {score_column(score, cause.name) for score in (SCORE, FROZEN_SCORE)}
    return next((name for name in cause.features if name in scores), None)
