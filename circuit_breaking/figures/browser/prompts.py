"""Sections on tasks of prompts: measures of models, comparison of methods, faithfulness, next tokens, pruning."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from circuit_breaking.evaluation.tables import interval, number
from circuit_breaking.figures.browser.parts import Plot, Plots, Section, Table, Text
from circuit_breaking.figures.browser.traces import SYMBOLS, axes, band, level, line, points
from circuit_breaking.figures.indirect_objects import (
    COMPARED,
    PANELS,
    read_comparison,
    read_models,
    read_next_tokens,
    read_stages,
)
from circuit_breaking.figures.style import BLUE, COLOURS, DARK_GREY, GREY, LIGHT_GREY, MARKERS, VERMILION
from circuit_breaking.runs.checked_json import CheckedJson
from circuit_breaking.runs.ioi_results import IOI_COMPARISON, IOI_REPORT, Covering, Faithfulness
from circuit_breaking.runs.records import read_value

FAITHFULNESS, COVERING, STAGES, NEXT_TOKENS = "faithfulness.json", "covering.json", "stages.json", "next_tokens.json"
HINT = "Make it with the scripts of ioi/."


def measures(folder: Path) -> Section | None:
    """The measures of each model on held-out prompts, with intervals."""
    if not (folder / IOI_REPORT).is_file():
        return None
    found = read_models(folder)
    estimates = [
        {key: dict(zip(("value", "low", "high"), one.measures[key], strict=True)) for key in one.measures}
        for one in found
    ]
    rows = [
        [one.label, *(interval(mine.get(key)) for key in PANELS)] for one, mine in zip(found, estimates, strict=True)
    ]
    plots = []
    for key, title in PANELS.items():
        traces = [
            points(one.label, [mine[key]], [one.label], COLOURS[at % len(COLOURS)], MARKERS[at % len(MARKERS)])
            for at, (one, mine) in enumerate(zip(found, estimates, strict=True))
            if key in mine
        ]
        y = {"type": "category", "autorange": "reversed"}
        x = {"range": [-0.04, 1.04]} if key in ("accuracy", "probability") else {}
        layout = axes("", "", xaxis=x, yaxis=y, showlegend=False, height=170 + 26 * len(found))
        plots.append(Plot(title, traces, layout))
    about = Text("Brackets and bars are 95% bootstrap intervals over held-out prompts or texts.")
    return Section("Models", [about, Table(["model", *PANELS.values()], rows), Plots(plots)])


def comparison(folder: Path) -> Section | None:
    """Logit difference and ordinary loss by the number of edges cut, a line for each method."""
    if not (folder / IOI_COMPARISON).is_file():
        return None
    original, methods = read_comparison(folder)
    plots = []
    for column, (key, label) in enumerate(COMPARED.items(), 1):
        traces: list[Mapping[str, Any]] = []
        for at, (name, rows) in enumerate(methods.items()):
            counts = np.unique(rows[:, 0])
            groups = [rows[rows[:, 0] == count, column] for count in counts]
            colour = GREY if name == "random" else COLOURS[at % len(COLOURS)]
            if any(len(group) > 1 for group in groups):
                lows, highs = [group.min() for group in groups], [group.max() for group in groups]
                traces += band(name, counts, lows, highs, colour)
            marker = {"size": 7, "symbol": SYMBOLS[MARKERS[at % len(MARKERS)]]}
            means = [group.mean() for group in groups]
            traces.append(line(name, counts, means, colour, marker=marker, legendgroup=name))
        dashed = level(original[key], "all edges")
        plots.append(Plot(label, traces, axes("edges cut", "", xaxis={"type": "log", "dtick": 1}, **dashed)))
    return Section("Methods that choose edges", [Plots(plots)])


def faithfulness(folder: Path) -> Section | None:
    """Faithfulness of circuits of growing size, with CPR and CMD."""
    path = folder / FAITHFULNESS
    if not path.is_file():
        return None
    checked = CheckedJson(read_value(path, HINT, Faithfulness), path, HINT)
    rows, plots = [], {"cpr": [], "cmd": []}
    for at, (name, circuit) in enumerate(checked["circuits"].items()):
        seconds = circuit.get("seconds")
        rows.append(
            [name, number(circuit["cpr"].number_or_nan()), number(circuit["cmd"].number_or_nan()),
             number(seconds and seconds.number(), 1)]
        )  # fmt: skip
        for kind, traces in plots.items():
            curve = circuit["curves"][kind]
            x = [one.number() for one in curve["fractions"].rows()]
            y = [one.number_or_nan() for one in curve["faithfulness"].rows()]
            marker = {"size": 6, "symbol": SYMBOLS[MARKERS[at % len(MARKERS)]]}
            traces.append(line(name, x, y, COLOURS[at % len(COLOURS)], marker=marker))
    x = {"type": "log", "tickformat": "~%", "tickvals": [0.001, 0.01, 0.1, 1]}
    titles = {"cpr": "edges ranked by score (CPR)", "cmd": "edges ranked by absolute score (CMD)"}
    shown = [
        Plot(titles[kind], traces, axes("share of the edges kept", "faithfulness", xaxis=x, **level(1.0)))
        for kind, traces in plots.items()
    ]
    about = Text(
        f"Task {checked['task'].text()}, {checked['num_prompts'].integer()} held-out prompts, "
        f"{checked['n_edges'].integer():,} edges. Faithfulness 1: as the whole model; 0: as with all edges cut."
    )
    return Section("Faithfulness of circuits", [about, Table(["circuit", "CPR", "CMD", "seconds"], rows), Plots(shown)])


def next_tokens(folder: Path) -> Section | None:
    """The most probable tokens after one prompt, with all edges and with the mask."""
    if not (folder / NEXT_TOKENS).is_file():
        return None
    prompt, right, wrong, models = read_next_tokens(folder)
    colours, plots = {wrong: VERMILION, right: BLUE}, []
    most = max((share for bars in models.values() for _, share in bars), default=1.0)
    for name, bars in models.items():
        rows = list(range(len(bars)))  # and not the tokens, because several may look alike
        trace = {
            "type": "bar", "orientation": "h", "x": [share for _, share in bars], "y": rows, "hoverinfo": "x",
            "text": [f"{share:.2g}" for _, share in bars], "textposition": "outside", "cliponaxis": False,
            "marker": {"color": [colours.get(token, LIGHT_GREY) for token, _ in bars]},
        }  # fmt: skip
        ticks = [token.strip() or repr(token) for token, _ in bars]
        y = {"tickvals": rows, "ticktext": ticks, "autorange": "reversed", "showgrid": False, "zeroline": False}
        layout = axes("probability", "", xaxis={"range": [0, 1.2 * most]}, yaxis=y, height=130 + 24 * len(bars))
        plots.append(Plot(name, [trace], {**layout, "showlegend": False}))
    about = Text(f"After “{prompt}”: the right answer{right} is blue, the wrong one{wrong} is red.")
    return Section("Next tokens", [about, Plots(plots)])


def stages(folder: Path) -> Section | None:
    """The share of the logit difference that is left while a sufficient circuit is pruned."""
    if not (folder / STAGES).is_file():
        return None
    kept, shares, least = read_stages(folder)
    trace = line("left", kept, shares, BLUE, marker={"size": 7})
    x = {"type": "log", "autorange": "reversed"}
    layout = axes("edges kept", "", xaxis=x, yaxis={"tickformat": ".0%"}, **level(least, f"{least:.0%}", DARK_GREY))
    return Section("Pruning", [Plots([Plot("logit difference left", [trace], layout)])])


def covering(folder: Path) -> Section | None:
    """Masks that each break the behaviour without the edges of those before, and their union."""
    path = folder / COVERING
    if not path.is_file():
        return None
    checked = CheckedJson(read_value(path, HINT, Covering), path, HINT)
    rows = [["none", "0", *_covered(checked["before"])]]
    for at, mask in enumerate(checked["masks"].rows(), 1):
        rows.append([f"mask {at}", str(len(mask["edges"].rows())), *_covered(mask)])
    rows.append(["union", str(len(checked["union"]["edges"].rows())), *_covered(checked["union"])])
    return Section("Masks that share no edge", [Table(["edges cut", "edges", *COMPARED.values()], rows)])


def _covered(one: CheckedJson) -> list[str]:
    return [number(one[key].number_or_nan()) for key in COMPARED]
