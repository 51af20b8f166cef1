"""How the engine takes over the weights of a Hugging Face model: one tensor at a time, and without a second model.

A weight that the engine uses as it is shares the memory of the Hugging Face model where type and device are already
right. Queries, keys and values are computed from the model's weights (`blocks.project_qkv`), so these are new memory;
with `release`, the originals of a layer are freed as soon as its block is made.
"""

import ctypes
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class WeightSource:
    """Where the engine's weights go, and what happens to the Hugging Face model's.

    Attributes:
        dtype: type of the engine's weights.
        device: where they are kept.
        copy: share no memory with the Hugging Face model.
        release: free the weights of each layer of the Hugging Face model once the engine has its own. The Hugging Face
            model cannot be used afterwards.
    """

    dtype: torch.dtype
    device: torch.device
    copy: bool = False
    release: bool = False

    def on_cpu(self) -> Self:
        """The same with weights in CPU memory."""
        return replace(self, device=torch.device("cpu"))

    def take(self, tensor: Tensor) -> Tensor:
        """A weight as the engine keeps it: the same memory, or a copy if it has another type or is elsewhere, or with
        `copy`."""
        return tensor.detach().to(self.device, self.dtype, copy=self.copy)

    def precise(self, tensor: Tensor) -> Tensor:
        """A weight on the engine's device to compute others from: in float32, or in the most precise of its own type
        and the engine's where that is more."""
        kind = torch.promote_types(torch.promote_types(tensor.dtype, self.dtype), torch.float32)
        return tensor.detach().to(self.device, kind)

    def done_with(self, layer: nn.Module) -> None:
        """Free the weights of a layer of the Hugging Face model, with `release`; those that are shared stay in use."""
        if self.release:
            for parameter in layer.parameters():
                parameter.data = parameter.data.new_empty(0)
            give_back_memory()


def give_back_memory() -> None:
    """Return freed memory to the system. The GNU C library keeps it, between what is still in use: up to the size of
    the model, once tensors of every layer were made from larger ones. Other libraries have no such call."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return
    trim(0)
