"""Each kind of wrong engine or step has its reason; the right ones are in test_correctness."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import checks
from benchmarks.checks import TRAINING, CheckJob, main, write_job
from infer.engines import Outputs
from isic.preprocess import Pixels
from isic.runtime.files import read_json


def run_check(tiny: Path, folder: Path, name: str, precision: str = "fp32") -> dict[str, Any]:
    job = CheckJob(str(tiny), name, precision, "cpu", [1, 7], str(folder / "artifacts"), None)
    write_job(job, folder / "job.json")
    main(folder / "job.json")
    return read_json(folder / "job.result")


class Changed:
    """An engine whose outputs are changed."""

    device = "cpu"

    def __init__(self, engine: Any, change: str) -> None:
        self.engine = engine
        self.change = change

    def run(self, images: Pixels) -> Outputs:
        features, logits = (values.copy() for values in self.engine.run(images))
        if self.change == "logit":
            logits[0] += 1
        if self.change == "NaN":
            features[-1, 0] = np.nan
        if self.change == "remainder" and len(images) == 7:
            features[-1] = features[0][::-1]
        return features, logits


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("logit", "at batch 1 a logit is off by"),
        ("NaN", "features hold values that are not finite"),
        ("remainder", "at batch 7 the cosine of the features is"),
    ],
)
def test_a_wrong_engine_has_its_reason(
    change: str, reason: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = checks.create
    monkeypatch.setattr(checks, "create", lambda *args: Changed(create(*args), change))
    row = run_check(tiny, tmp_path, "onnx")
    assert reason in row["reason"]
    assert ("cosine" in row) == (change != "NaN"), "measured all the same"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnx", "aoti"])
def test_optional_outputs_are_compared_too(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "all.yaml"
    config.write_text(
        "model: test_efficientnet\nimage_size: 32\nmask_weight: 1\naux: {a: x, b: y}\n"
    )
    compared = []
    compare = checks.compare

    def noted(*arguments: Any) -> dict[str, float]:
        compared.append(compare(*arguments))
        return compared[-1]

    monkeypatch.setattr(checks, "compare", noted)
    row = run_check(config, tmp_path, name)
    assert "reason" not in row, row
    for figure in compared:
        assert figure["max_aux_error"] < 1e-3
        assert figure["max_mask_error"] < 1e-3


def test_an_engine_that_does_not_build_has_its_reason(tiny: Path, tmp_path: Path) -> None:
    assert run_check(tiny, tmp_path, "onnx", "fp8")["reason"]


@pytest.mark.parametrize(("precision", "applied"), [("fp32", 0), ("fp16", 3)])
def test_a_step_counts_once_it_is_applied(
    precision: str, applied: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first losses are not finite, as with the high scale that float16 starts with."""
    accumulate = checks.accumulate
    calls = []

    def overflowing(*args: Any) -> torch.Tensor:
        calls.append(args)
        loss = accumulate(*args)
        return loss if len(calls) > applied else loss * torch.inf

    monkeypatch.setattr(checks, "accumulate", overflowing)
    row = run_check(tiny, tmp_path, TRAINING, precision)
    assert "reason" not in row
    assert row["steps"] == applied + 1
    assert row["gradient_norm"] > 0


def test_a_loss_that_stays_infinite_has_its_reason(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulate = checks.accumulate
    monkeypatch.setattr(checks, "accumulate", lambda *args: accumulate(*args) * torch.inf)
    row = run_check(tiny, tmp_path, TRAINING)
    assert "NotApplied: no loss and gradient are finite in 12 steps" in row["reason"]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_is_made_in_its_own_precision_not_in_the_config_s(
    precision: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_text(f"{tiny.read_text()}fp16: true\n")
    accumulate = checks.accumulate
    used = []

    def recorded(
        state: Any, forward: Any, batches: Any, settings: Any, device: Any
    ) -> torch.Tensor:
        used.append((settings.precision, state.scaler.is_enabled()))
        return accumulate(state, forward, batches, settings, device)

    monkeypatch.setattr(checks, "accumulate", recorded)
    assert "reason" not in run_check(tiny, tmp_path, TRAINING, precision)
    assert set(used) == {(precision, precision == "fp16")}
