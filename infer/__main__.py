"""`python -m infer embed | fit | predict | scores | compare | report | doctor`: from engines to a submission."""

from infer.compare import compare
from infer.doctor import doctor
from infer.embed import embed
from infer.fit import fit
from infer.predict import predict
from infer.report import report
from infer.scores import show
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
