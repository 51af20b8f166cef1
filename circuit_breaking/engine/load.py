"""Load an edge-masked transformer by name, folder, GGUF file or Hugging Face object."""

import copy
from pathlib import Path

import torch
from torch import nn

from circuit_breaking.engine.transformer import EdgeMaskedTransformer
from circuit_breaking.models.families import describe, require_plain
from circuit_breaking.models.load import load_hf_model
from circuit_breaking.runs.devices import pick_device, pick_dtype


def load_model(
    model: str | Path | nn.Module,
    split_qkv: bool = False,
    device: str = "auto",
    dtype: str | torch.dtype = "float32",
    gradient_checkpointing: bool = False,
    share_weights: bool = False,
) -> EdgeMaskedTransformer:
    """Load an edge-masked transformer, with weight 1 on every edge.

    Args:
        model: hub name, folder, folder that holds a `.gguf`, `"tiny"` (the shipped model), or a loaded Hugging Face
            model. A loaded model is copied: neither model sees later changes of the other. A copy takes as much memory
            as the model, so a large model is better loaded by its name or folder.
        split_qkv: let each head's query, key and value read separately.
        device: `"auto"`, or a device name of PyTorch.
        dtype: `"float32"`, `"bfloat16"` or `"float64"`. Weights of a less precise type are converted before anything is
            computed from them.
        gradient_checkpointing: save memory by computing parts of each layer again in the backward.
        share_weights: save the memory of the copy of a loaded model that already has this type and is on this device.
            Most weights are then the same memory and the rest are still copies, so the loaded model must not change as
            long as the edge-masked transformer is used.

    Raises:
        UserError: the model cannot be found or read, or its family is not supported (see `models.families`). The
            family is checked from the configuration, before weights are downloaded or read.
    """
    place, kind = pick_device(device), pick_dtype(dtype)
    if isinstance(model, nn.Module):
        require_plain(model)
        describe(model)  # refuses what is not supported before it is copied
        hf, name = model, getattr(model.config, "name_or_path", "") or type(model).__name__
        if not share_weights or any(parameter.dtype != kind for parameter in model.parameters()):
            hf = copy_of(model, kind)
    else:
        hf, name = load_hf_model(model, device, dtype, only_supported=True), str(model)
    engine = EdgeMaskedTransformer(hf, split_qkv, gradient_checkpointing).to(place)  # the graph's tensors too
    engine.to_dtype_(kind)
    engine.name = name
    return engine


def copy_of(hf: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a model with parameters of type `dtype`, or of their own type where that is more precise.

    Buffers, such as the frequencies of rotary positions, keep their type.
    """
    copied = copy.deepcopy(hf)
    for parameter in copied.parameters():  # tied parameters are one, and stay one
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, dtype))
    return copied
