"""The mask-training loop on a model and tasks small enough to know the answer."""

import pytest
import torch
from helpers.models import small_gpt2
from helpers.tasks import make_task, run

from circuit_breaking.engine.load import load_model
from circuit_breaking.errors import UserError
from circuit_breaking.training.config import MaskConfig
from circuit_breaking.training.objective import StepObjective
from circuit_breaking.training.optimal_ablation import AblationConstants
from circuit_breaking.training.refine import EdgeRefiner

pytestmark = pytest.mark.usefixtures("short_choice")


@pytest.mark.parametrize("max_edges", [0, 1, 5, 40])
@pytest.mark.parametrize(
    "phases",
    [{}, {"refine_rounds": 0}, {"steps": 0}],
)
def test_budget_is_a_promise(max_edges, phases):
    result, model = run(max_edges=max_edges, **phases)
    assert len(result.edges) <= max_edges and len(result.edges) == model.mask.n_cut()
    assert set(result.weights.tolist()) <= {0.0, 1.0}
    assert all(row["n_cut"] <= max_edges for row in result.history if row["phase"] == "refine")


def test_a_budget_of_nothing_leaves_the_model_as_it_was():
    tokens = torch.arange(6)[None]
    model = load_model(small_gpt2(), device="cpu")
    before = model(tokens)
    run(model, max_edges=0)
    assert torch.equal(model(tokens), before)


def test_same_seed_same_mask():
    first, second = run(max_edges=6)[0], run(max_edges=6)[0]
    assert torch.equal(first.weights, second.weights)
    strip = [{k: v for k, v in row.items() if k != "seconds"} for row in first.history]
    assert strip == [{k: v for k, v in row.items() if k != "seconds"} for row in second.history]


def test_only_allowed_edges_are_cut():
    model = load_model(small_gpt2(), device="cpu")
    allowed = torch.tensor([edge.target == "output" for edge in model.graph.edges])
    result, _ = run(model, allowed, max_edges=8)
    assert result.edges and all(edge.target == "output" for edge in result.edges)


def test_the_objective_falls():
    model = load_model(small_gpt2(), device="cpu")
    keep, broken = make_task("keep", 5), make_task("break", 1)
    before = keep.get_test_loss(model) - 0.2 * broken.get_test_loss(model)
    run(model, max_edges=6, steps=50, refine_rounds=10, batch_size=12, refine_batch_size=12)
    assert keep.get_test_loss(model) - 0.2 * broken.get_test_loss(model) < before - 0.01


@pytest.mark.parametrize(
    "changes",
    [
        {"max_edges": -1},
        {"max_edges": 10_000},
        {"lr": 0.0},
        {"batch_size": 0},
        {"steps": -1},
    ],
)
def test_settings_that_make_no_sense(changes):
    with pytest.raises(UserError, match=next(iter(changes))):
        run(**changes)


def quadratic(coefficients, pairs):
    def objective(mask):
        cut = 1 - mask
        return (cut * coefficients).sum() + (cut @ pairs @ cut)

    return objective


def test_search_finds_the_best_mask_of_a_small_problem():
    """Against all masks of at most 3 of 8 edges, on an objective with strong interactions."""
    torch.manual_seed(3)
    coefficients, pairs = torch.randn(8), torch.randn(8, 8).triu(1)
    objective = quadratic(coefficients, pairs)
    masks = [torch.tensor([float(c) for c in f"{n:08b}"]) for n in range(256)]
    best = min((m for m in masks if (m == 0).sum() <= 3), key=lambda m: float(objective(m)))
    search, mask = EdgeRefiner(3, memory=0.0, moves_per_round=20), torch.ones(8)
    values = []
    for _ in range(30):
        mask, value = search.round(mask, objective)
        values.append(value)
        assert (mask == 0).sum() <= 3
    assert values == sorted(values, reverse=True)  # only a measured gain is taken
    assert float(objective(mask)) <= float(objective(best)) + 0.15 * abs(float(objective(best)))


def test_a_measurement_corrects_the_next_prediction():
    search, mask = EdgeRefiner(2, memory=0.0, moves_per_round=1), torch.ones(3)

    def objective(mask):
        cut = 1 - mask
        return (torch.tensor([-3.0, -1.0, 0.5]) * cut).sum() + 9 * cut[0] ** 2

    for expected in ([1, 1, 1], [1, 0, 1], [1, 0, 1]):  # the first edge is tried, refused, and not tried again
        mask, _ = search.round(mask, objective)
        assert mask.tolist() == expected
    assert float(search._gains(mask)[0]) == pytest.approx(-6.0)


@pytest.mark.parametrize("goal", ["keep", "objective"])
def test_what_cut_edges_carry_is_learned_with_the_mask(goal):
    _, fixed_model = run(max_edges=12)
    assert fixed_model.means is None
    result, model = run(max_edges=12, constants_lr=0.05, constants_loss=goal)
    assert model.means.shape == (len(model.graph.sources), 24) and not model.means.requires_grad
    assert 0 < len(result.edges) <= 12 and model.means.isfinite().all()
    sources = [edge.source for edge in result.edges]
    assert all(model.means[model.graph.sources.index(source)].abs().sum() > 0 for source in sources)
    assert objective_of(model) < objective_of(fixed_model)


def objective_of(model, alpha=0.2):
    keep, broken = make_task("keep", 5), make_task("break", 1)
    with torch.no_grad():
        return float(keep.loss(model, keep.train) - alpha * broken.loss(model, broken.train))


def test_what_is_learned_for_the_loss_to_keep_is_not_learned_for_the_other():
    """With the same edges cut, constants are best for the loss that they are learned for."""
    found = {}
    for goal in ("keep", "objective"):
        model = load_model(small_gpt2(), device="cpu")
        model.mask.cut_(model.graph.edges[3::9])
        settings = MaskConfig(alpha=1.0, keep_loss="loss", constants_loss=goal)
        objective = StepObjective.of_two(model, make_task("keep", 5), make_task("break", 1), settings)
        means = AblationConstants(model, 0.05)
        for _ in range(100):
            means.descend(objective.draw(12)(model.mask.weights.detach()))
        found[goal] = {"keep": objective_of(model, 0.0), "objective": objective_of(model, 1.0)}
    assert found["keep"]["keep"] < found["objective"]["keep"]
    assert found["objective"]["objective"] < found["keep"]["objective"]


@pytest.mark.parametrize("changes", [{"keep_weight": 0.0}, {"keep_weight": -1.0}, {"constants_loss": "both"}])
def test_means_are_not_learned_for_nothing(changes):
    with pytest.raises(
        UserError, match=r"cannot be learned for a loss of weight|constants_loss 'both' is not one of keep, objective"
    ):
        run(max_edges=3, **{"constants_lr": 0.05, **changes})
    run(max_edges=3, constants_lr=0.05, constants_loss="objective", keep_weight=0.0)


def test_learned_means_start_from_the_models_own_and_a_budget_of_nothing_keeps_those():
    model = load_model(small_gpt2(), device="cpu")
    means = torch.randn(len(model.graph.sources), 24)
    model.means = means
    run(model, max_edges=0, constants_lr=0.05)
    assert torch.equal(model.means, means)
    run(model, max_edges=3, constants_lr=1e-9)
    torch.testing.assert_close(model.means, means)
    assert not torch.equal(model.means, means)
    with pytest.raises(UserError, match="constants_lr is -1"):
        run(max_edges=3, constants_lr=-1)
    model.means = torch.zeros(8, *means.shape)
    with pytest.raises(UserError, match="by position cannot be learned"):
        run(model, max_edges=3, constants_lr=0.05)
