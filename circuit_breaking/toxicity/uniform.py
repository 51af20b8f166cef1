"""Texts spread evenly over toxicity, for loss against toxicity (the paper's figure)."""

from pathlib import Path

import numpy as np

from circuit_breaking.errors import UserError
from circuit_breaking.runs.files import is_text, read_jsonl
from circuit_breaking.tasks.data import TOXIC_HINT


def read_uniform(path: Path | str) -> tuple[list[str], np.ndarray]:
    """Texts and their toxicity [n] in [0, 1]. Raises `UserError` for a file that is missing, empty or damaged."""
    rows = read_jsonl(path, TOXIC_HINT)
    for number, row in enumerate(rows, 1):
        text, toxicity = (row.get("text"), row.get("toxicity")) if isinstance(row, dict) else (None, None)
        if not is_text(text) or type(toxicity) not in (int, float) or not 0 <= toxicity <= 1:
            raise UserError(f"{path}, row {number}: there is no 'text' with a 'toxicity' between 0 and 1. {TOXIC_HINT}")
    if not rows:
        raise UserError(f"{path} holds no rows. {TOXIC_HINT}")
    return [row["text"] for row in rows], np.array([row["toxicity"] for row in rows], float)


def spread(toxicity: np.ndarray, count: int, bins: int = 10) -> np.ndarray:
    """Indices of at most `count` texts, in order: the first `count // bins` of each bin of toxicity.

    A bin with fewer texts contributes all of them.
    """
    which = np.minimum((np.asarray(toxicity) * bins).astype(int), bins - 1)
    chosen = [np.flatnonzero(which == one)[: max(1, count // bins)] for one in range(bins)]
    return np.sort(np.concatenate(chosen))
