"""The registry of engine formats: a test reports the missing parts of a new row."""

import configparser
import re
from dataclasses import replace

import pytest

from infer.formats import (
    ENGINE_FORMATS,
    EngineFormat,
    engine_packages,
    engines_by_title,
    exported_formats,
)
from tests.support.commands import ROOT
from tests.support.registries import missing_functions


def declared(section: str, key: str | None = None) -> set[str]:
    """Return the distributions that setup.cfg names in a section, or under one of its keys."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    keys = setup[section] if key is None else [key]
    lines = "\n".join(setup[section].get(key, "") for key in keys).splitlines()
    return {match[0] for line in lines if (match := re.match(r"[\w-]+", line.strip()))}


def lacks(row: EngineFormat) -> list[str]:
    """Return the missing parts of a row of ENGINE_FORMATS."""
    missing = missing_functions(row.module, ("create", "unavailable_reason", "built_for"))
    problems = [f"the module {row.module}"] if missing is None else missing
    if not set(row.devices) <= {"cpu", "cuda"} or not row.devices:
        problems.append("devices among cpu and cuda")
    if not row.suffix.startswith("."):
        problems.append("a suffix with its dot")
    if row.builder and not row.packages:
        problems.append("packages")
    everywhere = declared("options", "install_requires") | declared("options.extras_require")
    home = everywhere if row.extra is None else declared("options.extras_require", row.extra)
    for package in row.packages:
        if package not in home:
            problems.append(f"{package} in setup.cfg ({row.extra or 'anywhere'})")
    return problems


@pytest.mark.parametrize("name", ENGINE_FORMATS)
def test_every_row_is_complete(name: str) -> None:
    assert lacks(ENGINE_FORMATS[name]) == []


def test_a_missing_part_of_a_row_is_reported() -> None:
    row = ENGINE_FORMATS["tensorrt"]
    assert lacks(replace(row, module="infer.engines.openvino")) == [
        "the module infer.engines.openvino"
    ]
    assert lacks(replace(row, module="infer.formats")) == [
        "create in infer.formats",
        "unavailable_reason in infer.formats",
        "built_for in infer.formats",
    ]
    assert lacks(replace(row, packages=("openvino",), extra="openvino")) == [
        "openvino in setup.cfg (openvino)"
    ]
    assert lacks(replace(row, packages=(), suffix="plan", devices=("npu",))) == [
        "devices among cpu and cuda",
        "a suffix with its dot",
        "packages",
    ]


def test_lists_are_derived_from_the_rows() -> None:
    assert exported_formats() == tuple(name for name in ENGINE_FORMATS if name != "null")
    titles = {title: (name, device) for title, name, device in engines_by_title()}
    assert titles["ONNX Runtime, CUDA"] == ("onnx", "cuda")
    assert titles["TensorRT-RTX"] == ("tensorrt_rtx", "cuda")
    assert len(titles) == sum(len(ENGINE_FORMATS[name].devices) for name in exported_formats())
    assert engine_packages().count("cuda-bindings") == 1
