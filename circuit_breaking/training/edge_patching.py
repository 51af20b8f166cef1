"""Exact activation patching of single edges: the judge of attribution, for models and prompts that allow it.

The effect of an edge is F(whole model) - F(model with this edge alone cut), what keeping it adds. Attribution scores
are estimates of it.

Shapes: B batch, M = n * B rows (n copies of the batch, each with another edge cut), D width, V vocabulary, E edges.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from circuit_breaking.engine.output import select_positions
from circuit_breaking.engine.single_edges import SingleEdges
from circuit_breaking.engine.transformer import EdgeMaskedTransformer
from circuit_breaking.runs.devices import without_autocast
from circuit_breaking.runs.progress import progress_bar

# logits [M, V] at the positions asked for, and the row of the batch that each belongs to, int64 [M] -> metric [M]
RowMetric = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def edge_effects(
    model: EdgeMaskedTransformer, tokens: Tensor, at: Tensor, metric: RowMetric, edges_at_once: int = 32,
    progress: bool = False,
) -> Tensor:  # fmt: skip
    """Effects of all edges on the mean of a metric over a batch: [E].

    It takes a forward pass for each edge, from the layer of its reader on. Inside `model.resampling`, cut edges carry
    outputs on the counterfactual batch.

    Args:
        model: the model; its mask does not matter, its ablation values do.
        tokens: int64 [B, T].
        at: the position of each text whose logits the metric needs, int64 [B].
        metric: of logits.
        edges_at_once: how many copies of the batch are run together.
        progress: whether to show a progress bar.
    """
    rows = torch.arange(len(tokens), device=tokens.device)

    def means(hidden: Tensor) -> Tensor:
        """The mean metric for final hidden states [n, B, T, D]: [n]."""
        ends = select_positions(hidden.flatten(0, 1), at.repeat(len(hidden)))
        return metric(model.unembed(ends), rows.repeat(len(hidden))).view(len(hidden), -1).mean(1)

    with without_autocast(model.device):
        single = SingleEdges(model, tokens)
        effects = torch.empty_like(model.mask.weights)
        whole = means(single.whole()[None])
        with progress_bar(total=len(effects), shown=progress, desc="edges", unit="edge") as bar:
            for edges, hidden in single.cut(edges_at_once):
                effects[edges] = (whole - means(hidden)).to(effects.dtype)
                bar.update(len(hidden))
    return effects
