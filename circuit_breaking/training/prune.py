"""The few edges that are enough for a behaviour, by pruning from the whole model.

In every round, the gradient of the task's loss at the current mask estimates the worth of each edge: what it adds where
it is kept, what it would add where it is cut. The worth is a running mean over rounds, so that an edge that was cut by
mistake comes back. The number of kept edges falls geometrically, stage by stage (iterative pruning by first-order
saliency, as Molchanov et al. 2017 do for channels). All masks are binary.

Shapes: E edges.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from circuit_breaking.engine.mask import lowest_cut
from circuit_breaking.engine.transformer import EdgeMaskedTransformer
from circuit_breaking.errors import UserError
from circuit_breaking.runs.progress import progress_bar
from circuit_breaking.tasks.base import Task
from circuit_breaking.training.config import PruneSettings, check_prune
from circuit_breaking.training.mask_gradient import value_and_gradient


@dataclass
class Stage:
    """A binary mask [E] that keeps `kept` edges, and its loss on one batch."""

    mask: Tensor
    kept: int
    loss: float


def prune(model: EdgeMaskedTransformer, task: Task, settings: PruneSettings) -> Iterator[Stage]:
    """Yield the mask at the end of every stage, each smaller than the one before. Stop iterating when enough is lost.

    Args:
        model: the model; its `means` are the ablation values of cut edges. Its own mask is not changed.
        task: the behaviour to keep.
        settings: see `PruneSettings`.

    Raises:
        UserError: a setting makes no sense, or a gradient is not finite.
    """
    check_prune(settings)
    mask = torch.ones_like(model.mask.weights)
    n_edges = kept = len(mask)
    cost: Tensor | None = None  # minus an edge's worth
    while kept > settings.fewest:
        target = max(settings.fewest, min(kept - 1, round(settings.shrink * kept)))
        best, lowest = mask, float("inf")
        for number in range(1, settings.rounds + 1):
            loss, gradient = value_and_gradient(partial(task.loss, model, task.draw(settings.batch_size)), mask)
            if not gradient.isfinite().all():
                raise UserError("a gradient is not finite, so edges cannot be pruned. Use float32, or other means.")
            # masks of one size differ much from round to round: a stage returns the best one of its target size
            loss = float(loss)
            if int(mask.sum()) == target and loss < lowest:
                best, lowest = mask, loss
            cost = gradient if cost is None else settings.memory * cost + (1 - settings.memory) * gradient
            # the second half of a stage stays at its count, so that edges can be exchanged
            progress = min(1.0, 2 * number / settings.rounds)
            count = round(kept * (target / kept) ** progress)
            mask = lowest_cut(-cost, n_edges - count)
        if int(best.sum()) != target:  # there were too few rounds to measure a mask of that size
            best = mask
        kept, mask = target, best.clone()
        yield Stage(best.clone(), kept, lowest)


def smallest(
    stages: Iterator[Stage],
    share_of: Callable[[Tensor], float],
    least: float,
    patience: int = 6,
    progress: bool = True,
) -> tuple[Stage | None, list[dict[str, float]]]:
    """Run stages of pruning as long as enough of the behaviour is left.

    Pruning ends after `patience` stages in a row that are below `least`, because a stage that lost an edge by mistake
    often gets it back.

    Args:
        stages: from `prune`.
        share_of: the share of the behaviour that a mask [E] keeps.
        least: the smallest share that is enough.
        patience: see above.
        progress: show a progress bar.

    Returns:
        the last stage whose share is `least` or more, None if there is none; and a row (`kept`, `share`) per stage.
    """
    found, rows, below = None, [], 0
    with progress_bar(stages, shown=progress, desc="pruning", unit="stage") as bar:
        for stage in bar:
            share = share_of(stage.mask)
            rows.append({"kept": stage.kept, "share": share})
            bar.set_postfix_str(f"{stage.kept} edges, {share:.2f}")
            if share >= least:
                found, below = stage, 0
            else:
                below += 1
            if below == patience:
                break
    return found, rows
