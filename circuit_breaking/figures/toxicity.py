"""Figures of a comparison of models, drawn from its files only, so that any is redrawn without a rerun (layer 3)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, SymmetricalLogLocator

from circuit_breaking.errors import UserError
from circuit_breaking.evaluation.bootstrap import running_mean
from circuit_breaking.evaluation.pareto import family_of, models_of, point_of
from circuit_breaking.figures.style import COLOURS, MARKERS, figure, from_results
from circuit_breaking.runs.files import read_csv, read_json, read_jsonl

UNIFORM = "uniform.csv"  # a row a text: its toxicity, and each model's loss per token
EVIDENCE = "evidence.json"
RELEARNING = "relearning.json"
GREY = "#8C8C8C"
FAMILY_STYLES = {  # of what is drawn as a line over budgets
    "mask, zero ablation": {"color": COLOURS[0], "marker": "o"},
    "mask, mean ablation": {"color": COLOURS[5], "marker": "s"},
    "mask, optimal ablation": {"color": "#0B3C5D", "marker": "^"},
    "random edges, zero ablation": {"color": GREY, "marker": "x"},
    "random edges, mean ablation": {"color": "#BDBDBD", "marker": "+"},
    "random edges, optimal ablation": {"color": "#5C5C5C", "marker": "1"},
}
LINEAR = 0.03  # rise of ordinary loss up to which the axis is linear, nats


def other_style(number: int) -> dict[str, str]:
    """Colour and marker of the model of this number among those that are no mask."""
    colours = (COLOURS[1], COLOURS[2], COLOURS[3], COLOURS[4], COLOURS[7], "#7A4B00", "#4B0082")
    return {"color": colours[number % len(colours)], "marker": "D^vP*Xs"[number % 7]}


@from_results
def draw_sweep(folder: Path | str) -> Path:
    """Toxicity of continuations against the rise of ordinary loss: masks of every budget, random edges, all others.

    Reads `report.json`, writes `sweep.png`. The rise is over the original on the same texts. Bars are 95% bootstrap
    intervals; random edges are the mean over seeds. Close to 0 the x axis is linear, beyond it logarithmic.
    """
    folder = Path(folder)
    models = models_of(folder)
    path = folder / "sweep.png"
    lines: dict[str, dict[int, list[tuple]]] = {}
    with figure(path, 7.2, 4.2) as drawn:
        axes = drawn.subplots()
        axes.axvline(0, color="#000000", linewidth=0.7, linestyle=(0, (3, 3)))
        others = [name for name, one in models.items() if family_of(one) == "other"]
        for name, one in models.items():
            where, family = _rise_and_toxicity(one), family_of(one)
            if where is None:
                continue
            if family in FAMILY_STYLES:
                if one["kind"] == "random" or one.get("seed") in (None, _first_seed(models, family)):
                    lines.setdefault(family, {}).setdefault(one["budget"], []).append(where)
            elif one["kind"] == "original":
                _bar(axes, where, label="original", color="#000000", marker="*", markersize=9)
            else:
                _bar(axes, where, label=name.replace("_", " "), **other_style(others.index(name)))
        for family in FAMILY_STYLES:
            if family in lines:
                _line(axes, family, lines[family])
        axes.set(xlabel="rise of the loss on held-out ordinary text, nats per token", yscale="log", ylim=(None, 1.3))
        axes.set_ylabel("toxicity after toxic prompts, mean")
        axes.set_xscale("symlog", linthresh=LINEAR, linscale=1.5)
        axes.set_xlim(left=1.3 * min(-LINEAR / 4, axes.dataLim.x0))
        axes.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=LINEAR, subs=(1, 3)))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        drawn.legend(loc="outside right upper", fontsize=7)
    return path


def _rise_and_toxicity(one: Mapping[str, Any]) -> tuple[Mapping[str, float], Mapping[str, float]] | None:
    """Entries for x and y; the original, to which all are compared, has rise 0."""
    where = point_of(one)
    if where is None:
        return None
    rise = where[1].get("change") or ({"value": 0.0, "low": 0.0, "high": 0.0} if one["kind"] == "original" else None)
    return None if rise is None else (rise, where[0])


def _first_seed(models: Mapping[str, Any], family: str) -> int | None:
    return min(
        (one["seed"] for one in models.values() if family_of(one) == family and one.get("seed") is not None),
        default=None,
    )


def _bar(axes: Any, where: tuple, **style: Any) -> None:
    style = {"markersize": 5, "linestyle": "none", "elinewidth": 0.8, "zorder": 3, **style}
    axes.errorbar(where[0]["value"], where[1]["value"], xerr=_ends(where[0]), yerr=_ends(where[1]), **style)


def _ends(entry: Mapping[str, float]) -> np.ndarray:
    return np.abs([[entry["value"] - entry["low"]], [entry["high"] - entry["value"]]])


def _line(axes: Any, family: str, rows: Mapping[int, list[tuple]]) -> None:
    """A point a budget, of several seeds the mean, the number of edges beside it; masks are joined by a line."""
    style, mask = FAMILY_STYLES[family], family.startswith("mask")
    means = np.array([np.mean([[entry["value"] for entry in where] for where in rows[b]], 0) for b in sorted(rows)])
    axes.plot(*means.T, label=family, markersize=4.5, linewidth=1.0 if mask else 0.0, zorder=2, **style)
    for budget, at in zip(sorted(rows), means, strict=True):
        if mask:
            _bar(axes, rows[budget][0], color=style["color"], marker="none", alpha=0.5)
        axes.annotate(str(budget), at, xytext=(3.5, 3.5), textcoords="offset points", fontsize=6, color=style["color"])


@from_results
def draw_models(folder: Path | str) -> Path:
    """The main measures of every model but random masks, a row a model, with 95% intervals.

    Reads `report.json`, writes `models.png`.
    """
    folder = Path(folder)
    models = {name: one for name, one in models_of(folder).items() if one.get("kind") != "random"}
    panels = {
        "loss on ordinary text": lambda one: one["losses"].get("ordinary"),
        "loss on toxic text": lambda one: one["losses"].get("toxic"),
        "toxicity after\ntoxic prompts": lambda one: one["continuations"].get("toxic", {}).get("toxicity"),
        "toxicity after\nordinary prompts": lambda one: one["continuations"].get("ordinary", {}).get("toxicity"),
        "perplexity after\nordinary prompts": lambda one: one["continuations"].get("ordinary", {}).get("perplexity"),
    }
    path = folder / "models.png"
    with figure(path, 7.4, 1.0 + 0.19 * len(models)) as drawn:
        axes = drawn.subplots(1, len(panels), sharey=True)
        for place, (title, measure) in zip(axes, panels.items(), strict=True):
            for row, (_, one) in enumerate(models.items()):
                entry = measure(one)
                if entry is None or entry["value"] is None:
                    continue
                baseline = one["kind"] == "finetuned"
                style = {"color": COLOURS[1] if baseline else COLOURS[6 if one["kind"] == "original" else 0]}
                place.errorbar(
                    entry["value"], row, xerr=_ends(entry), fmt=MARKERS[0], markersize=3, elinewidth=1, **style
                )
            reference = measure(models["original"]) if "original" in models else None
            if reference is not None and reference["value"] is not None:
                place.axvline(reference["value"], color="#000000", linewidth=0.6, linestyle=(0, (3, 3)))
            place.set_title(title, fontsize=8)
            place.grid(axis="y", visible=False)
            values = [measure(one)["value"] for one in models.values() if measure(one) and measure(one)["value"]]
            if values and min(values) > 0 and max(values) > 20 * min(values) and "toxicity" not in title:
                place.set_xscale("log")
        axes[0].set_yticks(range(len(models)), [name.replace("_", " ") for name in models])
        axes[0].set_ylim(len(models) - 0.5, -0.5)
    return path


@from_results
def draw_uniform(folder: Path | str, names: tuple[str, ...] | None = None, width: float = 0.15) -> Path:
    """Loss of each model against the toxicity of a text: running mean and its 95% bootstrap band (the paper's figure).

    Reads `uniform.csv`, writes `uniform.png`.

    Args:
        folder: of the run.
        names: models to draw; None: the original, what is fine-tuned, and masks of at most 25 edges.
        width: of the running mean's triangular kernel, to either side.
    """
    folder = Path(folder)
    rows = read_csv(folder / UNIFORM, "Make it with toxicity/evaluation.py.")
    if not rows:
        raise UserError(f"{folder / UNIFORM} holds no rows. Make it with toxicity/evaluation.py.")
    toxicity = np.array([float(row["toxicity"]) for row in rows])
    names = names or tuple(_for_uniform(folder, [name for name in rows[0] if name != "toxicity"]))
    at, path = np.linspace(0, 1, 51), folder / "uniform.png"
    with figure(path, 5.6, 3.4) as drawn:
        axes = drawn.subplots()
        for number, name in enumerate(names):
            cells = [row.get(name) for row in rows]
            kept = np.array([bool(cell) for cell in cells])
            if not kept.any():
                continue
            values = np.array([float(cell) for cell in cells if cell])
            mean, low, high = running_mean(toxicity[kept], values, at, width)
            colour = COLOURS[6] if name == "original" else (*COLOURS[:6], COLOURS[7], "#7A4B00")[(number - 1) % 8]
            axes.plot(at, mean, color=colour, label=name.replace("_", " "))
            axes.fill_between(at, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.set(xlabel="toxicity of the text", ylabel="loss, nats per token", xlim=(0, 1))
        axes.set_ylim(bottom=0)
        drawn.legend(loc="outside right upper")
    return path


def _for_uniform(folder: Path, names: list[str]) -> list[str]:
    """Not every budget: the original, fine-tuned models, and the largest mask of at most 12 edges of each kind."""
    if len(names) <= 8:
        return names
    models = read_json(folder / "report.json")["models"]
    largest: dict[str, str] = {}
    for name in names:
        one = models[name]
        if one["kind"] == "mask" and one["edges_cut"] <= 12:
            known = models.get(largest.get(family_of(one)), {}).get("edges_cut", -1)
            if one["edges_cut"] > known:
                largest[family_of(one)] = name
    return [name for name in names if models[name]["kind"] != "mask" or name in largest.values()]


@from_results
def draw_finetuning(folder: Path | str) -> Path:
    """Losses of every checkpoint on validation texts, by step: a column a method, a colour a learning rate.

    Reads `<method>/metrics.jsonl` and `<method>/finetuning.json`, writes `finetuning.png`. The star is the checkpoint
    that was kept.
    """
    folder = Path(folder)
    methods = sorted(path.parent for path in folder.glob("*/finetuning.json"))
    if not methods:
        raise UserError(f"{folder} holds no fine-tuned models. Make some with toxicity/finetune_gpt2.py.")
    rates = sorted({row["lr"] for method in methods for row in read_jsonl(method / "metrics.jsonl")})
    path = folder / "finetuning.png"
    with figure(path, 1.2 + 1.5 * len(methods), 3.4) as drawn:
        axes = drawn.subplots(2, len(methods), sharex="col", sharey="row", squeeze=False)
        for column, method in enumerate(methods):
            rows, chosen = read_jsonl(method / "metrics.jsonl"), read_json(method / "finetuning.json")["chosen"]
            for place, what in zip(axes[:, column], ("toxic", "ordinary"), strict=True):
                for number, lr in enumerate(rates):
                    mine = [row for row in rows if row["lr"] == lr and row[what] is not None]
                    place.plot(
                        [row["step"] for row in mine], [row[what] for row in mine],
                        color=COLOURS[number % 6], linewidth=1, label=f"lr {lr:g}",
                    )  # fmt: skip
                place.plot(chosen["step"], chosen[what], "*", color="#000000", markersize=7, label="kept")
            axes[0, column].set_title(method.name.replace("_", " "))
            axes[1, column].set_xlabel("step")
        axes[0, 0].set_ylabel("toxic loss, nats")
        axes[1, 0].set_ylabel("ordinary loss, nats")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        drawn.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=len(unique))
    return path


@from_results
def draw_evidence(folder: Path | str) -> Path:
    """What each cut does to both losses, within its mask and alone, and how alike masks of other seeds are.

    Reads `evidence.json`, writes `evidence.png`.
    """
    folder = Path(folder)
    report = read_json(folder / EVIDENCE, "Make it with toxicity/edge_evidence.py.")
    masks, stable = report["masks"], report["stability"]
    path = folder / "evidence.png"
    longest = max((len(one["edges"]) for one in masks.values()), default=1)
    with figure(path, 2.6 * max(len(masks), 1) + (2.6 if stable else 0), 1.7 + 0.28 * max(longest, 4)) as drawn:
        axes = drawn.subplots(1, len(masks) + bool(stable), squeeze=False)[0]
        for place, (name, one) in zip(axes, masks.items(), strict=False):
            _edge_effects(place, one["edges"])
            place.set_title(name.replace("_", " "))
        handles, labels = axes[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=7)
        if stable:
            rows = [f"{row['ablation']}, {row['budget']} edges\n{len(row['masks'])} seeds" for row in stable]
            axes[-1].barh(range(len(rows)), [row["jaccard"] for row in stable], height=0.5, color=COLOURS[0])
            axes[-1].plot([row["by_chance"] for row in stable], range(len(rows)), "|", color="#000000", markersize=14)
            axes[-1].set_yticks(range(len(rows)), rows)
            axes[-1].set(xlim=(0, 1), ylim=(len(rows) - 0.5, -0.5), title="same edges over seeds")
            axes[-1].set_xlabel("Jaccard similarity\n(black: by chance)")
            axes[-1].grid(axis="y", visible=False)
    return path


def _edge_effects(axes: Any, edges: list[Mapping[str, Any]]) -> None:
    edges = sorted(edges, key=lambda row: -row["restore_effect"]["toxic"]["value"])
    for at, (way, kind) in enumerate(
        (w, k) for k in ("toxic", "ordinary") for w in ("restore_effect", "single_cut_effect")
    ):
        entries = [row[way][kind] for row in edges]
        axes.errorbar(
            [entry["value"] for entry in entries],
            np.arange(len(edges)) + 0.16 * (at - 1.5),
            xerr=np.concatenate([_ends(entry) for entry in entries], 1),
            fmt="o" if way == "restore_effect" else "x",
            color=COLOURS[1 if kind == "toxic" else 0],
            markersize=3,
            elinewidth=0.8,
            label=f"{kind} loss, cut {'with the others' if way == 'within' else 'alone'}",
        )
    axes.axvline(0, color="#000000", linewidth=0.6)
    axes.set_yticks(range(len(edges)), [row["edge"] for row in edges])
    axes.set_ylim(len(edges) - 0.5, -0.5)
    axes.set_xlabel("change of the loss, nats")
    axes.grid(axis="y", visible=False)


@from_results
def draw_relearning(folder: Path | str) -> Path:
    """Toxicity by step of relearning, a panel for each number of examples; and with examples in the context.

    Reads `relearning.json`, writes `relearning.png`.
    """
    folder = Path(folder)
    models = read_json(folder / RELEARNING, "Make it with toxicity/relearn.py.")["models"]
    counts = list(dict.fromkeys(count for one in models.values() for count in one["relearning"]))
    few = {name: one["few_shot"] for name, one in models.items() if one.get("few_shot")}
    path = folder / "relearning.png"
    with figure(path, 2.4 * len(counts) + (2.6 if few else 0), 3.3 + 0.1 * len(models)) as drawn:
        axes = drawn.subplots(1, len(counts) + bool(few), squeeze=False)[0]
        for number, (name, one) in enumerate(models.items()):
            style = _style(name, number, one["kind"])
            for place, count in zip(axes, counts, strict=False):
                rows = [row for row in one["relearning"].get(count, []) if row["toxicity"]["value"] is not None]
                steps, values = [row["step"] for row in rows], [row["toxicity"]["value"] for row in rows]
                place.plot(steps, values, markersize=3.5, linewidth=1.1, label=name.replace("_", " "), **style)
            if name in few:
                for at, way in enumerate(("without", "with")):
                    entry, place = few[name][way], axes[-1]
                    if entry["value"] is not None:
                        place.errorbar(
                            at + 0.05 * (number - len(models) / 2), entry["value"], yerr=_ends(entry), markersize=4,
                            elinewidth=0.8, linestyle="none", **style,
                        )  # fmt: skip
        for place, count in zip(axes, counts, strict=False):
            place.set(xlabel="step", title=f"relearning from {count} examples", ylim=(-0.03, 1.03))
        if few:
            axes[-1].set(title="toxic examples in the context", xlim=(-0.6, 1.6), ylim=(-0.03, 1.03))
            axes[-1].set_xticks([0, 1], ["prompt alone", "after examples"])
        axes[0].set_ylabel("toxicity after toxic prompts, mean")
        handles, labels = axes[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7)
    return path


def _style(name: str, number: int, kind: str) -> dict[str, str]:
    """Of a mask whose name says its ablation, that of the sweep; of other masks, one in turn."""
    if kind == "original":
        return {"color": "#000000", "marker": "*"}
    if kind != "mask":
        return other_style(number)
    styles = [style for family, style in FAMILY_STYLES.items() if family.startswith("mask")]
    return FAMILY_STYLES.get(f"mask, {name.partition('_')[0]} ablation", styles[number % len(styles)])
