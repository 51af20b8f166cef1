"""Where a stock Hugging Face model is hooked to cut its edges, family by family (layer 2).

Shapes: H heads, D width, K head width. A unit is the query, key or value of one head: K columns of a projection.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    GPT2LMHeadModel,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from circuit_breaking.errors import UserError
from circuit_breaking.graph import EdgeGraph


def layer_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """The norm of GPT-2 and GPT-NeoX, without the hooks on it."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def rms_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """The norm of Llama's relatives in one kernel, without the hooks on it."""
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


class Projection(NamedTuple):
    """A linear module that makes queries, keys or values, and its weights by unit."""

    module: nn.Module
    weight: Tensor  # [units, D, K]
    bias: Tensor  # [units, K]


class Layer(NamedTuple):
    """Where hooks go in one layer."""

    norm: nn.Module  # before attention
    attention: nn.Module
    projections: list[Projection]  # one for all of q, k, v, or one for each
    fused_order: str  # of the units of one projection for all: by "part" (all queries, ...) or by "head" (its q, k, v)
    out: nn.Module  # attention's output projection
    w_o: Tensor  # [H, K, D]
    b_o: Tensor | None  # [D]
    mlp_norm: nn.Module
    mlp: nn.Module
    down: nn.Module  # the MLP's output projection


class Model(NamedTuple):
    """Where hooks go in a model."""

    graph: EdgeGraph
    layers: list[Layer]
    norm: nn.Module  # the last one
    heads: int
    width: int
    normalise: Callable[[Tensor, nn.Module], Tensor]


def _by_unit(module: nn.Module, weight: Tensor, head_width: int) -> Projection:
    """`weight` is [D, out]; nothing is copied."""
    weight = weight.unflatten(1, (-1, head_width)).permute(1, 0, 2)
    bias = weight.new_zeros(len(weight) * head_width) if module.bias is None else module.bias
    return Projection(module, weight, bias.view(-1, head_width))


def _gpt2(hf: GPT2LMHeadModel) -> Model:
    heads, width = hf.config.n_head, hf.config.n_embd
    layers = []
    for block in hf.transformer.h:
        attention = block.attn
        projection = _by_unit(attention.c_attn, attention.c_attn.weight, width // heads)
        w_o = attention.c_proj.weight.view(heads, -1, width)
        layers.append(
            Layer(
                block.ln_1, attention, [projection], "part", attention.c_proj, w_o, attention.c_proj.bias, block.ln_2,
                block.mlp, block.mlp.c_proj,
            )
        )  # fmt: skip
    return Model(graph_of(hf.config), layers, hf.transformer.ln_f, heads, width, layer_norm)


def _neox(hf: GPTNeoXForCausalLM) -> Model:
    heads, width = hf.config.num_attention_heads, hf.config.hidden_size
    layers = []
    for block in hf.gpt_neox.layers:
        attention = block.attention
        projection = _by_unit(attention.query_key_value, attention.query_key_value.weight.t(), width // heads)
        w_o = attention.dense.weight.t().view(heads, -1, width)
        layers.append(
            Layer(
                block.input_layernorm, attention, [projection], "head", attention.dense, w_o, attention.dense.bias,
                block.post_attention_layernorm, block.mlp, block.mlp.dense_4h_to_h,
            )
        )  # fmt: skip
    return Model(graph_of(hf.config), layers, hf.gpt_neox.final_layer_norm, heads, width, layer_norm)


def _llama(hf: nn.Module) -> Model:
    heads, width = hf.config.num_attention_heads, hf.config.hidden_size
    layers = []
    for block in hf.model.layers:
        attention = block.self_attn
        linears = (attention.q_proj, attention.k_proj, attention.v_proj)
        projections = [_by_unit(linear, linear.weight.t(), attention.head_dim) for linear in linears]
        w_o = attention.o_proj.weight.t().view(heads, -1, width)
        layers.append(
            Layer(
                block.input_layernorm, attention, projections, "part", attention.o_proj, w_o, attention.o_proj.bias,
                block.post_attention_layernorm, block.mlp, block.mlp.down_proj,
            )
        )  # fmt: skip
    return Model(graph_of(hf.config), layers, hf.model.norm, heads, width, rms_norm)


FAMILIES = {
    GPT2LMHeadModel: _gpt2,
    GPTNeoXForCausalLM: _neox,
    LlamaForCausalLM: _llama,
    MistralForCausalLM: _llama,
    Qwen2ForCausalLM: _llama,
    Qwen3ForCausalLM: _llama,
}


def graph_of(config: Any, split_qkv: bool = False) -> EdgeGraph:
    """The graph of a Hugging Face configuration, of whatever family."""
    parallel = config.model_type == "gpt_neox" and config.use_parallel_residual
    return EdgeGraph(config.num_hidden_layers, config.num_attention_heads, split_qkv, parallel)


def find_places(hf: nn.Module) -> Model:
    """Where hooks go in a Hugging Face model. Raises `UserError` for a model that they do not fit."""
    for kind, describe in FAMILIES.items():
        if isinstance(hf, kind):
            if getattr(hf.config, "add_cross_attention", False):
                raise UserError("this GPT-2 has cross-attention, which the graph does not describe. Use a plain GPT-2.")
            for name, parameter in hf.named_parameters():
                if parameter.is_meta or not parameter.is_floating_point():
                    what = "offloaded" if parameter.is_meta else f"quantised ({parameter.dtype})"
                    raise UserError(
                        f"{name} is {what}. Load the model's weights onto its devices as floats to cut edges."
                    )
            return describe(hf)
    known = " or ".join(kind.__name__ for kind in FAMILIES)
    raise UserError(f"edges can be cut in a {known}, not in a {type(hf).__name__}. Load one of those.")
