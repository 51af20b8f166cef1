"""Edge attribution against finite differences and against what integrated gradients must add up to."""

import warnings

import pytest
import torch
from helpers.models import small_gpt2, small_llama

from circuit_breaking.engine.load import load_model
from circuit_breaking.errors import UserError
from circuit_breaking.models.load import load_tokenizer
from circuit_breaking.tasks.losses import logit_difference
from circuit_breaking.training.attribution import (
    completeness_error,
    eap,
    geometric_points,
    integrated_mask_gradients,
    line_points,
    points_between,
)
from circuit_breaking.training.mask_gradient import value_and_gradient


def difference(model, seed=0):
    """A logit difference at the ends of four texts, as a function of the mask."""
    draw = torch.Generator().manual_seed(seed)
    tokens, lengths = torch.randint(0, 50, (4, 7), generator=draw), torch.tensor([7, 4, 6, 7])
    right, wrong = torch.randint(0, 50, (2, 4), generator=draw)

    def metric(mask):
        return logit_difference(model(tokens, at=lengths - 1, mask=mask), right, wrong).mean()

    return metric


def means_of(model, kind):
    if kind == "zero":
        return None
    shape = (len(model.graph.sources), model.embedding.shape[1])
    shape = (9, *shape) if kind == "position" else shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 0.3


@pytest.mark.parametrize("kind", ["zero", "mean", "position"])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("make", [small_gpt2, small_llama])
def test_eap_is_the_finite_difference_of_every_edge(make, split, kind):
    model = load_model(make(), split, "cpu", "float64")
    model.means = means_of(model, kind)
    metric, ones = difference(model), torch.ones(len(model.graph), dtype=torch.float64)
    scores, step = eap([metric], model), 1e-5
    edges = range(0, len(ones), 1 if len(ones) < 150 else 5)
    with torch.no_grad():
        for edge in edges:
            up, down = ones.clone(), ones.clone()
            up[edge] += step
            down[edge] -= step
            slope = (metric(up) - metric(down)) / (2 * step)
            assert float(scores[edge]) == pytest.approx(float(slope), rel=1e-5, abs=1e-8)


@pytest.mark.filterwarnings("ignore:the scores of integrated gradients over 4 points")
@pytest.mark.parametrize("kind", ["mean", "position"])
@pytest.mark.seconds_per_family
def test_integrated_gradients_add_up_to_the_change_of_the_metric(family, kind):
    model = load_model(family(), False, "cpu", "float64")
    model.means = means_of(model, kind)
    metric, ones = difference(model), torch.ones(len(model.graph), dtype=torch.float64)
    change = float(metric(ones) - metric(torch.zeros_like(ones)))
    errors = [abs(float(integrated_mask_gradients([metric], model, steps).sum()) - change) for steps in (4, 120)]
    assert abs(change) > 0.03 and errors[1] < 1e-3 * abs(change) and errors[1] < errors[0]


@pytest.mark.parametrize(("steps", "most"), [(20, 0.01), (30, 0.005)])
def test_integrated_gradients_add_up_where_norms_divide_by_almost_nothing(steps, most):
    """The shipped model under zero ablation, for prompts like those of its indirect-object task."""
    model, tokenizer = load_model("tiny", device="cpu"), load_tokenizer("tiny")
    pairs = [("Tom", "Mary"), ("Mary", "John"), ("Anna", "Tom"), ("John", "Lucy"), ("James", "Mary"), ("Lucy", "Jack")]
    prompts = [f"<|endoftext|>Then {a} and {b} went to the shop. {b} gave a book to" for a, b in pairs]
    tokens = tokenizer(prompts, return_tensors="pt")["input_ids"]
    last = torch.full((len(pairs),), tokens.shape[1] - 1)
    right, wrong = (torch.tensor([tokenizer(" " + one[n])["input_ids"][0] for one in pairs]) for n in (0, 1))

    def metric(mask):
        return logit_difference(model(tokens, at=last, mask=mask), right, wrong).mean()

    ones = torch.ones(len(model.graph))
    change = metric(ones).detach() - metric(torch.zeros_like(ones)).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = integrated_mask_gradients([metric], model, steps)
    assert abs(float(change)) > 5 and completeness_error(scores, change) < most
    back = integrated_mask_gradients([metric], model, steps, start=ones, end=torch.zeros_like(ones))
    torch.testing.assert_close(back, -scores, atol=1e-3, rtol=1e-3)


def test_points_are_dense_where_all_that_a_reader_gets_is_cut():
    model = load_model(small_gpt2(), device="cpu")
    ones = torch.ones(len(model.graph))
    one_reader = (model.edge_readers != 3).float()
    assert points_between(model, ones * 0.5, ones, 7) == line_points(7)
    for mask in (0 * ones, one_reader):
        assert points_between(model, mask, ones, 7) == geometric_points(7)
        assert points_between(model, ones, mask, 7) == geometric_points(7, at_end=True)
    model.means = means_of(model, "mean").float()
    assert points_between(model, 0 * ones, ones, 7) == line_points(7)
    for points in (geometric_points(200), geometric_points(200, at_end=True), line_points(5)):
        assert sum(weight for _, weight in points) == pytest.approx(1, abs=1e-3)
        assert sum(weight * t for t, weight in points) == pytest.approx(0.5, abs=1e-3)
        assert all(0 < t < 1 for t, _ in points) and points == sorted(points)


def test_scores_that_do_not_add_up_are_warned_of():
    model = load_model(small_gpt2(), device="cpu")
    with pytest.warns(UserWarning, match=r"over 1 points add up to .* off the change of the metric\. Use more points"):
        integrated_mask_gradients([difference(model)], model, 1)
    assert completeness_error(torch.tensor([1.0, 2.0]), torch.tensor(4.0)) == 0.25
    assert completeness_error(torch.zeros(2), torch.tensor(0.0)) == 0


def test_integrated_gradients_between_two_masks(family):
    model = load_model(family(), False, "cpu", "float64")
    metric = difference(model)
    start = (torch.rand(len(model.graph), generator=torch.Generator().manual_seed(2)) > 0.2).double()
    end = torch.ones_like(start)
    scores = integrated_mask_gradients([metric], model, 40, start, end)
    assert float(scores.sum()) == pytest.approx(float(metric(end) - metric(start)), rel=1e-5)
    assert (scores[start == 1] == 0).all() and scores[start == 0].abs().sum() > 0


def test_scores_are_means_over_batches():
    model = load_model(small_gpt2(), device="cpu")
    both = [difference(model, 0), difference(model, 1)]
    ones = torch.ones(len(model.graph))
    expected = (value_and_gradient(both[0], ones)[1] + value_and_gradient(both[1], ones)[1]) / 2
    torch.testing.assert_close(eap(iter(both), model), expected)
    assert model.mask.weights.grad is None  # nothing is left behind
    with torch.no_grad():  # nor does it matter whether gradients are off outside
        torch.testing.assert_close(eap(both, model), expected)


def test_what_cannot_be_attributed():
    model = load_model(small_gpt2(), device="cpu")
    with pytest.raises(UserError, match="no batch to attribute over"):
        eap([], model)
    with pytest.raises(UserError, match="over 0 steps"):
        integrated_mask_gradients([difference(model)], model, 0)
    with pytest.raises(UserError, match="not finite"):
        eap([lambda mask: (mask * float("nan")).sum()], model)
