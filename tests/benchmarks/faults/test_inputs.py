"""A slice of the campaign of broken inputs, and faults that it must not overlook."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.faults import child, inputs
from benchmarks.faults.attempts import Attempt
from benchmarks.faults.inputs import InputsCampaign, break_file
from benchmarks.faults.mutations import CHANGES, Random, break_content
from benchmarks.faults.run import THREADS
from benchmarks.faults.targets import OUT, TARGETS, Target, digest_of_outputs
from isic.runtime.errors import UserError
from isic.runtime.files import write_json
from tests.support.commands import ROOT

LEFT_OUT = ("model.aoti", "model.tensorrt_rtx", "synth.json")
"""Targets whose files take minutes to make, and one of another dataset than the fixture's."""
SEEDS = (0, 1)
CONTENT = b'{"number": 1, "text": "abc"}'


SLICE = f"""
import json, sys
from pathlib import Path
from benchmarks.faults.attempts import scratch_folder
from benchmarks.faults.inputs import InputsCampaign
from benchmarks.faults.targets import TARGETS

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    campaign = InputsCampaign([name for name in TARGETS if name not in {LEFT_OUT}])
    campaign.prepare(folder)
    for target in campaign.targets:
        for seed in {SEEDS}:
            with scratch_folder(folder / "scratch") as scratch:
                print(json.dumps(vars(campaign.attempt(target, seed, scratch))))
"""
"""Attempts of a process of its own, because a test's has threads, which a fork would lose."""


@pytest.mark.slow
def test_no_broken_input_gets_past_the_commands(
    exported: Path, synth_dataset: Path, tmp_path: Path
) -> None:
    project = tmp_path / "inputs" / inputs.PROJECT
    shutil.copytree(synth_dataset, project / "data")
    ignored = shutil.ignore_patterns("embeddings")
    shutil.copytree(exported, project / "runs" / "tiny", ignore=ignored)
    for part in ("data", "runs", "artifacts"):
        (project / f".{part}.done").touch()
    script = tmp_path / "slice.py"
    script.write_text(SLICE)
    ended = subprocess.run(
        [sys.executable, script, tmp_path / "inputs"],
        env={**os.environ, **dict.fromkeys(THREADS, "1"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    lines = [line for line in ended.stdout.splitlines() if line.startswith("{")]
    attempts = [Attempt(**json.loads(line)) for line in lines]
    assert len(attempts) == len(SEEDS) * (len(TARGETS) - len(LEFT_OUT))
    assert [attempt for attempt in attempts if attempt.outcome == "failed"] == []
    assert {attempt.outcome for attempt in attempts} == {"survived", "refused"}


@pytest.mark.parametrize("kind", [kind for kind in CHANGES if kind in ("bytes", "json", "text")])
def test_changes_are_repeatable_and_differ_between_seeds(kind: str) -> None:
    first = [break_content(CONTENT, kind, Random(seed)) for seed in range(40)]
    assert first == [break_content(CONTENT, kind, Random(seed)) for seed in range(40)]
    assert len({content for _, content in first}) > 20


def read_content() -> str:
    """Read the file as a command without any fault: other content than the valid one is refused."""
    if Path("file.txt").read_bytes() != CONTENT:
        raise UserError("file.txt is damaged; make it again")
    return "valid"


def unless_valid(fault: Callable[[], object]) -> Callable[[], str]:
    """Return a reader that has a fault as soon as the file is not valid."""

    def read() -> str:
        if Path("file.txt").read_bytes() == CONTENT:
            return "valid"
        fault()
        return "other"

    return read


def _refuse(message: str) -> None:
    raise UserError(message)


def _write_half() -> None:
    OUT.mkdir()
    (OUT / "submission.csv").write_text("isic_id,target\na,0.")
    raise UserError("file.txt is damaged; make it again")


def _print_twice() -> None:
    print("a line of a library", file=sys.stderr)
    raise UserError("file.txt is damaged; make it again")


def _write_wrong_scores() -> None:
    OUT.mkdir()
    (OUT / "submission.csv").write_text("isic_id,target\na,nan\n")
    digest_of_outputs(OUT)


NO_END = "no end within"
FAULTS: dict[str, tuple[Callable[[], object], str]] = {
    "traceback": (lambda: {}["key"], "exit code 1: KeyError: 'key'"),
    "exit code": (lambda: sys.exit(3), "exit code 3"),
    "hang": (lambda: time.sleep(600), NO_END),
    "thread": (lambda: __import__("threading").Thread(target=time.sleep, args=(600,)).start(),
               NO_END),
    "segmentation fault": (lambda: os.kill(os.getpid(), signal.SIGSEGV), "signal 11"),
    "wrong result": (lambda: None, "another result although the digest"),
    "memory": (lambda: bytearray(b"x") * 2**30, "MB of memory"),
    "canary": (lambda: Path("canary").touch(), "code inside the file ran"),
    "partial file": (_write_half, "partial output"),
    "score that is none": (_write_wrong_scores, "partial output"),
    "no name": (lambda: _refuse("something is wrong; correct it"), "does not name the file"),
    "two lines": (_print_twice, "not one sentence"),
    "long sentence": (lambda: _refuse("file.txt " + "x" * 5000), ""),
}  # fmt: skip


def attempt(read: Callable[[], str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Attempt:
    """Break the file of a target with a reader."""
    target = Target("data/../file.txt", "bytes", read, (), is_guarded=True)
    monkeypatch.setattr(inputs, "TARGETS", {"target": target})
    monkeypatch.setattr(child, "EXTRA_MB", 800.0)
    monkeypatch.setattr(inputs, "IMPORTED_EARLY", ())
    campaign = InputsCampaign(["target"])
    campaign._folder = folder
    write_json(folder / inputs.RESULTS / "target.json", {"results": ["valid"]})
    scratch = folder / "scratch"
    scratch.mkdir()
    (scratch / "data").mkdir()
    (scratch / "file.txt").write_bytes(CONTENT)
    return campaign.attempt("target", 1, scratch)


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_reader_has_failed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault, reason = FAULTS[name]
    if reason == NO_END:  # the others end by themselves, however slow the machine is
        monkeypatch.setattr(child, "MAX_SECONDS", 1.0)
    found = attempt(unless_valid(fault), tmp_path, monkeypatch)
    if name == "long sentence":  # the command line shortens it
        assert found.outcome == "refused"
        assert len(found.detail) < 2 * inputs.MAX_MESSAGE
        return
    assert found.outcome == "failed", found
    assert reason in found.detail


def test_a_reader_without_faults_refuses_or_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = attempt(read_content, tmp_path, monkeypatch)
    assert found.outcome == "refused"
    assert "file.txt is damaged" in found.detail
    monkeypatch.setattr(inputs, "break_file", lambda *_: None)
    shutil.rmtree(tmp_path / "scratch")
    assert attempt(read_content, tmp_path, monkeypatch).outcome == "survived"


def test_a_valid_file_stays_when_its_copy_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    valid = tmp_path / "valid"
    valid.write_bytes(CONTENT)
    (tmp_path / "copy").mkdir()
    monkeypatch.chdir(tmp_path / "copy")
    inputs.link(str(valid), "file.txt")
    break_file(Path("file.txt"), "bytes", "target", 0)
    assert valid.read_bytes() == CONTENT
    assert Path("file.txt").read_bytes() != CONTENT
