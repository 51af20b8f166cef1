"""Counterfactual ablation values: what a node writes on another text, position by position (resample ablation).

A cut edge then carries μ_i = x_i(counterfactual), the output of its source in the whole model on a counterfactual text
of the same length. This is the ablation of path patching (Goldowsky-Dill et al. 2023) and of the circuit track of MIB,
and "patching" in the code of ACDC, auto-circuit and EAP-IG.

Shapes: B batch, T position, N = B * T tokens, P nodes that write, R readers, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from circuit_breaking.engine.network import Network, Rotary
from circuit_breaking.engine.whole import whole_outputs


@dataclass(frozen=True)
class CounterfactualValues:
    """The ablation values μ of all nodes for every token of one batch.

    At positions before `ablate_from`, where no cut acts, the values are zero.

    Attributes:
        tokens: the counterfactual texts, int64 [B, T].
        outputs: the values [P, N * D]; on one of several devices, of the nodes that write there.
        biases: what a node writes whatever it reads, [P, 1, D].
        n_read: how many nodes each of the R readers reads.
        first_node: the node of the first row of `outputs`.
        before: the sum of the values of all nodes before it [N * D]; None if there are none.
    """

    tokens: Tensor
    outputs: Tensor
    biases: Tensor
    n_read: tuple[int, ...]
    first_node: int = 0
    before: Tensor | None = None

    @classmethod
    def of(
        cls, network: Network, tokens: Tensor, rotary: Rotary | None, biases: Tensor, ablate_from: int
    ) -> "CounterfactualValues":
        """The values for counterfactual texts [B, T], by a forward pass of the whole model."""
        return cls.and_stream(network, tokens, rotary, biases, ablate_from)[0]

    @classmethod
    @torch.no_grad()
    def and_stream(
        cls, network: Network, tokens: Tensor, rotary: Rotary | None, biases: Tensor, ablate_from: int,
        stream: Tensor | None = None, before: Tensor | None = None,
    ) -> tuple["CounterfactualValues", Tensor]:  # fmt: skip
        """The values for the nodes of a network, and the residual stream after them [N, D].

        `stream` and `before` are for every device but the first of several: the residual stream, and the sum of the
        values, before its layers.
        """
        outputs, after = whole_outputs(network, tokens, rotary, stream)
        outputs.view(len(outputs), *tokens.shape, -1)[:, :, :ablate_from] = 0
        first, n_read = 0 if stream is None else network.first_node, tuple(network.n_read.tolist())
        return cls(tokens.clone(), outputs.flatten(1), biases, n_read, first, before), after

    def start(self, rows: Tensor, nodes: slice, batch: int, length: int) -> None:
        """As `Values`."""
        rows = rows.view(rows.shape[0], -1, self.biases.shape[-1])
        outputs = self.outputs[nodes.start - self.first_node : nodes.stop - self.first_node]
        torch.sub(self.biases[nodes], outputs.view_as(rows), out=rows)

    def sums(self, batch: int, length: int) -> "RunningSums":
        """As `Values`."""
        return RunningSums(self.outputs, self.n_read, self.first_node, self.before)

    def total(self) -> Tensor:
        """The sum of the values of all nodes up to the last row [N * D], added in the order of a forward pass."""
        sums, end = self.sums(*self.tokens.shape), self.first_node + len(self.outputs)
        for count in sorted({n for n in self.n_read if self.first_node < n <= end}):
            sums.sum_up_to(count)
        return sums.sum


class RunningSums:
    """The `Sums` of values that differ from text to text, one at a time: a table of all of them would be large.

    Args:
        outputs: the ablation values [P, N * D], or those from `first_node` on.
        n_read: how many nodes each of the R readers reads.
        before: the sum of the values of the nodes before `first_node` [N * D].
    """

    def __init__(
        self, outputs: Tensor, n_read: tuple[int, ...], first_node: int = 0, before: Tensor | None = None
    ) -> None:
        self.outputs, self.n_read, self.first_node = outputs, n_read, first_node
        dtype = torch.promote_types(outputs.dtype, torch.float32)  # as the running sum of node outputs in `reads`
        self.sum = torch.zeros_like(outputs[0], dtype=dtype) if before is None else before.clone()
        self.n_summed = first_node

    def write(self, out: Tensor, first_reader: int, plus: Tensor | None = None) -> None:
        """As `Sums`."""
        counts = self.n_read[first_reader : first_reader + len(out)]
        start = 0
        while start < len(counts):  # readers that read the same nodes: the heads of a layer, or its MLP
            end = start + counts[start:].count(counts[start])
            self.sum_up_to(counts[start])
            if plus is None:
                out[start] = self.sum
            else:
                torch.add(self.sum, plus, out=out[start])
            out[start + 1 : end] = out[start]
            start = end

    def add_early(self, early: Tensor, first_reader: int) -> None:
        """Nothing to add: before `ablate_from` the values are zero."""

    def sum_up_to(self, count: int) -> None:
        """Add the values of the next nodes, up to the first `count` of all."""
        assert count >= self.n_summed, "readers ask in their order"
        rows = self.outputs[self.n_summed - self.first_node : count - self.first_node]
        self.sum += rows.sum(0, dtype=self.sum.dtype)
        self.n_summed = count


@dataclass(frozen=True)
class SpreadCounterfactual:
    """Counterfactual ablation values of a model whose layers are on several devices.

    Attributes:
        tokens: the counterfactual texts, int64 [B, T].
        parts: the values of the nodes that write on each device.
    """

    tokens: Tensor
    parts: tuple[CounterfactualValues, ...]

    @property
    def outputs(self) -> Tensor:
        """The values of all nodes [P, N * D], copied to the device of the tokens."""
        return torch.cat([part.outputs.to(self.tokens.device) for part in self.parts])
