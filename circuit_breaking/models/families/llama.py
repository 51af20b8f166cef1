"""Llama and its relatives Mistral, Qwen2 and Qwen3: RMSNorm, rotary positions, shared keys and values, a gated MLP.

They differ in which projections have biases, in Qwen3's norms of queries and keys, and in sliding windows.
"""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from circuit_breaking.models.families.spec import (
    Family,
    LayerSpec,
    ModelSpec,
    NormSpec,
    linear,
    projection,
    refuse_layer_types,
)

MakeNorm = Callable[[nn.Module], NormSpec]
DescribeLayer = Callable[[nn.Module, PreTrainedConfig, int], LayerSpec]  # of a layer with its number


def describe(hf: nn.Module) -> ModelSpec:
    """Describe a model of one of these families."""
    return describe_model(hf, describe_layer, norm)


def describe_model(hf: nn.Module, describe_layer: DescribeLayer, norm: MakeNorm) -> ModelSpec:
    """Describe a model whose modules outside its layers have the names that they have in Llama, as in many families."""
    config, body = hf.config, hf.model
    return ModelSpec(
        family=config.model_type,
        embedding=body.embed_tokens.weight,
        rotary=body.rotary_emb,
        layers=[describe_layer(layer, config, index) for index, layer in enumerate(body.layers)],
        final_norm=norm(body.norm),
        unembedding=hf.lm_head.weight,
        unembedding_bias=hf.lm_head.bias,
        max_positions=config.max_position_embeddings,
    )


def describe_layer(layer: nn.Module, config: PreTrainedConfig, index: int) -> LayerSpec:
    """Describe one layer."""
    return LayerSpec(
        layer=layer,
        attention_norm=norm(layer.input_layernorm),
        mlp_norm=norm(layer.post_attention_layernorm),
        window=window(config, index),
        **attention_fields(layer.self_attn, config, norm),
        **mlp_fields(layer.mlp, config.hidden_act),
    )


def attention_fields(attention: nn.Module, config: PreTrainedConfig, norm: MakeNorm) -> dict[str, Any]:
    """The fields of a `LayerSpec` that describe attention; many families name their modules like Llama."""
    heads, key_heads, width = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
    return {
        "attention": attention,
        "query": projection(linear(attention.q_proj), heads, width),
        "key": projection(linear(attention.k_proj), key_heads, width),
        "value": projection(linear(attention.v_proj), key_heads, width),
        "query_norm": norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        "key_norm": norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        "scale": attention.scaling,
        "out": linear(attention.o_proj),
    }


def mlp_fields(mlp: nn.Module, activation: str) -> dict[str, Any]:
    """The fields that describe a gated MLP."""
    return {
        "mlp": mlp,
        "activation": activation,
        "gate": linear(mlp.gate_proj),
        "up": linear(mlp.up_proj),
        "down": linear(mlp.down_proj),
    }


def norm(module: nn.Module) -> NormSpec:
    return NormSpec("rms", module, module.variance_epsilon)


def window(config: PreTrainedConfig, index: int) -> int | None:
    """The sliding window of a layer, as Hugging Face's code applies it, which is not always as its configuration says.

    Mistral has one window for all layers and ignores `layer_types`. Qwen2 and Qwen3 apply the window in the layers that
    `layer_types` names. Llama and Granite have none, even if their configuration has a `sliding_window`.
    """
    if config.model_type in ("llama", "granite"):
        return None
    if config.model_type != "mistral" and config.layer_types[index] != "sliding_attention":
        return None
    return config.sliding_window


FAMILIES = [
    Family("llama", "LlamaForCausalLM", "layers", describe),
    Family("mistral", "MistralForCausalLM", "layers", describe),
    Family("qwen2", "Qwen2ForCausalLM", "layers", describe, refuse=refuse_layer_types),
    Family("qwen3", "Qwen3ForCausalLM", "layers", describe, refuse=refuse_layer_types),
]
