from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from numpy.typing import NDArray
from playwright.sync_api import Browser
from sklearn.metrics import roc_curve

from isic.html.plot import svg_file
from isic.html.roc import roc_chart, scored_region
from isic.metrics import pauc
from tests.support.browser import WIDTHS, look
from tests.support.charts import polygon_area

Scores = tuple[NDArray[np.int8], NDArray[np.float64]]


def scores(seed: int, num_rows: int = 500) -> Scores:
    rng = np.random.default_rng(seed)
    target = (np.arange(num_rows) < num_rows // 8).astype(np.int8)
    return target, 2 * target + rng.standard_normal(num_rows)


def test_every_curve_is_listed_and_one_of_a_single_class_left_out() -> None:
    one_class = (np.zeros(9, np.int8), np.arange(9.0))
    curves = {"fold 0": scores(0), "fold 1": one_class, "pooled": scores(2)}
    chart = roc_chart(curves, with_legend=True)
    for name in ("fold 0", "pooled"):
        assert f">{name}: pAUC {pauc(*curves[name]):.4f}</text>" in chart
    assert "fold 1" not in chart
    assert chart.count('class="line whole"') == 1
    assert chart.count('class="line part"') == 1


def test_a_long_legend_is_left_out() -> None:
    curves = {f"fold {fold}": scores(fold) for fold in range(11)}
    chart = roc_chart(curves, with_legend=True)
    assert chart.count('class="note') == 1


@pytest.mark.browser
@pytest.mark.parametrize("width", WIDTHS)
def test_a_file_is_sound_in_a_browser(browser: Browser, tmp_path: Path, width: int) -> None:
    curves = {f"fold {fold}": scores(fold) for fold in range(6)}
    text = svg_file(roc_chart(curves, with_legend=True))
    assert ElementTree.fromstring(text).get("viewBox") is not None
    (tmp_path / "roc.svg").write_text(text)
    look(browser, tmp_path / "roc.svg", width).assert_sound()


@pytest.mark.parametrize("strength", [0.0, 0.5, 3.0])
def test_the_scored_region_has_the_area_of_any_score(strength: float) -> None:
    rng = np.random.default_rng(0)
    target = (np.arange(500) < 60).astype(np.int8)
    score = np.round(strength * target + rng.standard_normal(500), 1)  # with ties
    assert polygon_area(
        np.stack(scored_region(*roc_curve(target, score)[:2]), axis=1)
    ) == pytest.approx(pauc(target, score))
