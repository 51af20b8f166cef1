"""The MLP of the MNIST setting, and what cutting one of its edges means.

Shapes: B batch, D inputs (pixels), H hidden units, C outputs (groups). An edge is the connection of one weight: edge
(j, i) of a layer carries input i to unit j, so the default network 784 x 50 x 5 has 39,200 + 250 edges. Biases belong
to units and are never cut. A cut edge carries the mean of its input over the training images instead of the input:

    y_j = b_j + sum_i W_ji [ M_ji x_i + (1 - M_ji) mean_i ]

All mask weights lie in one flat vector: the first layer's rows, then the last layer's.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from circuit_breaking.errors import UserError
from circuit_breaking.runs.mnist_results import NetworkRecord
from circuit_breaking.runs.tensors import is_real, read_tensors


def masked_linear(x: Tensor, layer: nn.Linear, mask: Tensor, mean: Tensor) -> Tensor:
    """`layer` on x [B, in] with edges scaled by `mask` [out, in]; what is cut carries `mean` [in]. Returns [B, out].

    The means' part is the same for every example, so it is one matrix-vector product that joins the bias, and the
    whole costs what the plain layer costs: nothing of size [B, out, in] is ever made.
    """
    kept = layer.weight * mask
    return F.linear(x, kept, layer.bias + (layer.weight - kept) @ mean)


class MaskedMLP(nn.Module):
    """One hidden layer of ReLUs whose edges can be cut: `model(x)` is the plain network, `model(x, mask)` the cut one.

    `means` are what cut edges carry; they are zeros until `set_means` is called with the training images.
    """

    def __init__(self, n_inputs: int = 784, width: int = 50, n_groups: int = 5):
        super().__init__()
        self.first = nn.Linear(n_inputs, width)
        self.last = nn.Linear(width, n_groups)
        self.register_buffer("input_mean", torch.zeros(n_inputs))
        self.register_buffer("hidden_mean", torch.zeros(width))

    @property
    def n_first(self) -> int:
        """Edges from pixels to hidden units."""
        return self.first.weight.numel()

    @property
    def n_edges(self) -> int:
        """All edges: pixels to hidden units, then hidden units to outputs."""
        return self.n_first + self.last.weight.numel()

    def full_mask(self) -> Tensor:
        """A new mask [n_edges] that cuts nothing, on the network's device."""
        return torch.ones(self.n_edges, device=self.first.weight.device, dtype=self.first.weight.dtype)

    def split(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Views of a flat mask [n_edges] as the two layers' matrices, [H, D] and [C, H]."""
        return mask[: self.n_first].view_as(self.first.weight), mask[self.n_first :].view_as(self.last.weight)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits [B, C] for images x [B, D] under a flat mask [n_edges], or of the uncut network."""
        if mask is None:
            return self.last(F.relu(self.first(x)))
        return self.activations(x, mask)[1]

    def activations(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs [B, H] of the hidden units before the ReLU, and logits [B, C], under a flat mask [n_edges]."""
        first, last = self.split(mask)
        before = masked_linear(x, self.first, first, self.input_mean)
        return before, masked_linear(F.relu(before), self.last, last, self.hidden_mean)

    @torch.no_grad()
    def set_means(self, images: Tensor) -> None:
        """Take the means that cut edges carry from `images` [N, D]; call it again after changing the weights."""
        away, hidden = torch.zeros_like(self.input_mean), torch.zeros_like(self.hidden_mean)
        for part in images.split(8192):  # hidden activations of the whole set need not exist at once
            away += (part - images[0]).sum(0)
            hidden += F.relu(self.first(part)).sum(0)
        # taken from the first image on, the mean of a pixel that never changes is that pixel exactly
        self.input_mean.copy_(images[0] + away / len(images))
        self.hidden_mean.copy_(hidden / len(images))

    def edge_name(self, index: int, side: int) -> str:
        """Name of an edge, `x{row}.{column}->h{unit}` or `h{unit}->y{group}`; images are `side` pixels wide."""
        if index < self.n_first:
            unit, pixel = divmod(index, self.first.in_features)
            return f"x{pixel // side}.{pixel % side}->h{unit}"
        group, unit = divmod(index - self.n_first, self.last.in_features)
        return f"h{unit}->y{group}"

    def cut_edges(self, mask: Tensor, side: int) -> Iterator[str]:
        """Names of the edges that a binary mask cuts, in the mask's order."""
        return (self.edge_name(index, side) for index in (mask < 0.5).nonzero().flatten().tolist())


def load_network(path: Path) -> tuple[MaskedMLP, NetworkRecord]:
    """The network of `save_network`, on the CPU, and its record. Any other file is a `UserError`."""
    hint = "Give a network.safetensors that mnist/main.py wrote."
    tensors, header = read_tensors(path, hint)
    try:
        width, n_inputs = tensors["first.weight"].shape
        groups = len(tensors["last.bias"])
        if tensors["last.weight"].shape != (groups, width) or not min(width, n_inputs, groups):
            raise ValueError("its layers do not fit each other")
        if not all(map(is_real, tensors.values())):
            raise ValueError("it holds values that are no finite numbers")
        model = MaskedMLP(n_inputs, width, groups)
        model.load_state_dict(tensors)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} does not hold a network of this setting. {hint}") from error
    return model, NetworkRecord.from_json(header, path, hint)
