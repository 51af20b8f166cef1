"""Cut edges of stock models that carry outputs on a counterfactual batch, against the edge-masked transformer."""

import pytest
import torch
from helpers.models import small_gpt2, small_llama
from test_ablated_from import TOKENS, edges_of, engine_of, logits, means_of

from circuit_breaking.ablation.ablate import ablate
from circuit_breaking.errors import UserError
from circuit_breaking.models.tokens import pad_right
from circuit_breaking.tasks.prompts import PromptBatch, end_logits
from circuit_breaking.tasks.stock_model import StockModel

OTHER = TOKENS.flip(0).roll(2, 1)


@pytest.mark.parametrize("ablate_from", [0, 2])
def test_logits_equal_the_engine(family, ablate_from):
    hf = family().double()
    edges = edges_of(hf)
    means = means_of(hf, "mean")
    engine = engine_of(hf, edges, means, ablate_from)
    with torch.no_grad(), engine.resampling(OTHER):
        expected = engine(TOKENS)
    before = logits(hf)
    with ablate(hf, edges, means, ablate_from) as handle:
        plain = logits(hf)
        with handle.resampling(OTHER):
            torch.testing.assert_close(logits(hf), expected, atol=1e-5, rtol=1e-5)  # RMSNorm is in float32 there
            assert handle.resampled
        assert not handle.resampled and torch.equal(logits(hf), plain)
        assert (plain - expected).abs().max() > 1e-3 < (expected - before).abs().max()
    assert torch.equal(logits(hf), before)


def test_nearly_all_edges_are_cut():
    """A read is then the sum of the nodes whose edges are kept."""
    hf = small_llama().double()
    edges = edges_of(hf, 10**6)
    engine = engine_of(hf, edges, None, 0)
    with torch.no_grad(), engine.resampling(OTHER), ablate(hf, edges) as handle, handle.resampling(OTHER):
        torch.testing.assert_close(logits(hf), engine(TOKENS), atol=1e-5, rtol=1e-5)  # RMSNorm is in float32 there


def test_tasks_use_the_counterfactuals_of_their_prompts():
    hf = small_gpt2().double()
    edges = edges_of(hf)
    text, other = pad_right([[0, 5, 9], [0, 7, 3, 8]], 0), pad_right([[0, 6, 1], [0, 2, 9, 9]], 0)
    batch = PromptBatch(text.tokens, text.lengths, None, text.tokens[:, :1], text.tokens[:, :1], other.tokens)
    engine, stock = engine_of(hf, edges, None, 0), StockModel(hf)
    with torch.no_grad(), ablate(hf, edges):
        zero = end_logits(stock, batch)[0]
        torch.testing.assert_close(zero, end_logits(engine, batch)[0])
        engine.resample = stock.resample = True
        found = end_logits(stock, batch)[0]
        torch.testing.assert_close(found, end_logits(engine, batch)[0])
        assert (found - zero).abs().max() > 1e-3
    with torch.no_grad():
        torch.testing.assert_close(end_logits(stock, batch)[0], hf(text.tokens).logits[[0, 1], [2, 3]])


def test_what_is_refused(tmp_path):
    hf = small_gpt2()
    handle = ablate(hf, edges_of(hf))
    with handle.resampling(OTHER):
        with pytest.raises(UserError, match=r"counterfactual of \[2, 9\] tokens, and this pass is over \[2, 8\]"):
            logits(hf, TOKENS[:, :8])
        with pytest.raises(UserError, match="text cannot be generated"):
            hf.generate(TOKENS, max_new_tokens=2, pad_token_id=0)
        with pytest.raises(UserError, match="hides tokens before others"):
            logits(hf, attention_mask=torch.tensor([[0] + [1] * 8, [1] * 9]))
        with pytest.raises(UserError, match="cannot be saved"):
            hf.save_pretrained(tmp_path / "model")
        logits(hf, attention_mask=torch.tensor([[1] * 8 + [0], [1] * 9]))
    hf.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="33 tokens"), handle.resampling(torch.zeros(1, 33).long()):
        pass
    assert hf.edge_cuts is handle  # the cuts are back
    handle.remove()
    with pytest.raises(UserError, match="cuts were removed"), handle.resampling(OTHER):
        pass
