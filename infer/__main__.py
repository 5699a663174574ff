"""`python -m infer embed | fit | predict | scores | compare | report | doctor`."""

from infer.doctor import doctor
from infer.embedding.embed import embed
from infer.ensemble.compare import compare
from infer.ensemble.fit import FitSettings
from infer.ensemble.fit import fit as fit_ensemble
from infer.ensemble.predict import predict
from infer.ensemble.scores import show
from infer.report import report, write_report
from isic.runtime import cli


def fit(settings: FitSettings) -> None:
    """Fits a GBDT ensemble and writes it with its out-of-fold scores and a report."""
    root = fit_ensemble(settings)
    print(f"report: {write_report(root, settings.data, settings.embeddings)}")


if __name__ == "__main__":
    cli.run(
        {
            "embed": embed,
            "fit": fit,
            "predict": predict,
            "scores": show,
            "compare": compare,
            "report": report,
            "doctor": doctor,
        }
    )
