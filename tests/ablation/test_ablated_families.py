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


def test_a_sliding_window_is_the_models_own_affair():
    """Texts within the window are compared with the engine; on longer ones hooks change only the cut edges."""
    hf = small_mistral(sliding_window=9)
    edges = some_edges(hf, 30)
    tokens = torch.randint(1, 50, (2, 9), generator=torch.manual_seed(3))
    expected = engine_logits(hf, edges, None, tokens, True)
    with ablate(hf, edges), torch.no_grad():
        assert torch.allclose(hf(tokens).logits, expected, atol=1e-4)
    long = torch.randint(1, 50, (2, 20), generator=torch.manual_seed(3))
    with torch.no_grad():
        before = hf(long).logits
        with ablate(hf, ["m2->output"]):
            keywords = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
            assert hf.generate(long, **keywords).equal(hf.generate(long, use_cache=False, **keywords))
        assert hf(long).logits.equal(before)
    with pytest.raises(UserError, match="more than the model's 9 positions"):
        engine_logits(hf, edges, None, long, True)
