"""Commands that need several parts of inference."""

from infer.ensemble.fit import fit_ensemble
from infer.ensemble.settings import FitSettings
from infer.report.write import write_report


def fit(settings: FitSettings) -> None:
    """Fit an ensemble and write its report."""
    root = fit_ensemble(settings)
    print(f"report: {write_report(root, settings.data, settings.embeddings)}")
