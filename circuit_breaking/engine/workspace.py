"""Memory of the engine's passes: one block, handed from pass to pass, and the buffers that a pass makes of it.

Shapes: N tokens of a batch (B texts of T positions), P nodes that write, R readers, D width.
"""

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from circuit_breaking.graph import EdgeGraph


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
        node_outputs: what each node writes, less its ablation value: [P, N * D].
        node_outputs_3d: the same memory as [P, N, D].
        reader_inputs: what each reader gets, [R, N * D]; without a backward only the readers of one group of layers.
        grad_scratch: gradients of the nodes of one group of layers, [nodes of a group, N * D]; empty without a
            backward.
    """

    memory: Tensor
    node_outputs: Tensor
    node_outputs_3d: Tensor
    reader_inputs: Tensor
    grad_scratch: Tensor

    @classmethod
    def take(
        cls, workspace: Workspace, graph: EdgeGraph, layers_per_group: int, tokens: Tensor, like: Tensor, backward: bool
    ) -> Self:
        """Buffers for a pass over `tokens` [B, T]; `like` [V, D] says width, type and device.

        `backward` says whether a backward will follow.
        """
        width, row = like.shape[1], tokens.numel() * like.shape[1]
        nodes = len(graph.sources)
        readers = len(graph.readers) if backward else layers_per_group * (graph.head_readers + 1)
        scratch = layers_per_group * (graph.n_heads + 1) if backward else 0
        rows = nodes + readers + scratch
        memory = workspace.take(rows * row, like)
        node_outputs, reader_inputs, grad_scratch = (
            memory[: rows * row].view(rows, row).split([nodes, readers, scratch])
        )
        return cls(memory, node_outputs, node_outputs.view(nodes, -1, width), reader_inputs, grad_scratch)


def fill_rows(rows: Tensor, constants: Tensor, batch: int, length: int) -> None:
    """Set `rows` [k, N, D] or [k, N * D] to `constants` [k, 1 or max T, D], which may differ by position."""
    rows = rows.view(rows.shape[0], batch, length, constants.shape[-1])
    rows.copy_(constants[:, None, :length])
