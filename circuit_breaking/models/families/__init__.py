"""Model families, each described in one file: `gpt2`, `neox`, `llama` (Llama, Mistral, Qwen2, Qwen3), `gemma` (1 to 3),
`granite`, `phi3`, `olmo2`.

To add a family, write a file like `gpt2.py` and name it in `FAMILIES` below. `spec` explains the fields.
"""

import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig

from circuit_breaking.errors import UserError
from circuit_breaking.graph import EdgeGraph
from circuit_breaking.models.families.gemma import FAMILIES as GEMMA
from circuit_breaking.models.families.gpt2 import FAMILY as GPT2
from circuit_breaking.models.families.granite import FAMILY as GRANITE
from circuit_breaking.models.families.llama import FAMILIES as LLAMA
from circuit_breaking.models.families.neox import FAMILY as NEOX
from circuit_breaking.models.families.olmo2 import FAMILY as OLMO2
from circuit_breaking.models.families.phi3 import FAMILY as PHI3
from circuit_breaking.models.families.spec import Family, Head, ModelSpec

KNOWN = ("torch", "transformers")  # libraries whose modules a model is made of

# the registry: Hugging Face `model_type` -> family
FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (GPT2, NEOX, *LLAMA, *GEMMA, GRANITE, PHI3, OLMO2)
}


def family_of(config: PreTrainedConfig | None, what: str) -> Family:
    """The family of a configuration. `what` names the model or configuration in the error.

    Raises:
        UserError: the family is unknown, or the configuration has an option that cannot be described.
    """
    family = FAMILIES.get(getattr(config, "model_type", None))
    if family is None:
        known = ", ".join(sorted(family.model_class for family in FAMILIES.values()))
        raise UserError(f"{what} is not supported. Supported models: {known}.")
    if reason := family.refuse(config):
        raise UserError(reason)
    if not getattr(config, "is_causal", True):
        raise UserError(f"{what} has is_causal=False, and the graph describes causal attention. Use a causal model.")
    return family


def graph_of(config: PreTrainedConfig, split_qkv: bool = False) -> EdgeGraph:
    """The graph of a model, from its Hugging Face configuration alone.

    Raises:
        UserError: the model is of an unknown family, or has an option that the graph cannot describe.
    """
    family = family_of(config, f"a model of type {getattr(config, 'model_type', None)!r}")
    return EdgeGraph(config.num_hidden_layers, config.num_attention_heads, split_qkv, family.parallel(config))


def head_of(hf: nn.Module) -> Head | None:
    """How a model's logits are made of its last hidden state and its output embedding.

    Some families scale or cap them (Granite, Gemma 2). None for families without a description.
    """
    family = FAMILIES.get(getattr(getattr(hf, "config", None), "model_type", None))
    return None if family is None else family.head(hf.config)


def describe(hf: nn.Module) -> ModelSpec:
    """Describe a Hugging Face causal language model; its weights are shared, not copied.

    Raises:
        UserError: the model is of an unknown family, has an option that cannot be described, or is quantised.
    """
    what = type(hf).__name__
    family = family_of(getattr(hf, "config", None), what)
    if not isinstance(hf, getattr(transformers, family.model_class)):
        raise UserError(f"{what} is not supported. Give the {family.model_class} itself.")
    for name, parameter in hf.named_parameters():
        kind = type(parameter.data)  # torchao's quantised weights are tensors of its own that say they are floats
        if not parameter.is_floating_point() or kind is not Tensor:
            how = parameter.dtype if kind is Tensor else kind.__name__
            raise UserError(f"{name} is quantised ({how}). Load the model's weights as floats.")
    spec = family.describe(hf)
    _require_known_modules(hf)
    return spec


def _require_known_modules(hf: nn.Module) -> None:
    """Raise a `UserError` for modules of other libraries, such as adapters around embeddings: what they compute is not
    what the weights say that a description gives."""
    for name, module in hf.named_modules():
        kind = type(module)
        if name and kind.__module__.partition(".")[0] not in KNOWN:
            raise UserError(
                f"{name} is a {kind.__module__}.{kind.__name__}, a module of another library. Merge adapters and "
                "undo quantisation first."
            )


def require_plain(hf: nn.Module) -> None:
    """Raise a `UserError` if calling a model's modules does more than its weights and its family's description say."""
    for name, module in hf.named_modules():
        if hasattr(type(module), "stands_for"):
            raise UserError(
                "this Hugging Face model has cut edges, which reading its weights would pass over. Remove the cuts "
                "first, and cut edges in the result."
            )
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        # transformers registers some that only note outputs
        if any(not getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks):
            raise UserError(
                f"a hook is registered on {name or 'the model'}, which reading the model's weights would pass over. "
                "Remove it first."
            )
        if "forward" in module.__dict__ and "_hf_hook" not in module.__dict__:
            raise UserError(
                f"{name or 'the model'} has a forward of its own, which reading the model's weights would pass over. "
                "Undo that first."
            )


def require_loaded(hf: nn.Module) -> None:
    """Raise a `UserError` if some weights of a model are offloaded, so that their values are not at hand."""
    for name, parameter in hf.named_parameters():
        if parameter.is_meta:
            raise UserError(f"{name} is offloaded. Load the model's weights onto its devices.")
