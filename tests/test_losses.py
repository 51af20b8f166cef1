"""Losses against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from circuit_breaking import losses


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("at_once", [1, 40, 1 << 24])
def test_chunked_cross_entropy(monkeypatch, bias, at_once):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", at_once)
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


def test_logit_difference_and_kl():
    logits = torch.tensor([[1.0, 4.0, 2.0], [0.0, 1.0, 5.0]])
    assert losses.logit_difference(logits, torch.tensor([1, 0]), torch.tensor([2, 2])).tolist() == [2.0, -5.0]
    reference = logits.roll(1, 0)
    p, q = reference.softmax(-1), logits.softmax(-1)
    torch.testing.assert_close(losses.kl_divergence(logits, reference), (p * (p / q).log()).sum(-1))
