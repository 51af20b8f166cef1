"""Sections on the models of a `report.json`: key figures, losses and continuations, comparison, relearning."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from circuit_breaking.evaluation.pareto import pareto
from circuit_breaking.evaluation.report_markdown import COSTS_HEADING
from circuit_breaking.evaluation.result_files import (
    COSTS,
    EVIDENCE,
    ORIGINAL,
    RELEARNING,
    UNIFORM,
    read_costs,
    read_evidence,
    read_relearning,
    read_report,
    relearned,
)
from circuit_breaking.evaluation.tables import (
    COSTS_TEXT,
    FEW,
    costs_table,
    every_measure,
    interval,
    main_measures,
    number,
)
from circuit_breaking.figures.browser.parts import Part, Plot, Plots, Section, Table, Text
from circuit_breaking.figures.browser.traces import SYMBOLS, axes, band, line, points
from circuit_breaking.figures.edge_effects import EFFECTS, TEXTS
from circuit_breaking.figures.loss_by_toxicity import read_curves
from circuit_breaking.figures.relearning import CONTEXTS
from circuit_breaking.figures.style import comparison_styles, readable
from circuit_breaking.runs.results import REPORT

MANY = 8  # models; of more, only those that are no random edges have points


def key_figures(folder: Path) -> list[tuple[str, str]]:
    """Pairs of a label and a figure for the top of the page: of a report with one mask, before and after."""
    if not (folder / REPORT).is_file():
        return []
    report = read_report(folder)
    models = {name: one for name, one in report["models"].items() if one.get("kind") != "random"}
    before, others = models.get(ORIGINAL), [name for name in models if name != ORIGINAL]
    if before is None or len(others) != 1:
        return _compared(models)
    after, found = models[others[0]], []
    if (cut := after.get("edges_cut")) is not None and report.get("n_edges"):
        found.append(("edges cut", f"{cut} of {report['n_edges']:,}"))
    for label, path, percent in (
        ("toxic continuations", ("continuations", "toxic", "toxic_share"), True),
        ("loss on toxic text, nats", ("losses", "toxic"), False),
        ("loss on ordinary text, nats", ("losses", "ordinary"), False),
    ):
        pair = [_value(one, path) for one in (before, after)]
        if None not in pair:
            found.append((label, " → ".join(f"{value:.0%}" if percent else number(value) for value in pair)))
    return found


def _compared(models: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How many models are compared, and how many masks are on the Pareto front."""
    found = [("models compared", str(len(models)))]
    if all("kind" in one for one in models.values()):
        front = pareto(models)
        if front["masks"] and front["baselines"]:
            on = sum(not one["beaten_by"] for one in front["masks"].values())
            found.append(("fine-tuned models", str(len(front["baselines"]))))
            label = f"masks of at most {front['most_edges']} edges on the Pareto front"
            found.append((label, f"{on} of {len(front['masks'])}"))
    return found


def _value(model: Mapping[str, Any], path: Iterable[str]) -> float | None:
    found: Any = model
    for name in path:
        found = (found or {}).get(name)
    return (found or {}).get("value")


def models(folder: Path) -> Section | None:
    """Every measure of the models with its interval, as a table and as plots."""
    if not (folder / REPORT).is_file():
        return None
    report = read_report(folder)
    found = {name: one for name, one in report["models"].items() if one.get("kind") != "random"}
    header, rows = every_measure(report) if len(report["models"]) <= FEW else main_measures(report)
    scorer = report.get("scorer") or {}
    about = "Brackets hold 95% bootstrap intervals over texts or prompts. Losses are in nats per token."
    if scorer.get("name"):
        about = f"Toxicity is scored by {scorer['name']} {scorer.get('version', '')}. {about}"
    parts: list[Part] = [Text(about), Table(header, rows)]
    styles = comparison_styles(folder, found)
    names = dict(list(found.items())[:MANY]) if len(found) > MANY else found
    measures = {
        "next-token loss": ("nats per token", {name: one["losses"] for name, one in names.items()}),
        "toxic continuations": ("share", {name: _after(one, "toxic_share") for name, one in names.items()}),
        "incoherence of continuations": (
            f"perplexity under {report.get('reference', ORIGINAL)}",
            {name: _after(one, "perplexity") for name, one in names.items()},
        ),
    }
    if len(found) <= MANY:
        parts.append(Plots([_points(title, unit, sets, styles) for title, (unit, sets) in measures.items()]))
    notes = [f"{name}: {one['note']}." for name, one in report["models"].items() if one.get("note")]
    return Section("Models", [*parts, *map(Text, notes)])


def _after(model: Mapping[str, Any], measure: str) -> dict[str, Any]:
    return {prompts: one[measure] for prompts, one in model["continuations"].items() if measure in one}


def _points(title: str, unit: str, models: Mapping[str, Mapping[str, Any]], styles: Mapping[str, Any]) -> Plot:
    """A point with its interval for each model and set of texts or prompts; models lie side by side."""
    keys = list(dict.fromkeys(key for sets in models.values() for key in sets))
    step, traces = min(0.16, 0.8 / max(len(models), 1)), []
    for place, (name, sets) in enumerate(models.items()):
        here = [at for at, key in enumerate(keys) if (sets.get(key) or {}).get("value") is not None]
        x = [at + step * (place - (len(models) - 1) / 2) for at in here]
        style = styles[name]
        traces.append(points(readable(name), x, [sets[keys[at]] for at in here], style["color"], style["marker"]))
    ticks = {
        "tickvals": list(range(len(keys))),
        "ticktext": keys,
        "range": [-0.6, len(keys) - 0.4],
        "zeroline": False,
    }
    y = {"tickformat": ".0%", "range": [-0.03, 1.05]} if unit == "share" else {"rangemode": "tozero"}
    return Plot(title, traces, axes("", "" if unit == "share" else unit, xaxis=ticks, yaxis=y))


def uniform(folder: Path) -> Section | None:
    """Loss of each model against the toxicity of the text."""
    if not (folder / UNIFORM).is_file():
        return None
    at, curves, about = read_curves(folder)
    styles, traces = comparison_styles(folder, about), []
    for name, (mean, low, high) in curves.items():
        traces += band(readable(name), at, low, high, styles[name]["color"])
        traces.append(line(readable(name), at, mean, styles[name]["color"], legendgroup=readable(name)))
    layout = axes("toxicity of the text", "loss, nats per token", yaxis={"rangemode": "tozero"})
    plot = Plot("running mean and 95% bootstrap interval", traces, layout)
    return Section("Loss by toxicity of the text", [Plots([plot])])


def evidence(folder: Path) -> Section | None:
    """The effect of each cut edge, alone and with the others cut."""
    if not (folder / EVIDENCE).is_file():
        return None
    found = read_evidence(folder)
    parts: list[Part] = [
        Text(
            "Restored: how far the loss falls when only this edge is restored and the others stay cut. Cut alone: how "
            "far the loss rises when only this edge is cut."
        )
    ]
    plots, tables = [], []
    for name, mask in found["masks"].items():
        edges = sorted(mask["edges"], key=lambda row: -(row["restore_effect"]["toxic"]["value"] or 0.0))
        names = [row["edge"] for row in edges]
        traces = [
            points(f"{text}, {label}", [row[effect][text] for row in edges], names, colour, marker)
            for text, colour in TEXTS.items()
            for effect, (marker, label) in EFFECTS.items()
        ]
        y = {"type": "category", "autorange": "reversed"}
        plots.append(
            Plot(readable(name), traces, axes("change of the loss, nats", "", yaxis=y, height=260 + 18 * len(edges)))
        )
        rows = [[row["edge"], *(interval(row[effect][text]) for text in TEXTS for effect in EFFECTS)] for row in edges]
        header = ["edge", *(f"{text}, {way}" for text in TEXTS for way in ("restored", "cut alone"))]
        tables.append(Table(header, rows, f"{readable(name)} ({mask['ablation']} ablation)", folded=True))
    rows = [
        [f"{row['ablation']}, {row['budget']} edges", str(len(row["masks"])), number(row["jaccard"], 2),
         number(row["by_chance"], 2)]
        for row in found["stability"]
    ]  # fmt: skip
    stable = [Table(["masks", "seeds", "Jaccard", "by chance"], rows, "The same edges over seeds")] if rows else []
    return Section("Evidence for each edge", [*parts, Plots(plots), *tables, *stable])


def relearning(folder: Path) -> Section | None:
    """Toxicity while a model is fine-tuned on toxic examples, and with examples in its context."""
    if not (folder / RELEARNING).is_file():
        return None
    found = read_relearning(folder)["models"]
    styles, plots = comparison_styles(folder, found), []
    y = {"range": [-0.03, 1.05]}
    for examples, by_model in relearned(found).items():
        traces = []
        for name, all_rows in by_model.items():
            rows = [row for row in all_rows if row["toxicity"]["value"] is not None]
            marker = {"size": 6, "symbol": SYMBOLS.get(styles[name]["marker"], "circle")}
            x, values = [row["step"] for row in rows], [row["toxicity"]["value"] for row in rows]
            traces.append(line(readable(name), x, values, styles[name]["color"], marker=marker))
        plots.append(Plot(f"relearning from {examples}", traces, axes("step", "mean toxicity", yaxis=y)))
    few = {name: one["few_shot"] for name, one in found.items() if one.get("few_shot")}
    if few:
        traces = [
            points(readable(name), list(CONTEXTS.values()), [one[key] for key in CONTEXTS], styles[name]["color"],
                   styles[name]["marker"])
            for name, one in few.items()
        ]  # fmt: skip
        layout = axes("", "mean toxicity", xaxis={"type": "category"}, yaxis=y)
        plots.append(Plot("toxic examples in the context", traces, layout))
    notes = [Text(f"{name}: {one['note']}.") for name, one in found.items() if one.get("note")]
    return Section("Does it come back?", [Plots(plots), *notes])


def costs(folder: Path) -> Section | None:
    """What making each model cost."""
    found = read_costs(folder) if (folder / COSTS).is_file() else {}
    return Section(COSTS_HEADING, [Text(COSTS_TEXT), Table(*costs_table(found))]) if found else None
