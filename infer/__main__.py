"""`python -m infer embed | fit | predict | scores | compare | doctor`: from engines to a submission."""

from infer.compare import compare
from infer.doctor import doctor
from infer.embed import embed
from infer.fit import fit
from infer.predict import predict
from infer.scores import show
from isic import cli

if __name__ == "__main__":
    cli.run({"embed": embed, "fit": fit, "predict": predict, "scores": show, "compare": compare, "doctor": doctor})
