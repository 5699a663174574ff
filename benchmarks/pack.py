"""`python -m benchmarks pack`: a folder with all that a GPU machine without network needs."""

import shutil
import stat
import tarfile
import tempfile
from pathlib import Path

import polars as pl

from benchmarks.record import COMMIT_FILE, commit
from benchmarks.settings import CHECKOUT, PackSettings
from isic import schema
from isic.dataset import Dataset
from isic.runtime.errors import UserError
from isic.runtime.files import megabytes, new_folder, write_text
from isic.runtime.installed import install, pinned
from isic.synth.write import write_images

CODE = ("isic", "train", "export", "infer", "benchmarks", "configs")
NO_WHEELS = ("none",)
SCRIPT = Path(__file__).with_name("run.sh")
SITE = "site.tar.xz"
"""The installed packages, compressed; run.sh unpacks them."""


def pack(settings: PackSettings) -> None:
    """Run `benchmarks pack`, which its settings describe."""
    target = settings.output_dir
    if target.exists():
        raise UserError(f"{target} exists already; choose another --output_dir")
    with new_folder(target) as folder:
        copy_code(folder / "code")
        copy_sample(settings.data, folder / "data", settings.images)
        if settings.wheels != NO_WHEELS:
            pack_site(settings, folder / SITE)
        script = Path(shutil.copy(SCRIPT, folder))
        script.chmod(script.stat().st_mode | stat.S_IXUSR)  # an installed wheel lost the bit
        size = check_size(folder, settings.limit_mb)
    print(
        f"packed {size:.0f} MB into {target}; run {script.name} on the machine, which writes its "
        "results to $OUT, or to results/ next to it"
    )


def check_size(folder: Path, limit_mb: float) -> float:
    """Return the megabytes of a folder. Raise UserError with its largest parts above a limit."""
    sizes = {path.name: megabytes(path) for path in folder.iterdir()}
    total = sum(sizes.values())
    if total <= limit_mb:
        return total
    largest = sorted(sizes, key=lambda name: -sizes[name])[:2]
    parts = ", ".join(f"{name} {sizes[name]:.1f} MB" for name in largest)
    raise UserError(
        f"the folder has {total:.1f} MB ({parts}), over --limit_mb {limit_mb:g}; pack fewer "
        "--images or --wheels"
    )


def copy_code(target: Path) -> None:
    """Copy the packages, without results, and the name of their commit."""
    ignore = shutil.ignore_patterns("__pycache__", "results")
    for name in CODE:
        shutil.copytree(CHECKOUT / name, target / name, ignore=ignore)
    write_text(target / COMMIT_FILE.relative_to(CHECKOUT), commit() + "\n")


def copy_sample(data: Path, target: Path, num_images: int) -> None:
    """Write some images of a dataset, with their rows, as a dataset that can be trained on."""
    dataset = Dataset(data)
    table = dataset.metadata("train")
    store = dataset.images("train")
    table = table.filter(~table[schema.ID].is_in(store.missing(table[schema.ID].to_list())))
    # Positives are rare: take all of them, up to half of the sample.
    is_positive = table[schema.TARGET] == 1
    positives = table.filter(is_positive).head(num_images // 2)
    negatives = table.filter(~is_positive).head(num_images - len(positives))
    sample = pl.concat([positives, negatives]).sort(schema.ID)
    target.mkdir(parents=True)
    ids = sample[schema.ID].to_list()
    write_images(target / "train-image.hdf5", zip(ids, store.read(ids), strict=True))
    sample.write_csv(target / "train-metadata.csv")


def pack_site(settings: PackSettings, target: Path) -> None:
    """Write the wheels for the other machine, installed into a folder, as one archive."""
    # Wheels compress less: polars' library has 178 MB, its wheel 54 MB, the archive 36 MB. Higher
    # presets take minutes.
    with tempfile.TemporaryDirectory() as name:
        packages = map(pinned, settings.wheels)
        install(packages, Path(name), settings.python, settings.platform)
        with tarfile.open(target, "w:xz", preset=3) as archive:
            archive.add(name, arcname=".")
