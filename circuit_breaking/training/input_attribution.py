"""EAP-IG: edge attribution with gradients integrated over inputs or over activations (Hanna, Pezzelle, Belinkov 2024).

Every prompt has a counterfactual of the same number of tokens. With x_i the output of node i on the prompt and x'_i on
the counterfactual, in the whole model, the score of edge i -> j is

    (x_i - x'_i) · mean of dF/dr_j over points on a line.

EAP-IG, inputs       The points are passes of the whole model whose output of `embed` lies between those on the
                     counterfactual and on the prompt. The scores of the edges out of `embed` add up to the change of
                     the metric between the two.
EAP-IG, activations  For each group of nodes in turn (`embed`, the heads of a layer, its MLP), the points are passes on
                     the prompt in which the outputs of that group lie between x' and x, as constants. The mean is over
                     all groups and points. This takes 2 L + 1 times as many passes for L layers.

The published code places the points evenly (`points="even"`): at k / steps, with k = 0, ..., steps - 1 for inputs and
k = 1, ..., steps for activations. Gauss-Legendre points, the default, approximate the same integral with a smaller
error.

Shapes: B batch, T position, P nodes that write, E edges.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from circuit_breaking.engine.reader_gradients import reader_gradients
from circuit_breaking.engine.transformer import EdgeMaskedTransformer
from circuit_breaking.errors import UserError
from circuit_breaking.training.attribution import average, line_points
from circuit_breaking.training.mask_gradient import MaskFunction, value_and_gradient

Points = Literal["gauss", "even"]


@dataclass(frozen=True)
class PairedMetric:
    """A metric on a batch of prompts with their counterfactuals.

    Attributes:
        metric: of the mask, for the prompts.
        tokens: of the prompts, int64 [B, T], on the model's device.
        counterfactual: of the counterfactuals, int64 [B, T].
    """

    metric: MaskFunction
    tokens: Tensor
    counterfactual: Tensor


def eap_ig_inputs(
    batches: Iterable[PairedMetric], model: EdgeMaskedTransformer, steps: int = 5, points: Points = "gauss",
    counts: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """EAP-IG over input embeddings: scores of all edges [E], averaged over batches.

    Args:
        batches: metrics with their prompts.
        model: the model whose edges they are; its own ablation values do not matter.
        steps: points on the line of each batch; each is one backward pass.
        points: where the points are; see the module.
        counts: as for `eap`.

    Raises:
        UserError: there is no batch, no step, or a gradient is not finite.
    """
    positions, ones = _positions(steps, points, 0), torch.ones_like(model.mask.weights)

    def scores(batch: PairedMetric) -> Tensor:
        embedded, changes = _changes(model, batch)
        total = torch.zeros_like(ones)
        for position, weight in positions:
            between = embedded - (1 - position) * changes[0]
            with reader_gradients(model, changes, embedded=between):
                total += weight * value_and_gradient(batch.metric, ones)[1]
        return total

    return average((scores(batch) for batch in batches), counts)


def eap_ig_activations(
    batches: Iterable[PairedMetric], model: EdgeMaskedTransformer, steps: int = 5, points: Points = "gauss",
    counts: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """EAP-IG over activations: scores of all edges [E], averaged over batches. Args, raises: as `eap_ig_inputs`."""
    positions, ones = _positions(steps, points, 1), torch.ones_like(model.mask.weights)
    groups = list(_node_groups(model))

    def scores(batch: PairedMetric) -> Tensor:
        _, changes = _changes(model, batch)
        total = torch.zeros_like(ones)
        for group in groups:
            from_group = (model.edge_sources >= group.start) & (model.edge_sources < group.stop)
            for position, weight in positions:
                # edges of this weight carry what lies between the outputs on the counterfactual and on the prompt
                mask = ones.masked_fill(from_group, position)
                with model.resampling(batch.counterfactual), reader_gradients(model, changes, constant=group):
                    total += weight / len(groups) * value_and_gradient(batch.metric, mask)[1]
        return total

    return average((scores(batch) for batch in batches), counts)


def _positions(steps: int, points: Points, first: int) -> list[tuple[float, float]]:
    """Positions between the counterfactual (0) and the prompt (1), and weights that add up to 1."""
    if steps < 1:
        raise UserError(f"integrated gradients over {steps} steps are not possible. Give 1 or more.")
    if points == "gauss":
        return line_points(steps)
    if points != "even":
        raise UserError(f"points are gauss or even, not {points!r}.")
    return [((first + step) / steps, 1 / steps) for step in range(steps)]


@torch.no_grad()
def _changes(model: EdgeMaskedTransformer, batch: PairedMetric) -> tuple[Tensor, Tensor]:
    """Output of `embed` on the prompts [B, T, D], and x - x' of all nodes [P, B, T, D], 0 before `ablate_from`."""
    with model.resampling(batch.tokens):
        outputs = model.counterfactual_outputs
    embedded = model.node_outputs(batch.tokens)[0] if model.ablate_from else outputs[0]
    with model.resampling(batch.counterfactual):
        return embedded, outputs - model.counterfactual_outputs


def _node_groups(model: EdgeMaskedTransformer) -> Iterator[slice]:
    """The nodes whose outputs are interpolated together: `embed`, the heads of each layer, and each MLP."""
    yield slice(0, 1)
    for part in model.graph.layers:
        first, mlp = part.n_earlier_nodes, part.n_earlier_nodes + model.graph.n_heads
        yield slice(first, mlp)
        yield slice(mlp, mlp + 1)
