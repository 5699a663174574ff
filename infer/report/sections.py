"""The report's sections: what each says, in which order."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from infer.ensemble import image_scores
from infer.ensemble.scores import small_patients
from infer.report import figures, page
from infer.report.cases import Case, pictures, worst_false_alarms, worst_misses
from infer.report.curves import Reliability, reliability
from infer.report.importance import GROUPS, by_group, importance
from infer.report.maps import projections
from infer.report.markup import Markup, join, tag
from infer.report.page import NONE, percent
from infer.report.scored import BLEND, GROUP, Judgement, Scored, judge
from isic import schema
from isic.metrics import TOP_K, TopK, bootstrap_pauc

CAVEAT = "These are research scores for comparing models: they are no diagnosis and must not guide anyone's care."
TOP = f"Top-{TOP_K}"
NUM_DRAWS = 200
"""Redraws of the patients for the interval; more would change its third digit."""
NUM_TOP = 15
"""Features that are named."""
LARGE, SMALL = 160, 96
"""Sides of the thumbnails in pixels, larger than they are shown: screens have more pixels than CSS counts."""

Section = tuple[str, Sequence[str]]
"""Title and content."""


def sections(scored: Scored, embeddings: Path | None) -> dict[str, Section]:
    """Returns all sections by the names of the links to them. Raises UserError for embeddings of another fold plan."""
    return {
        "Ranking": _ranking(scored),
        "Stability": _stability(scored),
        "Calibration": _calibration(scored),
        "Features": _features(scored),
        "Map": _map(scored, embeddings),
        **_errors(scored),
        "Origin": _origin(scored),
    }


def header(scored: Scored, names: Iterable[str]) -> Markup:
    """Returns what stands above the sections, with links to them by their names."""
    counts, num_boosters = scored.pooled, len(scored.ensemble.manifest["boosters"])
    lead = (
        f"{counts.num_lesions:,} lesions of {counts.num_patients:,} patients, {counts.num_malignant:,} of the lesions "
        f"malignant ({percent(counts.num_malignant / counts.num_lesions)}). "
        f"{_out_of_fold(bool(num_boosters), scored.ensemble.manifest['embeddings'] is not None)} "
    )
    trees = f"{num_boosters} boosters look at {len(scored.ensemble.state.names)} features."
    return tag(
        "header",
        tag("p", "Out-of-fold report", class_="over"),
        tag("h1", scored.ensemble.root.name),
        tag("p", lead, trees if num_boosters else "The image model stands alone.", class_="lead"),
        tag("p", CAVEAT, class_="caveat"),
        _tiles(scored),
        page.links(names),
    )


def _out_of_fold(boosters: bool, fold_models: bool) -> str:
    """Returns a sentence on how far the scores are independent of the patients they are of."""
    if not boosters:
        return "Every score is out of fold: by an image model that was trained without the patient."
    if not fold_models:
        return "Every score is out of fold: by boosters that were fitted without the patient."
    return (
        "Every score is out of fold: a lesion's image features come from a model that was trained "
        "without the patient, and the boosters were fitted without the patient's rows. Their "
        "training rows have image features from the other folds' models, which were trained with "
        "the patient, so the independence is not complete."
    )


def _tiles(scored: Scored) -> Markup:
    target, score, group = (scored.oof[name].to_numpy() for name in (schema.TARGET, BLEND, GROUP))
    low, high = np.percentile(bootstrap_pauc(target, [score], group, NUM_DRAWS), [2.5, 97.5])
    by_fold = [fold.pauc for fold in scored.by_fold if fold.pauc is not None]
    mean = _four(float(np.mean(by_fold)) if by_fold else None)
    spread = (
        f"± {np.std(by_fold, ddof=1):.4f} between folds"
        if len(by_fold) > 1
        else "too few folds for a spread"
    )
    interval = f"{low:.4f} to {high:.4f} in 95 % of redraws of the patients"
    return page.tiles(
        [
            ("pAUC, pooled", _four(scored.pooled.pauc), interval),
            ("pAUC, mean of folds", mean, spread),
            ("AUC", _four(scored.pooled.auc), "area under the whole ROC curve"),
            *_top_tiles(scored.pooled.top),
        ]
    )


def _top_tiles(top: TopK | None) -> list[tuple[str, str, str]]:
    """Returns the tiles of both ways to count malignant lesions among their patient's highest scores."""
    if top is None:
        return []
    small = f"; {small_patients(top.num_small, top.num_patients)}" if top.num_small else ""
    return [
        (
            f"{TOP} by lesion",
            percent(top.by_lesion, 1),
            f"of malignant lesions are among their patient's {TOP_K} highest scores{small}",
        ),
        (
            f"{TOP} by patient",
            percent(top.by_patient, 1),
            "the same share of each patient with a malignant lesion, averaged: the challenge's "
            "secondary metric",
        ),
    ]


def _four(value: float | None) -> str:
    return NONE if value is None else f"{value:.4f}"


def _tenths(share: float | None) -> str:
    return NONE if share is None else percent(share, 1)


def _ranking(scored: Scored) -> Section:
    drawn = (figures.roc_figure, figures.region_figure, figures.precision_recall_figure)
    intro = (
        "The challenge counts the order of the scores alone, and only where four in five malignant "
        "lesions are found."
    )
    return "How well the scores rank", (
        tag("p", intro),
        tag("div", *(draw(scored.oof) for draw in drawn), class_="figures"),
    )


def _stability(scored: Scored) -> Section:
    intro = "Pooled values and means of folds differ: a partial area is not additive."
    heading = ("pAUC", "AUC", f"top-{TOP_K} by lesion", "by patient")
    models = [judge(name, scored.oof, name) for name in scored.models]
    by_fold = page.table(
        "By fold",
        ("fold", *heading, "lesions", "malignant", "patients"),
        [[row.name, *_scores(row), *_counts(row)] for row in (*scored.by_fold, scored.pooled)],
        sums=1,
    )
    by_model = page.table(
        "By library and seed, pooled",
        ("model", *heading),
        [
            [row.name, *_scores(row)]
            for row in (*models, dataclasses.replace(scored.pooled, name=BLEND))
        ],
        sums=1,
    )
    return "How steady they are", (tag("p", intro), tag("div", by_fold, by_model, class_="tables"))


def _scores(row: Judgement) -> list[str]:
    top = (row.top.by_lesion, row.top.by_patient) if row.top else (None, None)
    return [_four(row.pauc), _four(row.auc), *map(_tenths, top)]


def _counts(row: Judgement) -> list[str]:
    return [f"{value:,}" for value in (row.num_lesions, row.num_malignant, row.num_patients)]


def _calibration(scored: Scored) -> Section:
    intro = (
        "The challenge never asks whether a score is a probability. Negatives are thinned out and positives weighted "
        "when the boosters are fitted, so scores may lie far above the true shares; their order is what they are for."
    )
    # Between libraries the blend has ranks; what may be read as a probability is the mean over the models.
    oof = scored.oof.with_columns(**{BLEND: pl.mean_horizontal(scored.models)})
    target, score, patient = (oof[name].to_numpy() for name in (schema.TARGET, BLEND, GROUP))
    bins = reliability(target, score, patient)
    drawn = (figures.reliability_figure(oof, bins), figures.distribution_figure(oof), _bins(bins))
    return "What a score means", (tag("p", intro), tag("div", *drawn, class_="figures"))


def _bins(bins: Reliability) -> Markup:
    """The dots of the calibration chart as a table."""
    rows = zip(
        bins.mean_score.tolist(), bins.observed.tolist(), bins.num_rows.tolist(), strict=True
    )
    cells = [(percent(mean), percent(observed), f"{number:,}") for mean, observed, number in rows]
    return page.table("Calibration in numbers", ("mean score", "malignant", "lesions"), cells)


def _features(scored: Scored) -> Section:
    title = "What the trees look at"
    ensemble = scored.ensemble
    shares = importance(ensemble.root, ensemble.manifest["boosters"], ensemble.state.names)
    if shares.is_empty():
        return title, (tag("p", "There are no trees: the score is the image model's own."),)
    groups = [
        (join(GROUPS.get(group, group), f" ({number})"), share)
        for group, number, share in by_group(shares).iter_rows()
    ]
    top = [
        (join(page.code(name), " ", tag("small", GROUPS.get(group, group))), share)
        for name, group, share in shares.head(NUM_TOP).iter_rows()
    ]
    intro = (
        "Shares of the gain of all splits, averaged over boosters. Features that say nearly the same divide their "
        "share between them, so a low one does not mean that a feature could go."
    )
    content = (
        page.bars("By group (features in it)", ("group", "share"), groups),
        page.bars(f"The first {len(top)} of {len(shares)}", ("feature", "share"), top),
    )
    return title, (tag("p", intro), tag("div", *content, class_="tables uneven"))


def _map(scored: Scored, embeddings: Path | None) -> Section:
    title = "Map of the embeddings"
    manifest = scored.ensemble.manifest
    if manifest["embeddings"] is None:
        return title, (
            tag(
                "p",
                "This ensemble uses no fold model's view of the images, so there is none to map.",
            ),
        )
    if embeddings is None:
        text = "Not drawn: `infer report` was given no --embeddings."
        return title, (tag("p", text),)
    image_scores.read_origin(embeddings, "train", manifest["folds_digest"])
    maps = (
        figures.map_figure(
            fold, projection, rows[schema.ID].to_list(), rows[schema.TARGET].to_numpy()
        )
        for fold, projection, rows in projections(embeddings, scored.oof)
    )
    intro = (
        "The two directions in which a fold model's features of the lesions it held out vary most. Each fold has a "
        "space of its own, so there is a map for each; of many lesions a part is drawn."
    )
    key = tag("span", "malignant", class_="key malignant"), tag("span", "benign", class_="key")
    return title, (tag("p", intro), tag("p", *key), tag("div", *maps, class_="figures maps"))


def _errors(scored: Scored) -> dict[str, Section]:
    misses, alarms = (
        find(scored.oof, scored.metadata) for find in (worst_misses, worst_false_alarms)
    )
    names = [case.lesion.name for case in (*misses, *alarms)]
    others = [lesion.name for case in (*misses, *alarms) for lesion in case.others]
    small, large = (
        pictures(scored.images, sorted(set(wanted)), side) if scored.images else {}
        for wanted, side in ((others, SMALL), (names, LARGE))
    )
    note = [tag("p", scored.images_missing)] if scored.images is None else []

    def section(title: str, intro: str, cases: Sequence[Case]) -> Section:
        shown = tag("div", *(page.case(case, large, small) for case in cases), class_="cases")
        return title, (tag("p", intro), *note, shown)

    return {
        "Misses": section("Worst misses", "The malignant lesions with the lowest scores.", misses),
        "False-alarms": section(
            "Worst false alarms", "The benign lesions with the highest scores.", alarms
        ),
    }


def _origin(scored: Scored) -> Section:
    manifest = scored.ensemble.manifest
    embeddings = manifest["embeddings"]
    items = {
        "Features": f"{manifest['features']}: {', '.join(scored.ensemble.state.names[:3])} …",
        "Settings": _pairs(manifest["settings"]),
        "Lesions per patient": _lesions(manifest["lesions_per_patient"]),
        "Fold plan": manifest["folds_digest"],
        "Embeddings": embeddings["config"] if embeddings else "none",
        "Training table": f"sha256 {manifest['metadata_sha256']}",
        "Versions": _pairs(manifest["versions"]),
    }
    return "Where this comes from", (page.facts(items),)


def _lesions(per_patient: Mapping[str, Any]) -> str:
    values = per_patient["percentiles"]
    return f"{values['0']:,} to {values['100']:,}, median {values['50']:,}"


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
