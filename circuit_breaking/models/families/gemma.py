"""Gemma 1, 2 and 3: like Llama, with gains of 1 + weight, token embeddings times the square root of D, and GeGLU.

Gemma 2 and 3 have norms after attention and MLP too, and windows in some layers. Gemma 2 caps attention scores and
logits. Gemma 3 normalises queries and keys, and its two kinds of layers have different rotary positions.
"""

from dataclasses import replace
from functools import partial

from torch import nn
from transformers import PreTrainedConfig

from circuit_breaking.models.families.llama import attention_fields, describe_model, mlp_fields
from circuit_breaking.models.families.spec import Family, Head, LayerSpec, ModelSpec, NormSpec, refuse_layer_types


def describe(hf: nn.Module) -> ModelSpec:
    """Describe a Gemma of one of these families."""
    embedding = hf.model.embed_tokens
    return replace(
        describe_model(hf, LAYERS[hf.config.model_type], norm),
        # rounded to the type of the weights, as Hugging Face's module rounds it
        embedding_scale=float(embedding.embed_scale.to(embedding.weight.dtype)),
        head=head(hf.config),
    )


def describe_layer(layer: nn.Module, config: PreTrainedConfig, index: int) -> LayerSpec:
    """Describe one layer of a Gemma 1."""
    return LayerSpec(
        layer=layer,
        attention_norm=norm(layer.input_layernorm),
        mlp_norm=norm(layer.post_attention_layernorm),
        **attention_fields(layer.self_attn, config, norm),
        **mlp_fields(layer.mlp, config.hidden_act),
    )


def describe_layer_2(layer: nn.Module, config: PreTrainedConfig, index: int, third: bool = False) -> LayerSpec:
    """Describe one layer of a Gemma 2, or of a Gemma 3, whose code ignores `attn_logit_softcapping`."""
    kind = config.layer_types[index]
    return LayerSpec(
        layer=layer,
        attention_norm=norm(layer.input_layernorm),
        attention_out_norm=norm(layer.post_attention_layernorm),
        mlp_norm=norm(layer.pre_feedforward_layernorm),
        mlp_out_norm=norm(layer.post_feedforward_layernorm),
        softcap=None if third else config.attn_logit_softcapping,
        window=config.sliding_window if kind == "sliding_attention" else None,
        rotary_kind=kind if third else None,
        **attention_fields(layer.self_attn, config, norm),
        **mlp_fields(layer.mlp, config.hidden_activation),
    )


LAYERS = {"gemma": describe_layer, "gemma2": describe_layer_2, "gemma3_text": partial(describe_layer_2, third=True)}


def norm(module: nn.Module) -> NormSpec:
    return NormSpec("rms_offset", module, module.eps)


def refuse(config: PreTrainedConfig) -> str | None:
    """Attention to later tokens has no place in a graph of causal edges."""
    if config.use_bidirectional_attention:
        return (
            f"this {config.model_type} model has use_bidirectional_attention, and the graph describes causal "
            "attention. Use a causal model."
        )
    return None if config.model_type == "gemma" else refuse_layer_types(config)


def head(config: PreTrainedConfig) -> Head:
    return Head(softcap=getattr(config, "final_logit_softcapping", None))


FAMILIES = [
    Family("gemma", "GemmaForCausalLM", "layers", describe, refuse=refuse),
    Family("gemma2", "Gemma2ForCausalLM", "layers", describe, refuse=refuse, head=head),
    Family("gemma3_text", "Gemma3ForCausalLM", "layers", describe, refuse=refuse, head=head),
]
