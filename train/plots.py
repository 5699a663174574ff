"""Files for people to look at: ROC curves, and scalars for TensorBoard if it is installed."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import polars as pl

from isic import schema
from isic.html.plot import svg_file
from isic.html.roc import roc_chart
from isic.runtime.files import write_text

ROC_FILE = "roc.svg"


def draw_roc(path: Path, tables: Mapping[str, pl.DataFrame]) -> None:
    """Draw ROC curves with the scored region (TPR at least 0.8) filled.

    Args:
        tables: `target` and `logit` by the curve's name; the last one is drawn thick.
    """
    curves = {
        name: (table[schema.TARGET].to_numpy(), table["logit"].to_numpy())
        for name, table in tables.items()
    }
    write_text(path, svg_file(roc_chart(curves, with_legend=True)))


def write_scalars(directory: Path, epoch: int, scalars: Mapping[str, float | None]) -> None:
    """Add an epoch's scalars to TensorBoard's event files in `directory`, if it is installed."""
    if find_spec("tensorboard") is None:
        return
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - optional

    # A resumed run repeats an epoch: purge_step hides what the interrupted run wrote of it.
    with SummaryWriter(directory, purge_step=epoch) as writer:
        for name, value in scalars.items():
            if value is not None:
                writer.add_scalar(name, value, epoch)
