"""The report of a comparison in Markdown, put together from its files only (layer 3)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from circuit_breaking.evaluation.pareto import FEW, controls, family_of, pareto
from circuit_breaking.evaluation.tables import interval, number

COSTS_HEADING = "## Costs of this run"  # what stands below it differs from run to run, and nothing above it does


def grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    lines = [f"| {' | '.join(header)} |", f"|{'|'.join(['---'] + ['--:'] * (len(header) - 1))}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def render(
    report: Mapping[str, Any],
    evidence: Mapping[str, Any] | None = None,
    relearning: Mapping[str, Any] | None = None,
    costs: Mapping[str, Any] | None = None,
    pictures: Sequence[str] = (),
    examples: str = "",
) -> str:
    """The whole report. Costs come last, under `COSTS_HEADING`; all above is determined by files without times."""
    models = report["models"]
    parts = [f"# Comparison on {report['settings']['model']}", _about(report), "## What it says", statement(models)]
    if notes := _notes(models, relearning):
        parts += ["## Notes", notes]
    parts += ["## Models", _models(models), "## After prompts", _continuations(models)]
    if any(one.get("kind") == "random" for one in models.values()):
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
        parts += [COSTS_HEADING, _costs(costs)]
    return "\n\n".join(parts) + "\n"


def _about(report: Mapping[str, Any]) -> str:
    scorer, texts, prompts = report["scorer"], report["num_texts"], report["num_prompts"]
    settings = report["settings"]
    drawn = f"{settings['samples']} continuation(s) a prompt from each of {settings['seeds']} seed(s)"
    return (
        f"Toxicity by {scorer['name']} {scorer['version']}; a continuation that scores above {scorer['threshold']} is "
        f"called toxic. Held-out texts: {texts['toxic']} toxic, {texts['ordinary']} ordinary. Prompts: "
        f"{prompts['toxic']} toxic, {prompts['ordinary']} ordinary; {drawn}. Brackets: 95% bootstrap intervals over "
        "texts or prompts. Losses in nats per token."
    )


def statement(models: Mapping[str, Any]) -> str:
    """Whether a mask of few edges is on the Pareto front, and what random edges do, in sentences with figures."""
    found, lines = pareto(models), []
    if not found["masks"]:
        lines.append(f"No mask of at most {FEW} edges was measured.")
    elif not found["baselines"]:
        lines.append("No fine-tuned model was measured, so there is nothing to compare the masks with.")
    elif on := [name for name, one in found["masks"].items() if not one["beaten_by"]]:
        lines.append(
            f"**On the Pareto front of toxicity against ordinary loss: {', '.join(on)}** (masks of at most {FEW} "
            "edges; no fine-tuned model has both lower toxicity and lower ordinary loss)."
        )
        if off := [name for name in found["masks"] if name not in on]:
            lines.append(f"Not on it: {', '.join(off)}.")
    else:
        lines.append(
            f"**No mask of at most {FEW} edges is on the Pareto front of toxicity against ordinary loss**: for each "
            "there is a fine-tuned model with both lower toxicity and lower ordinary loss."
        )
    rows = [
        [
            name,
            str(one["edges"]),
            number(one["toxicity"]),
            number(one["ordinary_loss"]),
            number(one["perplexity"]),
            ", ".join(one["beaten_by"]) or "none",
        ]
        for name, one in found["masks"].items()
    ]
    if rows:
        header = ["mask", "edges", "toxicity", "ordinary loss", "perplexity", "toxicity and ordinary loss beaten by"]
        lines.append(grid(header, rows))
    if found["baselines"]:
        rows = [
            [name, *(number(one[what]) for what in ("toxicity", "ordinary_loss", "perplexity"))]
            for name, one in found["baselines"].items()
        ]
        lines.append(grid(["fine-tuned", "toxicity", "ordinary loss", "perplexity"], rows))
        lines.append("Perplexity is that of what a model writes after toxic prompts, under the original.")
    for row in controls(models):
        if row["budget"] == FEW and row["toxicity"]["mean"] is not None:
            change = {name: row[name] for name in ("toxicity", "ordinary_loss")}
            masks = "; ".join(
                f"{name.replace('_', ' ')} {one['mean']:+.3f} ({one['lowest']:+.3f} to {one['highest']:+.3f})"
                + (f", the mask {one['mask']:+.3f}" if one["mask"] is not None else "")
                for name, one in change.items()
            )
            lines.append(
                f"{FEW} random edges ({row['ablation']} ablation, mean over {row['seeds']} seeds, lowest to highest) "
                f"change the original by: {masks}."
            )
    return "\n\n".join(lines)


def _notes(models: Mapping[str, Any], relearning: Mapping[str, Any] | None) -> str:
    notes = [f"- {name}: {one['note']}." for name, one in models.items() if one.get("note")]
    taught = (relearning or {}).get("models", {})
    notes += [f"- {name}, relearning: {one['note']}." for name, one in taught.items() if one.get("note")]
    return "\n".join(notes)


def _shown(models: Mapping[str, Any]) -> dict[str, Any]:
    return {name: one for name, one in models.items() if one.get("kind") != "random"}


def _models(models: Mapping[str, Any]) -> str:
    rows = []
    for name, one in _shown(models).items():
        changed = one.get("changed_share", {})
        toxic = one["continuations"].get("toxic", {})
        chosen = one.get("chosen") or {}
        how = [f"lr {chosen['lr']:g}, step {chosen['step']}"] if chosen else []
        how += [f"scale {chosen['scale']:g}"] if chosen.get("scale") is not None else []
        rows.append(
            [
                name,
                family_of(one) if family_of(one) != "other" else ", ".join(how) or one["kind"],
                f"{one['edges_cut']} ({changed.get('edges', 0):.1%})",
                f"{changed.get('parameters', 0):.1%}",
                interval(one["losses"].get("toxic")),
                interval(one["losses"].get("ordinary")),
                interval(toxic.get("toxicity")),
            ]
        )
    header = ["model", "how", "edges cut", "parameters changed", "toxic loss", "ordinary loss", "toxicity"]
    return grid(header, rows)


def _continuations(models: Mapping[str, Any]) -> str:
    parts = []
    for way, key in (
        ("continuations", "toxic"),
        ("continuations", "ordinary"),
        ("greedy", "toxic"),
        ("greedy", "ordinary"),
    ):
        rows = []
        for name, one in _shown(models).items():
            about = one.get(way, {}).get(key)
            if about is None:
                continue
            seeds = about.get("toxicity_by_seed")
            rows.append(
                [
                    name, interval(about["toxic_share"]), interval(about["toxicity"]),
                    ", ".join(number(value) for value in seeds) if seeds else "–",
                    interval(about["perplexity"], 2),
                    "/".join(number(about[f"distinct_{n}"]["value"], 2) for n in ("unigrams", "bigrams", "trigrams")),
                    interval(about["tokens"], 1),
                ]
            )  # fmt: skip
        if rows:
            title = f"{'Sampled' if way == 'continuations' else 'Greedy'}, after {key} prompts"
            header = ["model", "toxic share", "mean toxicity", "by seed", "perplexity under the original",
                      "distinct 1/2/3-grams", "tokens"]  # fmt: skip
            parts += [f"### {title}", grid(header, rows)]
    return "\n\n".join(parts)


def _controls(models: Mapping[str, Any]) -> str:
    rows = []
    for row in controls(models):
        cells = [row["ablation"], str(row["budget"]), str(row["seeds"])]
        for name in ("toxicity", "ordinary_loss"):
            one = row[name]
            cells += [
                f"{number(one['mean'])} ({number(one['lowest'])} to {number(one['highest'])})",
                number(one["mask"]),
            ]
        rows.append(cells)
    header = [
        "ablation",
        "edges",
        "seeds",
        "change of toxicity",
        "of the mask",
        "change of ordinary loss",
        "of the mask",
    ]
    return (
        "Mean over seeds, lowest and highest in brackets; random masks are measured on fewer texts and prompts.\n\n"
        + grid(header, rows)
    )


def _evidence(evidence: Mapping[str, Any]) -> str:
    parts = []
    for name, one in evidence["masks"].items():
        rows = [
            [
                row["edge"],
                *(
                    interval(row[way][kind])
                    for kind in ("toxic", "ordinary")
                    for way in ("restore_effect", "single_cut_effect")
                ),
            ]
            for row in one["edges"]
        ]
        together = [f"{kind} {interval(one['together'][kind])}" for kind in ("toxic", "ordinary")]
        parts += [
            f"### {name} ({one['ablation']} ablation)",
            f"All cuts together change the loss by: {', '.join(together)}. Within: by how much the loss falls when "
            "this edge alone is put back. Alone: by how much it rises when this edge alone is cut.",
            grid(["edge", "toxic, within", "toxic, alone", "ordinary, within", "ordinary, alone"], rows),
        ]
    rows = [
        [
            row["ablation"], str(row["budget"]), str(len(row["masks"])), number(row["jaccard"], 2),
            number(row["by_chance"], 2), str(sum(count == len(row["masks"]) for count in row["chosen_by"].values())),
        ]
        for row in evidence["stability"]
    ]  # fmt: skip
    if rows:
        header = ["ablation", "edges", "seeds", "Jaccard", "by chance", "edges in every mask"]
        parts += ["### The same edges over seeds", grid(header, rows)]
    return "\n\n".join(parts)


def _relearning(relearning: Mapping[str, Any]) -> str:
    parts, models = [], relearning["models"]
    for count in dict.fromkeys(count for one in models.values() for count in one["relearning"]):
        steps = sorted({row["step"] for one in models.values() for row in one["relearning"].get(count, [])})
        rows = []
        for name, one in models.items():
            at = {row["step"]: row["toxicity"]["value"] for row in one["relearning"].get(count, [])}
            rows.append([name, *(number(at.get(step), 2) for step in steps)])
        parts += [f"### Toxicity by step, relearning from {count} examples", grid(["model", *map(str, steps)], rows)]
    few = {name: one["few_shot"] for name, one in models.items() if one.get("few_shot")}
    if few:
        rows = [[name, interval(one["without"], 2), interval(one["with"], 2)] for name, one in few.items()]
        parts += ["### Toxic examples in the context", grid(["model", "prompt alone", "after examples"], rows)]
    return "\n\n".join(parts)


def _costs(costs: Mapping[str, Any]) -> str:
    rows = [
        [
            name,
            *(number(one.get(key), 1) for key in ("seconds", "cpu_seconds", "seconds_with_tuning")),
            number(one.get("peak_gb")),
        ]
        for name, one in costs.items()
    ]
    return (
        "Seconds of making each model, by the clock and of the CPU, and peak memory above what was held before; with "
        "tuning: all learning rates, by the clock. Measured, and so not the same twice.\n\n"
        + grid(["model", "seconds", "CPU seconds", "with tuning", "peak memory, GB"], rows)
    )
