"""What engine, stock model and ablated model have in common: the interface that tasks and losses use.

Shapes: B texts, T positions, D width, V vocabulary, E edges.
"""

from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from circuit_breaking.models.families.spec import Head


class CausalModel(Protocol):
    """A causal language model whose last hidden state and unembedding can be read separately."""

    unembedding: Tensor  # [V, D]
    unembedding_bias: Tensor | None  # [V]
    head: Head | None  # what makes logits of the product of hidden state and unembedding; None if that is not known
    resample: bool  # cut edges carry their source's output on the counterfactual of a prompt (see `resampling`)
    plain_head: bool  # logits are the product of hidden state and unembedding: neither scaled nor capped afterwards

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        ...

    def resampling(self, counterfactual: Tensor) -> AbstractContextManager[None]:
        """Within the block, cut edges carry what their source writes on counterfactual tokens [B, T]."""
        ...

    def hidden(self, tokens: Tensor, at: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Last hidden state, after the final norm: [B, T, D], or [B, D] / [B, k, D] with `at`."""
        ...

    def __call__(self, tokens: Tensor, at: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Next-token logits.

        Args:
            tokens: int64 [B, T], padded on the right if at all.
            at: positions whose logits are wanted, int64 [B] or [B, k]; all by default.
            mask: mask weights [E], for models with an edge mask.

        Returns:
            [B, T, V], or [B, V] / [B, k, V] with `at`.
        """
        ...
