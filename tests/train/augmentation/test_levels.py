import warnings
from pathlib import Path

import pytest

from tests.support.commands import ROOT
from train.augmentation.levels import DEVICE_LEVELS, DEVICE_STEPS, LEVELS, Step
from train.augmentation.pipeline import build_transform

DOCUMENT = ROOT / "docs" / "data.md"
HEADING = "| level | transform | range | probability | runs on |\n|---|---|---|---|---|\n"


def all_steps(level: str) -> list[Step]:
    return [part for step in LEVELS[level] for part in (step, *step.choices)]


def described(options: object) -> str:
    """Return a step's options as the table has them."""
    assert isinstance(options, dict)
    texts = []
    for key, value in options.items():
        ends = value if isinstance(value, tuple) else (value,)
        texts.append(f"{key} {' to '.join(f'{end:.3g}' for end in dict.fromkeys(ends))}")
    return ", ".join(texts)


def table() -> str:
    """Return the levels as a Markdown table."""
    lines = []
    for level, steps in LEVELS.items():
        place = "device or workers" if level in DEVICE_LEVELS else "workers"
        base = next((name for name in ("medium", "light") if is_extended(name, level)), None)
        shown = steps[len(LEVELS[base]) :] if base else steps
        if base:
            lines.append([level, f"all of {base}, then", "", "", place])
        for step in shown:
            one_of = "; ".join(f"{part.name} {described(part.options)}" for part in step.choices)
            names = [level, step.name, one_of or described(step.options)]
            lines.append([*names, f"{step.p:g}", place])
    return HEADING + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def is_extended(base: str, level: str) -> bool:
    """Return whether a level begins with all steps of another one."""
    steps = LEVELS[level]
    return base != level and steps[: len(LEVELS[base])] == LEVELS[base]


def test_the_document_has_the_levels() -> None:
    assert table() in Path(DOCUMENT).read_text(), f"the table is to be\n{table()}"


@pytest.mark.parametrize("level", LEVELS)
def test_albumentations_knows_every_option(level: str) -> None:
    """It warns of unknown arguments and goes on without them."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in LEVELS[level]:
            build_transform(step)
    with warnings.catch_warnings(), pytest.raises(UserWarning):
        warnings.simplefilter("error")
        build_transform(Step("Affine", 1.0, {"scales": (1, 1)}))


@pytest.mark.parametrize("level", LEVELS)
def test_ranges_and_probabilities_are_in_order(level: str) -> None:
    for step in all_steps(level):
        assert 0 < step.p <= 1
        for value in step.options.values():
            if isinstance(value, tuple):
                low, high = value
                assert low <= high


def test_levels_of_the_device_have_its_order() -> None:
    assert DEVICE_LEVELS == ("light", "medium")
    for level in DEVICE_LEVELS:
        names = [step.name for step in LEVELS[level]]
        assert names == [name for name in DEVICE_STEPS if name in names]
