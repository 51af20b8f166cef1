"""Modules of ablated models whose norms are not all before attention and the MLP (Gemma 2 and 3, OLMo 2).

    norms after         divide what is added to each part of the hidden state by what the norm of the stream divides by,
                        which is what the heads of the layer share (`SharedNorm`)
    attention, MLP      take their reads themselves where no norm before them does (`PartReader`)
    norms of keys       of all heads together, once those no longer share keys (`SeparateKeyNorm`)

`modules` explains the parts. Shapes: D width, S parts of a layer's hidden state, n parts that are read, H heads, G keys
that they share, K head width.
"""

import torch
from torch import Tensor, nn

from circuit_breaking.ablation.modules import own_parts


class PartReader:
    """Attention or an MLP without a norm before it: [..., S * D] -> what it computes from its n parts."""

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        return super().forward(own_parts(self, hidden_states).flatten(-2), *args, **kwargs)


class SharedNorm:
    """The norm after attention or the MLP: [..., S * D] -> [..., S * D]."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        parts = hidden_states.unflatten(-1, (-1, self.edge_cuts_d))
        return _divided(self, parts, parts[..., :1, :]).flatten(-2)


class SeparateKeyNorm:
    """The norm of all keys of a layer together, where each query head has its own: [..., H * K] -> [..., H * K]."""

    def forward(self, keys: Tensor) -> Tensor:
        return _divided(self, keys, keys, keys.shape[-1] // len(self.weight))


def _divided(norm: nn.Module, x: Tensor, total: Tensor, repeats: int = 1) -> Tensor:
    """x [..., any, D] divided by the root mean square of `total` [..., 1, D], times the gain of an RMSNorm.

    It is computed in float32, as in Hugging Face's module. Each block of K gains counts `repeats` times.
    """
    inverse = torch.rsqrt(total.float().square().mean(-1, keepdim=True) + norm.edge_cuts_eps)
    gain = norm.weight.float() + norm.edge_cuts_offset
    if repeats > 1:
        gain = gain.unflatten(0, (-1, norm.edge_cuts_width)).repeat_interleave(repeats, 0).flatten()
    return (x.float() * inverse * gain).to(x.dtype)
