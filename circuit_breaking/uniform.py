"""Texts spread evenly over toxicity, for loss against toxicity (the paper's figure) (layer 3)."""

from pathlib import Path

import numpy as np

from circuit_breaking.cli import UserError
from circuit_breaking.files import read_jsonl
from circuit_breaking.text import is_text

HINT = "Make it with toxicity/toxic_data_for_eval.py, or set the path of one."


def read_uniform(path: Path | str) -> tuple[list[str], np.ndarray]:
    """Texts and their toxicity [n] in [0, 1]. Raises `UserError` for a file that is missing, empty or damaged."""
    rows = read_jsonl(path, HINT)
    for number, row in enumerate(rows, 1):
        text, toxicity = (row.get("text"), row.get("toxicity")) if isinstance(row, dict) else (None, None)
        if not is_text(text) or type(toxicity) not in (int, float) or not 0 <= toxicity <= 1:
            raise UserError(f"{path}, row {number}: there is no 'text' with a 'toxicity' between 0 and 1. {HINT}")
    if not rows:
        raise UserError(f"{path} holds no rows. {HINT}")
    return [row["text"] for row in rows], np.array([row["toxicity"] for row in rows], float)


def spread(toxicity: np.ndarray, count: int, bins: int = 10) -> np.ndarray:
    """Numbers of at most `count` texts, the first so many of each bin of toxicity, in their order.

    A bin that has fewer gives what it has.
    """
    which = np.minimum((np.asarray(toxicity) * bins).astype(int), bins - 1)
    chosen = [np.flatnonzero(which == one)[: max(1, count // bins)] for one in range(bins)]
    return np.sort(np.concatenate(chosen))


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
