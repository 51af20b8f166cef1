"""Losses against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F
from helpers.models import spread
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from circuit_breaking.engine.load import load_model
from circuit_breaking.models.families.spec import PLAIN_HEAD, Head
from circuit_breaking.models.tokens import TokenBatch
from circuit_breaking.tasks import losses
from circuit_breaking.tasks.stock_model import StockModel


@pytest.mark.parametrize("head", [PLAIN_HEAD, Head(softcap=2.0), Head(divisor=0.7, softcap=3.0), Head(divisor=8.0)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("words", "predictions"), [(1, 1), (4, 3), (11, 7), (1 << 12, 1 << 12)])
def test_chunked_cross_entropy(monkeypatch, head, bias, words, predictions):
    monkeypatch.setattr(losses, "WORDS_AT_ONCE", words)
    monkeypatch.setattr(losses, "PREDICTIONS_AT_ONCE", predictions)
    torch.manual_seed(0)
    hidden, table = torch.randn(7, 5, dtype=torch.float64) * 3, torch.randn(11, 5, dtype=torch.float64)
    shift = torch.randn(11, dtype=torch.float64) if bias else None
    targets, weights = torch.randint(0, 11, (7,)), torch.randn(7, dtype=torch.float64)
    mine, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    result = losses.cross_entropy_of_hidden(mine, table, shift, targets, head)
    logits = F.linear(theirs, table, shift) / head.divisor
    logits = logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()
    expected = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(result, expected)
    (result * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)
    assert torch.autograd.gradcheck(
        lambda h: losses.cross_entropy_of_hidden(h, table, shift, targets, head), hidden.clone().requires_grad_()
    )


def test_cross_entropy_of_far_logits(monkeypatch):
    """The running peak rises by hundreds from chunk to chunk, and no exponential overflows."""
    monkeypatch.setattr(losses, "WORDS_AT_ONCE", 2)
    table = torch.tensor([-400.0, 0.0, 300.0, 299.0, 900.0, 100.0])[:, None]
    hidden, targets = torch.ones(3, 1, requires_grad=True), torch.tensor([0, 3, 4])
    result = losses.cross_entropy_of_hidden(hidden, table, None, targets)
    torch.testing.assert_close(result, torch.tensor([1300.0, 601.0, 0.0]))
    result.sum().backward()
    torch.testing.assert_close(hidden.grad[:, 0], torch.tensor([1300.0, 601.0, 0.0]))


SMALL = {
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 16, "vocab_size": 50,
    "intermediate_size": 24, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
OTHERS = {  # families without a description here, whose logits are more than a product with the output embedding
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=0.1)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=1.0, attn_implementation="eager")
    ),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=8.0)),
}


@pytest.mark.parametrize("chunk", [1, 1 << 12])
@pytest.mark.parametrize("name", OTHERS)
def test_losses_of_other_families_are_hugging_faces(monkeypatch, name, chunk):
    monkeypatch.setattr(losses, "WORDS_AT_ONCE", chunk)
    torch.manual_seed(0)
    hf = spread(OTHERS[name]())
    tokens, lengths = torch.randint(1, 50, (5, 9)), torch.tensor([9, 4, 6, 9, 2])
    batch, stock = TokenBatch(tokens, lengths), StockModel(hf)
    labels = tokens.masked_fill(torch.arange(9) >= lengths[:, None], -100)
    expected = hf(tokens, labels=labels).loss
    logits = torch.nn.functional.linear(stock.hidden(tokens), stock.unembedding)
    assert (logits - hf(tokens).logits).abs().max() > 0.1  # a plain product would be wrong
    torch.testing.assert_close(losses.prediction_losses(stock, batch).mean(), expected)
    torch.testing.assert_close(stock(tokens, at=lengths - 1), hf(tokens).logits[torch.arange(5), lengths - 1])
    found, owner = losses.trainable_prediction_losses(hf.requires_grad_(True), batch)
    torch.testing.assert_close(found.mean(), expected)
    assert owner.tolist() == [0] * 8 + [1] * 3 + [2] * 5 + [3] * 8 + [4]
    weight = hf.get_output_embeddings().weight
    for one, other in zip(
        torch.autograd.grad(found.mean(), [weight, hf.model.layers[0].mlp.up_proj.weight]),
        torch.autograd.grad(hf(tokens, labels=labels).loss, [weight, hf.model.layers[0].mlp.up_proj.weight]),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_losses_of_the_engine_are_those_of_its_logits(family):
    model = load_model(family(), device="cpu", dtype="float64")
    batch = TokenBatch(
        torch.randint(1, 50, (3, 9), generator=torch.Generator().manual_seed(0)), torch.tensor([9, 4, 2])
    )
    values = torch.rand(len(model.graph), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = []
    for losses_of in (losses.prediction_losses, losses_by_torch):
        mask = values.clone().requires_grad_()
        gradients.append(torch.autograd.grad(losses_of(model, batch, mask).sum(), mask)[0])
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(*(one(model, batch, values) for one in (losses.prediction_losses, losses_by_torch)))


def losses_by_torch(model, batch, mask):
    logits = model(batch.tokens, mask=mask)[batch.predicted]
    return F.cross_entropy(logits, batch.tokens.roll(-1, 1)[batch.predicted], reduction="none")


def test_logit_difference():
    logits = torch.tensor([[1.0, 4.0, 2.0], [0.0, 1.0, 5.0]])
    assert losses.logit_difference(logits, torch.tensor([1, 0]), torch.tensor([2, 2])).tolist() == [2.0, -5.0]


@pytest.mark.parametrize("at_once", [1, 20, 1 << 12])
@pytest.mark.parametrize("bias", [False, True])
def test_chunked_divergence(monkeypatch, bias, at_once):
    """Against PyTorch's own, for a few predictions at a time and for all at once."""
    monkeypatch.setattr(losses, "WORDS_AT_ONCE", at_once)
    monkeypatch.setattr(losses, "PREDICTIONS_AT_ONCE", 2)
    torch.manual_seed(0)
    hidden, original, table = (torch.randn(n, 5, dtype=torch.float64) for n in (7, 7, 11))
    shift = torch.randn(11, dtype=torch.float64) if bias else None
    mine, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    found = losses._Divergence.apply(mine, original, table, shift)
    here, there = (F.log_softmax(F.linear(states, table, shift), -1) for states in (theirs, original))
    expected = F.kl_div(here, there, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(found, expected)
    weights = torch.randn(7, dtype=torch.float64)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)
