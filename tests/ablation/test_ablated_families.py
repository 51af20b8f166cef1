"""Edges cut in stock models of every family, with their options, against the engine."""

import pytest
import torch
from helpers.models import small_gpt2, small_mistral, small_neox, small_qwen3
from test_ablated import engine_logits, some_edges

from circuit_breaking.ablation.ablate import ablate
from circuit_breaking.errors import UserError


def test_gpt2_variants():
    tokens = torch.randint(1, 50, (2, 9), generator=torch.manual_seed(3))
    for changes in ({"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}, {"n_inner": 40}):
        hf = small_gpt2(**changes).double()
        edges = some_edges(hf, 30)
        expected = engine_logits(hf, edges, None, tokens, True)
        with ablate(hf, edges), torch.no_grad():
            assert torch.allclose(hf(tokens).logits, expected, atol=1e-10)


NEOX_VARIANTS = (
    {"use_parallel_residual": False},
    {"attention_bias": False},
    {"rotary_pct": 1.0},
    {"tie_word_embeddings": True},
)


@pytest.mark.parametrize("changes", NEOX_VARIANTS, ids=str)
def test_neox_variants(changes):
    tokens = torch.randint(1, 50, (2, 9), generator=torch.manual_seed(3))
    hf = small_neox(**changes).double()
    edges = some_edges(hf, 40)
    expected = engine_logits(hf, edges, None, tokens, True)
    with ablate(hf, edges), torch.no_grad():
        assert torch.allclose(hf(tokens).logits, expected, atol=1e-10)


def test_the_graph_of_parallel_layers():
    own = "a1.2->m1"
    with pytest.raises(UserError, match=f"{own}.*m1 does not come after a1.2"):
        ablate(small_neox(), [own])
    with ablate(small_neox(use_parallel_residual=False), [own]) as handle:
        assert handle.edges == [own]


@pytest.mark.parametrize("share", [1, 2, 4])
def test_query_heads_that_share_normalised_keys(share):
    hf = small_qwen3(num_key_value_heads=4 // share)
    tokens = torch.randint(1, 50, (2, 9), generator=torch.manual_seed(3))
    edges = ["m0->a1.1.k", "embed->a2.3.v", "m0->a2.1.q"]
    expected = engine_logits(hf, edges, None, tokens, True)
    with ablate(hf, edges), torch.no_grad():
        assert torch.allclose(hf(tokens).logits, expected, atol=1e-4)


@pytest.mark.parametrize("length", [9, 20])  # of texts within and beyond the window
@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (small_mistral, {"sliding_window": 9}),
        (small_qwen3, {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    ],
)
def test_sliding_windows(make, changes, length):
    hf = make(**changes)
    edges = some_edges(hf, 30)
    tokens = torch.randint(1, 50, (2, length), generator=torch.manual_seed(3))
    expected = engine_logits(hf, edges, None, tokens, True)
    with torch.no_grad():
        before = hf(tokens).logits
        with ablate(hf, edges):
            assert torch.allclose(hf(tokens).logits, expected, atol=1e-4)
            keywords = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
            assert hf.generate(tokens, **keywords).equal(hf.generate(tokens, use_cache=False, **keywords))
        assert hf(tokens).logits.equal(before)
