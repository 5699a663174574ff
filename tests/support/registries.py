"""Parts that a row of a registry may lack."""

from importlib import import_module
from importlib.util import find_spec


def missing_functions(name: str, functions: tuple[str, ...]) -> list[str] | None:
    """Return the functions that a module lacks, None if there is no such module."""
    if find_spec(name) is None:
        return None
    module = import_module(name)
    return [
        f"{function} in {name}"
        for function in functions
        if not callable(getattr(module, function, None))
    ]
