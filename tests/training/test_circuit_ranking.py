"""Ranking edges for circuits of every size: its objective, what it finds, and what it refuses."""

import pytest
import torch
from helpers.tasks import small

from circuit_breaking.errors import UserError
from circuit_breaking.training.circuit_ranking import rank_circuit
from circuit_breaking.training.methods.ranking import drawn_budgets, temperature
from circuit_breaking.training.soft_top_k import soft_top_k

MODEL = small()
EDGES = len(MODEL.graph)


def weighted(effects):
    """A metric that is the sum of the effects of the edges that are kept."""
    return lambda mask: (mask * effects).sum()


def test_edges_that_make_the_behaviour_come_first():
    effects = torch.zeros(EDGES)
    important = torch.randperm(EDGES, generator=torch.Generator().manual_seed(0))[:3]
    effects[important] = torch.tensor([4.0, 2.0, 1.0])
    scores = rank_circuit([weighted(effects)], MODEL, 60)
    assert scores.argsort(descending=True)[:3].tolist() == important.tolist()
    assert float(scores.amin()) == 0


def test_a_circuit_that_does_more_than_the_model_is_not_preferred():
    effects = torch.zeros(EDGES)
    effects[:3] = torch.tensor([1.0, 1.0, -1.0])  # whole model: 1
    scores = rank_circuit([weighted(effects)], MODEL, 100)
    # one of the first two is right at every size; the other is worth keeping only together with the third
    first = int(scores[:3].argmax())
    assert first in (0, 1) and scores[2] > scores[3:].median()


def test_the_first_step_follows_the_gradient_of_the_mean_distance_to_the_whole_model():
    start = torch.rand(EDGES, generator=torch.Generator().manual_seed(1))
    metrics = [weighted(torch.rand(EDGES, generator=torch.Generator().manual_seed(seed))) for seed in (2, 3)]
    found = rank_circuit(metrics, MODEL, 1, start)
    scores = (start.argsort().argsort() / (EDGES - 1) / 4).requires_grad_()
    whole = sum(metric(torch.ones(EDGES)) for metric in metrics) / 2
    distances = [
        (1 - metric(soft_top_k(scores, size, temperature(0, 1, EDGES))) / whole).abs()
        for metric, size in zip(metrics, drawn_budgets(0, 2, EDGES - 0.5), strict=True)
    ]
    (gradient,) = torch.autograd.grad(sum(distances) / 2, scores)
    moved = scores.detach() - gradient / (gradient.abs() + 1e-8)  # Adam's first step
    torch.testing.assert_close(found, moved - moved.amin(), atol=2e-4, rtol=0)


def test_what_cannot_be_ranked_is_refused():
    with pytest.raises(UserError, match="at least one example"):
        rank_circuit([], MODEL, 5)
    with pytest.raises(UserError, match="cannot be ranked"):
        rank_circuit([lambda mask: mask.sum() * 0], MODEL, 5)
