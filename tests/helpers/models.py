"""Small random models of every family, whose every weight counts."""

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)


def small_gpt2(**changes) -> GPT2LMHeadModel:
    torch.manual_seed(1)
    keywords = {"n_layer": 3, "n_head": 3, "n_embd": 24, "vocab_size": 50, "n_positions": 32, **changes}
    return spread(GPT2LMHeadModel(GPT2Config(**keywords, bos_token_id=0, eos_token_id=0)))


SMALL = {
    "num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 50,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip


def small_llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(2)
    return spread(LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_key_value_heads": 2, **changes})))


def small_neox(**changes) -> GPTNeoXForCausalLM:
    """With 2 of each head's 8 components rotated, as in Pythia."""
    torch.manual_seed(3)
    return spread(GPTNeoXForCausalLM(GPTNeoXConfig(**{**SMALL, **changes})))


def small_mistral(**changes) -> MistralForCausalLM:
    torch.manual_seed(2)
    keywords = {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": None, **changes}
    return spread(MistralForCausalLM(MistralConfig(**keywords)))


def small_qwen2(**changes) -> Qwen2ForCausalLM:
    """With biases on queries, keys and values, and tied embeddings."""
    torch.manual_seed(4)
    keywords = {**SMALL, "num_key_value_heads": 2, "tie_word_embeddings": True, **changes}
    return spread(Qwen2ForCausalLM(Qwen2Config(**keywords)))


def small_qwen3(**changes) -> Qwen3ForCausalLM:
    """With norms on queries and keys, and heads wider than a share of the model's width."""
    torch.manual_seed(5)
    return spread(Qwen3ForCausalLM(Qwen3Config(**{**SMALL, "num_key_value_heads": 2, "head_dim": 12, **changes})))


def spread(model):
    """Make every weight count: fresh models have zero biases, unit gains and tiny projections."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval().requires_grad_(False)


FAMILIES = {
    "gpt2": small_gpt2,
    "llama": small_llama,
    "neox": small_neox,
    "qwen2": small_qwen2,
    "qwen3": small_qwen3,
}
