"""Models that are compared, read from their folders: the original, masks over it, ablated and fine-tuned models.

A file says what a folder holds:

    control.json        a control of `sweep_masks.py`: the constants of a mask without its cuts, or its cuts with means
    mask.safetensors    a mask of `train_mask.py` or `sweep_masks.py`: its edges are cut in the original
    config.json         an ablated model that `save_ablated` wrote, which its `model_type` says; otherwise an ordinary
                        Hugging Face model, as `finetune_gpt2.py` writes it
    ablation.json       an ablated model of an older release

A folder without any of these stands for the folders in it.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from circuit_breaking.ablation.ablate import Ablation, ablate
from circuit_breaking.ablation.saved import ablation_file, load_ablated, read_ablated
from circuit_breaking.engine.ablation_values import load_means, read_means, read_value
from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.mask import load_mask, read_mask_record
from circuit_breaking.errors import UserError
from circuit_breaking.evaluation.result_files import ORIGINAL
from circuit_breaking.models.load import load_hf_model
from circuit_breaking.runs.mask_record import CONTROL, MASK, MEANS, ControlRecord, MaskRecord
from circuit_breaking.runs.results import FineTuning

CONFIG, FINETUNING = "config.json", "finetuning.json"
SWEPT = "masks"  # folder of a run that holds the masks of a sweep
Engines = Callable[[bool], Any]  # gives the edge-masked transformer for a value of `split_qkv`
HINT = "Give folders of train_mask.py, sweep_masks.py, finetune_gpt2.py or save_ablated."


@dataclass
class ComparedModel:
    """A model to compare.

    Attributes:
        name: its folder's name, or `"original"`.
        kind: `"original"`, `"mask"`, `"random"` and `"control"` (controls) or `"finetuned"`.
        folder: where it comes from.
        edges: names of its cut edges.
        means: their ablation values, [P, D]; None for zero.
        ablate_from: first position at which the cuts act.
        about: JSON-able, for reports: budget, seed, kind of ablation value, method, sweep, note.
        means_file: the file that holds `means`.
    """

    name: str
    kind: str = ORIGINAL
    folder: Path | None = None
    edges: list[str] = field(default_factory=list)
    means: Tensor | None = None
    about: dict[str, Any] = field(default_factory=dict)
    means_file: Path | None = None
    ablate_from: int = 0
    removes: bool = True

    @property
    def file(self) -> Path | None:
        """The file that makes this model differ from others."""
        if self.folder is None:
            return None
        path = self.folder / {"finetuned": "model.safetensors", "control": CONTROL}.get(self.kind, MASK)
        return path if path.is_file() else ablation_file(self.folder)

    def cut(self, hf: PreTrainedModel, edges: list[str] | None = None) -> Ablation:
        """Cut this model's edges in `hf`, or only some of them, as in the training of the mask."""
        return ablate(hf, self.edges if edges is None else edges, self.means, self.ablate_from, self.removes)

    @contextmanager
    def load(self, hf: nn.Module) -> Iterator[nn.Module]:
        """The model, while the block lasts; `hf`, the original, is lent to those that cut edges in it."""
        if self.kind == "finetuned":
            yield load_hf_model(self.folder, hf.device, hf.dtype)
        elif self.edges:
            with self.cut(hf):
                yield hf
        else:
            yield hf

    def changed_share(self, hf: nn.Module) -> dict[str, float]:
        """Share of the original's edges that are cut, and of its parameters that differ."""
        if self.kind != "finetuned":
            cut = self.edges if self.removes else []
            return {"edges": len(cut) / self.about["n_edges"] if cut else 0.0, "parameters": 0.0}
        with self.load(hf) as model:
            return {"edges": 0.0, "parameters": share_of_changed_parameters(model, hf)}


def find_folders(paths: Iterable[Path | str]) -> dict[str, Path]:
    """Folders of models by their names, in order; one that is none itself stands for those in it.

    Raises:
        UserError: there is no model in a folder, or two have the same name.
    """
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        inside = [path] if _is_model(path) else sorted(filter(_is_model, path.glob("*")), key=_by_number)
        if not inside:
            raise UserError(f"{path} holds no model to compare. {HINT}")
        for one in inside:
            name = one.resolve().name
            if name == ORIGINAL or found.get(name, one) != one:
                raise UserError(f"{one} and another model are both called {name}. Rename the folder of one.")
            found[name] = one
    return found


def _by_number(path: Path) -> list[tuple[int, int, str]]:
    """Sorts names by the numbers in them: mask_2 before mask_12."""
    parts = re.split(r"(\d+)", path.name)
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts if part]


def _is_model(path: Path) -> bool:
    return any((path / name).is_file() for name in (CONTROL, MASK, CONFIG)) or ablation_file(path) is not None


def engines_of(hf: nn.Module) -> Engines:
    """Edge-masked transformers of a model, with and without separate readers for queries, keys and values, each made
    once."""
    return cache(lambda split_qkv: load_model(hf, split_qkv, str(hf.device), hf.dtype, share_weights=True))


def read_compared_models(folders: Mapping[str, Path], hf: nn.Module) -> list[ComparedModel]:
    """The models of some folders, checked against the original `hf`, in the order of the folders.

    Raises:
        UserError: a file is missing or damaged, or belongs to a model of another shape.
    """
    engine = engines_of(hf)
    return [_read(name, folder, engine, hf) for name, folder in folders.items()]


def _read(name: str, folder: Path, engine: Engines, hf: nn.Module) -> ComparedModel:
    if (folder / CONTROL).is_file():
        return read_control(name, folder, engine)
    if (folder / MASK).is_file():
        return read_mask(name, folder / MASK, engine)
    if ablation_file(folder) is None:
        found = FineTuning.read(folder / FINETUNING, HINT) if (folder / FINETUNING).is_file() else FineTuning()
        about = {"method": found.method, "chosen": found.chosen, "note": found.note}
        return ComparedModel(name, "finetuned", folder, about={k: v for k, v in about.items() if v is not None})
    record = read_ablated(folder)
    if record.has_weights and share_of_changed_parameters(load_ablated(folder, str(hf.device), hf.dtype), hf):
        raise UserError(
            f"{folder} has other weights than the original model, so it is not compared as cut edges alone."
        )
    means = read_means(folder / MEANS)[0] if record.ablation == "mean" else None
    about = {
        "budget": len(record.edges), "sweep": None, "ablation": record.ablation, "n_edges": len(engine(False).graph),
    }  # fmt: skip
    file = None if means is None else folder / MEANS
    return ComparedModel(name, "mask", folder, record.edges, means, about, file, record.ablate_from)


def load_masked(path: Path, engine: Engines, means: Path | None = None) -> tuple[Any, MaskRecord]:
    """An edge-masked transformer with the mask in a file, what its cut edges carry, and from which position on.

    Args:
        path: the file of the mask.
        engine: gives the transformer for a graph (`engines_of`); its mask, means, `resample` and `ablate_from` are
            replaced.
        means: file of means in place of those that the mask was trained with.

    Returns:
        The transformer, and the record of the mask.

    Raises:
        UserError: a file is missing or damaged, or belongs to a model of another shape, or the means have changed since
            the mask was trained.
    """
    record = read_mask_record(path, HINT)
    model = engine(record.split_qkv)
    model.means, model.resample = None, False
    load_mask(path, model)
    if means is not None:
        load_means(means, model)
        return model, record
    model.resample = record.ablation_value.kind == "counterfactual"
    if (values := read_value(record.ablation_value, path, record.ablate_from, resample=True)) is not None:
        try:
            model.means = values
        except UserError as error:
            raise UserError(f"{record.ablation_value.path}: {error}") from None
    return model, record


def read_mask(name: str, path: Path, engine: Engines, means: Path | None = None) -> ComparedModel:
    """The model of a mask's file; the arguments are those of `load_masked`.

    Raises:
        UserError: as `load_masked`, or its cut edges carry outputs on counterfactual prompts and there are no `means`.
    """
    if means is None:
        record = read_mask_record(path, HINT)
        read_value(record.ablation_value, path, record.ablate_from)
    model, record = load_masked(path, engine, means)
    weights, ablation = model.mask.weights, record.ablation_value
    replaced = means is not None and (str(means) != ablation.path or ablation.kind == "counterfactual")
    about = {
        "budget": model.mask.n_cut() if record.budget is None else record.budget,
        "seed": record.seed,
        "method": record.method,
        "sweep": sweep_of(path.parent),
        "ablation": "mean" if replaced else ablation.kind,
        "n_edges": len(model.graph),
        "weights_rounded": int(((weights > 0) & (weights < 1)).sum()),
    }
    file = means or (Path(ablation.path) if ablation.path else None)
    edges = list(map(str, model.mask.cut_edges()))
    return ComparedModel(name, record.role, path.parent, edges, model.means, about, file, model.ablate_from)


def read_control(name: str, folder: Path, engine: Engines) -> ComparedModel:
    """The control in a folder, for the edges of a mask with learned constants."""
    record, model = ControlRecord.read(folder / CONTROL, HINT), engine(False)
    model.means = None
    load_means(folder / MEANS, model)
    about = {
        "budget": record.budget, "seed": record.seed, "sweep": sweep_of(folder), "ablation": "optimal",
        "n_edges": len(model.graph), "note": record.about,
    }  # fmt: skip
    means, model.means = model.means, None
    return ComparedModel(
        name, "control", folder, record.edges, means, about, folder / MEANS, record.ablate_from, record.removes
    )


def sweep_of(folder: Path) -> str | None:
    """The sweep that a mask's folder belongs to, by the name of its run; None for a mask that was trained by itself.

    `sweep_masks.py` and `compare_methods.py` write the masks of a sweep to `<run>/masks/<name>/`.
    """
    parent = folder.resolve().parent
    return parent.parent.name if parent.name == SWEPT else None


def share_of_changed_parameters(model: nn.Module, original: nn.Module) -> float:
    """Share of a model's parameters (tied ones once) that are not bit for bit those of another.

    Biases that the other one does not have count as zeros there.
    """
    theirs = dict(original.named_parameters(remove_duplicate=False))
    changed, total = 0, 0
    for name, parameter in model.named_parameters():
        other: Tensor = theirs.get(name, torch.zeros(()))
        changed += int((parameter != other.to(parameter.device, parameter.dtype)).sum())
        total += parameter.numel()
    return changed / total
