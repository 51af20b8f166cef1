"""Counterfactual ablation values in a stock model: what its nodes write on another batch, and which passes may use it.

Shapes: P nodes that write, B batch, T position, D width.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from circuit_breaking.ablation.positions import cache_of
from circuit_breaking.engine.arguments import check_right_padding
from circuit_breaking.engine.load import load_model
from circuit_breaking.errors import UserError


def whole_outputs_of(hf: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Outputs [P, B, T, D] of all nodes of a model without cut edges, on tokens [B, T]."""
    engine = load_model(hf, device=str(hf.device), dtype=hf.dtype, share_weights=True)
    with engine.resampling(tokens):
        return engine.counterfactual_outputs


def check_resampled(given: Mapping[str, Any], shape: tuple[int, int]) -> None:
    """Raise a `UserError` unless a pass is over one whole batch [B, T], whose counterfactual has that shape.

    Args:
        given: the arguments of a model without its head, as Hugging Face names them.
        shape: B and T of the counterfactual.
    """
    tokens, cache = given.get("input_ids"), cache_of(given)
    tokens = given["inputs_embeds"] if tokens is None else tokens
    if tuple(tokens.shape[:2]) != shape or (cache is not None and cache.get_seq_length() > 0):
        raise UserError(
            f"cut edges carry outputs on a counterfactual of {list(shape)} tokens, and this pass is over "
            f"{list(tokens.shape[:2])}, or continues a text in a KV cache. Inside `resampling`, run whole batches of "
            "that shape; text cannot be generated."
        )
    if (mask := given.get("attention_mask")) is not None:
        check_right_padding(mask, tokens)
