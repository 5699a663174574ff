import shutil
from pathlib import Path

import pytest

from infer.embedding.store import scan_embeddings
from isic.runtime.errors import UserError
from tests.support.commands import Cli
from tests.support.fake_run import FakeRun


def test_a_shard_of_another_run_is_refused(
    whole: Path, fake_run: FakeRun, tmp_path: Path, cli: Cli
) -> None:
    """It has the right ids, but was made with other settings."""
    root = shutil.copytree(whole, tmp_path / "null")
    place = Path("train/fold_0/part-00000.parquet")
    flags = fake_run.flags(tmp_path / "other", "--batch_size", 8, "--dtype", "float32")
    assert cli("infer", *flags).code == 0
    shutil.copy(tmp_path / "other" / "null" / place, root / place)
    with pytest.raises(UserError, match=r"part-00000\.parquet was made by another run"):
        scan_embeddings(root, "train")
    (root / place).write_bytes((whole / place).read_bytes()[:100])
    with pytest.raises(UserError, match=r"part-00000\.parquet is damaged"):
        scan_embeddings(root, "train")
    shutil.copy(whole / place, root / place)
    assert len(scan_embeddings(root, "train").collect()) == 300
    (root / "train" / "run.json").unlink()
    with pytest.raises(UserError, match="has no finished train embeddings"):
        scan_embeddings(root, "train")
