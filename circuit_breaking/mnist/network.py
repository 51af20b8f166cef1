"""The interface of a network whose edges can be cut, and its file. The network itself is in mnist/mlp_model.py."""

from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from circuit_breaking.runs.mnist_results import NetworkRecord
from circuit_breaking.runs.tensors import write_tensors


class MaskableNetwork(Protocol):
    """A network with one hidden layer, and a flat mask over its edges: the first layer's, then the last layer's.

    Shapes: B batch, D inputs, H hidden units, C outputs.
    """

    first: nn.Linear  # D -> H
    last: nn.Linear  # H -> C
    input_mean: Tensor  # [D], the ablation values of the first layer's edges
    hidden_mean: Tensor  # [H], those of the last layer's edges

    @property
    def n_first(self) -> int:
        """Number of the first layer's edges."""

    @property
    def n_edges(self) -> int:
        """Number of all edges."""

    def full_mask(self) -> Tensor:
        """A new mask [n_edges] that cuts nothing."""

    def split(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Views of a mask as the matrices of both layers, [H, D] and [C, H]."""

    def activations(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs [B, H] of the hidden units before the ReLU, and logits [B, C], under a mask."""

    def __call__(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits [B, C] under a mask, or of the uncut network."""


def save_network(path: Path, network: nn.Module, record: NetworkRecord) -> None:
    """Write the weights of a network and the means of its inputs to a safetensors file."""
    write_tensors(path, network.state_dict(), record.to_json())
