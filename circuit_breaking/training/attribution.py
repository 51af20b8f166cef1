"""Edge attribution: how much each edge matters to a metric, from gradients alone.

The metric is a function F of the mask m [E], 1 where an edge is kept. One backward pass gives the gradient of every
edge.

EAP     Edge attribution patching (Syed, Rager, Conmy 2023): the first-order effect of an edge, dF/dm at the whole
        model. Reader j gets m_ij x_i + (1 - m_ij) μ_i, so this is (x_i - μ_i) · dF/dr_j, EAP's product of the change
        of an activation and the gradient at its reader.
EAP-IG  Its integrated-gradients form (Sundararajan, Taly, Yan 2017; for circuits Hanna, Pezzelle, Belinkov 2024): the
        mean gradient along the straight line from one mask to another, times the change. The scores add up to the
        change of the metric (completeness), up to the error of the sum that approximates the integral.

With zero ablation, all that a reader gets can be cut. Near such a mask a norm divides by almost nothing, and the metric
changes as fast between 0.001 and 0.01 of the line as between 0.1 and 1. The points of the sum then lie at positions
that grow geometrically from that end (`geometric_points`). Gauss-Legendre points, which are used otherwise, would miss
what happens there.

A score is what keeping the edge adds to the metric, so cutting the edges with the highest scores is predicted to lower
the metric most.

Shapes: E edges.
"""

import math
import warnings
from collections.abc import Iterable

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


def eap(metrics: Iterable[MaskFunction], model: EdgeMaskedTransformer) -> Tensor:
    """First-order scores of all edges, averaged over metrics (one per batch): [E].

    Raises:
        UserError: there is no metric, or a gradient is not finite.
    """
    return _average(value_and_gradient(metric, torch.ones_like(model.mask.weights))[1] for metric in metrics)


def eap_ig(
    metrics: Iterable[MaskFunction],
    model: EdgeMaskedTransformer,
    steps: int = 20,
    start: Tensor | None = None,
    end: Tensor | None = None,
) -> Tensor:
    """Integrated-gradients scores of all edges, averaged over metrics (one per batch): [E].

    They add up to F(end) - F(start). An edge whose weight is the same at both ends scores 0.

    Args:
        metrics: functions of the mask.
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

    scores = _average(integrated(metric) for metric in metrics)
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


def _average(scores: Iterable[Tensor]) -> Tensor:
    total, count = None, 0
    for score in scores:
        total, count = score if total is None else total + score, count + 1
    if total is None:
        raise UserError("there is no batch to attribute over. Give at least one prompt.")
    if not total.isfinite().all():
        raise UserError("a gradient is not finite, so edges cannot be ranked. Use float32, or other means.")
    return total / count
