"""Records of results: what the toxicity scripts write, and figures and reports are made from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from circuit_breaking.errors import UserError
from circuit_breaking.runs.files import CHECK, read_json
from circuit_breaking.runs.records import Record

REPORT = "report.json"


@dataclass(kw_only=True)
class Results(Record):
    """Base class of result files.

    Attributes:
        provenance: settings of the script, hashes of the files read, package versions, git commit.
    """

    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Report(Results):
    """`report.json` of `toxicity/evaluation.py` and `mask_learning.py`.

    Attributes:
        models: by name, what was measured of each model; `data/README.md` lists the entries.
        scorer: name, version and threshold of the toxicity scorer.
        reference: the model that changes are differences to.
        model: what the original was loaded from.
        samples, seeds: continuations of each prompt and seed, and how many seeds.
        num_texts, num_prompts: by set, how many were measured.
        edges, n_edges, weights_rounded: of the mask called "ablated": its cut edges, the edges of its graph, and how
            many weights between 0 and 1 were rounded. None where there is no such mask.
    """

    NAME: ClassVar[str] = "report"
    models: dict[str, Any]
    scorer: dict[str, Any] = field(default_factory=dict)
    reference: str = "original"
    model: str | None = None
    samples: int | None = None
    seeds: int = 1
    num_texts: dict[str, int] = field(default_factory=dict)
    num_prompts: dict[str, int] = field(default_factory=dict)
    edges: list[str] | None = None
    n_edges: int | None = None
    weights_rounded: int | None = None

    @classmethod
    def from_old(cls, value: Any, path: Path | str, hint: str) -> dict[str, Any]:
        if not isinstance(value, dict) or not value.get("models"):
            raise UserError(f"{path} holds no models. {hint}")
        found = super().from_old(value, path, hint)
        settings = found["provenance"].get("settings") or {}
        return {**{name: settings[name] for name in ("model", "samples", "seeds") if name in settings}, **found}


@dataclass(kw_only=True)
class Evidence(Results):
    """`evidence.json` of `toxicity/edge_evidence.py`.

    Attributes:
        masks: by name, the effect of each cut edge (`edge_effects.leave_one_out`).
        stability: similarity of masks over seeds (`edge_effects.stability`).
        num_texts: by set, how many were measured.
    """

    NAME: ClassVar[str] = "evidence"
    masks: dict[str, Any]
    stability: list[dict[str, Any]]
    num_texts: dict[str, int] = field(default_factory=dict)


@dataclass(kw_only=True)
class Relearning(Results):
    """`relearning.json` of `toxicity/relearn.py`.

    Attributes:
        models: by name, toxicity by step of relearning and with examples in the context.
        scorer: name and version of the toxicity scorer.
    """

    NAME: ClassVar[str] = "relearning"
    models: dict[str, Any]
    scorer: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Comparison(Results):
    """`comparison.json` of `toxicity/report.py`.

    Attributes:
        pareto: whether a mask is on the front of toxicity against ordinary loss (`pareto.pareto`).
        random_edges: what random edges do (`controls.controls`).
    """

    NAME: ClassVar[str] = "comparison"
    pareto: dict[str, Any]
    random_edges: list[dict[str, Any]]


@dataclass(kw_only=True)
class MethodComparison(Results):
    """`methods.json` of `toxicity/compare_methods.py`.

    Attributes:
        original: held-out losses with all edges.
        masks: a row for each mask: method, budget, seed, edges cut, held-out losses, objective, gain.
        texts_seen: how many texts of each task training draws, with refinement and without.
    """

    NAME: ClassVar[str] = "method comparison"
    original: dict[str, Any]
    masks: list[dict[str, Any]]
    texts_seen: dict[str, int] = field(default_factory=dict)


@dataclass(kw_only=True)
class FineTuning(Results):
    """`finetuning.json` of a model that `toxicity/finetune_gpt2.py` wrote.

    Attributes:
        method, about: name of the method, and what it does in a sentence.
        chosen: the checkpoint that was kept: learning rate, step, losses; or the candidate: layer, scale, losses.
        note: what a reader should know, None if there is nothing.
        texts: texts of both kinds that training read with the chosen learning rate, each counted whenever it was read.
        finetuning: settings of the method.
        lrs: learning rates that were tried.
        made_from: as for `MaskRecord`.
    """

    NAME: ClassVar[str] = "fine-tuning"
    method: str | None = None
    about: str | None = None
    chosen: dict[str, Any] | None = None
    note: str | None = None
    texts: int | None = None
    finetuning: dict[str, Any] = field(default_factory=dict)
    lrs: list[float] = field(default_factory=list)
    made_from: str | None = None


def choice_in_words(chosen: Mapping[str, Any]) -> str:
    """What was chosen for a fine-tuned model, such as "lr 0.0001, step 30", or "layer 2, scale 4" of a candidate."""
    names = ("lr", "step", "scale") if "lr" in chosen else ("layer", "scale")
    return ", ".join(f"{name} {chosen[name]:g}" for name in names if chosen.get(name) is not None)


def new_or_old(folder: Path, name: str, old_name: str, hint: str = CHECK) -> Path:
    """The file of a folder under its present name, or, where only that is there, under the name of an older release.

    Raises:
        UserError: under the old name there is a record, which belongs to another format.
    """
    old = folder / old_name
    if (folder / name).is_file() or not old.is_file():
        return folder / name
    about = read_json(old, hint) if old.suffix == ".json" else None
    if isinstance(about, dict) and "record" in about:
        raise UserError(f"there is no file {folder / name}. {hint}")
    return old
