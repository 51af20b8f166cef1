"""What one pass is given: the frozen network, and the inputs of this one batch.

Shapes: B batch, T position, N = B * T tokens, P nodes that write, R readers, H heads, D width, K head width, F width of
the MLP, V vocabulary, E edges.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from circuit_breaking.engine.ablation_values import AblationValues
from circuit_breaking.engine.norms import NormedProjection
from circuit_breaking.graph import EdgeGraph, LayerSlice

Rotary = tuple[Tensor, Tensor]  # cos and sin [T, K]

# Layers whose readers get all earlier nodes from one matrix product, and whose nodes collect the gradients of all later
# readers in one: four layers, or more where they are narrow. Products with that many rows run at full speed, and their
# results stay small beside the node outputs.
GROUP_LAYERS, GROUP_NODES = 4, 52


class LayerBlock(Protocol):
    """What one layer computes from what its readers get, up to its two output projections, which the pass applies.

    Attributes:
        qkv: the norm before attention and the projections to queries, keys and values.
        w_o: output projection of every head [H, K, D]; b_o: each head's share of its bias [D].
        w_down: output projection of the MLP [F, D]; b_down: its bias [D].
    """

    qkv: NormedProjection
    w_o: Tensor
    b_o: Tensor
    w_down: Tensor
    b_down: Tensor

    def attention(self, qkv: Tensor, batch: int, rotary: Rotary | None) -> Tensor:
        """Attention-weighted values of every head [H, N, K]."""

    def mlp(self, read: Tensor) -> Tensor:
        """Hidden activations of the MLP: [N, D] -> [N, F]."""


@dataclass(frozen=True)
class Network:
    """The frozen parts of a model that a pass computes with, and where its edges lie.

    Attributes:
        graph: nodes and edges.
        groups: the layers, in groups that are read in one product (`layer_groups`).
        blocks: one `LayerBlock` a layer.
        embedding: token embeddings [V, D]; positions: learned position embeddings [max T, D], or None.
        edge_readers, edge_sources: index of each edge's reader and source, int64 [E].
        n_read: how many nodes each reader reads, int64 [R].
        gradient_checkpointing: compute attention and MLP again in the backward instead of keeping their activations.
    """

    graph: EdgeGraph
    groups: list[list[LayerSlice]]
    blocks: Sequence[LayerBlock]
    embedding: Tensor
    positions: Tensor | None
    edge_readers: Tensor
    edge_sources: Tensor
    n_read: Tensor
    gradient_checkpointing: bool = False

    def mask_matrix(self, weights: Tensor | None = None) -> Tensor:
        """Edge weights [E] as a matrix [R, P], zero where there is no edge; all zeros without weights."""
        matrix = self.embedding.new_zeros(len(self.graph.readers), len(self.graph.sources))
        if weights is not None:
            matrix[self.edge_readers, self.edge_sources] = weights
        return matrix


@dataclass(frozen=True)
class PassInputs:
    """What differs from pass to pass.

    Attributes:
        tokens: int64 [B, T].
        mask: edge weights [E], without gradient.
        values: what cut edges carry.
        rotary: cos and sin of rotary position embeddings, or None.
    """

    tokens: Tensor
    mask: Tensor
    values: AblationValues
    rotary: Rotary | None


def layer_groups(graph: EdgeGraph) -> list[list[LayerSlice]]:
    """The layers of a graph, in groups whose readers are served by one product."""
    size = max(GROUP_LAYERS, GROUP_NODES // (graph.n_heads + 1))
    return [graph.layers[start : start + size] for start in range(0, graph.n_layers, size)]
