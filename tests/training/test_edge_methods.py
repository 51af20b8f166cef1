"""Every way to find edges: the promised budget, and that each does what its paper says."""

import numpy as np
import pytest
import torch
from helpers.tasks import make_task, run, small

from circuit_breaking.engine.mask import load_mask, save_mask
from circuit_breaking.errors import UserError
from circuit_breaking.training.attribution import eap, integrated_mask_gradients
from circuit_breaking.training.gates import HardConcrete, falling_count
from circuit_breaking.training.methods import METHODS

pytestmark = pytest.mark.usefixtures("short_choice")
ALL = 26  # edges of that model
TOKENS = torch.arange(6)[None]


@pytest.mark.parametrize("alpha", [0.2, 9.0])  # with the second, more edges are worth cutting than may be
@pytest.mark.parametrize("rest", [{"refine_rounds": 2}, {"refine_rounds": 0}])
@pytest.mark.parametrize("max_edges", [0, 1, 2, 5, 12, ALL])
@pytest.mark.parametrize("method", METHODS)
def test_budget_is_a_promise(method, max_edges, rest, alpha, tmp_path):
    model = small()
    assert len(model.graph) == ALL
    before = model(TOKENS)
    result, _ = run(model, method=method, max_edges=max_edges, alpha=alpha, lr=0.3, steps=4, **rest)
    save_mask(tmp_path / "mask.safetensors", model)
    other = small()
    load_mask(tmp_path / "mask.safetensors", other)
    for weights in (result.weights, model.mask.weights, other.mask.weights):
        assert set(weights.tolist()) <= {0.0, 1.0} and int((weights == 0).sum()) == len(result.edges) <= max_edges
    assert torch.equal(model(TOKENS), other(TOKENS))
    if max_edges == 0:
        assert torch.equal(other(TOKENS), before) and (other.mask.weights == 1).all() and result.history == []
    elif alpha == 9.0:
        assert result.edges


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_mask(method):
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        result, _ = run(small(), method=method, max_edges=5, refine_rounds=0)
        found.append((result.weights.tolist(), [row["loss"] for row in result.history]))
    assert found[0] == found[1]


@pytest.mark.parametrize("refine_rounds", [0, 3])
@pytest.mark.parametrize("method", METHODS)
def test_only_allowed_edges_are_cut(method, refine_rounds):
    model = small()
    allowed = torch.tensor([edge.target == "output" for edge in model.graph.edges])
    result, _ = run(model, allowed, method=method, max_edges=ALL, alpha=9.0, lr=0.3, refine_rounds=refine_rounds)
    assert result.edges and all(edge.target == "output" for edge in result.edges)
    result, _ = run(model, torch.zeros_like(allowed), method=method, max_edges=ALL, alpha=9.0)
    assert result.edges == []


@pytest.mark.parametrize("method", METHODS)
def test_what_cut_edges_carry_is_learned_too(method):
    result, model = run(small(), method=method, max_edges=5, constants_lr=0.05, alpha=9.0)
    assert model.means.abs().sum() > 0 and not model.means.requires_grad and 0 < len(result.edges) <= 5


@pytest.mark.parametrize("constants_lr", [0.0, 0.05])
def test_given_edges_are_cut_all_the_time(constants_lr):
    model = small()
    allowed = torch.arange(ALL) % 7 == 2
    result, _ = run(model, allowed, method="given", max_edges=4, refine_rounds=0, constants_lr=constants_lr)
    assert torch.equal(result.weights == 0, allowed) and {row["n_cut"] for row in result.history} == {4}
    assert (model.means is not None) == bool(constants_lr)
    for wrong in (None, torch.arange(ALL) < 5):
        with pytest.raises(UserError, match="method given cuts all edges"):
            run(small(), wrong, method="given", max_edges=4)


@pytest.mark.parametrize("method", METHODS)
def test_the_objective_falls(method):
    model, keep, broken = small(), make_task("keep", 5), make_task("break", 1)

    def objective():
        return keep.get_test_loss(model) - broken.get_test_loss(model)

    before = objective()
    run(
        model, method=method, max_edges=6, alpha=1.0, steps=40, refine_rounds=0,
        batch_size=12,
    )  # fmt: skip
    assert objective() < before - 0.02


def test_gates_are_sampled_as_the_paper_says():
    """Louizos et al. 2018, eq. 10 to 12, in numpy on the same noise; what is cut there is masked here."""
    gates, beta, gamma, zeta = HardConcrete(400, torch.device("cpu"), init_cut_prob=0.3), 2 / 3, -0.1, 1.1
    with torch.no_grad():
        gates.parameter.copy_(torch.linspace(-1.2, 1.2, 400))
    torch.manual_seed(5)
    found = gates.sample().detach().double().numpy()
    torch.manual_seed(5)
    u = torch.empty(400).uniform_(1e-6, 1 - 1e-6).double().numpy()
    log_alpha = gates.log_odds.detach().double().numpy()
    s = 1 / (1 + np.exp(-(np.log(u) - np.log(1 - u) + log_alpha) / beta))
    z = np.minimum(1, np.maximum(0, s * (zeta - gamma) + gamma))
    np.testing.assert_allclose(found, 1 - z, atol=2e-5)
    assert (found == 0).any() and (found == 1).any() and ((found > 0) & (found < 1)).any()
    expected = 1 / (1 + np.exp(-(log_alpha - beta * np.log(-gamma / zeta))))  # that z is not 0
    assert float(gates.masked().detach()) == pytest.approx(expected.sum(), rel=1e-5)


@pytest.mark.parametrize("chance", [0.02, 0.5, 0.9])
def test_gates_begin_with_the_chance_that_is_given(chance):
    gates = HardConcrete(20_000, torch.device("cpu"), chance)
    torch.manual_seed(0)
    assert float((gates.sample() < 1).float().mean()) == pytest.approx(chance, abs=0.02)
    assert float(gates.masked().detach()) == pytest.approx(20_000 * chance, rel=1e-4)


def test_gradcheck_of_gates():
    gates = HardConcrete(12, torch.device("cpu"))

    def both(parameter):
        gates.parameter = parameter
        torch.manual_seed(1)
        return gates.sample(), gates.masked()

    start = torch.linspace(-0.8, 0.8, 12, dtype=torch.float64, requires_grad=True)
    sample = both(start)[0]
    assert ((sample > 0) & (sample < 1)).any()
    assert torch.autograd.gradcheck(both, start)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 9.0])
def test_the_number_of_hard_concrete_cuts_falls_to_the_budget(alpha):
    changes = {"method": "hard-concrete", "steps": 60, "refine_rounds": 0, "alpha": alpha}
    free, _ = run(small(), max_edges=ALL, **changes)
    result, _ = run(small(), max_edges=4, **changes)
    assert len(free.edges) >= 8 and len(result.edges) == 4
    counts = [row["n_cut"] for row in result.history[30:]]
    assert all(count <= falling_count(ALL, 4, number, 30) for number, count in enumerate(counts)) and counts[-1] == 4


@pytest.mark.parametrize("count", [0.5, 3, 17, 29, 30, 99])
def test_log_odds_are_lowered_by_the_least_that_will_do(count):
    gates = HardConcrete(30, torch.device("cpu"))
    before = torch.randn(30, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        gates.parameter.copy_(before)
    many = float(gates.masked().detach())
    by = gates.at_most_(count)
    lowered = (before - gates.parameter.detach()).double()
    torch.testing.assert_close(lowered, lowered.mean().expand(30), atol=1e-5, rtol=0)
    assert by == pytest.approx(float(lowered.mean()) * gates.scale, abs=1e-4)
    assert float(gates.masked().detach()) == pytest.approx(min(many, count), rel=1e-4)
    if many <= count:
        assert torch.equal(gates.parameter, before)


def test_targets_fall_geometrically_and_stay_for_the_last_quarter():
    counts = [falling_count(48, 3, number, 80) for number in range(80)]
    assert counts[0] == 48 and counts[30] == 12 and set(counts[60:]) == {3}
    assert counts == sorted(counts, reverse=True)


def test_from_a_low_start_the_number_of_cuts_rises_to_the_budget():
    counts = [falling_count(3, 48, number, 80) for number in range(80)]
    assert counts[0] == 3 and set(counts[60:]) == {48} and counts == sorted(counts)


@pytest.mark.parametrize("ig_steps", [0, 3])
def test_attribution_cuts_what_scores_most(ig_steps):
    """Against `eap` and `integrated_mask_gradients` on all texts at once, which every batch here is."""
    model, keep, broken = small(), make_task("keep", 5), make_task("break", 1)

    def objective(mask):
        return keep.loss(model, keep.train, mask) - broken.loss(model, broken.train, mask, cap=np.log(50))

    scores = integrated_mask_gradients([objective], model, ig_steps) if ig_steps else eap([objective], model)
    result, _ = run(
        model, method="attribution", ig_steps=ig_steps, max_edges=5, alpha=1.0, steps=6,
        batch_size=12, refine_rounds=0,
    )  # fmt: skip
    assert int((scores > 0).sum()) > 5
    assert set((result.weights == 0).nonzero()[:, 0].tolist()) == set(scores.topk(5).indices.tolist())
    assert {row["phase"] for row in result.history} == {"attribute"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "magic"}, "method 'magic' is not one of ranking, clamped, hard-concrete, ugs, attribution"),
        ({"ig_steps": -1}, "ig_steps is -1"),
        ({"method": "attribution", "ig_steps": 12}, "ig_steps 12 are more than the 11 steps"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(UserError, match=message):
        run(small(), **changes)
