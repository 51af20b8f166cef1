"""Masks for any number of behaviours, from a mask, and with held-out losses along training."""

import pytest
import torch
from helpers.tasks import make_task, small

from circuit_breaking.engine.mask import lowest_cut
from circuit_breaking.errors import UserError
from circuit_breaking.training.config import MaskConfig
from circuit_breaking.training.mask_trainer import train_mask
from circuit_breaking.training.objective import StepObjective, terms_of

pytestmark = pytest.mark.usefixtures("short_choice")
QUICK = {"steps": 6, "batch_size": 4, "max_edges": 3, "budgets": (2, 4), "keep_loss": "loss"}


@pytest.mark.parametrize("micro_batch", [0, 3])
@pytest.mark.parametrize("keep_loss", ["kl", "loss"])
@pytest.mark.parametrize("changes", [{}, {"method": "clamped"}, {"constants_lr": 0.01, "constants_steps": 2}])
def test_two_tasks_are_a_case_of_it(micro_batch, keep_loss, changes):
    """To the last digit."""
    settings = MaskConfig(**{**QUICK, "micro_batch": micro_batch, "keep_loss": keep_loss, "alpha": 0.3, **changes})
    torch.manual_seed(0)
    two = train_mask(small(), make_task("break", 1), make_task("keep", 5), settings, progress=False)
    tasks = {"ordinary": make_task("keep", 5), "rude": make_task("break", 1)}
    torch.manual_seed(0)
    many = train_mask(small(), settings=settings, tasks=tasks, weights={"rude": -0.3}, progress=False)
    assert many.weights.equal(two.weights) and many.edges == two.edges
    without = [[{k: v for k, v in row.items() if k != "seconds"} for row in one.history] for one in (two, many)]
    assert without[0] == without[1]


@pytest.mark.parametrize("micro_batch", [0, 2])
def test_the_objective_is_the_weighted_sum(micro_batch):
    model = small()
    tasks = {"a": make_task("a", 1), "b": make_task("b", 2), "c": make_task("c", 3)}
    weights, settings = {"a": -0.2, "b": 0.5}, MaskConfig(keep_loss="loss", micro_batch=micro_batch, break_cap=1e9)
    one = StepObjective(model, terms_of(model, tasks, weights, settings), micro_batch)
    mask = (0.3 + 0.7 * torch.rand(len(model.graph), generator=torch.Generator().manual_seed(0))).requires_grad_()
    value = one.draw(4)(mask)
    value.backward()
    twins = {"a": make_task("a", 1), "b": make_task("b", 2), "c": make_task("c", 3)}
    losses = {name: task.loss(model, task.draw(4), mask) for name, task in twins.items()}
    expected = -0.2 * losses["a"] + 0.5 * losses["b"] + losses["c"]
    torch.testing.assert_close(value, expected)
    gradient, mask.grad = mask.grad, None
    expected.backward()
    torch.testing.assert_close(gradient, mask.grad, atol=1e-6, rtol=1e-4)
    assert one.losses == pytest.approx([float(loss.detach()) for loss in losses.values()], rel=1e-5)
    assert one.loss_of(broken=True) == one.losses[0]
    assert one.loss_of(broken=False) == pytest.approx((0.5 * one.losses[1] + one.losses[2]) / 1.5)


def test_rows_name_the_losses_and_held_out_losses_are_of_the_mask_that_would_be_saved():
    model = small()
    tasks = {name: make_task(name, seed) for name, seed in (("toxic", 1), ("ioi", 2), ("ordinary", 5))}
    measured = {"ordinary": make_task("ordinary", 5)}
    result = train_mask(
        model, settings=MaskConfig(**QUICK), tasks=tasks, weights={"toxic": -0.2, "ioi": -0.1}, progress=False,
        eval_tasks=measured, eval_every=3, eval_texts=5,
    )  # fmt: skip
    rows = result.history
    assert [row["step"] for row in rows if "held_out" in row] == [2, 5, 7]
    assert all(set(row["losses"]) == set(tasks) for row in rows)
    assert rows[-1]["held_out"] == {"ordinary": measured["ordinary"].get_test_loss(model, 5)}
    plain = train_mask(
        small(), settings=MaskConfig(**QUICK), tasks={name: make_task(name, seed) for name, seed in
                                                       (("toxic", 1), ("ioi", 2), ("ordinary", 5))},
        weights={"toxic": -0.2, "ioi": -0.1}, progress=False,
    )  # fmt: skip
    assert plain.weights.equal(result.weights)  # measuring changes nothing


@pytest.mark.parametrize("method", ["ranking", "ugs", "clamped"])
def test_training_starts_from_a_mask(method):
    model = small()
    start = lowest_cut(torch.rand(len(model.graph), generator=torch.Generator().manual_seed(3)), 3)
    settings = MaskConfig(**{**QUICK, "method": method, "lr": 1e-6, "steps": 2})
    if method == "ranking":  # whose scores move by 1 a step
        settings = MaskConfig(**{**QUICK, "steps": 200})
    seen = []
    train = dict(settings=settings, progress=False, start=start)
    if method != "clamped":  # after its first step; later ones measure how many of these edges are worth cutting
        with pytest.raises(StopIteration):
            train_mask(model, make_task("b", 1), make_task("k", 5), on_step=lambda row: next(iter(())), **train)
        assert model.mask.weights.detach().equal(start)
        return
    result = train_mask(model, make_task("b", 1), make_task("k", 5), on_step=seen.append, **train)
    assert result.weights.equal(start) and len(seen) == 2


def test_what_makes_no_sense_is_refused():
    model, settings = small(), MaskConfig(**QUICK)
    one, start = make_task("x", 1), torch.ones(len(small().graph))
    start[:2] = 0
    for words, message in (
        ({"tasks": {"a": one}, "break_task": one, "keep_task": one}, "give break_task and keep_task, or tasks"),
        ({}, "give break_task and keep_task, or tasks"),
        ({"break_task": one}, "give break_task and keep_task, or tasks"),
        ({"tasks": {"a": one}, "weights": {"b": 1.0}}, "weights names 'b', which is none of the tasks: a"),
        ({"tasks": {"a": one}, "weights": {"a": 0.0}}, "every weight is 0"),
        ({"tasks": {"a.b": one}}, "without dots"),
        ({"tasks": {"a": one}, "eval_tasks": {"a": one}, "eval_every": 0}, "eval_every is 0"),
        ({"tasks": {"a": one}, "start": start[:-1]}, "the mask to start from has"),
        ({"tasks": {"a": one}, "start": start, "allowed": start.bool()}, "cuts edges that may not be cut"),
    ):
        with pytest.raises(UserError, match=message):
            train_mask(model, settings=settings, progress=False, **words)
    with pytest.raises(UserError, match="method hard-concrete cannot start from a mask"):
        train_mask(model, one, one, MaskConfig(**{**QUICK, "method": "hard-concrete"}), progress=False, start=start)
