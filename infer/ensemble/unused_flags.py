"""Flags of `python -m infer fit` and `select` that have no effect with the other settings.

Only those of the command line: a config file may serve several runs.
"""

from infer.ensemble.boosting.libraries import LIBRARIES
from infer.ensemble.features.spec import FeatureSpec
from infer.ensemble.images.features import FROZEN_FORMS, SCORE_FORMS
from infer.ensemble.settings import FitSettings
from isic.runtime.errors import UserError

# Not --seeds and --num_rounds, which scripts give for any features.
OF_BOOSTERS = ("libraries", "weights", *LIBRARIES, "negatives", "blank_share", "blank", "device")
"""Flags that only boosters read."""


def refuse_unused_flags(settings: FitSettings, spec: FeatureSpec) -> None:
    """Raise a UserError if a flag of the command line has no effect."""
    for flag, reason in _reasons(settings, spec).items():
        if flag in settings.given:
            raise UserError(f"--{flag} has no effect, because {reason}; leave it out")


def _reasons(settings: FitSettings, spec: FeatureSpec) -> dict[str, str]:
    """Return why flags have no effect, by flag."""
    if not spec.fits_boosters:
        reasons = dict.fromkeys(OF_BOOSTERS, f"--features {settings.features} needs no boosters")
    else:
        others = (library for library in LIBRARIES if library not in settings.libraries)
        reasons = {library: f"--libraries has no {library}" for library in others}
        if len(settings.libraries) == 1:
            reasons["weights"] = "there is only one library"
        if not settings.blank_share:
            reasons["blank"] = "--blank_share is 0"
    if not (spec.fits_boosters and {*SCORE_FORMS} & {*spec.forms}):
        reasons["image_noise"] = "no boosters are fitted on out-of-fold image scores"
    if not {*FROZEN_FORMS} & {*spec.forms}:
        reasons["frozen"] = f"--features {settings.features} has no columns of frozen networks"
    return reasons
