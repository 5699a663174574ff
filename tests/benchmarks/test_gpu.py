import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.settings import SHARES
from tests.support.commands import Cli


def test_a_part_that_fails_or_is_late_has_no_rows(tmp_path: Path, cli: Cli) -> None:
    late = cli("benchmarks", "gpu", "--parts", "train", "--minutes", 0.001, "--data", tmp_path)
    assert late.code == 1
    assert "stopped: no time left" in late.out
    assert cli("benchmarks", "gpu", "--parts", "trian").code == 2


@pytest.mark.slow
def test_the_packed_parts_need_no_booster() -> None:
    modules = [f"benchmarks.{name}" for name in (*SHARES, "gpu", "baselines", "worker")]
    imports = ", ".join([*modules, "infer.embedding.embedder"])
    code = f"import sys; sys.modules['lightgbm'] = None\nimport {imports}"
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
