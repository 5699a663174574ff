"""Own features as SQL: their values, and the definitions that are refused."""

import math
from pathlib import Path

import polars as pl
import pytest

from isic import schema
from isic.features import compute
from isic.features.definitions import (
    check_definitions,
    columns_of_definitions,
    compute_definitions,
    parse_definitions,
    relative_to_others,
)
from isic.features.relative import FORMS
from isic.runtime.config import CONFIG_DIR, read_yaml
from isic.runtime.errors import UserError

VALUES = {
    "redness": {"expr": "tbp_lv_deltaA / tbp_lv_deltaL", "relative": ["patient_z"]},
    "hue": {"expr": "tbp_lv_H", "relative": list(FORMS)},
    "place": "CONCAT(sex, '_', anatom_site_general)",
    "large": "clin_size_long_diam_mm > 6",
    "redder": "redness_patient_z * tbp_lv_H_patient_z",
    "shape": "lesion_shape_index / 2",
}


def computed(table: pl.DataFrame, values: dict[str, object]) -> pl.DataFrame:
    definitions = parse_definitions(values, "mine.yaml")
    check_definitions(definitions, table)
    names = [name for definition in definitions for name in definition.names]
    return compute_definitions(definitions, table, names)


def test_values_are_those_of_polars(table: pl.DataFrame) -> None:
    own = computed(table, VALUES)
    assert set(own.dtypes) == {pl.Float32, pl.String}
    ratio = table.select(pl.col("tbp_lv_deltaA") / pl.col("tbp_lv_deltaL")).to_series()
    assert own["redness"].equals(ratio.cast(pl.Float32).alias("redness"))
    assert own["large"].sum() == (table["clin_size_long_diam_mm"] > 6).sum()
    assert own["place"][0] == f"{table['sex'][0]}_{table['anatom_site_general'][0]}"
    built_in = compute(table, ["lesion_shape_index", "tbp_lv_H_patient_z"])
    assert own["shape"].to_list() == (built_in["lesion_shape_index"] / 2).to_list()
    product = own["redness_patient_z"] * built_in["tbp_lv_H_patient_z"]
    for found, expected in zip(own["redder"], product, strict=True):
        assert math.isclose(found, expected, rel_tol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_relative_forms_are_those_of_the_built_in_features(table: pl.DataFrame, form: str) -> None:
    name = "clin_size_long_diam_mm"
    own = computed(table, {"mine": {"expr": name, "relative": [form]}})
    built_in = compute(table, [f"{name}_{form}"])[f"{name}_{form}"]
    assert own[f"mine_{form}"].to_list() == built_in.to_list()


def test_the_order_of_rows_does_not_matter(table: pl.DataFrame) -> None:
    own = computed(table, VALUES).insert_column(0, table[schema.ID])
    shuffled = table.sample(fraction=1, shuffle=True, seed=2)
    again = computed(shuffled, VALUES).insert_column(0, shuffled[schema.ID])
    assert again.sort(schema.ID).equals(own.sort(schema.ID))


def test_an_infinite_value_is_blank_and_does_not_blank_others(table: pl.DataFrame) -> None:
    zero = table.with_columns(tbp_lv_L=pl.when(pl.int_range(pl.len()) == 0).then(0.0).otherwise(5))
    own = computed(zero, {"x": {"expr": "tbp_lv_H / tbp_lv_L", "relative": ["patient_z"]}})
    assert own["x"].null_count() == own["x_patient_z"].null_count() == 1


def test_a_value_of_a_patients_lesions_is_known_as_relative() -> None:
    definitions = parse_definitions(VALUES, "mine.yaml")
    assert relative_to_others(definitions, ["redness_patient_z"])
    assert relative_to_others(definitions, ["redder"])
    assert not relative_to_others(definitions, ["redness", "large", "shape", "place"])
    assert relative_to_others(parse_definitions({"x": "tbp_lv_H_patient_rank"}, "f"), ["x"])


def test_only_the_columns_of_requested_features_are_needed() -> None:
    definitions = parse_definitions(VALUES, "mine.yaml")
    assert columns_of_definitions(definitions, ["large"]) == ("clin_size_long_diam_mm",)
    needed = {"tbp_lv_deltaA", "tbp_lv_deltaL", "tbp_lv_H", schema.PATIENT}
    assert set(columns_of_definitions(definitions, ["redder"])) == needed


def test_columns_beyond_the_schema_can_be_read(table: pl.DataFrame) -> None:
    more = table.with_columns(clinic=pl.lit("12"))
    own = computed(more, {"room": "CAST(clinic AS DOUBLE)"})
    assert own["room"].to_list() == [12.0] * len(table)


OTHER_ROWS = (
    "AVG(tbp_lv_H)",
    "tbp_lv_H - AVG(tbp_lv_H)",
    "tbp_lv_H - AVG(tbp_lv_H) OVER (PARTITION BY sex)",
    "tbp_lv_H / COUNT(*)",
    "tbp_lv_H - MAX(age_approx)",
    "LAG(tbp_lv_H) OVER (ORDER BY tbp_lv_A)",
    "RANK() OVER (ORDER BY tbp_lv_A)",
    "CASE WHEN COUNT(*) > 100 THEN tbp_lv_H ELSE 0 END",
    "FIRST(tbp_lv_H)",
    # Only in rows that the training table may lack.
    "COALESCE(tbp_lv_H, AVG(tbp_lv_H))",
    "CASE WHEN MAX(tbp_lv_H) < 0 THEN 100 ELSE tbp_lv_H END",
    "CASE WHEN tbp_lv_H > 1000 THEN tbp_lv_H / AVG(tbp_lv_H) ELSE 0 END",
    "CASE WHEN COUNT(*) > 1000000 THEN 0 ELSE tbp_lv_H END",
)
"""Expressions that look beyond their row."""


@pytest.mark.parametrize("text", OTHER_ROWS)
def test_a_definition_that_depends_on_other_rows_is_refused(table: pl.DataFrame, text: str) -> None:
    with pytest.raises(UserError, match=r"the definition of x .* depends on other rows"):
        computed(table, {"x": text})


@pytest.mark.parametrize("clock", ["NOW()", "CURRENT_DATE", "current_timestamp"])
def test_a_definition_that_reads_the_clock_is_refused(clock: str) -> None:
    with pytest.raises(UserError, match="reads the clock"):
        parse_definitions({"age": f"EXTRACT(YEAR FROM {clock}) - age_approx"}, "mine.yaml")
    assert parse_definitions({"x": "CASE WHEN clinic = 'now' THEN 1 ELSE 0 END"}, "mine.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("zero / zero > 5", 1),
        ("CASE WHEN tbp_lv_H / zero > 2 THEN 10 ELSE 1 END", 10),
        ("SQRT(zero - 1) > 1", 1),
        ("LN(zero) < 3", 1),
        ("1 / (1 + tbp_lv_H / zero)", 0),
    ],
)
def test_a_division_by_zero_within_an_expression_is_warned_of(
    table: pl.DataFrame, text: str, expected: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """It counts as greater than any number; with NULLIF it is blank."""
    rows = table.with_columns(zero=pl.lit(0))
    own = computed(rows, {"x": text})
    assert own["x"].unique().to_list() == [expected]
    assert f"in {len(rows)} rows whose result is not blank" in capsys.readouterr().err
    right = {
        "y": "tbp_lv_H / zero",
        "z": "tbp_lv_H / NULLIF(zero, 0) > 5",
        "u": "CASE WHEN zero = 0 THEN -1 WHEN zero > 5 THEN 7 ELSE tbp_lv_H / zero END",
        "v": "IF(zero > 0, LN(zero), 0)",
    }
    computed(rows, right)
    assert not capsys.readouterr().err


def test_a_function_of_a_case_is_no_case(
    table: pl.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = table.with_columns(zero=pl.lit(0))
    text = "REPLACE(CASE WHEN tbp_lv_H / zero > 5 THEN 'x' ELSE 'y' END, 'x', 'z')"
    assert computed(rows, {"x": text})["x"].unique().to_list() == ["z"]
    assert f"in {len(rows)} rows whose result is not blank" in capsys.readouterr().err


def test_integers_do_not_wrap_around(table: pl.DataFrame) -> None:
    rows = table.with_columns(
        small=pl.lit(2, pl.UInt8), five=pl.lit(5, pl.UInt8), signed=pl.lit(100, pl.Int8)
    )
    values = {"less": "small - five", "more": "signed * 30", "power": "POW(five, 40)"}
    own = computed(rows, values).unique()
    assert own.row(0) == (-3, 3000, pytest.approx(5.0**40))


def test_numbers_that_are_equal_in_32_bits_are_warned_of(
    table: pl.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = pl.int_range(len(table)) + 1_600_000_000
    computed(table.with_columns(seconds=seconds), {"x": "seconds"})
    assert f'("seconds") has {len(table)} different numbers' in capsys.readouterr().err
    computed(table.with_columns(seconds=seconds), {"x": "seconds - 1600000000", "y": "tbp_lv_H"})
    assert not capsys.readouterr().err


def test_a_missing_number_of_an_own_column_is_blank(table: pl.DataFrame) -> None:
    rows = table.with_columns(mine=pl.lit(math.nan))
    own = computed(rows, {"x": "mine > 3", "y": "COALESCE(mine, 7)"})
    assert own["x"].null_count() == len(rows)
    assert own["y"].unique().to_list() == [7]


def test_a_definition_gives_what_it_gave_at_the_fit(table: pl.DataFrame) -> None:
    definitions = parse_definitions(
        {"room": {"expr": "clinic", "relative": ["patient_rank"]}}, "mine.yaml"
    )

    def again(clinic: object, text: tuple[str, ...]) -> pl.DataFrame:
        rows = table.with_columns(clinic=pl.lit(clinic))
        names = ["room"] if text else ["room", "room_patient_rank"]
        return compute_definitions(definitions[:1], rows, names, text)

    assert again("12", ())["room"].unique().to_list() == [12.0]
    assert again("True", ())["room"].unique().to_list() == [1.0]
    rows = table.with_columns(clinic=pl.lit("12"))
    alone = compute_definitions(definitions, rows, ["room_patient_rank"], ())
    assert alone["room_patient_rank"].n_unique() > 1
    with pytest.raises(UserError, match='gives text such as "a", but gave numbers at the fit'):
        again("a", ())
    with pytest.raises(UserError, match="gives numbers, but gave text at the fit"):
        again(12, ("room",))
    for blank in (pl.Series([None], dtype=pl.Float64)[0], None):
        assert again(blank, ("room",))["room"].null_count() == len(table)


TRAIN_ONLY = "exists only in the training table"


@pytest.mark.parametrize("column", [*schema.TRAIN_ONLY, "Iddx_full", "TARGET"])
@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '"{}"',
        "tbp_lv_H + CASE WHEN {} IS NULL THEN 1 ELSE 0 END",
        "tbp_lv_H + AVG({}) OVER (PARTITION BY sex)",
        "COALESCE(sex, CAST({} AS VARCHAR))",
    ],
)
def test_a_definition_that_reads_a_column_of_training_is_refused(text: str, column: str) -> None:
    with pytest.raises(UserError, match=rf"reads {column}, which {TRAIN_ONLY}"):
        parse_definitions({"x": text.format(column)}, "mine.yaml")


@pytest.mark.parametrize(
    "text", ["COLUMNS('target')", "tbp_lv_H + COLUMNS('target')", '"^tar.*$"', "(SELECT target)"]
)
def test_a_pattern_cannot_reach_the_target(table: pl.DataFrame, text: str) -> None:
    assert schema.TARGET in table.columns
    with pytest.raises(UserError, match=r"by its name|by a pattern|not an SQL expression"):
        computed(table, {"x": text})


BAD: tuple[tuple[dict[str, object], str], ...] = (
    ({"x": "tbp_lv_Q"}, r'unknown column "tbp_lv_Q", did you mean "tbp_lv_'),
    ({"x": "t.target"}, 'unknown column "t"'),
    ({"x": "y", "y": "tbp_lv_H"}, 'unknown column "y"'),
    ({"x": "tbp_lv_H +"}, r"not an SQL expression of polars \(unable to parse"),
    ({"x": "nonsense(tbp_lv_H)"}, "unsupported function 'nonsense'"),
    ({"x": "sex + 1"}, "cannot be computed"),
    ({"x": "CAST(sex AS DOUBLE)"}, "cannot be computed"),
    ({"x": "STRING_TO_ARRAY(sex, 'a')"}, r"values of the type List\(String\)"),
    ({"x": "CASE WHEN sex = 'male' THEN DATE '2020-01-01' END"}, "values of the type Date"),
    ({"x": "1.5"}, "reads no column"),
    ({"x": "patient_id"}, "reads patient_id, which names rows"),
    ({"x": 3}, "x needs an expression as text"),
    ({"x": {"relative": ["patient_z"]}}, "x needs an expression as text"),
    ({"x": {"expr": "sex", "with": 1}}, 'x has a key "with"'),
    ({"x": {"expr": "tbp_lv_H", "relative": ["patient_zz"]}}, 'did you mean "patient_z"'),
    ({"x": {"expr": "tbp_lv_H", "relative": [{"a": 1}]}}, "no relative form"),
    ({"x": {"expr": "sex", "relative": ["patient_z"]}}, "gives text, which has no relative forms"),
    ({"my x": "tbp_lv_H"}, "is no name of a feature"),
    ({"my_column": "tbp_lv_H"}, "the table has a column my_column"),
)


@pytest.mark.parametrize(("values", "message"), BAD)
def test_bad_definitions_are_refused(
    table: pl.DataFrame, values: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        computed(table.with_columns(my_column=1), values)


def test_a_definition_is_written_as_it_was_read() -> None:
    definitions = parse_definitions(VALUES, "mine.yaml")
    assert {each.name: each.to_json() for each in definitions} == VALUES


@pytest.mark.parametrize(
    "path", sorted((CONFIG_DIR / "features").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_file_of_definitions_is_valid(path: Path, table: pl.DataFrame) -> None:
    own = computed(table, read_yaml(path))
    assert own.width > 20
    blank = [column.name for column in own if column.null_count() > len(own) / 2]
    assert not blank
