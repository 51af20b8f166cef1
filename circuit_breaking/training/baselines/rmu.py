"""Representation misdirection (Li et al. 2024, WMDP, arXiv:2403.03218).

    |h(toxic) - c·u|² + retain · |h(ordinary) - h_original(ordinary)|²

h is the residual stream after one layer, u a random direction. The length c of the target is given in units of the mean
norm of the activations (adaptive RMU; Dang et al. 2024). Trains the MLPs' output projections of that layer and of the
two before it.

Shapes: M predictions, D width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from circuit_breaking.errors import UserError
from circuit_breaking.models.families import describe
from circuit_breaking.models.tokens import TokenBatch
from circuit_breaking.training.baselines.base import Method, State
from circuit_breaking.training.baselines.streams import after_layers
from circuit_breaking.training.config import LossSettings


def rmu(state: State, toxic: TokenBatch, ordinary: TokenBatch) -> Tensor:
    """|h(toxic) - c·u|² + retain · |h(ordinary) - h_original(ordinary)|², averaged over positions and width."""
    layer = rmu_layer(state.model, state.settings)
    with torch.no_grad():
        before = activations(state.original, ordinary, layer)
        if "target" not in state.more:
            length = activations(state.original, toxic, layer).norm(dim=-1).mean()
            generator = torch.Generator().manual_seed(state.seed)
            direction = torch.rand(before.shape[-1], generator=generator).to(before)
            state.more["target"] = state.settings.rmu_steer * length * direction / direction.norm()
    steered = (activations(state.model, toxic, layer) - state.more["target"]).square().mean()
    kept = F.mse_loss(activations(state.model, ordinary, layer), before)
    return steered + state.settings.rmu_retain * kept


def activations(model: nn.Module, batch: TokenBatch, layer: int) -> Tensor:
    """The residual stream after a layer, at the positions of predictions: [M, D]."""
    batch = batch.to(model.device)
    return after_layers(model, batch)[layer + 1][batch.predicted]


def rmu_layer(model: nn.Module, settings: LossSettings) -> int:
    """The layer whose output is steered. Raises a `UserError` if the model has no such layer."""
    layers = model.config.num_hidden_layers
    layer = settings.rmu_layer if settings.rmu_layer >= 0 else min(layers // 2, layers - 2)
    # the last of Hugging Face's hidden states comes after the final norm, so the last layer is excluded
    if not 0 <= layer < layers - 1:
        raise UserError(f"rmu_layer is {layer}; give one between 0 and {layers - 2}, or -1.")
    return layer


def mlp_outputs(model: nn.Module, settings: LossSettings) -> Callable[[str], bool]:
    """The weights of the MLPs' output projections in the steered layer and the two before it, as in WMDP."""
    last = rmu_layer(model, settings)
    weights = {layer.down.module.weight for layer in describe(model).layers[max(0, last - 2) : last + 1]}
    names = {name for name, parameter in model.named_parameters() if parameter in weights}
    return names.__contains__


RMU = Method("toxic activations steered to a random direction, ordinary ones kept", rmu, mlp_outputs, compares=True)
