"""The ablated Hugging Face model against the engine, and everything that `generate` can do."""

import copy

import pytest
import torch
from conftest import FAMILIES, small_gpt2, small_llama

from circuit_breaking.ablated import ablate
from circuit_breaking.cli import UserError
from circuit_breaking.models import load_model


def random_edges(graph, count: int, seed: int = 0) -> list[str]:
    torch.manual_seed(seed)
    return [graph.edges[index] for index in torch.randperm(len(graph))[:count].tolist()]


def engine_logits(hf, edges, means, tokens, split):
    engine = load_model(hf, split_qkv=split, device="cpu", dtype=hf.dtype)
    engine.means = means
    engine.mask.cut_(edges)
    with torch.no_grad():
        return engine(tokens)


@pytest.mark.parametrize("kind", ["zero", "mean"])
@pytest.mark.parametrize("split", [False, True], ids=["plain", "split"])
@pytest.mark.parametrize("count", [1, 10, 40, 10**6])
def test_logits_equal_the_engine(family, split, count, kind):
    hf = family().double()
    tokens = torch.randint(1, 50, (2, 9), generator=torch.manual_seed(3))
    graph = load_model(hf, split_qkv=split, device="cpu", dtype="float64").graph
    width = hf.config.hidden_size
    means = None if kind == "zero" else torch.randn(len(graph.sources), width, dtype=torch.float64)
    # Hugging Face's RMSNorm goes through float32 even here
    tolerance = 1e-10 if hf.config.model_type == "gpt2" else 2e-4
    for seed in range(1 if count > len(graph) else 4):
        edges = random_edges(graph, count, seed)
        expected = engine_logits(hf, edges, means, tokens, split)
        with ablate(hf, edges, means), torch.no_grad():
            found = hf(tokens).logits
        assert (found - expected).abs().max() < tolerance
        assert (found - hf(tokens).logits).abs().max() > 1e-6  # the cut matters


def some_edges(hf, count: int = 12, split: bool = True) -> list[str]:
    return random_edges(load_model(hf, split_qkv=split, device="cpu").graph, count)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_token_by_token_with_the_cache_equals_the_full_forward(family, attention):
    hf = family(attn_implementation=attention)
    tokens = torch.randint(1, 50, (2, 12), generator=torch.manual_seed(3))
    with ablate(hf, some_edges(hf, 30)), torch.no_grad():
        full = hf(tokens).logits
        step = hf(tokens[:, :5], use_cache=True)
        logits, cache = [step.logits], step.past_key_values
        for at in range(5, 12):
            step = hf(tokens[:, at : at + 1], past_key_values=cache, use_cache=True)
            logits.append(step.logits)
    assert torch.allclose(torch.cat(logits, 1), full, atol=2e-5)


def test_left_padded_batch_equals_single_prompts(family):
    hf = family()
    prompts = [torch.randint(1, 50, (length,)).tolist() for length in (3, 7, 5)]
    tokens = torch.tensor([[0] * (7 - len(prompt)) + prompt for prompt in prompts])
    keywords = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with ablate(hf, some_edges(hf, 30)):
        mask = (torch.arange(7) >= 7 - torch.tensor([[len(prompt)] for prompt in prompts])).long()
        together = hf.generate(tokens, attention_mask=mask, **keywords)[:, 7:]
        for prompt, row in zip(prompts, together, strict=True):
            alone = torch.tensor([prompt])
            assert hf.generate(alone, attention_mask=torch.ones_like(alone), **keywords)[0, len(prompt) :].equal(row)


@pytest.mark.parametrize(
    "keywords",
    [{"num_beams": 3}, {"do_sample": True, "top_k": 5}, {"use_cache": False}, {"cache_implementation": "static"}],
    ids=str,
)
def test_generate_takes_its_keywords(family, keywords):
    hf = family()
    tokens = torch.randint(1, 50, (2, 5), generator=torch.manual_seed(3))
    with ablate(hf, some_edges(hf, 30)):
        torch.manual_seed(0)
        out = hf.generate(tokens, max_new_tokens=6, pad_token_id=0, eos_token_id=None, **keywords)
    assert out.shape == (2, 11)


def test_removal_restores_every_bit(family):
    hf = family()
    tokens = torch.randint(1, 50, (2, 9), generator=torch.manual_seed(3))
    with torch.no_grad():
        before, weights = hf(tokens).logits, copy.deepcopy(hf.state_dict())
        described = repr(hf)
        handle = ablate(hf, some_edges(hf, 30))
        assert not hf(tokens).logits.equal(before)
        handle.remove()
        handle.remove()  # harmless
        assert hf(tokens).logits.equal(before)
        with pytest.raises(ZeroDivisionError), ablate(hf, some_edges(hf, 30)):
            raise ZeroDivisionError
        assert hf(tokens).logits.equal(before)
    assert repr(hf) == described
    assert all(weights[name].equal(tensor) for name, tensor in hf.state_dict().items())
