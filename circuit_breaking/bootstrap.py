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
