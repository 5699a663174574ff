import numpy as np
import pytest
from sklearn.metrics import auc, roc_curve

from isic.metrics import bootstrap_pauc, bootstrap_triage, pauc, roc_auc, top_k, triage
from isic.runtime.errors import UserError


def official_pauc(target: np.ndarray, score: np.ndarray) -> float:
    """The official definition: flip both, cut the ROC curve at FPR 0.2, integrate."""
    fpr, tpr, _ = roc_curve(1 - target, -score)
    stop = np.searchsorted(fpr, 0.2, side="right")
    last = np.interp(0.2, fpr[stop - 1 : stop + 1], tpr[stop - 1 : stop + 1])
    return float(auc(np.append(fpr[:stop], 0.2), np.append(tpr[:stop], last)))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("levels", [2, 5, 1000, None])
def test_pauc_is_the_official_algorithm(seed: int, levels: int | None) -> None:
    random = np.random.default_rng(seed)
    target = (random.random(500) < random.uniform(0.02, 0.6)).astype(int)
    target[:2] = 0, 1
    score = random.random(500) + 0.3 * target
    if levels:
        score = np.round(score * levels) / levels  # ties
    assert pauc(target, score) == pytest.approx(official_pauc(target, score), abs=1e-12)


def test_pauc_of_constant_perfect_and_inverted_scores() -> None:
    target = np.array([0] * 90 + [1] * 10)
    assert pauc(target, np.ones(100)) == pytest.approx(0.02, abs=1e-12)
    assert pauc(target, target) == pytest.approx(0.2, abs=1e-12)
    assert pauc(target, -target) == pytest.approx(0.0, abs=1e-12)
    assert roc_auc(target, target) == 1.0


def test_only_the_order_of_scores_matters() -> None:
    random = np.random.default_rng(0)
    target = random.integers(0, 2, 200)
    score = random.normal(size=200)
    assert pauc(target, score) == pauc(target, np.exp(3 * score) + 7)


@pytest.mark.parametrize(
    ("target", "score", "words"),
    [
        ([0, 0, 0], [1, 2, 3], "both classes"),
        ([], [], "both classes"),
        ([0, 1], [0, np.nan], "not finite"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    target: list[int], score: list[float], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        pauc(target, score)


def test_top_15_sensitivity_ranks_within_the_patient() -> None:
    patient = ["a"] * 20 + ["b"] * 20
    target = np.zeros(40, int)
    score = np.arange(40.0)
    target[[19, 5, 4, 39]] = 1  # ranks 1, 15 and 16 of a's twenty lesions, and 1 of b's
    found = top_k(target, score, patient)
    assert found.by_lesion == 3 / 4
    assert found.by_patient == (2 / 3 + 1) / 2
    assert found.num_patients == 2
    assert found.num_small == 0
    tied = top_k(target, np.zeros(40), patient)
    assert tied.by_lesion == tied.by_patient == 0, "a tie counts against the lesion"
    perfect = top_k(target, np.where(target == 1, 1.0, 0.0), patient)
    assert perfect.by_lesion == perfect.by_patient == 1


def test_top_k_agrees_with_a_loop_over_patients() -> None:
    random = np.random.default_rng(3)
    patient = random.integers(0, 30, 900)
    target = (random.random(900) < 0.1).astype(int)
    score = random.integers(0, 12, 900).astype(float)
    hits = [
        np.sum((patient == patient[i]) & (score >= score[i])) <= 15 for i in np.flatnonzero(target)
    ]
    assert top_k(target, score, patient).by_lesion == pytest.approx(np.mean(hits))


def test_top_15_by_patient_is_the_challenges_secondary_metric() -> None:
    """By the organisers' definition: the mean share over patients with a malignant lesion."""
    random = np.random.default_rng(5)
    patient = np.repeat(np.arange(40), random.integers(1, 60, 40))
    target = (random.random(len(patient)) < 0.08).astype(int)
    score = random.permutation(len(patient)).astype(float)
    shares = []
    for number in np.unique(patient[target == 1]):
        labels = target[patient == number]
        scores = score[patient == number]
        top = np.argsort(-scores)[:15]
        shares.append(labels[top].sum() / labels.sum())
    found = top_k(target, score, patient)
    assert found.by_patient == pytest.approx(np.mean(shares))
    assert found.by_patient != pytest.approx(found.by_lesion, abs=1e-3)
    assert found.num_patients == len(shares)
    sizes = [np.sum(patient == number) for number in np.unique(patient[target == 1])]
    assert found.num_small == sum(size <= 15 for size in sizes)


@pytest.mark.parametrize("levels", [3, 1000])
def test_a_bootstrap_draw_is_the_pauc_of_the_drawn_rows(levels: int) -> None:
    random = np.random.default_rng(4)
    target = (random.random(300) < 0.2).astype(int)
    group = random.integers(0, 40, 300)
    score = np.round(random.random(300) * levels + 0.4 * target * levels)
    draws = bootstrap_pauc(target, [score, -score], group, num_draws=5, seed=9)
    assert draws.shape == (5, 2)
    again = np.random.default_rng(9)
    for drawn in draws:
        groups = again.integers(40, size=40)
        rows = np.concatenate([np.flatnonzero(group == g) for g in groups])
        assert drawn[0] == pytest.approx(pauc(target[rows], score[rows]), abs=1e-12)
        assert drawn[1] == pytest.approx(pauc(target[rows], -score[rows]), abs=1e-12)


@pytest.mark.parametrize("levels", [4, 1000])
@pytest.mark.parametrize("sensitivity", [0.8, 0.9, 0.95, 1.0])
def test_triage_takes_the_highest_threshold_that_finds_enough(
    levels: int, sensitivity: float
) -> None:
    random = np.random.default_rng(2)
    target = (random.random(300) < 0.1).astype(int)
    score = np.round(random.random(300) * levels + 0.5 * target * levels)
    found = triage(target, score, sensitivity)
    chosen = score >= found.threshold
    assert found.num_lesions == chosen.sum()
    assert found.num_malignant == target[chosen].sum()
    assert found.number_needed == chosen.sum() / target[chosen].sum()
    assert target[chosen].sum() >= sensitivity * target.sum()
    assert target[score > found.threshold].sum() < sensitivity * target.sum()


def test_triage_of_perfect_and_constant_scores() -> None:
    target = np.array([0] * 85 + [1] * 15)
    perfect = triage(target, np.arange(100), 0.8)
    assert (perfect.num_lesions, perfect.num_malignant) == (12, 12), "0.8 of 15 is 12"
    assert triage(target, np.ones(100), 0.8).number_needed == pytest.approx(100 / 15)


def test_a_bootstrap_draw_is_the_triage_of_the_drawn_rows() -> None:
    random = np.random.default_rng(4)
    target = (random.random(300) < 0.2).astype(int)
    group = random.integers(0, 40, 300)
    score = np.round(random.random(300) * 50 + 20 * target)
    draws = bootstrap_triage(target, score, group, [0.8, 0.95], num_draws=5, seed=9)
    assert draws.shape == (5, 2)
    again = np.random.default_rng(9)
    for drawn in draws:
        groups = again.integers(40, size=40)
        rows = np.concatenate([np.flatnonzero(group == g) for g in groups])
        expected = [triage(target[rows], score[rows], s).number_needed for s in (0.8, 0.95)]
        assert drawn == pytest.approx(expected)
