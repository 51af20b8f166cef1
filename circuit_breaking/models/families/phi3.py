"""Phi-3: like Llama, with one projection for queries, keys and values, and one for the MLP's gate and hidden layer."""

from torch import nn
from transformers import PreTrainedConfig

from circuit_breaking.models.families.llama import describe_model, norm
from circuit_breaking.models.families.spec import Family, LayerSpec, ModelSpec, columns, linear, projection


def describe(hf: nn.Module) -> ModelSpec:
    """Describe a Phi-3. Its rotary module applies the factors for long texts (LongRoPE) where a text is long."""
    return describe_model(hf, describe_layer, norm)


def describe_layer(layer: nn.Module, config: PreTrainedConfig, index: int) -> LayerSpec:
    """Describe one layer. The columns of `qkv_proj` are all queries, then all keys, then all values."""
    attention, mlp, hidden = layer.self_attn, layer.mlp, config.intermediate_size
    heads, key_heads, width = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
    qkv, gate_up = linear(attention.qkv_proj), linear(mlp.gate_up_proj)
    return LayerSpec(
        layer=layer,
        attention=attention,
        attention_norm=norm(layer.input_layernorm),
        query=projection(qkv, heads, width),
        key=projection(qkv, key_heads, width, first=heads),
        value=projection(qkv, key_heads, width, first=heads + key_heads),
        scale=attention.scaling,
        window=config.sliding_window,
        out=linear(attention.o_proj),
        mlp=mlp,
        mlp_norm=norm(layer.post_attention_layernorm),
        activation=config.hidden_act,
        gate=columns(gate_up, 0, hidden),
        up=columns(gate_up, hidden, 2 * hidden),
        down=linear(mlp.down_proj),
        dropouts=(layer.resid_attn_dropout, layer.resid_mlp_dropout),
    )


FAMILY = Family("phi3", "Phi3ForCausalLM", "layers", describe)
