"""Batches taken in parts: the same objective, gradients and masks as at once, in the memory of a part."""

import gc
import weakref
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from helpers.models import small_gpt2, small_llama
from helpers.tasks import FEW, make_prompts, make_task, run

from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.masked_pass import MaskedPass
from circuit_breaking.engine.reference import ReferenceModel
from circuit_breaking.errors import UserError
from circuit_breaking.tasks import Task, TextTask
from circuit_breaking.training.config import MaskConfig, keeps_predictions
from circuit_breaking.training.methods import METHODS
from circuit_breaking.training.objective import StepObjective
from circuit_breaking.training.prefix_choice import choice_steps

pytestmark = pytest.mark.usefixtures("short_choice")
SETTINGS = {"alpha": 0.7, "keep_weight": 1.3, "break_cap": 3.9, "keep_loss": "loss"}


BREAK = {
    "text": lambda: make_task("break", 1),
    "cross_entropy": lambda: make_prompts("break", 1, "cross_entropy"),
    "logit_difference": lambda: make_prompts("break", 1, "logit_difference"),
}


def double(make=small_gpt2, **changes):
    return load_model(make(**changes).double(), device="cpu", dtype="float64")


def measured(make, broken, micro_batch, learned, goal="objective", size=7):
    """Value, its gradients and the losses noted, at a random mask."""
    model = double(make)
    if learned:
        model.means = torch.randn(len(model.graph.sources), model.embedding.shape[1], dtype=torch.float64) * 0.1
        model.means = model.means.requires_grad_()
    mask = torch.rand(len(model.graph), dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    mask.requires_grad_()
    settings = MaskConfig(**SETTINGS, micro_batch=micro_batch, constants_loss=goal)
    one = StepObjective.of_two(model, make_task("keep", 5), BREAK[broken](), settings)
    objective = one.draw(size)
    value = 3 * objective(mask)
    gradients = torch.autograd.grad(value, [mask, model.means] if learned else [mask])
    with torch.no_grad():
        torch.testing.assert_close(3 * objective(mask.detach()), value.detach())
    return value.detach(), *gradients, torch.tensor(one.losses)


@cache
def at_once(make, broken, learned, goal):
    """What `measured` finds without parts."""
    torch.manual_seed(0)
    return measured(make, broken, 0, learned, goal)


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("broken", BREAK)
@pytest.mark.parametrize("learned, goal", [(False, "keep"), (True, "keep"), (True, "objective")])
def test_parts_add_up_to_the_whole(broken, micro_batch, learned, goal):
    close = {"atol": 1e-12, "rtol": 1e-10} if broken == "text" else {"atol": 2e-6, "rtol": 1e-6}  # float32 logits
    for make in (small_gpt2, small_llama):
        whole = at_once(make, broken, learned, goal)
        torch.manual_seed(0)
        for found, expected in zip(measured(make, broken, micro_batch, learned, goal), whole, strict=True):
            torch.testing.assert_close(found, expected, **close)


@pytest.mark.parametrize("micro_batch", [0, 2])
@pytest.mark.parametrize("goal", ["keep", "objective"])
def test_gradients_by_what_means_are_learned_for(goal, micro_batch):
    """The gradients of the reference, in which means that the break term may not change are constants."""
    hf = small_gpt2(**FEW).double()
    model = load_model(hf, device="cpu", dtype="float64")
    generator = torch.Generator().manual_seed(2)
    means = torch.randn(len(model.graph.sources), 16, dtype=torch.float64, generator=generator).requires_grad_()
    mask = torch.rand(len(model.graph), dtype=torch.float64, generator=generator).requires_grad_()
    oracle, sums = ReferenceModel(hf), []
    for task, carried in ((make_task("keep", 5), means), (make_task("break", 1), means.detach())):
        batch = task.draw(5)
        logits = oracle(batch.tokens, mask, means if goal == "objective" else carried)[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.tokens[:, 1:], reduction="none")
        real = torch.arange(1, batch.tokens.shape[1])[None] < batch.lengths[:, None]
        sums.append(losses[real].clamp(max=3.9 if len(sums) else torch.inf).mean())
    expected = torch.autograd.grad(1.3 * sums[0] - 0.7 * sums[1], (mask, means))
    model.means = means
    settings = MaskConfig(**SETTINGS, micro_batch=micro_batch, constants_loss=goal)
    value = StepObjective.of_two(model, make_task("keep", 5), make_task("break", 1), settings).draw(5)(mask)
    assert float(value.detach()) == pytest.approx(float((1.3 * sums[0] - 0.7 * sums[1]).detach()), rel=1e-10)
    for found, right in zip(torch.autograd.grad(value, (mask, means)), expected, strict=True):
        torch.testing.assert_close(found, right, atol=1e-10, rtol=1e-8)


def test_by_hand():
    """Each text's losses, summed and divided in numpy, with the cap on every prediction."""
    model, keep, broken = double(), make_task("keep", 5), make_task("break", 1)
    one = StepObjective.of_two(model, keep, broken, MaskConfig(**SETTINGS, micro_batch=2))
    value = float(one.draw(5)(torch.ones(len(model.graph), dtype=torch.float64).requires_grad_()).detach())
    means = []
    for task, cap in ((make_task("keep", 5), np.inf), (make_task("break", 1), 3.9)):
        losses = []
        for tokens, length in zip(*(lambda batch: (batch.tokens, batch.lengths))(task.draw(5)), strict=True):
            logits = model(tokens[None])[0].detach().numpy()
            for at in range(int(length) - 1):
                losses.append(np.log(np.exp(logits[at]).sum()) - logits[at, int(tokens[at + 1])])
        means.append(np.minimum(losses, cap).mean())
    assert one.losses == pytest.approx(tuple(means), rel=1e-10)
    assert value == pytest.approx(1.3 * means[0] - 0.7 * means[1], rel=1e-10)


@pytest.mark.parametrize("constants_lr", [0.0, 0.05])
@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize(
    "changes", [{"method": method} for method in METHODS] + [{"method": "attribution", "ig_steps": 4}]
)
def test_every_method_comes_to_the_same_mask(changes, micro_batch, constants_lr):
    found = []
    for size in (0, micro_batch):
        torch.manual_seed(3)
        short = {"steps": 4, "refine_rounds": 2, "micro_batch": size, "constants_lr": constants_lr}
        result, model = run(double(**FEW), max_edges=9, **short, **changes)
        rows = [[row[key] for key in ("loss", "keep_loss", "break_loss", "n_cut")] for row in result.history]
        assert len(rows) == (8 if constants_lr else 6) + choice_steps(MaskConfig(max_edges=9, **changes))
        found.append((result.weights, torch.tensor(rows, dtype=torch.float64), model.means))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-7, rtol=1e-7)
    if constants_lr:
        torch.testing.assert_close(found[0][2], found[1][2], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("constants_lr", [0.0, 0.05])
def test_no_more_than_a_part_is_in_memory(method, constants_lr, monkeypatch):
    """Tokens of all passes that are alive, forward to backward, through every phase."""
    alive, peaks = weakref.WeakSet(), []

    def tokens_of(one):
        return one.inputs.tokens.numel()

    plain = MaskedPass.forward

    def spy(self):
        alive.add(self)
        peaks.append(sum(tokens_of(one) for one in alive if one.buffers is not None) + tokens_of(self))
        return plain(self)

    monkeypatch.setattr(MaskedPass, "forward", spy)
    for micro_batch, most in ((0, 2 * 3 * 8), (1, 8)):
        gc.collect()
        peaks.clear()
        run(
            double(**FEW),
            max_edges=9,
            method=method,
            micro_batch=micro_batch,
            constants_lr=constants_lr,
            refine_batch_size=3,
            steps=3,
            refine_rounds=2,
        )
        assert max(peaks) <= most and (micro_batch or max(peaks) > 8)


def test_nothing_is_kept_for_a_backward_without_gradients(monkeypatch):
    kept, plain = [], MaskedPass.__init__

    def spy(self, network, inputs, workspace, save_for_backward, prefix_cache=None):
        kept.append(save_for_backward)
        plain(self, network, inputs, workspace, save_for_backward, prefix_cache)

    monkeypatch.setattr(MaskedPass, "__init__", spy)
    model = load_model(small_gpt2(), device="cpu")
    model.means = torch.zeros(len(model.graph.sources), 24, requires_grad=True)
    make_task("keep", 5).get_test_loss(model)
    assert kept == [False]


def test_recomputing_lasts_as_long_as_training():
    plain, _ = run(double(**FEW), max_edges=6)
    seen = []
    model = double(**FEW)
    before = type(model).hidden
    try:
        type(model).hidden = lambda self, *words, **more: (
            seen.append(self.gradient_checkpointing) or before(self, *words, **more)
        )
        run(model, max_edges=6, gradient_checkpointing=True)
    finally:
        type(model).hidden = before
    assert set(seen) == {True} and not model.gradient_checkpointing
    result, _ = run(double(**FEW), max_edges=6, gradient_checkpointing=True, micro_batch=2)
    assert torch.equal(result.weights, plain.weights)


def test_a_task_that_does_not_count_its_predictions():
    class Mine(TextTask):
        predictions = Task.predictions

    one = make_task("mine", 1)
    one.__class__ = Mine
    model = load_model(small_gpt2(), device="cpu")
    mask = model.mask.weights
    objective = StepObjective.of_two(model, one, one, MaskConfig())
    assert objective.draw(3)(mask).requires_grad
    objective = StepObjective.of_two(model, one, one, MaskConfig(micro_batch=2))
    with pytest.raises(UserError, match="mine does not say how many predictions"):
        objective.draw(3)(mask)
    with pytest.raises(UserError, match="micro_batch is -1"):
        run(micro_batch=-1)


def test_a_loss_that_is_not_finite_is_said():
    model = load_model(small_gpt2(), device="cpu")
    for micro_batch in (0, 2):
        with pytest.raises(UserError, match="not finite any more"):
            StepObjective.of_two(
                model, make_task("keep", 5), make_task("break", 1), MaskConfig(micro_batch=micro_batch)
            ).draw(3)(torch.full_like(model.mask.weights, float("nan")))


class OnlyLoss(TextTask):
    """A task that does not say how far predictions are from those of the original."""

    divergence = Task.divergence


def test_keeping_predictions_is_keeping_their_distribution():
    """KL(original || ablated), computed from all logits; 0 with all edges, whatever the text."""
    model, task = load_model(small_gpt2(), device="cpu"), make_task("keep", 5)
    config = MaskConfig(keep_loss="kl", alpha=0.0)
    ones = torch.ones_like(model.mask.weights)
    mask = torch.rand(ones.shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for micro_batch in (0, 2):
        task = make_task("keep", 5)
        objective = StepObjective.of_two(
            model, task, make_task("break", 1), replace(config, micro_batch=micro_batch)
        ).draw(4)
        batch = make_task("keep", 5).draw(4)
        where = batch.predicted
        original, ablated = (model(batch.tokens, mask=m)[where].log_softmax(-1) for m in (ones, mask))
        expected = (original.exp() * (original - ablated)).sum(-1).mean()
        found = objective(mask)
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(value, mask)[0] for value in (found, expected)]
        torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
        assert abs(float(objective(ones).detach())) < 1e-6 and gradients[0].abs().max() > 1e-4


def test_where_the_divergence_says_nothing_the_loss_takes_its_place():
    assert keeps_predictions(MaskConfig(keep_loss="kl", method="attribution", ig_steps=5))
    for changes in ({"keep_weight": 0.0}, {"keep_weight": -1.0}, {"method": "attribution"}, {"keep_loss": "loss"}):
        assert not keeps_predictions(MaskConfig(**{"keep_loss": "kl", "method": "clamped", **changes})), changes
    model, one = load_model(small_gpt2(), device="cpu"), make_task("mine", 1)
    one.__class__ = OnlyLoss
    objective = StepObjective.of_two(model, one, make_task("break", 1), MaskConfig(keep_loss="kl"))
    with pytest.raises(UserError, match="mine does not say how far predictions are"):
        objective.draw(3)(model.mask.weights)


def test_the_divergence_of_prompts_is_that_of_their_answers():
    model, task = load_model(small_gpt2(), device="cpu"), make_prompts("keep", 5, "cross_entropy")
    batch, ones = task.draw(4), torch.ones_like(model.mask.weights)
    mask = torch.rand(ones.shape, generator=torch.Generator().manual_seed(0))
    last = batch.lengths - 1
    original, ablated = (model(batch.tokens, mask=m)[torch.arange(4), last].log_softmax(-1) for m in (ones, mask))
    torch.testing.assert_close(
        task.divergence(model, batch, mask), (original.exp() * (original - ablated)).sum(-1).mean()
    )
