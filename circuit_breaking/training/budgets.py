"""Masks of several budgets from one ranking: its first edges, and ablation constants for each mask."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from circuit_breaking.engine.transformer import EdgeMaskedTransformer
from circuit_breaking.tasks.base import Task
from circuit_breaking.training.config import MaskConfig
from circuit_breaking.training.mask_trainer import MaskResult, train_mask
from circuit_breaking.training.methods import GIVEN, method_class
from circuit_breaking.training.methods.ranking import EdgeScores


def shared_steps(config: MaskConfig) -> MaskConfig | None:
    """The same training cut down to the steps that it shares with masks of other budgets; None if there are none.

    A ranking is learned for all budgets up to the largest of `budgets` at once.
    """
    shared = issubclass(method_class(config.method), EdgeScores) and config.steps > 0
    if not shared or config.max_edges > max(config.budgets, default=0):
        return None
    return replace(config, max_edges=1, refine_rounds=0, constants_steps=0)


def masks_at(
    budgets: Iterable[int],
    result: MaskResult,
    model: EdgeMaskedTransformer,
    break_task: Task,
    keep_task: Task,
    settings: MaskConfig,
) -> Iterator[int]:
    """Put the mask of each budget into the model, and yield the budget while it is there.

    If ablation constants are learned, they are trained for each mask in `constants_steps` steps; each time they start
    from those that the model has now. A budget that cuts the same edges as the one before it gets its constants too,
    and one that cuts those that the model cuts now gets those that the model has now. At the end the model has the mask
    and the constants that it has now.

    Args:
        budgets: numbers of edges to cut. Those above the number of ranked edges are left out.
        result: what `train_mask` returned, with a ranking.
        model, break_task, keep_task, settings: as they were given to `train_mask`.
    """
    means, weights = model.means, model.mask.weights.detach().clone()
    given = replace(settings, method=GIVEN, steps=settings.constants_steps, refine_rounds=0, constants_steps=0)
    before = None
    try:
        for budget in sorted(set(budgets)):
            if budget > len(result.ranking):
                continue
            mask = result.at(budget).to(weights)
            if before is None or not torch.equal(mask, before):
                model.means = means
                fitted = torch.equal(mask, weights) or not bool((mask == 0).any())
                if settings.constants_lr and not fitted:
                    train_mask(
                        model, break_task, keep_task, replace(given, max_edges=budget), mask == 0, progress=False
                    )  # fmt: skip
            before = mask
            with torch.no_grad():
                model.mask.weights.copy_(mask)
            yield budget
    finally:
        model.means = means
        with torch.no_grad():
            model.mask.weights.copy_(weights)
