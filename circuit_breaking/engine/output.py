"""From the last hidden states to logits.

Shapes: B batch, T position, k positions asked for, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from circuit_breaking.runs.devices import without_autocast


def select_positions(hidden: Tensor, at: Tensor) -> Tensor:
    """Of [B, T, D] the positions `at`, [B] or [B, k]: [B, D] or [B, k, D]."""
    batch = torch.arange(len(hidden), device=hidden.device)
    return hidden[batch.view(-1, *[1] * (at.dim() - 1)), at]


class Unembed(torch.autograd.Function):
    """Logits of hidden states with a frozen unembedding, whose backward does not depend on `torch.autocast` either."""

    @staticmethod
    def forward(ctx, hidden: Tensor, unembedding: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(unembedding)
        return F.linear(hidden, unembedding, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        (unembedding,) = ctx.saved_tensors
        with without_autocast(gradient.device):
            return gradient @ unembedding, None, None
