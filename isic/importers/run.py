"""`python -m isic import`: write a public collection in the layout of the challenge."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from isic import schema
from isic.headers import ImageError, image_size
from isic.importers.collections import COLLECTIONS
from isic.importers.files import SourceFiles, find_images, find_masks, find_tables
from isic.importers.table import build_table, full_name
from isic.metadata import with_patient
from isic.runtime.errors import UserError
from isic.runtime.files import holds, read_json, refuse_foreign, sha256, write_json
from isic.runtime.only_writer import only_writer
from isic.runtime.progress import TimeLeft
from isic.settings import ImportSettings
from isic.synth.write import HEADER_BYTES, write_images, write_table

MANIFEST = "import.json"
TABLE_FILE = "train-metadata.csv"
IMAGE_FILE = "train-image.hdf5"
MASK_FILE = "masks.hdf5"
OTHER_FILES = ("train-metadata.parquet", "train-image", "folds.parquet")
"""Files that would be read in place of, or with, the imported ones."""


def import_collection(settings: ImportSettings) -> None:
    """Write the table, images and masks of a collection, and a manifest.

    Raises:
        UserError: files or columns are missing, or the output folder holds something else.
    """
    with only_writer(settings.output_dir):
        _import(settings)


def _import(settings: ImportSettings) -> None:
    collection = COLLECTIONS[settings.collection]
    files = SourceFiles(settings.source)
    paths = find_tables(files, collection)
    table, notes = build_table(collection, paths)
    ids = table[schema.ID].to_list()
    images = find_images(files, collection, ids)
    masks = find_masks(files, collection, ids)
    earlier = _earlier_import(settings.output_dir, settings.collection)
    print(f"importing {len(ids):,} images of {collection.title}", flush=True)
    out = settings.output_dir
    manifest: dict[str, object] = {
        "collection": settings.collection,
        "title": collection.title,
        "url": collection.url,
        "licence": collection.licence,
        "source_of_malignancy": collection.source_of_kinds,
        "masks": len(masks),
    }
    if masks:
        refuse_foreign([out / MASK_FILE], bool(earlier.get("masks")), "--output_dir")
    elif earlier.get("masks"):
        (out / MASK_FILE).unlink(missing_ok=True)
    # Before the other files, so that a run that is killed can be repeated.
    write_json(out / MANIFEST, {**manifest, "unfinished": True})
    # The table is last but for the manifest: without it the folder is no dataset yet.
    _write_files(out / IMAGE_FILE, images)
    if masks:
        _write_files(out / MASK_FILE, masks)
    write_table(out / TABLE_FILE, table)
    positives = int(table[schema.TARGET].sum())
    manifest |= {
        "diagnoses": {code: full_name(found) for code, found in collection.diagnoses.items()},
        "tables": {path.name: sha256(path) for path in paths.values()},
        "rows": len(ids),
        "positives": positives,
        "notes": notes,
    }
    write_json(out / MANIFEST, manifest)
    for note in notes:
        print(f"note: {note}")
    groups = with_patient(table)[schema.PATIENT].n_unique()
    print(
        f"wrote {out}: {len(ids):,} images, {positives:,} malignant, {groups:,} groups by "
        f"{collection.group}, {len(masks):,} masks; {collection.licence}, see {collection.url}"
    )


def _earlier_import(out: Path, collection: str) -> dict[str, Any]:
    """Return the manifest of an earlier import into the folder, {} if there is none.

    Raises:
        UserError: the folder holds files that are not of an import, or one of another collection.
    """
    is_own = holds(out / MANIFEST, "collection", "source_of_malignancy")
    names = (TABLE_FILE, IMAGE_FILE, MASK_FILE, MANIFEST)
    refuse_foreign([out / name for name in names], is_own, "--output_dir")
    other = next((name for name in OTHER_FILES if (out / name).exists()), None)
    if other:
        raise UserError(f"{out} holds {other}; choose another --output_dir")
    earlier = read_json(out / MANIFEST) if is_own else {}
    if earlier.get("collection", collection) != collection:
        raise UserError(
            f"{out} holds an import of {earlier['collection']}; choose another --output_dir"
        )
    return earlier


def _write_files(path: Path, files: Mapping[str, Path]) -> None:
    """Write the bytes of image files, unchanged, into an HDF5 file."""
    num_bytes = sum(file.stat().st_size + HEADER_BYTES for file in files.values())
    time_left = TimeLeft(len(files), f"writing {path.name}")

    def read() -> Iterator[tuple[str, bytes]]:
        for name, file in sorted(files.items()):
            data = file.read_bytes()
            try:
                image_size(data)
            except ImageError as error:
                raise UserError(f"{file} is no whole image ({error}); unpack it again") from None
            yield name, data
            time_left.advance(1)

    write_images(path, read(), num_bytes)
