"""Rows of the stand-in table: patients, correlated numbers with the published margins, a planted malignancy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.special import ndtri

from isic import schema
from isic.synth import margins

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ROW_CUE: dict[str, float] = {
    "clin_size_long_diam_mm": 0.55,
    "tbp_lv_area_perim_ratio": 0.20,
    "tbp_lv_Bext": -0.30,
    "tbp_lv_Aext": 0.40,
    "tbp_lv_color_std_mean": 0.20,
    "tbp_lv_norm_color": 0.20,
    "tbp_lv_radial_color_std_max": 0.20,
}
"""What a malignant lesion adds to a column, in its standard deviations: the cue that a row shows by itself."""

UGLY_CUE: dict[str, float] = {
    "tbp_lv_deltaL": -0.40,
    "tbp_lv_deltaA": 0.85,
    "tbp_lv_deltaB": -0.95,
    "tbp_lv_stdL": 0.65,
    "tbp_lv_nevi_confidence": -0.90,
}
"""The same for columns that differ much between patients: weak in the row, strong against the patient's others."""

IMAGE_CUE = 2.2
"""Mean of the hidden cue in malignant lesions; it is N(0, 1) in benign ones and only the crop shows it."""

CUE_SPREAD = 0.5
"""Each malignant lesion has each cue at a strength of its own, N(1, CUE_SPREAD) cut at 0: some lack one or all."""

DNN_CUE = -1.2
"""What a malignant lesion adds to the train-only `tbp_lv_dnn_lesion_confidence`, which no model may use."""

PATIENTS_OF_SMALL = 0.5
"""Patients grow with this power of the number of rows, so that a small table still has enough of them for folds."""

FEWEST_PATIENTS = 10
SIZE_SPREAD, SIZE_TAIL = 0.966, 0.27
"""Lesions per patient: log-normal with mean / median = 1.6, and heavier above two standard deviations."""

TRUE_AXIS_ERROR = 0.035
"""Standard deviation of the eccentricity's error against the axes."""

RAGGED_AREA = 0.2
"""The area falls short of the ellipse's with this power of area_perim_ratio."""

POSITION_SPREAD_MM = (110.0, 110.0, 65.0)
"""How far lesions of one location scatter about it in x, y and z."""

DECIMALS = 6


@dataclass(frozen=True)
class Rows:
    """A table of TRAIN_ORDER's columns and what it does not show."""

    table: pl.DataFrame
    cue: Floats
    """[N] strength of the hidden cue, which the crop is to show."""


def default_positives(num_rows: int) -> int:
    """The challenge's share of positives, but more in a small table: 5 % up to the challenge's count, at least 10."""
    share = round(num_rows * margins.FULL_POSITIVES / margins.FULL_ROWS)
    return max(share, min(max(num_rows // 20, 10), margins.FULL_POSITIVES))


def num_patients(num_rows: int) -> int:
    """How many patients a table of `num_rows` has: the challenge's count at its size."""
    share = num_rows / margins.FULL_ROWS
    usual = round(margins.FULL_PATIENTS * (share if share > 1 else share**PATIENTS_OF_SMALL))
    return min(max(usual, FEWEST_PATIENTS), num_rows)


def draw_rows(
    ids: Sequence[str],
    patient_ids: Sequence[str],
    num_positives: int,
    rng: Generator,
    unseen_site: bool = False,
) -> Rows:
    """Draws a table.

    Args:
        ids: `isic_id` of the N rows.
        patient_ids: at most N, each gets at least one row.
        num_positives: at most N.
        unseen_site: gives a share of the patients an attribution that is not in the training table.
    """
    num_rows = len(ids)
    sizes = lesions_per_patient(num_rows, len(patient_ids), rng)
    patient = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    target = _positives(patient, num_positives, rng)
    z = _latents(patient, sizes, rng)
    _plant(z, target, rng)
    cue = rng.standard_normal(num_rows) + target * IMAGE_CUE * _strength(num_rows, rng)
    columns: dict[str, Sequence[object] | Floats | Ints] = {
        schema.ID: ids,
        schema.TARGET: target,
        schema.PATIENT: np.asarray(patient_ids)[patient].tolist(),
        **_numbers(z, rng),
        **_places(num_rows, rng),
        **_patient_facts(patient, sizes, rng, unseen_site),
        **_diagnoses(target, rng),
    }
    return Rows(_blanked(pl.DataFrame(columns), rng).select(schema.TRAIN_ORDER), cue)


def lesions_per_patient(num_rows: int, count: int, rng: Generator) -> Ints:
    """Shares out `num_rows` [P]: fixed quantiles of a heavy-tailed distribution in random order."""
    z = ndtri((np.arange(count) + 0.5) / count)
    weight = np.exp(SIZE_SPREAD * z + SIZE_TAIL * np.maximum(z - 2, 0) ** 2)
    ends = np.round(np.cumsum(weight) / weight.sum() * (num_rows - count)).astype(np.int64)
    return rng.permutation(1 + np.diff(ends, prepend=0))


def _positives(patient: Ints, num_positives: int, rng: Generator) -> Ints:
    """Picks the malignant rows [N]: one in each of some patients, the rest among those patients' rows."""
    num_rows, count = len(patient), int(patient.max()) + 1
    share = margins.FULL_POSITIVE_PATIENTS / margins.FULL_POSITIVES
    affected = rng.permutation(count)[
        : max(1, min(round(num_positives * share), round(0.6 * count)))
    ]
    order = rng.permutation(num_rows)
    _, first = np.unique(patient[order], return_index=True)
    # Where positives outnumber the affected patients' rows, rows of the others follow.
    wish = rng.random(num_rows) - np.isin(patient, affected)
    wish[order[first[affected]]] -= 2
    target = np.zeros(num_rows, dtype=np.int64)
    target[np.argsort(wish, kind="stable")[:num_positives]] = 1
    return target


def _latents(patient: Ints, sizes: Ints, rng: Generator) -> dict[str, Floats]:
    """Draws a standard normal number [N] per column of COPULA, correlated, and alike within a patient."""
    names = list(margins.COPULA)
    root = np.linalg.cholesky(margins.correlation()).T
    share = np.array([margins.PATIENT_SHARE.get(name, 0.0) for name in names])
    own = rng.standard_normal((len(patient), len(names))) @ root
    shared = rng.standard_normal((len(sizes), len(names))) @ root
    z = np.sqrt(share) * _normal_by_rows(shared, sizes)[patient] + np.sqrt(1 - share) * own
    return dict(zip(names, np.ascontiguousarray(z.T), strict=True))


def _normal_by_rows(shared: Floats, sizes: Ints) -> Floats:
    """Makes the patients' values [P, K] standard normal over the rows, in the same order.

    A few patients hold most rows: without this their luck would move the margins of the whole table.
    """
    order = np.argsort(shared, axis=0)
    rows = sizes[order]
    level = np.empty_like(shared)
    np.put_along_axis(
        level, order, ndtri((np.cumsum(rows, axis=0) - rows / 2) / sizes.sum()), axis=0
    )
    level -= np.average(level, axis=0, weights=sizes)
    spread = np.sqrt(np.average(level**2, axis=0, weights=sizes))
    return np.asarray(level / np.where(spread > 0, spread, 1))  # a single patient has none


def _strength(num_rows: int, rng: Generator) -> Floats:
    return np.maximum(rng.normal(1, CUE_SPREAD, num_rows), 0)


def _plant(z: dict[str, Floats], target: Ints, rng: Generator) -> None:
    """Moves the malignant rows, the cues independent of one another."""
    for cue in (ROW_CUE, UGLY_CUE, {"tbp_lv_dnn_lesion_confidence": DNN_CUE}):
        strength = target * _strength(len(target), rng)
        for name, shift in cue.items():
            z[name] += shift * strength


def _numbers(z: Mapping[str, Floats], rng: Generator) -> dict[str, Floats]:
    """Turns the latents into the drawn columns and those that follow from them by the identities."""
    value = {name: margins.quantile(name, latent) for name, latent in z.items()}
    value["age_approx"] = np.round(value["age_approx"] / 5) * 5
    value["tbp_lv_symm_2axis_angle"] = (
        np.round(
            margins.quantile("tbp_lv_symm_2axis_angle", rng.standard_normal(len(z["tbp_lv_Lext"])))
            / 5
        )
        * 5
    )
    no_color = z["tbp_lv_color_std_mean"] < ndtri(margins.ZERO_COLOR)
    for name in ("tbp_lv_color_std_mean", "tbp_lv_norm_color", "tbp_lv_radial_color_std_max"):
        value[name] = np.where(no_color, 0.0, np.maximum(value[name], 0.01))
    value |= _shape(value, rng) | _colors(value, rng)
    return {name: column.round(DECIMALS) for name, column in value.items()}


def _shape(value: Mapping[str, Floats], rng: Generator) -> dict[str, Floats]:
    """Minor axis, area and perimeter: a rough ellipse whose area_perim_ratio is perimeter² / area."""
    long_axis, ratio = value["clin_size_long_diam_mm"], value["tbp_lv_area_perim_ratio"]
    error = rng.normal(0.013, TRUE_AXIS_ERROR, len(ratio))
    eccentricity = np.clip(value["tbp_lv_eccentricity"] - error, 0.02, 0.985)
    minor_axis = long_axis * np.sqrt(1 - eccentricity**2)
    filled = rng.normal(0.97, 0.05, len(ratio)) * (17.4 / ratio) ** RAGGED_AREA
    area = (np.pi / 4 * long_axis * minor_axis * filled).round(DECIMALS)
    perimeter = np.sqrt(area * ratio).round(DECIMALS)
    return {
        "clin_size_long_diam_mm": long_axis.round(2),
        "tbp_lv_minorAxisMM": minor_axis,
        "tbp_lv_areaMM2": area,
        "tbp_lv_perimeterMM": perimeter,
        "tbp_lv_area_perim_ratio": perimeter**2 / area,
    }


def _colors(value: Mapping[str, Floats], rng: Generator) -> dict[str, Floats]:
    """Lab inside from Lab outside and the differences; chroma, hue and the combined differences from those."""
    outside = {axis: value[f"tbp_lv_{axis}ext"].round(DECIMALS) for axis in "LAB"}
    delta = {axis: value[f"tbp_lv_delta{axis}"].round(DECIMALS) for axis in "LAB"}
    delta["L"] = np.maximum(delta["L"], (4 - outside["L"]).round(DECIMALS))
    inside = {axis: outside[axis] + delta[axis] for axis in "LAB"}
    lightness_and_blue = np.hypot(delta["L"], delta["B"]) * (
        1.004 + rng.gamma(2.0, 0.008, len(delta["L"]))
    )
    # Fitted on benign rows: the normalised difference falls with the skin's lightness, with next to no scatter.
    normalised = lightness_and_blue * np.exp(
        2.49 - 0.692 * np.log(outside["L"]) + rng.normal(0, 0.02, len(delta["L"]))
    )
    return {
        **{f"tbp_lv_{axis}": inside[axis] for axis in "LAB"},
        **{f"tbp_lv_{axis}ext": outside[axis] for axis in "LAB"},
        **{f"tbp_lv_delta{axis}": delta[axis] for axis in "LAB"},
        "tbp_lv_C": np.hypot(inside["A"], inside["B"]),
        "tbp_lv_Cext": np.hypot(outside["A"], outside["B"]),
        "tbp_lv_H": np.degrees(np.arctan2(inside["B"], inside["A"])),
        "tbp_lv_Hext": np.degrees(np.arctan2(outside["B"], outside["A"])),
        "tbp_lv_deltaLB": lightness_and_blue,
        "tbp_lv_deltaLBnorm": normalised,
    }


def _quota(counts: Sequence[float], num_rows: int, rng: Generator) -> Ints:
    """Returns an index [N] into `counts`, each as often as its share says, in random order."""
    share = np.cumsum(np.asarray(counts, dtype=np.float64)) / np.sum(counts)
    return rng.permutation(np.searchsorted(share, (np.arange(num_rows) + 0.5) / num_rows))


def _places(num_rows: int, rng: Generator) -> dict[str, Sequence[object] | Floats]:
    """Location, the two columns that follow from it, and the position in space with its published margins."""
    names = list(margins.LOCATIONS)
    location = _quota([figures[0] for figures in margins.LOCATIONS.values()], num_rows, rng)
    simple = [next(part for part in margins.SITES if name.startswith(part)) for name in names]
    centre = np.array([figures[1:] for figures in margins.LOCATIONS.values()])[location]
    rough = centre + rng.normal(0, POSITION_SPREAD_MM, (num_rows, 3))
    rank = np.argsort(np.argsort(rough, axis=0), axis=0)
    z = ndtri((rank + 0.5) / num_rows)
    return {
        "tbp_lv_location": [names[i] for i in location],
        "tbp_lv_location_simple": [simple[i] for i in location],
        "anatom_site_general": [margins.SITES[simple[i]] for i in location],
        **{
            f"tbp_lv_{axis}": margins.quantile(f"tbp_lv_{axis}", z[:, i]).round(DECIMALS)
            for i, axis in enumerate("xyz")
        },
    }


def _share_out(counts: Sequence[float], sizes: Ints) -> Ints:
    """Gives each patient [P] one of several values so that its rows come near `counts`' shares: largest first."""
    wanted = np.asarray(counts, dtype=np.float64) / np.sum(counts) * sizes.sum()
    choice = np.zeros(len(sizes), dtype=np.int64)
    for patient in np.argsort(-sizes, kind="stable"):
        choice[patient] = np.argmax(wanted)
        wanted[choice[patient]] -= sizes[patient]
    return choice


def _patient_facts(
    patient: Ints, sizes: Ints, rng: Generator, unseen_site: bool
) -> dict[str, Sequence[str]]:
    """The text columns that are the same in all rows of a patient."""
    sites = margins.ATTRIBUTIONS | (
        {margins.UNSEEN: margins.UNSEEN_ATTRIBUTION} if unseen_site else {}
    )
    attribution = _share_out([rows for rows, _, _ in sites.values()], sizes)
    white = (
        rng.random(len(sizes)) < np.array([share for _, _, share in sites.values()])[attribution]
    )
    sex = _share_out(list(margins.SEX.values()), sizes)
    names, licences = list(sites), [licence for _, licence, _ in sites.values()]
    return {
        "attribution": [names[i] for i in attribution[patient]],
        "copyright_license": [licences[i] for i in attribution[patient]],
        "tbp_tile_type": ["3D: white" if is_white else "3D: XP" for is_white in white[patient]],
        "sex": [list(margins.SEX)[i] for i in sex[patient]],
        "image_type": ["TBP tile: close-up"] * len(patient),
    }


def _diagnoses(target: Ints, rng: Generator) -> dict[str, Sequence[object]]:
    """The train-only columns: biopsied lesions have an id and a diagnosis, invasive melanomas more."""
    chance = rng.random(len(target))
    biopsied = (target == 1) | (chance < margins.BIOPSIED_BENIGN)
    has_id = (target == 1) | (chance < margins.LESION_ID_BENIGN)
    number = rng.permutation(len(target)) + 1_000_000
    finest: list[margins.Diagnosis] = [("Benign", None, None, None)] * len(target)
    for label, kinds in enumerate((margins.BENIGN_DIAGNOSES, margins.MALIGNANT_DIAGNOSES)):
        rows = np.flatnonzero(biopsied & (target == label))
        for row, kind in zip(rows, _quota(list(kinds.values()), len(rows), rng), strict=True):
            finest[row] = list(kinds)[kind]
    levels = list(zip(*finest, strict=True))
    invasive = [level == margins.INVASIVE for level in levels[2]]
    mitoses = _quota(list(margins.MITOSES.values()), len(target), rng)
    thickness = rng.choice(margins.THICKNESS_MM, len(target))
    return {
        "lesion_id": [
            f"IL_{n}" if known else None for n, known in zip(number, has_id, strict=True)
        ],
        "iddx_full": ["::".join(filter(None, parts)) for parts in finest],
        **{f"iddx_{i}": level for i, level in enumerate((*levels, [None] * len(target)), start=1)},
        "mel_mitotic_index": [
            list(margins.MITOSES)[m] if deep else None
            for m, deep in zip(mitoses, invasive, strict=True)
        ],
        "mel_thick_mm": [
            mm if deep else None for mm, deep in zip(thickness.tolist(), invasive, strict=True)
        ],
    }


def _blanked(table: pl.DataFrame, rng: Generator) -> pl.DataFrame:
    """Empties the published share of rows in the columns that have blanks, and sets the schema's types."""
    table = table.with_columns(pl.col(name).cast(schema.DTYPES[name]) for name in table.columns)
    for name, share in margins.BLANKS.items():
        blank = np.zeros(len(table), dtype=bool)
        blank[rng.permutation(len(table))[: round(share * len(table))]] = True
        table = table.with_columns(pl.when(~pl.Series(blank)).then(pl.col(name)).alias(name))
    return table
