"""Seeds of weights and epochs, derived from a run's seed."""

import numpy as np
import torch

from isic.layout import Fold, fold_number


def derive_seed(*numbers: int) -> int:
    """Return one number that depends on all of them."""
    # CPython's hash of a tuple of ints does not depend on PYTHONHASHSEED and has been the same
    # since 3.8 on 64-bit systems. With other seeds no earlier run could be resumed or repeated; a
    # test pins the values.
    return hash(numbers)


def seed_weights(seed: int, fold: Fold) -> None:
    torch.manual_seed(derive_seed(seed, fold_number(fold)))


def seed_epoch(seed: int, fold: Fold, epoch: int, rank: int) -> None:
    """Seed an epoch by itself, so that it repeats after a resume; ranks drop different units."""
    torch.manual_seed(derive_seed(seed, fold_number(fold), epoch) + rank)
    # The legacy generator: timm's Mixup uses it.
    np.random.seed(derive_seed(seed, fold_number(fold), epoch, rank) % 2**32)  # noqa: NPY002
