"""Run `infer submit` with the code and the packages beside this file."""

import json
import os
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Put the bundle's folders first in Python's path, here and in child processes."""
    code, site = HERE / "code", HERE / "site"
    wanted = json.loads((HERE / "bundle.json").read_text(encoding="utf-8"))["python"]
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if site.is_dir() and here != wanted:
        print(
            f"error: this bundle has the packages of Python {wanted}, this is {here}; run it with "
            f"python{wanted}, or write it again with --python {here}",
            file=sys.stderr,
        )
        sys.exit(2)
    folders = [str(folder) for folder in (code, site) if folder.is_dir()]
    sys.path[:0] = folders
    others = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*folders, *([others] if others else [])])
    sys.argv[1:1] = ["submit", "--bundle", str(HERE)]
    runpy.run_module("infer", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
