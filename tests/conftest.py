"""What the tests share: small random models of every family, made once."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a hub; read when transformers is imported

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)  # small models: more threads only wait for each other
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"  # real inputs, where a checkout has them beside it


def small_gpt2(**changes) -> GPT2LMHeadModel:
    torch.manual_seed(1)
    keywords = {"n_layer": 3, "n_head": 3, "n_embd": 24, "vocab_size": 50, "n_positions": 32, **changes}
    return spread(GPT2LMHeadModel(GPT2Config(**keywords, bos_token_id=0, eos_token_id=0)))


def small_llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(2)
    keywords = {
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32,
        "intermediate_size": 48, "vocab_size": 50, "max_position_embeddings": 64, **changes,
    }  # fmt: skip
    return spread(LlamaForCausalLM(LlamaConfig(**keywords, bos_token_id=0, eos_token_id=0, pad_token_id=0)))


def spread(model):
    """Make every weight count: fresh models have zero biases, unit gains and tiny projections."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval().requires_grad_(False)


FAMILIES = {"gpt2": small_gpt2, "llama": small_llama}


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]
