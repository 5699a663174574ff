"""The build options, and their values that do not fit together."""

import pytest
from pydantic import ValidationError

from export.options import PlanOptions


def test_options_are_checked() -> None:
    with pytest.raises(ValidationError, match="need --min_batch <= --opt_batch"):
        PlanOptions(min_batch=8, opt_batch=4)
    with pytest.raises(ValidationError, match="CURRENT excludes all others"):
        PlanOptions(compute_capabilities=("CURRENT", "SM89"))


def test_default_batches_with_views_take_as_much_memory_as_without() -> None:
    sizes = {}
    for tta in ("none", "flips", "d4"):
        options = PlanOptions(tta=tta)
        sizes[tta] = (options.min_batch, options.opt_batch, options.max_batch)
    assert sizes == {"none": (1, 256, 256), "flips": (1, 64, 64), "d4": (1, 32, 32)}
    given = PlanOptions(tta="d4", opt_batch=64, max_batch=128)
    assert (given.opt_batch, given.max_batch) == (64, 128)
    assert PlanOptions(tta="d4", max_batch=4).opt_batch == 4
    with pytest.raises(ValidationError, match="got 1, 512 and 256"):
        PlanOptions(opt_batch=512)
    for wrong in ("d8", ["d4"], 8, None):
        with pytest.raises(ValidationError, match="'none', 'flips' or 'd4'"):
            PlanOptions.model_validate({"tta": wrong})
