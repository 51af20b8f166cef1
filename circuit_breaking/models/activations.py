"""Activation functions, each as one fused kernel where PyTorch has one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN, NewGELUActivation

from circuit_breaking.errors import UserError

# Hugging Face writes some of these out as a chain of elementwise products
FUSED_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation function that a Hugging Face configuration names. Raises `UserError` for an unknown name."""
    if name in FUSED_ACTIVATIONS:
        return FUSED_ACTIVATIONS[name]
    if name not in ACT2FN:
        raise UserError(f"the activation function {name!r} is unknown. Choose one of {', '.join(sorted(ACT2FN))}.")
    return ACT2FN[name]


@contextmanager
def fused_activations(hf: nn.Module) -> Iterator[nn.Module]:
    """Inside the block, a Hugging Face model of any family computes GPT-2's activation function with one kernel.

    Hugging Face writes that function out as eight operations. The result is the same up to rounding, in a tenth of the
    time. After the block the model has its own modules again.
    """
    replaced = [
        (parent, name, child)
        for parent in hf.modules()
        for name, child in parent.named_children()
        if isinstance(child, NewGELUActivation)
    ]
    for parent, name, _ in replaced:
        setattr(parent, name, nn.GELU(approximate="tanh"))
    try:
        yield hf
    finally:
        for parent, name, child in replaced:
            setattr(parent, name, child)
