"""Localise, then train: a subset of the edges in which a mask is then looked for."""

from dataclasses import replace

import torch
from torch import Tensor

from circuit_breaking.engine.transformer import EdgeMaskedTransformer
from circuit_breaking.errors import UserError
from circuit_breaking.tasks.base import Task
from circuit_breaking.training.config import MaskConfig
from circuit_breaking.training.mask_trainer import train_mask

WAYS = ("eap", "eap-ig", "random")
BATCHES = 20  # batches over which attribution is averaged; one for each point of EAP-IG


def localise(
    model: EdgeMaskedTransformer,
    break_task: Task,
    keep_task: Task,
    settings: MaskConfig,
    way: str,
    count: int,
    seed: int = 0,
) -> Tensor:
    """The `count` edges that a mask may then cut, bool [E]: those whose cut is predicted to lower the objective most.

    Args:
        model: the model; its mask is reset.
        break_task, keep_task, settings: as for `train_mask`. Attribution takes 20 batches of each task.
        way: `eap` (the gradient with all edges kept), `eap-ig` (averaged between all and no edges kept), or `random`,
            a control.
        count: number of edges.
        seed: of the random choice.

    Raises:
        UserError: there is no such way, or the model has fewer edges.
    """
    n_edges = len(model.graph)
    if way not in WAYS:
        raise UserError(f"there is no way {way!r} to localise; choose from {', '.join(WAYS)}.")
    if not 1 <= count <= n_edges:
        raise UserError(f"{count} edges cannot be localised: the model has {n_edges:,}.")
    if way == "random":
        chosen = torch.randperm(n_edges, generator=torch.Generator().manual_seed(seed))[:count]
        return torch.zeros(n_edges, dtype=torch.bool).index_fill_(0, chosen, True).to(model.device)
    how = replace(
        settings, method="attribution", steps=BATCHES, ig_steps=BATCHES if way == "eap-ig" else 0, max_edges=count,
        budgets=(count,), refine_rounds=0, constants_lr=0.0,
    )  # fmt: skip
    result = train_mask(model, break_task, keep_task, how, progress=False)
    model.mask.reset_()
    return (result.at(count) < 0.5).to(model.device)
