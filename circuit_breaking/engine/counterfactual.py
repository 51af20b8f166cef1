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
        outputs: the values [P, N * D].
        biases: what a node writes whatever it reads, [P, 1, D].
        n_read: how many nodes each of the R readers reads.
    """

    tokens: Tensor
    outputs: Tensor
    biases: Tensor
    n_read: tuple[int, ...]

    @classmethod
    @torch.no_grad()
    def of(
        cls, network: Network, tokens: Tensor, rotary: Rotary | None, biases: Tensor, ablate_from: int
    ) -> "CounterfactualValues":
        """The values for counterfactual texts [B, T], by a forward pass of the whole model."""
        outputs = whole_outputs(network, tokens, rotary)
        outputs.view(len(outputs), *tokens.shape, -1)[:, :, :ablate_from] = 0
        return cls(tokens.clone(), outputs.flatten(1), biases, tuple(network.n_read.tolist()))

    def start(self, rows: Tensor, nodes: slice, batch: int, length: int) -> None:
        """As `Values`."""
        rows = rows.view(rows.shape[0], -1, self.biases.shape[-1])
        torch.sub(self.biases[nodes], self.outputs[nodes].view_as(rows), out=rows)

    def sums(self, batch: int, length: int) -> "RunningSums":
        """As `Values`."""
        return RunningSums(self.outputs, self.n_read)


class RunningSums:
    """The `Sums` of values that differ from text to text, one at a time: a table of all of them would be large.

    Args:
        outputs: the ablation values [P, N * D].
        n_read: how many nodes each of the R readers reads.
    """

    def __init__(self, outputs: Tensor, n_read: tuple[int, ...]) -> None:
        self.outputs, self.n_read = outputs, n_read
        dtype = torch.promote_types(outputs.dtype, torch.float32)  # as the running sum of node outputs in `reads`
        self.sum, self.n_summed = torch.zeros_like(outputs[0], dtype=dtype), 0

    def write(self, out: Tensor, first_reader: int, plus: Tensor | None = None) -> None:
        """As `Sums`."""
        counts = self.n_read[first_reader : first_reader + len(out)]
        start = 0
        while start < len(counts):  # readers that read the same nodes: the heads of a layer, or its MLP
            end = start + counts[start:].count(counts[start])
            self._sum_up_to(counts[start])
            if plus is None:
                out[start] = self.sum
            else:
                torch.add(self.sum, plus, out=out[start])
            out[start + 1 : end] = out[start]
            start = end

    def add_early(self, early: Tensor, first_reader: int) -> None:
        """Nothing to add: before `ablate_from` the values are zero."""

    def _sum_up_to(self, count: int) -> None:
        assert count >= self.n_summed, "readers ask in their order"
        self.sum += self.outputs[self.n_summed : count].sum(0, dtype=self.sum.dtype)
        self.n_summed = count
