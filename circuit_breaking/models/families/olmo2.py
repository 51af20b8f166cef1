"""OLMo 2: like Llama, with norms after attention and MLP instead of before them, and norms of queries and keys that are
over all heads of a layer together."""

from torch import nn
from transformers import PreTrainedConfig

from circuit_breaking.models.families.llama import attention_fields, describe_model, mlp_fields, norm
from circuit_breaking.models.families.spec import NO_NORM, Family, LayerSpec, ModelSpec


def describe(hf: nn.Module) -> ModelSpec:
    """Describe an OLMo 2."""
    return describe_model(hf, describe_layer, norm)


def describe_layer(layer: nn.Module, config: PreTrainedConfig, index: int) -> LayerSpec:
    """Describe one layer."""
    return LayerSpec(
        layer=layer,
        attention_norm=NO_NORM,
        attention_out_norm=norm(layer.post_attention_layernorm),
        mlp_norm=NO_NORM,
        mlp_out_norm=norm(layer.post_feedforward_layernorm),
        norms_all_heads=True,
        **attention_fields(layer.self_attn, config, norm),
        **mlp_fields(layer.mlp, config.hidden_act),
    )


FAMILY = Family("olmo2", "Olmo2ForCausalLM", "layers", describe)
