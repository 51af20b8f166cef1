"""Masks trained with outputs on counterfactual prompts as ablation values (resample ablation)."""

from dataclasses import replace

import pytest
import torch
from helpers.masks import make_masks
from helpers.tasks import QUICK, make_prompts, make_task, small

from circuit_breaking.errors import UserError
from circuit_breaking.training.config import MaskConfig
from circuit_breaking.training.mask_trainer import train_mask
from circuit_breaking.training.methods import METHODS
from circuit_breaking.training.objective import StepObjective

pytestmark = pytest.mark.usefixtures("short_choice")


def tasks():
    return make_prompts("break", 1, "cross_entropy", counterfactual=True), make_task("keep", 5)


@pytest.fixture
def model():
    one = small()
    one.resample = True
    return one


def test_a_loss_uses_the_counterfactuals_of_its_batch(model):
    task, _ = tasks()
    batch, mask = task.draw(5), make_masks(len(model.graph))[0].float()
    found, both = task.loss(model, batch, mask), task.divergence(model, batch, mask)
    model.resample = False
    with model.resampling(batch.counterfactual):
        torch.testing.assert_close(found, task.loss(model, batch, mask))
        torch.testing.assert_close(both, task.divergence(model, batch, mask))
    assert (found - task.loss(model, batch, mask)).abs() > 1e-4


def test_micro_batches_change_nothing(model):
    found = []
    for micro_batch in (0, 2):
        break_task, keep_task = tasks()
        settings = MaskConfig(**QUICK, micro_batch=micro_batch)
        objective = StepObjective.of_two(model, keep_task, break_task, settings).draw(5)
        mask = make_masks(len(model.graph))[0].float().requires_grad_()
        value = objective(mask)
        found.append((value.detach(), torch.autograd.grad(value, mask)[0]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_with_them(model, method):
    result = train_mask(model, *tasks(), MaskConfig(**QUICK, max_edges=4, method=method), progress=False)
    assert len(result.edges) <= 4
    model.resample = False
    zero = train_mask(model, *tasks(), MaskConfig(**QUICK, max_edges=4, method=method), progress=False)
    assert result.history[0]["break_loss"] != zero.history[-1]["break_loss"]


def test_what_is_refused(model):
    break_task, keep_task = tasks()
    with pytest.raises(UserError, match="constants_lr learns ablation constants"):
        train_mask(model, break_task, keep_task, MaskConfig(**QUICK, constants_lr=0.1), progress=False)
    break_task.train = replace(break_task.train, counterfactual=None)
    with pytest.raises(UserError, match="some prompts have no counterfactual"):
        train_mask(model, break_task, keep_task, MaskConfig(**QUICK), progress=False)
