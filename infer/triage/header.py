"""The parts that the page of a patient and the index share."""

from collections.abc import Mapping
from typing import Any

from infer.ensemble.blends.artifact import Scorer, ensembles_of
from infer.ensemble.boosting.refit import Rows
from infer.ensemble.scoring.scores import small_patients
from isic import schema
from isic.html import page
from isic.html.markup import Markup, tag
from isic.metrics import TOP_K

CAVEAT = (
    "Research software, not a medical device: the order of the lesions is no diagnosis and must "
    "not guide anyone's care. A low score does not mean that a lesion is benign."
)
SCORES_OF_ALL = (
    "by models that were fitted on every training row; the sensitivity and the pAUC are of the "
    "models of the folds"
)
MODEL = "Model"
TRAINED_ON = "Trained on"
SENSITIVITY = f"Sensitivity at {TOP_K}"


def caveat(model: Mapping[str, str]) -> Markup:
    """Return the limits of the pages, and in short how good the model of `model_facts` is."""
    text = f"{CAVEAT} The model was trained on {model[TRAINED_ON]}. {model[SENSITIVITY]}."
    return tag("p", text, class_="caveat")


def model_facts(scorer: Scorer, rows: Rows, prevalence: float | None) -> dict[str, str]:
    """Return, by label, the model's training rows and its scores on patients it had not seen.

    Args:
        rows: those that the models behind the pages' scores were fitted on.
        prevalence: share of malignant lesions of the pages' probabilities, if it was given.
    """
    manifest = scorer.manifest
    target = scorer.oof()[schema.TARGET]
    lesions = manifest["lesions_per_patient"]
    scores = manifest["scores"]
    networks = sorted(
        {name for each in ensembles_of(scorer) for name in each.manifest["embeddings"]}
    )
    found = page.percent(scores[f"top_{TOP_K}_by_lesion"], 1)
    return {
        MODEL: scorer.root.name,
        TRAINED_ON: f"{len(target):,} lesions of {lesions['patients']:,} patients, "
        f"{int(target.sum()):,} of the lesions malignant",
        "Image networks": ", ".join(networks) or "none",
        SENSITIVITY: f"{found} of the malignant lesions of patients that it had not seen were "
        f"among their patient's {TOP_K} highest scores{_small_patients(scores)}",
        "pAUC above 80 % sensitivity": f"{scores['pauc']:.4f} of at most 0.2, out of fold",
        "Training table": f"sha256 {_table_digest(scorer)}",
        **({"Scores": SCORES_OF_ALL} if rows == "all" else {}),
        **({} if prevalence is None else {"Probabilities": _share_text(prevalence)}),
    }


def _share_text(prevalence: float) -> str:
    return f"calibrated, if {page.percent(prevalence)} of the lesions to score are malignant"


def _small_patients(scores: Mapping[str, Any]) -> str:
    """Return the caveat that the share holds for some patients whatever their scores are."""
    number = scores[f"patients_of_at_most_{TOP_K}"]
    return f" ({small_patients(number, scores['patients_with_malignant'])})" if number else ""


def _table_digest(scorer: Scorer) -> str:
    return str(ensembles_of(scorer)[0].manifest["metadata_sha256"])
