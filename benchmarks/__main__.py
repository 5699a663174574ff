"""`python -m benchmarks ingest | embed | accuracy | report`: what each step costs and gives on this machine."""

from benchmarks.accuracy import accuracy
from benchmarks.embed import embed
from benchmarks.ingest import ingest
from benchmarks.report import report
from isic import cli

if __name__ == "__main__":
    cli.run({"ingest": ingest, "embed": embed, "accuracy": accuracy, "report": report})
