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

from torch import Tensor

from circuit_breaking.engine.masked_pass import MaskedPass
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
    before, rows = model.make_pass, changes.reshape(len(changes), -1)
    embedded = None if embedded is None else embedded.flatten(0, 1)
    model.make_pass = partial(ReaderGradientPass, changes=rows, embedded=embedded, constant=constant)
    try:
        yield
    finally:
        model.make_pass = before


class ReaderGradientPass(MaskedPass):
    """The pass of `reader_gradients`; changes are [P, N * D] and `embedded` [N, D].

    Args:
        args: as for `MaskedPass`.
    """

    def __init__(self, *args, changes: Tensor, embedded: Tensor | None, constant: slice | None) -> None:
        if embedded is not None and not args[3]:
            raise UserError(
                "the metric of EAP-IG runs a pass of the model without gradient, which would start from the "
                "interpolated embeddings too. Compute the predictions that it compares with before."
            )
        self.changes, self.embedded, self.constant = changes, embedded, constant
        super().__init__(*args[:4])  # without a cache of node outputs, which may differ from the model's own

    def read_mask(self) -> None:
        """Take the edge weights as they are now."""
        super().read_mask()
        if self.constant is not None:
            self.sparse = None  # `backward` changes the matrix of weights

    def _embed(self, nodes: Tensor) -> None:
        if self.embedded is None:
            super()._embed(nodes)
        else:
            self._fill(nodes[:1], slice(0, 1))
            nodes[0] += self.embedded

    def backward(self, gradient: Tensor, constants: bool) -> tuple[Tensor, Tensor | None]:
        """As `MaskedPass.backward`, which reads node outputs for nothing but the gradients of the edges."""
        if self.buffers is None:
            self.forward()
        self.buffers = replace(self.buffers, node_outputs=self.changes)
        if self.constant is not None:
            whole, self.mask = self.mask, self.mask.clone()
            self.mask[:, self.constant] = 0  # so that no gradient of a reader reaches these nodes
            self.reads.mask = self.mask
            try:
                return super().backward(gradient, constants)
            finally:
                self.mask = whole  # for a second backward, which runs the forward pass again
        return super().backward(gradient, constants)
