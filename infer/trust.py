"""Trust in artifacts of native code: those of the user's own exports have it, others are asked for.

An ONNX graph is data. An AOTInductor package and a TensorRT plan hold compiled code, which loading
them runs with all rights of the user. So the digests of such artifacts that this user has exported,
or has once trusted by `--trust true`, are kept in a file of the user's, as Jupyter does for
notebooks; others are refused.
"""

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from infer.formats import ENGINE_FORMATS
from isic.runtime.errors import UserError


def trust_field() -> Any:
    """Return the field `trust` of settings that open artifacts."""
    return Field(
        False,
        description="load artifacts of native code (AOTInductor, TensorRT) that were not exported "
        "by this user; they can do all that the user can",
    )


def trust_file() -> Path:
    """Return the path of the digests, in the folder for a user's state of the XDG standard."""
    state = os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()
    return Path(state) / "isic-toolkit" / "trusted"


def remember(manifests: Iterable[Mapping[str, Any]]) -> None:
    """Keep the digests of trusted artifacts, by their manifests. Formats without code need none."""
    digests = [manifest["sha256"] for manifest in manifests if _runs_code(manifest)]
    new = [digest for digest in digests if digest not in _trusted()]
    # Without a folder to write, such as of a user without a home, they are asked for again.
    with contextlib.suppress(OSError):
        if new:
            trust_file().parent.mkdir(parents=True, exist_ok=True)
            with open(trust_file(), "a", encoding="utf-8") as file:
                file.write("".join(f"{digest}\n" for digest in new))


def refuse_untrusted(artifacts: Mapping[Path, Mapping[str, Any]], trust: bool) -> None:
    """Raise a UserError if an artifact of native code is neither known nor trusted now.

    Args:
        artifacts: manifests by path; they match their artifacts.
        trust: whether the user trusts all of them, which is remembered.
    """
    if trust:
        remember(artifacts.values())
        return
    for path, manifest in artifacts.items():
        if not is_trusted(manifest):
            title = ENGINE_FORMATS[manifest["format"]].title
            raise UserError(
                f"{path} is native code for {title} that you have not exported here, and loading it "
                "runs it; if you trust its source, add --trust true (from Python trust=True), else "
                "export the model yourself"
            )


def is_trusted(manifest: Mapping[str, Any]) -> bool:
    """Return whether an artifact is data, or native code that this user has exported or trusted."""
    return not _runs_code(manifest) or manifest["sha256"] in _trusted()


def _runs_code(manifest: Mapping[str, Any]) -> bool:
    return ENGINE_FORMATS[manifest["format"]].runs_code


def _trusted() -> set[str]:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return set(trust_file().read_text(encoding="utf-8").split())
    return set()
