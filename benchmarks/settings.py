"""Settings of every benchmark, by the name of its command."""

from pathlib import Path
from typing import Literal

from pydantic import AliasChoices, Field

from infer.embedding.settings import DecodeIn
from infer.ensemble.boosting.libraries import LIBRARIES
from isic.runtime.config import Settings, Several
from isic.runtime.installed import PLATFORMS
from isic.views import Tta
from train.config import TrainSettings

CHECKOUT = Path(__file__).resolve().parents[1]
IS_CHECKOUT = (CHECKOUT / "setup.cfg").is_file()
"""False for an installed package, which has neither results nor documents."""
RESULTS = Path(__file__).parent / "results"
RESULTS_HELP = "folder of the CSV; benchmarks/results if not given"
ALL = "all"

BATCHES = {"cpu": (1, 16), "cuda": (1, 256)}
EXPORT_CONFIGS = (
    "vit_tiny",
    "vit_small",
    "vit_base",
    "eva02_small",
    "eva02_base",
    "convnext_tiny",
    "multitask_vit_tiny",
)
# So that a queue that is full at the start counts little.
TIMED_PER_WARMUP = 8
"""Timed batches per batch of warm-up."""
NULL = "null"
"""The config of an engine that costs nothing, to measure the pipeline itself."""
DOCUMENTS = tuple(
    CHECKOUT / name for name in ("README.md", "docs/benchmarks.md", "docs/submission.md")
)
"""The documents with tables of results."""
# fmt: off
WHEELS = (
    "fire", "termcolor", "pydantic", "pydantic-core", "annotated-types", "typing-inspection",
    "typing-extensions", "polars", "polars-runtime-32", "albumentations", "albucore",
    "stringzilla", "simsimd", "timm",
)
"""Packages that a machine with PyTorch and ONNX usually lacks, or has in an older version."""
# fmt: on
# A part that is stopped keeps its rows: one per engine, config or peer.
SHARES = {"correctness": 0.25, "throughput": 0.25, "embed": 0.25, "train": 0.15, "peers": 0.1}
"""The parts in their order, and the share of the time after which each is stopped."""
# The most important first, since the time may run out.
GPU_CONFIGS = ("vit_tiny", "vit_base", "eva02_base")
# Tracing may treat a batch of 1 or 2 as a constant, and kernels may need a multiple of 8.
CHECKED_BATCHES = {"cpu": (1, 2, 7, 16), "cuda": (1, 2, 7, 256)}
"""Batch sizes at which an engine's outputs are checked."""
CAMPAIGNS = {
    "inputs": ("benchmarks.faults.inputs:InputsCampaign", 10_000),
    "kills": ("benchmarks.faults.kills:KillsCampaign", 1_000),
    "resources": ("benchmarks.faults.resources:ResourcesCampaign", 225),
}
"""Class of each campaign of faults, and its attempts."""
ARTIFACTS_HELP = (
    "folder of the untrained networks' artifacts, in which those of earlier commands are reused; "
    "a temporary one if not given"
)


class ThroughputSettings(Settings):
    """Measure images per second of untrained networks, each engine in its own process.

    A row compares the rate with the machine's limits, or has the reason that there is no rate.
    """

    config: Several[str] = Field((ALL,), description="configs, separated by commas, or all")
    formats: Several[str] = Field(
        (ALL,),
        validation_alias=AliasChoices("formats", "format", "engine"),
        description="export formats, eager or compile, separated by commas, or all",
    )
    precision: Several[str] = Field(
        (ALL,), description="fp32, fp16, bf16, int8, fp8, separated by commas, or all"
    )
    batch: Several[int] = Field(
        (), description="images per call, separated by commas; 1,16 on a CPU, 1,256 on a GPU"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="device of the engines")
    data: Path | None = Field(
        None, description="dataset folder of the input images; noise if not given"
    )
    repeats: int = Field(5, ge=1, description="repeats, of which the median counts")
    seconds: float = Field(1.0, gt=0, description="least length of a repeat, at least one call")
    patience: float = Field(900.0, gt=0, description="time limit of an engine in seconds")
    artifacts: Path | None = Field(None, description=ARTIFACTS_HELP)
    results: Path | None = Field(None, description=RESULTS_HELP)


class CorrectnessSettings(Settings):
    """Check one training step and every engine against the network in float32, untrained.

    Each check has its own process and row. Exits with 1 if none succeeds.
    """

    config: Several[str] = Field(GPU_CONFIGS, description="configs, separated by commas, or all")
    formats: Several[str] = Field(
        (ALL,),
        validation_alias=AliasChoices("formats", "format", "engine"),
        description="export formats, separated by commas, or all",
    )
    precision: Several[str] = Field(
        (),
        description="precisions of the engines; a format's default one if it offers none of them",
    )
    batch: Several[int] = Field(
        (), description="images per call; 1,2,7,16 on a CPU, 1,2,7,256 on a GPU"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="device of the engines")
    data: Path | None = Field(None, description="dataset folder of the images; noise if not given")
    patience: float = Field(900.0, gt=0, description="time limit of a check in seconds")
    num_at_once: int | None = Field(
        None, ge=1, description="checks at the same time; one per four cores if not given"
    )
    artifacts: Path | None = Field(None, description=ARTIFACTS_HELP)
    results: Path | None = Field(None, description=RESULTS_HELP)


class ExportCostSettings(Settings):
    """Build untrained networks in every format and precision and check their parity."""

    config: Several[str] = Field(EXPORT_CONFIGS, description="configs, separated by commas, or all")
    formats: Several[str] = Field(
        (ALL,),
        validation_alias=AliasChoices("formats", "format", "engine"),
        description="export formats, separated by commas, or all",
    )
    precision: Several[str] = Field((ALL,), description="precisions, separated by commas, or all")
    data: Path | None = Field(
        None, description="dataset folder of the parity check's images; noise if not given"
    )
    results: Path | None = Field(None, description=RESULTS_HELP)


class PeersSettings(Settings):
    """Measure `infer embed` end to end against each peer and compare the features by cosine.

    The features are compared twice: from the images as each baseline reads them, and from the same
    pixels, since PIL antialiases images that it shrinks.
    """

    config: str = Field("vit_tiny", description="config of the network, which is not trained")
    data: Path = Field(Path("data/isic-2024"), description="dataset folder with train-image.hdf5")
    formats: str = Field(
        "onnx",
        validation_alias=AliasChoices("formats", "format", "engine"),
        description="export format of this toolkit's artifact",
    )
    precision: Several[str] = Field(
        ("fp32",),
        description="precisions of the artifact; peers use the same on a GPU, else float32",
    )
    peers: Several[str] = Field(
        (ALL,), description="parts of the peers' names, separated by commas, or all"
    )
    images: int = Field(
        512, ge=1, description="images per repeat; a smaller dataset is read repeatedly"
    )
    batch: int = Field(16, ge=1, description="images per call of the network")
    repeats: int = Field(5, ge=1, description="repeats; the baselines alternate in each")
    num_workers: int | None = Field(
        None, ge=0, description="workers of the peers' DataLoader; one per core if not given"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="device of the network")
    artifacts: Path | None = Field(None, description=ARTIFACTS_HELP)
    results: Path | None = Field(None, description=RESULTS_HELP)


class IngestSettings(Settings):
    """Measure images per second from ids to batches, for this toolkit and for common loaders.

    All loaders read the same images in turns, so that a drift of the machine affects all of them.
    """

    data: Path = Field(Path("data/isic-2024"), description="dataset folder with train-image.hdf5")
    size: int = Field(224, ge=8, description="side of the decoded images in pixels")
    images: int = Field(4000, ge=1, description="images per repeat; slow loaders read fewer")
    repeats: int = Field(
        5, ge=1, description="repeats, of which the median counts; the loaders alternate in each"
    )
    threads: Several[int] = Field(
        (1, 2), description="numbers of decoding threads, separated by commas"
    )
    index: bool = Field(True, description="also time the offset index of a file of 401,059 images")
    results: Path | None = Field(None, description=RESULTS_HELP)


class AugmentSettings(Settings):
    """Measure images per second of a core: decoding and each level of augmentation.

    The images come from files or from pixels that are kept; those that the device augments are in a
    batch already, and the device is a core. Rates are per second of CPU time.
    """

    data: Path = Field(
        Path("data/isic-2024"), description="dataset folder; its first training images are used"
    )
    size: int = Field(224, ge=8, description="side of the images in pixels")
    images: int = Field(1000, ge=1, description="number of images, which are read repeatedly")
    batch: int = Field(32, ge=1, description="images per batch")
    seconds: float = Field(1.0, gt=0, description="least length of a repeat in CPU time")
    repeats: int = Field(5, ge=1, description="repeats, of which the median counts")
    results: Path | None = Field(None, description=RESULTS_HELP)


class TrainRateSettings(TrainSettings):
    """Measure images per second of training, on files and in memory, and of a bare loop.

    The bare loop uses timm and torch only, in a process of its own that this toolkit's global
    settings do not affect. The three alternate.
    """

    steps: int = Field(
        30,
        ge=1,
        description="timed optimizer steps per repeat; with loader processes at least "
        f"{TIMED_PER_WARMUP} times the steps of warm-up",
    )
    warmup_steps: int = Field(
        5, ge=1, description="untimed steps of warm-up, in addition to those on prefetched batches"
    )
    repeats: int = Field(
        5, ge=1, description="repeats, of which the median counts; the loops alternate in each"
    )
    busy: int = Field(
        0, ge=0, description="other processes during the measurement, each busy on one core"
    )
    results: Path | None = Field(None, description=RESULTS_HELP)


class EmbedRateSettings(Settings):
    """Measure images per second of reading, of the engine of fold 0, and of both end to end.

    With --formats the config's untrained network is exported first.
    """

    config: str = Field(
        NULL, description="exported config to embed with; null is an engine that costs nothing"
    )
    model_dir: Path | None = Field(
        None, description="folder of the exported run; outputs/<config> if not given"
    )
    data: Path = Field(
        Path("data/isic-2024"), description="dataset folder; its training images are embedded"
    )
    images: int = Field(
        4000, ge=1, description="images per repeat; a smaller dataset is read repeatedly"
    )
    repeats: int = Field(5, ge=1, description="repeats, of which the median counts")
    tta: Tta = Field("none", description="views of test-time augmentation")
    num_threads: int | None = Field(
        None, ge=1, description="decoding threads or processes; one per core by default"
    )
    decode_in: DecodeIn = Field("auto", description="what decodes: threads or processes")
    formats: str | None = Field(
        None,
        validation_alias=AliasChoices("formats", "format", "engine"),
        description="export format of the untrained network; if not given, an exported run",
    )
    precision: str = Field("fp32", description="precision of the untrained network")
    batch: int = Field(256, ge=1, description="images per call of the untrained network")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="device of the network")
    artifacts: Path | None = Field(None, description=ARTIFACTS_HELP)
    whole: bool = Field(
        False, description="instead time `infer embed` on all training images, with its memory"
    )
    results: Path | None = Field(None, description=RESULTS_HELP)


class PipelineSettings(Settings):
    """Measure the embedding pipeline with stand-ins for the engine and for decoding.

    Rows are the rate of decoders that sleep, the cost of the thread that feeds the engine, and the
    share of a timed engine's rate that is reached end to end.
    """

    data: Path = Field(
        Path("data/isic-2024"), description="dataset folder with train-image.hdf5, for its ids"
    )
    images: int = Field(50_000, ge=1, description="images per run of decoders or control thread")
    workers: Several[int] = Field(
        (1, 4, 16, 32), description="numbers of decoders, separated by commas"
    )
    rates: Several[int] = Field(
        (2_000, 5_000, 10_000), description="images per second of engines, separated by commas"
    )
    seconds: float = Field(20.0, gt=0, description="length of the run of an engine")
    repeats: int = Field(5, ge=1, description="repeats of the control thread's runs")
    results: Path | None = Field(None, description=RESULTS_HELP)


class TabularSettings(Settings):
    """Measure features, here and in pandas, fitting, and predicting: seconds and memory."""

    rows: Several[int] = Field(
        (4_000, 40_000, 401_059), description="sizes of the synthetic tables, separated by commas"
    )
    predict_rows: int = Field(100_000, ge=1, description="rows to predict")
    trees: int = Field(300, ge=1, description="trees of the booster that predicts")
    fit_rounds: int | None = Field(
        None, ge=1, description="boosting rounds to fit; each library's own if not given"
    )
    repeats: int = Field(3, ge=1, description="repeats, of which the median counts")
    results: Path | None = Field(None, description=RESULTS_HELP)


class NetworksSettings(Settings):
    """Measure the features of several networks, of random embeddings: CPU seconds and memory."""

    features: Several[str] = Field(
        ("engineered", "multimodal", "multimodal+aligned"),
        description="feature sets, separated by commas, groups joined by +",
    )
    rows: int = Field(401_059, ge=100, description="rows of the synthetic table")
    networks: int = Field(3, ge=1, description="number of networks")
    width: int = Field(192, ge=1, description="features of each network")
    repeats: int = Field(3, ge=1, description="repeats, of which the median counts")
    results: Path | None = Field(None, description=RESULTS_HELP)


class ComparisonsSettings(Settings):
    """Compare fitted ensembles with one, by seeds and patients, as `infer compare` does."""

    data: Path = Field(description="dataset folder that the ensembles were fitted on")
    label: str = Field(description="name of the data in the table")
    first: Path = Field(description="the ensemble's folder that the others are compared with")
    second: Several[Path] = Field(
        min_length=1, description="folders of the others, separated by commas"
    )
    draws: int = Field(1000, ge=100, description="bootstrap resamples of the patients")
    results: Path | None = Field(None, description=RESULTS_HELP)


class SubmissionsSettings(Settings):
    """Score submissions on a test split with known labels, each compared with the first one."""

    data: Path = Field(description="dataset folder with the test table")
    label: str = Field(description="name of the data in the table")
    submissions: Several[Path] = Field(
        min_length=1, description="submissions of `infer predict`, separated by commas"
    )
    truth: Path | None = Field(
        None, description="CSV of isic_id and target; test-truth.csv in the dataset if not given"
    )
    draws: int = Field(1000, ge=100, description="bootstrap resamples of the patients")
    results: Path | None = Field(None, description=RESULTS_HELP)


class AccuracySettings(Settings):
    """Append out-of-fold scores, pooled and by fold. Fits nothing but the colour baseline."""

    data: Path = Field(description="dataset folder; its training rows are scored out of fold")
    label: str = Field(description="name of the data in the table")
    model_dir: Path | None = Field(
        None,
        validation_alias=AliasChoices("model_dir", "run"),
        description="folder of a trained run, outputs/<config>",
    )
    ensembles: Path | None = Field(None, description="folder of fitted ensembles, outputs/ensemble")
    baseline: bool = Field(
        True, description="also score LightGBM on colour statistics of the images, if there are any"
    )
    num_folds: int = Field(5, ge=2, description="folds of the baseline")
    split_seed: int = Field(42, description="seed of the baseline's folds")
    results: Path | None = Field(None, description=RESULTS_HELP)


class AblationSettings(Settings):
    """Fit an ensemble per feature set and library and compare each with the first set's."""

    data: Path = Field(description="dataset folder; its training rows are scored out of fold")
    label: str = Field(description="name of the data in the table")
    embeddings: Several[Path] = Field(
        (), description="outputs/embeddings/<config> of each network, made with --folds all"
    )
    frozen: Several[Path] = Field(
        (), description="embeddings of the images by networks trained on other images"
    )
    features: Several[str] = Field(
        (),
        description="feature sets to compare with the first, separated by commas, "
        "groups joined by +",
    )
    libraries: Several[str] = Field(
        (*LIBRARIES, "+".join(LIBRARIES)),
        description="booster libraries, separated by commas, several in one ensemble joined by +",
    )
    seeds: int = Field(10, ge=2, description="seeds per fit")
    split_seed: int | None = Field(
        None, ge=0, description="seed of the folds, if no plan comes with the data or embeddings"
    )
    splits: int = Field(
        1,
        ge=1,
        description="fold plans per fit, for sets without the fold models' features; from 3 on, "
        "folds are paired instead of seeds",
    )
    num_rounds: int | None = Field(
        None, ge=1, description="boosting rounds; each library's own if not given"
    )
    draws: int = Field(1000, ge=100, description="bootstrap resamples of the patients")
    results: Path | None = Field(None, description=RESULTS_HELP)


class HospitalSettings(Settings):
    """Compare treatments of categories on hospitals held out and in cross-validation."""

    data: Path = Field(description="dataset folder; its training rows are scored")
    label: str = Field(description="name of the data in the table")
    features: Several[str] = Field(("raw", "engineered"), description="feature sets")
    blank_shares: Several[float] = Field(
        (0.1, 0.2), description="shares of training rows to blank categories in"
    )
    hospital_shares: Several[float] = Field(
        (0.2, 0.5), description="the same, of attribution and copyright_license only"
    )
    min_positives: int = Field(
        10, ge=1, description="fewest malignant lesions of a hospital that is held out"
    )
    split_seeds: Several[int] = Field((7, 11, 13), description="fold plans of the cross-validation")
    num_folds: int = Field(5, ge=2, description="folds per plan")
    seeds: int = Field(10, ge=2, description="boosters per fold, each with its own seed")
    seed: int = Field(0, ge=0, description="the first of the seeds")
    draws: int = Field(1000, ge=100, description="bootstrap resamples of the patients")
    num_threads: int = Field(0, ge=0, description="threads, 0 for all")
    results: Path | None = Field(None, description=RESULTS_HELP)


class FewSettings(Settings):
    """Score every feature set on groups of each size, and on whole patients.

    Sets with features relative to the patient are also fitted on thinned patients, and blended with
    the first set, which then scores patients of few lesions, as `infer predict --few raw` does.
    """

    data: Path = Field(description="dataset folder; its training rows are scored out of fold")
    label: str = Field(description="name of the data in the table")
    features: Several[str] = Field(
        ("raw", "engineered"), description="feature sets; the others are compared with the first"
    )
    sizes: Several[int] = Field(
        (1, 2, 3, 5, 10, 20), description="numbers of a patient's lesions that are scored together"
    )
    thin_shares: Several[float] = Field(
        (0.5,), description="shares of patients to split in training, see `infer fit`"
    )
    num_folds: int = Field(5, ge=2, description="folds")
    split_seed: int = Field(42, ge=0, description="seed of the folds")
    seeds: int = Field(3, ge=1, description="boosters per fold, each with its own seed")
    draws: int = Field(1000, ge=100, description="bootstrap resamples of the patients")
    num_threads: int = Field(0, ge=0, description="threads, 0 for all")
    results: Path | None = Field(None, description=RESULTS_HELP)


class StartSettings(Settings):
    """Measure the CPU time of help, refused keys and other quick answers."""

    repeats: int = Field(3, ge=1, description="repeats, of which the median counts")
    results: Path | None = Field(None, description=RESULTS_HELP)


class ConfigsSettings(Settings):
    """Record the size of every model config."""

    results: Path | None = Field(
        None, description="folder of the CSV; benchmarks/results if not given"
    )


class FaultsSettings(Settings):
    """Give commands broken inputs, kill them, and count the attempts that end well.

    The same command resumes after an interruption. Exits with 1 if an attempt failed.
    """

    campaign: Several[str] = Field(
        (ALL,), description=f"of {', '.join(CAMPAIGNS)}, separated by commas, or all"
    )
    target: Several[str] = Field((ALL,), description="targets, separated by commas, or all")
    seed: Several[int] = Field(
        (), description="repeat the attempts with these seeds only and record nothing"
    )
    attempts: int | None = Field(
        None, ge=1, description="attempts per campaign; its own number if not given"
    )
    minutes: float = Field(120.0, gt=0, description="time after which no attempt begins")
    num_workers: int | None = Field(
        None, ge=1, description="attempts at the same time; one per core if not given"
    )
    work_dir: Path = Field(
        Path("outputs/faults"), description="folder of the valid files and the log of attempts"
    )
    results: Path | None = Field(None, description=RESULTS_HELP)


class TablesSettings(Settings):
    """Update every table of the documents, and the page of charts, from the last results."""

    documents: Several[Path] = Field(
        DOCUMENTS, description="Markdown files with tables to update, separated by commas"
    )
    results: Path = Field(RESULTS, description="folder of the CSVs")
    page: Path = Field(
        Path("outputs/benchmarks.html"), description="HTML page of charts and all tables"
    )


class SlowdownSettings(Settings):
    """Compare each last rate with the previous one on the same kind of machine.

    Exits with 1 if one is slower beyond noise.
    """

    benchmark: Several[str] = Field(
        (), description="benchmarks to check, separated by commas; all if not given"
    )
    tolerance: float = Field(0.05, ge=0, lt=1, description="slowdown that is always accepted")
    noise: float = Field(
        0.1, ge=0, lt=1, description="spread of a rate whose repeats are not recorded"
    )
    results: Path = Field(RESULTS, description="folder of the CSVs")


class PackSettings(Settings):
    """Write code, packages, a sample of images and the script `run.sh` into a folder.

    TensorRT and ONNX Runtime for GPUs are larger than the limit, so the machine's own are used.
    """

    output_dir: Path = Field(
        validation_alias=AliasChoices("output_dir", "out"),
        description="folder to write, which must not exist",
    )
    data: Path = Field(
        Path("data/isic-2024"), description="dataset folder from which images are sampled"
    )
    images: int = Field(1000, ge=1, description="images of the sample")
    wheels: Several[str] = Field(
        WHEELS, description="packages to add, separated by commas, or none"
    )
    python: str = Field("3.12", description="Python version of the machine")
    platform: Several[str] = Field(PLATFORMS, description="platform tags of the machine")
    limit_mb: float = Field(60, gt=0, description="largest size of the folder in megabytes")


class GpuSettings(Settings):
    """Run all parts, each in its own processes. Exits with 1 if none succeeds.

    A part that fails or takes too long does not affect the others.
    """

    data: Path | None = Field(
        None, description="dataset folder of the images; parts that need it fail if not given"
    )
    parts: Several[str] = Field(
        tuple(SHARES), description=f"of {', '.join(SHARES)}, separated by commas"
    )
    config: Several[str] = Field(
        GPU_CONFIGS, description="configs, separated by commas; the peers run the first"
    )
    precision: Several[str] = Field(
        (),
        description="precisions of the engines, separated by commas; each format's default one "
        "if not given",
    )
    batch: int = Field(256, ge=1, description="images per call")
    images: int = Field(
        200_000, ge=1, description="images per repeat of embed; the dataset is read repeatedly"
    )
    repeats: int = Field(3, ge=1, description="repeats of throughput, train and peers")
    seconds: float = Field(0.5, gt=0, description="least length of a repeat of the throughput")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="device of the networks")
    minutes: float = Field(8.5, gt=0, description="time limit of all parts together")
    artifacts: Path | None = Field(None, description=ARTIFACTS_HELP)
    results: Path | None = Field(
        None, description="folder of the CSVs; benchmarks/results if not given"
    )
