"""How much each edge of a mask matters, by integrated mask gradients between the mask and a whole or an empty model."""

from collections.abc import Sequence

import torch

from circuit_breaking.engine.transformer import EdgeMaskedTransformer
from circuit_breaking.runs.ioi_results import GraphRecord
from circuit_breaking.training.attribution import integrated_mask_gradients
from circuit_breaking.training.mask_gradient import MaskFunction

STEPS = 20  # points of integrated gradients; where a mask changes much, 5 leave more than a tenth of the change out


def graph_of_mask(
    model: EdgeMaskedTransformer, metrics: Sequence[MaskFunction], measure: str, kept: bool = False
) -> GraphRecord:
    """The edges that the model's binary mask cuts or, with `kept`, keeps, and the importance of each.

    The importance of an edge is its share of the change of a metric (integrated mask gradients) between the mask and
    the whole model or, with `kept`, between the model with all edges cut and the mask.

    Args:
        model: the model; its mask stays as it is.
        metrics: the metric on each batch, as a function of the mask.
        measure: what the metric is, for the pictures.
        kept: whether the mask is a sufficient circuit.
    """
    mask, what = model.mask.weights.detach().clone(), "kept" if kept else "cut"
    chosen = ((mask >= 0.5) == kept).nonzero()[:, 0].tolist()
    if not chosen:
        return GraphRecord.of(model.graph, {}, what, measure)
    none, whole = torch.zeros_like(mask), torch.ones_like(mask)
    line = {"start": none, "end": mask} if kept else {"start": mask, "end": whole}
    scores = integrated_mask_gradients(metrics, model, steps=STEPS, **line).tolist()
    edges = {model.graph.edges[index]: scores[index] for index in chosen}
    return GraphRecord.of(model.graph, edges, what, measure)
