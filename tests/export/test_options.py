"""The build options, and their values that do not fit together."""

import pytest
from pydantic import ValidationError

from export.options import PlanOptions


def test_options_are_checked() -> None:
    with pytest.raises(ValidationError, match="need --min_batch <= --opt_batch"):
        PlanOptions(min_batch=8, opt_batch=4)
    with pytest.raises(ValidationError, match="CURRENT excludes all others"):
        PlanOptions(compute_capabilities=("CURRENT", "SM89"))
