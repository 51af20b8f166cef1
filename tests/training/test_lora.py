"""Low-rank adapters against peft's, and the methods that train them."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.models import small, small_gpt2, small_llama
from peft import LoraConfig, get_peft_model
from test_finetuning import loss_by_hand, run, texts

from circuit_breaking.ablation.ablate import ablate
from circuit_breaking.errors import UserError
from circuit_breaking.models.families import describe
from circuit_breaking.training.baselines import baseline
from circuit_breaking.training.baselines.base import start
from circuit_breaking.training.baselines.lora import LowRank, linear_weights
from circuit_breaking.training.config import LossSettings

TOKENS = texts(1, 5).tokens


def logits(model):
    return model(TOKENS).logits


def adapters(hf, names=None, seed=0):
    """Adapters with factors that change the logits."""
    found = LowRank(hf.requires_grad_(False), linear_weights(hf) if names is None else names, 4, seed)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for factor in found.factors.values():
            factor.copy_(0.3 * torch.randn(factor.shape, generator=generator))
    return found


@pytest.mark.seconds_per_family
def test_logits_and_gradients_are_those_of_peft(family):
    hf, twin = family(), family()
    mine = adapters(hf)
    parameters = dict(twin.named_parameters())
    modules = {name.removesuffix(".weight"): name for name in mine.weights()}
    theirs = get_peft_model(twin, LoraConfig(r=4, lora_alpha=4, target_modules=list(modules)))
    with torch.no_grad():
        for name, full in modules.items():
            layer = twin.get_submodule(name)
            layer.lora_A["default"].weight.copy_(mine.factors[f"a.{full}"].t())
            layer.lora_B["default"].weight.copy_(mine.factors[f"b.{full}"].t())
    assert len(modules) == sum("lora_A" in name for name, _ in theirs.named_parameters())
    whole = mine.call(logits, hf)
    torch.testing.assert_close(whole, theirs(TOKENS).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(whole, logits(hf), atol=1e-2)
    for output in (whole, theirs(TOKENS).logits):
        F.cross_entropy(output.flatten(0, 1), TOKENS.flatten()).backward()
    for name, full in modules.items():
        layer = twin.get_submodule(name)
        for key, factor in (("a", layer.lora_A), ("b", layer.lora_B)):
            gradient = factor["default"].weight.grad.t()
            torch.testing.assert_close(mine.factors[f"{key}.{full}"].grad, gradient, atol=1e-4, rtol=1e-3)
    assert all(parameter.grad is None for parameter in hf.parameters())
    before = {name: parameter.clone() for name, parameter in hf.named_parameters()}
    mine.merge_()
    torch.testing.assert_close(logits(hf), whole.detach(), atol=1e-4, rtol=1e-4)
    changed = {name for name, parameter in hf.named_parameters() if not parameter.equal(before[name])}
    assert changed == set(mine.weights()) and len(parameters) > len(changed)


def test_adapters_start_as_the_original_and_differ_by_seed():
    hf = small_llama()
    plain = logits(hf)
    first, again, other = (LowRank(hf, linear_weights(hf), 4, seed) for seed in (0, 0, 1))
    assert first.call(logits, hf).equal(plain)
    for name, factor in first.factors.items():
        assert factor.equal(again.factors[name])
        assert factor.equal(other.factors[name]) == name.startswith("b.")
    assert linear_weights(hf, 1) == [name for name in linear_weights(hf) if ".layers.0." in name]


@pytest.mark.seconds_per_family
def test_adapted_weights_count_where_edges_are_cut(family):
    """Projections that read for cut edges included, where peft cannot put an adapter."""
    hf, merged = family(), family()
    edges = ["embed->a0.1", "m0->a1.0", "m0->m1", "a0.0->a2.1", "embed->output"]
    mine = adapters(hf)
    adapters(merged).merge_()
    with ablate(merged, edges), torch.no_grad():
        expected = logits(merged)
    with ablate(hf, edges):
        got = mine.call(logits, hf)
        cut = logits(hf)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(cut, expected, atol=1e-3)


def test_npo_by_adapters_is_npo_of_the_adapted_model():
    settings = LossSettings(npo_beta=0.5)
    hf, merged = small_gpt2(), small_gpt2()
    state, mine = start(baseline("lora_npo"), hf, settings)
    plain, _ = start(baseline("npo"), merged, settings)
    with torch.no_grad():
        for factor in mine.factors.values():
            factor.add_(0.05)
    twin = LowRank(merged, linear_weights(merged), settings.lora_rank)
    twin.factors = mine.factors
    twin.merge_()
    loss = mine.call(baseline("lora_npo").loss, state, texts(1, 5), texts(2, 5))
    torch.testing.assert_close(loss, baseline("npo").loss(plain, texts(1, 5), texts(2, 5)), rtol=1e-4, atol=1e-4)
    # the original shares the weights that adapters leave as they are
    assert state.original.transformer.wte.weight is hf.transformer.wte.weight


def hidden(model, batch):
    """Hidden states of every text without padding, at the positions of predictions: one tensor per layer."""
    rows = [
        [state[0, : n - 1] for state in model(row[None, :n], output_hidden_states=True).hidden_states]
        for row, n in zip(batch.tokens, batch.lengths, strict=True)
    ]
    return [torch.cat(layer) for layer in zip(*rows, strict=True)]


@pytest.mark.seconds_per_family
@pytest.mark.parametrize("progress", [0.1, 1.0])
@pytest.mark.parametrize("layers", [(), (1,)])
def test_rerouting_by_hand(family, progress, layers):
    hf = family()
    state, mine = start(baseline("rerouting"), hf, LossSettings(rerouting_layers=layers))
    adapted_layers = (1, 2) if not layers else (1,)
    linear = set(linear_weights(hf, max(adapted_layers) + 1))
    assert set(mine.weights()) == linear
    with torch.no_grad():
        for factor in mine.factors.values():
            factor.add_(0.02)
    state.progress = progress
    toxic, plain = texts(1, 5), texts(2, 5)
    with torch.no_grad():
        before = hidden(state.original, toxic), hidden(state.original, plain)
        loss = mine.call(baseline("rerouting").loss, state, toxic, plain)
        mine.merge_()
        after = hidden(hf, toxic), hidden(hf, plain)
    cosines = [F.cosine_similarity(before[0][at], after[0][at], dim=-1).clamp(min=0).mean() for at in adapted_layers]
    moved = torch.stack([(old - new).norm(dim=-1) for old, new in zip(before[1], after[1], strict=True)]).mean()
    # as the authors: 10 (1 - t / 2T) for toxic text, 10 t / 2T for ordinary text
    expected = 10 * (1 - progress / 2) * sum(cosines) / len(cosines) + 10 * progress / 2 * moved
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)


def test_rerouting_needs_another_start_than_the_original():
    """At the original model its loss has no gradient; a small random start has one. The original is measured first."""
    hf = small_gpt2()
    state, mine = start(baseline("rerouting"), hf, LossSettings())

    def gradients():
        loss = mine.call(baseline("rerouting").loss, state, texts(1, 5), texts(2, 5))
        return max(float(one.abs().max()) for one in torch.autograd.grad(loss, list(mine.factors.values())))

    assert gradients() > 1e-3
    with torch.no_grad():
        for name, factor in mine.factors.items():
            if name.startswith("b."):
                assert 0.01 < float(factor.std()) < 0.03
                factor.zero_()
    assert gradients() < 1e-5
    result, left = run("rerouting", lr=1e-9, steps=3, check_every=3, alpha=-1e3)
    assert result.history[0]["score"] == pytest.approx(run("joint", steps=1, alpha=-1e3)[0].history[0]["score"])
    if result.best["step"] == 0:
        torch.testing.assert_close(logits(left), logits(small_gpt2()))


def test_layers_that_cannot_be_rerouted():
    for layers in ((3,), (0,), (1, 5)):
        with pytest.raises(UserError, match=r"rerouting_layers are .*; the model has 3 layers"):
            run("rerouting", rerouting_layers=layers)
    with pytest.raises(UserError, match="the model has 1 layers"):
        run("rerouting", small("gpt2", n_layer=1))
    with pytest.raises(UserError, match="lora_rank"):
        run("lora_npo", lora_rank=0)


@pytest.mark.parametrize("method", ["lora_npo", "rerouting"])
def test_only_linear_weights_change_and_they_are_of_low_rank(method):
    before, hf = small_gpt2(), small_gpt2()
    result, _ = run(method, hf, lora_rank=2)
    assert result.best["step"] > 0 and result.texts == 2 * 4 * 12
    for (name, old), new in zip(before.named_parameters(), hf.parameters(), strict=True):
        change = (new - old).detach()
        if name in linear_weights(hf):
            assert int((torch.linalg.svdvals(change.double()) > 1e-5).sum()) in (1, 2), name
        else:
            assert not change.any(), name
    assert len(describe(hf).layers) == 3 and math.isfinite(float(torch.cat(loss_by_hand(hf, texts(1))).mean()))
