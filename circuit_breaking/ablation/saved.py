"""Save an ablated model as a folder of data, and load it from a folder or the Hugging Face hub.

`config` says what is in the folder, `pretrained` is how transformers' own `from_pretrained` loads it.
"""

import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from circuit_breaking.ablation import old_format
from circuit_breaking.ablation.ablate import _check_means, _ends
from circuit_breaking.ablation.ablated_model import CARD, hub_name, save_with_cuts
from circuit_breaking.ablation.card import model_card
from circuit_breaking.ablation.config import FIELD, HINT, MODEL_TYPE, AblatedConfig, EdgeAblation
from circuit_breaking.ablation.pretrained import AGAIN, check_fits, cut
from circuit_breaking.engine.ablation_values import read_means
from circuit_breaking.engine.arguments import check_ablate_from
from circuit_breaking.errors import UserError, one_line
from circuit_breaking.graph import Edge
from circuit_breaking.models.families import describe, graph_of
from circuit_breaking.models.load import load_config, load_hf_model, load_tokenizer
from circuit_breaking.models.save import CONFIG, save_tokenizer, staged_folder
from circuit_breaking.runs.files import finite, read_json, write_text
from circuit_breaking.runs.hub import hub_answers
from circuit_breaking.runs.mask_record import MEANS


@dataclass(frozen=True)
class SavedAblation:
    """What a folder says of the ablated model in it.

    Attributes:
        edges: names of the cut edges.
        ablation: what they carry: `"zero"`, or `"mean"` for the means in `means.safetensors`.
        ablate_from: first position at which the cuts act.
        about: how the edges were found.
        results: measurements.
        base: what `load_tokenizer` takes: this folder, the folder of the whole model in it, or the base model's name.
        has_weights: whether the weights are in the folder, and not loaded by a base model's name.
        config: the configuration; None in folders of older releases.
        shape: of the base model, in folders of older releases.
    """

    edges: list[str]
    ablation: str
    ablate_from: int
    about: dict[str, Any]
    results: dict[str, Any]
    base: str
    has_weights: bool
    config: AblatedConfig | None = None
    shape: dict[str, Any] | None = None


def ablation_file(folder: Path) -> Path | None:
    """The file that makes a folder a saved ablated model, None in another folder."""
    config = folder / CONFIG
    if config.is_file():
        with suppress(UserError):
            fields = read_json(config, HINT)
            if isinstance(fields, dict) and fields.get("model_type") == MODEL_TYPE:
                return config
    return old_format.old_file(folder, HINT)


def is_ablated(name: Path | str) -> bool:
    """Whether a folder, or a name on the hub, is a saved ablated model."""
    path = Path(name).expanduser()
    return ablation_file(path) is not None if path.exists() else load_config(name).model_type == MODEL_TYPE


def save_ablated(
    folder: Path | str,
    base: str | Path | PreTrainedModel,
    edges: Iterable[str],
    means: Tensor | None = None,
    about: dict[str, Any] | None = None,
    results: dict[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    ablate_from: int = 0,
) -> None:
    """Write an ablated model as a folder that `load_ablated`, and after `import circuit_breaking` transformers' own
    `AutoModelForCausalLM.from_pretrained`, load anywhere.

    An error, such as a full disk, leaves what was in the folder before whole.

    Args:
        folder: where to; an ablated model that was saved there before is replaced.
        base: hub name or `"tiny"`, of which only the name is kept; or a folder, a `.gguf` or a loaded Hugging Face
            model (with or without cut edges), whose weights are stored.
        edges: names of the edges to cut.
        means: [P, D], or None for zero.
        about: JSON-able record of how the edges were found and on what data (see `files.provenance`).
        results: JSON-able measurements, for the card. A number that is not finite is stored as null.
        tokenizer: to be stored with the weights of a loaded model; that of a name or folder is found by itself.
        ablate_from: first position at which the cuts act, as for `ablate`.

    Raises:
        UserError: as `ablate` does, or the folder cannot be written or holds something else. An unsupported family is
            refused from its configuration, before weights are loaded.
    """
    folder, hf, weights = Path(folder), None, None
    edges = list(dict.fromkeys(Edge(edge) for edge in edges))
    config = base.config if isinstance(base, nn.Module) else load_config(base)
    if config.model_type == MODEL_TYPE:
        raise UserError(f"{base} is a saved ablated model. Give the base model, and all edges to cut.")
    check_ablate_from(ablate_from)
    graph = graph_of(config)
    for edge in edges:
        _ends(graph, edge)
    if means is not None:
        _check_means(means, len(graph.sources), config.hidden_size)
    if folder.is_dir() and any(folder.iterdir()) and ablation_file(folder) is None:
        raise UserError(f"{folder} holds other files already. Choose an empty folder for the ablated model.")
    if isinstance(base, nn.Module):
        hf = base
        describe(hf)  # refuses adapters and quantised weights
    elif str(base) == "tiny" or not Path(base).expanduser().exists():
        weights = str(base)
        with suppress(UserError):  # so that the folder is complete where there is one
            tokenizer = tokenizer or load_tokenizer(base)
    else:
        tokenizer = tokenizer or load_tokenizer(base)
        hf = load_hf_model(base, "cpu", config.dtype or "float32", only_supported=True)  # as precise as it was
    name = hub_name(config)
    record = EdgeAblation(
        base_model=name, base_model_type=config.model_type, weights=weights, edges=list(map(str, edges)),
        ablation="zero" if means is None else "mean", ablate_from=ablate_from, about=finite(about or {}),
        results=finite(results or {}),
    )  # fmt: skip
    if not (isinstance(record.about, dict) and isinstance(record.results, dict)):
        raise UserError("about and results are dictionaries. Give each entry a name.")
    card = model_card(folder.name, record, config, _license_of(name))
    with staged_folder(folder) as staged:
        if hf is None:
            AblatedConfig.of(config, record, means).save_pretrained(staged)
        else:
            save_with_cuts(hf, staged, record, means)
        save_tokenizer(staged, tokenizer)
        write_text(staged / CARD, card)
    shutil.rmtree(folder / old_format.BASE, ignore_errors=True)  # of a folder of an older release


def _license_of(name: str) -> str | None:
    """The licence of a model on the hub, as its card says; None where it cannot be asked for or is not given."""
    if not name or not hub_answers():
        return None
    from huggingface_hub import ModelCard

    with suppress(Exception):  # of many kinds; a card without a licence is no reason not to save
        return ModelCard.load(name).data.get("license")
    return None


def read_ablated(folder: Path | str) -> SavedAblation:
    """What the folder of a saved ablated model says of it.

    Raises:
        UserError: the folder is missing, damaged, or holds code.
    """
    folder = Path(folder).expanduser()
    path = ablation_file(folder)
    if path is None or path.name != CONFIG:
        old = old_format.AblatedModelRecord.read(path or folder / old_format.ABLATION, HINT)
        base = old.base or str(old_format.check_base(folder))
        inside = old.base is None
        return SavedAblation(old.edges, old.ablation, 0, old.about, old.results, base, inside, shape=old.shape)
    if code := next(folder.glob("*.py"), None):
        raise UserError(f"{code} is code, so {folder} is not loaded. Remove it if you trust the rest.")
    fields = read_json(path, HINT)
    EdgeAblation.from_json(fields.get(FIELD), path, HINT)  # names this file if it is damaged
    config = load_config(folder)
    record = config.record
    own = record.weights is None or (folder / "tokenizer_config.json").is_file()
    base = str(folder) if own else record.weights
    return SavedAblation(
        record.edges, record.ablation, record.ablate_from, record.about, record.results, base, record.weights is None,
        config,
    )  # fmt: skip


def load_ablated(
    folder: Path | str,
    device: str = "auto",
    dtype: str | torch.dtype = "float32",
    trainable: bool = False,
    revision: str | None = None,
) -> PreTrainedModel:
    """The ablated model that `save_ablated`, or `save_pretrained` of a model with cut edges, wrote: a stock Hugging
    Face model with its edges cut.

    `model.edge_cuts` is its `Ablation`; `model.edge_cuts.remove()` makes it the base model again. For its tokenizer:
    `load_tokenizer(read_ablated(folder).base)`.

    Args:
        folder: a folder, or the name of a repository on the hub, `"user/repo"`.
        device: `"auto"`, or a device name of PyTorch.
        dtype: type of the weights.
        trainable: load it in train mode, with gradients for all parameters, instead of eval mode.
        revision: branch, tag or commit of a repository on the hub.

    Raises:
        UserError: the model or its base model is missing or damaged, or they do not fit each other.
    """
    folder = _local(folder, revision)
    saved, means = read_ablated(folder), None
    if saved.ablation == "mean":
        means = read_means(folder / MEANS, AGAIN)[0]
    if saved.config is None:
        hf = load_hf_model(saved.base, device, dtype, only_supported=True)
        _check_shape(folder, saved, hf.config)
        record = EdgeAblation(
            base_model=hub_name(hf.config), base_model_type=hf.config.model_type, edges=saved.edges,
            ablation=saved.ablation, about=saved.about,
        )  # fmt: skip
    else:
        record = saved.config.record
        if record.weights is not None:
            check_fits(load_config(record.weights), saved.config, folder)
        base = saved.config.base_config
        hf = load_hf_model(record.weights or folder, device, dtype, only_supported=True, config=base)
    cut(hf, record, means, folder)
    return hf.train().requires_grad_(True) if trainable else hf


def _local(folder: Path | str, revision: str | None) -> Path:
    """The folder itself, or that of a repository on the hub, downloaded."""
    path = Path(folder).expanduser()
    if path.exists() or str(folder).count("/") != 1 or str(folder).startswith((".", "/", "~")):
        return path
    from huggingface_hub import snapshot_download

    patterns = [f"*{suffix}" for suffix in sorted(old_format.DATA_ONLY)]
    try:
        return Path(snapshot_download(str(folder), revision=revision, allow_patterns=patterns))
    except Exception as error:  # of many kinds; all mean that there is nothing to load
        raise UserError(
            f"{folder} is neither a folder nor an ablated model on the Hugging Face hub that can be reached "
            f"({one_line(error, 100)}). Check the name and the network."
        ) from error


def _check_shape(folder: Path, saved: SavedAblation, found: PreTrainedConfig) -> None:
    if old_format.shape_of(found) != saved.shape:
        raise UserError(
            f"{folder} was made for a model of shape {saved.shape}, and {saved.base} is {old_format.shape_of(found)}. "
            "Save the ablated model again with its base's weights."
        )
