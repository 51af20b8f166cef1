"""Random small models of every family, options crossed: engine, reference, Hugging Face and ablated models."""

import random

import pytest
import torch
from helpers.models import small

from circuit_breaking.ablation.ablate import ablate
from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.reference import ReferenceModel
from circuit_breaking.models.families import FAMILIES

CASES = 17  # of each family; more than 200 together. Windows are of 2 at least: at 1 Hugging Face's cache is wrong
FULL, SLIDING = "full_attention", "sliding_attention"
ROPES = [
    None,
    {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0},
    {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16},
    {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 16},
]  # fmt: skip
SHAPES = {
    "num_hidden_layers": [1, 2, 3, 4], "hidden_size": [16, 32], "intermediate_size": [20, 48],
    "num_attention_heads": [2, 4], "num_key_value_heads": [1, 2, 4], "tie_word_embeddings": [False, True],
}  # fmt: skip
LLAMA = {**SHAPES, "head_dim": [None, 6, 12], "rope_parameters": ROPES, "rms_norm_eps": [1e-6, 1e-2]}
BIASES = {"attention_bias": [False, True], "mlp_bias": [False, True]}
WINDOWS = {"use_sliding_window": [False, True], "sliding_window": [2, 3, 7], "max_window_layers": [0, 1, 2]}
GEMMA = {
    **SHAPES, "head_dim": [6, 12], "attention_bias": [False, True], "rms_norm_eps": [1e-6, 1e-2],
    "rope_parameters": ROPES[:3],
}  # fmt: skip
GEMMA_2 = {
    **GEMMA, "sliding_window": [2, 4, 64], "query_pre_attn_scalar": [5, 64], "attn_logit_softcapping": [None, 2.0],
    "final_logit_softcapping": [None, 5.0], "layer_types": [None, FULL, SLIDING],
}  # fmt: skip
OPTIONS = {
    "gpt2": {
        "n_layer": [1, 2, 3, 4], "n_head": [1, 2, 4], "n_embd": [16, 32], "n_inner": [None, 20],
        "scale_attn_weights": [True, False], "scale_attn_by_inverse_layer_idx": [True, False],
        "activation_function": ["gelu_new", "gelu", "relu", "silu"], "tie_word_embeddings": [True, False],
        "reorder_and_upcast_attn": [True, False], "layer_norm_epsilon": [1e-5, 1e-2],
    },
    "gpt_neox": {
        **{name: values for name, values in SHAPES.items() if name != "num_key_value_heads"},
        "use_parallel_residual": [True, False], "attention_bias": [True, False], "rotary_pct": [0.25, 0.5, 1.0],
        "hidden_act": ["gelu", "gelu_new", "silu"],
    },
    "llama": {**LLAMA, **BIASES},
    "mistral": {**LLAMA, "sliding_window": [None, 2, 3, 7, 64]},
    "qwen2": {**LLAMA, **WINDOWS},
    "qwen3": {**LLAMA, **WINDOWS, "attention_bias": [True, False], "head_dim": [6, 12]},
    "gemma": {**GEMMA, "hidden_act": ["gelu", "silu"]},
    "gemma2": GEMMA_2,
    "gemma3_text": {**GEMMA_2, "rope_parameters": [None, {
        FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
        SLIDING: {"rope_type": "default", "rope_theta": 100.0},
    }]},
    "olmo2": {**LLAMA, "attention_bias": [True, False]},
    "granite": {
        **LLAMA, **BIASES, "embedding_multiplier": [1.0, 5.0], "attention_multiplier": [0.1, 1.0],
        "residual_multiplier": [0.3, 1.0], "logits_scaling": [1.0, 3.0],
    },
    "phi3": {**SHAPES, "sliding_window": [None, 2, 5], "rope_parameters": [
        None, {"rope_type": "default", "partial_rotary_factor": 0.5}, 4, 60,
    ]},
}  # fmt: skip


def draw(model_type: str, number: int) -> torch.nn.Module:
    """The `number`-th random model of a family."""
    choice = random.Random(f"{model_type} {number}")
    options = {name: choice.choice(values) for name, values in OPTIONS[model_type].items()}
    options = {name: value for name, value in options.items() if value is not None or name == "sliding_window"}
    heads, layers = options.get("num_attention_heads"), options.get("num_hidden_layers")
    if "num_key_value_heads" in options:
        options["num_key_value_heads"] = min(options["num_key_value_heads"], heads)
    if model_type in ("gemma2",) and "attn_logit_softcapping" not in options:
        options["attn_logit_softcapping"] = None
    if model_type in ("gemma2", "gemma3_text"):
        options.setdefault("final_logit_softcapping", None)
    if isinstance(options.get("layer_types"), str):
        options["layer_types"] = [options["layer_types"]] * layers
    if isinstance(before := options.get("rope_parameters"), int):  # tokens up to which the short factors are used
        half = options["hidden_size"] // heads // 2
        options["original_max_position_embeddings"] = before
        options["rope_parameters"] = {
            "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0,
            "short_factor": [1 + at / 9 for at in range(half)], "long_factor": [1 + at for at in range(half)],
        }  # fmt: skip
    return small(model_type, seed=number, **options)


def test_every_family_has_options():
    assert {*OPTIONS} == {*FAMILIES}
    assert CASES * len(OPTIONS) >= 200


@pytest.mark.slow
@pytest.mark.parametrize("number", range(CASES))
@pytest.mark.parametrize("model_type", OPTIONS)
def test_a_random_model(model_type, number):
    check(draw(model_type, number), number)


@pytest.mark.parametrize("model_type", OPTIONS)
def test_one_random_model(model_type):
    check(draw(model_type, 1), 1)


def check(hf: torch.nn.Module, number: int) -> None:
    """Engine and ablated model, whole and with edges cut, logits, gradients and generated tokens."""
    generator, split = torch.Generator().manual_seed(number), bool(number % 2)
    tokens = torch.randint(1, 50, (2, 11), generator=generator)
    model = load_model(hf, split_qkv=split, device="cpu")
    edges = [model.graph.edges[at] for at in torch.randperm(len(model.graph), generator=generator)[:25].tolist()]
    means = torch.randn(len(model.graph.sources), hf.config.hidden_size, generator=generator) if number % 3 else None
    ablate_from = number % 4 and number % 5
    with torch.no_grad():
        stock = hf(tokens, use_cache=False).logits
        assert (model(tokens) - stock).abs().max() < 1e-4
        model.means, model.ablate_from = means, ablate_from
        model.mask.cut_(edges)
        with ablate(hf, edges, means, ablate_from=ablate_from):
            assert (model(tokens) - hf(tokens, use_cache=False).logits).abs().max() < 1e-4
            check_generation(hf, tokens)
        assert hf(tokens, use_cache=False).logits.equal(stock)
    check_gradients(hf.double(), split, tokens, None if means is None else means.double(), ablate_from)


def check_generation(hf: torch.nn.Module, tokens: torch.Tensor) -> None:
    """Tokens generated with a KV cache, without one, and in a batch padded on the left are the same."""
    keywords = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = hf.generate(tokens, attention_mask=torch.ones_like(tokens), **keywords)
    assert cached.equal(hf.generate(tokens, attention_mask=torch.ones_like(tokens), use_cache=False, **keywords))
    padded = torch.nn.functional.pad(tokens, (3, 0))
    mask = (torch.arange(padded.shape[1]) >= 3).long().expand_as(padded)
    together = torch.cat([padded[:1], padded.roll(-3, 1)[:1]])  # the second is padded on the right: not looked at
    mask = torch.stack([mask[0], torch.ones_like(mask[0])])
    assert hf.generate(together, attention_mask=mask, **keywords)[0, 3:].equal(cached[0])


def check_gradients(hf: torch.nn.Module, split: bool, tokens, means, ablate_from: int) -> None:
    """Logits and gradients under any mask are those of the reference, in float64."""
    model, reference = load_model(hf, split_qkv=split, device="cpu", dtype="float64"), ReferenceModel(hf, split)
    model.means, model.ablate_from = means, ablate_from
    weight = torch.randn(*tokens.shape, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    values = torch.rand(len(model.graph), dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    masks = [values.clone().requires_grad_() for _ in range(2)]
    logits = model(tokens, mask=masks[0]), reference(tokens, masks[1], means, ablate_from)
    torch.testing.assert_close(*logits, atol=1e-9, rtol=1e-9)
    gradients = [torch.autograd.grad((weight * one).sum(), mask)[0] for one, mask in zip(logits, masks, strict=True)]
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-7)
