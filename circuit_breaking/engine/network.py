"""What one pass is given: the frozen network, the inputs of this batch, and memory to work in.

Shapes: B batch, T position, N = B * T tokens, P nodes that write, R readers, H heads, D width, K head width, F width of
the MLP, V vocabulary, E edges.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from circuit_breaking.engine.ablation_values import Values
from circuit_breaking.engine.norms import NormedProjection, OutputNorm, PlainProjection
from circuit_breaking.graph import EdgeGraph, LayerSlice

Rotary = tuple[Tensor, Tensor]  # cos and sin [kinds, T, r] of the rotary position embedding, r <= K

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
        attention_out_norm, mlp_out_norm: norms of what all heads, and the MLP, write; or None.
    """

    qkv: NormedProjection | PlainProjection
    w_o: Tensor
    b_o: Tensor
    w_down: Tensor
    b_down: Tensor
    attention_out_norm: OutputNorm | None
    mlp_out_norm: OutputNorm | None

    def attention(self, qkv: Tensor, batch: int, rotary: Rotary | None) -> Tensor:
        """Attention-weighted values of every head [H, N, K]."""

    def mlp(self, read: Tensor) -> Tensor:
        """Hidden activations of the MLP: [N, D] -> [N, F]."""


@dataclass(frozen=True)
class Network:
    """The frozen parts of a model that a pass computes with, and where its edges lie.

    Attributes:
        graph: nodes and edges.
        groups: the layers, in groups that are read in one product (`layer_groups`). On one of several devices, only the
            layers that it computes (`device_map`).
        blocks: one `LayerBlock` a layer.
        embedding: token embeddings [V, D], [0, D] on a device that embeds no tokens; its type and device are those of
            the network. positions: learned position embeddings [max T, D], or None.
        embedding_scale: factor of the token embeddings.
        edge_readers, edge_sources: index of each edge's reader and source, int64 [E].
        n_read: how many nodes each reader reads, int64 [R].
        gradient_checkpointing: compute attention and MLP again in the backward instead of keeping their activations.
    """

    graph: EdgeGraph
    groups: list["LayerGroup"]
    blocks: Sequence[LayerBlock]
    embedding: Tensor
    positions: Tensor | None
    embedding_scale: float
    edge_readers: Tensor
    edge_sources: Tensor
    n_read: Tensor
    gradient_checkpointing: bool = False

    @property
    def n_nodes(self) -> int:
        """How many nodes write in these layers and before them: P, on the last device."""
        return self.groups[-1].end_node if self.groups else 1

    @property
    def first_node(self) -> int:
        """Index of the first node of these layers. On the first device, `embed` comes before it."""
        return self.groups[0].parts[0].n_earlier_nodes if self.groups else 1

    @property
    def first_reader(self) -> int:
        """Index of the first reader of these layers: 0, on the first device."""
        return self.groups[0].parts[0].first_reader if self.groups else 0

    def embed(self, tokens: Tensor) -> Tensor:
        """The output of `embed` [N, D] for tokens [B, T]: token embeddings, and learned positions if there are any."""
        embedding = F.embedding(tokens, self.embedding)
        if self.embedding_scale != 1:
            embedding *= self.embedding_scale
        if self.positions is not None:
            embedding += self.positions[: tokens.shape[1]]
        return embedding.flatten(0, 1)

    def mask_matrix(self, weights: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Edge weights [E] as a matrix [R, P], zero where there is no edge; all zeros without weights.

        Of the type of the network unless another `dtype` is given.
        """
        matrix = self.embedding.new_zeros(len(self.graph.readers), len(self.graph.sources), dtype=dtype)
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
        ablate_from: first position at which cuts act.
    """

    tokens: Tensor
    mask: Tensor
    values: Values
    rotary: Rotary | None
    ablate_from: int = 0


@dataclass(frozen=True)
class LayerGroup:
    """Consecutive layers whose readers are served by one product.

    Attributes:
        parts: the layers. On one of several devices, those of the group that it computes.
        first: number of the first of `parts`.
        first_node, end_reader: the first node, and the reader after the last one, of the whole group.
        end_node: the node after the last one of `parts`.
    """

    parts: list[LayerSlice]
    first: int
    first_node: int
    end_reader: int
    end_node: int


def layer_groups(graph: EdgeGraph, layers: range | None = None) -> list[LayerGroup]:
    """The layers of a graph, in groups whose readers are served by one product.

    With `layers`, only those of the same groups, so that sums are added in the same order whichever device computes
    which layer.
    """
    size, layers = max(GROUP_LAYERS, GROUP_NODES // (graph.n_heads + 1)), layers or range(graph.n_layers)
    groups = []
    for start in range(0, graph.n_layers, size):
        whole = graph.layers[start : start + size]
        first, end = max(start, layers.start), min(start + size, layers.stop)
        if first < end:
            last = graph.layers[end - 1]
            groups.append(
                LayerGroup(
                    graph.layers[first:end], first, whole[0].n_earlier_nodes,
                    whole[-1].first_reader + whole[-1].n_readers, last.n_earlier_nodes + graph.n_heads + 1,
                )
            )  # fmt: skip
    return groups


def rotary_tables(
    rotary: nn.Module, kinds: Sequence[str | None], like: Tensor, length: int, device: torch.device
) -> Rotary:
    """cos and sin [kinds, T, r] of Hugging Face's module for the first T positions, of the type of `like`."""
    ids = torch.arange(length, device=device)[None]
    cos, sin = zip(*(rotary(like, ids, *([] if kind is None else [kind])) for kind in kinds), strict=True)
    return torch.cat(cos), torch.cat(sin)


class Workspace:
    """A block of memory that one pass after another uses.

    On a CPU fresh pages cost as much time as what is written to them, so the block of a finished pass serves the next.
    """

    def __init__(self) -> None:
        self.free: Tensor | None = None

    def take(self, count: int, like: Tensor) -> Tensor:
        """At least `count` uninitialised numbers of the type of `like`, which nobody else uses until `give_back`."""
        free, self.free = self.free, None
        if free is None or len(free) < count or free.dtype != like.dtype or free.device != like.device:
            return like.new_empty(count)
        return free

    def give_back(self, memory: Tensor) -> None:
        """Take back a block from `take`. (GPU memory goes back to torch, which reuses it at no cost.)"""
        if memory.device.type == "cpu":
            self.free = memory


@dataclass(frozen=True)
class PassBuffers:
    """The buffers of one pass, all views of one block of memory. `masked_pass` has the table of their life.

    Attributes:
        memory: the block.
        node_outputs: what each node writes, less its ablation value: [P, N * D]; on one of several devices, of the
            nodes up to its last layer.
        node_outputs_3d: the same memory as [P, N, D].
        reader_inputs: what each reader gets, [R, N * D]; on one of several devices, from its first layer on. Without a
            backward only the readers of one group of layers.
        grad_scratch: gradients of the nodes of one group of layers, [nodes of a group, N * D]; empty without a
            backward.
    """

    memory: Tensor
    node_outputs: Tensor
    node_outputs_3d: Tensor
    reader_inputs: Tensor
    grad_scratch: Tensor

    @classmethod
    def take(cls, workspace: Workspace, network: Network, tokens: Tensor, backward: bool) -> Self:
        """Buffers for a pass over `tokens` [B, T]; `backward` says whether a backward will follow."""
        graph, like = network.graph, network.embedding
        width, row = like.shape[1], tokens.numel() * like.shape[1]
        layers_per_group = max((len(group.parts) for group in network.groups), default=0)
        nodes = network.n_nodes
        readers = len(graph.readers) - network.first_reader if backward else layers_per_group * (graph.head_readers + 1)
        scratch = layers_per_group * (graph.n_heads + 1) if backward else 0
        rows = nodes + readers + scratch
        memory = workspace.take(rows * row, like)
        node_outputs, reader_inputs, grad_scratch = (
            memory[: rows * row].view(rows, row).split([nodes, readers, scratch])
        )
        return cls(memory, node_outputs, node_outputs.view(nodes, -1, width), reader_inputs, grad_scratch)
