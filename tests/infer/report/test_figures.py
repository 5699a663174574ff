import numpy as np
import polars as pl
import pytest
from sklearn.metrics import average_precision_score

from infer.report.curves import reliability
from infer.report.figures import distribution_figure, reliability_figure, roc_figure
from isic.metrics import pauc, roc_auc
from tests.support.charts import chart, drawn, polygon_area


@pytest.mark.parametrize(("title", "y_low"), [("ROC", 0.0), ("The scored part", 0.8)])
def test_the_filled_area_is_the_partial_auc(
    page: str, oof: pl.DataFrame, title: str, y_low: float
) -> None:
    area = polygon_area(drawn(chart(page, title), "scored", y_low))
    assert area == pytest.approx(pauc(oof["target"], oof["blend"]), abs=1e-3)


def test_the_curves_have_the_areas_of_the_scores(page: str, oof: pl.DataFrame) -> None:
    curve = drawn(chart(page, "ROC"), "whole")
    assert np.trapezoid(curve[:, 1], curve[:, 0]) == pytest.approx(
        roc_auc(oof["target"], oof["blend"]), abs=1e-3
    )
    recall, precision = drawn(chart(page, "Precision and recall"), "whole").T
    expected = average_precision_score(oof["target"], oof["blend"])
    assert np.trapezoid(precision, recall) == pytest.approx(expected, abs=2e-3)
    assert chart(page, "ROC").count('class="line part"') == oof["fold"].n_unique()


def test_rare_lesions_are_drawn_on_a_logarithmic_axis() -> None:
    rng = np.random.default_rng(0)
    target = (np.arange(20_000) < 20).astype(np.int8)
    score = np.clip(rng.lognormal(-6, 1, len(target)) * (1 + 20 * target), 0, 1)
    table = pl.DataFrame({"target": target, "fold": np.arange(len(target)) % 2, "blend": score})
    bins = reliability(target, score, np.arange(len(target)))
    for drawn_figure in (reliability_figure(table, bins), distribution_figure(table)):
        assert ">10⁻³</text>" in drawn_figure
        assert ">0.6</text>" not in drawn_figure
    one_sided = table.with_columns(fold=pl.col("target"))
    assert 'class="line part"' not in roc_figure(one_sided)
