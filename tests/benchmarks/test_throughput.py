from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from benchmarks.fresh import create_fresh
from benchmarks.limits import Limits, Work, count_work, limits
from benchmarks.record import Row, append_each
from benchmarks.worker import Job, checked_features, job_file, main
from infer.engines import Outputs
from isic.preprocess import Pixels
from isic.runtime.errors import UserError
from isic.runtime.files import read_json
from tests.support.commands import TINY_YAML, Cli


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A config of a network that runs in a millisecond."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_YAML)
    return path


def test_every_engine_is_measured_in_its_own_process(tiny: Path, tmp_path: Path, cli: Cli) -> None:
    flags = [
        "--precision",
        "fp32",
        "--batch",
        "1,2",
        "--repeats",
        2,
        "--seconds",
        0.01,
        "--device",
        "cpu",
    ]
    ended = cli(
        "benchmarks",
        "throughput",
        "--config",
        tiny,
        "--engine",
        "eager,onnx",
        *flags,
        "--results",
        tmp_path,
    )
    assert ended.code == 0, ended.err
    rows = pl.read_csv(tmp_path / "throughput.csv")
    assert rows.select("what", "engine", "batch").rows() == [
        ("tiny", e, b) for e in ("eager", "onnx") for b in (1, 2)
    ]
    assert (rows["min"] <= rows["images_per_second"]).all() and (
        rows["images_per_second"] <= rows["max"]
    ).all()
    assert (rows["p50_ms"] <= rows["p99_ms"]).all() and (rows["cosine"] > 0.99999).all()
    eager, onnx = rows["peak_mb"].gather([0, 2])
    assert 20 < onnx < eager, "ONNX Runtime's process has no torch in it"
    assert set(rows["bound_by"]) <= {"matmul", "copy"} and (rows["of_matmul"] > 0).all()


def test_an_engine_that_is_given_up_costs_its_row_only(
    tiny: Path, tmp_path: Path, cli: Cli
) -> None:
    flags = ["--engine", "eager", "--patience", 0.01, "--results", tmp_path, "--device", "cpu"]
    ended = cli("benchmarks", "throughput", "--config", tiny, *flags)
    assert ended.code == 0, ended.err
    assert pl.read_csv(tmp_path / "throughput.csv")["reason"].to_list() == ["took longer than 0 s"]


def test_unknown_engines_and_configs_are_sentences(tiny: Path, tmp_path: Path, cli: Cli) -> None:
    for flags, hint in (
        (["--config", tiny, "--engine", "onxx"], 'did you mean "onnx"?'),
        (["--config", "vit_tyni"], 'did you mean "vit_tiny"?'),
        (
            ["--config", tiny, "--engine", "eager", "--precision", "int8", "--device", "cpu"],
            "--precision",
        ),
    ):
        ended = cli("benchmarks", "throughput", *flags, "--results", tmp_path)
        assert ended.code == 2 and hint in ended.err, ended.err
    assert not (tmp_path / "throughput.csv").exists()


class Two(torch.nn.Module):
    """A product and a convolution whose cost is known."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 4, stride=4, bias=False)
        self.linear = torch.nn.Linear(8, 5, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.conv(images.float().permute(0, 3, 1, 2))
        result: torch.Tensor = self.linear(maps.flatten(2).transpose(1, 2).relu())
        return result


def test_work_is_counted_an_image_and_weights_a_batch() -> None:
    work = count_work(Two().eval(), 8)
    patches = 4
    assert work.flops == 2 * patches * (48 * 8 + 8 * 5)
    assert work.weights == 48 * 8 + 8 * 5
    assert work.activations == 8 * 8 * 3 + patches * 8 + patches * 8 + patches * 5
    assert work.bytes_per_image("fp16", 2) == 2 * work.activations + 2 * work.weights / 2


@pytest.mark.parametrize(
    ("config", "gflop"), [("vit_tiny", 2.51), ("convnext_tiny", 8.91), ("eva02_small", 12.28)]
)
def test_flops_are_the_published_ones(config: str, gflop: float) -> None:
    fresh = create_fresh(config)
    assert count_work(fresh.model, fresh.spec.size).flops / 1e9 == pytest.approx(gflop, rel=0.01)


def test_the_slower_of_the_two_limits_binds() -> None:
    work = Work(flops=100.0, activations=10.0, weights=0.0)
    row = Limits(matmul=1000.0, copy=4000.0).of(work, "fp32", 1, 5.0)
    assert (
        row["bound_by"] == "matmul"
        and row["limit_images_per_second"] == 10
        and row["of_matmul"] == 0.5
    )
    assert Limits(matmul=1000.0, copy=40.0).of(work, "fp32", 1, 0.5)["bound_by"] == "copy"


def test_the_machine_is_measured() -> None:
    measured = limits("cpu", "fp32")
    assert 1e8 < measured.matmul < 1e14 and 1e7 < measured.copy < 1e13


def test_fresh_networks_are_the_same_every_time(tiny: Path) -> None:
    first, second = (create_fresh(str(tiny)).model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_error_of_any_type_costs_its_row_only(tmp_path: Path) -> None:
    def rows_of(name: str) -> Iterator[Row]:
        yield {"what": name, "rate": 1}
        if name == "bad":
            raise Exception("a library's own\nwith a page of notes")
        yield {"what": name, "rate": 2}

    append_each("b", ["bad", "good"], rows_of, tmp_path)
    rows = pl.read_csv(tmp_path / "b.csv")
    assert rows["what"].to_list() == ["bad", "bad", "good", "good"]
    assert rows["reason"].to_list() == [None, "Exception: a library's own", None, None]
    with pytest.raises(UserError):
        append_each("b", ["vit_tyni"], lambda name: [{"what": create_fresh(name).config}], tmp_path)


def test_an_engine_that_ends_in_an_error_says_its_type(tiny: Path, tmp_path: Path) -> None:
    job = Job(
        str(tiny),
        "eager",
        "fp32",
        "cpu",
        str(tmp_path / "absent.npy"),
        [1],
        repeats=1,
        seconds=0.01,
    )
    job_file(job, tmp_path / "job.json")
    main(tmp_path / "job.json")
    assert read_json(tmp_path / "job.result")["reason"].startswith("FileNotFoundError: ")


@pytest.mark.parametrize("batch", [5, 16, 40])
def test_checked_features_come_from_calls_of_the_measured_size(batch: int) -> None:
    class Numbered:
        """An engine whose features are the images' own numbers."""

        device, sizes = "cpu", set[int]()

        def run(self, images: Pixels) -> Outputs:
            self.sizes.add(len(images))
            numbers = images[:, 0, 0, :1].astype(np.float32)
            return numbers, numbers

    engine, images = (
        Numbered(),
        np.arange(20, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3),
    )
    assert checked_features(engine, images, batch)[:, 0].tolist() == list(
        range(16)
    ) and engine.sizes == {batch}
