from pathlib import Path

import polars as pl
import pytest

from isic import schema
from isic.dataset import Dataset
from isic.metadata import read_metadata, with_patient
from isic.runtime.errors import UserError
from tests.support.commands import Cli
from tests.support.datasets import small_table


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_blanks_and_na_are_null_and_text_stays_text(tmp_path: Path) -> None:
    rows = ["isic_id,target,age_approx,sex,mel_mitotic_index,clinic"] + [
        f"I{i},0,,NA,,x{i}" for i in range(2000)
    ]
    table = read_metadata(
        write(tmp_path / "t.csv", "\n".join([*rows, "I2000,1,55.0,male,<1/mm^2,7"]))
    )
    assert table["age_approx"].null_count() == table["sex"].null_count() == 2000
    assert table["age_approx"].dtype == pl.Float64
    assert table["age_approx"][-1] == 55
    assert table["mel_mitotic_index"][-1] == "<1/mm^2"
    assert table["target"].dtype == pl.Int8
    assert table["clinic"][-1] == "7", "an unknown column is kept"


def test_ids_and_targets_alone_are_a_legal_table(tmp_path: Path) -> None:
    table = read_metadata(write(tmp_path / "t.csv", "isic_id,target\na,0\nb,1\n"), need=["target"])
    assert with_patient(table)["patient_id"].to_list() == ["a", "b"]


def test_parquet_is_read_like_csv(tmp_path: Path) -> None:
    small_table().with_columns(age_approx=pl.lit(40)).write_parquet(tmp_path / "t.parquet")
    table = read_metadata(tmp_path / "t.parquet")
    assert table["age_approx"].dtype == pl.Float64
    assert table["target"].dtype == pl.Int8
    blanks = pl.DataFrame(
        {"isic_id": ["a", "b"], "patient_id": ["", "NA"], "sex": ["NA", "male"], "age_approx": "NA"}
    )
    for name, write_to in (("t.parquet", blanks.write_parquet), ("t.csv", blanks.write_csv)):
        write_to(tmp_path / name)
    table = read_metadata(tmp_path / "t.parquet")
    assert table.equals(read_metadata(tmp_path / "t.csv"))
    assert table.null_count().row(0) == (
        0,
        2,
        1,
        2,
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("isic_id,age_approx\na,5\n", "lacks the column target"),
        (
            "isic_id,target,tbp_lv_A\na,0,1.5\nb,1,red\n",
            'tbp_lv_A must hold finite numbers, row 1 has "red"',
        ),
        ("isic_id,target,tbp_lv_A\na,0,inf\nb,1,2\n", 'row 0 has "inf"'),
        ("isic_id,target\na,0\na,1\nb,0\n", "1 duplicate isic_id, the first is a"),
        ("isic_id,target\na,0\nb,2\n", "target must be 0 or 1 in every row, b has 2"),
        ("isic_id,target\na,0\nb,\n", "target must be 0 or 1"),
        ("isic_id,target\n,0\nb,1\n", "1 rows have no isic_id"),
        ("isic_id,target\n", "no rows"),
        ("", "not a readable table"),
        ("isic_id,target\na,0,5,6\n", "line 2 has 4 fields, the header has 2"),
        ("isic_id,target,sex\na,0,male\nb,1", "is truncated: its last row has 2 of 3 fields"),
    ],
)
def test_a_bad_table_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        read_metadata(write(tmp_path / "t.csv", text), need=["target"])
    assert "\n" not in str(raised.value)


def test_a_missing_file_or_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file: .*train-metadata.csv"):
        Dataset(tmp_path).metadata("train")
    with pytest.raises(UserError, match="no such folder"):
        Dataset(tmp_path / "nowhere").metadata("train")


@pytest.mark.parametrize(
    ("folder", "rows", "positives"), [("real-pairs", 320, 240), ("real-tabular", 885, 240)]
)
def test_real_tables(real_data: Path, folder: str, rows: int, positives: int) -> None:
    table = Dataset(real_data / folder).metadata("train", need=schema.NUMERIC)
    assert tuple(table.columns) == schema.TRAIN_ORDER
    assert (len(table), table["target"].sum()) == (rows, positives)
    assert all(table[name].dtype == schema.DTYPES[name] for name in table.columns)
    assert (
        table.select(name for name in schema.NUMERIC if name.startswith("tbp_lv"))
        .null_count()
        .sum_horizontal()[0]
        == 0
    )


def test_the_challenges_public_test_table(real_data: Path) -> None:
    table = Dataset(real_data / "real-pairs").metadata("test")
    assert tuple(table.columns) == tuple(
        name for name in schema.TRAIN_ORDER if name not in schema.TRAIN_ONLY
    )
    assert len(table) == 3


def test_a_command_reports_a_bad_table_and_exits_2(tmp_path: Path, cli: Cli) -> None:
    ended = cli(
        "train", "--config", "demo", "--data", tmp_path / "nowhere", "--output_dir", tmp_path
    )
    assert ended.code == 2
    assert ended.err.startswith("error: no such folder")
    assert ended.err.count("\n") == 1


def test_ids_are_read_whatever_the_other_columns_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of a few bytes: no row is cut, even if a text holds a line end or a quote."""
    from isic import tables
    from isic.metadata import read_ids

    rows = ['A1,"two\nlines",1', 'A2,"a ""quoted"" word",2', "A3,plain,3", 'A4,",",4']
    path = tmp_path / "table.csv"
    path.write_bytes(("isic_id,text,number\n" + "\n".join(rows)).encode())
    for size in (1, 7, 16, 1000):
        monkeypatch.setattr(tables, "CSV_BLOCK", size)
        assert read_ids(path).to_list() == ["A1", "A2", "A3", "A4"]
    for text, words in (
        ("isic_id,x\nA,1\nA,2\n", "1 duplicate isic_id, the first is A"),
        ("isic_id,x\n,1\n", "1 rows have no isic_id"),
        ("isic_id,x\n", "no rows"),
        ("name,x\nA,1\n", "lacks the column isic_id"),
        ("", "not a readable table"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            read_ids(path)
    pl.DataFrame({"x": [1], "isic_id": ["P"]}).write_parquet(tmp_path / "table.parquet")
    assert read_ids(tmp_path / "table.parquet").to_list() == ["P"]
