"""Run the toolkit's commands in this process, and the flags of a model that trains in seconds."""

import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from train.config import TrainSettings

ROOT = Path(__file__).parents[2]
"""The checkout."""

TINY_KEYS = {"model": "test_vit", "pretrained": False, "image_size": 32}
"""A config of the smallest transformer in timm, from random weights."""

TINY_YAML = "model: test_vit\npretrained: false\nimage_size: 32\n"
"""The same as a config file."""

# fmt: off
TINY = (
    "--model", "test_vit", "--pretrained", "false", "--image_size", 32,
    "--num_workers", 0, "--name", "tiny",
)
# fmt: on
"""The same as flags of `python -m train`."""


@dataclass(frozen=True)
class Finished:
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str


Cli = Callable[..., Finished]
"""The fixture `cli`: runs `python -m <module> <arguments>` in this process."""


def tiny_settings(**values: object) -> TrainSettings:
    """Return training settings of the tiny model, decoding in this process; fp32 by default."""
    settings = TrainSettings.model_validate({**TINY_KEYS, "num_workers": 0, **values})
    precision = "fp32" if settings.precision == "auto" else settings.precision
    return settings.model_copy(update={"precision": precision})


def run_module(module: str, *arguments: object) -> None:
    """Run `python -m <module> <arguments>` in this process; fails if the command does."""
    argv, sys.argv = sys.argv, [module, *map(str, arguments)]
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, f"{module} {arguments} exited with {ended.code}"
    finally:
        sys.argv = argv


def split_flags(text: str) -> list[str]:
    """Split flags as a shell does, without quotes."""
    return text.split()
