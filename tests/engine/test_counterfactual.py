"""Resample ablation: cut edges that carry what their source writes on a counterfactual text."""

import pytest
import torch
from helpers.masks import TOKENS, make_masks, make_means
from helpers.models import small_gpt2, small_llama, small_neox
from test_replays import pretend_captures
from transformers import GPT2Config, GPT2LMHeadModel

from circuit_breaking.engine import network
from circuit_breaking.engine.counterfactual import CounterfactualValues
from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.reference import ReferenceModel
from circuit_breaking.errors import UserError
from circuit_breaking.models.tokens import pad_right

OTHER = torch.randint(0, 50, TOKENS.shape, generator=torch.Generator().manual_seed(7))


def exact(hf, split=False, **more):
    return load_model(hf.double(), split, device="cpu", dtype="float64", **more)


def readout_of(logits):
    return torch.randn(logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(2))


def logits_and_gradient(call, mask):
    """Logits, and the gradient of a random sum of them in the mask."""
    weights = mask.clone().requires_grad_()
    logits = call(weights)
    return logits.detach(), torch.autograd.grad((logits * readout_of(logits)).sum(), weights)[0]


def resampled(model, tokens=TOKENS, counterfactual=OTHER):
    def call(mask):
        with model.resampling(counterfactual):
            return model(tokens, mask=mask)

    return call


def assert_same(got, expected, tolerance=1e-9):
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("split", [False, True])
def test_logits_and_gradients_are_those_of_the_definition(family, split):
    hf = family()
    model, reference = exact(hf, split), ReferenceModel(hf, split)
    for ablate_from, mask in zip((0, 2, 0), make_masks(len(model.graph)), strict=True):
        model.ablate_from = ablate_from
        got = logits_and_gradient(resampled(model), mask)
        expected = logits_and_gradient(lambda weights: reference(TOKENS, weights, None, model.ablate_from, OTHER), mask)
        assert_same(got, expected)
        assert got[1].abs().max() > 1e-3


@pytest.mark.seconds_per_family
def test_each_text_has_its_own_values(family):
    """Against one text at a time, whose outputs on the counterfactual are given as means by position."""
    model = exact(family())
    mask = make_masks(len(model.graph))[0]
    logits, gradient = logits_and_gradient(resampled(model), mask)
    total = torch.zeros_like(gradient)
    for row in range(len(TOKENS)):
        one = slice(row, row + 1)
        model.means = model.node_outputs(OTHER[one])[:, 0].transpose(0, 1)
        weights = mask.clone().requires_grad_()
        alone = model(TOKENS[one], mask=weights)
        assert_same([logits[one]], [alone.detach()])
        total += torch.autograd.grad((alone * readout_of(logits)[one]).sum(), weights)[0]
    assert_same([gradient], [total])


@pytest.mark.parametrize("make", [small_gpt2, small_neox])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_groups_of_layers_and_checkpointing(make, checkpointing, monkeypatch):
    monkeypatch.setattr(network, "GROUP_LAYERS", 2)
    monkeypatch.setattr(network, "GROUP_NODES", 0)
    hf = make()
    model, reference = exact(hf, gradient_checkpointing=checkpointing), ReferenceModel(hf)
    model.ablate_from = 1
    for mask in make_masks(len(model.graph)):
        expected = logits_and_gradient(lambda weights: reference(TOKENS, weights, None, 1, OTHER), mask)
        assert_same(logits_and_gradient(resampled(model), mask), expected)


@pytest.mark.parametrize("make", [small_gpt2, small_llama])
def test_padding_changes_nothing(make):
    rows, others = [[0, 5, 9], [0, 7, 3, 8, 2, 4]], [[0, 6, 1], [0, 2, 9, 9, 1, 3]]
    model = exact(make())
    mask = make_masks(len(model.graph))[2]
    batch = resampled(model, pad_right(rows, 0).tokens, pad_right(others, 49).tokens)(mask)
    for at, (row, other) in enumerate(zip(rows, others, strict=True)):
        alone = resampled(model, torch.tensor([row]), torch.tensor([other]))(mask)
        assert_same([batch[at : at + 1, : len(row)]], [alone])


@pytest.mark.seconds_per_family
@pytest.mark.parametrize("split", [False, True])
def test_values_are_the_outputs_of_the_whole_model(family, split):
    model = exact(family(), split)
    with model.resampling(OTHER):
        values = model._counterfactual.outputs.view(len(model.graph.sources), *OTHER.shape, -1)
    assert_same([values], [model.node_outputs(OTHER)])
    assert values.untyped_storage().nbytes() == values.nbytes  # one stack of node outputs, and no more
    with torch.no_grad():
        model.mask.weights[::3] = 0.2
    with model.resampling(OTHER):  # whatever the mask
        assert model._counterfactual.outputs.view_as(values) is not None
        assert_same([model._counterfactual.outputs.view_as(values)], [values])
        outputs = model.node_outputs(TOKENS)
        assert_same([model(TOKENS)], [model(TOKENS, mask=model.mask.weights)])
    model.means = values[:, 0].transpose(0, 1)
    assert_same([outputs[:, :1]], [model.node_outputs(TOKENS[:1])])


def test_two_batches_before_either_backward():
    model = exact(small_gpt2())
    mask = make_masks(len(model.graph))[0].requires_grad_()
    expected = [logits_and_gradient(resampled(model, TOKENS, one), mask.detach())[1] for one in (OTHER, TOKENS.flip(0))]
    losses = [(resampled(model, TOKENS, one)(mask)) for one in (OTHER, TOKENS.flip(0))]
    losses = [(logits * readout_of(logits)).sum() for logits in losses]
    for loss, gradient in zip(losses, expected, strict=True):
        for _ in range(2):  # the second backward runs the forward pass again
            assert_same(torch.autograd.grad(loss, mask, retain_graph=True), [gradient])


def count_passes(monkeypatch):
    found, make = [], CounterfactualValues.of.__func__

    def of(cls, *args):
        found.append(1)
        return make(cls, *args)

    monkeypatch.setattr(CounterfactualValues, "of", classmethod(of))
    return found


def test_many_masks_on_a_batch_share_one_pass(monkeypatch):
    model, passes = exact(small_gpt2()), count_passes(monkeypatch)
    masks = make_masks(len(model.graph))
    for mask in masks:
        resampled(model)(mask)
        resampled(model, OTHER, TOKENS)(mask)
    assert len(passes) == 6  # two batches in turn
    del passes[:]
    for mask in masks:
        resampled(model, OTHER, TOKENS)(mask)
    assert len(passes) == 0
    model.ablate_from = 1  # which the values depend on
    resampled(model, OTHER, TOKENS)(masks[0])
    assert len(passes) == 1


@torch.no_grad()
def test_cached_prefixes_tell_counterfactuals_apart(monkeypatch):
    model, passes = exact(small_gpt2()), count_passes(monkeypatch)
    model.means = make_means(model, "mean")
    base = make_masks(len(model.graph))[1]
    masks = [base, *(base.clone() for _ in range(4))]
    for at, mask in zip((3, 40, len(base) - 2, 80), masks[1:], strict=True):
        mask[at] = 1 - mask[at]
    calls = [resampled(model), resampled(model, TOKENS, TOKENS.flip(1)), lambda mask: model(TOKENS, mask=mask)]
    expected = [[call(mask) for call in calls] for mask in masks]
    del passes[:]
    with model.caching_prefixes():
        got = [[call(mask) for call in calls] for mask in masks]
        assert len(model.prefix_cache._kept) == 3
    assert len(passes) <= 2
    for one, other in zip(got, expected, strict=True):
        assert_same(one, other, 1e-12)


def test_learned_constants_take_no_part():
    model = exact(small_gpt2())
    constants = make_means(model, "mean").requires_grad_()
    model.means = constants
    mask = make_masks(len(model.graph))[0].requires_grad_()
    loss = resampled(model)(mask).square().sum()
    of_mask, of_constants = torch.autograd.grad(loss, [mask, constants], allow_unused=True)
    assert of_constants is None and of_mask.abs().sum() > 0
    model.means = None
    assert_same([of_mask], [torch.autograd.grad(resampled(model)(mask).square().sum(), mask)[0]])


def test_passes_are_not_replayed(monkeypatch):
    """A CUDA graph has no room for values that differ from text to text."""
    pretend_captures(monkeypatch)
    model = exact(small_gpt2())
    mask = make_masks(len(model.graph))[0]
    plain = logits_and_gradient(lambda weights: model(TOKENS, mask=weights), mask)
    model.cuda_graphs.enabled = False
    expected = logits_and_gradient(resampled(model), mask)
    model.cuda_graphs.enabled = True
    for _ in range(5):
        assert_same(logits_and_gradient(lambda weights: model(TOKENS, mask=weights), mask), plain)
        assert_same(logits_and_gradient(resampled(model), mask), expected)
    assert len(model.cuda_graphs._kept) == 1


def test_layers_whose_weights_are_offloaded():
    mask = torch.ones(207)
    mask[::5] = 0.0
    found = []
    for offload in (False, True):
        model = load_model("tiny", device="cpu", offload=offload)
        found.append(logits_and_gradient(resampled(model), mask))
    assert_same(*found, 1e-5)


def test_what_is_refused():
    model = exact(small_gpt2())
    model.means = torch.zeros(4, len(model.graph.sources), 24)  # by position, and shorter than the texts
    with model.resampling(OTHER):
        model(TOKENS)  # for which they are not used
        with pytest.raises(UserError, match=r"\[3, 8\].* and its counterfactual \[3, 9\]"):
            model(TOKENS[:, :8])
        with pytest.raises(UserError, match=r"\[2, 9\].* and its counterfactual \[3, 9\]"):
            model(TOKENS[:2])
        with pytest.raises(UserError, match="cannot change while"):
            model.ablate_from = 1
        with model.resampling(OTHER[:1]):
            model(TOKENS[:1])
        model(TOKENS)
    with pytest.raises(UserError, match="per position"):
        model(TOKENS)
    with pytest.raises(UserError, match="33 tokens are more than"), model.resampling(torch.zeros(1, 33).long()):
        pass
    with pytest.raises(UserError, match="int64"), model.resampling(torch.zeros(1, 3)):
        pass


@pytest.mark.slow
def test_fifty_edges_of_gpt2_small():
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config()).eval()
    tokens, other = torch.randint(0, 50257, (2, 2, 15))
    for split in (False, True):
        model, reference = load_model(hf, split, "cpu"), ReferenceModel(hf, split)
        mask = torch.ones(len(model.graph))
        mask[torch.randperm(len(mask))[:50]] = 0.0
        got = logits_and_gradient(resampled(model, tokens, other), mask)
        expected = logits_and_gradient(
            lambda weights, reference=reference: reference(tokens, weights, counterfactual=other), mask
        )
        assert_same(got, expected, 2e-4)
        with torch.no_grad():
            assert (got[0] - hf(tokens).logits).abs().max() > 1e-2
