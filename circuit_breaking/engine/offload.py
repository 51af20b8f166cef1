"""Layers whose weights stay in the CPU's memory and are copied to the device that computes, one layer at a time.

For models that one GPU cannot hold. The device holds the weights of the layer that computes and, on CUDA, of the next
one: these are copied on a stream of their own while the layer computes, from memory that cannot be paged out. A step
copies every layer twice, once in the forward and once in the backward pass, and the pass recomputes what a layer keeps
for its backward pass (gradient checkpointing), since autograd would otherwise keep the weights of all layers there.

    slot         memory on the device for the weights of one layer: one, or two on CUDA, where layers take turns
    packed       the weights of one layer on the CPU, in one piece of memory, so that one copy moves them
    blocks       each layer's `Block`, whose weights are views of its slot; only valid while that slot holds the layer
"""

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from circuit_breaking.engine.network import LayerBlock
from circuit_breaking.errors import UserError

ALIGNMENT = 256  # bytes; as PyTorch aligns the memory of tensors on CUDA


def copies_ahead(device: torch.device) -> bool:
    """Whether the next layer is copied while one computes."""
    return device.type == "cuda"


class _Slot:
    """Memory on the device for the weights of one layer.

    Attributes:
        memory: uint8 [bytes of the largest layer].
        layer: whose weights are there, or on their way; None at first.
        copied: on CUDA, the event after which they are there.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.layer: int | None = None
        self.copied = torch.cuda.Event() if copies_ahead(device) else None


class OffloadedBlocks(Sequence[LayerBlock]):
    """The blocks of a model, with weights in CPU memory. `blocks[i]` copies those of layer i to the device first.

    The block is valid until another layer is asked for.

    Args:
        blocks: the blocks, on the CPU. They are emptied, one after the other.
        device: where they compute.
    """

    def __init__(self, blocks: nn.ModuleList, device: torch.device) -> None:
        self.device = torch.empty(0, device=device).device  # with its number
        layouts = [_layout(block) for block in blocks]
        n_slots = min(len(blocks), 2 if copies_ahead(device) else 1)
        largest = max(size for size, _ in layouts)
        self.slots = [_Slot(largest, device) for _ in range(n_slots)]
        self.side = torch.cuda.Stream(device) if copies_ahead(device) else None
        self.current: int | None = None  # layer that was asked for last
        self.packed: list[Tensor] = []
        self._blocks: list[nn.Module] = []
        for number, (size, offsets) in enumerate(layouts):
            packed = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
            slot = self.slots[number % n_slots].memory
            in_slot: dict[int, Tensor] = {}
            for tensor, offset in zip(blocks[number].buffers(), offsets, strict=True):
                _view(packed, offset, tensor).copy_(tensor)
                in_slot[id(tensor)] = _view(slot, offset, tensor)
            self._blocks.append(copy.deepcopy(blocks[number], in_slot))  # the same modules over the memory of the slot
            self.packed.append(packed)
            blocks[number] = nn.Module()

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[LayerBlock]:
        return (self[layer] for layer in range(len(self)))

    def require(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raise a `UserError` if the rest of the model is on another device, or has another type, than the layers."""
        if device != self.device or dtype != self._blocks[0].w_o.dtype:
            raise UserError(
                "a model with offload=True stays on the device, and in the type, for which it was loaded. Load it "
                "again with another device or dtype."
            )

    def __getitem__(self, layer: int) -> LayerBlock:
        if layer != self.current:
            self._fetch(layer)
            if self.side is not None:
                torch.cuda.current_stream(self.device).wait_event(self._slot(layer).copied)
                forward = self.current is None or layer > self.current
                following = layer + 1 if forward else layer - 1
                if 0 <= following < len(self):
                    self._fetch(following)
            self.current = layer
        return self._blocks[layer]

    def _slot(self, layer: int) -> _Slot:
        return self.slots[layer % len(self.slots)]

    def _fetch(self, layer: int) -> None:
        """Have the weights of a layer copied to its slot, unless they are there or on their way."""
        slot, packed = self._slot(layer), self.packed[layer]
        if slot.layer == layer:
            return
        slot.layer = layer
        if self.side is None:
            slot.memory[: len(packed)].copy_(packed)
            return
        # the layer that was in the slot before may still be computing
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            slot.memory[: len(packed)].copy_(packed, non_blocking=True)
            slot.copied.record()


def _layout(block: nn.Module) -> tuple[int, list[int]]:
    """Bytes that the weights of a block take in one piece of memory, and where each of them starts."""
    size, offsets = 0, []
    for tensor in block.buffers():
        offsets.append(size)
        numbers = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        size += -(-numbers * tensor.element_size() // ALIGNMENT) * ALIGNMENT
    return size, offsets


def _view(memory: Tensor, offset: int, like: Tensor) -> Tensor:
    """A tensor of the type, shape and strides of `like` over memory that starts at a byte."""
    return memory[offset:].view(like.dtype).as_strided(like.shape, like.stride())
