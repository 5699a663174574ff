"""Pictures and scalars for people. Both need a package that training does not: without it they are left out."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import polars as pl
from sklearn.metrics import roc_curve

from isic import schema
from isic.metrics import MIN_TPR, pauc
from isic.runtime.files import atomic_path

ROC_FILE = "roc.png"


def draw_roc(path: Path, tables: Mapping[str, pl.DataFrame]) -> bool:
    """Draws ROC curves with the scored region (TPR at least 0.8) shaded.

    Args:
        path: of the PNG.
        tables: `target` and `logit` by the curve's name; the last one is drawn thick.

    Returns:
        Whether matplotlib is there to do it.
    """
    if find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure  # noqa: PLC0415 - optional

    axes = (figure := Figure(figsize=(6, 6), layout="constrained")).subplots()
    axes.axhspan(MIN_TPR, 1, color="tab:green", alpha=0.12, label=f"scored: TPR ≥ {MIN_TPR}")
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1)
    for name, table in tables.items():
        false_positives, true_positives, _ = roc_curve(table[schema.TARGET], table["logit"])
        is_last = name == list(tables)[-1]
        style = {"color": "black", "linewidth": 2.2} if is_last else {"linewidth": 1, "alpha": 0.8}
        label = f"{name}: pAUC {pauc(table[schema.TARGET], table['logit']):.4f}"
        axes.plot(false_positives, true_positives, label=label, **style)
    axes.set(
        xlabel="false-positive rate",
        ylabel="true-positive rate",
        xlim=(0, 1),
        ylim=(0, 1.005),
        aspect="equal",
    )
    axes.legend(loc="lower right")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return True


def write_scalars(directory: Path, epoch: int, scalars: Mapping[str, float | None]) -> None:
    """Adds an epoch's scalars to TensorBoard's event files in `directory`, where tensorboard is installed."""
    if find_spec("tensorboard") is None:
        return
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - optional

    # An epoch that a resumed run repeats hides what the stopped run wrote of it.
    with SummaryWriter(directory, purge_step=epoch) as writer:
        for name, value in scalars.items():
            if value is not None:
                writer.add_scalar(name, value, epoch)
