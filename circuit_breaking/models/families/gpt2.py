"""GPT-2: LayerNorm, learned positions, biases everywhere, one fused projection for queries, keys and values."""

from torch import nn
from transformers import PreTrainedConfig

from circuit_breaking.models.families.spec import Family, LayerSpec, ModelSpec, NormSpec, linear, projection


def describe(hf: nn.Module) -> ModelSpec:
    """Describe a GPT-2."""
    body = hf.transformer
    return ModelSpec(
        family="gpt2",
        embedding=body.wte.weight,
        positions=body.wpe.weight,
        layers=[describe_layer(layer, hf.config, index) for index, layer in enumerate(body.h)],
        final_norm=norm(body.ln_f),
        unembedding=hf.lm_head.weight,
        unembedding_bias=hf.lm_head.bias,
        max_positions=hf.config.n_positions,
    )


def describe_layer(layer: nn.Module, config: PreTrainedConfig, index: int) -> LayerSpec:
    """Describe one layer. The columns of `c_attn` are all queries, then all keys, then all values."""
    heads, head_width = config.n_head, config.n_embd // config.n_head
    # `reorder_and_upcast_attn` changes only how Hugging Face computes the same attention
    scale = head_width**-0.5 if config.scale_attn_weights else 1.0
    if config.scale_attn_by_inverse_layer_idx:
        scale /= index + 1
    attention, mlp = layer.attn, layer.mlp
    fused = linear(attention.c_attn)
    query, key, value = (projection(fused, heads, head_width, first=part * heads) for part in range(3))
    return LayerSpec(
        layer=layer,
        attention=attention,
        attention_norm=norm(layer.ln_1),
        query=query,
        key=key,
        value=value,
        scale=scale,
        out=linear(attention.c_proj),
        mlp=mlp,
        mlp_norm=norm(layer.ln_2),
        activation=config.activation_function,
        up=linear(mlp.c_fc),
        down=linear(mlp.c_proj),
        dropouts=(attention.resid_dropout, mlp.dropout),
    )


def norm(module: nn.LayerNorm) -> NormSpec:
    return NormSpec("layer", module, module.eps)


def refuse(config: PreTrainedConfig) -> str | None:
    """Cross-attention reads another model's output, which is no node of the graph."""
    if config.add_cross_attention:
        return "this GPT-2 has cross-attention, which the graph does not describe. Use a plain GPT-2."
    return None


FAMILY = Family("gpt2", "GPT2LMHeadModel", "h", describe, refuse=refuse)
