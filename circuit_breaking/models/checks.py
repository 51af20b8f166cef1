"""Checks on the files of a model before transformers reads them.

A configuration can claim any size, so it is compared with the size of the weight files before memory is allocated.
Weights are read from safetensors or GGUF; a model with only pickled weights is refused.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig

from circuit_breaking.errors import UserError, one_line
from circuit_breaking.models.gguf import check_gguf
from circuit_breaking.runs.files import parse_json, read_json, require_file
from circuit_breaking.runs.tensors import check_header

HINT = "Save the model again with save_pretrained, or get it again."
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5", ".msgpack")
ADAPTER = "adapter_config.json"  # of PEFT
MOST_LAYERS = 1000  # building a layer takes memory even before it has weights
MAX_JSON = 2**26  # bytes; tokenizer.json of a vocabulary of 250,000 has 17 MB
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def check_files(folder: Path, gguf: str | None = None) -> None:
    """Raise a `UserError` unless all JSON files of a folder are regular files of a sane size that hold an object."""
    if gguf is not None:
        check_gguf(require_file(folder / gguf, HINT))
        return
    for path in sorted(folder.glob("*.json")):
        # a tokenizer's files may hold a huge number, such as 1e30, for "no limit"; a configuration's are sizes
        parse = parse_json if path.name == "config.json" else json.loads
        if not isinstance(read_json(path, HINT, parse, MAX_JSON), dict):
            raise UserError(f"{path} holds no JSON object. {HINT}")


def check_kind(name: str | Path, config: PreTrainedConfig, folder: Path) -> None:
    """Raise a `UserError` for a model whose weights alone do not say what it computes: one that is quantised, that has
    adapters beside it, or whose configuration says that edges are cut."""
    if config.model_type == "edge_ablated":
        raise UserError(f"{name} is a saved ablated model, and a whole one is needed. Load it with load_ablated.")
    if quantised := getattr(config, "quantization_config", None):
        how = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
        how = getattr(how, "value", how) or "an unknown method"
        raise UserError(f"the model {name} is quantised ({how}). Load the model that it was made from.")
    if (folder / ADAPTER).is_file():
        raise UserError(f"{folder} holds an adapter ({ADAPTER}). Merge it into its base model first.")


def check_sizes(config: PreTrainedConfig, folder: Path, gguf: str | None = None) -> None:
    """Raise a `UserError` if a configuration describes more weights than the files of its folder can hold.

    For a name on the hub, which is no local folder, only the number of layers is checked.
    """
    layers = getattr(config, "num_hidden_layers", None)
    if type(layers) is not int or not 0 < layers <= MOST_LAYERS:
        raise UserError(f"the configuration in {folder} says {layers} layers; 1 to {MOST_LAYERS:,} are possible.")
    if not folder.exists():
        return
    files = [folder / gguf] if gguf is not None else list(weight_files(folder))
    if gguf is None:
        for path in files:
            check_weight_file(path)
    room = sum(path.stat().st_size for path in files)
    try:
        with torch.device("meta"):  # no memory for weights
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ImportError as error:
        raise UserError(f"the model in {folder}: {one_line(error)}") from error
    except Exception as error:  # the library raises many kinds for settings that make no model
        raise UserError(f"the configuration in {folder} makes no model ({one_line(error)}). {HINT}") from error
    weights = sum(parameter.numel() for parameter in model.parameters())
    # a weight takes at least a byte; in GGUF's smallest types, at least a bit
    if weights > room * (8 if gguf is not None else 1):
        raise UserError(
            f"the configuration in {folder} asks for {weights:,} weights, and the files hold {room:,} bytes. {HINT}"
        )


def weight_files(folder: Path) -> Iterator[Path]:
    """The safetensors files of a model: those that its index names, or the single file without an index.

    Raises:
        UserError: there are none, or the index names something other than a safetensors file in this folder.
    """
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).exists():
        if not (folder / WEIGHTS).exists():
            other = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
            if other:
                raise UserError(
                    f"{folder} has its weights in {other[0]}, a pickle, which can run code when it is read. "
                    "Save the model as safetensors (save_pretrained of transformers does) and give that folder."
                )
            raise UserError(f"{folder} has no weights: there is no {WEIGHTS}. {HINT}")
        yield require_file(folder / WEIGHTS, HINT)
        return
    index = read_json(folder / INDEX, HINT)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names:
        raise UserError(f"{folder / INDEX} names no weights. {HINT}")
    for name in sorted({str(name) for name in names.values()}):
        if Path(name).suffix != ".safetensors" or Path(name).name != name:
            raise UserError(f"{folder / INDEX} names {name!r}, which is no safetensors file of its folder. {HINT}")
        yield require_file(folder / name, HINT)


def check_weight_file(path: Path) -> None:
    """Raise a `UserError` for a safetensors file that is damaged, or whose weights are integers."""
    try:
        check_header(path)
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                kind = file.get_slice(name).get_dtype()
                if name.endswith(".weight") and kind not in FLOATS:
                    raise UserError(f"{path} holds {name} as {kind}: quantised weights are not read here.")
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({one_line(error)}). {HINT}") from error
