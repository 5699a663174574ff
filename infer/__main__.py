"""`python -m infer embed | fit | select | blend | predict | bundle | submit | ...`."""

from isic.runtime.cli import Command, run

COMMANDS = {
    "embed": Command(
        "infer.embedding.settings:EmbedSettings", "infer.embedding.embed:embed_dataset"
    ),
    "fit": Command("infer.ensemble.settings:FitSettings", "infer.commands:fit"),
    "select": Command(
        "infer.ensemble.settings:SelectSettings", "infer.ensemble.features.select:select"
    ),
    "predict": Command(
        "infer.ensemble.settings:PredictSettings", "infer.ensemble.predict:predict_submission"
    ),
    "blend": Command("infer.ensemble.settings:BlendSettings", "infer.commands:blend"),
    "scores": Command(
        "infer.ensemble.settings:ScoresSettings", "infer.ensemble.scoring.scores:show_scores"
    ),
    "compare": Command(
        "infer.ensemble.settings:CompareSettings",
        "infer.ensemble.scoring.compare:compare_ensembles",
    ),
    "bundle": Command("infer.submission.settings:BundleSettings", "infer.submission.make:bundle"),
    "submit": Command("infer.submission.settings:SubmitSettings", "infer.submission.submit:submit"),
    "explain": Command("infer.explain.settings:ExplainSettings", "infer.explain.explain:explain"),
    "triage": Command("infer.triage.settings:TriageSettings", "infer.triage.triage:triage"),
    "report": Command("infer.report.settings:ReportSettings", "infer.report.write:report"),
    "doctor": Command("infer.doctor:DoctorSettings", "infer.doctor:doctor"),
}

if __name__ == "__main__":
    run(COMMANDS)
