"""Edge attribution: how much each edge matters to a metric, from gradients alone.

The metric is a function F of the mask m [E], 1 where an edge is kept. One backward pass gives the gradient of every
edge.

EAP     Edge attribution patching (Syed, Rager, Conmy 2023): the first-order effect of an edge, dF/dm at the whole
        model. Reader j gets m_ij x_i + (1 - m_ij) μ_i, so this is (x_i - μ_i) · dF/dr_j, EAP's product of the change
        of an activation and the gradient at its reader.
EAP-IG  Its integrated-gradients form (Sundararajan, Taly, Yan 2017; for circuits Hanna, Pezzelle, Belinkov 2024): the
        mean gradient along the straight line from one mask to another, times the change. The scores add up to the
        change of the metric, up to the error of the sum that approximates the integral.

A score is what keeping the edge adds to the metric, so cutting the edges with the highest scores is predicted to lower
the metric most.

Shapes: E edges.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from circuit_breaking.engine.transformer import EdgeMaskedTransformer
from circuit_breaking.errors import UserError
from circuit_breaking.training.mask_gradient import MaskFunction, value_and_gradient


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
        steps: Gauss-Legendre nodes on the line from `start` to `end`; each is one backward pass. A metric that is a
            polynomial of degree up to 2 · steps along the line is integrated exactly.
        start: mask [E] at the beginning of the line; all edges cut by default.
        end: mask [E] at its end; all edges kept by default.

    Raises:
        UserError: there is no metric, no step, or a gradient is not finite.
    """
    if steps < 1:
        raise UserError(f"integrated gradients over {steps} steps are not possible. Give 1 or more.")
    ones = torch.ones_like(model.mask.weights)
    start = torch.zeros_like(ones) if start is None else start.detach()
    change = (ones if end is None else end.detach()) - start
    points = line_points(steps)

    def integrated(metric: MaskFunction) -> Tensor:
        total = torch.zeros_like(change)
        for position, weight in points:
            total += weight * value_and_gradient(metric, start + position * change)[1]
        return total * change

    return _average(integrated(metric) for metric in metrics)


def _average(scores: Iterable[Tensor]) -> Tensor:
    total, count = None, 0
    for score in scores:
        total, count = score if total is None else total + score, count + 1
    if total is None:
        raise UserError("there is no batch to attribute over. Give at least one prompt.")
    if not total.isfinite().all():
        raise UserError("a gradient is not finite, so edges cannot be ranked. Use float32, or other means.")
    return total / count
