"""Baselines that change weights to remove a behaviour: what each of them minimises (layer 3).

    joint             ordinary loss - ratio · toxic loss, the paper's fine-tuning (Li, Davies, Nadeau 2023, eq. 4)
    ascent            gradient ascent on toxic text alone
    task_arithmetic   fine-tune towards toxicity, then subtract the change times a scale (Ilharco et al. 2023)
    npo               negative preference optimisation with a term that retains (Zhang, Lin, Bai, Mei 2024)
    rmu               representation misdirection (Li et al. 2024, WMDP), its steering in units of the activations'
                      norm (adaptive RMU; Dang et al. 2024)

Each is an entry of `METHODS`; `finetuning.finetune` is the one loop for all.

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
    """What a method has at hand while it trains: the model, the original where it compares with it, and settings."""

    model: nn.Module
    settings: LossSettings
    seed: int = 0
    original: nn.Module | None = None
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def cap(self) -> float:
        return self.settings.cap or math.log(self.model.config.vocab_size)

    def toxic_loss(self, batch: TokenBatch) -> Tensor:
        """Mean loss, each prediction counting with at most the cap: what is unlikely already is not pushed on."""
        return trainable_prediction_losses(self.model, batch)[0].clamp(max=self.cap).mean()

    def ordinary_loss(self, batch: TokenBatch) -> Tensor:
        return trainable_prediction_losses(self.model, batch)[0].mean()


def joint(state: State, toxic: TokenBatch, ordinary: TokenBatch) -> Tensor:
    return state.ordinary_loss(ordinary) - state.settings.ratio * state.toxic_loss(toxic)


def ascent(state: State, toxic: TokenBatch, ordinary: TokenBatch) -> Tensor:
    return -state.toxic_loss(toxic)


def towards_toxicity(state: State, toxic: TokenBatch, ordinary: TokenBatch) -> Tensor:
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
    """|h(toxic) - c·u|² + retain · |h(ordinary) - h_original(ordinary)|², means over positions and width."""
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
    """The residual stream behind a layer, where predictions are made: [M, D]."""
    batch = batch.to(model.device)
    states = model.base_model(input_ids=batch.tokens, use_cache=False, output_hidden_states=True).hidden_states
    return states[layer + 1][batch.predicted]


def rmu_layer(model: nn.Module, settings: LossSettings) -> int:
    layers = model.config.num_hidden_layers
    layer = settings.rmu_layer if settings.rmu_layer >= 0 else min(layers // 2, layers - 2)
    # the last entry of Hugging Face's hidden states is behind the final norm
    if not 0 <= layer < layers - 1:
        raise UserError(f"rmu_layer is {layer}; give one between 0 and {layers - 2}, or -1.")
    return layer


def every_parameter(model: nn.Module, settings: LossSettings) -> Callable[[str], bool]:
    return lambda name: True


def mlp_outputs(model: nn.Module, settings: LossSettings) -> Callable[[str], bool]:
    """The weights of the MLPs' output projections in the steered layer and the two before it, as in WMDP."""
    last = rmu_layer(model, settings)
    weights = {layer.down.module.weight for layer in describe(model).layers[max(0, last - 2) : last + 1]}
    names = {name for name, parameter in model.named_parameters() if parameter in weights}
    return names.__contains__


@dataclass(frozen=True)
class Method:
    """A way to change weights: its loss, what it trains, and whether it is subtracted in the end."""

    about: str
    loss: Callable[[State, TokenBatch, TokenBatch], Tensor]
    trains: Callable[[nn.Module, LossSettings], Callable[[str], bool]] = every_parameter
    compares: bool = False  # needs the original beside the model
    subtracts: bool = False  # the result is the original minus a scale times the change


METHODS = {
    "joint": Method("ordinary loss - ratio · toxic loss (the paper's eq. 4)", joint),
    "ascent": Method("gradient ascent on toxic text alone", ascent),
    "task_arithmetic": Method("minus the change that learning toxic text makes", towards_toxicity, subtracts=True),
    "npo": Method("negative preference optimisation, with the ordinary loss", npo, compares=True),
    "rmu": Method("toxic activations steered to a random direction, ordinary ones held", rmu, mlp_outputs, True),
}


def start(method: Method, model: nn.Module, settings: LossSettings, seed: int = 0) -> State:
    """Make `model` ready for training by a method: what it trains requires gradients, nothing else does."""
    chosen = method.trains(model, settings)
    original = copy.deepcopy(model).requires_grad_(False) if method.compares else None
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(chosen(name))
    return State(model, settings, seed, original)


def candidates(method: Method, before: Weights, now: Weights, scales: tuple[float, ...]) -> Iterator[tuple]:
    """(scale, weights) of the models that a checkpoint offers: itself, or the original minus its change, scaled."""
    if not method.subtracts:
        yield None, now
        return
    for scale in scales:
        yield scale, {name: before[name] - scale * (now[name] - before[name]) for name in now}
