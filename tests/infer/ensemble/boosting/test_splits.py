"""Several fold plans: their scores on disk, comparisons, blends, and refusals."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from infer.ensemble.artifact import SPLITS_FILE
from infer.ensemble.blends.artifact import open_scorer
from infer.ensemble.blends.write import choose_weights, write_blend
from infer.ensemble.boosting.splits import paired_by_fold, read_plans
from infer.ensemble.scoring.compare import compare_sides, notes
from infer.ensemble.scoring.comparison import patient_draws
from infer.ensemble.settings import BlendSettings
from isic.folds import draw_folds
from isic.layout import TRAINED_ON_FILE, fold_dir
from isic.metrics import pauc
from isic.provenance import seen_rows, write_seen
from isic.runtime.errors import UserError
from tests.support.commands import Cli
from tests.support.ensembles import (
    fit_small,
    read_blend,
    read_files,
    train_table,
    write_dataset,
    write_embeddings,
    write_train,
)

NUMBERS = {"features": "numeric", "seeds": 2, "num_rounds": 8}


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ensembles over three fold plans, and over one."""
    root = tmp_path_factory.mktemp("splits")
    fit_small(data, root, **NUMBERS, name="good", splits=3)
    fit_small(data, root, features="tbp_lv_x", seeds=2, num_rounds=8, name="poor", splits=3)
    fit_small(data, root, **NUMBERS, name="two", splits=2)
    fit_small(data, root, **NUMBERS, name="one")
    return root


def test_each_plan_scores_every_row_out_of_its_own_folds(folder: Path, data: Path) -> None:
    plans = read_plans(folder / "good")
    assert list(plans) == [42, 43, 44]
    table = train_table(data).sort("isic_id")
    for split_seed, plan in plans.items():
        expected = draw_folds(table, 3, split_seed).of(table)
        assert plan.fold.tolist() == expected.to_list()
    # The scores of a plan are those of a fit with that split seed.
    alone = fit_small(data, folder / "alone", **NUMBERS, split_seed=44)
    oof = pl.read_parquet(alone / "oof.parquet")
    for seed in range(2):
        np.testing.assert_array_equal(plans[44].seeds[seed], oof[f"lightgbm_seed_{seed}"])
    np.testing.assert_array_equal(plans[44].blend, oof["blend"])


def test_the_first_plan_is_the_ensemble_without_splits(folder: Path) -> None:
    several = read_files(folder / "good")
    one = read_files(folder / "one")
    same = one.keys() - {"ensemble.json", "scores.json"}
    assert {name: several[name] for name in same} == {name: one[name] for name in same}
    assert several.keys() - one.keys() == {SPLITS_FILE}
    first = read_plans(folder / "good")[42]
    oof = pl.read_parquet(folder / "one" / "oof.parquet")
    np.testing.assert_array_equal(first.blend, oof["blend"])
    assert not read_plans(folder / "one")


def test_the_mean_and_spread_over_plans_are_stored_and_printed(
    folder: Path, data: Path, cli: Cli
) -> None:
    target = train_table(data).sort("isic_id")["target"]
    summary = read_blend(folder / "good")
    values = [pauc(target, plan.blend) for plan in read_plans(folder / "good").values()]
    assert list(summary["pauc_by_split"].values()) == values
    assert summary["pauc_by_split"]["42"] == summary["pauc"]
    assert summary["pauc_mean_of_splits"] == pytest.approx(np.mean(values))
    assert summary["pauc_std_of_splits"] == pytest.approx(np.std(values, ddof=1))
    manifest = json.loads((folder / "good" / "ensemble.json").read_text())
    assert manifest["scores"] == summary
    assert manifest["settings"]["splits"] == 3
    ended = cli("infer", "scores", "--output_dir", folder)
    mean = f"good: pAUC {np.mean(values):.4f} ± {np.std(values, ddof=1):.4f} over 3 fold plans"
    assert mean in ended.out
    assert "one: pAUC" not in ended.out


def test_another_number_of_plans_is_another_ensemble(data: Path, tmp_path: Path) -> None:
    root = fit_small(data, tmp_path, **NUMBERS, splits=2)
    with pytest.raises(UserError, match=r"settings\.splits = 2, now it is None"):
        fit_small(data, tmp_path, **NUMBERS)
    fit_small(data, tmp_path, **NUMBERS, force=True)
    assert not (root / SPLITS_FILE).exists()


def test_features_of_fold_models_and_fixed_plans_are_refused(
    data: Path, embeddings: Path, tmp_path: Path
) -> None:
    chosen = {"splits": 2, "num_rounds": 2, "num_folds": None}
    for features in ("image", "multimodal", "raw,image"):
        with pytest.raises(UserError, match="of fold models can be out of fold in one fold"):
            fit_small(data, tmp_path / "out", features=features, embeddings=embeddings, **chosen)
    pinned = write_train(tmp_path / "pinned", train_table(data))
    draw_folds(train_table(data), 3, 7).write(pinned / "folds.parquet")
    with pytest.raises(UserError, match=r"pinned/folds\.parquet is the only fold plan of this fit"):
        fit_small(pinned, tmp_path / "out", features="raw", **chosen)
    assert not (tmp_path / "out").exists()


def test_an_oof_table_belongs_to_one_plan(data: Path, tmp_path: Path) -> None:
    table = train_table(data)
    fold = draw_folds(table, 3, 42).of(table)
    path = tmp_path / "mine.parquet"
    table.select("isic_id", fold, known=pl.col("target") * 0.5).write_parquet(path)
    chosen = {"features": "sex,mine", "num_rounds": 2, "splits": 2}
    with pytest.raises(UserError, match="an oof table can be out of fold in one fold plan only"):
        fit_small(data, tmp_path / "out", **chosen, tables=f"oof:{path}")
    table.select("isic_id", other=pl.lit(1.0)).write_parquet(path)
    root = fit_small(data, tmp_path / "out", **chosen, tables=f"label_free:{path}")
    assert list(read_plans(root)) == [42, 43]


def test_a_selection_has_one_plan(data: Path, cli: Cli) -> None:
    ended = cli("infer", "select", "--data", data, "--splits", 3)
    assert ended.code == 2
    assert "--splits is not a key of `infer select`" in ended.err


def test_frozen_columns_are_fitted_over_several_plans(data: Path, tmp_path: Path) -> None:
    table = train_table(data)
    frozen = write_embeddings(tmp_path / "frozen", data, draw_folds(table, 3, 42))
    run = json.loads((frozen / "train" / "run.json").read_text())
    everywhere = {"folds": [0], "folds_mode": "all", "num_features": 4}
    (frozen / "train" / "run.json").write_text(json.dumps({**run, **everywhere}))
    others = table.with_columns(pl.col("isic_id", "patient_id") + "_other")
    write_seen(fold_dir(frozen / "train", 0) / TRAINED_ON_FILE, seen_rows(others))
    write_every_row(frozen, table)
    root = fit_small(
        data, tmp_path, features="tbp_lv_H,frozen", frozen=frozen, num_rounds=4, splits=2
    )
    assert list(read_plans(root)) == [42, 43]


def write_every_row(frozen: Path, table: pl.DataFrame) -> None:
    """Replace the shard of fold 0 by embeddings of every row."""
    from infer.embedding.store import shard_path, write_shard

    features = np.random.default_rng(0).standard_normal((len(table), 4)).astype(np.float16)
    logits = np.zeros(len(table), np.float32)
    write_shard(shard_path(frozen, "train", 0, 0), table["isic_id"].to_list(), features, logits)


def test_compare_tests_the_folds_of_the_plans_that_both_have(
    folder: Path, data: Path, cli: Cli
) -> None:
    flags = ["--data", data, "--draws", 100]
    ended = cli("infer", "compare", folder / "poor", folder / "good", *flags)
    assert ended.code == 0, ended.err
    assert re.search(r"\nfolds .* better in \d of 9\n", ended.out)
    assert "note: folds of the 3 fold plans that both have (poor 3, good 3)" in ended.out
    ended = cli("infer", "compare", folder / "good", folder / "good", *flags)
    assert "p = 1, better in 0 of 9" in ended.out
    assert ended.out.endswith("second against first: noise\n")


def test_a_clear_difference_is_found_over_plans(tmp_path: Path, cli: Cli) -> None:
    tables = write_dataset(tmp_path / "tables", num_train=1200, num_positives=120)
    chosen = {"num_rounds": 20, "splits": 3, "num_folds": 5}
    fit_small(tables, tmp_path, features="tbp_lv_x", name="poor", **chosen)
    fit_small(tables, tmp_path, features="numeric,patient_z", name="good", **chosen)
    flags = ["--data", tables, "--draws", 100]
    ended = cli("infer", "compare", tmp_path / "poor", tmp_path / "good", *flags)
    assert "of 15\n" in ended.out
    assert ended.out.endswith("second against first: a difference\n")


def test_too_few_shared_plans_compare_the_seeds_of_the_first(
    folder: Path, data: Path, cli: Cli
) -> None:
    flags = ["--data", data, "--draws", 100]
    for other, plans in (("one", 1), ("two", 2)):
        ended = cli("infer", "compare", folder / "poor", folder / other, *flags)
        assert ended.code == 0, ended.err
        assert re.search(r"\nseeds .* better in \d of 2\n", ended.out)
        note = f"that both have (poor 3, {other} {plans}); fit both with equal --splits"
        assert note in ended.out
    sides = [open_scorer(folder / name) for name in ("good", "one", "poor", "two")]
    assert notes(sides[:2], sides[2:]) == [
        "note: of several ensembles per side, only the first fold plans are compared"
    ]


def test_a_folds_pair_is_the_mean_over_seeds(folder: Path, data: Path) -> None:
    target = train_table(data).sort("isic_id")["target"].to_numpy()
    first, second = (read_plans(folder / name) for name in ("poor", "good"))
    fits = paired_by_fold(target, [(first[43], second[43])])
    rows = first[43].fold == 1
    expected = [
        np.mean([pauc(target[rows], score[rows]) for score in plan[43].seeds.values()])
        for plan in (first, second)
    ]
    assert fits.shape == (3, 2)
    np.testing.assert_allclose(fits[1], expected)
    only = np.where(first[43].fold == 1, 0, target)
    assert len(paired_by_fold(only, [(first[43], second[43])])) == 2
    # A blend of members without a common seed.
    seedless = replace(second[43], seeds={})
    pauc_of_blend = pauc(target[rows], second[43].blend[rows])
    assert paired_by_fold(target, [(first[43], seedless)])[1, 1] == pauc_of_blend


def test_the_patients_are_drawn_for_all_plans(folder: Path, data: Path) -> None:
    scorers = [open_scorer(folder / name) for name in ("poor", "good")]
    found = compare_sides(scorers[:1], scorers[1:], data, 100)
    assert found.overlap == 0.5
    rows = train_table(data).sort("isic_id")
    sides = [[plan.blend for plan in read_plans(scorer.root).values()] for scorer in scorers]
    expected = patient_draws(rows["target"], *sides, rows["patient_id"], 100)
    np.testing.assert_allclose(found.draws, expected)


def blend(folder: Path, data: Path, *names: str, **more: object) -> Path:
    given = {"ensembles": tuple(folder / name for name in names), "output_dir": folder}
    return write_blend(BlendSettings.model_validate({**given, "data": data, "force": True} | more))


@pytest.mark.parametrize("weights", ["equal", "search"])
def test_a_blend_has_the_plans_and_seeds_of_all_members(
    folder: Path, data: Path, weights: str, cli: Cli
) -> None:
    root = blend(folder, data, "poor", "good", weights=weights, name=f"blend_{weights}")
    plans = read_plans(root)
    oof = pl.read_parquet(root / "oof.parquet")
    assert list(plans) == [42, 43, 44]
    np.testing.assert_array_equal(plans[42].blend, oof["blend"])
    members = {name: read_plans(folder / name)[44] for name in ("poor", "good")}
    scores = {name: plan.blend for name, plan in members.items()}
    target = oof["target"].to_numpy()
    _, by_fold = choose_weights(weights, scores, target, plans[44].fold)
    expected = np.zeros(len(oof))
    for k, of_fold in by_fold.items():
        for name, weight in of_fold.items():
            rank = (pl.Series(scores[name]).rank("average") - 0.5) / len(oof)
            expected += (plans[44].fold == k) * weight * rank.to_numpy()
    np.testing.assert_allclose(plans[44].blend, expected, atol=1e-12)
    assert list(plans[44].seeds) == [0, 1]
    ended = cli("infer", "compare", folder / "poor", root, "--data", data, "--draws", 100)
    assert "of 9\n" in ended.out


def test_a_blend_of_members_with_other_plans_and_seeds_says_so(
    folder: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = blend(folder, data, "good", "one", name="unequal")
    shown = capsys.readouterr().out
    assert "members have different fold plans (good 3, one 1)" in shown
    assert not (root / SPLITS_FILE).exists()
    fit_small(data, folder / "more", **{**NUMBERS, "seeds": 3}, name="three")
    blend(folder, data, "one", "more/three", name="seeds")
    shown = capsys.readouterr().out
    assert "members have different numbers of seeds (one 2, three 3)" in shown
    assert "fold plans" not in shown


def test_other_numbers_of_seeds_are_noted_by_compare(
    folder: Path, data: Path, embeddings: Path
) -> None:
    three = fit_small(data, folder / "seeds", **{**NUMBERS, "seeds": 3}, name="three")
    image = fit_small(data, folder / "seeds", features="image", embeddings=embeddings)
    one, more, none = (open_scorer(path) for path in (folder / "one", three, image))
    (note,) = notes([one], [more])
    assert "the numbers of seeds differ (one 2, three 3)" in note
    assert not notes([one], [none])
    assert not notes([one], [one])


def test_the_report_lists_the_plans(folder: Path, data: Path, cli: Cli) -> None:
    ended = cli("infer", "report", "--ensemble", folder / "good", "--data", data)
    assert ended.code == 0, ended.err
    page = (folder / "good" / "report.html").read_text()
    summary = read_blend(folder / "good")
    assert f'<th scope="row">43</th><td>{summary["pauc_by_split"]["43"]:.4f}</td>' in page
    mean = f"{summary['pauc_mean_of_splits']:.4f} ± {summary['pauc_std_of_splits']:.4f}"
    assert mean in page
    cli("infer", "report", "--ensemble", folder / "one", "--data", data)
    assert "By fold plan" not in (folder / "one" / "report.html").read_text()


def test_splits_must_be_positive(data: Path, cli: Cli) -> None:
    ended = cli("infer", "fit", "--data", data, "--splits", 0)
    assert ended.code == 2
    assert "--splits" in ended.err
