"""Masks over a model's weights: which weights of a stock Hugging Face model are set to zero.

    with mask_weights(hf_model, load_weight_mask("weight_mask.safetensors")):
        hf_model.generate(...)

Weights are masked in units, each as a whole. By granularity (`UNITS`) a unit is

    weight  one entry of an attention or MLP matrix
    neuron  the row with which one hidden neuron of an MLP writes to the residual stream
    head    the rows with which one attention head writes to the residual stream

so a masked neuron or head writes nothing; the layer's bias, which belongs to no unit, stays. Embeddings, norms and
biases are never masked. A mask is stored as the numbers of its units, matrix by matrix: nothing dense.

Shapes: U units of a matrix, c of them chosen; H heads, K head width, D width, F MLP width.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from circuit_breaking.errors import UserError
from circuit_breaking.models.families import describe, require_loaded
from circuit_breaking.models.families.spec import LayerSpec, check_supported
from circuit_breaking.runs.records import Record
from circuit_breaking.runs.tensors import read_tensors, write_tensors

OLD_FORMAT = "weight mask, version 1"  # before records had versions
HINT = "Learn one with mask_learning.py, or set the path of one."


View = Callable[[Tensor], Tensor]  # a parameter, or its gradient -> [U, ...], a view of it by unit


class Matrix(NamedTuple):
    """A parameter that contains units."""

    name: str  # among the model's parameters
    parameter: nn.Parameter
    by_unit: View
    count: int  # U


def _every_weight(layer: LayerSpec) -> list[tuple[nn.Parameter, View]]:
    weights = [weight for module in (layer.attention, layer.mlp) for weight in module.parameters() if weight.dim() == 2]
    return [(weight, lambda x: x.view(-1)) for weight in weights]


def _neurons(layer: LayerSpec) -> list[tuple[nn.Parameter, View]]:
    return [(layer.down.module.weight, layer.down.inputs_first)]


def _heads(layer: LayerSpec) -> list[tuple[nn.Parameter, View]]:
    out, heads = layer.out, layer.n_heads
    return [(out.module.weight, lambda x: out.inputs_first(x).unflatten(0, (heads, -1)))]


UNITS = {"weight": _every_weight, "neuron": _neurons, "head": _heads}
OPTIONS = {  # of a description, those that leave a mask's meaning as it is
    "gate", "query_norm", "key_norm", "norms_all_heads", "softcap", "attention_out_norm", "mlp_out_norm",
    "rotary_kind", "multiplier", "window", "positions", "embedding_scale", "rotary", "unembedding_bias",
    "head", "parallel", "dropouts",
}  # fmt: skip
NORMS = {"layer", "rms", "rms_offset", "none"}


def find_matrices(hf: nn.Module, granularity: str) -> list[Matrix]:
    """The parameters that contain the units of a granularity, layer by layer.

    Raises:
        UserError: the granularity is unknown, or the model's family is (see `models.families`).
    """
    if not isinstance(granularity, str) or granularity not in UNITS:
        raise UserError(f"granularity {granularity!r} is not one of {', '.join(UNITS)}.")
    model = describe(hf)
    require_loaded(hf)
    check_supported(model, "a weight mask", OPTIONS, NORMS)
    names = {parameter: name for name, parameter in hf.named_parameters()}
    return [
        Matrix(names[parameter], parameter, by_unit, len(by_unit(parameter)))
        for layer in model.layers
        for parameter, by_unit in UNITS[granularity](layer)
    ]


def shape_hash(hf: nn.Module) -> str:
    """SHA-256 over the family and the names and shapes of all parameters: a mask fits models with the same one."""
    shapes = sorted((name, list(parameter.shape)) for name, parameter in hf.named_parameters())
    return hashlib.sha256(json.dumps([hf.config.model_type, shapes]).encode()).hexdigest()


@dataclass
class WeightMask:
    """Which units are masked: for each parameter's name their numbers, int64 [c] in rising order, each once."""

    granularity: str
    units: dict[str, Tensor] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)  # how the mask was made

    def __len__(self) -> int:
        return sum(len(units) for units in self.units.values())


def check_fits(mask: WeightMask, hf: nn.Module) -> dict[str, Matrix]:
    """The matrices of a model by name. Raises `UserError` unless they contain all units of a mask."""
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


@dataclass(kw_only=True)
class WeightMaskRecord(Record):
    """How a mask over weights was made; lies in the header of its file.

    Attributes:
        granularity: what is masked as a whole, one of `UNITS`.
        shape_hash: of the model that the mask belongs to (`shape_hash`).
        model: its name.
        units, all_units, weights, all_weights: what `shares` gives.
        provenance: settings of the script, hashes of the files read, package versions, git commit.
    """

    NAME: ClassVar[str] = "weight mask"
    granularity: Any
    shape_hash: str
    units: int
    all_units: int
    weights: int
    all_weights: int
    model: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_old(cls, value: Any, path: Path | str, hint: str) -> dict[str, Any]:
        if not isinstance(value, dict) or value.get("format") != OLD_FORMAT:
            raise UserError(f"{path} holds no weight mask. {hint}")
        return super().from_old(value, path, hint)


class MaskedWeights:
    """Weights set to zero in a model; also a context manager that puts them back at its end."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []  # view by unit, numbers of units, their former weights

    @torch.no_grad()
    def _zero(self, view: Tensor, units: Tensor) -> None:
        self._kept.append((view, units, view[units]))
        view[units] = 0.0

    @torch.no_grad()
    def remove(self) -> None:
        """Restore the weights bit for bit. A second call does nothing."""
        while self._kept:
            view, units, values = self._kept.pop()
            view[units] = values

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def mask_weights(hf: nn.Module, mask: WeightMask) -> MaskedWeights:
    """Set the masked weights of a stock Hugging Face model to zero, in place.

    Only the overwritten weights are stored for `remove()`. Until then the model must stay on its device and keep its
    dtype.

    Raises:
        UserError: the mask does not fit the model.
    """
    matrices = check_fits(mask, hf)
    handle = MaskedWeights()
    for name, units in mask.units.items():
        parameter = matrices[name].parameter.detach()
        handle._zero(matrices[name].by_unit(parameter), units.to(parameter.device))
    return handle


def save_weight_mask(
    path: Path | str, hf: nn.Module, mask: WeightMask, provenance: dict[str, Any] | None = None, model: str = ""
) -> None:
    """Write a mask to a safetensors file: for every matrix with masked units their numbers.

    Args:
        path: the file.
        hf: the model that the mask was made for.
        mask: the mask.
        provenance: how it came to be (`provenance.provenance`).
        model: name of that model, for error messages.
    """
    record = WeightMaskRecord(
        granularity=mask.granularity, shape_hash=shape_hash(hf), model=model, provenance=provenance or {},
        **shares(mask, hf),
    )  # fmt: skip
    small = {name: units.to(torch.int32) for name, units in mask.units.items() if len(units)}
    if any(len(units) and units.max() > torch.iinfo(torch.int32).max for units in mask.units.values()):
        small = {name: units.to(torch.int64) for name, units in mask.units.items() if len(units)}
    write_tensors(path, small, record.to_json())


def load_weight_mask(path: Path | str, hf: nn.Module) -> WeightMask:
    """Read a mask that `save_weight_mask` wrote.

    Raises:
        UserError: the file is missing or damaged, holds something else, or was made for a model of another shape.
    """
    units, header = read_tensors(path, HINT)
    record = WeightMaskRecord.from_json(header, path, HINT)
    if record.shape_hash != shape_hash(hf):
        raise UserError(
            f"{path} was made for a model of another shape ({record.model}). Load that one, or learn a mask for "
            "this one."
        )
    mask = WeightMask(record.granularity, units, record.provenance)
    try:
        check_fits(mask, hf)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    mask.units = {name: numbers.long() for name, numbers in units.items()}
    return mask
