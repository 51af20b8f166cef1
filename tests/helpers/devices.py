"""Several devices on a machine that has none: tensors that only claim to be on different devices.

Inside `pretended_devices`, `xpu:0`, `xpu:1` and so on are devices. Their tensors are in the CPU's memory and all
kernels are the CPU's, so that results have the same bits. Every operation, those of autograd included, raises a
`MixedDevicesError` if its tensors are on different devices, except copies, which are noted as moves.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

CPU = torch.device("cpu")
FACTORIES = ("arange", "empty", "empty_like", "full", "ones", "ones_like", "randn", "tensor", "zeros", "zeros_like")
TO, DEVICE = Tensor.to, Tensor.device
INDEXING = torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default


class MixedDevicesError(RuntimeError):
    """An operation got tensors of different devices."""


@dataclass
class Devices:
    """What happened so far.

    Attributes:
        moves: from where, to where, and how many bytes, for every copy between two devices.
    """

    moves: list[tuple[str, str, int]] = field(default_factory=list)
    _places: dict[int, tuple[StorageWeakRef, torch.device]] = field(default_factory=dict)

    def of(self, tensor: Tensor) -> torch.device:
        """Where a tensor is."""
        found = None if tensor.is_meta else self._places.get(tensor.untyped_storage()._cdata)
        return found[1] if found else DEVICE.__get__(tensor)

    def put(self, tensor: Tensor, device: torch.device) -> None:
        """Say where a tensor's memory is."""
        storage = tensor.untyped_storage()
        # the reference keeps the address from being used again
        self._places[storage._cdata] = StorageWeakRef(storage), device


class _Operations(TorchDispatchMode):
    """Checks every operation, and says where its results are."""

    def __init__(self, devices: Devices) -> None:
        super().__init__()
        self.devices = devices

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [one for one in tree_flatten((args, kwargs or {}))[0] if isinstance(one, Tensor)]
        checked = given[:1] if func in INDEXING else given  # indices of a tensor on a GPU may be on the CPU
        places = {self.devices.of(one) for one in checked if one.dim() or self.devices.of(one) != CPU}
        if func is torch.ops.aten.copy_.default:
            into, out_of = (self.devices.of(one) for one in args[:2])
            if into != out_of and args[1].dim():
                self.devices.moves.append((str(out_of), str(into), args[1].numel() * args[1].element_size()))
            places = {into}
        if len(places) > 1:
            raise MixedDevicesError(f"{func} of tensors on {', '.join(sorted(map(str, places)))}")
        out = func(*args, **(kwargs or {}))
        known = {one.untyped_storage()._cdata for one in given}
        for one in tree_flatten(out)[0]:
            if isinstance(one, Tensor) and one.untyped_storage()._cdata not in known:
                self.devices.put(one, *places or {CPU})
        return out


def _named(device) -> torch.device:
    """A device with its number."""
    device = torch.device(device)
    return torch.device(device.type, device.index or 0) if device.type == "xpu" else device


def _functions(devices: Devices) -> dict[tuple[object, str], object]:
    """What makes tensors on a device, moves them there, and gives their device, by where it stands in PyTorch."""

    def to(tensor: Tensor, *args, copy: bool = False, **kwargs) -> Tensor:
        values = (*args, *kwargs.values())
        like = [one for one in values if isinstance(one, Tensor)]
        kind = [one for one in values if isinstance(one, torch.dtype)] + [one.dtype for one in like] + [tensor.dtype]
        places = [_named(one) for one in values if isinstance(one, str | torch.device)]
        place = (places + [devices.of(one) for one in like] + [devices.of(tensor)])[0]
        here = devices.of(tensor)
        if "xpu" not in (place.type, here.type):
            return TO(tensor, *args, copy=copy, **kwargs)
        return TO(tensor, kind[0], copy=copy) if place == here else _Move.apply(TO(tensor, kind[0]), place, devices)

    def factory(function):
        def make(*args, device=None, **kwargs):
            if device is None or torch.device(device).type != "xpu":
                return function(*args, device=device, **kwargs)
            out = function(*args, **kwargs)
            devices.put(out, _named(device))
            return out

        return make

    patched = {(torch, name): factory(getattr(torch, name)) for name in FACTORIES}
    return patched | {
        (Tensor, "to"): to, (Tensor, "cpu"): lambda tensor: to(tensor, CPU), (Tensor, "device"): property(devices.of),
    }  # fmt: skip


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, device: torch.device, devices: Devices) -> Tensor:
        ctx.about = devices.of(tensor), devices
        moved = torch.empty_like(tensor)
        devices.put(moved, device)
        return moved.copy_(tensor)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _Move.apply(gradient, *ctx.about), None, None


@contextmanager
def pretended_devices() -> Iterator[Devices]:
    """Within the block, `xpu:0`, `xpu:1`, ... are devices."""
    devices = Devices()
    with pytest.MonkeyPatch.context() as patch, _Operations(devices):
        for (place, name), function in _functions(devices).items():
            patch.setattr(place, name, function)
        yield devices
