"""Means with 95% percentile bootstrap intervals (Efron 1979) over texts, prompts or models (layer 0)."""

from typing import Any

import numpy as np

Sums = tuple[np.ndarray, np.ndarray]  # a sum and a count for each text or prompt: float64 [n] both

RESAMPLES = 1000


def estimate(sums: np.ndarray, counts: np.ndarray, seed: int = 0, reference: Sums | None = None) -> dict[str, Any]:
    """Ratio of two totals with a 95% bootstrap interval: `value`, `low`, `high`, all None where one is not finite.

    With `reference`, another model's sums and counts on the same texts, also `change`, the difference to it, whose
    interval comes from the same resamples and is therefore that of a paired comparison.
    """
    columns = np.stack([sums, counts, *(reference or ())], 1)
    if not np.isfinite(columns).all():
        nothing = {"value": None, "low": None, "high": None}
        return nothing | ({} if reference is None else {"change": nothing})
    n, random = len(columns), np.random.default_rng(seed)
    # how often each text is drawn, [100, n] at a time
    pieces = [random.multinomial(n, np.full(n, 1 / n), 100) @ columns for _ in range(RESAMPLES // 100)]
    totals = np.concatenate([columns.sum(0)[None], *pieces])
    ratios = totals[:, 0] / totals[:, 1]
    result = _interval(ratios)
    return result if reference is None else result | {"change": _interval(ratios - totals[:, 2] / totals[:, 3])}


def _interval(ratios: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(ratios[1:], [0.025, 0.975])
    return {"value": float(ratios[0]), "low": float(low), "high": float(high)}


def running_mean(x: np.ndarray, y: np.ndarray, at: np.ndarray, width: float, resamples: int = 500) -> np.ndarray:
    """Mean of y over the texts whose x is within `width` of each point, with its 95% bootstrap band.

    The kernel is triangular, so that no text enters or leaves all at once. Texts are resampled, not points.

    Returns:
        float64 [3, points]: mean, low, high; NaN where fewer than 5 texts are near.
    """
    weights = np.clip(1 - np.abs(x[:, None] - at) / width, 0, None)  # [n, points]
    few = (weights > 0).sum(0) < 5
    draws = np.random.default_rng(0).multinomial(len(x), np.full(len(x), 1 / len(x)), resamples)
    counts = np.concatenate([np.ones((1, len(x))), draws])
    result = np.full((3, len(at)), np.nan)
    if not few.all():
        near = weights[:, ~few]
        totals = counts @ near
        # a resample without a single text near a point says nothing there
        means = np.divide((counts * y) @ near, totals, out=np.full_like(totals, np.nan), where=totals > 0)
        result[:, ~few] = np.stack([means[0], *np.nanquantile(means[1:], [0.025, 0.975], axis=0)])
    return result
