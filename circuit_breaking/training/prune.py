"""The few edges that are enough for a behaviour, by pruning from the whole model (layer 3).

In every round the gradient of the task's loss at the mask in force says what each edge is worth: what it adds where it
is kept, what it would add where it is cut. The worth is a running mean over rounds, so that an edge cut in error comes
back, and the number of edges kept falls geometrically, stage by stage (iterative pruning by first-order saliency, as in
Molchanov et al. 2017 for channels, here for edges). Masks are binary throughout.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from circuit_breaking.engine.mask import lowest_cut
from circuit_breaking.errors import UserError
from circuit_breaking.training.attribution import edge_gradients
from circuit_breaking.training.config import PruneSettings, check_prune


@dataclass
class Stage:
    """A binary mask [E] that keeps `kept` edges, and its loss on one batch."""

    mask: Tensor
    kept: int
    loss: float


def prune(model: Any, task: Any, settings: PruneSettings) -> Iterator[Stage]:
    """The masks at the end of every stage, each smaller than the one before; end the iteration when enough is lost.

    Args:
        model: an `EdgeMaskedTransformer`, whose `means` say what a cut edge carries. Its own mask is left alone.
        task: behaviour to keep, a `tasks.Task`.
        settings: see `PruneSettings`.

    Raises:
        UserError: a setting makes no sense, or a gradient is not finite.
    """
    check_prune(settings)
    mask = torch.ones_like(model.mask.weights)
    every = kept = len(mask)
    cost: Tensor | None = None  # minus an edge's worth
    while kept > settings.fewest:
        target = max(settings.fewest, min(kept - 1, round(settings.shrink * kept)))
        best, lowest = mask, float("inf")
        for number in range(1, settings.rounds + 1):
            batch = task.draw(settings.batch_size)
            values: list[Tensor] = []

            def loss_of(weights: Tensor, batch: Any = batch, values: list[Tensor] = values) -> Tensor:
                values.append(task.loss(model, batch, weights))
                return values[-1]

            gradient = edge_gradients(loss_of, mask)
            if not gradient.isfinite().all():
                raise UserError("a gradient is not finite, so edges cannot be pruned. Use float32, or other means.")
            # masks differ from round to round, some much worse than others: a stage gives the best of its size
            loss = float(values[0].detach())
            if int(mask.sum()) == target and loss < lowest:
                best, lowest = mask, loss
            cost = gradient if cost is None else settings.memory * cost + (1 - settings.memory) * gradient
            # the second half of a stage stays at its count and lets edges be exchanged
            progress = min(1.0, 2 * number / settings.rounds)
            now = round(kept * (target / kept) ** progress)
            mask = lowest_cut(-cost, every - now)
        if int(best.sum()) != target:  # too few rounds to measure one
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
    """The last stage whose share is `least` or more, and a row (`kept`, `share`) for every stage that was run.

    Pruning ends after `patience` stages in a row below, since one that lost an edge in error often gets it back. None
    where no stage is good enough.
    """
    found, rows, below = None, [], 0
    with tqdm(stages, desc="pruning", unit="stage", disable=None if progress else True) as bar:
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
