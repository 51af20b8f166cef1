"""Precision: nothing is rounded to less than the requested dtype, and a model that is passed in is copied."""

import pytest
import torch
from helpers.masks import TOKENS, make_masks, make_means
from helpers.models import small_gpt2

from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.products import inner_products, products_with
from circuit_breaking.models.tokens import TokenBatch
from circuit_breaking.tasks.losses import prediction_losses


@pytest.mark.parametrize("split", [False, True])
def test_a_bfloat16_module_is_converted_before_norms_are_folded_into_projections(family, split):
    hf = family().bfloat16()
    model = load_model(hf, split, "cpu", "float32")
    assert {one.dtype for one in hf.parameters()} == {torch.bfloat16}
    expected = hf.float()(TOKENS).logits  # its weights in float32 are exactly those in bfloat16
    assert (model(TOKENS) - expected).abs().max() < 5e-6 * expected.abs().max()


def test_norms_are_folded_in_float32_and_rounded_once(family):
    hf = family().bfloat16()
    rounded, exact = (load_model(hf, device="cpu", dtype=kind) for kind in ("bfloat16", "float32"))
    for mine, theirs in zip(rounded.blocks, exact.blocks, strict=True):
        assert torch.equal(mine.qkv.weight, theirs.qkv.weight.bfloat16())
        assert torch.equal(mine.qkv.bias, theirs.qkv.bias.bfloat16())


@pytest.mark.parametrize("kind", ["zero", "mean"])
def test_autocast_changes_nothing(family, kind):
    model = load_model(family(), device="cpu")
    model.means = make_means(model, kind)
    batch = TokenBatch(TOKENS, torch.tensor([9, 5, 7]))
    found = []
    for on in (False, True):
        mask = make_masks(len(model.graph))[0].float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            logits, loss = model(TOKENS, mask=mask), prediction_losses(model, batch, mask).mean()
            of_loss, of_logits = torch.autograd.grad(loss, mask)[0], torch.autograd.grad(logits.sum(), mask)[0]
            found.append((logits, loss, of_loss, of_logits, model.node_outputs(TOKENS)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_later_changes_of_a_given_model_are_not_seen(family, dtype):
    hf = family()
    model = load_model(hf, device="cpu", dtype=dtype)
    before = model(TOKENS)
    for parameter in hf.parameters():
        parameter.data.mul_(1.5)  # as some optimizers do, unseen by PyTorch's version counters
        parameter.add_(1.0)
    assert torch.equal(model(TOKENS), before)
    fresh = load_model(hf, device="cpu", dtype=dtype)
    torch.testing.assert_close(fresh(TOKENS).to(before), hf(TOKENS).logits.to(before), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_products_of_the_masks_gradient_are_summed_in_float32(dtype):
    torch.manual_seed(0)
    a, b = torch.randn(3, 100_000).to(dtype), torch.randn(5, 100_000).to(dtype)
    exact, sizes = a.double() @ b.double().t(), a.double().abs() @ b.double().abs().t()
    assert inner_products(a, b).dtype == torch.float32
    assert (inner_products(a, b) - exact).abs().div(sizes).max() < 1e-6
    assert (products_with(b, a[0]) - exact[0]).abs().div(sizes[0]).max() < 1e-6


@pytest.mark.parametrize("kind", ["zero", "mean"])
def test_gradients_in_bfloat16_are_near_those_in_float64(kind):
    """Both models have the same weights: only the rounding and summing of activations and gradients differ."""
    hf = small_gpt2(n_layer=6, n_embd=48).bfloat16()
    low, exact = (load_model(hf, device="cpu", dtype=dtype) for dtype in ("bfloat16", "float64"))
    for mine, theirs in zip(low.buffers(), exact.buffers(), strict=True):
        if theirs.is_floating_point():
            theirs.copy_(mine)
    some, _, few = make_masks(len(low.graph))
    for mask in (0.5 + some / 2, few):  # or the first layer's norm would divide by almost nothing
        found = []
        for model in (low, exact):
            model.means = make_means(low, kind) if kind == "zero" else make_means(low, kind).float().requires_grad_()
            weights = mask.float().requires_grad_()
            of = weights if model.means is None else (weights, model.means)
            found.append(torch.autograd.grad(model(TOKENS, mask=weights).double().square().mean(), of))
        for one, other in zip(*found, strict=True):
            assert one.dtype == torch.float32
            assert (one - other).norm() < 0.02 * other.norm()


@torch.no_grad()
def test_a_shared_model_takes_less_memory():
    hf = small_gpt2()

    def of_hf(model):
        theirs = {one.untyped_storage().data_ptr() for one in hf.parameters()}
        return sum(one.untyped_storage().data_ptr() in theirs for one in model.buffers())

    assert of_hf(load_model(hf, device="cpu")) == 0 < of_hf(load_model(hf, device="cpu", share_weights=True))
    assert of_hf(load_model(hf, device="cpu", dtype="float64", share_weights=True)) == 0
    tied = load_model(hf, device="cpu")
    assert tied.embedding.data_ptr() == tied.unembedding.data_ptr()
