"""Checks of what the edge-masked transformer is given.

Shapes: B batch, T position, P nodes that write, D width, k positions asked for.
"""

import torch
from torch import Tensor

from circuit_breaking.errors import UserError


def check_tokens(tokens: Tensor, max_positions: int) -> None:
    """Raise a `UserError` unless `tokens` are integers [B, T] that fit the model's positions."""
    if tokens.dim() != 2 or tokens.is_floating_point() or not tokens.numel():
        raise UserError(f"tokens are a batch of at least one text, int64 [B, T], not {list(tokens.shape)}.")
    if tokens.shape[1] > max_positions:
        raise UserError(f"{tokens.shape[1]} tokens are more than the model's {max_positions} positions.")


def check_reached(means: Tensor, tokens: Tensor) -> None:
    """Raise a `UserError` if means by position [T', P, D] do not reach to the end of tokens [B, T]."""
    if tokens.shape[1] > len(means):
        raise UserError(
            f"the means are per position for {len(means)} positions and the text has {tokens.shape[1]}. "
            "Compute them for longer texts or use plain means."
        )


def check_counterfactual(tokens: Tensor, counterfactual: Tensor) -> None:
    """Raise a `UserError` unless a batch and its counterfactual have the same shape and device."""
    if tokens.shape != counterfactual.shape or tokens.device != counterfactual.device:
        raise UserError(
            f"the batch has tokens {list(tokens.shape)} on {tokens.device}, and its counterfactual "
            f"{list(counterfactual.shape)} on {counterfactual.device}. Give `resampling` one counterfactual text for "
            "each text, with the same number of tokens, on the same device."
        )


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


def check_inputs(
    tokens: Tensor, counterfactual: Tensor | None, means: Tensor | None, at: Tensor | None, mask: Tensor | None,
    attention_mask: Tensor | None, n_edges: int,
) -> None:  # fmt: skip
    """Raise a `UserError` unless what a model with E edges is given fits tokens [B, T], which are checked already."""
    if counterfactual is not None:
        check_counterfactual(tokens, counterfactual)
    elif means is not None and means.dim() == 3:
        check_reached(means, tokens)
    if at is not None:
        check_positions(at, tokens)
    if mask is not None and mask.shape != (n_edges,):
        raise UserError(f"a mask has one weight for each of the {n_edges:,} edges, not {list(mask.shape)}.")
    if attention_mask is not None:
        check_right_padding(attention_mask, tokens)
