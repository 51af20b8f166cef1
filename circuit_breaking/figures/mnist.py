"""Pictures of a run, drawn from the files in its folder only, so that they can be redrawn without a rerun.

`accuracy_<variant>.png`: accuracy by step with the edges cut on a second axis, the paper's figure.
`pixels.png`: from which pixels edges were cut, beside the mean image of the target class.
`comparison.png`: all variants at their last step.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from circuit_breaking.errors import UserError
from circuit_breaking.runs.files import atomic_path, read_json, read_jsonl
from circuit_breaking.runs.tensors import read_tensors

HINT = "Give the folder of a finished run of mnist/main.py or mnist/old.py."
DPI = 200
# colours of Okabe and Ito (2008), told apart by colour-blind readers too
CURVES = {  # set -> label ({t} is the target class, {m} its mates), colour, line
    "test other": ("test, not {t}", "#0072B2", "-"),
    "train other": ("train, not {t}", "#0072B2", ":"),
    "test mates": ("test {m}", "#009E73", "-"),
    "test target": ("test {t}, held out", "#D55E00", "-"),
    "train target": ("train {t}", "#D55E00", ":"),
    "bad examples": ("{n} bad examples", "#CC79A7", "--"),
    "test target as reference": ("test {t} labelled as by a\nnetwork that never saw {t}", "#E69F00", "-."),
}
BARS = ("test target", "test mates", "test other")
STYLE = {"fontsize": 9}


def draw_run(folder: Path) -> list[Path]:
    """Draw every picture of a run folder; returns their paths. Missing or damaged files are a `UserError`."""
    report = read_json(folder / "report.json", HINT)
    rows = read_jsonl(folder / "metrics.jsonl", HINT)
    masks, _ = read_tensors(folder / "mask.safetensors", HINT)
    try:
        names = dict.fromkeys(row["variant"] for row in rows)
        figures = {
            f"accuracy_{re.sub(r'[^a-z0-9]+', '_', name)}": _accuracy(
                [row for row in rows if row["variant"] == name], name, report
            )
            for name in names
        }
        target = masks.pop("mean target image").numpy()
        figures["pixels"] = _pixels({name: masks[name].numpy() for name in names if name in masks}, target, report)
        figures["comparison"] = _comparison(report)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"the files in {folder} are not those of one run ({error!r}). {HINT}") from error
    paths = []
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        FigureCanvasAgg(figure)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=DPI, format="png", bbox_inches="tight", pad_inches=0.05)
        paths.append(path)
    return paths


def _words(text: str, report: dict[str, Any]) -> str:
    target = report["target_class"]
    mates = " and ".join(f"{mate}s" for mate in report["mates"])
    return text.format(t=f"{target}s", m=f"{mates} (same group)", n=report["images"]["bad examples"])


def _tidy(axes: Axes) -> None:
    axes.spines["top"].set_visible(False)
    axes.tick_params(labelsize=8)


def _accuracy(rows: list[dict[str, Any]], name: str, report: dict[str, Any]) -> Figure:
    """Accuracy by step; edges cut on the right-hand axis."""
    figure = Figure(figsize=(7.0, 3.4), layout="constrained")
    axes = figure.subplots()
    steps = [row["step"] for row in rows]
    lines = []
    one_a_step = report["script"].endswith("old.py")  # then the steps count the edges already
    if not one_a_step and any(row["edges cut"] for row in rows):
        right = axes.twinx()
        cut = [row["edges cut"] for row in rows]
        right.fill_between(steps, cut, color="0.5", alpha=0.12, linewidth=0)
        lines += right.plot(steps, cut, color="0.45", linewidth=1.2, label="edges cut (right axis)")
        right.set_ylabel(f"edges cut, of {sum(report['edges'].values()):,}", color="0.35", **STYLE)
        right.set_ylim(0, 1.08 * max(cut))
        right.tick_params(colors="0.35", labelsize=8)
        right.spines["top"].set_visible(False)
        axes.set_zorder(right.get_zorder() + 1)  # curves over the shaded area
        axes.patch.set_visible(False)
    else:
        axes.spines["right"].set_visible(False)
    curves = []
    for key, (label, colour, line) in CURVES.items():
        if key in rows[0]:
            values = [100 * row[key] for row in rows]
            curves += axes.plot(steps, values, line, color=colour, linewidth=1.6, label=_words(label, report))
    axes.set_xlabel(f"edges cut, of {sum(report['edges'].values()):,}" if one_a_step else "step", **STYLE)
    axes.set_ylabel("classified as their group, %", **STYLE)
    axes.set_xlim(steps[0], max(steps[-1], 1))
    axes.set_ylim(-2, 102)
    axes.set_title(f"{name} ({report['source']})", loc="left", fontsize=9)
    _tidy(axes)
    figure.legend(handles=curves + lines, loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _pixels(masks: dict[str, np.ndarray], target: np.ndarray, report: dict[str, Any]) -> Figure:
    """How many of a pixel's edges each mask cuts, beside the mean image of the target class."""
    side, n_first = report["side"], report["edges"]["first layer"]
    maps = {
        name: (mask[:n_first].reshape(-1, target.size) < 0.5).sum(0).reshape(-1, side) for name, mask in masks.items()
    }
    image = target.reshape(-1, side)
    figure = Figure(figsize=(2.5 * (len(maps) + 1) + 0.5, 3.3), layout="constrained")
    panels = figure.subplots(1, len(maps) + 1, squeeze=False)[0]
    panels[0].imshow(image, cmap="gray_r")
    panels[0].set_title(f"mean of the training {report['target_class']}s", **STYLE)
    top = max(1, *(int(counts.max()) for counts in maps.values()))
    shown = None
    for axes, (name, counts) in zip(panels[1:], maps.items(), strict=True):
        shown = axes.imshow(counts, cmap="Reds", vmin=0, vmax=top)
        axes.contour(image, levels=[image.min() + 0.5 * np.ptp(image)], colors="0.35", linewidths=0.7)
        n_last = int((masks[name][n_first:] < 0.5).sum())
        axes.set_title(f"{name}: {int(counts.sum()):,} edges cut\n(and {n_last} of the last layer)", **STYLE)
    for axes in panels:
        axes.set_xticks([])
        axes.set_yticks([])
    bar = figure.colorbar(shown, ax=list(panels), shrink=0.75, pad=0.01)
    bar.set_label("edges cut at the pixel", **STYLE)
    bar.ax.tick_params(labelsize=8)
    bar.ax.yaxis.get_major_locator().set_params(integer=True)
    return figure


def _comparison(report: dict[str, Any]) -> Figure:
    """Accuracy of every variant at its last step on the sets that matter."""
    results = report["results"]
    sets = [name for name in BARS if name in results["original"]]
    figure = Figure(figsize=(7.0, 0.55 * len(results) + 1.2), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(sets)
    places = np.arange(len(results))
    for number, name in enumerate(sets):
        label, colour, _ = CURVES[name]
        values = [100 * row[name] for row in results.values()]
        bars = axes.barh(places + (number - (len(sets) - 1) / 2) * height, values, height * 0.92, color=colour)
        bars.set_label(_words(label, report))
        axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
    names = [f"{name}\n{row['edges cut']:,} edges cut" if row["edges cut"] else name for name, row in results.items()]
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("classified as their group, %", **STYLE)
    axes.spines["right"].set_visible(False)
    _tidy(axes)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure
