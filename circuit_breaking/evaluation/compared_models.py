"""Models that are compared: the original, masks over it, ablated and fine-tuned models, by their folders (layer 3).

A folder is told by what is in it:

    mask.safetensors    a mask of `train_mask.py` or `sweep_masks.py`: its edges are cut in the original
    edges.json          with a record in it, an ablated model that `save_ablated` wrote
    config.json         an ordinary Hugging Face model, as `finetune_gpt2.py` writes it

A folder without any of these stands for the folders in it.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from circuit_breaking.ablation.ablate import ablate
from circuit_breaking.ablation.saved import read_ablated
from circuit_breaking.engine.ablation_values import load_means, read_means
from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.mask import load_mask
from circuit_breaking.errors import UserError
from circuit_breaking.models.load import load_hf_model
from circuit_breaking.runs.files import read_json, require_file
from circuit_breaking.runs.tensors import read_tensors
from circuit_breaking.training.config import with_new_names

MASK, EDGES, CONFIG, FINETUNING = "mask.safetensors", "edges.json", "config.json", "finetuning.json"
ORIGINAL = "original"
Engines = Callable[[bool], Any]  # by whether query, key and value read apart
HINT = "Give folders of train_mask.py, sweep_masks.py, finetune_gpt2.py or save_ablated."


@dataclass
class ComparedModel:
    """A model to compare.

    Attributes:
        name: its folder's name, or `"original"`.
        kind: `"original"`, `"mask"`, `"random"` (a control) or `"finetuned"`.
        folder: where it comes from.
        edges: names of its cut edges.
        means: their ablation values, [P, D]; None for zero.
        about: JSON-able, for reports: budget, seed, kind of ablation value, method, note.
    """

    name: str
    kind: str = ORIGINAL
    folder: Path | None = None
    edges: list[str] = field(default_factory=list)
    means: Tensor | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> Path | None:
        """The file that tells this model from others."""
        names = (MASK, EDGES) if self.kind != "finetuned" else ("model.safetensors",)
        return next((self.folder / name for name in names if self.folder and (self.folder / name).is_file()), None)

    @contextmanager
    def load(self, hf: nn.Module) -> Iterator[nn.Module]:
        """The model, while the block lasts; `hf`, the original, is lent to those that cut edges in it."""
        if self.kind == "finetuned":
            yield load_hf_model(self.folder, hf.device, hf.dtype)
        elif self.edges:
            with ablate(hf, self.edges, self.means):
                yield hf
        else:
            yield hf

    def changed_share(self, hf: nn.Module) -> dict[str, float]:
        """Share of the original's edges that are cut, and of its parameters that differ."""
        if self.kind != "finetuned":
            return {"edges": len(self.edges) / self.about["n_edges"] if self.edges else 0.0, "parameters": 0.0}
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
    if any((path / name).is_file() for name in (MASK, CONFIG)):
        return True
    return (path / EDGES).is_file() and isinstance(read_json(path / EDGES), dict)


def engines_of(hf: nn.Module) -> Engines:
    """Edge-masked transformers of a model, with and without query, key and value apart, each made once."""
    return cache(lambda split_qkv: load_model(hf, split_qkv, str(hf.device), hf.dtype))


def read_compared_models(folders: Mapping[str, Path], hf: nn.Module) -> list[ComparedModel]:
    """The variants of some folders, checked against the original `hf`, in the order of the folders.

    Raises:
        UserError: a file is missing or damaged, or belongs to a model of another shape.
    """
    engine = engines_of(hf)
    return [_read(name, folder, engine) for name, folder in folders.items()]


def _read(name: str, folder: Path, engine: Engines) -> ComparedModel:
    if (folder / MASK).is_file():
        return read_mask(name, folder / MASK, engine)
    if (folder / CONFIG).is_file():
        about = read_json(folder / FINETUNING, HINT) if (folder / FINETUNING).is_file() else {}
        picked = {key: about[key] for key in ("method", "chosen", "note") if about.get(key) is not None}
        return ComparedModel(name, "finetuned", folder, about=picked)
    record = read_ablated(folder)
    graph = engine(False).graph
    means = read_means(folder / "means.safetensors")[0] if record["cut_edges_carry"] == "mean" else None
    about = {"budget": len(record["edges"]), "ablation": record["cut_edges_carry"], "n_edges": len(graph)}
    return ComparedModel(name, "mask", folder, record["edges"], means, about)


def read_mask(name: str, path: Path, engine: Engines, means: Path | None = None) -> ComparedModel:
    """The variant of a mask's file. `means` are those of the mask's own record where None."""
    about = read_tensors(path, HINT)[1]
    settings = about["settings"] if isinstance(about.get("settings"), dict) else {}
    model = engine(bool(isinstance(about.get("graph"), dict) and about["graph"].get("split_qkv")))
    load_mask(path, model)
    means = means or settings.get("means")
    if not isinstance(means, str | Path | None):
        raise UserError(f"{path} names no file of means, but {means!r}. {HINT}")
    model.means = None
    if means is not None:
        load_means(require_file(means, "It was used in training and is needed here."), model)
    weights = model.mask.weights
    told = {
        "budget": settings.get("max_edges", model.mask.n_cut()),
        "seed": settings.get("seed"),
        "ablation": about.get("carry") or _ablation(means, settings),
        "n_edges": len(model.graph),
        "weights_rounded": int(((weights > 0) & (weights < 1)).sum()),
    }
    kind = about.get("kind") or "mask"
    return ComparedModel(name, kind, path.parent, list(map(str, model.mask.cut_edges())), model.means, told)


def _ablation(means: Path | str | None, settings: Mapping[str, Any]) -> str:
    """The kind of ablation value by a mask's record: zero, mean, or optimal (learned with the mask)."""
    if means is None:
        return "zero"
    return "optimal" if with_new_names(settings).get("constants_lr") else "mean"


def share_of_changed_parameters(model: nn.Module, original: nn.Module) -> float:
    """Share of a model's parameters (tied ones once) that are not bit for bit those of another."""
    theirs = dict(original.named_parameters())
    changed, total = 0, 0
    for name, parameter in model.named_parameters():
        other: Tensor = theirs[name]
        changed += int((parameter != other.to(parameter.device, parameter.dtype)).sum())
        total += parameter.numel()
    return changed / total
