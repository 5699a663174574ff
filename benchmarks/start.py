"""`python -m benchmarks start`: CPU time of help, refused keys and other quick answers."""

import resource
import statistics
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.record import Row, append_each
from benchmarks.settings import StartSettings
from isic.runtime.toolkit import command_lines

HEAVY = (
    "torch",
    "timm",
    "albumentations",
    "onnx",
    "onnxruntime",
    "sklearn",
    "scipy",
    "polars",
    "cv2",
    "lightgbm",
)
"""Libraries that take tenths of a second or more to import."""
SHOW_MODULES = """
import atexit, runpy, sys
atexit.register(lambda: print(*sys.modules, file=sys.stderr))
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__")
"""


def start(settings: StartSettings) -> None:
    """Record the CPU seconds and the heavy imports of every quick answer."""
    answers = list(quick_answers())
    append_each(
        "start", answers, lambda words: [measure_start(words, settings.repeats)], settings.results
    )


def quick_answers() -> Iterator[str]:
    """Yield the command lines that answer without work."""
    yield "isic --version"
    yield "isic check --data /nowhere"
    for line in command_lines():
        yield f"{line} --help"
        yield f"{line} --no_such_key 1"


def measure_start(words: str, repeats: int) -> Row:
    """Return the median CPU seconds of a command line in its own process, and its heavy imports."""
    seconds = []
    for _ in range(repeats):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", *words.split()]
        subprocess.run(command, capture_output=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    command = [sys.executable, "-c", SHOW_MODULES, *words.split()]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    modules = set(ended.stderr.split())
    return {
        "what": words,
        "cpu_seconds": round(statistics.median(seconds), 3),
        "heavy_imports": " ".join(name for name in HEAVY if name in modules),
    }
