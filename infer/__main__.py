"""`python -m infer embed | fit | predict | scores | compare | report | doctor`: from engines to a submission."""

from infer.doctor import doctor
from infer.embedding.embed import embed
from infer.ensemble.compare import compare
from infer.ensemble.fit import fit
from infer.ensemble.predict import predict
from infer.ensemble.scores import show
from infer.report import report
from isic import cli

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
