"""Baselines that change weights to remove a behaviour: the loss of each method.

    joint             ordinary loss - ratio · toxic loss, the paper's fine-tuning (Li, Davies, Nadeau 2023, eq. 4)
    ascent            gradient ascent on toxic text alone
    task_arithmetic   fine-tune towards toxicity, then subtract the change times a scale (Ilharco et al. 2023)
    npo               negative preference optimisation with a term that retains (Zhang, Lin, Bai, Mei 2024)
    rmu               representation misdirection (Li et al. 2024, WMDP), with the steering target in units of the
                      norm of the activations (adaptive RMU; Dang et al. 2024)

Each is an entry of `METHODS`; `finetune.finetune` trains by any of them.

Shapes: n texts, M predictions, D width, V vocabulary.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from circuit_breaking.errors import UserError
from circuit_breaking.models.families import describe
from circuit_breaking.models.tokens import TokenBatch
from circuit_breaking.tasks.losses import trainable_prediction_losses
from circuit_breaking.training.config import LossSettings

Weights = dict[str, Tensor]


@dataclass
class State:
    """What a method needs while it trains.

    Attributes:
        model: the model that is trained.
        settings: settings of the losses.
        seed: of random directions.
        original: the original model, for methods that compare with it.
        more: tensors that a method keeps between steps, by name.
    """

    model: nn.Module
    settings: LossSettings
    seed: int = 0
    original: nn.Module | None = None
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def cap(self) -> float:
        """Highest loss of a single toxic prediction, nats."""
        return self.settings.cap or math.log(self.model.config.vocab_size)

    def toxic_loss(self, batch: TokenBatch) -> Tensor:
        """Mean loss, clamped per prediction, so that predictions that are already unlikely have no gradient."""
        return trainable_prediction_losses(self.model, batch)[0].clamp(max=self.cap).mean()

    def ordinary_loss(self, batch: TokenBatch) -> Tensor:
        """Mean loss."""
        return trainable_prediction_losses(self.model, batch)[0].mean()


def joint(state: State, toxic: TokenBatch, ordinary: TokenBatch) -> Tensor:
    """Ordinary loss - ratio · toxic loss (the paper's eq. 4)."""
    return state.ordinary_loss(ordinary) - state.settings.ratio * state.toxic_loss(toxic)


def ascent(state: State, toxic: TokenBatch, ordinary: TokenBatch) -> Tensor:
    """- toxic loss."""
    return -state.toxic_loss(toxic)


def towards_toxicity(state: State, toxic: TokenBatch, ordinary: TokenBatch) -> Tensor:
    """Toxic loss, whose change of weights is subtracted in the end."""
    return trainable_prediction_losses(state.model, toxic)[0].mean()


def npo(state: State, toxic: TokenBatch, ordinary: TokenBatch) -> Tensor:
    """(2/β) E[log(1 + (π/π_original)^β)] over toxic texts, plus the ordinary loss."""
    losses, text = trainable_prediction_losses(state.model, toxic)
    with torch.no_grad():
        before, _ = trainable_prediction_losses(state.original, toxic)
    ratio = torch.zeros(len(toxic), device=losses.device).index_add(0, text, before - losses)  # log(π/π_original)
    beta = state.settings.npo_beta
    return 2 / beta * F.softplus(beta * ratio).mean() + state.settings.npo_retain * state.ordinary_loss(ordinary)


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
    states = model.base_model(input_ids=batch.tokens, use_cache=False, output_hidden_states=True).hidden_states
    return states[layer + 1][batch.predicted]


def rmu_layer(model: nn.Module, settings: LossSettings) -> int:
    """The layer whose output is steered. Raises a `UserError` if the model has no such layer."""
    layers = model.config.num_hidden_layers
    layer = settings.rmu_layer if settings.rmu_layer >= 0 else min(layers // 2, layers - 2)
    # the last of Hugging Face's hidden states comes after the final norm, so the last layer is excluded
    if not 0 <= layer < layers - 1:
        raise UserError(f"rmu_layer is {layer}; give one between 0 and {layers - 2}, or -1.")
    return layer


def every_parameter(model: nn.Module, settings: LossSettings) -> Callable[[str], bool]:
    """Train every parameter."""
    return lambda name: True


def mlp_outputs(model: nn.Module, settings: LossSettings) -> Callable[[str], bool]:
    """The weights of the MLPs' output projections in the steered layer and the two before it, as in WMDP."""
    last = rmu_layer(model, settings)
    weights = {layer.down.module.weight for layer in describe(model).layers[max(0, last - 2) : last + 1]}
    names = {name for name, parameter in model.named_parameters() if parameter in weights}
    return names.__contains__


@dataclass(frozen=True)
class Method:
    """A way to change weights: its loss, the parameters it trains, and whether the change is subtracted in the end."""

    about: str
    loss: Callable[[State, TokenBatch, TokenBatch], Tensor]
    trains: Callable[[nn.Module, LossSettings], Callable[[str], bool]] = every_parameter
    compares: bool = False  # needs the original model too
    subtracts: bool = False  # the result is the original minus a multiple of the change


METHODS = {
    "joint": Method("ordinary loss - ratio · toxic loss (the paper's eq. 4)", joint),
    "ascent": Method("gradient ascent on toxic text alone", ascent),
    "task_arithmetic": Method("minus the change that learning toxic text makes", towards_toxicity, subtracts=True),
    "npo": Method("negative preference optimisation, with the ordinary loss", npo, compares=True),
    "rmu": Method("toxic activations steered to a random direction, ordinary ones held", rmu, mlp_outputs, True),
}


def start(method: Method, model: nn.Module, settings: LossSettings, seed: int = 0) -> State:
    """Prepare `model` for training by a method: the parameters that it trains require gradients, no others do."""
    chosen = method.trains(model, settings)
    original = copy.deepcopy(model).requires_grad_(False) if method.compares else None
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(chosen(name))
    return State(model, settings, seed, original)


def candidates(method: Method, before: Weights, now: Weights, scales: tuple[float, ...]) -> Iterator[tuple]:
    """(scale, weights) of the models to validate: the trained one, or the original minus multiples of the change."""
    if not method.subtracts:
        yield None, now
        return
    for scale in scales:
        yield scale, {name: before[name] - scale * (now[name] - before[name]) for name in now}
