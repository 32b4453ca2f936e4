"""Uncertainty of a mean over images: bootstrap intervals, paired tests, and their correction for multiple tests."""

from dataclasses import dataclass

import numpy as np
from scipy import stats

CHUNK = 10**7  # random numbers per batch


@dataclass(frozen=True)
class Resampling:
    """Resamples images; the same seed gives the same intervals and p-values.

    Args:
        level: level of the intervals, such as 0.95.
        resamples: number of resamples of the images, and of the signs where not all can be tried.
        seed: seed of the resampling.
    """

    level: float
    resamples: int
    seed: int

    def interval(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns percentile bootstrap intervals of the means of columns `(images, columns)`.

        They are `nan` for a column that holds `nan`, and for a single image.
        """
        low, high = np.full((2, values.shape[1]), np.nan)
        measured = self._measured(values)
        if measured.any():
            options = self._options(values) | {"method": "percentile", "confidence_level": self.level}
            interval = stats.bootstrap((values[:, measured],), np.mean, **options).confidence_interval
            low[measured], high[measured] = interval.low, interval.high
        return low, high

    def p_values(self, differences: np.ndarray) -> np.ndarray:
        """Returns two-sided p-values for each column's mean being zero: sign-flip permutation test, exact for few
        images.

        The test asks only that a difference is as likely as its negative if two models are alike, and its statistic is
        the mean that the table shows. The p-value is `nan` where `interval` is.
        """
        p = np.full(differences.shape[1], np.nan)
        measured = self._measured(differences)
        if measured.any():
            options = self._options(differences) | {"permutation_type": "samples", "vectorized": True}
            p[measured] = stats.permutation_test((differences[:, measured],), np.mean, **options).pvalue
        return p

    @staticmethod
    def _measured(values: np.ndarray) -> np.ndarray:
        return ~np.isnan(values).any(axis=0) & (len(values) > 1)

    def _options(self, values: np.ndarray) -> dict:
        batch = max(1, CHUNK // values.size)
        return {"n_resamples": self.resamples, "batch": batch, "axis": 0, "rng": np.random.default_rng(self.seed)}


def holm(p_values: np.ndarray) -> np.ndarray:
    """Returns p-values corrected for multiple tests by Holm's method; `nan` stays `nan` and does not count."""
    flat = p_values.ravel()
    order = np.argsort(flat)[: np.count_nonzero(~np.isnan(flat))]  # nan is sorted last
    corrected = np.full_like(flat, np.nan)
    steps = flat[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return corrected.reshape(p_values.shape)
