"""Packages for another machine: wheels in the versions that are installed here."""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import (
    PackageMetadata,
    PackageNotFoundError,
    distributions,
    requires,
    version,
)
from pathlib import Path

from isic.runtime.errors import UserError

TOOLKIT = "isic-toolkit"
# fmt: off
PLATFORMS = (
    "manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
)
# fmt: on
"""pip's tags of Linux machines with x86 processors."""


def this_python() -> str:
    """Return the version of this Python as pip writes it: `3.11`."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def requirements(extra: str | None = None) -> dict[str, str]:
    """Return the requirements of the base install, or those that an extra adds, by name.

    Raises:
        UserError: the toolkit is not installed, so they are unknown.
    """
    try:
        listed = requires(TOOLKIT) or []
    except PackageNotFoundError:
        raise UserError("the toolkit is not installed; run `pip install -e .`") from None
    parts = [line.partition(";") for line in listed]
    wanted = [line.strip() for line, _, marker in parts if _extra_of(marker) == extra]
    return {_name(requirement): requirement for requirement in wanted}


def _extra_of(marker: str) -> str | None:
    found = re.search(r"""extra == ['"]([^'"]+)""", marker)
    return found[1] if found else None


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


def pinned(package: str) -> str:
    """Return a requirement of the installed version, the package itself if it is not installed."""
    try:
        return f"{package}=={version(package)}"
    except PackageNotFoundError:
        return package


def install(
    packages: Iterable[str],
    target: Path,
    python: str,
    platforms: Sequence[str],
    with_dependencies: bool = False,
) -> None:
    """Install packages for another machine into a folder, which Python can have in its path.

    Args:
        packages: pip's requirements.
        python: version of Python there.
        platforms: pip's tags of the platform there.
        with_dependencies: also install those, in the versions that are installed here if possible.

    Raises:
        UserError: a wheel cannot be had.
    """
    # pip selects wheels by the tags of the other machine.
    # fmt: off
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
        "--no-compile", "--only-binary=:all:", "--implementation", "cp", "--python-version", python,
    ]
    # fmt: on
    for tag in platforms:
        command += ["--platform", tag]
    with tempfile.TemporaryDirectory() as folder:
        if with_dependencies:
            constraints = Path(folder) / "constraints.txt"
            constraints.write_text("\n".join(_versions_here()), encoding="utf-8")
            command += ["--constraint", str(constraints)]
        else:
            command.append("--no-deps")
        command += ["--target", str(target), *packages]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        lines = ended.stderr.strip().splitlines()
        reason = lines[-1] if lines else "no reason given"
        raise UserError(f"pip cannot download the wheels ({reason}); choose others, or none")


def _versions_here() -> list[str]:
    """Return the installed versions, but for ONNX Runtime, which machines have by their CUDA."""
    names = {found.metadata["Name"] for found in distributions()}
    kept = (name for name in sorted(filter(None, names)) if not name.startswith("onnxruntime"))
    return [pinned(name) for name in kept if name != TOOLKIT]


def licences(folder: Path) -> dict[str, str]:
    """Return the licence of each package in a folder of `install`, by name and version."""
    found = {
        f"{each.metadata['Name']} {each.version}": _licence(each.metadata)
        for each in distributions(path=[str(folder)])
    }
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def _licence(fields: PackageMetadata) -> str:
    """Return the licence in a package's metadata, from the newest of the fields that may name it."""
    classifiers = fields.get_all("Classifier") or []
    named = (
        fields.get_all("License-Expression"),
        [line.rpartition(" :: ")[2] for line in classifiers if "License ::" in line],
        fields.get_all("License"),
    )
    # The last field may hold the whole text of a licence.
    return next((", ".join(lines) for lines in named if lines), "not named").splitlines()[0]
