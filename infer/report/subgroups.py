"""Scores of groups of lesions, such as those of one skin tone: tables in, a table out."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import polars as pl

from infer.report.curves import observed_shares
from infer.report.scored import BLEND, GROUP
from isic import schema
from isic.metadata import require
from isic.metrics import NUM_RESAMPLES, bootstrap_pauc, pauc, triage
from isic.runtime.errors import UserError, did_you_mean

SENSITIVITY = 0.9
"""Share of all malignant lesions above the threshold that all groups are judged at."""
MIN_LESIONS = 10
"""Lesions of a class below which a group has no score that depends on the class."""
MAX_GROUPS = 40
ALL = "all"
UNKNOWN = "unknown"
"""Group of the lesions whose value is blank."""
ITA = "ita"
AGE = "age"

ITA_COLUMNS = ("tbp_lv_Lext", "tbp_lv_Bext")
ITA_DEGREES = (-30, 10, 28, 41, 55)
"""Upper ends of the classes but the last; Chardon et al. 1991, Int J Cosmet Sci 13:191."""
ITA_CLASSES = ("dark", "brown", "tan", "intermediate", "light", "very light")

METRICS = {"pauc": "of a class", "sensitivity": "malignant", "specificity": "benign"}
"""Columns of a table of subgroups, and the lesions without which a group has None."""


Labelled = tuple[pl.Series, Sequence[str]]
"""[N] the name of each lesion's group, blank if it is unknown, and the names in their order."""


@dataclass(frozen=True)
class Grouping:
    """Lesions in groups by one property."""

    name: str
    group: pl.Series
    """[N] text."""
    order: tuple[str, ...]
    """The groups that have lesions."""


def group_rows(metadata: pl.DataFrame, names: Sequence[str]) -> list[Grouping]:
    """Group lesions by each name: ITA, AGE (decades), a text (by value) or a number (quartiles).

    Args:
        metadata: [N] the training table, whose rows are grouped.

    Raises:
        UserError: a name is unknown, the columns behind it are missing, or there are more than
            MAX_GROUPS groups.
    """
    known = {ITA, AGE, *metadata.columns} - {schema.ID, schema.PATIENT, schema.TARGET}
    for name in names:
        if name not in known:
            raise UserError(f'--by: there is no column "{name}", {did_you_mean(name, known)}')
    return [_group(metadata, name) for name in dict.fromkeys(names)]


def diagnosis_note(names: Iterable[str]) -> str | None:
    """Return a sentence on the properties that only a diagnosis tells; None without any."""
    late = [name for name in names if name.lower() in schema.AFTER_DIAGNOSIS]
    if not late:
        return None
    return (
        f"the groups by {', '.join(late)} are known only after the diagnosis, so no lesion can be "
        "put into one when it is scored"
    )


def _group(metadata: pl.DataFrame, name: str) -> Grouping:
    derived: Mapping[str, Callable[[pl.DataFrame], Labelled]] = {ITA: skin_tone, AGE: _decade}
    if name in derived:
        label, names = derived[name](metadata)
    elif metadata[name].dtype.is_numeric():
        label, names = _quartile(metadata[name])
    else:
        label, names = _value(metadata[name])
    group = label.fill_null(UNKNOWN)
    present = set(group.unique())
    if len(present) > MAX_GROUPS:
        raise UserError(
            f"--by: {name} has {len(present):,} values, and at most {MAX_GROUPS} groups are shown; "
            "name a column with fewer"
        )
    order = dict.fromkeys([*names, UNKNOWN])
    return Grouping(name, group, tuple(value for value in order if value in present))


def skin_tone(metadata: pl.DataFrame) -> Labelled:
    """Return the class of the individual typology angle of the skin around each lesion.

    The angle is atan2(L - 50, b) in degrees, by the colour of the skin around the lesion. Blank if
    the colour is.
    """
    require(metadata, ITA_COLUMNS, "the training table")
    light, yellow = (pl.col(name) for name in ITA_COLUMNS)
    degrees = metadata.select(pl.arctan2(light - 50, yellow).degrees()).to_series()
    return _cut(degrees, ITA_DEGREES, ITA_CLASSES)


def _decade(metadata: pl.DataFrame) -> Labelled:
    require(metadata, ("age_approx",), "the training table")
    starts = range(0, 120, 10)
    labels = [f"{start} to {start + 9}" for start in starts]
    # The classes of `_cut` include their upper ends.
    return _cut(metadata["age_approx"].floor(), [start - 1 for start in starts[1:]], labels)


def _quartile(column: pl.Series) -> Labelled:
    known = column.drop_nulls()
    if known.is_empty():
        return column.cast(pl.String), ()
    edges = np.unique(np.quantile(known.to_numpy(), [0.25, 0.5, 0.75])).tolist()
    texts = [f"{edge:.4g}" for edge in edges]
    middle = [f"{low} to {high}" for low, high in pairwise(texts)]
    return _cut(column, edges, [f"up to {texts[0]}", *middle, f"above {texts[-1]}"])


def _cut(column: pl.Series, edges: Sequence[float], names: Sequence[str]) -> Labelled:
    """Return the name of each value's class; classes include their upper ends."""
    place = np.searchsorted(edges, column.fill_null(0.0).to_numpy())
    label = pl.Series(np.asarray(names)[place])
    return pl.select(pl.when(column.is_not_null()).then(label)).to_series(), names


def _value(column: pl.Series) -> Labelled:
    """Return a column's values as text, and their names, the most frequent first."""
    label = column.cast(pl.String)
    counts = label.drop_nulls().value_counts(name="number")
    names = counts.sort("number", label.name, descending=[True, False])[label.name]
    return label, names.to_list()


def score_groups(oof: pl.DataFrame, groupings: Sequence[Grouping]) -> pl.DataFrame:
    """Score each group of lesions at the same threshold, which finds SENSITIVITY of all.

    Args:
        oof: as `infer.report.scored.Scored.oof`, its rows in the order of the groupings.

    Returns:
        `by`, `group`, `lesions`, `patients`, `malignant`, and of each of METRICS its value, `_low`
        and `_high`: the 95 % interval over resamples of the patients. The first row is of all.
    """
    threshold = triage(oof[schema.TARGET], oof[BLEND], SENSITIVITY).threshold
    whole = Grouping(ALL, pl.repeat(ALL, len(oof), eager=True), (ALL,))
    rows = [
        {"by": grouping.name, "group": name} | _score(oof.filter(grouping.group == name), threshold)
        for grouping in (whole, *groupings)
        for name in grouping.order
    ]
    return pl.DataFrame(rows, infer_schema_length=None)


def _score(rows: pl.DataFrame, threshold: float) -> dict[str, float | None]:
    target = rows[schema.TARGET].to_numpy()
    score = rows[BLEND].to_numpy()
    patient = rows[GROUP].to_numpy()
    found: dict[str, tuple[float, float, float]] = {}
    for metric, label in (("sensitivity", 1), ("specificity", 0)):
        of_class = target == label
        if of_class.sum() >= MIN_LESIONS:
            is_right = (score[of_class] >= threshold) == (label == 1)
            found[metric] = _share(is_right, patient[of_class])
    if len(found) == 2:
        draws = bootstrap_pauc(target, [score], patient, NUM_RESAMPLES)
        low, high = np.percentile(draws, [2.5, 97.5]).tolist()
        found["pauc"] = (pauc(target, score), low, high)
    counts = {
        "lesions": len(rows),
        "patients": rows[GROUP].n_unique(),
        "malignant": int(target.sum()),
    }
    values = {
        f"{metric}{end}": value
        for metric in METRICS
        for end, value in zip(("", "_low", "_high"), found.get(metric, (None,) * 3), strict=True)
    }
    return {**counts, **values}


def _share(is_right: np.ndarray, patient: np.ndarray) -> tuple[float, float, float]:
    one_bin = np.zeros(len(is_right), np.intp)
    share, low, high = observed_shares(one_bin, is_right.astype(np.int64), patient)
    return float(share[0]), float(low[0]), float(high[0])
