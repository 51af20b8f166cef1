"""Losses against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from circuit_breaking.tasks import losses


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("words", "predictions"), [(1, 1), (4, 3), (11, 7), (1 << 12, 1 << 12)])
def test_chunked_cross_entropy(monkeypatch, bias, words, predictions):
    monkeypatch.setattr(losses, "WORDS_AT_ONCE", words)
    monkeypatch.setattr(losses, "PREDICTIONS_AT_ONCE", predictions)
    torch.manual_seed(0)
    hidden, table = torch.randn(7, 5, dtype=torch.float64) * 3, torch.randn(11, 5, dtype=torch.float64)
    shift = torch.randn(11, dtype=torch.float64) if bias else None
    targets, weights = torch.randint(0, 11, (7,)), torch.randn(7, dtype=torch.float64)
    mine, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    result = losses.cross_entropy_of_hidden(mine, table, shift, targets)
    expected = F.cross_entropy(F.linear(theirs, table, shift), targets, reduction="none")
    torch.testing.assert_close(result, expected)
    (result * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)
    assert torch.autograd.gradcheck(
        lambda h: losses.cross_entropy_of_hidden(h, table, shift, targets), hidden.clone().requires_grad_()
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


def test_logit_difference():
    logits = torch.tensor([[1.0, 4.0, 2.0], [0.0, 1.0, 5.0]])
    assert losses.logit_difference(logits, torch.tensor([1, 0]), torch.tensor([2, 2])).tolist() == [2.0, -5.0]
