"""`python -m benchmarks export`: build time, size and parity of every format and precision."""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.record import Row, append_each, error_text
from benchmarks.settings import ExportCostSettings
from benchmarks.untrained import (
    Artifact,
    chosen,
    create_untrained,
    example_images,
    export_untrained,
    find_configs,
)
from export.formats import FORMATS, TOLERANCES, build_device, offered_precisions
from export.parity import Reference, check_parity, worst_figures
from infer.engines import create, unavailable_reason

NUM_IMAGES = 32
"""Images of the parity check; as many others calibrate int8 and fp8."""


def export(settings: ExportCostSettings) -> None:
    """Run `benchmarks export`, which its settings describe."""
    wanted = select_formats(settings)
    rows_of = partial(export_rows, wanted=wanted, data=settings.data)
    append_each("export", find_configs(settings.config), rows_of, settings.results)


def select_formats(settings: ExportCostSettings) -> list[tuple[str, str]]:
    """Return the pairs of format and precision to build. Raise UserError for an unknown word."""
    known = [
        (name, precision)
        for name in FORMATS
        for precision in offered_precisions(name, build_device(name, "auto"))
    ]
    formats = list(dict.fromkeys(name for name, _ in known))
    precisions = list(dict.fromkeys(precision for _, precision in known))
    formats = chosen("formats", settings.formats, formats)
    precisions = chosen("precision", settings.precision, precisions)
    return [pair for pair in known if pair[0] in formats and pair[1] in precisions]


def export_rows(config: str, wanted: list[tuple[str, str]], data: Path | None) -> Iterator[Row]:
    """Yield one row per artifact of a config."""
    untrained = create_untrained(config)
    # The check must not judge images of the calibration.
    images = example_images(data, untrained.spec, 2 * NUM_IMAGES)
    reference = Reference(untrained.model, images[:NUM_IMAGES])
    for name, precision in wanted:
        row: Row = {"what": untrained.settings.name, "format": name, "precision": precision}
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            try:
                artifact = export_untrained(
                    untrained, name, precision, Path(folder), images=images[NUM_IMAGES:]
                )
                row |= _artifact_columns(artifact, reference)
            except Exception as error:  # builders raise exceptions of any type
                row["reason"] = f"does not build: {error_text(error)}"
        yield row


def _artifact_columns(artifact: Artifact, reference: Reference) -> Row:
    row: Row = {
        "seconds": round(artifact.seconds, 1),
        "megabytes": round(artifact.megabytes, 1),
    }
    target = artifact.target
    if FORMATS[target.format].portable and unavailable_reason(target.format, target.device):
        return {**row, "reason": "no GPU runs it here"}
    try:
        engine = create(artifact.path, artifact.manifest, target.device)
        tolerance = TOLERANCES[target.precision]
        worst = worst_figures(check_parity(reference, engine, tolerance, target.batch_sizes))
    except Exception as error:  # engines raise exceptions of any type
        return {**row, "reason": error_text(error)}
    return {
        **row,
        "cosine": round(worst["cosine"], 7),
        "max_logit_error": float(f"{worst['max_logit_error']:.1e}"),
    }
