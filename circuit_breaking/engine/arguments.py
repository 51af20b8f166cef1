"""Checks of what the edge-masked transformer is given beside its tokens.

Shapes: B batch, T position, k positions asked for.
"""

import torch
from torch import Tensor

from circuit_breaking.errors import UserError


def check_positions(at: Tensor, tokens: Tensor) -> None:
    """Raise a `UserError` unless `at` is int64 [B] or [B, k], or if it is an attention mask of tokens [B, T]."""
    if at.dtype != torch.int64 or at.dim() not in (1, 2) or len(at) != len(tokens):
        raise UserError(f"`at` holds positions, int64 [B] or [B, k], not {at.dtype} {list(at.shape)}.")
    if at.shape == tokens.shape and at.shape[1] > 1 and bool(((at == 0) | (at == 1)).all()):
        raise UserError("`at` holds positions, and this looks like an attention mask. Pass it as `attention_mask=`.")


def check_right_padding(attention_mask: Tensor, tokens: Tensor) -> None:
    """Raise a `UserError` unless an attention mask [B, T] has, in every row, ones and then only zeros."""
    if attention_mask.shape != tokens.shape:
        raise UserError(f"an attention mask has the shape of the tokens, {list(tokens.shape)}, or is left out.")
    on = attention_mask != 0
    if not bool(on[:, 0].all()) or bool((on[:, 1:] & ~on[:, :-1]).any()):
        raise UserError(
            "the attention mask hides tokens before others. Pad texts on the right (tokenizer.padding_side = 'right')."
        )


def check_ablate_from(value: int) -> None:
    """Raise a `UserError` unless `value` is a position: an int of at least 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UserError(f"ablate_from is {value!r}; give the first position at which cuts act: 0, 1, 2, ...")
