"""The campaign of broken inputs: each kind of file, changed in many ways, read as by a command."""

import gc
import os
import re
import shutil
from collections.abc import Callable, Sequence
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

from benchmarks.faults import targets as table
from benchmarks.faults.attempts import Attempt, Outcome, scratch_folder
from benchmarks.faults.child import Ended, run_child
from benchmarks.faults.mutations import Random, break_content
from benchmarks.faults.targets import OUT, TARGETS, Target, digest_of_outputs
from benchmarks.faults.valid import make_parts
from isic.runtime.files import read_json, write_json

PROJECT = "project"
RESULTS = "results"
RESULT_FILE, CHANGE_FILE, PARTIAL_FILE = "result.txt", "change.txt", "partial.txt"
CANARY = "canary"
"""The file that code inside an input would touch."""
# The C libraries of images print them themselves.
OF_LIBRARIES = ("libpng ", "Corrupt JPEG", "Premature end of JPEG", "Invalid SOS", "Unsupported")
# polars is written in Rust, whose standard library prints a panic before Python can catch it.
PANIC = re.compile(r"^\s*thread '.*?' .*?panicked at .*?^note: .*?RUST_BACKTRACE.*?$", re.M | re.S)
NOTES = ("warning: ", "note: ", *OF_LIBRARIES)
"""How lines on standard error start that may accompany a result or a refusal."""
MAX_MESSAGE = 1000
"""Characters of a sentence that a person can read."""


# Commands import them when they need them; here each attempt would take half a second for that.
IMPORTED_EARLY = (
    *("lightgbm", "xgboost", "catboost"),
    *("infer.engines.onnxruntime", "infer.engines.aoti", "torch._inductor.cpu_vec_isa"),
)


class InputsCampaign:
    """Broken inputs; see `benchmarks.faults.attempts.Campaign`."""

    name = "inputs"

    def __init__(self, targets: Sequence[str] | None = None) -> None:
        """Choose some of TARGETS; all by default."""
        self.targets = tuple(targets or TARGETS)
        self._folder = Path()

    def prepare(self, folder: Path) -> None:
        self._folder = folder.resolve()
        for name in IMPORTED_EARLY:
            import_module(name)
        gc.freeze()  # a collection in an attempt would copy the memory of this process
        parts = {part for name in self.targets for part in TARGETS[name].parts}
        # In its own process: it computes in threads, and this process must stay able to fork.
        maker = get_context("spawn").Process(target=make_parts, args=(self._project, parts))
        maker.start()
        maker.join()
        if maker.exitcode:
            raise RuntimeError("the valid files could not be made")
        for name in self.targets:
            if not self._expected_path(name).is_file():
                self._read_undisturbed(name)

    def attempt(self, target: str, seed: int, folder: Path) -> Attempt:
        row = TARGETS[target]
        ended = self._run(row, folder, lambda: break_file(row.find(), row.kind, target, seed))
        change = read_or(folder / CHANGE_FILE, "no change")
        expected = read_json(self._expected_path(target))["results"]
        outcome, reason = judge(row, ended, folder, expected)
        return Attempt(self.name, target, seed, outcome, f"{change}: {reason}", ended.seconds)

    @property
    def _project(self) -> Path:
        return self._folder / PROJECT

    def _expected_path(self, target: str) -> Path:
        return self._folder / RESULTS / f"{target}.json"

    def _read_undisturbed(self, name: str) -> None:
        """Record the results that are right. Raise RuntimeError if the valid file is refused."""
        target = TARGETS[name]
        results = [self._result(name, lambda: None)]
        if target.may_be_left_out:
            results.append(self._result(name, lambda: target.find().unlink()))
        write_json(self._expected_path(name), {"results": results})

    def _result(self, name: str, change: Callable[[], object]) -> str:
        with scratch_folder(self._folder / "undisturbed" / name) as scratch:
            ended = self._run(TARGETS[name], scratch, change)
            if ended.code != 0:
                raise RuntimeError(f"{name}: the valid file is refused: {ended.err}")
            return (scratch / RESULT_FILE).read_text(encoding="utf-8")

    def _run(self, target: Target, folder: Path, change: Callable[[], object]) -> Ended:
        copy_parts(self._project, folder, target.parts)
        return run_child(lambda: read_changed(target, change), folder)


def copy_parts(project: Path, folder: Path, parts: Sequence[str]) -> None:
    """Copy parts of the project that have a folder of their own."""
    for part in parts:
        if (project / part).is_dir():
            shutil.copytree(project / part, folder / part, copy_function=link)
    (folder / "cache").mkdir()


def link(source: str, target: str) -> None:
    """Link a file; copy one of images, whose readers notice if another attempt links it too."""
    (shutil.copyfile if source.endswith(".hdf5") else os.link)(source, target)


def read_changed(target: Target, change: Callable[[], object]) -> None:
    """Change the file and read it, in the working directory; write the result to a file."""
    for name in ("ISIC_CACHE_DIR", "XDG_STATE_HOME"):  # not the user's
        os.environ[name] = str(Path("cache").resolve())
    change()
    try:
        Path(RESULT_FILE).write_text(target.read(), encoding="utf-8")
    except BaseException:
        note_partial_outputs()
        raise


def break_file(path: Path, kind: str, target: str, seed: int) -> None:
    """Change the content of a file, by target and seed."""
    name, content = break_content(path.read_bytes(), kind, Random(f"{target} {seed}"))
    Path(CHANGE_FILE).write_text(name, encoding="utf-8")
    path.unlink()  # it is a link to the valid file
    path.write_bytes(content)


def note_partial_outputs() -> None:
    """Write down if an output under its final name is not whole, or should not be there."""
    try:
        digest_of_outputs(OUT)
        if list(OUT.glob("submission*")):
            raise table.PartialOutput("a submission is there although the command failed")
    except Exception as error:  # unreadable tables raise exceptions of several types
        Path(PARTIAL_FILE).write_text(f"{type(error).__name__}: {error}", encoding="utf-8")


def read_or(path: Path, default: str) -> str:
    return path.read_text("utf-8", "replace") if path.is_file() else default


def judge(
    target: Target, ended: Ended, folder: Path, expected: Sequence[str]
) -> tuple[Outcome, str]:
    """Return the outcome of an attempt and a reason in one line."""
    reason = failure(target, ended, folder, expected)
    if reason:
        return "failed", reason
    if ended.code == 0:
        result = read_or(folder / RESULT_FILE, "")
        return "survived", "the same result" if result in expected else "another valid result"
    return "refused", error_lines(ended.err)[0]


def failure(target: Target, ended: Ended, folder: Path, expected: Sequence[str]) -> str | None:
    """Return why an attempt has failed, None if it has not."""
    partial = read_or(folder / PARTIAL_FILE, "")
    if (folder / CANARY).exists():
        return "code inside the file ran"
    if partial:
        return f"partial output: {partial}"
    if ended.problem:
        return ended.problem
    if ended.code == 0:
        result = read_or(folder / RESULT_FILE, "")
        is_other = target.is_guarded and result not in expected
        return "another result although the digest of the file is known" if is_other else None
    return bad_refusal(target, ended.err)


def bad_refusal(target: Target, err: str) -> str | None:
    """Return why a refusal is none, None if it is one sentence that names the file."""
    errors = error_lines(err)
    lines = PANIC.sub("", err).splitlines()
    others = [line for line in lines if line and line not in errors and not line.startswith(NOTES)]
    if len(errors) != 1 or others:
        return f"not one sentence: {' / '.join([*errors, *others])[:300]}"
    (sentence,) = errors
    if len(sentence) > MAX_MESSAGE:
        return f"a sentence of {len(sentence)} characters: {sentence[:100]}"
    if not any(name in sentence for name in target.names):
        return f"the sentence does not name the file: {sentence}"
    return None


def error_lines(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("error: ")]
