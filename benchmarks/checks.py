"""One check of correctness, in a process of its own, which may crash.

`benchmarks.correctness` starts it with the path of a job; its row is written next to it.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.artifacts import ArtifactStore
from benchmarks.record import Row, error_text
from benchmarks.untrained import create_untrained, example_images
from export.formats import TOLERANCES
from export.parity import check_figure, compare, run_engine, run_model
from infer.engines import create
from isic.runtime.files import read_json, write_json
from train.batch import Batch, to_device
from train.config import TrainSettings, load_settings
from train.machine import prepare, select_device
from train.model import preprocess_spec
from train.state import TrainState, create_state
from train.step import accumulate, optimizer_step

NUM_IMAGES = 32
"""Images that the networks' outputs are compared on, and that one step is trained on."""
TRAINING = "training step"
# The scale of the loss in float16 starts high and halves until the gradient is finite.
MAX_STEPS = 12
"""Steps after which one must have been applied."""


@dataclass(frozen=True)
class CheckJob:
    """One check of a config in a precision."""

    config: str
    check: str
    """TRAINING, or the format of an engine."""
    precision: str
    device: str
    batches: list[int]
    """Batch sizes of an engine; the largest is that of its artifact."""
    artifacts: str
    """Folder of the artifacts."""
    data: str | None
    """Dataset folder of the images; noise if None."""


def main(path: Path) -> None:
    """Run the job at `path`; write `.result` next to it."""
    job = CheckJob(**read_json(path))
    row: Row = {}
    run: Callable[[CheckJob, Row], None] = training_row if job.check == TRAINING else engine_row
    try:
        run(job, row)
    except Exception as error:  # engines, builders and compilers raise exceptions of any type
        row["reason"] = error_text(error)
    write_json(path.with_suffix(".result"), row)


def engine_row(job: CheckJob, row: Row) -> None:
    """Add to a row the worst differences between an engine and its network in float32.

    Raises:
        Exception: of any type, if it does not build, does not run or differs too much.
    """
    untrained = create_untrained(job.config)
    store = ArtifactStore(Path(job.artifacts))
    artifact = store.get(untrained, job.check, job.precision, job.device, max(job.batches))
    row |= {"seconds": round(artifact.seconds, 1), "megabytes": round(artifact.megabytes, 1)}
    data = Path(job.data) if job.data else None
    images = example_images(data, untrained.spec, NUM_IMAGES)
    names = untrained.model.output_names
    expected = run_model(untrained.model, images)
    engine = create(artifact.path, artifact.manifest, job.device)
    figures = {}
    for batch in job.batches:
        # A batch of the full size, however few images there are.
        rows = np.arange(max(batch, NUM_IMAGES)) % NUM_IMAGES
        outputs = run_engine(engine, images[rows], batch, names)
        figures[batch] = compare(tuple(values[rows] for values in expected), outputs, names)
    row["cosine"] = round(min(figure["cosine"] for figure in figures.values()), 7)
    worst = max(figure["max_logit_error"] for figure in figures.values())
    row["max_logit_error"] = float(f"{worst:.1e}")
    for batch, figure in figures.items():
        check_figure(figure, TOLERANCES[job.precision], f"at batch {batch}")


def training_row(job: CheckJob, row: Row) -> None:
    """Add to a row the loss and the norm of the gradient of the first step that is applied.

    Raises:
        NotApplied: the loss or the gradient of every step is not finite.
        Exception: of any type, if the step does not run.
    """
    flags = {"config": job.config, "pretrained": False, "precision": job.precision}
    settings = load_settings(TrainSettings, flags)
    device = select_device(job.device)
    prepare(device)
    state = create_state(settings, device, 0)
    images = example_images(
        Path(job.data) if job.data else None, preprocess_spec(settings), NUM_IMAGES
    )
    target = torch.arange(NUM_IMAGES).remainder(2).float()
    batch = to_device(Batch(torch.from_numpy(images), target, torch.arange(NUM_IMAGES)), device)
    for number in range(1, MAX_STEPS + 1):
        loss = accumulate(state, state.model, [batch], settings, device)
        norm = gradient_norm(state)
        _, skipped, _ = optimizer_step(state, settings.clip_grad, loss).tolist()
        row |= {"steps": number, "loss": round(float(loss), 5), "gradient_norm": round(norm, 5)}
        if not skipped:
            return
    raise NotApplied(f"no loss and gradient are finite in {MAX_STEPS} steps")


class NotApplied(Exception):
    """No optimizer step could be applied."""


def gradient_norm(state: TrainState) -> float:
    """Return the norm of the accumulated gradient, without the scale of the loss."""
    norms = [weight.grad.norm() for weight in state.model.parameters() if weight.grad is not None]
    return float(torch.stack(norms).norm()) / state.scaler.get_scale()


def write_job(job: CheckJob, path: Path) -> None:
    write_json(path, asdict(job))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
