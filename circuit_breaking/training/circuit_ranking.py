"""A learned ranking for circuits: scores by which the best k edges show a behaviour by themselves, for every k at once.

Attribution scores every edge at the whole model, or along a line of masks. Here the scores are trained for the curve
that circuits are judged by (`evaluation.faithfulness`). A step draws two sizes k of a circuit, between one edge and all
of them, keeps edge e to the degree that `training.soft_top_k` gives for k, and lowers the mean of |1 - f|, where f is
the faithfulness of the circuit: 0 with all edges cut, 1 for the whole model. Sizes, temperature and learning rate
follow from the numbers of steps and edges, as in `training.methods.ranking`, which ranks edges by what cutting them
does.

Shapes: E edges.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from circuit_breaking.engine.transformer import EdgeMaskedTransformer
from circuit_breaking.errors import UserError
from circuit_breaking.runs.progress import progress_bar
from circuit_breaking.training.mask_gradient import MaskFunction, value_and_gradient
from circuit_breaking.training.methods.ranking import BETAS, BUDGETS, drawn_budgets, learning_rate, temperature
from circuit_breaking.training.soft_top_k import soft_top_k


def rank_circuit(
    metrics: Sequence[MaskFunction],
    model: EdgeMaskedTransformer,
    steps: int,
    start: Tensor | None = None,
    progress: str | None = None,
) -> Tensor:
    """Scores of all edges [E], from 0: for every k, the k edges with the highest scores should be a faithful circuit.

    Args:
        metrics: the metric of each batch, of equal weight, as a function of the mask. A step uses two batches, one for
            each size; batches are used in turn.
        model: the model. Its ablation values are what cut edges carry.
        steps: number of steps, each with two backward passes.
        start: scores [E] in whose order training starts, such as those of an attribution; None: all equal.
        progress: text of a progress bar; None: no bar.

    Raises:
        UserError: there is no batch, or the metric is the same with all edges kept and with all edges cut.
    """
    if not metrics:
        raise UserError("there is no batch to rank edges on. Give at least one example.")
    weights = model.mask.weights
    whole, empty = (_mean(metrics, mask) for mask in (torch.ones_like(weights), torch.zeros_like(weights)))
    if whole == empty:
        raise UserError(
            f"the metric is {whole:.4g} with all edges kept and with all edges cut, so that edges cannot be ranked. "
            "Use a task that the model knows, or other ablation values."
        )
    edges = len(weights)
    scores = (torch.zeros_like(weights) if start is None else _places(start.to(weights)) * steps / 4).requires_grad_()
    optimizer = torch.optim.Adam([scores], lr=1.0, betas=BETAS)
    for number in progress_bar(range(steps), shown=bool(progress), desc=progress, unit="step"):
        share = number / steps
        optimizer.param_groups[0]["lr"] = learning_rate(share)
        optimizer.zero_grad()
        for turn, size in enumerate(drawn_budgets(number, BUDGETS, edges - 0.5)):
            kept = soft_top_k(scores, size, temperature(share, steps, edges))
            metric = metrics[(BUDGETS * number + turn) % len(metrics)]
            value, gradient = value_and_gradient(metric, kept)
            faithfulness = float((value - empty) / (whole - empty))
            slope = (-1.0 if faithfulness < 1 else 1.0) / (whole - empty) / BUDGETS
            kept.backward(slope * gradient)
        optimizer.step()
    return scores.detach() - scores.detach().amin()  # only the order means something; no score is negative


@torch.no_grad()
def _mean(metrics: Sequence[MaskFunction], mask: Tensor) -> float:
    return float(torch.stack([metric(mask) for metric in metrics]).mean())


def _places(scores: Tensor) -> Tensor:
    """The place of each score among all of them, from 0 for the lowest to 1 for the highest."""
    return scores.argsort(stable=True).argsort().to(scores) / max(len(scores) - 1, 1)
