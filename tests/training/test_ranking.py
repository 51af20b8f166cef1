"""One ranking for every budget: soft top-k against its definition, and what training returns."""

import math

import pytest
import torch
from helpers.tasks import make_task, run, small

from circuit_breaking.errors import UserError
from circuit_breaking.graph import EdgeGraph, describe
from circuit_breaking.runs.ranking_record import RankingRecord
from circuit_breaking.runs.tensors import write_tensors
from circuit_breaking.training.budgets import masks_at
from circuit_breaking.training.config import MaskConfig
from circuit_breaking.training.edge_ranking import EdgeRanking, load_ranking, save_ranking
from circuit_breaking.training.mask_trainer import train_mask
from circuit_breaking.training.methods.ranking import EdgeScores, temperature
from circuit_breaking.training.prefix_choice import BATCHES, PrefixChoice, lengths_to_measure
from circuit_breaking.training.soft_top_k import soft_top_k, threshold

ALL = 26  # edges of that model


def random_scores(count, dtype=torch.float64):
    return torch.randn(count, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("temperature", [0.01, 0.3, 5.0])
@pytest.mark.parametrize("count", [0.2, 1, 7.5, 29, 29.9])
def test_degrees_add_up_to_the_count(count, temperature):
    scores = random_scores(30)
    degrees = soft_top_k(scores, count, temperature)
    assert float(degrees.sum()) == pytest.approx(count, rel=1e-9)
    t = threshold(scores, count, temperature)
    torch.testing.assert_close(degrees, torch.sigmoid((scores - t) / temperature))
    assert torch.equal(degrees.argsort(), scores.argsort()) or temperature < 0.1  # there some are 0 or 1


@pytest.mark.parametrize("size", [12_000, 100_000])  # fewer thresholds are tried at once, or a single one
def test_degrees_of_many_scores_add_up_to_the_count(size):
    assert float(soft_top_k(random_scores(size), 50, 0.2).sum()) == pytest.approx(50, rel=1e-9)


@pytest.mark.parametrize("size", [12, 100_000])
def test_nothing_waits_for_the_device(size):
    """On a GPU, every number that Python reads is a wait. Tensors without data have none to read."""
    assert soft_top_k(torch.empty(size, device="meta"), 3, 0.5).shape == (size,)


def test_equal_scores_share_the_count_and_a_low_temperature_chooses():
    torch.testing.assert_close(soft_top_k(torch.zeros(8), 3, 0.7), torch.full((8,), 3 / 8))
    scores = random_scores(30, torch.float32)
    chosen = soft_top_k(scores, 6, 1e-3)
    assert set(scores.topk(6).indices.tolist()) == set((chosen > 0.99).nonzero()[:, 0].tolist())


@pytest.mark.parametrize("temperature", [0.2, 1.0])
@pytest.mark.parametrize("count", [0.5, 4, 11.5])
def test_gradcheck_of_soft_top_k(count, temperature):
    """Through the threshold too: raising all scores alike changes nothing."""
    scores = random_scores(12).requires_grad_()
    assert torch.autograd.gradcheck(lambda scores: soft_top_k(scores, count, temperature), scores)
    gradient = torch.autograd.grad((soft_top_k(scores, count, temperature) * random_scores(12)).sum(), scores)[0]
    assert float(gradient.sum()) == pytest.approx(0, abs=1e-12) and gradient.abs().max() > 1e-6


def test_degrees_that_are_0_or_1_have_no_gradient():
    scores = (10.0 * torch.arange(6)).requires_grad_()
    degrees = soft_top_k(scores, 2, 1e-3)
    (gradient,) = torch.autograd.grad((degrees * torch.arange(6)).sum(), scores)
    torch.testing.assert_close(degrees, torch.tensor([0.0, 0, 0, 0, 1, 1]), atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient, torch.zeros(6), atol=1e-3, rtol=0)


def test_the_best_edges_of_a_known_objective_come_first():
    """An objective in which the effects of edges add up; the ranking is that of the effects."""
    model, effects = small(), torch.randn(ALL, generator=torch.Generator().manual_seed(2))
    config = MaskConfig(method="ranking", max_edges=5, steps=200)

    def objective(mask):
        return -((1 - mask) * effects).sum()

    method = EdgeScores(model, config, None, lambda size: objective, lambda loss: loss.backward())
    rows = [method.step(number) for number in range(200)]
    found = EdgeRanking.of_scores(model.graph, method.scores())
    assert found.order[:8].tolist() == effects.argsort(descending=True)[:8].tolist()
    assert set((model.mask.weights == 0).nonzero()[:, 0].tolist()) == set(effects.topk(5).indices.tolist())
    assert {row.phase for row in rows} == {"rank"} and min(row.n_cut for row in rows) == 5


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_small_and_a_large_budget_share_the_texts_of_a_step(batch_size):
    """The gradient is that of the mean over the texts, each at the budget of its half."""
    model, effects, drawn = small(), torch.randn(ALL, generator=torch.Generator().manual_seed(2)), []

    def next_objective(texts):
        drawn.append(texts)
        return lambda mask: (mask * effects * len(drawn)).sum()

    config = MaskConfig(max_edges=5, steps=50, batch_size=batch_size)
    method = EdgeScores(model, config, None, next_objective, lambda loss: loss.backward())
    with torch.no_grad():
        method.parameter.copy_(random_scores(ALL))
    scores = method.parameter.detach().clone().requires_grad_()
    shares = {1: [1], 2: [1, 1], 5: [3, 2]}[batch_size]
    budgets = method.budgets(7, len(shares))
    assert (budgets == sorted(budgets) and len(budgets) == 1) or budgets[0] < (ALL - 0.5) ** 0.5 < budgets[1]
    row = method.step(7)
    assert drawn == shares and row.n_cut == round(budgets[-1])
    masks = [1 - soft_top_k(scores, budget, temperature(7 / 50, 50, ALL)) for budget in budgets]
    parts = [share / batch_size * (mask * effects).sum() for share, mask in zip(shares, masks, strict=True)]
    expected = sum(number * part for number, part in enumerate(parts, 1))
    assert row.loss == pytest.approx(float(expected.detach()), abs=1e-5)
    torch.testing.assert_close(method.parameter.grad, *torch.autograd.grad(expected, scores))


def test_budgets_are_spread_evenly_and_the_temperature_falls():
    method = EdgeScores(small(), MaskConfig(method="ranking", steps=200), None, None, None)
    logs = sorted(math.log(k) / math.log(ALL - 0.5) for number in range(100) for k in method.budgets(number, 2))
    assert all(abs(log - (number + 0.5) / 200) < 0.02 for number, log in enumerate(logs))
    few = EdgeScores(small(), MaskConfig(method="ranking"), torch.arange(ALL) < 1, None, None)
    assert 0 < few.budgets(0, 1)[0] < 1
    temperatures = [temperature(progress / 10, 200, ALL) for progress in range(11)]
    assert temperatures == sorted(temperatures, reverse=True)
    for keep_loss, first in (("kl", 0.12), ("loss", 0.35)):
        method = EdgeScores(small(), MaskConfig(steps=200, keep_loss=keep_loss), None, None, None)
        shares = [method.temperature(progress) * math.log(ALL) / 200 for progress in (0, 0.375, 0.75, 0.875, 1)]
        assert shares == pytest.approx([first, (first * 0.012) ** 0.5, 0.012, (0.012 * 0.002) ** 0.5, 0.002])
        assert method.head_start() == pytest.approx(first * 200)


@pytest.mark.parametrize("refine_rounds", [0, 3])
def test_a_mask_of_every_budget(refine_rounds):
    model = small()
    allowed = torch.arange(ALL) % 3 != 0
    result, _ = run(model, allowed, method="ranking", max_edges=5, refine_rounds=refine_rounds)
    ranking = result.ranking
    assert len(ranking) == int(allowed.sum()) == len(set(ranking.edges))
    assert all(allowed[model.graph.index(edge)] for edge in ranking.edges)
    assert ranking.scores.tolist() == sorted(ranking.scores.tolist(), reverse=True)
    for count in (0, 1, 5, len(ranking)):
        for mask, n_cut in ((ranking.mask(count), count), (result.at(count), result.choice.length(count))):
            cut = {edge for edge, weight in zip(model.graph.edges, mask.tolist(), strict=True) if weight == 0}
            assert cut == set(ranking.edges[:n_cut]) and set(mask.tolist()) <= {0.0, 1.0} and n_cut <= count
    if not refine_rounds:
        assert torch.equal(result.at(5), result.weights)
    for count in (-1, len(ranking) + 1):
        with pytest.raises(UserError, match="edges cannot be cut: the ranking holds"):
            result.at(count)


def test_an_edge_that_spoils_a_mask_is_left_out_of_larger_budgets_too():
    """Measured at 0, 1, 2, 3, 5, 8 and 12 edges: the fourth edge does damage that the later ones do not undo."""
    lengths = [0, 1, 2, 3, 5, 8, 12]
    effects = torch.tensor([1.0, 1, 1, -9, 1, 1, 1, 1, 0, 0, 0, 0])
    batches = iter([-1.0, 0.0, 1.0])

    def objective(mask):
        return offset - ((1 - mask) * effects).sum()

    choice = PrefixChoice(lengths)
    assert [choice.length(budget) for budget in (0, 4, 30)] == [0, 4, 30]  # nothing is measured yet
    for offset in batches:  # batches differ much more than masks do
        assert choice.measure(objective, torch.arange(12), torch.ones(12)) == pytest.approx(offset + 2)
    assert [choice.length(budget) for budget in range(5)] == [0, 1, 2, 3, 3]
    assert {choice.length(budget) for budget in range(5, 100)} == {3}
    again = PrefixChoice(lengths)
    again.restore(choice.state(), torch.device("cpu"))
    assert again.values.equal(choice.values)


def test_budgets_between_lengths_are_trusted_where_more_edges_do_no_harm():
    choice = PrefixChoice([0, 2, 4, 8])
    choice.measure(lambda mask: -(mask == 0).sum().clamp(max=4), torch.arange(9), torch.ones(9))
    assert [choice.length(budget) for budget in range(10)] == list(range(10))
    worse = PrefixChoice([0, 2, 4, 8])
    worse.measure(lambda mask: (mask == 0).sum(), torch.arange(9), torch.ones(9))
    assert [worse.length(budget) for budget in range(10)] == [0] * 10


def test_lengths_are_the_budgets_and_some_between():
    assert lengths_to_measure(MaskConfig(), 200) == [0, 1, 2, 3, 4, 5, 6, 8, 12, 17, 25, 35, 50]
    assert lengths_to_measure(MaskConfig(max_edges=30), 200) == lengths_to_measure(MaskConfig(), 200)
    assert max(lengths_to_measure(MaskConfig(max_edges=70), 200)) == 70
    assert lengths_to_measure(MaskConfig(max_edges=5, budgets=()), 4) == [0, 1, 2, 3, 4]
    assert lengths_to_measure(MaskConfig(), 0) == [0]


def test_the_mask_in_the_model_is_the_best_prefix_that_the_budget_allows():
    result, model = run(small(), method="ranking", max_edges=5, refine_rounds=0)
    rows = [row for row in result.history if row["phase"] == "choose"]
    assert len(rows) == BATCHES and {row["n_cut"] for row in rows} == {ALL}
    means = result.choice.values.mean(0)
    best = result.choice.lengths[int(means[[length <= 5 for length in result.choice.lengths]].argmin())]
    assert model.mask.n_cut() == best == len(result.edges) and result.at(5).equal(result.weights)
    assert [row["loss"] for row in rows] == result.choice.values[:, -1].tolist()


def test_a_method_for_one_budget_has_no_ranking():
    result, _ = run(small(), method="clamped", max_edges=5)
    assert result.ranking is None
    with pytest.raises(UserError, match="trained for one budget"):
        result.at(3)


def test_equal_scores_stay_in_the_order_of_the_graph():
    graph = EdgeGraph(n_layers=1, n_heads=1)
    scores = torch.tensor([0.0, 2.0, float("-inf"), 0.0, 2.0, -1.0])[: len(graph)]
    assert EdgeRanking.of_scores(graph, scores).order.tolist() == [1, 4, 0, 3, 5]


def test_the_objective_at_small_and_large_budgets_falls():
    model, keep, broken = small(), make_task("keep", 5), make_task("break", 1)

    def objective(mask):
        with torch.no_grad():
            model.mask.weights.copy_(mask)
        return keep.get_test_loss(model) - broken.get_test_loss(model)

    before = objective(torch.ones(ALL))
    result, _ = run(
        model, method="ranking", max_edges=3, alpha=1.0, steps=80, refine_rounds=0,
        batch_size=12,
    )  # fmt: skip
    gains = [before - objective(result.at(count)) for count in (1, 3, 8)]
    assert 0.005 < gains[0] < gains[1] < gains[2]


def test_a_ranking_is_written_and_read(tmp_path):
    model = small()
    allowed = torch.arange(ALL) % 3 != 0
    ranking = run(model, allowed, method="ranking", max_edges=5, refine_rounds=0)[0].ranking
    path = tmp_path / "ranking.safetensors"
    save_ranking(path, model, ranking, RankingRecord(method="ranking", seed=3))
    found, record = load_ranking(path)
    assert found.edges == ranking.edges and torch.equal(found.scores, ranking.scores)
    assert torch.equal(found.mask(4), ranking.mask(4)) and (record.method, record.seed) == ("ranking", 3)


@pytest.mark.parametrize("damage", ["twice", "beyond", "lengths", "dtype", "nothing", "graph"])
def test_a_damaged_ranking_is_refused(tmp_path, damage):
    model = small()
    path, about = tmp_path / "ranking.safetensors", RankingRecord(graph=describe(model.graph)).to_json()
    tensors = {"order": torch.tensor([3, 1, 2]), "scores": torch.tensor([2.0, 1.0, 0.0])}
    tensors |= {
        "twice": {"order": torch.tensor([3, 3, 2])}, "beyond": {"order": torch.tensor([3, ALL, 2])},
        "lengths": {"scores": torch.ones(2)}, "dtype": {"order": torch.ones(3)}, "nothing": {}, "graph": {},
    }[damage]  # fmt: skip
    if damage == "nothing":
        del tensors["order"]
    write_tensors(path, tensors, about if damage != "graph" else {**about, "graph": {"n_layers": 1}})
    with pytest.raises(UserError, match=r"ranking\.safetensors (holds no ranking|ranks edges|is damaged)"):
        load_ranking(path)


@pytest.mark.parametrize("constants_lr", [0.0, 0.05])
def test_masks_of_many_budgets(constants_lr):
    model, tasks = small(), (make_task("break", 1), make_task("keep", 5))
    settings = MaskConfig(
        method="ranking", max_edges=5, steps=11, refine_rounds=0, batch_size=3,
        constants_lr=constants_lr, constants_steps=2,
    )  # fmt: skip
    result = train_mask(model, *tasks, settings, progress=False)
    means, seen = model.means, []
    for budget in masks_at((7, 2, 2, ALL, 999), result, model, *tasks, settings):
        assert torch.equal(model.mask.weights.detach(), result.at(budget))
        seen.append((budget, model.means))
    assert [budget for budget, _ in seen] == [2, 7, ALL]
    if constants_lr:
        for budget, each in seen:
            assert torch.equal(each, means) == torch.equal(result.at(budget), result.weights)
        assert torch.equal(seen[0][1], seen[1][1]) == torch.equal(result.at(2), result.at(7))
        assert not any(each.requires_grad for _, each in seen)
    assert (model.means is None) if means is None else torch.equal(model.means, means)
    assert torch.equal(model.mask.weights.detach(), result.weights)


def test_budgets_that_cut_the_same_edges_share_constants(monkeypatch):
    model, tasks = small(), (make_task("break", 1), make_task("keep", 5))
    settings = MaskConfig(max_edges=5, steps=11, batch_size=3, constants_lr=0.05, constants_steps=2)
    result = train_mask(model, *tasks, settings, progress=False)
    monkeypatch.setattr(type(result), "at", lambda self, budget: self.ranking.mask({2: 2, 5: 3, 7: 3}[budget]))
    means = []
    for _ in masks_at((2, 5, 7), result, model, *tasks, settings):
        assert model.mask.n_cut() == (2 if not means else 3)
        means.append(model.means)
    assert means[1] is means[2]
    assert not torch.equal(means[0], means[1])


def test_the_budget_of_the_training_has_its_constants():
    model, tasks = small(), (make_task("break", 1), make_task("keep", 5))
    settings = MaskConfig(max_edges=5, steps=11, batch_size=3, constants_lr=0.05, constants_steps=2)
    result = train_mask(model, *tasks, settings, progress=False)
    trained = model.means
    assert [torch.equal(model.means, trained) for _ in masks_at((5,), result, model, *tasks, settings)] == [True]
