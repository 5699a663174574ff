"""`python -m benchmarks ingest`: what each step costs on this machine."""

from benchmarks.ingest import ingest
from isic import cli

if __name__ == "__main__":
    cli.run({"ingest": ingest})
