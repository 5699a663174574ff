"""`python -m benchmarks ingest | embed | tabular | accuracy | ablation | report`: what each step costs and gives."""

from benchmarks.ablation import ablation
from benchmarks.accuracy import accuracy
from benchmarks.embed import embed
from benchmarks.ingest import ingest
from benchmarks.report import report
from benchmarks.tabular import tabular
from isic import cli

if __name__ == "__main__":
    cli.run(
        {
            "ingest": ingest,
            "embed": embed,
            "tabular": tabular,
            "accuracy": accuracy,
            "ablation": ablation,
            "report": report,
        }
    )
