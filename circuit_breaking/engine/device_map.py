"""Which device computes which layer, for models that are spread over several GPUs (`device_map`).

Each device computes consecutive layers. Embeddings, the last norm and the unembedding are on the device of the first
layer, which is the model's `device`: tokens are given there, and logits, masks and gradients are there too.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import torch
from torch import nn

from circuit_breaking.engine.network import LayerBlock
from circuit_breaking.errors import UserError
from circuit_breaking.models.families import describe
from circuit_breaking.models.families.spec import LayerSpec, ModelSpec
from circuit_breaking.runs.devices import pick_device
from circuit_breaking.runs.distributed import world

Device = str | int | torch.device
DeviceMap = str | Sequence[Device] | Mapping[str, Device]


def devices_of(device_map: DeviceMap, hf: nn.Module) -> list[torch.device]:
    """The device of every layer of a Hugging Face model.

    Args:
        device_map: `"auto"`, all GPUs; a list of devices; or a device by name of a module, as in Hugging Face's
            `hf_device_map`, where a name stands for all modules inside it too. Over all GPUs, and over those of a list,
            layers are divided so that the largest share of the weights is as small as possible.
        hf: the model. Its weights do not matter.

    Raises:
        UserError: the devices cannot be used, or their layers are not consecutive, or a module has no device, or one
            that is not possible; or there are several processes.
    """
    if world().size > 1:
        raise UserError("device_map spreads one process over all GPUs, and this run has several processes. Start one.")
    spec = describe(hf)
    if isinstance(device_map, Mapping):
        return _by_name(device_map, hf, spec)
    if isinstance(device_map, str) and device_map != "auto":
        raise UserError(f"device_map {device_map!r} is neither auto nor a list of devices, such as cuda:0 cuda:1.")
    if isinstance(device_map, str) or [*device_map] == ["auto"]:
        device_map = [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["auto"]
    devices = [_device(one) for one in device_map]
    if len(set(devices)) < len(devices) or not devices:
        raise UserError(f"device_map names {', '.join(map(str, devices)) or 'no device'}. Name each device once.")
    _check(devices)
    counts = balanced(*sizes(hf, spec), len(spec.layers), len(devices))
    return [device for device, count in zip(devices, counts, strict=False) for _ in range(count)]


def sizes(hf: nn.Module, spec: ModelSpec) -> tuple[int, int]:
    """How many numbers the engine keeps of everything but the layers, and of one layer."""
    first = spec.layers[0]
    layer = sum(one.numel() for one in first.layer.parameters())
    # keys and values that query heads share are repeated for each of them
    repeated = sum(one.weight.numel() * (first.queries_per_key - 1) for one in (first.key, first.value))
    return sum(one.numel() for one in hf.parameters()) - layer * len(spec.layers), layer + repeated


def balanced(outer: int, layer: int, n_layers: int, n_devices: int) -> list[int]:
    """How many layers each device computes, if the first one also keeps `outer` numbers, and a layer has `layer`.

    The largest share is as small as possible. Every device gets a layer, if there are as many.
    """
    others = min(n_devices, n_layers) - 1
    if others < 1:
        return [n_layers]
    # the share of the first device grows with its layers, and the largest of the others falls
    first = min(
        range(1, n_layers - others + 1),
        key=lambda count: max(outer + count * layer, -(-(n_layers - count) // others) * layer),
    )
    each, left = divmod(n_layers - first, others)
    return [first, *(each + (number < left) for number in range(others))]


def _by_name(device_map: Mapping[str, Device], hf: nn.Module, spec: ModelSpec) -> list[torch.device]:
    """The device of every layer, where devices are given by names of modules."""
    names = {module: name for name, module in hf.named_modules()}
    if unknown := sorted({*device_map} - {*names.values()}):
        raise UserError(f"device_map names {unknown[0]!r}, which is no module of {type(hf).__name__}.")
    given = {name: _device(device) for name, device in device_map.items()}

    def device_of(name: str) -> torch.device:
        above = name
        while above not in given:
            if not above:
                raise UserError(f"device_map has no device for {name}. Name it, or a module that it is in.")
            above = above.rpartition(".")[0]
        return given[above]

    devices = [device_of(names[layer.layer]) for layer in spec.layers]
    for module, name in names.items():
        if next(module.parameters(recurse=False), None) is None:
            continue
        layer = _layer_of(name, names, spec.layers)
        wanted = devices[0] if layer is None else devices[layer]
        if (found := device_of(name)) != wanted:
            why = "a layer is on one device" if layer is not None else "only layers can be on other devices"
            raise UserError(f"device_map puts {name} on {found}, and it belongs on {wanted}, since {why}.")
    _check(devices)
    return devices


def _layer_of(name: str, names: Mapping[nn.Module, str], layers: list[LayerSpec]) -> int | None:
    """Number of the layer that a module is in; None outside all layers."""
    for number, layer in enumerate(layers):
        if f"{name}.".startswith(f"{names[layer.layer]}."):
            return number
    return None


def _device(device: Device) -> torch.device:
    if device == "disk":
        raise UserError("device_map puts weights on the disk, which is not possible. Set offload in its place.")
    name = f"cuda:{device}" if isinstance(device, int) else str(device)
    return torch.empty(0, device=pick_device(name)).device  # with its number


def _check(devices: list[torch.device]) -> None:
    """Raise a `UserError` if the CPU is among several devices, or layers of one device are not consecutive."""
    kinds = {device.type for device in devices}
    if "cpu" in kinds and len({*devices}) > 1:
        raise UserError("device_map puts layers on the CPU beside a GPU. Set offload in its place, or name GPUs only.")
    runs = [device for device, _ in groupby(devices)]
    if len(runs) > len({*runs}):
        again = next(device for number, device in enumerate(runs) if device in runs[:number])
        raise UserError(f"device_map comes back to {again} after layers on another device. Give it consecutive layers.")


class SpreadBlocks(Sequence[LayerBlock]):
    """The blocks of a model whose layers are on several devices. They stay there when the model is moved."""

    def __init__(self, blocks: nn.ModuleList, devices: list[torch.device]) -> None:
        self._blocks, self.devices = [*blocks], devices

    @property
    def stages(self) -> list[tuple[torch.device, range]]:
        """The devices in the order of their layers, and which layers they compute."""
        numbered = groupby(range(len(self)), key=lambda layer: self.devices[layer])
        found = [(device, [*layers]) for device, layers in numbered]
        return [(device, range(layers[0], layers[-1] + 1)) for device, layers in found]

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[LayerBlock]:
        return iter(self._blocks)

    def __getitem__(self, layer: int) -> LayerBlock:
        return self._blocks[layer]

    def require(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raise a `UserError` if the rest of the model is on another device than the first layer, or has another type
        than the layers."""
        if device != self.devices[0] or dtype != self._blocks[0].w_o.dtype:
            raise UserError(
                "a model with device_map stays on the devices, and in the type, for which it was loaded. Load it again "
                "with another device_map or dtype."
            )


def placed(blocks: nn.ModuleList, devices: list[torch.device] | None) -> nn.ModuleList | SpreadBlocks:
    """The blocks of a model, which are on `devices` if that is given: as they are if that is one device."""
    return SpreadBlocks(blocks, devices) if devices and len({*devices}) > 1 else blocks
