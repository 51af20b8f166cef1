"""Load an edge-masked transformer by name, folder, GGUF file or Hugging Face object."""

from pathlib import Path

import torch
from torch import nn

from circuit_breaking.engine.transformer import EdgeMaskedTransformer
from circuit_breaking.engine.weights import WeightSource
from circuit_breaking.models.families import require_loaded
from circuit_breaking.models.load import load_hf_model
from circuit_breaking.runs.devices import pick_device, pick_dtype


def load_model(
    model: str | Path | nn.Module,
    split_qkv: bool = False,
    device: str = "auto",
    dtype: str | torch.dtype = "float32",
    gradient_checkpointing: bool = False,
    share_weights: bool = False,
    offload: bool = False,
) -> EdgeMaskedTransformer:
    """Load an edge-masked transformer, with weight 1 on every edge.

    Args:
        model: hub name, folder, folder that holds a `.gguf`, `"tiny"` (the shipped model), or a loaded Hugging Face
            model. From files, weights are read one tensor at a time, and there is never a second copy of more than one
            layer. A loaded model is copied: neither model sees later changes of the other. The copy takes as much
            memory as the model, so a large model is better loaded by its name or folder.
        split_qkv: let each head's query, key and value read separately.
        device: `"auto"`, or a device name of PyTorch.
        dtype: `"float32"`, `"bfloat16"` or `"float64"`. Weights of a less precise type are converted before anything is
            computed from them.
        gradient_checkpointing: save memory by computing parts of each layer again in the backward.
        share_weights: save the memory of the copy of a loaded model that already has this type and is on this device.
            The weights are then the same memory, except for queries, keys, values and norms, so the loaded model must
            not change as long as the edge-masked transformer is used.

        offload: keep the weights of the layers in CPU memory and copy them to the device one layer at a time, for
            models that the device cannot hold. On CUDA, one layer is copied while the one before it computes.
            Gradient checkpointing is then always on, and the model cannot be moved to another device.

    Raises:
        UserError: the model cannot be found or read, or its family is not supported (see `models.families`). The
            family is checked from the configuration, before weights are downloaded or read. Or weights of a loaded
            model are offloaded.
    """
    place, kind = pick_device(device), pick_dtype(dtype)
    if isinstance(model, nn.Module):
        if place.type != "meta":
            require_loaded(model)
        hf, name = model, getattr(model.config, "name_or_path", "") or type(model).__name__
        source = WeightSource(kind, place, copy=not share_weights)
    else:  # read on the CPU, whatever the device: each weight then goes from the file to the device by itself
        hf, name = load_hf_model(model, "cpu", dtype, only_supported=True), str(model)
        source = WeightSource(kind, place, release=True)
    engine = EdgeMaskedTransformer(hf, split_qkv, gradient_checkpointing, source, offload).to(place)
    engine.name = name
    return engine
