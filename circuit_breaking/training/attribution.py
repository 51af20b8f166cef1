"""Edge attribution: how much each edge matters to a metric, from gradients alone.

The metric is a function F of the mask m [E], 1 where an edge is kept. One backward pass gives the gradient of every
edge. What cut edges carry is up to the model: zero, means, or outputs on counterfactual texts.

EAP                        Edge attribution patching (Syed, Rager, Conmy 2023): the first-order effect of an edge, dF/dm
                           at the whole model. Reader j gets m_ij x_i + (1 - m_ij) μ_i, so this is
                           (x_i - μ_i) · dF/dr_j, EAP's product of the change of an activation and the gradient at its
                           reader. With counterfactual texts, μ_i is the corrupted activation.
integrated mask gradients  The mean gradient along the straight line from one mask to another, times the change
                           (Sundararajan, Taly, Yan 2017; with masks, auto-circuit: Miller, Chughtai, Saunders 2024).
                           The scores add up to the change of the metric (completeness), up to the error of the sum that
                           approximates the integral.

`input_attribution` has EAP-IG, which integrates over input embeddings or activations instead of the mask.

With zero ablation, all that a reader gets can be cut. Near such a mask a norm divides by almost nothing, and the metric
changes as fast between 0.001 and 0.01 of the line as between 0.1 and 1. The points of the sum then lie at positions
that grow geometrically from that end (`geometric_points`). Gauss-Legendre points, which are used otherwise, would miss
what happens there.

A score is what keeping the edge adds to the metric, so cutting the edges with the highest scores is predicted to lower
the metric most. docs/methods.md compares this and other conventions with those of other libraries.

Shapes: E edges.
"""

import itertools
import math
import warnings
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from circuit_breaking.engine.transformer import EdgeMaskedTransformer
from circuit_breaking.errors import UserError
from circuit_breaking.training.mask_gradient import MaskFunction, value_and_gradient

GROWTH = 500.0  # how much denser geometric points lie at their dense end than at the other
MOST_ERROR = 0.05  # a completeness error above this share of the metric's change is warned of


def geometric_points(steps: int, at_end: bool = False) -> list[tuple[float, float]]:
    """Positions in (0, 1) that are dense at 0, or at 1 with `at_end`, and weights to approximate an integral by a sum.

    The midpoint rule in u, for t = (GROWTH^u - 1) / (GROWTH - 1).
    """
    middles = [(step + 0.5) / steps for step in range(steps)]
    rate = math.log(GROWTH) / (GROWTH - 1) / steps
    points = [((GROWTH**u - 1) / (GROWTH - 1), GROWTH**u * rate) for u in middles]
    return [(1 - position, weight) for position, weight in reversed(points)] if at_end else points


def cuts_all_of_a_reader(model: EdgeMaskedTransformer, mask: Tensor) -> bool:
    """Whether some reader gets nothing but zeros under a mask [E], so that its norm divides by almost nothing."""
    if model.means is not None or model.resample:
        return False
    kept = torch.zeros_like(model.n_read, dtype=mask.dtype).index_add_(0, model.edge_readers, mask.detach().abs())
    return bool((kept == 0).any())


def points_between(model: EdgeMaskedTransformer, start: Tensor, end: Tensor, steps: int) -> list[tuple[float, float]]:
    """Positions and weights for an integral along the line from one mask [E] to another, dense where it needs them."""
    if cuts_all_of_a_reader(model, start):
        return geometric_points(steps)
    return geometric_points(steps, at_end=True) if cuts_all_of_a_reader(model, end) else line_points(steps)


def line_points(steps: int) -> list[tuple[float, float]]:
    """Gauss-Legendre positions in (0, 1), and weights that add up to 1, to approximate an integral by a sum."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)  # on [-1, 1]
    return [((node + 1) / 2, weight / 2) for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True)]


def eap(metrics: Iterable[MaskFunction], model: EdgeMaskedTransformer, counts: Sequence[int] | None = None) -> Tensor:
    """First-order scores of all edges, averaged over metrics (one per batch): [E].

    Args:
        metrics: functions of the mask.
        model: the model whose edges they are.
        counts: number of examples behind each metric, if the mean over examples is wanted; None: all batches count
            alike.

    Raises:
        UserError: there is no metric, or a gradient is not finite.
    """
    ones = torch.ones_like(model.mask.weights)
    return average((value_and_gradient(metric, ones)[1] for metric in metrics), counts)


def integrated_mask_gradients(
    metrics: Iterable[MaskFunction],
    model: EdgeMaskedTransformer,
    steps: int = 20,
    start: Tensor | None = None,
    end: Tensor | None = None,
) -> Tensor:
    """Gradients of the mask along a line from one mask to another, integrated and averaged over metrics: [E].

    The scores add up to F(end) - F(start). An edge whose weight is the same at both ends scores 0.

    Args:
        metrics: functions of the mask, one per batch.
        model: the model whose edges they are; its `means` are the ablation values of cut edges.
        steps: points on the line from `start` to `end`; each is one backward pass. Away from masks that cut all that a
            reader gets, they are Gauss-Legendre nodes, which integrate a metric exactly that is a polynomial of degree
            up to 2 · steps along the line.
        start: mask [E] at the beginning of the line; all edges cut by default.
        end: mask [E] at its end; all edges kept by default.

    Raises:
        UserError: there is no metric, no step, or a gradient is not finite.

    Warns if the sum of the scores differs from F(end) - F(start) by more than 5% of it.
    """
    if steps < 1:
        raise UserError(f"integrated gradients over {steps} steps are not possible. Give 1 or more.")
    ones = torch.ones_like(model.mask.weights)
    start = torch.zeros_like(ones) if start is None else start.detach()
    end = ones if end is None else end.detach()
    change, points = end - start, points_between(model, start, end, steps)
    changes: list[Tensor] = []  # of each metric, from start to end

    def integrated(metric: MaskFunction) -> Tensor:
        total = torch.zeros_like(change)
        with torch.no_grad():
            changes.append(metric(end) - metric(start))
        for position, weight in points:
            total += weight * value_and_gradient(metric, start + position * change)[1]
        return total * change

    scores = average(integrated(metric) for metric in metrics)
    error = completeness_error(scores, torch.stack(changes).mean())
    if error > MOST_ERROR:
        warnings.warn(
            f"the scores of integrated gradients over {steps} points add up to {float(scores.sum()):.3g}, which is "
            f"{error:.0%} off the change of the metric. Use more points.",
            stacklevel=2,
        )
    return scores


def completeness_error(scores: Tensor, change: Tensor) -> float:
    """How far the sum of scores [E] is from the change of the metric, as a share of that change."""
    difference = abs(float(scores.sum() - change))
    return difference / abs(float(change)) if float(change) else math.inf if difference else 0.0


def average(scores: Iterable[Tensor], counts: Sequence[int] | None = None) -> Tensor:
    """The mean of scores [E] of batches, weighted by the number of examples in each if `counts` are given."""
    total, weight = None, 0
    weights = itertools.repeat(1) if counts is None else counts
    for score, count in zip(scores, weights, strict=counts is not None):
        total, weight = count * score if total is None else total + count * score, weight + count
    if total is None:
        raise UserError("there is no batch to attribute over. Give at least one prompt.")
    if not total.isfinite().all():
        raise UserError("a gradient is not finite, so edges cannot be ranked. Use float32, or other means.")
    return total / weight
