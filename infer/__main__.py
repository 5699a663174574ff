"""`python -m infer embed | fit | predict | scores | compare | report | doctor`."""

from infer.doctor import doctor
from infer.embedding.embed import embed_dataset
from infer.ensemble.compare import compare_ensembles
from infer.ensemble.fit import fit_ensemble
from infer.ensemble.fit_settings import FitSettings
from infer.ensemble.predict import predict_submission
from infer.ensemble.scores import show_scores
from infer.report import report, write_report
from isic.runtime import cli


def fit(settings: FitSettings) -> None:
    """Fits a GBDT ensemble and writes it with its out-of-fold scores and a report."""
    root = fit_ensemble(settings)
    print(f"report: {write_report(root, settings.data, settings.embeddings)}")


if __name__ == "__main__":
    cli.run(
        {
            "embed": embed_dataset,
            "fit": fit,
            "predict": predict_submission,
            "scores": show_scores,
            "compare": compare_ensembles,
            "report": report,
            "doctor": doctor,
        }
    )
