"""Gemma: like Llama, with norms whose gain is 1 + weight, token embeddings times the square root of D, and GeGLU."""

from torch import nn
from transformers import PreTrainedConfig

from circuit_breaking.models.families.llama import attention_fields, mlp_fields
from circuit_breaking.models.families.spec import Family, LayerSpec, ModelSpec, NormSpec


def describe(hf: nn.Module) -> ModelSpec:
    """Describe a Gemma."""
    config, body = hf.config, hf.model
    return ModelSpec(
        family=config.model_type,
        embedding=body.embed_tokens.weight,
        embedding_scale=embedding_scale(body.embed_tokens),
        rotary=body.rotary_emb,
        layers=[describe_layer(layer, config) for layer in body.layers],
        final_norm=norm(body.norm),
        unembedding=hf.lm_head.weight,
        unembedding_bias=hf.lm_head.bias,
        max_positions=config.max_position_embeddings,
    )


def describe_layer(layer: nn.Module, config: PreTrainedConfig) -> LayerSpec:
    """Describe one layer."""
    return LayerSpec(
        layer=layer,
        attention_norm=norm(layer.input_layernorm),
        mlp_norm=norm(layer.post_attention_layernorm),
        **attention_fields(layer.self_attn, config, norm),
        **mlp_fields(layer.mlp, config.hidden_act),
    )


def embedding_scale(embedding: nn.Module) -> float:
    """The factor of the token embeddings, rounded to the type of the weights as Hugging Face's module rounds it."""
    return float(embedding.embed_scale.to(embedding.weight.dtype))


def norm(module: nn.Module) -> NormSpec:
    return NormSpec("rms_offset", module, module.eps)


def refuse(config: PreTrainedConfig) -> str | None:
    """Attention to later tokens has no place in a graph of causal edges."""
    if config.use_bidirectional_attention:
        return (
            f"this {config.model_type} model has use_bidirectional_attention, and the graph describes causal "
            "attention. Use a causal model."
        )
    return None


FAMILIES = [Family("gemma", "GemmaForCausalLM", "layers", describe, refuse=refuse)]
