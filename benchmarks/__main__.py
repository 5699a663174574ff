"""`python -m benchmarks ingest | accuracy | report`: what each step costs and gives on this machine."""

from benchmarks.accuracy import accuracy
from benchmarks.ingest import ingest
from benchmarks.report import report
from isic import cli

if __name__ == "__main__":
    cli.run({"ingest": ingest, "accuracy": accuracy, "report": report})
