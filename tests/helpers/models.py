"""Small random models of every registered family, in which every weight changes the logits."""

from collections.abc import Callable

import torch
import transformers
from torch import nn

from circuit_breaking.models.families import FAMILIES

SIZES = {
    "num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 50,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}  # two query heads share each key and value

# one row for each registered family: seed, and what its configuration is made of
SMALL = {
    "gpt2": (1, {"n_layer": 3, "n_head": 3, "n_embd": 24, "vocab_size": 50, "n_positions": 32, "bos_token_id": 0,
                 "eos_token_id": 0}),
    "gpt_neox": (3, SIZES),  # with 2 of each head's 8 components rotated, as in Pythia
    "llama": (2, GROUPED),
    "mistral": (2, {**GROUPED, "head_dim": 8, "sliding_window": None}),
    "qwen2": (4, {**GROUPED, "tie_word_embeddings": True}),  # with biases on queries, keys and values
    "qwen3": (5, {**GROUPED, "head_dim": 12}),  # with norms on queries and keys, and heads wider than D / H
    "gemma": (6, {**GROUPED, "head_dim": 12, "num_key_value_heads": 1}),  # all heads share keys and values
    # windows in the first and third layer, and caps that scores and logits come near to
    "gemma2": (9, {**GROUPED, "head_dim": 12, "sliding_window": 5, "query_pre_attn_scalar": 20,
                   "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0}),
    "gemma3_text": (10, {**GROUPED, "head_dim": 12, "sliding_window": 5, "query_pre_attn_scalar": 20,
                         "sliding_window_pattern": 2}),
    "olmo2": (11, GROUPED),
    "granite": (7, {**GROUPED, "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.6,
                    "logits_scaling": 1.7}),
    "phi3": (8, {**GROUPED, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
}  # fmt: skip


def small(model_type: str, seed: int | None = None, **changes) -> nn.Module:
    """A small random model of a family, with changes to its configuration."""
    usual, keywords = SMALL[model_type]
    seed = usual if seed is None else seed
    model_class = getattr(transformers, FAMILIES[model_type].model_class)
    if changes.get("attn_implementation") == "sdpa" and not model_class._supports_sdpa:
        changes = {**changes, "attn_implementation": "eager"}  # Gemma 2, whose scores are capped
    torch.manual_seed(seed)
    return spread(model_class(model_class.config_class(**{**keywords, **changes})))


def two_layers(make: Callable[..., nn.Module]) -> nn.Module:
    """The model that one of the functions below makes, with two layers, for tests whose time grows with the layers."""
    return make(**{"n_layer" if make is small_gpt2 else "num_hidden_layers": 2})


def small_gpt2(**changes) -> nn.Module:
    return small("gpt2", **changes)


def small_llama(**changes) -> nn.Module:
    return small("llama", **changes)


def small_neox(**changes) -> nn.Module:
    return small("gpt_neox", **changes)


def small_mistral(**changes) -> nn.Module:
    return small("mistral", **changes)


def small_qwen2(**changes) -> nn.Module:
    return small("qwen2", **changes)


def small_qwen3(**changes) -> nn.Module:
    return small("qwen3", **changes)


def small_gemma(**changes) -> nn.Module:
    return small("gemma", **changes)


def small_gemma2(**changes) -> nn.Module:
    return small("gemma2", **changes)


def small_gemma3(**changes) -> nn.Module:
    return small("gemma3_text", **changes)


def small_olmo2(**changes) -> nn.Module:
    return small("olmo2", **changes)


def small_granite(**changes) -> nn.Module:
    return small("granite", **changes)


def small_phi3(**changes) -> nn.Module:
    return small("phi3", **changes)


def spread(model: nn.Module) -> nn.Module:
    """Make every weight count: fresh models have zero biases, unit gains and tiny projections."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval().requires_grad_(False)
