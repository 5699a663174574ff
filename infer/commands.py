"""Commands that need several parts of inference."""

from infer.ensemble.blends.write import write_blend
from infer.ensemble.fit import fit_ensemble
from infer.ensemble.settings import BlendSettings, FitSettings
from infer.report.write import write_report


def fit(settings: FitSettings) -> None:
    """Fit an ensemble and write its report."""
    root = fit_ensemble(settings)
    print(f"report: {write_report(root, settings.data, settings.embeddings)}")


def blend(settings: BlendSettings) -> None:
    """Blend ensembles and write the report of the blend."""
    root = write_blend(settings)
    print(f"report: {write_report(root, settings.data)}")
