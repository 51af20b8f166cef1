"""Passes whose edges get the gradient of their reader, times a change of their source that is given.

A masked pass gives edge i -> j the gradient of its weight, (x_i - μ_i) · ∂L/∂r_j. Here it is  Δ_i · ∂L/∂r_j  instead,
with changes Δ_i that are the same for every pass, and ∂L/∂r_j taken where the pass is: at other embeddings, or with the
outputs of some nodes replaced by constants. Attribution over inputs and over activations is made of these passes.

Shapes: B batch, T position, N = B * T tokens, P nodes that write, D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuit_breaking.engine.masked_pass import MaskedPass
from circuit_breaking.engine.network import Network
from circuit_breaking.errors import UserError

if TYPE_CHECKING:
    from circuit_breaking.engine.transformer import EdgeMaskedTransformer


@contextmanager
def reader_gradients(
    model: "EdgeMaskedTransformer", changes: Tensor, embedded: Tensor | None = None, constant: slice | None = None
) -> Iterator[None]:
    """Within the block, the gradient of every edge is  Δ_i · ∂L/∂r_j.

    Args:
        model: the model.
        changes: Δ of all nodes [P, B, T, D].
        embedded: output of `embed` [B, T, D] in place of that for the tokens.
        constant: nodes that pass no gradient back to what they read.

    Raises:
        UserError: at a pass without gradient while `embedded` is given, such as one of the original model that a metric
            compares with: it would start from these embeddings too.
    """
    before, rows = model.make_pass, RowsOnDevices(changes.reshape(len(changes), -1))
    embedded = None if embedded is None else embedded.flatten(0, 1)
    model.make_pass = partial(ReaderGradientPass, changes=rows, embedded=embedded, constant=constant)
    try:
        yield
    finally:
        model.make_pass = before


class RowsOnDevices:
    """Rows [P, N * D], of which a device that computes some layers needs those up to its last layer."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self._copies: dict[torch.device, Tensor] = {}

    def of(self, network: Network) -> Tensor:
        """The rows for a network, on its device. They are copied there once."""
        device = network.embedding.device
        if device not in self._copies:
            self._copies[device] = self.rows[: network.n_nodes].to(device)
        return self._copies[device]


class ReaderGradientPass(MaskedPass):
    """The pass of `reader_gradients`; changes are [P, N * D] and `embedded` [N, D].

    Args:
        args: as for `MaskedPass`.
    """

    def __init__(self, *args, changes: RowsOnDevices, embedded: Tensor | None, constant: slice | None) -> None:
        if embedded is not None and not args[3]:
            raise UserError(
                "the metric of EAP-IG runs a pass of the model without gradient, which would start from the "
                "interpolated embeddings too. Compute the predictions that it compares with before."
            )
        self.changes, self.embeddings, self.constant = changes, embedded, constant
        super().__init__(*args[:4])  # without a cache of node outputs, which may differ from the model's own

    def read_mask(self) -> None:
        """Take the edge weights as they are now."""
        super().read_mask()
        if self.constant is not None:
            self.sparse = None  # `begin_backward` changes the matrix of weights

    def embedded(self) -> Tensor:
        """The output of `embed` [N, D]."""
        return super().embedded() if self.embeddings is None else self.embeddings

    def begin_backward(self) -> None:
        """Put the changes in the place of node outputs, which a backward pass reads for nothing but the gradients of
        the edges."""
        self.buffers = replace(self.buffers, node_outputs=self.changes.of(self.network))
        if self.constant is not None:  # a second backward pass, which runs the forward pass again, has new reads
            self.reads.mask = self.mask.clone()
            self.reads.mask[:, self.constant] = 0  # so that no gradient of a reader reaches these nodes
