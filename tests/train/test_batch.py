import torch

from tests.support.training import random_batch
from train.batch import split


def test_a_batch_is_cut_into_parts_of_about_the_same_size() -> None:
    batch = random_batch(7, masks=True)
    parts = split(batch, 3)
    assert [len(part.images) for part in parts] == [3, 3, 1]
    for name in batch._fields:
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(joined, getattr(batch, name))
    assert len(split(batch, 100)) == 7
