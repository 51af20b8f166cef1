"""Low-rank adapters (LoRA; Hu et al. 2021, arXiv:2106.09685): W + A B in place of a weight W [in, out].

A [in, r] starts at random and B [r, out] at zero, so that the model is the original at first (unless a loss needs
another start). The factor alpha / r of the paper is 1 here (alpha = r). Only the factors are trained. Adapted weights
take the place of the model's own while a function runs, so the model's modules stay as they are and every computation
sees them, that of a model with cut edges included; peft's adapters are modules of their own. This takes the memory of
one more copy of the adapted weights, and of their gradients.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from circuit_breaking.models.families import describe
from circuit_breaking.models.families.spec import LayerSpec, LinearSpec, linear


class LowRank:
    """Adapters of some weights of a model.

    Args:
        model: the model; its parameters are not changed before `merge_`.
        names: the weights to adapt, of `linear_weights`.
        rank: r.
        seed: of the initial factors.
        spread: standard deviation of the initial B, for a loss without a gradient at the original model.

    Attributes:
        factors: the trained tensors: `a.<name>` and `b.<name>` for each weight.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], rank: int, seed: int = 0, spread: float = 0.0) -> None:
        self.model = model
        parameters, linears = dict(model.named_parameters()), _linears_by_weight(model)
        self._linears = {name: linears[id(parameters[name])] for name in names}
        self.factors: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(seed)
        for name, one in self._linears.items():
            inputs, outputs = one.weight.shape
            bound = 1 / math.sqrt(inputs)  # as in peft
            a = torch.empty(inputs, rank).uniform_(-bound, bound, generator=generator)
            self.factors[f"a.{name}"] = a.to(one.weight).requires_grad_()
            b = spread * torch.randn(rank, outputs, generator=generator) if spread else torch.zeros(rank, outputs)
            self.factors[f"b.{name}"] = b.to(one.weight).requires_grad_()

    def weights(self) -> dict[str, Tensor]:
        """The adapted weights, each of the shape of the model's parameter, differentiable in the factors."""
        return {
            name: one.module.weight + one.inputs_first(self.factors[f"a.{name}"] @ self.factors[f"b.{name}"])
            for name, one in self._linears.items()
        }

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function(*arguments)`, with the adapted weights in the model while it runs."""
        weights = {f"model.{name}": weight for name, weight in self.weights().items()}
        return torch.func.functional_call(_Call(self.model, function), weights, arguments)

    @torch.no_grad()
    def merge_(self) -> None:
        """Make the adapted weights the model's own."""
        for name, weight in self.weights().items():
            self._linears[name].module.weight.copy_(weight)


class _Call(nn.Module):
    """A function that uses a model, as a module, whose weights `functional_call` can replace."""

    def __init__(self, model: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *arguments: Any) -> Any:
        return self.function(*arguments)


def linear_weights(model: nn.Module, layers: int | None = None) -> list[str]:
    """Names of the weights of all linear modules in the first `layers` layers, or in all of them.

    Raises:
        UserError: the model is of a family without a description.
    """
    chosen = {weight for layer in describe(model).layers[:layers] for weight in _linears(layer)}
    return [name for name, parameter in model.named_parameters() if id(parameter) in chosen]


def _linears(layer: LayerSpec) -> dict[int, LinearSpec]:
    """The linear modules of a layer, each once, by the identities of their weights."""
    parts = layer.query, layer.key, layer.value, layer.out, layer.gate, layer.up, layer.down
    return {id(part.module.weight): linear(part.module) for part in parts if part is not None}


def _linears_by_weight(model: nn.Module) -> dict[int, LinearSpec]:
    found: dict[int, LinearSpec] = {}
    for layer in describe(model).layers:
        found |= _linears(layer)
    return found
