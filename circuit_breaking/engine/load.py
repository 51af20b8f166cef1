"""Load an edge-masked transformer by name, folder, GGUF file or Hugging Face object."""

from pathlib import Path

import torch
from torch import nn

from circuit_breaking.engine.device_map import DeviceMap, devices_of
from circuit_breaking.engine.transformer import EdgeMaskedTransformer
from circuit_breaking.engine.weights import WeightSource
from circuit_breaking.errors import UserError
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
    device_map: DeviceMap | None = None,
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
        device_map: spread the layers over several GPUs, in place of `device`: `"auto"` for all GPUs, a list of devices,
            or a dictionary of devices by names of modules, as Hugging Face has it. Each GPU computes consecutive
            layers; embeddings and unembedding are on that of the first layer, which is the model's `device`. `"auto"`
            with fewer than two GPUs is the same as `device="auto"`. The model cannot be moved afterwards.

    Raises:
        UserError: the model cannot be found or read, or its family is not supported (see `models.families`). The
            family is checked from the configuration, before weights are downloaded or read. Or weights of a loaded
            model are offloaded, or `device_map` is not possible.
    """
    if device_map is not None and (offload or device != "auto"):
        other = "offload" if offload else f"device={device!r}"
        raise UserError(f"device_map says where layers are kept, and so does {other}. Give one of them.")
    place, kind = None if device_map is not None else pick_device(device), pick_dtype(dtype)
    given = isinstance(model, nn.Module)
    if given:
        if place is None or place.type != "meta":
            require_loaded(model)
        hf, name = model, getattr(model.config, "name_or_path", "") or type(model).__name__
    else:  # read on the CPU, whatever the device: each weight then goes from the file to the device by itself
        hf, name = load_hf_model(model, "cpu", dtype, only_supported=True), str(model)
    devices = None if device_map is None else devices_of(device_map, hf)
    place = place or devices[0]
    source = WeightSource(kind, place, copy=given and not share_weights, release=not given)
    engine = EdgeMaskedTransformer(hf, split_qkv, gradient_checkpointing, source, offload, devices).to(place)
    engine.name = name
    return engine
