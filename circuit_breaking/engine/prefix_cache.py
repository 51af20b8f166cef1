"""A cache of node outputs, for many masks that are measured on the same few batches.

Refinement measures masks that differ in one or two edges. The layers before the first differing edge compute the same
for all of them, so their node outputs are loaded from here. Each batch costs the memory of one stack of node outputs.

Shapes: P nodes that write, B batch, T position, N = B * T tokens, D width, E edges.
"""

from dataclasses import replace

import torch
from torch import Tensor

from circuit_breaking.engine.ablation_values import AblationValues, Values
from circuit_breaking.engine.counterfactual import CounterfactualValues, SpreadCounterfactual
from circuit_breaking.engine.network import PassInputs
from circuit_breaking.graph import EdgeGraph


class PrefixCache:
    """Node outputs of batches, each under the first mask that was used with it.

    Attributes:
        counterfactuals: the ablation values of every counterfactual batch that was used.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[PassInputs, Tensor]] = []  # inputs with their mask, node outputs
        self.counterfactuals: list[CounterfactualValues | SpreadCounterfactual] = []
        self._on_devices: dict[int, PrefixCache] = {}

    def on_device(self, number: int) -> "PrefixCache":
        """The cache of one of several devices, by its number."""
        return self._on_devices.setdefault(number, PrefixCache())

    def _find(self, inputs: PassInputs) -> tuple[Tensor, Tensor] | None:
        """Mask and node outputs stored for a batch and its counterfactual, if it has one.

        Both are recognised by their tokens, because each use may bring a copy.
        """
        for kept, node_outputs in self._kept:
            if torch.equal(kept.tokens, inputs.tokens) and _same_values(kept.values, inputs.values):
                return kept.mask, node_outputs
        return None

    def store(self, inputs: PassInputs, node_outputs: Tensor) -> None:
        """Store the node outputs [P, N * D] of a pass, unless its batch is stored already."""
        if self._find(inputs) is None:
            self._kept.append((replace(inputs, mask=inputs.mask.clone()), node_outputs.clone()))

    def load(self, inputs: PassInputs, graph: EdgeGraph, edge_readers: Tensor, node_outputs: Tensor) -> int:
        """Copy the outputs that the mask of a pass leaves unchanged into `node_outputs`.

        Returns:
            The first layer that has to be computed, 0 if the batch is not stored.
        """
        found = self._find(inputs)
        if found is None:
            return 0
        stored_mask, stored_outputs = found
        differing = edge_readers[(inputs.mask != stored_mask).nonzero()[:, 0]]
        layer = int(differing.min()) // (graph.head_readers + 1) if len(differing) else graph.n_layers
        known = graph.layers[layer].n_earlier_nodes if layer < graph.n_layers else len(node_outputs)
        node_outputs[:known] = stored_outputs[:known]
        return layer


def _same_values(one: Values, other: Values) -> bool:
    """Whether two passes have the same ablation values, if those of the model have not changed."""
    if isinstance(one, CounterfactualValues) and isinstance(other, CounterfactualValues):
        return torch.equal(one.tokens, other.tokens)
    return isinstance(one, AblationValues) and isinstance(other, AblationValues)
