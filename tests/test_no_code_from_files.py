"""No file of data, weights or settings may run code when it is read."""

import ast
from pathlib import Path

import pytest

from tests.support.commands import ROOT

PACKAGES = ("isic", "train", "export", "infer", "benchmarks")
RUNS_CODE = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads"),
    *("shelve.open", "dill.load", "dill.loads", "joblib.load", "cloudpickle.load"),
    *("yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle", "pd.read_pickle"),
    *("eval", "exec", "compile", "__import__", "torch.jit.load", "torch.hub.load"),
    *("polars.DataFrame.deserialize", "pl.DataFrame.deserialize"),
}
"""Calls that run code from the file that they read."""

FROM_OWN_PROCESSES = {"infer/embedding/decoders.py": "pickle.loads"}
"""Calls on bytes that come through a pipe from a process of the same command."""


def calls_of(text: str) -> list[tuple[int, str, ast.Call]]:
    """Return line, dotted name and node of every call."""
    return [
        (node.lineno, ast.unparse(node.func), node)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
    ]


def faults(text: str) -> list[str]:
    """Return the calls that may run code from a file."""
    return [f"{line}: {name}" for line, name, call in calls_of(text) if _runs_code(name, call)]


def _runs_code(name: str, call: ast.Call) -> bool:
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if name == "torch.load":
        return given.get("weights_only") != "True"
    if name in ("np.load", "numpy.load"):
        return given.get("allow_pickle", "False") != "False"
    if name == "yaml.load":  # of the toolkit's own loader, which is a SafeLoader
        return ast.unparse(call.args[1]) != "Loader"
    return name in RUNS_CODE


@pytest.mark.parametrize("package", PACKAGES)
def test_no_call_runs_code_from_a_file(package: str) -> None:
    found = {
        str(path.relative_to(ROOT)): faults(path.read_text(encoding="utf-8"))
        for path in (ROOT / package).rglob("*.py")
    }
    assert len(found) > 5
    for path, lines in found.items():
        assert {line.partition(": ")[2] for line in lines} <= {FROM_OWN_PROCESSES.get(path)}, path


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "pickle.load(file)",
        "yaml.load(text, yaml.Loader)",
        "eval(text)",
    ],
)
def test_the_test_finds_such_calls(text: str) -> None:
    assert len(faults(text)) == 1


def test_the_yaml_loader_is_a_safe_one() -> None:
    text = (Path(ROOT) / "isic" / "runtime" / "yaml12.py").read_text(encoding="utf-8")
    assert "yaml.CSafeLoader" in text or "yaml.SafeLoader" in text
