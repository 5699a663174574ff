"""YAML as version 1.2 defines it: 1e-2 is a number, 010 is ten, and yes, no, on and off are words.

A repeated key is an error.
"""

# PyYAML follows version 1.1, in which these read as the text "1e-2", as 8 and as truth values
# (yaml/pyyaml#486, yaml/pyyaml#173), and keeps the last of repeated keys (yaml/pyyaml#165).

import re
from typing import Any

import yaml

TAG = "tag:yaml.org,2002:"
# The first matching pattern decides, so a number that matches `int` is whole.
PLAIN = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    # 1_000 as Python writes it is an extension of the standard
    "int": (r"[-+]?[0-9]+|[-+]?[0-9]{1,3}(_[0-9]{3})+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "merge": (r"<<", "<"),
}
"""Patterns of unquoted words that are not text, and the characters that these can start with."""


MAX_BITS = 1024
"""Bits of a whole number that a float can still represent, and that Python prints."""


class Loader(yaml.SafeLoader):
    """Reads YAML 1.2 into plain Python values."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  as PyYAML declares it

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping. Raise ConstructorError for a key that is given twice."""
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, (name, _) in zip(keys, node.value, strict=False):
            if keys.count(key) > 1:
                problem = f'the key "{key[1]}" is given twice'
                raise yaml.constructor.ConstructorError(None, None, problem, name.start_mark)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Writes YAML that quotes every text which version 1.1 or 1.2 would read as another type."""


def _whole_number(loader: Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    value = int(text, 0) if text[:2] in {"0o", "0x"} else int(text)
    if value.bit_length() > MAX_BITS:
        raise ValueError(f"a number of {len(text):,} digits")
    return value


def _number(loader: Loader, node: yaml.ScalarNode) -> float:
    text = loader.construct_scalar(node).lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


for _kind, (_pattern, _first) in PLAIN.items():
    _letters = ["" if letter == "\0" else letter for letter in _first]
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(TAG + _kind, re.compile(f"^(?:{_pattern})$"), _letters)
Loader.add_constructor(f"{TAG}int", _whole_number)
Loader.add_constructor(f"{TAG}float", _number)


def load(text: str) -> Any:
    """Return the value of a YAML text. Raise yaml.YAMLError."""
    try:
        return yaml.load(text, Loader)
    except RecursionError:
        raise yaml.YAMLError("its values are nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits, a date that does not exist
        raise yaml.YAMLError(str(error)) from None


def dump(value: Any) -> str:
    return yaml.dump(value, Dumper=Dumper)
