"""The report's sections: their content and order."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from infer.embedding.store import refuse_other_origin
from infer.ensemble.artifact import Ensemble
from infer.ensemble.blends.artifact import Blend, Scorer, ensembles_of, mean_probability
from infer.ensemble.features.own_tables import OOF
from infer.ensemble.images import scores as image_scores
from infer.ensemble.images.networks import by_network, listed
from infer.ensemble.scoring.calibration import (
    CALIBRATION,
    describe_calibration,
    out_of_fold_probability,
)
from infer.ensemble.scoring.chosen import choices
from infer.ensemble.scoring.scores import small_patients
from infer.ensemble.scoring.triage import summarise_triage
from infer.report import figures
from infer.report.case_cards import Pictures, case_card
from infer.report.cases import Case, pictures, worst_false_alarms, worst_misses
from infer.report.curves import Reliability, reliability
from infer.report.importance import GROUPS, importance, share_by_group
from infer.report.maps import projections
from infer.report.occlusion import MapPicture, Network, draw_maps
from infer.report.scored import BLEND, GROUP, Judgement, Scored, judge
from infer.report.subgroups import ALL, ITA, METRICS, MIN_LESIONS, SENSITIVITY, diagnosis_note
from isic import schema
from isic.html import page
from isic.html.markup import Markup, join, tag
from isic.html.page import NONE, percent
from isic.metrics import NUM_RESAMPLES, TOP_K, TopK, bootstrap_pauc
from isic.runtime.errors import UserError

CAVEAT = (
    "These are research scores for comparing models: they are no diagnosis and must not guide "
    "anyone's care."
)
TOP_HEADING = f"Top-{TOP_K}"
NUM_TOP = 15
"""Features that are listed by name."""
# Larger than in CSS pixels, for screens of high density.
LARGE = 160
SMALL = 96
"""Sides of the thumbnails in pixels."""

ReportSection = tuple[str, Sequence[str]]
"""Title and content."""


def sections(
    scored: Scored,
    embeddings: Sequence[Path],
    network: Network | None = None,
    groups: pl.DataFrame | None = None,
) -> dict[str, ReportSection]:
    """Return all sections by the names of the links to them.

    Args:
        embeddings: runs to draw maps of.
        network: the one that makes the occlusion maps of the errors; None for no such maps.
        groups: scores of subgroups, see `score_groups`; None for no section on them.

    Raises:
        UserError: embeddings or the network are of another network or fold plan.
    """
    return {
        "Ranking": _ranking(scored),
        "Stability": _stability(scored),
        **({} if groups is None else {"Subgroups": _subgroups(groups)}),
        "Calibration": _calibration(scored),
        **_inside(scored, embeddings),
        **_errors(scored, network),
        "Origin": _origin(scored),
    }


def _inside(scored: Scored, embeddings: Sequence[Path]) -> dict[str, ReportSection]:
    """Return the sections on the networks and features, or on the members of a blend."""
    ensemble = scored.ensemble
    if isinstance(ensemble, Blend):
        return {"Members": _members(ensemble)}
    return {
        "Networks": _networks(ensemble),
        "Features": _features(ensemble),
        "Map": _map(ensemble, scored.oof, embeddings),
    }


def _members(blend: Blend) -> ReportSection:
    intro = (
        "The score is the weighted mean of the members' ranks. Their features and networks are in "
        "their own reports."
    )
    rows = []
    for name, member in blend.members.items():
        manifest = member.manifest
        score = _four_digits(manifest["scores"]["pauc"])
        rows.append((name, percent(blend.weights[name]), manifest["features"], score))
    table = page.table("Members", ("ensemble", "weight", "features", "pAUC"), rows)
    return "The members of the blend", (tag("p", intro), tag("div", table, class_="tables"))


def header(scored: Scored, names: Iterable[str]) -> Markup:
    """Return the part above the sections, with links to them by their names."""
    counts = scored.pooled
    malignant = percent(counts.num_malignant / counts.num_lesions)
    lead = (
        f"{counts.num_lesions:,} lesions of {counts.num_patients:,} patients, "
        f"{counts.num_malignant:,} of the lesions malignant ({malignant}). "
        f"{_out_of_fold(scored.ensemble)} "
    )
    return tag(
        "header",
        tag("p", "Out-of-fold report", class_="over"),
        tag("h1", scored.ensemble.root.name),
        tag("p", lead, _models(scored.ensemble), class_="lead"),
        tag("p", CAVEAT, class_="caveat"),
        _tiles(scored),
        page.links(names),
    )


def _models(scorer: Scorer) -> str:
    """Return a sentence on the models behind the score."""
    if isinstance(scorer, Blend):
        shares = (f"{name} {percent(weight)}" for name, weight in scorer.weights.items())
        return f"The score blends the ranks of {', '.join(shares)}."
    num_boosters = len(scorer.manifest["boosters"])
    if not num_boosters:
        num_networks = len(scorer.manifest["embeddings"])
        if num_networks > 1:
            return f"The score is the mean of {num_networks} image networks."
        return "The score is that of the image network."
    return f"{num_boosters} boosters on {len(scorer.state.names)} features."


def _out_of_fold(scorer: Scorer) -> str:
    """Return how far the scores are independent of their own patients."""
    members: dict[str, list[str]] = {}
    for member in ensembles_of(scorer):
        members.setdefault(_out_of_fold_sentence(member), []).append(member.root.name)
    sentences = list(members)
    if len(sentences) > 1:
        sentences = [f"{listed(names)}: {sentence}" for sentence, names in members.items()]
    chosen = [f"But {choice}, so the score may be too high." for choice in choices(scorer.manifest)]
    return " ".join([*sentences, *chosen])


def _out_of_fold_sentence(ensemble: Ensemble) -> str:
    """Return a sentence on how far the scores of an ensemble are independent."""
    if not ensemble.manifest["boosters"]:
        return "Every score is out of fold: by an image model that was trained without the patient."
    of_fold_models = ["image features"] if ensemble.manifest["embeddings"] else []
    if any(table.kind == OOF for table in ensemble.own_tables.values()):
        of_fold_models.append("columns of oof tables")
    if not of_fold_models:
        return "Every score is out of fold: by boosters that were fitted without the patient."
    columns = listed(of_fold_models)
    return (
        f"Every score is out of fold: a lesion's {columns} come from a model that was trained "
        "without the patient, and the boosters were fitted without the patient's rows. Their "
        f"training rows have {columns} from the other folds' models, which were trained with "
        "the patient, so the independence is not complete."
    )


def _tiles(scored: Scored) -> Markup:
    target = scored.oof[schema.TARGET].to_numpy()
    score = scored.oof[BLEND].to_numpy()
    group = scored.oof[GROUP].to_numpy()
    resampled = bootstrap_pauc(target, [score], group, NUM_RESAMPLES)
    low, high = np.percentile(resampled, [2.5, 97.5])
    interval = f"{low:.4f} to {high:.4f} in 95 % of resamples of the patients"
    by_fold = [fold.pauc for fold in scored.by_fold if fold.pauc is not None]
    mean = float(np.mean(by_fold)) if by_fold else None
    spread = "too few folds for a spread"
    if len(by_fold) > 1:
        spread = f"± {np.std(by_fold, ddof=1):.4f} between folds"
    return page.tiles(
        [
            ("pAUC, pooled", _four_digits(scored.pooled.pauc), interval),
            ("pAUC, mean of folds", _four_digits(mean), spread),
            ("AUC", _four_digits(scored.pooled.auc), "area under the whole ROC curve"),
            *_top_tiles(scored.pooled.top),
        ]
    )


def _top_tiles(top: TopK | None) -> list[tuple[str, str, str]]:
    if top is None:
        return []
    by_lesion = f"of malignant lesions are among their patient's {TOP_K} highest scores"
    if top.num_small:
        by_lesion += f"; {small_patients(top.num_small, top.num_patients)}"
    by_patient = (
        "the same share of each patient with a malignant lesion, averaged: the challenge's "
        "secondary metric"
    )
    return [
        (f"{TOP_HEADING} by lesion", percent(top.by_lesion, 1), by_lesion),
        (f"{TOP_HEADING} by patient", percent(top.by_patient, 1), by_patient),
    ]


def _four_digits(value: float | None) -> str:
    return NONE if value is None else f"{value:.4f}"


def _tenths(share: float | None) -> str:
    return NONE if share is None else percent(share, 1)


def _ranking(scored: Scored) -> ReportSection:
    intro = (
        "The challenge scores only the order of the lesions, at thresholds by which at least 80 % "
        "of the malignant ones are found."
    )
    charts = (
        figures.roc_figure(scored.oof),
        figures.region_figure(scored.oof),
        figures.precision_recall_figure(scored.oof),
    )
    content = (tag("p", intro), tag("div", *charts, class_="figures"), *_triage(scored))
    return "How well the scores rank", content


def _triage(scored: Scored) -> tuple[Markup, Markup]:
    """Return the numbers needed to triage, under a sentence on them."""
    oof = scored.oof
    found = summarise_triage(
        oof[schema.TARGET].to_numpy(), oof[BLEND].to_numpy(), oof[GROUP].to_numpy()
    )
    intro = (
        "The number needed to triage is that of the lesions to look at per malignant one that is "
        "found. It holds for data with the same share of malignant lesions: it grows as they "
        "become rarer. The intervals hold 95 % of the resamples of the patients."
    )
    heading = ("sensitivity", "lesions to look at", "malignant", "number needed", "95 % interval")
    rows = [
        (
            percent(float(sensitivity)),
            *(f"{at[key]:,}" for key in ("lesions", "malignant")),
            f"{at['number_needed']:.1f}",
            f"{at['low']:.1f} to {at['high']:.1f}",
        )
        for sensitivity, at in found.items()
    ]
    table = page.table("Number needed to triage", heading, rows)
    return tag("p", intro), tag("div", table, class_="tables")


def _stability(scored: Scored) -> ReportSection:
    intro = (
        "The pooled pAUC is not the mean of the folds: a partial area is not additive, and the "
        "models of different folds may scale their scores differently."
    )
    parts = (
        _fold_table(scored),
        _model_table(scored),
        *_plan_tables(scored),
        *_lesion_tables(scored),
    )
    return "How stable the scores are", (tag("p", intro), tag("div", *parts, class_="tables"))


def _lesion_tables(scored: Scored) -> list[Markup]:
    """Return a table of the score by lesions per patient, if the fit has computed it."""
    # Not of blends, nor of ensembles that compare no lesions.
    found = scored.ensemble.manifest.get("pauc_by_lesions", {})
    caption = "If only some lesions of a patient are known"
    rows = [[size, _four_digits(value)] for size, value in found.items()]
    return [page.table(caption, ("lesions scored together", "pAUC, pooled"), rows)] if rows else []


def _networks(ensemble: Ensemble) -> ReportSection:
    title = "The networks by themselves"
    networks = ensemble.manifest["networks"]
    if not networks["scores"]:
        return title, (tag("p", "This ensemble uses no network's score."),)
    intro = (
        "The score that each network gives to the lesions, without the boosters. Networks that "
        "are equally good help each other the more, the less their rankings agree."
    )
    rows = [
        (name, *map(_four_digits, (score["pauc"], score["auc"])))
        for name, score in networks["scores"].items()
    ]
    tables = [page.table("Scores, pooled", ("network", "pAUC", "AUC"), rows)]
    if networks["correlations"]:
        pairs = [
            (" and ".join(found["pair"]), *map(_two_digits, (found["all"], found["malignant"])))
            for found in networks["correlations"]
        ]
        heading = ("networks", "all lesions", "malignant")
        tables.append(page.table("Rank correlation", heading, pairs))
    return title, (tag("p", intro), tag("div", *tables, class_="tables"))


def _two_digits(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


SCORES = ("pAUC", "AUC", f"top-{TOP_K} by lesion", "by patient")
"""Headings of the columns of `_scores`."""


def _fold_table(scored: Scored) -> Markup:
    heading = ("fold", *SCORES, "lesions", "malignant", "patients")
    rows = [[row.name, *_scores(row), *_counts(row)] for row in (*scored.by_fold, scored.pooled)]
    return page.table("By fold", heading, rows, sums=1)


def _plan_tables(scored: Scored) -> list[Markup]:
    """Return the table of fold plans, none if there is one plan."""
    scores = scored.ensemble.manifest["scores"]
    by_split = scores.get("pauc_by_split")
    if not by_split:
        return []
    rows = [[split_seed, _four_digits(value)] for split_seed, value in by_split.items()]
    mean = f"{scores['pauc_mean_of_splits']:.4f} ± {scores['pauc_std_of_splits']:.4f}"
    return [page.table("By fold plan", ("split seed", "pAUC"), [*rows, ["mean", mean]], sums=1)]


def _model_table(scored: Scored) -> Markup:
    models = [judge(name, scored.oof, name) for name in scored.models]
    blend = dataclasses.replace(scored.pooled, name=BLEND)
    rows = [[row.name, *_scores(row)] for row in (*models, blend)]
    caption = "By library and seed, pooled"
    if isinstance(scored.ensemble, Blend):
        caption = "By member, pooled"
    return page.table(caption, ("model", *SCORES), rows, sums=1)


def _scores(row: Judgement) -> list[str]:
    top = (row.top.by_lesion, row.top.by_patient) if row.top else (None, None)
    return [_four_digits(row.pauc), _four_digits(row.auc), *map(_tenths, top)]


def _counts(row: Judgement) -> list[str]:
    return [f"{value:,}" for value in (row.num_lesions, row.num_malignant, row.num_patients)]


def _subgroups(groups: pl.DataFrame) -> ReportSection:
    intro = (
        f"All groups are judged at the threshold that finds {percent(SENSITIVITY)} of all "
        "malignant lesions. Brackets hold 95 % of the resamples of the patients. Groups with fewer "
        f"than {MIN_LESIONS} malignant or benign lesions are shown without the scores that would "
        "rest on them. Of many groups some differ by chance."
    )
    note = diagnosis_note(groups["by"].unique(maintain_order=True))
    tables = [
        *(_group_table(rows) for _, rows in groups.group_by("by", maintain_order=True)),
        *([tag("p", ITA_CAVEAT)] if ITA in groups["by"] else []),
        *([tag("p", f"Note that {note}.")] if note else []),
    ]
    return "Scores of subgroups", (tag("p", intro), tag("div", *tables, class_="tables wide"))


ITA_CAVEAT = (
    "Skin tone (ita) is the individual typology angle of the skin around the lesion, as the camera "
    "has measured its colour. The lighting of the photographs is not calibrated, sun-exposed sites "
    "are darker than others of the same patient, and an angle is no ethnicity: the classes are a "
    "rough guide."
)


def _group_table(rows: pl.DataFrame) -> Markup:
    by = rows["by"][0]
    counts = ("lesions", "patients", "malignant")
    lines = [
        (
            row["group"],
            *(f"{row[name]:,}" for name in counts),
            *(_metric(row, metric, f"too few {lacking}") for metric, lacking in METRICS.items()),
        )
        for row in rows.iter_rows(named=True)
    ]
    heading = (by, *counts, "pAUC", "sensitivity", "specificity")
    return page.table("All lesions" if by == ALL else f"By {by}", heading, lines)


def _metric(row: Mapping[str, Any], name: str, lacking: str) -> str:
    if row[name] is None:
        return lacking
    shown = _four_digits if name == "pauc" else _tenths
    return f"{shown(row[name])} ({shown(row[f'{name}_low'])} to {shown(row[f'{name}_high'])})"


def _calibration(scored: Scored) -> ReportSection:
    intro = (
        "Scores are not meant as probabilities: the boosters are fitted on fewer negatives and "
        "with weighted positives, so scores may be far above the true shares. The challenge "
        "evaluates their order only."
    )
    oof = scored.oof.with_columns(pl.Series(BLEND, mean_probability(scored.ensemble)))
    bins = _reliability(oof)
    charts = (
        figures.reliability_figure(oof, bins),
        figures.distribution_figure(oof),
        _bin_table(bins),
        *_calibrated(scored),
    )
    return "Scores as probabilities", (tag("p", intro), tag("div", *charts, class_="figures"))


def _calibrated(scored: Scored) -> tuple[Markup, ...]:
    """Return the chart and the table of the calibrated probabilities, if there are any."""
    calibration = scored.ensemble.calibration
    if calibration is None:
        return ()
    oof = scored.oof
    score, target, fold = (oof[name].to_numpy() for name in (BLEND, schema.TARGET, "fold"))
    probability = out_of_fold_probability(calibration.method, score, target, fold)
    calibrated = oof.with_columns(pl.Series(BLEND, probability))
    bins = _reliability(calibrated)
    found = scored.ensemble.manifest["scores"][CALIBRATION]
    sentence = describe_calibration(found)
    return (
        figures.reliability_figure(calibrated, bins, "After calibration"),
        _bin_table(bins, "After calibration, in numbers"),
        tag("p", f"{sentence[0].upper()}{sentence[1:]}."),
    )


def _reliability(oof: pl.DataFrame) -> Reliability:
    target, probability, group = (oof[name].to_numpy() for name in (schema.TARGET, BLEND, GROUP))
    return reliability(target, probability, group)


def _bin_table(bins: Reliability, caption: str = "Calibration in numbers") -> Markup:
    rows = zip(
        bins.mean_score.tolist(), bins.observed.tolist(), bins.num_rows.tolist(), strict=True
    )
    cells = [(percent(mean), percent(observed), f"{number:,}") for mean, observed, number in rows]
    return page.table(caption, ("mean score", "malignant", "lesions"), cells)


def _features(ensemble: Ensemble) -> ReportSection:
    title = "Feature importance"
    shares = importance(
        ensemble.root,
        ensemble.manifest["boosters"],
        ensemble.state.names,
        ensemble.spec.own_names,
    )
    if shares.is_empty():
        return title, (tag("p", "There are no trees: the score comes from the image networks."),)
    intro = (
        "Share of the gain of all splits, averaged over boosters. Correlated features share their "
        "importance, so a low share does not mean that a feature can be dropped."
    )
    groups = [
        (join(GROUPS.get(group, group), f" ({number})"), share)
        for group, number, share in share_by_group(shares).iter_rows()
    ]
    top = [
        (join(page.code(name), " ", tag("small", GROUPS.get(group, group))), share)
        for name, group, share in shares.head(NUM_TOP).iter_rows()
    ]
    tables = tag(
        "div",
        page.bars("By group (number of features)", ("group", "share"), groups),
        page.bars(f"The first {len(top)} of {len(shares)}", ("feature", "share"), top),
        class_="tables uneven",
    )
    return title, (tag("p", intro), tables)


def _map(ensemble: Ensemble, oof: pl.DataFrame, embeddings: Sequence[Path]) -> ReportSection:
    title = "Map of the embeddings"
    fitted_with = ensemble.manifest["embeddings"]
    if not fitted_with:
        return title, (tag("p", "This ensemble uses no embeddings, so there is no map."),)
    if not embeddings:
        command = tag("code", "infer report")
        return title, (tag("p", "Not drawn: ", command, " was run without --embeddings."),)
    roots = by_network(embeddings, "train")
    for name, root in roots.items():
        if name not in fitted_with:
            raise UserError(
                f"{root} holds embeddings of {name}, but the ensemble was fitted with "
                f"{listed(fitted_with)}; give theirs"
            )
        origin = image_scores.read_origin(root, "train", fitted_with[name]["folds_digest"])
        refuse_other_origin(root, "train", origin, fitted_with[name])
    maps = [
        figures.map_figure(
            f"{name}, fold {fold}" if len(fitted_with) > 1 else f"Fold {fold}",
            projection,
            rows[schema.ID].to_list(),
            rows[schema.TARGET].to_numpy(),
        )
        for name, root in roots.items()
        for fold, projection, rows in projections(root, oof)
    ]
    intro = (
        "The first two principal components of each fold model's features, for the lesions that "
        "the fold holds out. Each model has its own feature space, so each fold has its own map; "
        "of many lesions a sample is shown."
    )
    key = (tag("span", "malignant", class_="key malignant"), tag("span", "benign", class_="key"))
    return title, (tag("p", intro), tag("p", *key), tag("div", *maps, class_="figures maps"))


def _errors(scored: Scored, network: Network | None) -> dict[str, ReportSection]:
    misses = worst_misses(scored.oof, scored.metadata)
    alarms = worst_false_alarms(scored.oof, scored.metadata)
    large, small = _thumbnails(scored, (*misses, *alarms))

    maps = _occlusion_maps(scored, network, (*misses, *alarms))

    note = [tag("p", scored.images_missing)] if scored.images is None else []
    if network and maps:
        note = [tag("p", _maps_text(network)), tag("p", *MAP_KEY)]

    def section(title: str, intro: str, cases: Sequence[Case]) -> ReportSection:
        cards = [case_card(case, large, small, maps) for case in cases]
        return title, (tag("p", intro), *note, tag("div", *cards, class_="cases"))

    return {
        "Misses": section("Worst misses", "The malignant lesions with the lowest scores.", misses),
        "False-alarms": section(
            "Worst false alarms", "The benign lesions with the highest scores.", alarms
        ),
    }


MAP_KEY = (
    tag("span", "the patch raises the logit", class_="key raises"),
    tag("span", "the patch lowers it", class_="key lowers"),
)


def _maps_text(network: Network) -> str:
    return (
        f"Below each photo is its occlusion map: the change of the logit of {network.name} if a "
        "patch of the image is hidden by the image's mean colour. It is made by the fold that held "
        "the lesion out, and each map has a scale of its own. A map shows where the network looks, "
        "not why."
    )


def _occlusion_maps(
    scored: Scored, network: Network | None, cases: Sequence[Case]
) -> dict[str, MapPicture]:
    if network is None or scored.images is None:
        return {}
    fold_of = network.folds_of(sorted({case.lesion.name for case in cases}), "train")
    with network.open() as embedder:
        return draw_maps(embedder, scored.images, fold_of, LARGE)


def _thumbnails(scored: Scored, cases: Sequence[Case]) -> tuple[Pictures, Pictures]:
    if scored.images is None:
        return {}, {}
    names = {case.lesion.name for case in cases}
    others = {lesion.name for case in cases for lesion in case.others}
    large = pictures(scored.images, sorted(names), LARGE)
    small = pictures(scored.images, sorted(others), SMALL)
    return large, small


def _origin(scored: Scored) -> ReportSection:
    manifest = scored.ensemble.manifest
    items = {
        **_parts(scored.ensemble),
        "Lesions per patient": _lesions(manifest["lesions_per_patient"]),
        "Fold plan": manifest["folds_digest"],
        "Training table": f"sha256 {manifest['metadata_sha256']}",
        "Versions": _pairs(manifest["versions"]),
    }
    return "Provenance", (page.facts(items),)


def _parts(scorer: Scorer) -> dict[str, str]:
    """Return the facts that ensembles and blends do not share."""
    manifest = scorer.manifest
    if isinstance(scorer, Blend):
        return {"Members": _pairs(manifest["members"]), "Weights": _pairs(manifest["weights"])}
    networks = [*manifest["embeddings"], *(f"{name} (frozen)" for name in manifest["frozen"])]
    weights = _weights(manifest)
    return {
        "Features": f"{manifest['features']}: {', '.join(scorer.state.names[:3])} …",
        "Settings": _pairs(manifest["settings"]),
        "Networks": ", ".join(networks) or "none",
        # Manifests of earlier versions do not have them.
        **({"Pretrained weights": "; ".join(weights)} if weights else {}),
    }


def _weights(manifest: Mapping[str, Any]) -> list[str]:
    """Return the source and digest of the weights that each network started from."""
    started_from = {
        name: list((origin.get("pretrained") or {}).values())
        for name, origin in manifest["embeddings"].items()
    }
    for name, frozen in manifest["frozen"].items():
        started_from[name] = [frozen["made_with"].get("pretrained")]
    return [
        f"{name}: {', '.join(dict.fromkeys(map(_weight, found)))}"
        for name, found in started_from.items()
        if any(found)
    ]


def _weight(started_from: Mapping[str, str]) -> str:
    digest = started_from.get("sha256") or started_from.get("tensors_sha256")
    return started_from["source"] + (f" (sha256 {digest})" if digest else "")


def _lesions(per_patient: Mapping[str, Any]) -> str:
    values = per_patient["percentiles"]
    return f"{values['0']:,} to {values['100']:,}, median {values['50']:,}"


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
