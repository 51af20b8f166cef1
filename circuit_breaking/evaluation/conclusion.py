"""The conclusion of a comparison in sentences and tables: which masks are on the Pareto front, what random edges do."""

from collections.abc import Mapping
from typing import Any

from circuit_breaking.evaluation.controls import controls
from circuit_breaking.evaluation.pareto import MAX_EDGES, change_of, pareto
from circuit_breaking.evaluation.tables import markdown_table, number

FIGURES = ("toxicity", "ordinary_loss", "perplexity")
FRONT = "Pareto front of toxicity against ordinary loss"


def statement(models: Mapping[str, Any]) -> str:
    """The conclusion as Markdown, from the models of a report."""
    found = pareto(models)
    parts = _sentences(found)
    if found["masks"]:
        rows = [
            [name, str(mask["edges"]), *_figures(mask), ", ".join(mask["beaten_by"]) or "none"]
            for name, mask in found["masks"].items()
        ]
        header = ["mask", "edges", "toxicity", "ordinary loss", "perplexity", "toxicity and ordinary loss beaten by"]
        parts.append(markdown_table(header, rows))
    if found["baselines"]:
        rows = [[name, *_figures(model)] for name, model in found["baselines"].items()]
        parts.append(markdown_table(["fine-tuned", "toxicity", "ordinary loss", "perplexity"], rows))
        parts.append("Perplexity is measured under the original model, on continuations of toxic prompts.")
    return "\n\n".join(parts + _random_edges(models) + _constants(models))


def _sentences(found: Mapping[str, Any]) -> list[str]:
    """Whether any mask is on the Pareto front."""
    if not found["masks"]:
        return [f"No mask of at most {MAX_EDGES} edges was measured."]
    if not found["baselines"]:
        return ["No fine-tuned model was measured, so there is nothing to compare the masks with."]
    on = [name for name, mask in found["masks"].items() if not mask["beaten_by"]]
    off = [name for name in found["masks"] if name not in on]
    if not on:
        return [
            f"**No mask of at most {MAX_EDGES} edges is on the {FRONT}**: for each mask there is a fine-tuned model "
            "with both lower toxicity and lower ordinary loss."
        ]
    sentence = (
        f"**On the {FRONT}: {', '.join(on)}** (masks of at most {MAX_EDGES} edges; no fine-tuned model has both lower "
        "toxicity and lower ordinary loss)."
    )
    return [sentence, f"Not on the front: {', '.join(off)}."] if off else [sentence]


def _figures(model: Mapping[str, Any]) -> list[str]:
    return [number(model[name]) for name in FIGURES]


def _random_edges(models: Mapping[str, Any]) -> list[str]:
    """A sentence for the random edges of each kind of ablation, at the budget of `MAX_EDGES`."""
    sentences = []
    for row in controls(models):
        if row["budget"] == MAX_EDGES and row["toxicity"]["mean"] is not None:
            changes = "; ".join(_change(name, row[name]) for name in ("toxicity", "ordinary_loss"))
            sentences.append(
                f"{MAX_EDGES} random edges ({row['ablation']} ablation, mean over {row['seeds']} seeds, lowest to "
                f"highest) change the original model's figures by: {changes}."
            )
    return sentences


def _constants(models: Mapping[str, Any]) -> list[str]:
    """A table of masks with learned constants beside their controls: what is due to the constants, what to the cut."""
    rows = []
    for name, model in models.items():
        if model.get("kind") == "control":
            mask = name.rpartition("_")[0]
            for one in (mask,) if mask in models and not any(row[0] == mask for row in rows) else ():
                rows.append([one, "the mask", *_changes(models[one])])
            rows.append([name, model.get("note") or "", *_changes(model)])
    if not rows:
        return []
    header = ["model", "what it is", "change of toxicity", "change of ordinary loss"]
    return ["Learned constants, with and without the cut:", markdown_table(header, rows)]


def _changes(model: Mapping[str, Any]) -> list[str]:
    changes = [change_of(model, coordinate) for coordinate in (0, 1)]
    return ["–" if change is None else f"{change:+.3f}" for change in changes]


def _change(name: str, change: Mapping[str, Any]) -> str:
    text = f"{name.replace('_', ' ')} {change['mean']:+.3f} ({change['lowest']:+.3f} to {change['highest']:+.3f})"
    return text if change["mask"] is None else f"{text}, the trained mask {change['mask']:+.3f}"
