"""`python -m benchmarks export`: what building each format takes, how large it is, and how near to the network."""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from pydantic import Field

from benchmarks.fresh import (
    ALL,
    Fresh,
    build_artifact,
    chosen,
    create_fresh,
    example_images,
    find_configs,
)
from benchmarks.record import Row, append_each, reason
from export.formats import FORMATS, TOLERANCES, build_device
from export.parity import Reference, check_parity, worst_figures
from infer.engines import create, unavailable_reason
from isic.preprocess import Pixels
from isic.runtime.config import Settings, Several

NUM_IMAGES = 32
"""Images that are compared; as many others calibrate int8 and fp8."""
CONFIGS = (
    "vit_tiny",
    "vit_small",
    "vit_base",
    "eva02_small",
    "eva02_base",
    "convnext_tiny",
    "multitask_vit_tiny",
)


class ExportSettings(Settings):
    """What `python -m benchmarks export` takes."""

    config: Several[str] = Field(CONFIGS, description="configs, separated by commas, or all")
    formats: Several[str] = Field((ALL,), description="formats, separated by commas, or all")
    precision: Several[str] = Field((ALL,), description="precisions, separated by commas, or all")
    data: Path | None = Field(
        None, description="dataset whose images the parity gate sees; noise if not given"
    )
    results: Path | None = Field(
        None, description="folder of the CSV; benchmarks/results if not given"
    )


def export(settings: ExportSettings) -> None:
    """Builds fresh networks in every format and precision, and has the parity gate compare them in float32."""
    offered = {name: FORMATS[name].offered(build_device(name, "auto")) for name in FORMATS}
    known = [(name, precision) for name, precisions in offered.items() for precision in precisions]
    names = chosen("formats", settings.formats, list(dict.fromkeys(name for name, _ in known)))
    precisions = chosen(
        "precision", settings.precision, list(dict.fromkeys(precision for _, precision in known))
    )
    wanted = [
        (name, precision) for name, precision in known if name in names and precision in precisions
    ]
    rows_of = partial(rows, wanted=wanted, data=settings.data)
    append_each("export", find_configs(settings.config), rows_of, settings.results)


def rows(config: str, wanted: list[tuple[str, str]], data: Path | None) -> Iterator[Row]:
    """Yields the row of each of a config's artifacts."""
    fresh = create_fresh(config)
    images = example_images(data, fresh.spec, 2 * NUM_IMAGES)
    reference, calibration = Reference(fresh.model, images[:NUM_IMAGES]), images[NUM_IMAGES:]
    for name, precision in wanted:
        row = {"what": fresh.settings.name, "format": name, "precision": precision}
        yield {**row, **figures(fresh, reference, calibration, name, precision)}


def figures(
    fresh: Fresh, reference: Reference, calibration: Pixels, name: str, precision: str
) -> Row:
    """Returns seconds, size and parity of one artifact, or the `reason` why it has none."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            artifact = build_artifact(fresh, name, precision, Path(folder), images=calibration)
        except Exception as error:  # of any type, and it costs this row alone
            return {"reason": f"does not build: {reason(error)}"}
        built = {"seconds": round(artifact.seconds, 1), "megabytes": round(artifact.megabytes, 1)}
        if FORMATS[name].portable and unavailable_reason(name, artifact.target.device):
            return {**built, "reason": "no GPU runs it here"}
        try:
            engine = create(artifact.path, artifact.manifest, artifact.target.device)
            parity = check_parity(
                reference, engine, TOLERANCES[precision], artifact.target.batch_sizes
            )
        except Exception as error:
            return {**built, "reason": reason(error)}
    worst = worst_figures(parity)
    error_ = float(f"{worst['max_logit_error']:.1e}")
    return {**built, "cosine": round(worst["cosine"], 7), "max_logit_error": error_}
