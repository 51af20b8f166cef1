"""Attention of one layer: rotary positions, and softmax(scale · q kᵀ) v under a causal mask.

Shapes: B batch, T position, H heads, K head width, r rotated components of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None, softcap: float | None = None
) -> Tensor:
    """The attention-weighted values of every head: [B, H, T, K].

    Args:
        q, k, v: queries, keys and values, [B, H, T, K].
        scale: factor of the attention scores.
        window: how many tokens a token attends to at most, itself included; None for all before it.
        softcap: c, if scores are capped to c · tanh(scores / c).
    """
    length = q.shape[2]
    if softcap is not None:  # which no fused kernel computes
        scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap))
        scores = scores.masked_fill(~visible(length, window, q.device), float("-inf"))
        return scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ v
    if window is None or window >= length:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible(length, window, q.device), scale=scale)


def visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """Which tokens (columns) a token (row) attends to: bool [T, T]."""
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return causal if window is None else causal.triu(1 - window)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embedding (Su et al. 2021) in Llama's layout to x [..., T, K], with cos and sin [T, r].

    Only the first r components are rotated (r < K in GPT-NeoX).
    """
    turned = x[..., : cos.shape[-1]]
    first, second = turned.chunk(2, -1)
    # OLMo 2 has its tables in float32 whatever the model's type, and rotates in that
    turned = (turned * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)
    return turned if turned.shape == x.shape else torch.cat((turned, x[..., cos.shape[-1] :]), -1)
