"""The section that compares many models: the plane of toxicity and ordinary loss, the Pareto front, random edges."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from circuit_breaking.evaluation.controls import controls
from circuit_breaking.evaluation.pareto import pareto
from circuit_breaking.evaluation.result_files import read_models
from circuit_breaking.evaluation.tables import interval, number
from circuit_breaking.figures.browser.parts import Part, Plot, Plots, Section, Table
from circuit_breaking.figures.browser.traces import axes, points
from circuit_breaking.figures.pareto import LINEAR, TICKS, Point, read_points
from circuit_breaking.figures.style import FAMILY_STYLES, comparison_styles, readable
from circuit_breaking.runs.results import REPORT


def comparison(folder: Path) -> Section | None:
    """Toxicity against ordinary loss of many models, which masks are on the Pareto front, and random edges."""
    if not (folder / REPORT).is_file():
        return None
    found = read_models(folder)
    masks = [name for name, one in found.items() if one.get("kind") in ("mask", "finetuned")]
    if len(masks) < 2 or not all("kind" in one for one in found.values()):
        return None
    parts: list[Part] = [Plots([_pareto(folder)])]
    front = pareto(found)
    if front["masks"] and front["baselines"]:
        rows = [
            [name, str(one["edges"]), number(one["toxicity"]), number(one["ordinary_loss"]), number(one["perplexity"]),
             ", ".join(one["beaten_by"]) or "none"]
            for name, one in front["masks"].items()
        ]  # fmt: skip
        header = ["mask", "edges", "toxicity", "ordinary loss", "perplexity", "beaten in both by"]
        caption = f"Masks of at most {front['most_edges']} edges, and fine-tuned models lower in toxicity and loss"
        parts.append(Table(header, rows, caption))
    rows = [
        [one["ablation"], str(one["budget"]), str(one["seeds"])]
        + [cell for key in ("toxicity", "ordinary_loss") for cell in (_range(one[key]), number(one[key]["mask"]))]
        for one in controls(found)
    ]
    if rows:
        header = ["ablation", "edges", "seeds", "toxicity", "by the mask", "ordinary loss", "by the mask"]
        parts.append(Table(header, rows, "Change by random edges: mean over seeds (lowest to highest)"))
    return Section("Comparison", parts)


def _range(change: Mapping[str, Any]) -> str:
    return f"{number(change['mean'])} ({number(change['lowest'])} to {number(change['highest'])})"


def _pareto(folder: Path) -> Plot:
    found = read_points(folder)
    alone = [point for point in found if point.series is None]
    styles = comparison_styles(folder, {point.name: {} for point in alone})
    traces = [_trace(readable(one.name), [one], styles[one.name]["color"], styles[one.name]["marker"]) for one in alone]
    series: dict[tuple[str, str, str], list[Point]] = {}
    for point in found:
        if point.series is not None:
            series.setdefault(point.series, []).append(point)
    for key, members in series.items():
        style, label = FAMILY_STYLES[key[0]], ", ".join(filter(None, (key[0], *map(readable, key[1:]))))
        trace = _trace(label, sorted(members, key=lambda point: point.budget or 0), style["color"], style["marker"])
        if key[0].startswith("mask"):
            trace |= {"mode": "lines+markers", "line": {"width": 1, "color": style["color"]}}
        traces.append(trace)
    ticks = [tick for tick in TICKS if tick <= max((point.rise["high"] for point in found), default=0.0)]
    ticks = [-LINEAR, 0.0, *ticks, *TICKS[len(ticks) : len(ticks) + 1]]
    layout = axes(
        "rise of the loss on ordinary text, nats per token", "toxicity after toxic prompts",
        xaxis={"tickvals": [_symlog(tick) for tick in ticks], "ticktext": [f"{tick:g}" for tick in ticks]},
        yaxis={"type": "log", "tickvals": [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1], "tickformat": "~g"}, height=480,
    )  # fmt: skip
    return Plot("toxicity against ordinary loss", traces, layout)


def _trace(label: str, members: Sequence[Point], colour: str, marker: str) -> dict[str, Any]:
    rises = [{end: _symlog(value) for end, value in point.rise.items() if end != "change"} for point in members]
    texts = [
        f"{point.name}: rise {interval(point.rise)}, toxicity {interval(point.toxicity)}"
        + (f", {point.budget} edges" if point.budget is not None else "")
        for point in members
    ]
    trace = points(label, rises, [point.toxicity for point in members], colour, marker)
    return {**trace, "text": texts, "hoverinfo": "text"}


def _symlog(value: float) -> float:
    """Position on an axis that is linear up to `LINEAR` and logarithmic beyond, which Plotly does not have."""
    return math.copysign(math.log1p(abs(value) / LINEAR), value)
