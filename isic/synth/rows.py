"""SyntheticRows of the synthetic table: patients, correlated numbers, places, diagnoses, target."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.special import ndtri

from isic import schema
from isic.arrays import Floats
from isic.synth import marginals

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
"""Shift of a malignant row's columns, in standard deviations: the cue within the row itself."""

PATIENT_RELATIVE_SHIFT: dict[str, float] = {
    "tbp_lv_deltaL": -0.40,
    "tbp_lv_deltaA": 0.85,
    "tbp_lv_deltaB": -0.95,
    "tbp_lv_stdL": 0.65,
    "tbp_lv_nevi_confidence": -0.90,
}
"""The same for columns that vary most between patients: a cue versus the patient's others."""

IMAGE_CUE = 2.2
"""Mean of the hidden cue in malignant lesions, N(0, 1) in benign ones; only crops show it."""

CUE_SPREAD = 0.5
"""Each cue's strength varies per malignant lesion: N(1, CUE_SPREAD), at least 0."""

DNN_CUE = -1.2
"""Shift of the train-only `tbp_lv_dnn_lesion_confidence`, which no model may use."""

# So that a small table has enough patients for its folds.
PATIENTS_OF_SMALL = 0.5
"""Exponent of patients versus rows."""

FEWEST_PATIENTS = 10
SIZE_SPREAD = 0.966
SIZE_TAIL = 0.27
"""Lesions per patient: log-normal with mean / median = 1.6, heavier above two deviations."""

TRUE_AXIS_ERROR = 0.035
"""Standard deviation of the eccentricity's error relative to the axes."""

RAGGED_AREA = 0.2
"""Exponent of area_perim_ratio in the area that is missing from the ellipse."""

POSITION_SPREAD_MM = (110.0, 110.0, 65.0)
"""Standard deviation of x, y and z around a location's centre."""

DECIMALS = 6


@dataclass(frozen=True)
class SyntheticRows:
    """A table with the columns of TRAIN_ORDER, and the hidden cue."""

    table: pl.DataFrame
    cue: Floats
    """[N] strength of the hidden cue, which only the crop shows."""


def default_positives(num_rows: int) -> int:
    """Return the number of positives: the challenge's share, but 5 % in a small table."""
    share = round(num_rows * marginals.FULL_POSITIVES / marginals.FULL_ROWS)
    small_table = min(max(num_rows // 20, 10), marginals.FULL_POSITIVES)
    return max(share, small_table)


def num_patients(num_rows: int) -> int:
    """Return the number of patients in a table of `num_rows`; the challenge's at its size."""
    share = num_rows / marginals.FULL_ROWS
    growth = share if share > 1 else share**PATIENTS_OF_SMALL
    usual = round(marginals.FULL_PATIENTS * growth)
    return min(max(usual, FEWEST_PATIENTS), num_rows)


def draw_rows(
    ids: Sequence[str],
    patient_ids: Sequence[str],
    num_positives: int,
    rng: Generator,
    unseen_site: bool = False,
) -> SyntheticRows:
    """Sample a table.

    Args:
        patient_ids: at most N; each gets at least one row.
        unseen_site: whether some patients have an attribution that no training table has.
    """
    num_rows = len(ids)
    sizes = lesions_per_patient(num_rows, len(patient_ids), rng)
    patient = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    target = _positives(patient, num_positives, rng)
    z = _latents(patient, sizes, rng)
    _plant_signal(z, target, rng)
    cue = rng.standard_normal(num_rows)
    cue += target * IMAGE_CUE * _strength(num_rows, rng)
    columns: dict[str, Sequence[object] | Floats | Ints] = {
        schema.ID: ids,
        schema.TARGET: target,
        schema.PATIENT: np.asarray(patient_ids)[patient].tolist(),
        **_numbers(z, rng),
        **_places(num_rows, rng),
        **_patient_facts(patient, sizes, rng, unseen_site),
        **_diagnoses(target, rng),
    }
    return SyntheticRows(_blanked(pl.DataFrame(columns), rng).select(schema.TRAIN_ORDER), cue)


def lesions_per_patient(num_rows: int, count: int, rng: Generator) -> Ints:
    """Return rows per patient, [count]: heavy-tailed quantiles in random order."""
    z = ndtri((np.arange(count) + 0.5) / count)
    weight = np.exp(SIZE_SPREAD * z + SIZE_TAIL * np.maximum(z - 2, 0) ** 2)
    share = np.cumsum(weight) / weight.sum()
    ends = np.round(share * (num_rows - count)).astype(np.int64)
    return rng.permutation(1 + np.diff(ends, prepend=0))


def _positives(patient: Ints, num_positives: int, rng: Generator) -> Ints:
    """Return the target, [N] of 0 and 1; the positives belong to a part of the patients."""
    num_rows = len(patient)
    count = int(patient.max()) + 1
    share = marginals.FULL_POSITIVE_PATIENTS / marginals.FULL_POSITIVES
    num_affected = max(1, min(round(num_positives * share), round(0.6 * count)))
    affected = rng.permutation(count)[:num_affected]
    order = rng.permutation(num_rows)
    _, first = np.unique(patient[order], return_index=True)
    # Lowest priority values become positive: first one random row of each affected patient, then
    # other rows of these patients, and only if those are too few, rows of other patients.
    priority = rng.random(num_rows)
    priority[np.isin(patient, affected)] -= 1
    priority[order[first[affected]]] -= 2
    target = np.zeros(num_rows, dtype=np.int64)
    target[np.argsort(priority, kind="stable")[:num_positives]] = 1
    return target


def _latents(patient: Ints, sizes: Ints, rng: Generator) -> dict[str, Floats]:
    """Sample correlated standard normal values [N] by column of RANK_CORRELATION."""
    names = list(marginals.RANK_CORRELATION)
    root = np.linalg.cholesky(marginals.correlation()).T
    share = np.array([marginals.PATIENT_SHARE.get(name, 0.0) for name in names])
    own = rng.standard_normal((len(patient), len(names))) @ root
    of_patient = rng.standard_normal((len(sizes), len(names))) @ root
    shared = _normal_by_rows(of_patient, sizes)[patient]
    # The squares of the factors add up to 1, so z is standard normal again.
    z = np.sqrt(share) * shared + np.sqrt(1 - share) * own
    return dict(zip(names, np.ascontiguousarray(z.T), strict=True))


def _normal_by_rows(shared: Floats, sizes: Ints) -> Floats:
    """Make the patients' values [P, K] standard normal over the rows; their ranks are kept."""
    order = np.argsort(shared, axis=0)
    rows = sizes[order]
    middle = (np.cumsum(rows, axis=0) - rows / 2) / sizes.sum()
    # A few patients have most rows: without this, they would shift the marginals of the table.
    level = np.empty_like(shared)
    np.put_along_axis(level, order, ndtri(middle), axis=0)
    level -= np.average(level, axis=0, weights=sizes)
    spread = np.sqrt(np.average(level**2, axis=0, weights=sizes))
    return np.asarray(level / np.where(spread > 0, spread, 1))  # it is 0 for a single patient


def _strength(num_rows: int, rng: Generator) -> Floats:
    return np.maximum(rng.normal(1, CUE_SPREAD, num_rows), 0)


def _plant_signal(z: dict[str, Floats], target: Ints, rng: Generator) -> None:
    """Shift the malignant rows in place; the cues are independent of one another."""
    for cue in (ROW_CUE, PATIENT_RELATIVE_SHIFT, {"tbp_lv_dnn_lesion_confidence": DNN_CUE}):
        strength = target * _strength(len(target), rng)
        for name, shift in cue.items():
            z[name] += shift * strength


def _numbers(z: Mapping[str, Floats], rng: Generator) -> dict[str, Floats]:
    """Return the numeric columns: from the latents `z`, and derived from those by identities."""
    value = {name: marginals.quantile(name, latent) for name, latent in z.items()}
    value["age_approx"] = np.round(value["age_approx"] / 5) * 5
    angle_z = rng.standard_normal(len(z["tbp_lv_Lext"]))
    angle = marginals.quantile("tbp_lv_symm_2axis_angle", angle_z)
    value["tbp_lv_symm_2axis_angle"] = np.round(angle / 5) * 5
    no_color = z["tbp_lv_color_std_mean"] < ndtri(marginals.ZERO_COLOR)
    for name in ("tbp_lv_color_std_mean", "tbp_lv_norm_color", "tbp_lv_radial_color_std_max"):
        value[name] = np.where(no_color, 0.0, np.maximum(value[name], 0.01))
    value |= _shape(value, rng)
    value |= _colors(value, rng)
    return {name: column.round(DECIMALS) for name, column in value.items()}


def _shape(value: Mapping[str, Floats], rng: Generator) -> dict[str, Floats]:
    """Return axes, area and perimeter of a rough ellipse; the ratio is perimeter² / area."""
    long_axis = value["clin_size_long_diam_mm"]
    ratio = value["tbp_lv_area_perim_ratio"]
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
    """Return Lab inside and outside, their differences, chroma and hue."""
    outside = {axis: value[f"tbp_lv_{axis}ext"].round(DECIMALS) for axis in "LAB"}
    delta = {axis: value[f"tbp_lv_delta{axis}"].round(DECIMALS) for axis in "LAB"}
    delta["L"] = np.maximum(delta["L"], (4 - outside["L"]).round(DECIMALS))
    inside = {axis: outside[axis] + delta[axis] for axis in "LAB"}
    num_rows = len(delta["L"])
    excess = 1.004 + rng.gamma(2.0, 0.008, num_rows)
    lightness_and_blue = np.hypot(delta["L"], delta["B"]) * excess
    # Fitted on benign rows: the normalised difference falls with the skin's lightness.
    log_factor = 2.49 - 0.692 * np.log(outside["L"]) + rng.normal(0, 0.02, num_rows)
    normalised = lightness_and_blue * np.exp(log_factor)
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
    """Return indices [N] into `counts` with exactly their shares, in random order."""
    share = np.cumsum(np.asarray(counts, dtype=np.float64)) / np.sum(counts)
    position = (np.arange(num_rows) + 0.5) / num_rows
    return rng.permutation(np.searchsorted(share, position))


def _places(num_rows: int, rng: Generator) -> dict[str, Sequence[object] | Floats]:
    """Return location, its two coarser columns, and the position with its published marginals."""
    names = list(marginals.LOCATIONS)
    counts = [count for count, *_ in marginals.LOCATIONS.values()]
    centres = np.array([centre for _, *centre in marginals.LOCATIONS.values()])
    location = _quota(counts, num_rows, rng)
    simple = [_simple_location(name) for name in names]
    rough = centres[location] + rng.normal(0, POSITION_SPREAD_MM, (num_rows, 3))
    # By ranks, so that the positions have their published marginals whatever the locations are.
    rank = np.argsort(np.argsort(rough, axis=0), axis=0)
    z = ndtri((rank + 0.5) / num_rows)
    columns: dict[str, Sequence[object] | Floats] = {
        "tbp_lv_location": [names[i] for i in location],
        "tbp_lv_location_simple": [simple[i] for i in location],
        "anatom_site_general": [marginals.SITES[simple[i]] for i in location],
    }
    for i, axis in enumerate("xyz"):
        name = f"tbp_lv_{axis}"
        columns[name] = marginals.quantile(name, z[:, i]).round(DECIMALS)
    return columns


def _simple_location(location: str) -> str:
    return next(simple for simple in marginals.SITES if location.startswith(simple))


def _share_out(counts: Sequence[float], sizes: Ints) -> Ints:
    """Return an index into `counts` per patient, [P]; the rows approach `counts`' shares."""
    wanted = np.asarray(counts, dtype=np.float64) / np.sum(counts) * sizes.sum()
    choice = np.zeros(len(sizes), dtype=np.int64)
    for patient in np.argsort(-sizes, kind="stable"):  # the largest first
        choice[patient] = np.argmax(wanted)
        wanted[choice[patient]] -= sizes[patient]
    return choice


def _patient_facts(
    patient: Ints, sizes: Ints, rng: Generator, unseen_site: bool
) -> dict[str, Sequence[str]]:
    """Return the text columns that are equal in all rows of a patient."""
    sites = dict(marginals.ATTRIBUTIONS)
    if unseen_site:
        sites[marginals.UNSEEN] = marginals.UNSEEN_ATTRIBUTION
    names = list(sites)
    licences = [licence for _, licence, _ in sites.values()]
    white_shares = np.array([share for _, _, share in sites.values()])
    attribution = _share_out([rows for rows, _, _ in sites.values()], sizes)
    white = rng.random(len(sizes)) < white_shares[attribution]
    sexes = list(marginals.SEX)
    sex = _share_out(list(marginals.SEX.values()), sizes)
    return {
        "attribution": [names[i] for i in attribution[patient]],
        "copyright_license": [licences[i] for i in attribution[patient]],
        "tbp_tile_type": ["3D: white" if is_white else "3D: XP" for is_white in white[patient]],
        "sex": [sexes[i] for i in sex[patient]],
        "image_type": ["TBP tile: close-up"] * len(patient),
    }


def _diagnoses(target: Ints, rng: Generator) -> dict[str, Sequence[object]]:
    """Return the train-only columns: ids, diagnoses, measurements of invasive melanomas."""
    chance = rng.random(len(target))
    biopsied = (target == 1) | (chance < marginals.BIOPSIED_BENIGN)
    has_id = (target == 1) | (chance < marginals.LESION_ID_BENIGN)
    number = rng.permutation(len(target)) + 1_000_000
    finest: list[marginals.Diagnosis] = [("Benign", None, None, None)] * len(target)
    for label, kinds in enumerate((marginals.BENIGN_DIAGNOSES, marginals.MALIGNANT_DIAGNOSES)):
        rows = np.flatnonzero(biopsied & (target == label))
        choice = _quota(list(kinds.values()), len(rows), rng)
        diagnoses = list(kinds)
        for row, kind in zip(rows, choice, strict=True):
            finest[row] = diagnoses[kind]
    levels = list(zip(*finest, strict=True))
    invasive = np.array([level == marginals.INVASIVE for level in levels[2]])
    mitoses = np.array(list(marginals.MITOSES))
    mitoses = mitoses[_quota(list(marginals.MITOSES.values()), len(target), rng)]
    thickness = rng.choice(marginals.THICKNESS_MM, len(target))
    return {
        "lesion_id": _masked([f"IL_{n}" for n in number], has_id),
        "iddx_full": ["::".join(filter(None, parts)) for parts in finest],
        **{f"iddx_{i}": level for i, level in enumerate(levels, start=1)},
        "iddx_5": [None] * len(target),
        "mel_mitotic_index": _masked(mitoses.tolist(), invasive),
        "mel_thick_mm": _masked(thickness.tolist(), invasive),
    }


def _masked(values: Sequence[object], known: NDArray[np.bool_]) -> list[object]:
    return [value if kept else None for value, kept in zip(values, known, strict=True)]


def _blanked(table: pl.DataFrame, rng: Generator) -> pl.DataFrame:
    table = table.with_columns(pl.col(name).cast(schema.DTYPES[name]) for name in table.columns)
    for name, share in marginals.BLANKS.items():
        num_blank = round(share * len(table))
        known = np.ones(len(table), dtype=bool)
        known[rng.permutation(len(table))[:num_blank]] = False
        kept = pl.when(pl.Series(known)).then(pl.col(name))
        table = table.with_columns(kept.alias(name))
    return table
