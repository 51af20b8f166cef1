"""Load an edge-masked transformer by name, folder, GGUF file or Hugging Face object."""

from pathlib import Path

import torch
from torch import nn

from circuit_breaking.engine.transformer import EdgeMaskedTransformer
from circuit_breaking.models.load import load_hf_model
from circuit_breaking.runs.devices import pick_device, pick_dtype


def load_model(
    model: str | Path | nn.Module,
    split_qkv: bool = False,
    device: str = "auto",
    dtype: str | torch.dtype = "float32",
    gradient_checkpointing: bool = False,
) -> EdgeMaskedTransformer:
    """Load an edge-masked transformer, with weight 1 on every edge.

    Args:
        model: hub name, folder, folder that holds a `.gguf`, `"tiny"` (the shipped model), or a loaded Hugging Face
            model. A loaded model is not changed; its weights are shared where their layout allows it.
        split_qkv: let each head's query, key and value read separately.
        device: `"auto"`, or a device name of PyTorch.
        dtype: `"float32"`, `"bfloat16"` or `"float64"`.
        gradient_checkpointing: save memory by computing parts of each layer again in the backward.

    Raises:
        UserError: the model cannot be found or read, or its family is not supported (see `models.families`).
    """
    if isinstance(model, nn.Module):
        hf, name = model, getattr(model.config, "name_or_path", "") or type(model).__name__
    else:
        hf, name = load_hf_model(model, device, dtype), str(model)
    engine = EdgeMaskedTransformer(hf, split_qkv, gradient_checkpointing).to(
        pick_device(device)
    )  # the graph's tensors too
    engine.to_dtype_(pick_dtype(dtype))
    engine.name = name
    return engine
