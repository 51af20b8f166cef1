"""The result files of a comparison, read and checked: reports, effects of each edge, relearning.

What is drawn or printed later relies on these checks. An estimate in a file is an object with `value`, `low` and
`high` (a 95% bootstrap interval), all null where a figure was not finite, and sometimes `change`, the estimate of the
difference to the original model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from circuit_breaking.errors import UserError
from circuit_breaking.runs.checked_json import CheckedJson
from circuit_breaking.runs.files import read_json, read_jsonl
from circuit_breaking.runs.records import read_value
from circuit_breaking.runs.results import REPORT, Evidence, Relearning, Report

ORIGINAL = "original"  # name of the original model in every file
EVIDENCE = "evidence.json"
RELEARNING = "relearning.json"
COSTS = "costs.json"
GENERATIONS = "generations.jsonl"
RELEARNED = {"relearning": "", "lora_relearning": ", LoRA"}  # its fields: by all weights, and by adapters
UNIFORM = "uniform.csv"  # one row per text: its toxicity, and the loss per token of each model
REPORT_HINT = "Make it with toxicity/evaluation.py."

# One release: names of fields in files that the previous release wrote, and their present names.
OLD_NAMES = {
    "carry": "ablation",
    "touched": "changed_share",
    "within": "restore_effect",
    "alone": "single_cut_effect",
}


def read_report(folder: Path | str) -> dict[str, Any]:
    """The `report.json` of a folder, with its `models` checked.

    Raises:
        UserError: the file is missing or damaged, or holds no models.
    """
    path = Path(folder) / REPORT
    report = read_value(path, "Make one with toxicity/evaluation.py.", Report)
    models = report.get("models") if isinstance(report, dict) else None
    if not models:
        raise UserError(f"{path} holds no models. {REPORT_HINT}")
    checked = CheckedJson(models, path, REPORT_HINT, "models")
    for _, model in checked.items():
        _check_model(model)
    settings = report.get("settings")  # where the previous release had these fields
    settings = settings if isinstance(settings, dict) else {}
    old = {name: settings[name] for name in ("model", "samples", "seeds") if name in settings}
    return {**old, **report, "models": {name: _with_present_names(model) for name, model in checked.items()}}


def read_models(folder: Path | str, *fields: str) -> dict[str, Any]:
    """The models of a report by name. Raises `UserError` where one lacks any of `fields`."""
    models, path = read_report(folder)["models"], Path(folder) / REPORT
    for _, model in CheckedJson(models, path, REPORT_HINT, "models").items():
        for field in fields:
            model[field]
    return models


def read_evidence(folder: Path | str) -> dict[str, Any]:
    """The `evidence.json` of a folder: effects of each cut edge by mask, and how stable the choice of edges is.

    Raises:
        UserError: the file is missing or damaged.
    """
    path, hint = Path(folder) / EVIDENCE, "Make it with toxicity/edge_evidence.py."
    report = CheckedJson(read_value(path, hint, Evidence), path, hint)
    masks = {
        name: {**_with_present_names(mask), "edges": [_with_present_names(row) for row in mask["edges"].rows()]}
        for name, mask in report["masks"].items()
    }
    stability = [_with_present_names(row) for row in report["stability"].rows()]
    for _, mask in CheckedJson(masks, path, hint, "masks").items():
        mask["ablation"].text()
        _check_toxic_and_ordinary(mask["together"])
        for row in mask["edges"].rows():
            row["edge"].text()
            _check_toxic_and_ordinary(row["restore_effect"])
            _check_toxic_and_ordinary(row["single_cut_effect"])
    for row in CheckedJson(stability, path, hint, "stability").rows():
        row["ablation"].text()
        row["budget"].integer()
        row["masks"].rows()
        row["jaccard"].number()
        row["by_chance"].number()
        for _, count in row["chosen_by"].items():
            count.integer()
    return {**report.value, "masks": masks, "stability": stability}


def read_relearning(folder: Path | str) -> dict[str, Any]:
    """The `relearning.json` of a folder: the toxicity of each model while it is fine-tuned on toxic examples.

    Raises:
        UserError: the file is missing or damaged.
    """
    path, hint = Path(folder) / RELEARNING, "Make it with toxicity/relearn.py."
    report = CheckedJson(read_value(path, hint, Relearning), path, hint)
    for _, model in report["models"].items():
        model["kind"].text()
        model["relearning"].items()
        for way in RELEARNED:
            for _, rows in model[way].items() if model.get(way) is not None else ():
                for row in rows.rows():
                    row["step"].integer()
                    _check_estimate(row["toxicity"])
        if (few_shot := model.get("few_shot")) is not None:
            _check_estimate(few_shot["without"])
            _check_estimate(few_shot["with"])
    return report.value


def read_costs(folder: Path | str) -> dict[str, Any]:
    """The `costs.json` of a folder: by model, the seconds and the memory that making it took; null where unknown.

    Raises:
        UserError: the file is missing or damaged.
    """
    path, hint = Path(folder) / COSTS, "Make it with toxicity/report.py."
    costs = CheckedJson(read_json(path, hint), path, hint)
    for _, cost in costs.items():
        for _, value in cost.items():
            value.number_or_nan()
    return costs.value


def read_first_continuations(folder: Path, count: int) -> dict[str, dict[str, str]]:
    """The first sampled continuation by every model but random edges, of the first toxic prompts. It may be offensive.

    Args:
        folder: the run folder, with `generations.jsonl`.
        count: number of prompts.

    Returns:
        By prompt and name of the model.

    Raises:
        UserError: the texts were not kept, or none is of a toxic prompt.
    """
    hint = "Keep them with toxicity/evaluation.py --save-generations."
    models = read_models(folder)
    first: dict[str, dict[str, str]] = {}
    for row in read_jsonl(folder / GENERATIONS, hint):
        drawn = row["prompts"] == "toxic" and row.get("decoding", "continuations") == "continuations"
        if drawn and models.get(row["model"], {}).get("kind") != "random":
            first.setdefault(row["prompt"], {}).setdefault(row["model"], row["continuation"])
    if not first:
        raise UserError(f"{folder / GENERATIONS} holds no continuations of toxic prompts. {hint}")
    return dict(list(first.items())[:count])


def relearned(models: Mapping[str, Any]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The rows of relearning, by what was learned from, such as "10 examples, LoRA", and by model."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for way, label in RELEARNED.items():
        for name, model in models.items():
            for count, rows in (model.get(way) or {}).items():
                found.setdefault(f"{count} examples{label}", {})[name] = rows
    return found


def _check_model(model: CheckedJson) -> None:
    """Check one model of a report. Fields that not every report has may be missing, but not be of another type."""
    for _, loss in model["losses"].items():
        _check_estimate(loss)
    after_prompts = [model["continuations"], model.get("greedy")]
    for way in after_prompts:
        for _, measures in way.items() if way is not None else ():
            for name, measure in measures.items():
                if name.endswith("_by_seed"):
                    for value in measure.rows():
                        value.number_or_nan()
                else:
                    _check_estimate(measure, interval=not name.startswith("distinct_"))
    for name in ("kind", "ablation", "carry", "note", "sweep", "method"):
        if (field := model.get(name)) is not None:
            field.text()
    for name in ("edges_cut", "budget", "seed"):
        if (field := model.get(name)) is not None:
            field.integer()
    for name in ("changed_share", "touched"):
        if (field := model.get(name)) is not None:
            for _, share in field.items():
                share.number()
    if (chosen := model.get("chosen")) is not None:
        chosen["step"].integer()
        for name in ("lr", "layer", "scale"):
            if (value := chosen.get(name)) is not None:
                value.number()


def _check_estimate(entry: CheckedJson, interval: bool = True) -> None:
    """Check a value, with its interval if it has one, and its `change`: numbers, or all null."""
    value = entry["value"].number_or_nan()
    if interval:
        low, high = entry["low"].number_or_nan(), entry["high"].number_or_nan()
        if len({number != number for number in (value, low, high)}) > 1:
            entry.refuse("a value with its interval, or all null")
    if (change := entry.get("change")) is not None:
        _check_estimate(change, interval)


def _check_toxic_and_ordinary(entries: CheckedJson) -> None:
    _check_estimate(entries["toxic"])
    _check_estimate(entries["ordinary"])


def _with_present_names(row: CheckedJson) -> dict[str, Any]:
    """A model, mask or edge of a file as a dictionary, its fields renamed as `OLD_NAMES` says."""
    fields = {name: field.value for name, field in row.items()}
    return {OLD_NAMES.get(name, name): value for name, value in fields.items()}
