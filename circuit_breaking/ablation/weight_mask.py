"""Masks over a model's weights: which weights of a stock Hugging Face model are set to zero (layer 2).

    with mask_weights(hf_model, load_weight_mask("weight_mask.safetensors")):
        hf_model.generate(...)

A unit is masked as a whole. By granularity (`UNITS`) it is

    weight  one entry of an attention or MLP matrix
    neuron  the row with which one hidden neuron of an MLP writes to the residual stream
    head    the rows with which one attention head writes to the residual stream

so that a masked neuron or head adds nothing but the bias of its layer, which is no unit's own. Embeddings, norms and
biases are never masked. A mask is kept and stored as the numbers of its units, matrix by matrix: nothing dense.

Shapes: U units of a matrix, c of them chosen; H heads, K head width, D width, F MLP width.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from circuit_breaking.errors import UserError
from circuit_breaking.models.hook_points import Layer, find_places
from circuit_breaking.runs.tensors import read_tensors, write_tensors

FORMAT = "weight mask, version 1"
HINT = "Learn one with mask_learning.py, or set the path of one."


class Matrix(NamedTuple):
    """A parameter that units are part of."""

    name: str  # among the model's parameters
    parameter: nn.Parameter
    by_unit: Callable[[Tensor], Tensor]  # the parameter, or its gradient -> [U, ...], a view of it
    count: int  # U


def _matrices(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.dim() == 2]


def _inputs_first(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """How the weight of a linear module is seen as [in, out]."""
    return (lambda weight: weight.t()) if isinstance(module, nn.Linear) else (lambda weight: weight)


def _every_weight(layer: Layer, heads: int) -> list[tuple[nn.Parameter, Callable[[Tensor], Tensor]]]:
    return [(weight, lambda x: x.view(-1)) for module in (layer.attention, layer.mlp) for weight in _matrices(module)]


def _neurons(layer: Layer, heads: int) -> list[tuple[nn.Parameter, Callable[[Tensor], Tensor]]]:
    return [(layer.down.weight, _inputs_first(layer.down))]


def _heads(layer: Layer, heads: int) -> list[tuple[nn.Parameter, Callable[[Tensor], Tensor]]]:
    inputs_first = _inputs_first(layer.out)
    return [(layer.out.weight, lambda x: inputs_first(x).unflatten(0, (heads, -1)))]


UNITS = {"weight": _every_weight, "neuron": _neurons, "head": _heads}


def find_matrices(hf: nn.Module, granularity: str) -> list[Matrix]:
    """The parameters that units of a granularity are part of, layer by layer.

    Raises:
        UserError: there is no such granularity, or the model is of a family that is not known (`places.FAMILIES`).
    """
    if not isinstance(granularity, str) or granularity not in UNITS:
        raise UserError(f"granularity {granularity!r} is not one of {', '.join(UNITS)}.")
    model = find_places(hf)
    names = {parameter: name for name, parameter in hf.named_parameters()}
    return [
        Matrix(names[parameter], parameter, by_unit, len(by_unit(parameter)))
        for layer in model.layers
        for parameter, by_unit in UNITS[granularity](layer, model.heads)
    ]


def shape_hash(hf: nn.Module) -> str:
    """SHA-256 over the family and the names and shapes of all parameters: what a mask's unit numbers hang on."""
    shapes = sorted((name, list(parameter.shape)) for name, parameter in hf.named_parameters())
    return hashlib.sha256(json.dumps([hf.config.model_type, shapes]).encode()).hexdigest()


@dataclass
class WeightMask:
    """Which units are masked: by parameter name their numbers, int64 [c] in rising order, none twice."""

    granularity: str
    units: dict[str, Tensor] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)  # how it came to be

    def __len__(self) -> int:
        return sum(len(units) for units in self.units.values())


def check_fits(mask: WeightMask, hf: nn.Module) -> dict[str, Matrix]:
    """The matrices of a model by name, if a mask's units are all there; else a `UserError`."""
    matrices = {matrix.name: matrix for matrix in find_matrices(hf, mask.granularity)}
    for name, units in mask.units.items():
        if name not in matrices:
            raise UserError(f"the weight mask names {name}, which this model does not have. {HINT}")
        count = matrices[name].count
        if (
            units.dim() != 1
            or units.dtype not in (torch.int32, torch.int64)
            or (len(units) and not 0 <= units.min() <= units.max() < count)
        ):
            raise UserError(f"the weight mask of {name} is not a list of numbers below {count:,}. {HINT}")
        if len(units.unique()) < len(units):
            raise UserError(f"the weight mask of {name} names a unit twice. {HINT}")
        if (units.diff() < 0).any():
            raise UserError(f"the weight mask of {name} does not name its units in rising order. {HINT}")
    return matrices


def shares(mask: WeightMask, hf: nn.Module) -> dict[str, int]:
    """How much a mask sets to zero: `units` of `all_units`, and `weights` of the model's `all_weights`."""
    matrices = check_fits(mask, hf)
    weights = sum(
        len(units) * (matrices[name].parameter.numel() // matrices[name].count) for name, units in mask.units.items()
    )
    return {
        "units": len(mask),
        "all_units": sum(matrix.count for matrix in matrices.values()),
        "weights": weights,
        "all_weights": sum(parameter.numel() for parameter in hf.parameters()),
    }


class MaskedWeights:
    """Weights set to zero in a model; also a context manager that puts them back at its end."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []  # view by unit, numbers, what was there

    @torch.no_grad()
    def _zero(self, view: Tensor, units: Tensor) -> None:
        self._kept.append((view, units, view[units]))
        view[units] = 0.0

    @torch.no_grad()
    def remove(self) -> None:
        """Make the weights what they were, bit for bit. Doing so twice is no error."""
        while self._kept:
            view, units, values = self._kept.pop()
            view[units] = values

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def mask_weights(hf: nn.Module, mask: WeightMask) -> MaskedWeights:
    """Set the masked weights of a stock Hugging Face model to zero, in place.

    Only what is overwritten is kept for `remove()`. The model must stay on its device and in its type until then.

    Raises:
        UserError: the mask does not fit the model.
    """
    matrices = check_fits(mask, hf)
    handle = MaskedWeights()
    for name, units in mask.units.items():
        parameter = matrices[name].parameter.detach()
        handle._zero(matrices[name].by_unit(parameter), units.to(parameter.device))
    return handle


def save_weight_mask(path: Path | str, hf: nn.Module, mask: WeightMask, about: dict[str, Any] | None = None) -> None:
    """Write a mask to a safetensors file: for every matrix with masked units their numbers.

    Args:
        path: the file.
        hf: the model that it belongs to.
        mask: the mask.
        about: JSON-able record of how it came to be (see `files.provenance`).
    """
    record = {"format": FORMAT, "granularity": mask.granularity, "shape_hash": shape_hash(hf), **shares(mask, hf)}
    small = {name: units.to(torch.int32) for name, units in mask.units.items() if len(units)}
    if any(len(units) and units.max() > torch.iinfo(torch.int32).max for units in mask.units.values()):
        small = {name: units.to(torch.int64) for name, units in mask.units.items() if len(units)}
    write_tensors(path, small, {**(about or {}), **record})


def load_weight_mask(path: Path | str, hf: nn.Module) -> WeightMask:
    """Read a mask that `save_weight_mask` wrote.

    Raises:
        UserError: the file is missing or damaged, holds something else, or was made for a model of another shape.
    """
    units, about = read_tensors(path, HINT)
    if about.get("format") != FORMAT:
        raise UserError(f"{path} holds no weight mask. {HINT}")
    if about.get("shape_hash") != shape_hash(hf):
        raise UserError(
            f"{path} was made for a model of another shape ({about.get('model')}). Load that one, or learn a mask for "
            "this one."
        )
    mask = WeightMask(about.get("granularity"), units, about)
    try:
        check_fits(mask, hf)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    mask.units = {name: numbers.long() for name, numbers in units.items()}
    return mask
