"""python -m isic synth | check"""

from functools import partial

from isic.check import check
from isic.runtime.cli import run
from isic.synth import SynthSettings, synthesize


def synth(settings: SynthSettings) -> None:
    """Write a synthetic dataset in the layout of the challenge."""
    if synthesize(settings, say=partial(print, flush=True)):
        print(f"wrote a synthetic dataset to {settings.out}")
    else:
        print(f"{settings.out} already holds this dataset; nothing to do")


if __name__ == "__main__":
    run({"synth": synth, "check": check})
