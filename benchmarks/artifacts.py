"""Artifacts of untrained networks for several benchmarks: each is built once."""

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import commit, error_text
from benchmarks.untrained import MAX_BATCH, Artifact, UntrainedModel, export_untrained, target_of
from isic.preprocess import Pixels
from isic.runtime.files import new_folder, read_json, write_json

FACTS_FILE = "facts.json"


class BuildFailed(Exception):
    """An artifact does not build; the message is the reason."""


@dataclass(frozen=True)
class ArtifactStore:
    """A folder with a subfolder per artifact: its files, or the reason that it does not build."""

    root: Path

    def get(
        self,
        untrained: UntrainedModel,
        format_name: str,
        precision: str,
        device: str = "auto",
        max_batch: int = MAX_BATCH,
        images: Pixels | None = None,
    ) -> Artifact:
        """Return an artifact, which is built unless an earlier call has tried.

        The arguments are those of `export_untrained`. An artifact is identified by all of them but
        the images, and by the commit.

        Raises:
            BuildFailed: it does not build, now or in the earlier call.
        """
        target = target_of(untrained, format_name, precision, device, max_batch)
        names = (untrained.settings.name, format_name, precision, target.device, str(max_batch))
        folder = self.root / commit() / "-".join(names)
        if not folder.is_dir():
            export = functools.partial(
                export_untrained,
                untrained,
                format_name,
                precision,
                device=device,
                max_batch=max_batch,
                images=images,
            )
            with new_folder(folder) as building:
                write_json(building / FACTS_FILE, _build(export, building))
        facts = read_json(folder / FACTS_FILE)
        if "reason" in facts:
            raise BuildFailed(facts["reason"])
        return Artifact(folder / facts["file"], facts["manifest"], facts["seconds"], target)


def _build(export: Callable[..., Artifact], folder: Path) -> dict[str, Any]:
    """Return an artifact's record: its file, or the reason that there is none."""
    try:
        artifact = export(folder=folder)
    except Exception as error:  # builders raise exceptions of any type
        return {"reason": error_text(error)}
    name = artifact.path.name
    return {"file": name, "manifest": artifact.manifest, "seconds": artifact.seconds}


@contextlib.contextmanager
def open_store(root: Path | None) -> Iterator[ArtifactStore]:
    """Open the store in a folder, or in a temporary one without it."""
    if root is not None:
        yield ArtifactStore(root)
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        yield ArtifactStore(Path(name))
