"""`from_pretrained` of the model type `edge_ablated`: a model of the base model's class, with its edges cut."""

from os import PathLike
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from circuit_breaking.ablation.ablate import ablate
from circuit_breaking.ablation.config import AblatedConfig, EdgeAblation
from circuit_breaking.engine.ablation_values import read_means
from circuit_breaking.errors import UserError
from circuit_breaking.models.families import family_of
from circuit_breaking.models.load import load_config, locate
from circuit_breaking.runs.mask_record import MEANS

# keyword arguments that say where a file of a model is, on the hub or in a folder
WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
AGAIN = "Save the ablated model again."


def from_pretrained(
    name: str | PathLike, *args: Any, config: AblatedConfig | None = None, **keywords: Any
) -> PreTrainedModel | tuple[PreTrainedModel, dict[str, Any]]:
    """Load an ablated model as `AutoModelForCausalLM.from_pretrained` loads other models.

    Keyword arguments such as `dtype`, `device_map`, `attn_implementation` and `output_loading_info` are those of the
    base model's class. `subfolder` and `revision` are of the ablated model, not of a base model that it names.

    Raises:
        UserError: the ablated model is damaged, does not fit the base model that it names, or is loaded in a way that
            cutting edges does not support, such as quantised or with offloaded weights.
    """
    where = {key: value for key, value in keywords.items() if key in WHERE}
    if config is None:
        config = AblatedConfig.from_pretrained(name, **where)
    record, base = config.record, config.base_config
    if keywords.get("quantization_config") is not None or getattr(base, "quantization_config", None) is not None:
        raise UserError(f"{name} would be quantised, and cutting edges needs plain weights. Load it without.")
    means = _read_means(name, where) if record.ablation == "mean" else None
    loader = model_class(base)
    weights = name
    if record.weights is not None:
        weights, _ = locate(record.weights)
        check_fits(load_config(record.weights), config, name)
        keywords = {key: value for key, value in keywords.items() if key not in ("subfolder", "revision")}
    if not keywords.setdefault("use_safetensors", True):
        raise UserError(
            "use_safetensors=False would read weights from files that may run code. Ablated models are read from "
            "safetensors alone: leave it out."
        )
    keywords["trust_remote_code"] = False
    loaded = loader.from_pretrained(weights, *args, config=base, **keywords)
    hf, *info = loaded if isinstance(loaded, tuple) else (loaded,)
    cut(hf, record, means, name)
    return (hf, *info) if info else hf


def from_config(config: AblatedConfig, **keywords: Any) -> PreTrainedModel:
    """An ablated model with random weights. Ablation values are not in a configuration, so they must be zero."""
    if config.record.ablation != "zero":
        raise UserError("a configuration alone does not hold ablation values. Use from_pretrained.")
    base = config.base_config
    hf = model_class(base)._from_config(base, **keywords)
    cut(hf, config.record, None, "")
    return hf


def cut(hf: PreTrainedModel, record: EdgeAblation, means: Tensor | None, saved_as: str | PathLike) -> None:
    """Cut the edges of a record in its base model, which remembers how they were found and where it was loaded from."""
    hf.name_or_path = record.base_model
    handle = ablate(hf, record.edges, means, record.ablate_from)
    handle.base_model, handle.about, handle.saved_as = record.base_model, record.about, str(saved_as)
    hf.name_or_path = hf.config.name_or_path = str(saved_as)


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of a base model. Raises a `UserError` if its family is not supported."""
    return getattr(transformers, family_of(config, f"a model of type {config.model_type!r}").model_class)


def check_fits(found: PreTrainedConfig, config: AblatedConfig, name: str | PathLike) -> None:
    """Raise a `UserError` if the weights that an ablated model names are a model of another shape."""
    base = config.base_config
    for key in ("model_type", "num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size"):
        here, there = getattr(found, key, None), getattr(base, key, None)
        if here != there:
            raise UserError(
                f"{name} was made for a model with {key} {there}, and {config.record.weights} has {here}. Save the "
                "ablated model again with its base model's weights."
            )


def _read_means(name: str | PathLike, where: dict[str, Any]) -> Tensor:
    try:
        path = cached_file(name, MEANS, **where)
    except OSError as error:
        raise UserError(f"{name} lacks its ablation values, {MEANS}. {AGAIN}") from error
    return read_means(Path(path), AGAIN)[0]
