"""Load a stock Hugging Face model, its tokenizer or its configuration by name, folder or GGUF file."""

import re
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from circuit_breaking.errors import UserError, one_line
from circuit_breaking.models.checks import ADAPTER, check_files, check_kind, check_sizes
from circuit_breaking.models.families import FAMILIES, family_of
from circuit_breaking.models.shipped import SHIPPED, TINY
from circuit_breaking.runs.devices import pick_device, pick_dtype

# files of which a folder with a tokenizer has one at least
TOKENIZERS = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
# finds the number of a layer in the name of a weight, for a model of any registered family
LAYER_NUMBER = rf"\b(?:{'|'.join(sorted({family.layer_list for family in FAMILIES.values()}))})\.(\d+)\."


def locate(name: str | Path) -> tuple[str, dict[str, Any]]:
    """The name or folder to give to `from_pretrained`, and its keyword arguments."""
    if str(name) == SHIPPED:
        if not (TINY / "config.json").is_file():
            raise UserError(f"the shipped model is not in {TINY}. Make it with data/make_tiny_gpt2.py.")
        return str(TINY), {}
    try:
        folder = Path(name).expanduser()
        if folder.suffix == ".gguf" and folder.is_file():
            return str(folder.parent), {"gguf_file": folder.name}
        if not folder.exists():
            return str(name), {}
    except (OSError, RuntimeError) as error:  # the name is too long, or its ~user does not exist
        raise UserError(f"there is no model {str(name)[:200]!r} ({one_line(error, 100)}). Check the name.") from error
    if (folder / "config.json").is_file() or (folder / "tokenizer_config.json").is_file():  # or a tokenizer alone
        return str(folder), {}
    if (folder / ADAPTER).is_file():
        raise UserError(f"{folder} holds an adapter ({ADAPTER}). Merge it into its base model first.")
    found = sorted(folder.glob("*.gguf")) if folder.is_dir() else []
    if len(found) == 1:
        return str(folder), {"gguf_file": found[0].name}
    what = f"{len(found)} .gguf files, name one of them" if found else "neither a config.json nor a .gguf file"
    raise UserError(f"{folder} holds {what}: there is no model to load.")


def _from_pretrained(loader: Any, name: str | Path, what: str, look: bool = True, **keywords: Any) -> Any:
    """Call `loader.from_pretrained`. With `look`, check the files of a local folder first."""
    location, extra = locate(name)
    local = Path(location).exists()
    try:
        if local and look:
            check_files(Path(location), extra.get("gguf_file"))
        # code that comes with a model is never run, and the user is never asked about it
        return loader.from_pretrained(location, **extra, **keywords, trust_remote_code=False)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{what} {name}: {one_line(error)} For GGUF: pip install '.[gguf]'.") from error
    except BaseException as error:  # libraries raise many kinds for a damaged file; Rust's is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if local:
            raise UserError(f"{what} {location} cannot be read ({one_line(error)}).") from error
        raise UserError(
            f"{what} {location!r} is neither a local folder nor available from the Hugging Face hub "
            f"({one_line(error)}). Check the name and the network, or give a folder."
        ) from error


def load_hf_model(
    name: str | Path,
    device: str = "auto",
    dtype: str | torch.dtype = "float32",
    only_supported: bool = False,
    config: PreTrainedConfig | None = None,
) -> PreTrainedModel:
    """The stock Hugging Face causal language model of a name, folder, `.gguf` file or `"tiny"`, in eval mode.

    Weights are read from safetensors or GGUF, never from pickle. With `only_supported`, a model of a family without a
    description in `models.families` is refused from its configuration, before its weights are downloaded or read.
    `config` takes the place of the configuration that is stored with the weights.

    Raises:
        UserError: the model cannot be found or read, weights are missing, their shapes differ from the configuration,
            or the model is not supported, quantised, or has adapters.
    """
    device, dtype = pick_device(device), pick_dtype(dtype)
    location, extra = locate(name)
    keywords = {} if config is None else {"config": config}
    config = load_config(name) if config is None else config
    check_kind(name, config, Path(location))
    if only_supported:
        family_of(config, f"the model {name}, of type {config.model_type!r},")
    check_sizes(config, Path(location), extra.get("gguf_file"))
    if not extra:
        keywords["use_safetensors"] = True
    elif hasattr(transformers, "GgufConfig"):  # before it came, all weights were unpacked to floats, as they are here
        keywords["quantization_config"] = transformers.GgufConfig(dequantize=True)
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # its warnings become errors in `check_weights`
    if not sys.stderr.isatty():  # its bar would leave control characters in a log file
        logging.disable_progress_bar()
    try:
        model, info = _from_pretrained(
            AutoModelForCausalLM, name, "the model", look=False, dtype=dtype, output_loading_info=True,
            ignore_mismatched_sizes=True, **keywords,
        )  # fmt: skip
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
    check_weights(name, info, model.config.num_hidden_layers)
    return model.to(device).eval()


def check_weights(name: str | Path, info: dict[str, Any], layers: int) -> None:
    """Raise a `UserError` if weights were missing or had another shape, because transformers fills those in at random,
    or if there were weights of more than `layers` layers.

    `info` is what `from_pretrained` returns with `output_loading_info=True`.
    """
    if wrong := sorted(info["mismatched_keys"]):
        key, there, here = wrong[0]
        raise UserError(
            f"the model {name} has {key} of shape {list(there)}, and its configuration says {list(here)}. Get it again."
        )
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"the model {name} lacks weights ({missing[0]} and {len(missing) - 1} more). Get it again.")
    found = [re.search(LAYER_NUMBER, key) for key in info["unexpected_keys"]]
    most = max((int(one[1]) for one in found if one), default=-1)
    if most >= layers:
        raise UserError(f"the model {name} has weights of {most + 1} layers, and its configuration says {layers}.")


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub name, folder, folder holding a `.gguf`, or `"tiny"`."""
    location, extra = locate(name)
    missing = UserError(f"the model {name} comes without its tokenizer. Save that in its folder too.")
    folder = Path(location)
    if folder.is_dir() and not extra and not any((folder / file).is_file() for file in TOKENIZERS):
        raise missing
    tokenizer = _from_pretrained(AutoTokenizer, name, "the tokenizer of")
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # made of a damaged folder
        raise missing
    if not extra and (Path(location) / "config.json").is_file():
        size = getattr(load_config(name, look=False), "vocab_size", None)
        most = max(tokenizer.get_vocab().values())
        if type(size) is int and most >= size:
            raise UserError(
                f"the tokenizer of {name} has a token {most:,}, and the model knows {size:,} tokens. Get both again."
            )
    return tokenizer


def load_config(name: str | Path, look: bool = True) -> PreTrainedConfig:
    """The Hugging Face configuration alone, without the weights; `look` as for `_from_pretrained`."""
    return _from_pretrained(AutoConfig, name, "the configuration of", look)


def files_of(model: str) -> list[Path]:
    """Local files that hold the weights of a model; none for a name on the hub."""
    path = TINY if model == SHIPPED else Path(model).expanduser()
    return [path] if path.is_file() else sorted([*path.glob("*.safetensors"), *path.glob("*.gguf")])
