"""How far edge scores depend on the examples that they were averaged over: a bootstrap over examples.

Shapes: n examples, E edges, S resamples.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from circuit_breaking.errors import UserError

EDGES_AT_ONCE = 4096


@dataclass(frozen=True)
class ScoreStability:
    """Mean scores over examples, with their bootstrap intervals.

    Attributes:
        mean: mean score of each edge [E].
        low, high: ends of the percentile interval of the mean [E].
        chosen: share of the resamples in which each edge is among the `count` highest [E].
        overlap: mean Jaccard similarity between the `count` highest edges of a resample and those of all examples.
    """

    mean: Tensor
    low: Tensor
    high: Tensor
    chosen: Tensor
    overlap: float


def score_stability(
    scores: Tensor, count: int, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> ScoreStability:
    """Bootstrap mean scores over examples.

    Args:
        scores: of each example and edge [n, E], for example `eap` of one prompt at a time.
        count: how many of the highest edges form a circuit.
        resamples: how often as many examples are drawn with replacement.
        level: of the intervals.
        seed: of the draws.

    Raises:
        UserError: there are fewer than two examples, or `count` is not between 1 and the number of edges.
    """
    examples, edges = scores.shape
    if examples < 2:
        raise UserError(f"a bootstrap needs scores of at least two examples, not {examples}.")
    if not 1 <= count <= edges:
        raise UserError(f"{count} edges cannot be chosen of {edges:,}. Give 1 to {edges:,}.")
    scores = scores.detach().double().cpu()
    draws = torch.randint(examples, (resamples, examples), generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(resamples, examples, dtype=torch.float64)
    weights.scatter_add_(1, draws, torch.full_like(draws, 1, dtype=torch.float64)).div_(examples)
    tail, mean = (1 - level) / 2, scores.mean(0)
    at = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    ends = [(weights @ part).quantile(at, 0) for part in scores.split(EDGES_AT_ONCE, 1)]
    low, high = torch.cat(ends, 1)
    best = torch.zeros(edges).index_fill_(0, mean.topk(count).indices, 1)
    chosen, shared = torch.zeros(edges), 0.0
    for row in weights:  # a resample at a time, whose scores of all edges would be large together
        top = (row @ scores).topk(count).indices
        chosen[top] += 1 / resamples
        common = float(best[top].sum())
        shared += common / (2 * count - common) / resamples
    return ScoreStability(mean, low, high, chosen, shared)
