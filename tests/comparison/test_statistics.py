import itertools

import numpy as np
import pytest
from scipy import stats

from dit4sr_pl.comparison.statistics import Resampling, holm

RESAMPLING = Resampling(level=0.95, resamples=4000, seed=0)


@pytest.fixture
def values() -> np.ndarray:
    return np.random.default_rng(3).normal([20, 0.5], [2, 0.1], (80, 2))


def test_interval_against_a_loop_over_resamples(values):
    draws = np.random.default_rng(7)
    means = [values[draws.integers(0, len(values), len(values))].mean(axis=0) for _ in range(4000)]
    expected = np.quantile(means, [0.025, 0.975], axis=0)
    error = values.std(axis=0) / np.sqrt(len(values)) * 0.15  # of quantiles of 4000, four standard errors or so
    assert (np.abs(np.stack(RESAMPLING.interval(values)) - expected) < error).all()


def test_interval_of_many_images_is_the_normal_one(values):
    low, high = RESAMPLING.interval(values)
    half = stats.norm.ppf(0.975) * values.std(axis=0) / np.sqrt(len(values))
    assert (high - low) / 2 == pytest.approx(half, rel=0.06)
    assert (high + low) / 2 == pytest.approx(values.mean(axis=0), abs=0.1 * half.max())


def test_a_lower_level_is_a_narrower_interval(values):
    wide = np.subtract(*RESAMPLING.interval(values))
    narrow = np.subtract(*Resampling(0.5, 4000, 0).interval(values))
    assert (np.abs(narrow) < 0.5 * np.abs(wide)).all()


def test_same_seed_same_numbers_and_another_seed_others(values):
    again = Resampling(0.95, 4000, 0)
    assert np.array_equal(RESAMPLING.interval(values), again.interval(values))
    assert np.array_equal(RESAMPLING.p_values(values - 20), again.p_values(values - 20))
    assert not np.array_equal(RESAMPLING.interval(values), Resampling(0.95, 4000, 1).interval(values))


def test_p_values_of_few_images_are_those_of_every_choice_of_signs():
    differences = np.random.default_rng(0).normal(0.4, 1, (9, 3))
    signs = np.array(list(itertools.product([1, -1], repeat=9)))
    means = np.abs(signs @ differences)
    expected = (means >= means[0] - 1e-12).mean(axis=0)
    assert RESAMPLING.p_values(differences) == pytest.approx(expected, abs=1e-12)
    assert (expected > 1 / 512).all() and (expected < 1).all()


def test_p_values_of_many_images_are_close_to_those_of_the_t_test(values):
    differences = values - [19.7, 0.5]
    assert RESAMPLING.p_values(differences) == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.03)


def test_what_was_not_measured_has_neither_interval_nor_test(values):
    values[3, 0] = np.nan
    for numbers in (*RESAMPLING.interval(values), RESAMPLING.p_values(values)):
        assert np.isnan(numbers).tolist() == [True, False]
    for numbers in (*RESAMPLING.interval(values[:1]), RESAMPLING.p_values(values[:1])):
        assert np.isnan(numbers).all()


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.5: times 4, 3, 2, 1 is 0.04, 0.06, 0.06, 0.5
    corrected = holm(np.array([[0.03, 0.01, np.nan], [0.5, 0.02, np.nan]]))
    assert corrected == pytest.approx(np.array([[0.06, 0.04, np.nan], [0.5, 0.06, np.nan]]), nan_ok=True)
    # Never falling: 0.01 x 3, then 0.011 x 2 is less and stays 0.03; never over 1
    assert holm(np.array([0.01, 0.011, 0.9])) == pytest.approx([0.03, 0.03, 0.9])
    assert holm(np.array([0.6, 0.7])) == pytest.approx([1, 1])
