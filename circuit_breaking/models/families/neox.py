"""GPT-NeoX (Pythia): LayerNorm, rotary positions, attention and MLP in parallel unless the configuration says not."""

from torch import nn
from transformers import PreTrainedConfig

from circuit_breaking.models.families.spec import Family, LayerSpec, ModelSpec, NormSpec, linear, projection


def describe(hf: nn.Module) -> ModelSpec:
    """Describe a GPT-NeoX."""
    body = hf.gpt_neox
    return ModelSpec(
        family="gpt_neox",
        embedding=body.embed_in.weight,
        rotary=body.rotary_emb,
        layers=[describe_layer(layer, hf.config) for layer in body.layers],
        final_norm=norm(body.final_layer_norm),
        unembedding=hf.lm_head.weight,
        unembedding_bias=hf.lm_head.bias,
        max_positions=hf.config.max_position_embeddings,
        parallel=parallel(hf.config),
    )


def describe_layer(layer: nn.Module, config: PreTrainedConfig) -> LayerSpec:
    """Describe one layer. The columns of `query_key_value` are query, key and value of one head after another."""
    heads, attention, mlp = config.num_attention_heads, layer.attention, layer.mlp
    fused, head_width = linear(attention.query_key_value), config.hidden_size // heads
    query, key, value = (projection(fused, heads, head_width, first=part, step=3) for part in range(3))
    return LayerSpec(
        layer=layer,
        attention=attention,
        attention_norm=norm(layer.input_layernorm),
        query=query,
        key=key,
        value=value,
        scale=attention.scaling,
        out=linear(attention.dense),
        mlp=mlp,
        mlp_norm=norm(layer.post_attention_layernorm),
        activation=config.hidden_act,
        up=linear(mlp.dense_h_to_4h),
        down=linear(mlp.dense_4h_to_h),
        dropouts=(layer.post_attention_dropout, layer.post_mlp_dropout),
    )


def norm(module: nn.LayerNorm) -> NormSpec:
    return NormSpec("layer", module, module.eps)


def parallel(config: PreTrainedConfig) -> bool:
    return config.use_parallel_residual


FAMILY = Family("gpt_neox", "GPTNeoXForCausalLM", "layers", describe, parallel)
