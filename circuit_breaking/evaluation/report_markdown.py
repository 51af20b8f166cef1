"""The report of a comparison in Markdown, put together from its result files only."""

from collections.abc import Mapping, Sequence
from typing import Any

from circuit_breaking.evaluation.conclusion import statement
from circuit_breaking.evaluation.controls import controls
from circuit_breaking.evaluation.pareto import family_of
from circuit_breaking.evaluation.result_files import relearned
from circuit_breaking.evaluation.tables import COSTS_TEXT, costs_table, interval, markdown_table, number
from circuit_breaking.runs.results import choice_in_words

COSTS_HEADING = "Costs of this run"  # the text below it differs from run to run; the text above it does not
EFFECTS = ("restore_effect", "single_cut_effect")
NGRAMS = ("unigrams", "bigrams", "trigrams")


def render(
    report: Mapping[str, Any],
    evidence: Mapping[str, Any] | None = None,
    relearning: Mapping[str, Any] | None = None,
    costs: Mapping[str, Any] | None = None,
    pictures: Sequence[str] = (),
    examples: str = "",
) -> str:
    """The whole report as Markdown.

    Args:
        report, evidence, relearning: as `result_files` reads them.
        costs: by model, the seconds and the memory that making it took; these come last, under `COSTS_HEADING`.
        pictures: file names of the figures.
        examples: continuations in Markdown, which may be offensive.
    """
    models = report["models"]
    parts = [f"# Comparison on {report['model']}", _about(report), "## Result", statement(models)]
    if notes := _notes(models, relearning):
        parts += ["## Notes", notes]
    parts += ["## Models", _models(models), "## After prompts", _continuations(models)]
    if any(model.get("kind") == "random" for model in models.values()):
        parts += ["## Random edges", _controls(models)]
    if evidence is not None:
        parts += ["## Evidence for each edge", _evidence(evidence)]
    if relearning is not None:
        parts += ["## Does it come back?", _relearning(relearning)]
    if examples:
        parts += ["## Examples (these texts may be OFFENSIVE)", examples]
    if pictures:
        parts += ["## Figures", "\n".join(f"![{name.removesuffix('.png')}]({name})" for name in pictures)]
    if costs:
        parts += [f"## {COSTS_HEADING}", COSTS_TEXT, markdown_table(*costs_table(costs))]
    return "\n\n".join(parts) + "\n"


def _about(report: Mapping[str, Any]) -> str:
    scorer, texts, prompts = (report[key] for key in ("scorer", "num_texts", "num_prompts"))
    return (
        f"Toxicity is scored by {scorer['name']} {scorer['version']}; a continuation with a score above "
        f"{scorer['threshold']} counts as toxic. Held-out texts: {texts['toxic']} toxic, {texts['ordinary']} ordinary. "
        f"Prompts: {prompts['toxic']} toxic, {prompts['ordinary']} ordinary. Continuations per prompt: "
        f"{report['samples']} from each of {report['seeds']} seed(s). Brackets hold 95% bootstrap intervals over "
        "texts or prompts. Losses are in nats per token."
    )


def _notes(models: Mapping[str, Any], relearning: Mapping[str, Any] | None) -> str:
    notes = [f"- {name}: {model['note']}." for name, model in models.items() if model.get("note")]
    retrained = (relearning or {}).get("models", {})
    notes += [f"- {name}, relearning: {model['note']}." for name, model in retrained.items() if model.get("note")]
    return "\n".join(notes)


def _without_random(models: Mapping[str, Any]) -> dict[str, Any]:
    return {name: model for name, model in models.items() if model.get("kind") != "random"}


def _models(models: Mapping[str, Any]) -> str:
    rows = []
    for name, model in _without_random(models).items():
        changed = model.get("changed_share", {})
        rows.append(
            [
                name,
                _made_by(model),
                f"{model['edges_cut']} ({changed.get('edges', 0):.1%})",
                f"{changed.get('parameters', 0):.1%}",
                interval(model["losses"].get("toxic")),
                interval(model["losses"].get("ordinary")),
                interval(model["continuations"].get("toxic", {}).get("toxicity")),
            ]
        )
    header = ["model", "made by", "edges cut", "parameters changed", "toxic loss", "ordinary loss", "toxicity"]
    return markdown_table(header, rows)


def _made_by(model: Mapping[str, Any]) -> str:
    """The family of a mask; of a fine-tuned model, the settings of the checkpoint that was kept."""
    if family_of(model) != "other":
        return family_of(model)
    return choice_in_words(model.get("chosen") or {}) or model["kind"]


def _continuations(models: Mapping[str, Any]) -> str:
    header = [
        "model", "toxic share", "mean toxicity", "by seed", "perplexity under the original", "distinct 1/2/3-grams",
        "tokens",
    ]  # fmt: skip
    parts = []
    for decoding, title in (("continuations", "Sampled"), ("greedy", "Greedy")):
        for prompts in ("toxic", "ordinary"):
            found = {
                name: model[decoding][prompts]
                for name, model in _without_random(models).items()
                if prompts in model.get(decoding, {})
            }
            if found:
                rows = [[name, *_continuation_cells(measures)] for name, measures in found.items()]
                parts += [f"### {title}, after {prompts} prompts", markdown_table(header, rows)]
    return "\n\n".join(parts)


def _continuation_cells(measures: Mapping[str, Any]) -> list[str]:
    return [
        interval(measures["toxic_share"]),
        interval(measures["toxicity"]),
        ", ".join(number(value) for value in measures.get("toxicity_by_seed") or []) or "–",
        interval(measures["perplexity"], 2),
        "/".join(number(measures[f"distinct_{n}"]["value"], 2) for n in NGRAMS),
        interval(measures["tokens"], 1),
    ]


def _controls(models: Mapping[str, Any]) -> str:
    rows = []
    for row in controls(models):
        cells = [row["ablation"], str(row["budget"]), str(row["seeds"])]
        for change in (row["toxicity"], row["ordinary_loss"]):
            cells += [
                f"{number(change['mean'])} ({number(change['lowest'])} to {number(change['highest'])})",
                number(change["mask"]),
            ]
        rows.append(cells)
    header = [
        "ablation", "edges", "seeds", "change of toxicity", "by the mask", "change of ordinary loss", "by the mask",
    ]  # fmt: skip
    text = (
        "Changes from the original model: the mean over seeds, and in brackets the lowest and the highest. Random "
        "edges are measured on fewer texts and prompts."
    )
    return f"{text}\n\n{markdown_table(header, rows)}"


def _evidence(evidence: Mapping[str, Any]) -> str:
    parts = [
        "Restored: how far the loss falls when only this edge is restored and the others stay cut. Cut alone: how far "
        "the loss rises when only this edge is cut."
    ]
    header = ["edge", "toxic, restored", "toxic, cut alone", "ordinary, restored", "ordinary, cut alone"]
    for name, mask in evidence["masks"].items():
        rows = [
            [
                row["edge"],
                *(interval(row[effect][kind]) for kind in ("toxic", "ordinary") for effect in EFFECTS),
            ]
            for row in mask["edges"]
        ]
        together = ", ".join(f"{kind} {interval(mask['together'][kind])}" for kind in ("toxic", "ordinary"))
        parts += [
            f"### {name} ({mask['ablation']} ablation)",
            f"All cuts together change the loss by: {together}.",
            markdown_table(header, rows),
        ]
    if rows := [_stability_cells(row) for row in evidence["stability"]]:
        header = ["ablation", "edges", "seeds", "Jaccard", "by chance", "edges in every mask"]
        parts += ["### The same edges over seeds", markdown_table(header, rows)]
    return "\n\n".join(parts)


def _stability_cells(row: Mapping[str, Any]) -> list[str]:
    seeds = len(row["masks"])
    in_every = sum(count == seeds for count in row["chosen_by"].values())
    return [
        row["ablation"], str(row["budget"]), str(seeds), number(row["jaccard"], 2), number(row["by_chance"], 2),
        str(in_every),
    ]  # fmt: skip


def _relearning(relearning: Mapping[str, Any]) -> str:
    parts, models = [], relearning["models"]
    for examples, by_model in relearned(models).items():
        steps = sorted({row["step"] for rows in by_model.values() for row in rows})
        cells = []
        for name in models:
            at = {row["step"]: row["toxicity"]["value"] for row in by_model.get(name, [])}
            cells.append([name, *(number(at.get(step), 2) for step in steps)])
        table = markdown_table(["model", *map(str, steps)], cells)
        parts += [f"### Toxicity by step, relearning from {examples}", table]
    few_shot = {name: model["few_shot"] for name, model in models.items() if model.get("few_shot")}
    if few_shot:
        rows = [[name, interval(one["without"], 2), interval(one["with"], 2)] for name, one in few_shot.items()]
        table = markdown_table(["model", "prompt alone", "after examples"], rows)
        parts += ["### Toxic examples in the context", table]
    return "\n\n".join(parts)
