"""At which positions of a forward pass cuts act, if they act from some position on (`ablate_from`).

A position is counted from the first token of its text: padding on the left does not count, and tokens in the KV cache
do. Nothing is remembered between passes; positions come from what the model is called with.

Shapes: B batch, T new tokens, L tokens in the cache.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from circuit_breaking.errors import UserError

CACHE_NAMES = ("cache", "past_key_values")  # under which transformers hands a KV cache on


def ablated_positions(given: Mapping[str, Any], ablate_from: int) -> Tensor:
    """Whether cuts act at each new token: bool [B, T] or [1, T].

    Args:
        given: the arguments of a model without its head, as Hugging Face names them.
        ablate_from: the first position at which they do.
    """
    return positions_of(given) >= ablate_from


def positions_of(given: Mapping[str, Any]) -> Tensor:
    """The positions of the new tokens in their texts: [B, T] or [1, T]; negative for padding on the left.

    An attention mask [B, L + T] counts, as does `position_ids`; of both, the smaller position. So a text that starts
    after padding begins at 0 although `position_ids` count the padding, and so does each of several texts in one row
    whose `position_ids` start again.

    Raises:
        UserError: they cannot be known.
    """
    tokens = given.get("input_ids")
    if tokens is None:
        tokens = given["inputs_embeds"]
    length, ids, mask = tokens.shape[1], given.get("position_ids"), given.get("attention_mask")
    if mask is None:
        return _cached(given) + torch.arange(length, device=tokens.device)[None] if ids is None else ids
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        if ids is None:
            raise UserError(
                "with ablate_from, an attention mask that is not [batch, position] does not say where texts begin. "
                "Give position_ids too."
            )
        return ids
    past = _cached(given)
    if isinstance(past, int) and mask.shape[1] < past + length:
        raise UserError(
            f"the attention mask is for {mask.shape[1]} tokens, and there are {past + length} with those in the KV "
            "cache. With ablate_from, give a mask for all of them."
        )
    counted = (mask != 0).long().cumsum(-1) - 1
    counted = counted.index_select(1, past + torch.arange(length, device=mask.device))
    return counted if ids is None else torch.minimum(counted, ids.to(counted.device))


def cache_of(given: Mapping[str, Any]) -> Any:
    """The KV cache among the arguments of a model, or None."""
    names = tuple(given)  # outputs of transformers warn where they are asked for a name that they know by another one
    return next((given[name] for name in CACHE_NAMES if name in names and given[name] is not None), None)


def _cached(given: Mapping[str, Any]) -> int | Tensor:
    """How many tokens the KV cache holds: an int, or a tensor for a static cache."""
    cache = cache_of(given)
    return 0 if cache is None else cache.get_seq_length()
