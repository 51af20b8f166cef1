"""Granite: like Llama, with factors for token embeddings, attention scores, what layers write, and logits."""

from dataclasses import replace

from torch import nn
from transformers import PreTrainedConfig

from circuit_breaking.models.families.llama import describe as describe_llama
from circuit_breaking.models.families.spec import Family, Head, ModelSpec


def describe(hf: nn.Module) -> ModelSpec:
    """Describe a Granite. Its factor for attention scores, `attention_multiplier`, is the attention's `scaling`."""
    config, plain = hf.config, describe_llama(hf)
    return replace(
        plain,
        embedding_scale=config.embedding_multiplier,
        layers=[replace(layer, multiplier=config.residual_multiplier) for layer in plain.layers],
        head=head(config),
    )


def refuse(config: PreTrainedConfig) -> str | None:
    """Without its factor a layer writes nothing, so its nodes do nothing that could be cut."""
    for option in ("residual_multiplier", "logits_scaling"):
        if not getattr(config, option):
            return f"this granite model has {option}=0, so its layers or its logits are nothing. Use another model."
    return None


def head(config: PreTrainedConfig) -> Head:
    return Head(divisor=config.logits_scaling)


FAMILY = Family("granite", "GraniteForCausalLM", "layers", describe, refuse=refuse, head=head)
