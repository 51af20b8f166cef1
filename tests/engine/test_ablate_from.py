"""Cuts that act from a position on, against the reference, and what the positions before pass on: nothing."""

import pytest
import torch
from helpers.masks import TOKENS, make_masks, make_means
from helpers.models import small_gpt2, small_llama, small_neox
from helpers.tasks import make_task
from test_replays import passes_of, pretend_captures

from circuit_breaking.engine import network
from circuit_breaking.engine.ablation_values import compute_means
from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.reference import ReferenceModel
from circuit_breaking.errors import UserError
from circuit_breaking.models.tokens import pad_right
from circuit_breaking.training.attribution import integrated_mask_gradients
from circuit_breaking.training.config import MaskConfig
from circuit_breaking.training.objective import StepObjective

LENGTH = TOKENS.shape[1]


def exact(hf, split=False, **more):
    return load_model(hf.double(), split, device="cpu", dtype="float64", **more)


def of_both(model, hf, split, mask):
    """Logits and gradients of the mask and the means, from the engine and from the reference."""
    learned = model.means is not None and model.means.dim() == 2
    readout, found = torch.randn(*TOKENS.shape, 50, dtype=torch.float64), []
    for one in ("engine", "reference"):
        weights = mask.clone().requires_grad_()
        means = None if model.means is None else model.means.detach().clone().requires_grad_(learned)
        if one == "engine":
            model.means = means
            logits = model(TOKENS, mask=weights)
        else:
            logits = ReferenceModel(hf, split)(TOKENS, weights, means, model.ablate_from)
        wanted = [weights, means] if learned else [weights]
        found.append([logits, *torch.autograd.grad((logits * readout).sum(), wanted)])
    return zip(*found, strict=True)


@pytest.mark.parametrize(
    "ablate_from",
    [pytest.param(0, marks=pytest.mark.slow), 1, 3, LENGTH, 40],  # test_transformer.py has 0 as well
)
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.without_repeated
def test_random_masks_match_the_reference(family, split, ablate_from):
    hf = family()
    model = exact(hf, split)
    model.ablate_from = ablate_from
    for kind in ("zero", "mean", "position"):
        model.means = make_means(model, kind)
        for mask in make_masks(len(model.graph)):
            for got, expected in of_both(model, hf, split, mask):
                torch.testing.assert_close(got, expected, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("make", [small_gpt2, small_neox])
def test_groups_of_layers_and_checkpointing_match_the_reference(make, monkeypatch):
    monkeypatch.setattr(network, "GROUP_LAYERS", 2)
    monkeypatch.setattr(network, "GROUP_NODES", 0)
    hf = make()
    model = exact(hf, gradient_checkpointing=True)
    model.ablate_from, model.means = 2, make_means(model, "mean")
    for mask in make_masks(len(model.graph)):
        for got, expected in of_both(model, hf, False, mask):
            torch.testing.assert_close(got, expected, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("split", [False, True])
def test_gradcheck(split):
    tiny = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 8, "num_key_value_heads": 1}
    for hf in (small_gpt2(n_layer=2, n_head=2, n_embd=8), small_llama(**tiny)):
        model = exact(hf, split)
        model.ablate_from = 2
        means = torch.randn(len(model.graph.sources), 8, dtype=torch.float64).requires_grad_()
        at, readout = torch.tensor([[1, 4], [3, 2]]), torch.randn(50, 3, dtype=torch.float64)

        def outputs(mask, means):
            model.means = means  # noqa: B023
            return model(TOKENS[:2, :5], at=at, mask=mask) @ readout  # noqa: B023

        for mask in make_masks(len(model.graph))[::2]:
            assert torch.autograd.gradcheck(outputs, (mask.requires_grad_(), means))


def test_earlier_positions_are_the_whole_model(family):
    model = load_model(family(), device="cpu")
    tokens = torch.cat([TOKENS, torch.zeros(3, 4, dtype=torch.long)], 1)  # padded on the right
    whole, outputs = model(tokens), model.node_outputs(tokens)
    model.ablate_from = 3
    for kind in ("zero", "mean", "position"):
        if kind != "position":
            model.means = make_means(model, kind)
        for mask in make_masks(len(model.graph)):
            with torch.no_grad():
                model.mask.weights.copy_(mask)
            logits = model(tokens)
            torch.testing.assert_close(logits[:, :3], whole[:, :3], atol=2e-5, rtol=1e-5)
            torch.testing.assert_close(model.node_outputs(tokens)[:, :, :3], outputs[:, :, :3], atol=2e-5, rtol=1e-5)
            assert not torch.allclose(logits[:, 3:], whole[:, 3:], atol=1e-2)
            torch.testing.assert_close(model(TOKENS), logits[:, :9])
            at = torch.tensor([1, 5, 8])
            torch.testing.assert_close(model(tokens, at=at), logits[torch.arange(3), at])


def test_earlier_positions_pass_no_gradient_on(family):
    model = exact(family())
    model.ablate_from = 4
    model.means = make_means(model, "mean").requires_grad_()
    mask = make_masks(len(model.graph))[0].requires_grad_()
    logits = model(TOKENS, mask=mask)
    for gradient in torch.autograd.grad(logits[:, :4].square().sum(), [mask, model.means], retain_graph=True):
        assert not gradient.any()
    assert all(gradient.any() for gradient in torch.autograd.grad(logits[:, 4].sum(), [mask, model.means]))


def test_a_whole_mask_is_the_whole_model_wherever_cuts_act(family):
    model = load_model(family(), device="cpu")
    model.means = make_means(model, "mean")
    whole = model(TOKENS)
    for ablate_from in (1, 4, LENGTH):
        model.ablate_from = ablate_from
        torch.testing.assert_close(model(TOKENS), whole, atol=2e-5, rtol=1e-5)


def test_cached_prefixes_follow_a_change():
    model = exact(small_gpt2())
    model.means = make_means(model, "mean")
    masks = [mask.clone() for mask in make_masks(len(model.graph))]
    masks += [masks[2].clone().index_fill_(0, torch.tensor([len(model.graph) - 1]), 0)]
    with torch.no_grad(), model.caching_prefixes():
        for ablate_from in (2, 0, 1, 2):
            model.ablate_from = ablate_from
            for mask in masks:
                expected = ReferenceModel(small_gpt2().double())(TOKENS, mask, model.means, ablate_from)
                torch.testing.assert_close(model(TOKENS, mask=mask), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", ["zero", "learned", "position"])
def test_captured_passes_are_those_of_their_ablate_from(kind, monkeypatch):
    """Of one size of batch, with different values in turn (CUDA graphs are pretended, see `test_replays.py`)."""
    pretend_captures(monkeypatch)
    replayed, launched = exact(small_gpt2()), exact(small_gpt2())
    launched.cuda_graphs.enabled = False
    for ablate_from in (1, 0, 3, 1, 99):
        replayed.ablate_from = launched.ablate_from = ablate_from
        for one, other in zip(passes_of(replayed, kind), passes_of(launched, kind), strict=True):
            torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-8)
    assert len(replayed.cuda_graphs._kept) >= 8


@pytest.mark.parametrize("kind", ["zero", "mean"])
@pytest.mark.parametrize("make", [small_gpt2, small_llama])
def test_attributions_add_up_to_what_the_cuts_change(make, kind):
    model = exact(make())
    model.ablate_from, model.means = 2, make_means(model, kind)
    metric = lambda mask: model(TOKENS, mask=mask)[:, :, 7].mean()  # noqa: E731
    ones = torch.ones(len(model.graph), dtype=torch.float64)
    change = metric(ones) - metric(0 * ones)
    torch.testing.assert_close(
        integrated_mask_gradients([metric], model, steps=60).sum(), change.detach(), atol=2e-3, rtol=5e-3
    )
    reference = ReferenceModel(make().double())
    torch.testing.assert_close(metric(0 * ones), reference(TOKENS, 0 * ones, model.means, 2)[:, :, 7].mean())


def test_micro_batches_have_the_gradients_of_the_whole_batch():
    found = []
    for micro_batch in (0, 1):
        model = exact(small_gpt2())
        model.ablate_from = 2
        model.means = (0.1 * make_means(model, "mean")).requires_grad_()
        settings = MaskConfig(micro_batch=micro_batch, constants_loss="objective")
        objective = StepObjective.of_two(model, make_task("keep", 5), make_task("break", 1), settings).draw(4)
        mask = make_masks(len(model.graph))[0].requires_grad_()
        value = objective(mask)
        found.append([value.detach(), *torch.autograd.grad(value, [mask, model.means])])
    for whole, added in zip(*found, strict=True):
        torch.testing.assert_close(whole, added)


@pytest.mark.parametrize("wrong", [-1, 1.5, True, None, "1"])
def test_what_is_no_position_is_refused(wrong):
    model = load_model(small_gpt2(), device="cpu")
    with pytest.raises(UserError, match="first position at which cuts act"):
        model.ablate_from = wrong
    assert model.ablate_from == 0


def test_left_padding_is_refused_so_that_the_first_position_is_the_first_token():
    model = load_model(small_gpt2(), device="cpu")
    model.ablate_from = 1
    mask = torch.ones_like(TOKENS)
    mask[0, :2] = 0
    with pytest.raises(UserError, match="Pad texts on the right"):
        model(TOKENS, attention_mask=mask)


@pytest.mark.parametrize("ablate_from", [0, 1, 2])
def test_means_leave_earlier_positions_out(family, ablate_from):
    model, rows = load_model(family(), device="cpu"), [[0, 5, 7, 9, 11, 3], [0, 4], [0, 8, 8, 8], [0, 21, 2, 6]]
    model.ablate_from = ablate_from
    texts = pad_right(rows, 0)
    texts = type(texts)(torch.nn.functional.pad(texts.tokens, (0, 2)), texts.lengths)
    outputs = [model.node_outputs(torch.tensor([row]))[:, 0, ablate_from:] for row in rows]
    overall = torch.cat(outputs, 1).mean(1)
    torch.testing.assert_close(compute_means(model, texts), overall, atol=1e-5, rtol=1e-5)
    means = compute_means(model, texts, by_position=True)
    for position in range(8):
        here = [one[:, position - ablate_from] for one in outputs if 0 <= position - ablate_from < one.shape[1]]
        expected = torch.stack(here).mean(0) if here else overall
        torch.testing.assert_close(means[position], expected, atol=1e-5, rtol=1e-5)
    model.ablate_from = 6
    with pytest.raises(UserError, match="no text has a token at position 6 or later"):
        compute_means(model, texts)
