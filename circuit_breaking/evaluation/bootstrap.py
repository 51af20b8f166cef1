"""Means with 95% percentile bootstrap intervals (Efron 1979) over texts or prompts."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

Sums = tuple[np.ndarray, np.ndarray]  # sum and count of each text or prompt, float64 [n] both

RESAMPLES = 1000
REMEMBERED = 1000  # most texts for which resamples are remembered, in 8 MB


def estimate(sums: np.ndarray, counts: np.ndarray, seed: int = 0, reference: Sums | None = None) -> dict[str, Any]:
    """Estimate the ratio of two totals with a 95% bootstrap interval.

    Args:
        sums, counts: of each text or prompt, float64 [n].
        seed: of the resamples.
        reference: sums and counts of another model on the same texts.

    Returns:
        `value`, `low` and `high`; all None if any sum is not finite. With `reference` also `change`, the difference
        from that model; its interval uses the same resamples, so that the comparison is paired.
    """
    columns = np.stack([sums, counts, *(reference or ())], 1)
    if not np.isfinite(columns).all():
        nothing = {"value": None, "low": None, "high": None}
        return nothing | ({} if reference is None else {"change": nothing})
    n = len(columns)
    draws = _remembered(n, seed) if n <= REMEMBERED else _draws(n, seed)
    totals = np.concatenate([columns.sum(0)[None], *(some @ columns for some in draws)])
    ratios = totals[:, 0] / totals[:, 1]
    result = _interval(ratios)
    return result if reference is None else result | {"change": _interval(ratios - totals[:, 2] / totals[:, 3])}


def _draws(n: int, seed: int) -> Iterator[np.ndarray]:
    """How often each text is drawn in each of the resamples, 100 of them at a time: int64 [100, n]."""
    random = np.random.default_rng(seed)
    return (random.multinomial(n, np.full(n, 1 / n), 100) for _ in range(RESAMPLES // 100))


@lru_cache(maxsize=8)
def _remembered(n: int, seed: int) -> list[np.ndarray]:
    # drawing takes longer than the rest, and an evaluation has hundreds of estimates over the same few numbers of texts
    return list(_draws(n, seed))


def _interval(ratios: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(ratios[1:], [0.025, 0.975])
    return {"value": float(ratios[0]), "low": float(low), "high": float(high)}


def running_mean(x: np.ndarray, y: np.ndarray, at: np.ndarray, width: float, resamples: int = 500) -> np.ndarray:
    """Running mean of y by x with a triangular kernel, and its 95% bootstrap band over texts.

    Args:
        x, y: of each text, float64 [n].
        at: points [p] to evaluate at.
        width: half the width of the kernel.
        resamples: of the texts.

    Returns:
        float64 [3, p]: mean, low, high; NaN at points with fewer than 5 texts within `width`.
    """
    weights = np.clip(1 - np.abs(x[:, None] - at) / width, 0, None)  # [n, points]
    few = (weights > 0).sum(0) < 5
    draws = np.random.default_rng(0).multinomial(len(x), np.full(len(x), 1 / len(x)), resamples)
    counts = np.concatenate([np.ones((1, len(x))), draws])
    result = np.full((3, len(at)), np.nan)
    if not few.all():
        near = weights[:, ~few]
        totals = counts @ near
        # a resample without any text near a point is left out there
        means = np.divide((counts * y) @ near, totals, out=np.full_like(totals, np.nan), where=totals > 0)
        result[:, ~few] = np.stack([means[0], *np.nanquantile(means[1:], [0.025, 0.975], axis=0)])
    return result
