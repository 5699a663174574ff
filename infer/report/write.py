"""`python -m infer report`: what an ensemble is worth and where it errs, as one HTML file that opens anywhere."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from pydantic import Field

from infer import image_scores
from infer.ensemble import OOF, Ensemble, open_ensemble
from infer.report import figures, page
from infer.report.cases import Case, pictures, worst_false_alarms, worst_misses
from infer.report.curves import reliability
from infer.report.importance import GROUPS, by_group, importance
from infer.report.maps import projections
from infer.report.markup import Markup, join, tag
from infer.report.page import NONE, percent
from isic import schema
from isic.config import Settings
from isic.dataset import Dataset
from isic.errors import UserError
from isic.files import write_text
from isic.images import ImageStore
from isic.metadata import with_patient
from isic.metrics import TOP_K, bootstrap_pauc, pauc, roc_auc, top_k_sensitivity

FILE = "report.html"
NUM_DRAWS = 200
"""Redraws of the patients for the interval; more would change its third digit."""
NUM_TOP = 15
LARGE, SMALL = 160, 96
"""Sides of the thumbnails in pixels, larger than they are shown: screens have more pixels than CSS counts."""


class ReportSettings(Settings):
    """Settings of `infer report`."""

    ensemble: Path = Field(
        Path("outputs/ensemble"), description="an ensemble's folder, or one with a single ensemble in it"
    )
    data: Path = Field(Path("data/isic-2024"), description="dataset folder that it was fitted on")
    embeddings: Path | None = Field(None, description="outputs/embeddings/<config>, for the map of embeddings")


def report(settings: ReportSettings) -> None:
    """Writes an ensemble's report.html again: curves, tables, what the trees look at, the worst misses."""
    print(f"report: {write_report(settings.ensemble, settings.data, settings.embeddings)}")


def write_report(ensemble: Path, data: Path, embeddings: Path | None = None) -> Path:
    """Writes `report.html` into an ensemble's folder and returns its path.

    Args:
        ensemble: the folder.
        data: the dataset that it was fitted on; its images are shown where it has them.
        embeddings: the embedding run that it was fitted with, for the map.

    Raises:
        UserError: no ensemble, other data, or embeddings of another fold plan.
    """
    scored = _read(open_ensemble(ensemble), data)
    body: dict[str, Section] = {
        "Ranking": _ranking(scored),
        "Stability": _steadiness(scored),
        "Calibration": _calibration(scored),
        "Features": _features(scored),
        "Map": _map(scored, embeddings),
        **_errors(scored),
        "Origin": _origin(scored),
    }
    sections = [page.section(name, title, *content) for name, (title, content) in body.items()]
    name = scored.ensemble.root.name
    path = scored.ensemble.root / FILE
    write_text(path, page.document(f"{name}: out-of-fold report", _header(scored, body), tag("main", *sections)))
    return path


Section = tuple[str, Sequence[str]]
"""Title and content."""


@dataclass(frozen=True)
class Scored:
    """What a report is made from."""

    ensemble: Ensemble
    oof: pl.DataFrame
    """`isic_id`, `fold`, `target`, the models' scores, `blend`, and `patient_id`, filled in where it is not known."""
    metadata: pl.DataFrame
    images: ImageStore | None
    images_missing: str
    """Why there are no images."""

    @property
    def models(self) -> list[str]:
        return [name for name in self.oof.columns if name not in {schema.ID, "fold", schema.TARGET, schema.PATIENT}]


def _read(ensemble: Ensemble, data: Path) -> Scored:
    dataset = Dataset(data)
    metadata = dataset.metadata("train")
    oof = pl.read_parquet(ensemble.root / OOF)
    patients = with_patient(metadata).select(schema.ID, schema.PATIENT)
    oof = oof.join(patients, on=schema.ID, how="left", maintain_order="left")
    if missing := oof[schema.PATIENT].null_count():
        raise UserError(
            f"{data} lacks {missing} of the scored rows; give the --data that {ensemble.root} was fitted on"
        )
    try:
        images, reason = dataset.find_images("train"), "This dataset has no images."
    except UserError as error:  # the scores do not need them
        images, reason = None, f"The images cannot be read: {error}."
    return Scored(ensemble, oof, metadata, images, reason)


def _header(scored: Scored, anchors: Iterable[str]) -> Markup:
    oof, manifest = scored.oof, scored.ensemble.manifest
    num_positives = int(oof[schema.TARGET].sum())
    lead = (
        f"{len(oof):,} lesions of {oof[schema.PATIENT].n_unique():,} patients, {num_positives:,} of them malignant "
        f"({percent(num_positives / len(oof))}). Every score is out of fold: by models that never saw the patient. "
        f"{len(manifest['boosters'])} boosters, {len(scored.ensemble.state.names)} features."
    )
    return tag(
        "header",
        tag("p", "Out-of-fold report", class_="over"),
        tag("h1", scored.ensemble.root.name),
        tag("p", lead, class_="lead"),
        tag("p", page.CAVEAT, class_="caveat"),
        _tiles(scored),
        page.links(anchors),
    )


def _tiles(scored: Scored) -> Markup:
    target, score, patient = (scored.oof[name].to_numpy() for name in (schema.TARGET, "blend", schema.PATIENT))
    low, high = np.percentile(bootstrap_pauc(target, [score], patient, NUM_DRAWS), [2.5, 97.5])
    by_fold = [row["pauc"] for row in _fold_rows(scored) if row["pauc"] is not None]
    spread = f"± {np.std(by_fold, ddof=1):.4f} between folds" if len(by_fold) > 1 else "one fold with both classes"
    return page.tiles(
        [
            (
                "pAUC, pooled",
                f"{pauc(target, score):.4f}",
                f"{low:.4f} to {high:.4f} in 95 % of redraws of the patients",
            ),
            ("pAUC, mean of folds", f"{np.mean(by_fold):.4f}" if by_fold else NONE, spread),
            ("AUC", f"{roc_auc(target, score):.4f}", "area under the whole ROC curve"),
            (
                f"Top-{TOP_K} sensitivity",
                percent(top_k_sensitivity(target, score, patient), 1),
                f"of malignant lesions are among their patient's {TOP_K} highest scores",
            ),
        ]
    )


def _ranking(scored: Scored) -> Section:
    drawn = (figures.roc_figure, figures.region_figure, figures.precision_recall_figure)
    intro = (
        "The challenge counts the order of the scores alone, and only where four in five malignant lesions are found."
    )
    return "How well the scores rank", (
        tag("p", intro),
        tag("div", *(draw(scored.oof) for draw in drawn), class_="figures"),
    )


def _steadiness(scored: Scored) -> Section:
    intro = "Pooled values and means of folds differ: a partial area is not additive."
    heading = ("pAUC", "AUC", f"top-{TOP_K}", "lesions", "malignant", "patients")
    folds = [[row["name"], *_scores(row), *_counts(row)] for row in _fold_rows(scored)]
    pooled = _judge("pooled", scored.oof, "blend")
    models = [[name, *_scores(_judge(name, scored.oof, name))] for name in scored.models]
    return "How steady they are", (
        tag("p", intro),
        tag(
            "div",
            page.table("By fold", ("fold", *heading), [*folds, ["pooled", *_scores(pooled), *_counts(pooled)]], sums=1),
            page.table("By library and seed, pooled", ("model", *heading[:3]), models, sums=1),
            class_="tables",
        ),
    )


def _fold_rows(scored: Scored) -> list[dict[str, Any]]:
    return [_judge(str(fold), rows, "blend") for (fold,), rows in sorted(scored.oof.group_by("fold"))]


def _judge(name: str, rows: pl.DataFrame, model: str) -> dict[str, Any]:
    """Returns counts and scores of some rows; a score is None where they are of one class."""
    target, score, patient = (rows[column].to_numpy() for column in (schema.TARGET, model, schema.PATIENT))
    both = target.min() < target.max()
    return {
        "name": name,
        "lesions": len(rows),
        "malignant": int(target.sum()),
        "patients": rows[schema.PATIENT].n_unique(),
        "pauc": pauc(target, score) if both else None,
        "auc": roc_auc(target, score) if both else None,
        "top": top_k_sensitivity(target, score, patient) if both else None,
    }


def _counts(row: Mapping[str, Any]) -> list[str]:
    return [f"{row[name]:,}" for name in ("lesions", "malignant", "patients")]


def _scores(row: Mapping[str, Any]) -> list[str]:
    formats: dict[str, Callable[[float], str]] = {
        "pauc": "{:.4f}".format,
        "auc": "{:.4f}".format,
        "top": lambda share: percent(share, 1),
    }
    return [NONE if row[name] is None else write(row[name]) for name, write in formats.items()]


def _calibration(scored: Scored) -> Section:
    intro = (
        "The challenge never asks whether a score is a probability. Negatives are thinned out and positives weighted "
        "when the boosters are fitted, so scores may lie far above the true shares; their order is what they are for."
    )
    # Between libraries the blend has ranks; what may be read as a probability is the mean over the models.
    oof = scored.oof.with_columns(blend=pl.mean_horizontal(name for name in scored.models if name != "blend"))
    drawn = (figures.reliability_figure(oof), figures.distribution_figure(oof), _bins(oof))
    return "What a score means", (tag("p", intro), tag("div", *drawn, class_="figures"))


def _bins(oof: pl.DataFrame) -> Markup:
    """The dots of the calibration chart as a table."""
    bins = reliability(oof[schema.TARGET].to_numpy(), oof["blend"].to_numpy())
    rows = zip(bins.mean_score.tolist(), bins.observed.tolist(), bins.num_rows.tolist(), strict=True)
    cells = [(percent(mean), percent(observed), f"{number:,}") for mean, observed, number in rows]
    return page.table("Calibration in numbers", ("mean score", "malignant", "lesions"), cells)


def _features(scored: Scored) -> Section:
    title = "What the trees look at"
    ensemble = scored.ensemble
    shares = importance(ensemble.root, ensemble.manifest["boosters"], ensemble.state.names)
    if shares.is_empty():
        return title, (tag("p", "There are no trees: the score is the image model's own."),)
    groups = [
        (join(GROUPS.get(group, group), f" ({number})"), share) for group, number, share in by_group(shares).iter_rows()
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
        return title, (tag("p", "This ensemble looks at no image, so there are no embeddings to map."),)
    if embeddings is None:
        text = "Not drawn: `infer report` was given no --embeddings."
        return title, (tag("p", text),)
    image_scores.made_with(embeddings, "train", manifest["folds_digest"])
    maps = (
        figures.map_figure(fold, projection, rows[schema.ID].to_list(), rows[schema.TARGET].to_numpy())
        for fold, projection, rows in projections(embeddings, scored.oof)
    )
    intro = (
        "The two directions in which a fold model's features of the lesions it held out vary most. Each fold has a "
        "space of its own, so there is a map for each; of many lesions a part is drawn."
    )
    key = tag("span", "malignant", class_="key malignant"), tag("span", "benign", class_="key")
    return title, (tag("p", intro), tag("p", *key), tag("div", *maps, class_="figures maps"))


def _errors(scored: Scored) -> dict[str, Section]:
    misses, alarms = (find(scored.oof, scored.metadata) for find in (worst_misses, worst_false_alarms))
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
        "False-alarms": section("Worst false alarms", "The benign lesions with the highest scores.", alarms),
    }


def _origin(scored: Scored) -> Section:
    manifest = scored.ensemble.manifest
    embeddings = manifest["embeddings"]
    items = {
        "Features": f"{manifest['features']}: {', '.join(scored.ensemble.state.names[:3])} …",
        "Settings": _pairs(manifest["settings"]),
        "Fold plan": manifest["folds_digest"],
        "Embeddings": embeddings["config"] if embeddings else "none",
        "Training table": f"sha256 {manifest['metadata_sha256']}",
        "Versions": _pairs(manifest["versions"]),
    }
    return "Where this comes from", (page.facts(items),)


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
