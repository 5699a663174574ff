from pathlib import Path

import polars as pl
import pytest

from benchmarks.computed import UPLOAD, fed_column, h200_rates, training_column

COSTS = {"decoding": 1e6, "threads": 3e4, "processes": 9e5, "d4": 2e5, "share": 1.0}


def test_an_engine_takes_the_time_of_its_products_and_then_of_its_memory() -> None:
    rates = h200_rates(224, gflop=79.0, megabytes=43.0, costs=COSTS)
    assert rates["engine"] == pytest.approx(1 / (100e-6 + 10e-6))
    assert rates["processes"] == rates["threads"] == rates["engine"]
    assert rates["share"] == 1
    assert rates["d4_graph"] == rates["d4_host"] == rates["engine"] / 8


def test_an_engine_reaches_the_measured_share_of_its_rate() -> None:
    rates = h200_rates(224, gflop=79.0, megabytes=43.0, costs={**COSTS, "share": 0.9})
    assert rates["processes"] == pytest.approx(0.9 * rates["engine"])
    assert rates["share"] == pytest.approx(0.9)
    assert rates["d4_graph"] == pytest.approx(0.9 * rates["engine"] / 8)


@pytest.mark.parametrize(
    ("change", "column", "expected"),
    [
        ({"decoding": 5e4}, "processes", 5e4),
        ({"processes": 5e4}, "processes", 5e4),
        ({"threads": 5e4}, "threads", 5e4),
        ({"d4": 5e3}, "d4_host", 5e3),
        ({"decoding": 5e3}, "d4_graph", 5e3),
        ({}, "processes", UPLOAD / (3 * 224**2)),
    ],
)
def test_the_slowest_part_decides(change: dict[str, float], column: str, expected: float) -> None:
    rates = h200_rates(224, gflop=0.79, megabytes=0.43, costs={**COSTS, **change})
    assert rates[column] == pytest.approx(expected)
    assert rates["share"] == pytest.approx(rates["processes"] / rates["engine"])


def test_cores_feed_a_share_of_the_training_rate(tmp_path: Path) -> None:
    """Forward passes of 33.3 us are 10,000 images/s of training; 16 cores of 500 feed 80 %."""
    common = {"time": "1", "commit": "a"}
    # At 790 TFLOP/s and 4.3 TB/s, 20 us of products and 13.3 us of memory traffic.
    facts = {"what": "small", "size": 224, "gflop_per_image": 15.8, "mb_per_image": 57.33}
    pl.DataFrame([{**common, **facts}]).write_csv(tmp_path / "configs.csv")
    rows = [
        {**common, "what": "light", "source": source, "size": size, "images_per_second": rate}
        for source, size, rate in (
            ("files", 224, 500),
            ("kept pixels", 224, 1000),
            ("kept pixels", 96, 9000),
        )
    ]
    assert fed_column("light")(tmp_path) == {}, "not measured yet"
    pl.DataFrame(rows).write_csv(tmp_path / "augment.csv")
    assert training_column(tmp_path) == {"small": "10,000"}
    assert fed_column("light")(tmp_path) == {"small": "0.80 / 1.6"}
    assert fed_column("heavy")(tmp_path) == {}
