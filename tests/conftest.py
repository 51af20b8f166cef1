"""What the tests share: small random models of every family, made once."""

import os
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a hub; read when transformers is imported
if "TEST_GPU" not in os.environ:  # `make test-gpu`: all other tests are of the CPU, also where there is a GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

torch.set_num_threads(1)  # small models: more threads only wait for each other
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"  # real inputs, where a checkout has them beside it


def small_gpt2(**changes) -> GPT2LMHeadModel:
    torch.manual_seed(1)
    keywords = {"n_layer": 3, "n_head": 3, "n_embd": 24, "vocab_size": 50, "n_positions": 32, **changes}
    return spread(GPT2LMHeadModel(GPT2Config(**keywords, bos_token_id=0, eos_token_id=0)))


SMALL = {
    "num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 50,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip


def small_llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(2)
    return spread(LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_key_value_heads": 2, **changes})))


def small_neox(**changes) -> GPTNeoXForCausalLM:
    """With 2 of each head's 8 components rotated, as in Pythia."""
    torch.manual_seed(3)
    return spread(GPTNeoXForCausalLM(GPTNeoXConfig(**{**SMALL, **changes})))


def small_mistral(**changes) -> MistralForCausalLM:
    torch.manual_seed(2)
    keywords = {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": None, **changes}
    return spread(MistralForCausalLM(MistralConfig(**keywords)))


def small_qwen2(**changes) -> Qwen2ForCausalLM:
    """With biases on queries, keys and values, and tied embeddings."""
    torch.manual_seed(4)
    keywords = {**SMALL, "num_key_value_heads": 2, "tie_word_embeddings": True, **changes}
    return spread(Qwen2ForCausalLM(Qwen2Config(**keywords)))


def small_qwen3(**changes) -> Qwen3ForCausalLM:
    """With norms on queries and keys, and heads wider than a share of the model's width."""
    torch.manual_seed(5)
    return spread(Qwen3ForCausalLM(Qwen3Config(**{**SMALL, "num_key_value_heads": 2, "head_dim": 12, **changes})))


def spread(model):
    """Make every weight count: fresh models have zero biases, unit gains and tiny projections."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval().requires_grad_(False)


FAMILIES = {
    "gpt2": small_gpt2,
    "llama": small_llama,
    "neox": small_neox,
    "qwen2": small_qwen2,
    "qwen3": small_qwen3,
}


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn, for a look at what is in them."""
    from circuit_breaking import comparison_figures, figures, graph_figures, ioi_figures, method_figures

    seen, plain = [], figures.figure

    @contextmanager
    def spy(*arguments):
        with plain(*arguments) as one:
            yield one
            seen.append(one)

    for module in (figures, graph_figures, ioi_figures, comparison_figures, method_figures):
        monkeypatch.setattr(module, "figure", spy)
    return seen
