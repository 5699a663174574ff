"""From engines to a submission: embeddings, the ensemble of boosters, and the doctor.

The names in `__all__` are for callers from Python. They are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

import isic  # noqa: F401  switches telemetry off before a library is imported

if TYPE_CHECKING:
    from infer.embedding.image_embedder import ImageEmbedder, load_embedder
    from infer.embedding.outputs import EmbeddedImages, FoldOutputs
    from infer.ensemble.fitted import FittedEnsemble, load_ensemble
    from infer.explain.occlusion import occlusion_map
    from isic.runtime.errors import ResultWarning, UserError
else:
    _MODULES = {
        "EmbeddedImages": "infer.embedding.outputs",
        "FittedEnsemble": "infer.ensemble.fitted",
        "FoldOutputs": "infer.embedding.outputs",
        "ImageEmbedder": "infer.embedding.image_embedder",
        "ResultWarning": "isic.runtime.errors",
        "UserError": "isic.runtime.errors",
        "load_embedder": "infer.embedding.image_embedder",
        "load_ensemble": "infer.ensemble.fitted",
        "occlusion_map": "infer.explain.occlusion",
    }

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_MODULES[name]), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "EmbeddedImages",
    "FittedEnsemble",
    "FoldOutputs",
    "ImageEmbedder",
    "ResultWarning",
    "UserError",
    "load_embedder",
    "load_ensemble",
    "occlusion_map",
]
