"""Load a model or a tokenizer by name, folder, GGUF file or Hugging Face object (layer 2)."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from circuit_breaking.cli import UserError, first_line
from circuit_breaking.devices import pick_device, pick_dtype
from circuit_breaking.files import DATA
from circuit_breaking.transformer import EdgeMaskedTransformer, select_positions

TINY = DATA / "tiny_gpt2"
END_OF_TEXT = "<|endoftext|>"


def _locate(name: str | Path) -> tuple[str, dict[str, Any]]:
    """What to hand to `from_pretrained` for a model's name, and with which keywords."""
    if str(name) == "tiny":
        if not (TINY / "config.json").is_file():
            raise UserError(f"the shipped model is not in {TINY}. Make it with data/make_tiny_gpt2.py.")
        return str(TINY), {}
    folder = Path(name).expanduser()
    if folder.suffix == ".gguf" and folder.is_file():
        return str(folder.parent), {"gguf_file": folder.name}
    if not folder.exists():
        return str(name), {}
    if (folder / "config.json").is_file() or (folder / "tokenizer_config.json").is_file():  # or a tokenizer alone
        return str(folder), {}
    found = sorted(folder.glob("*.gguf")) if folder.is_dir() else []
    if len(found) == 1:
        return str(folder), {"gguf_file": found[0].name}
    what = f"{len(found)} .gguf files, name one of them" if found else "neither a config.json nor a .gguf file"
    raise UserError(f"{folder} holds {what}: there is no model to load.")


def _from_pretrained(loader: Any, name: str | Path, what: str, **keywords: Any) -> Any:
    place, more = _locate(name)
    try:
        return loader.from_pretrained(place, **more, **keywords)
    except ImportError as error:
        raise UserError(f"{what} {name}: {first_line(error)} For GGUF: pip install '.[gguf]'.") from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if Path(place).exists():
            raise UserError(f"{what} in {place} cannot be read ({first_line(error)}).") from error
        raise UserError(
            f"{what} {place!r} is neither a folder here nor to be had from the Hugging Face hub "
            f"({first_line(error)}). Check the name and the network, or give a folder."
        ) from error


def load_hf_model(name: str | Path, device: str = "auto", dtype: str | torch.dtype = "float32") -> nn.Module:
    """The stock Hugging Face causal language model of a name, folder, `.gguf` file or `"tiny"`, in eval mode."""
    model = _from_pretrained(AutoModelForCausalLM, name, "the model", dtype=pick_dtype(dtype))
    return model.to(pick_device(device)).eval()


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub name, folder, folder holding a `.gguf`, or `"tiny"`."""
    tokenizer = _from_pretrained(AutoTokenizer, name, "the tokenizer of")
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of a folder without a tokenizer
        raise UserError(f"the model {name} comes without its tokenizer. Save that in its folder too.")
    return tokenizer


def load_config(name: str | Path) -> Any:
    """The Hugging Face configuration alone, without the weights."""
    return _from_pretrained(AutoConfig, name, "the configuration of")


def load_model(
    model: str | Path | nn.Module,
    split_qkv: bool = False,
    device: str = "auto",
    dtype: str | torch.dtype = "float32",
    recompute: bool = False,
) -> EdgeMaskedTransformer:
    """An edge-masked transformer with all edges whole.

    Args:
        model: hub name, folder, folder holding a `.gguf`, `"tiny"` (the shipped model), or a loaded Hugging Face
            model, whose weights are then shared where their layout allows it and which is left as it is.
        split_qkv: let each head's query, key and value read for themselves.
        device: `"auto"`, or a name that torch knows.
        dtype: `"float32"`, `"bfloat16"` or `"float64"`.
        recompute: save memory by computing parts of each layer again in the backward.

    Raises:
        UserError: the model cannot be found, read, or is of a family that is not supported.
    """
    if isinstance(model, nn.Module):
        hf, name = model, getattr(model.config, "name_or_path", "") or type(model).__name__
        engine = EdgeMaskedTransformer(hf, split_qkv, recompute).to(pick_device(device))
        engine.to_dtype_(pick_dtype(dtype))
    else:
        name = str(model)
        hf = load_hf_model(model, device, dtype)
        engine = EdgeMaskedTransformer(hf, split_qkv, recompute)
    engine.name = name
    return engine


class StockModel:
    """A stock Hugging Face model behind the part of `EdgeMaskedTransformer` that tasks use. Differentiable in the
    weights that require it, all but those of the output embedding."""

    def __init__(self, hf: nn.Module) -> None:
        self.hf = hf
        self.unembedding = hf.get_output_embeddings().weight
        self.unembedding_bias = getattr(hf.get_output_embeddings(), "bias", None)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.hf.device

    def hidden(self, tokens: Tensor, at: Tensor | None = None, mask: None = None) -> Tensor:
        """Final hidden state, as `EdgeMaskedTransformer.hidden`; there are no edges to mask."""
        hidden = self.hf.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        return hidden if at is None else select_positions(hidden, at)

    def __call__(self, tokens: Tensor, at: Tensor | None = None, mask: None = None) -> Tensor:
        """Next-token logits, as `EdgeMaskedTransformer.forward`."""
        return F.linear(self.hidden(tokens, at), self.unembedding, self.unembedding_bias)


def prefix_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that starts every text: `<|endoftext|>`, with which GPT-2, Pythia and SmolLM were trained.

    It is looked up by name, since chat models move `bos_token` to one that opens a turn; families without it start
    with their `bos_token`.
    """
    token = tokenizer.get_vocab().get(END_OF_TEXT, tokenizer.bos_token_id)
    if token is None:
        raise UserError(f"the tokenizer has neither {END_OF_TEXT} nor a bos_token to start a text with.")
    return token
