"""Tables: paths like patterns, other formats, truncated files, other spellings of "no value"."""

import ast
import gzip
import os
from pathlib import Path

import polars as pl
import pytest

from isic import tables
from isic.dataset import Dataset
from isic.metadata import read_ids, read_metadata
from isic.runtime.errors import UserError
from isic.tables import (
    parquet_metadata,
    read_column,
    read_csv,
    read_parquet,
    reading,
    scan_parquet,
)
from tests.support.commands import ROOT, Cli
from tests.support.datasets import small_table

PACKAGES = ("isic", "train", "export", "infer", "benchmarks")


def calls(path: Path) -> set[str]:
    """The attributes of modules that a file calls, such as `pl.read_csv`."""
    nodes = (
        node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
    )
    return {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}


def test_one_module_opens_tables_and_one_reads_yaml() -> None:
    owners = {"pl.read_": "tables.py", "pl.scan_": "tables.py", "yaml.safe_load": "yaml12.py"}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for prefix, owner in owners.items():
                found = [call for call in calls(path) if call.startswith(prefix)]
                assert not found or path.name == owner, f"{path} calls {found}"


@pytest.mark.parametrize("name", ["data [2]", "a*b", "what?", "{a,b}", "50%", "~x", "#1", "k=v"])
def test_a_path_is_no_pattern(tmp_path: Path, name: str) -> None:
    """Next to each folder is one that its name would match as a pattern, with another table."""
    decoy = name.replace("[2]", "2").replace("*", "XX").replace("?", "X")
    for folder, value in ((decoy, "decoy"), (name, "right")):
        table = pl.DataFrame({"isic_id": [value]})
        (tmp_path / folder).mkdir(exist_ok=True)
        table.write_csv(tmp_path / folder / "t.csv")
        table.write_parquet(tmp_path / folder / "t.parquet", metadata={"who": value})
    csv, parquet = (tmp_path / name / file for file in ("t.csv", "t.parquet"))
    found = [read_csv(csv), read_parquet(parquet), scan_parquet([parquet]).collect()]
    found += [read_metadata(csv), read_metadata(parquet), read_parquet(parquet, ["isic_id"])]
    assert all(table["isic_id"].to_list() == ["right"] for table in found)
    assert read_ids(csv).to_list() == read_ids(parquet).to_list() == ["right"]
    assert parquet_metadata(parquet)["who"] == "right"


CONTENTS = {
    "gzip": (
        gzip.compress(b"isic_id,target\na,1\n"),
        "is compressed with gzip; decompress it first",
    ),
    "zstd": (b"\x28\xb5\x2f\xfd\x04\x00", "is compressed with zstd"),
    "xz": (b"\xfd7zXZ\x00\x00", "is compressed with xz"),
    "bzip2": (b"BZh91AY&SY", "is compressed with bzip2"),
    "zip": (b"PK\x03\x04\x14", "is a ZIP archive or an Excel workbook"),
    "utf-16": ("isic_id,target\na,1\n".encode("utf-16"), "is text in UTF-16"),
    "html": (b"\n<!DOCTYPE html><html>404</html>", "is a web page"),
    "json": (b'{"code":403,"message":"Permission denied"}', "is JSON"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer"),
    "hdf5": (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
    "empty": (b"", "is empty"),
}


@pytest.mark.parametrize("content", CONTENTS)
def test_what_is_no_table_is_named(tmp_path: Path, content: str) -> None:
    data, words = CONTENTS[content]
    for name in ("t.csv", "t.parquet"):
        path = tmp_path / name
        path.write_bytes(data)
        for read in (read_metadata, read_ids):
            with pytest.raises(UserError, match=words) as raised:
                read(path)
            assert "truncated" not in str(raised.value)
            assert "damaged" not in str(raised.value)


def test_a_packed_table_beside_the_wanted_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"isic_id\na\n"))
    with pytest.raises(UserError, match=r"no such file: .*t\.csv; decompress t\.csv\.gz first"):
        read_metadata(tmp_path / "t.csv")


def test_a_name_that_ends_otherwise_than_the_content(tmp_path: Path) -> None:
    small_table().write_parquet(tmp_path / "t.csv")
    with pytest.raises(UserError, match="is a Parquet file; give it a name"):
        read_metadata(tmp_path / "t.csv")
    small_table().write_csv(tmp_path / "t.parquet")
    with pytest.raises(UserError, match="is not a Parquet file"):
        read_metadata(tmp_path / "t.parquet")


def test_what_cannot_be_opened_is_not_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "t.csv").mkdir()
    with pytest.raises(UserError, match="is a folder; a file is expected there"):
        read_metadata(tmp_path / "t.csv")
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    with pytest.raises(UserError, match="symbolic links"):
        read_csv(tmp_path / "loop.csv")
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(UserError, match="is not a regular file"):
        read_csv(tmp_path / "pipe.csv")
    with pytest.raises(UserError, match=r"cannot read t \(Permission denied\)"), reading("t"):
        raise PermissionError(13, "Permission denied")


def test_half_a_parquet_file_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    small_table().write_parquet(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is damaged: it does not end as a Parquet file does"):
        read_metadata(path)
    path.write_bytes(whole[:-8] + b"\xff\xff\xff\x7fPAR1")
    with pytest.raises(UserError, match="is not a readable table"):
        read_metadata(path)


QUOTED = b'isic_id,target,sex,attribution\na,0,male,"Clinic, A"\nb,1,female,"Clinic ""B"""\n'


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("block", [5, tables.CSV_BLOCK])
def test_a_csv_cut_anywhere_in_a_row_is_noticed(
    tmp_path: Path,
    line_end: bytes,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the last value the rest may look whole; then there is a warning."""
    monkeypatch.setattr(tables, "CSV_BLOCK", block)
    monkeypatch.setattr(tables, "LONGEST_ROW", 1000)
    data = QUOTED.replace(b"\n", line_end)
    path = tmp_path / "t.csv"
    path.write_bytes(data)
    assert read_ids(path).to_list() == read_metadata(path)["isic_id"].to_list() == ["a", "b"]
    assert not capsys.readouterr().err
    last_row = data.index(b"b,1")
    for end in range(last_row + 1, len(data) - len(line_end) + 1):
        for read in (read_metadata, read_ids):
            path = tmp_path / f"{end}_{read.__name__}.csv"
            path.write_bytes(data[:end])
            try:
                read(path)
            except UserError as error:
                assert "truncated" in str(error)
            else:
                assert end > data.rindex(b",")
                assert "no line break at its end" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"isic_id,target,sex\na,0\nb,1,male\n", "line 2 has 2 fields, the header has 3"),
        (b"isic_id,target\na,0\n\nb,1\n", "line 3 is blank"),
        (b"isic_id,target\na,0\n\0\0\0\0\0\0", "line 3 holds zero bytes"),
        (b"isic_id,target\nb,1\n\xe9,0\n", "line 3 is not text in UTF-8"),
        (b"isic_id;target\na;0\n", "separates its columns by semicolons"),
        (b"isic_id\ttarget\na\t0\n", "separates its columns by tabs"),
        (b"isic_id,target\ra,0\rb,1\r", "as on old Macs"),
        (b"isic_id,target,target\na,0,1\n", 'has two columns "target"'),
        (b"isic_id,target,x, x\na,0,1,2\n", 'has two columns "x"'),
        (b'isic_id,target,x\na,0,5" wide\nb,1,6" wide\n', "line 2 has a quote inside a field"),
        (b"isic_id,target,Patient ID\na,0,p\n", 'column "Patient ID"; rename it to patient_id'),
        (b"isic_id,target\na.JPG,0\n", "is a file name; remove the extension"),
        (b'isic_id,target,tbp_lv_A\na,0,"1,5"\n', "write 1.5, not 1,5"),
        (b"isic_id,target," + b"x" * 200_000 + b"\na,0,1\n", "header that is no row of a CSV"),
        (b'isic_id,"tar\rget"\rx,b\na,0,1\n', "header that is no row of a CSV"),
    ],
)
def test_a_malformed_csv_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(data)
    with pytest.raises(UserError, match=words) as raised:
        read_metadata(path)
    assert "\n" not in str(raised.value)


def test_marks_and_spaces_that_programs_add_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    plain = b"isic_id,target,patient_id,sex\na,0,p,male\nb,1,p,\n"
    path.write_bytes(plain)
    wanted = read_metadata(path)
    header = b"\xef\xbb\xbf\r\nisic_id , target,\tpatient_id,sex\r\n"
    odd = header + b"a ,0, p,male\r\n b,1,p\xc2\xa0,  \r\n"
    path.write_bytes(odd)
    assert read_metadata(path).equals(wanted)
    assert read_ids(path).equals(wanted["isic_id"])
    assert read_column(path, "target") is not None
    assert read_column(path, "none") is None


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize(
    "text", ["nan", "NaN", "None", "NULL", "N/A", "<NA>", "NaT", " ", "-", "?"]
)
def test_a_text_that_means_no_value_is_no_value(tmp_path: Path, text: str, ending: str) -> None:
    names = ("patient_id", "sex", "iddx_1", "age_approx", "tbp_lv_A")
    table = pl.DataFrame({"isic_id": ["a", "b"], "target": [0, 1]})
    table = table.with_columns(
        *(pl.Series(name, [text, "55"]) for name in names), other=pl.lit(text)
    )
    path = tmp_path / f"t.{ending}"
    (table.write_csv if ending == "csv" else table.write_parquet)(path)
    read = read_metadata(path)
    assert all(read[name].is_null().to_list() == [True, False] for name in names)
    assert read["other"][0] == text, "an unknown column is kept as it is"
    table.with_columns(isic_id=pl.Series([text, "b"])).write_csv(tmp_path / "t.csv")
    for refused in (read_metadata, read_ids):
        with pytest.raises(UserError, match="1 rows have no isic_id"):
            refused(tmp_path / "t.csv")


def test_unknown_is_a_site_but_no_patient(tmp_path: Path) -> None:
    columns = {"isic_id": ["a", "b"], "patient_id": ["Unknown", "p"], "tbp_lv_location": "Unknown"}
    pl.DataFrame(columns).write_csv(tmp_path / "t.csv")
    table = read_metadata(tmp_path / "t.csv")
    assert table["patient_id"].to_list() == [None, "p"]
    assert table["tbp_lv_location"][0] == "Unknown"


def test_types_that_parquet_has_and_csv_has_not(tmp_path: Path) -> None:
    """A number in a dictionary column would be its place in the dictionary, not itself."""
    path = tmp_path / "t.parquet"
    columns = {
        "isic_id": pl.Series([b"a", b"b"]),
        "age_approx": pl.Series(["70", "55"], dtype=pl.Categorical),
        "patient_id": pl.Series([7.0, None]),
        "target": pl.Series([True, False]),
        "sex": pl.Series([None, None]),
    }
    pl.DataFrame(columns).write_parquet(path)
    table = read_metadata(path)
    assert table["age_approx"].to_list() == [70, 55]
    assert table["isic_id"].to_list() == ["a", "b"]
    assert table["patient_id"].to_list() == ["7", None]
    assert table["target"].to_list() == [1, 0]
    pl.DataFrame({"isic_id": "a", "tbp_lv_A": [[1.0]]}).write_parquet(path)
    with pytest.raises(UserError, match="column tbp_lv_A must hold numbers, not List"):
        read_metadata(path)


def test_names_that_differ_only_in_case_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = {"isic_id": ["a", "b", "c"], "patient_id": ["IP_1a", "ip_1A", None]}
    pl.DataFrame(columns).write_csv(tmp_path / "t.csv")
    read_metadata(tmp_path / "t.csv")
    said = capsys.readouterr().err
    assert said.startswith("warning: ")
    assert '"IP_1a" and "ip_1A"; they count as different' in said


def test_of_two_tables_of_a_split_the_one_that_is_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_table(60).write_csv(tmp_path / "train-metadata.csv")
    small_table(30).write_parquet(tmp_path / "train-metadata.parquet")
    for _ in range(2):
        assert len(Dataset(tmp_path).metadata("train")) == 30
    said = capsys.readouterr().err
    assert (
        said.count("train-metadata.parquet and train-metadata.csv; train-metadata.parquet is read")
        == 1
    )


def test_check_of_a_folder_with_brackets_reads_that_folder(tmp_path: Path, cli: Cli) -> None:
    for name, rows in (("data [2]", 60), ("data 2", 30)):
        (tmp_path / name).mkdir()
        small_table(rows).write_csv(tmp_path / name / "train-metadata.csv")
    ended = cli("isic", "check", "--data", tmp_path / "data [2]")
    assert ended.code == 0
    assert "rows             60" in ended.out
