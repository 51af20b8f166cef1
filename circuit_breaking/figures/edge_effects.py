"""The effect of each cut edge on toxic and ordinary loss, and how alike the masks of other seeds are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from circuit_breaking.evaluation.result_files import read_evidence
from circuit_breaking.figures.style import BLACK, BLUE, VERMILION, figure, interval_ends, legend_below, readable

EFFECTS = {  # of an edge, with the marker and label of each
    "restore_effect": ("o", "only this edge restored"),
    "single_cut_effect": ("x", "only this edge cut"),
}
TEXTS = {"toxic": VERMILION, "ordinary": BLUE}


def draw_evidence(folder: Path | str) -> Path:
    """Draw the effect of each edge on both losses, one panel per mask, and the similarity of masks of other seeds.

    Reads `evidence.json` and writes `evidence.png`. The effect of restoring an edge is how far the loss falls when the
    other edges stay cut; the effect of cutting it is how far the loss rises when no other edge is cut.

    Raises:
        UserError: the file is missing or damaged.
    """
    folder = Path(folder)
    report = read_evidence(folder)
    masks, stability = report["masks"], report["stability"]
    path = folder / "evidence.png"
    longest = max((len(mask["edges"]) for mask in masks.values()), default=1)
    with figure(path, 2.6 * max(len(masks), 1) + (2.6 if stability else 0), 1.7 + 0.28 * max(longest, 4)) as drawn:
        panels = drawn.subplots(1, max(len(masks) + bool(stability), 1), squeeze=False)[0]
        for axes, (name, mask) in zip(panels, masks.items(), strict=False):
            _draw_effects(axes, mask["edges"])
            axes.set_title(readable(name))
        legend_below(drawn, panels[0], 2, fontsize=7)
        if stability:
            _draw_similarity(panels[-1], stability)
    return path


def _draw_effects(axes: Axes, edges: list[Mapping[str, Any]]) -> None:
    """Draw four points per edge, the edges in the order of their effect on toxic loss."""
    edges = sorted(edges, key=lambda row: -(row["restore_effect"]["toxic"]["value"] or 0.0))
    combinations = [(text, effect) for text in TEXTS for effect in EFFECTS]
    for number, (text, effect) in enumerate(combinations):
        marker, label = EFFECTS[effect]
        entries = {row: edge[effect][text] for row, edge in enumerate(edges) if edge[effect][text]["value"] is not None}
        axes.errorbar(
            [entry["value"] for entry in entries.values()],
            np.array(list(entries), float) + 0.16 * (number - 1.5),
            xerr=np.concatenate([np.zeros((2, 0)), *map(interval_ends, entries.values())], 1),
            fmt=marker,
            color=TEXTS[text],
            markersize=3,
            elinewidth=0.8,
            label=f"{text} loss, {label}",
        )
    axes.axvline(0, color=BLACK, linewidth=0.6)
    axes.set_yticks(range(len(edges)), [row["edge"] for row in edges])
    axes.set_ylim(max(len(edges), 1) - 0.5, -0.5)
    axes.set_xlabel("change of the loss, nats")
    axes.grid(axis="y", visible=False)


def _draw_similarity(axes: Axes, stability: list[Mapping[str, Any]]) -> None:
    """Draw the mean Jaccard similarity of masks over seeds as bars, with a black mark at what chance gives."""
    labels = [f"{row['ablation']}, {row['budget']} edges\n{len(row['masks'])} seeds" for row in stability]
    axes.barh(range(len(labels)), [row["jaccard"] for row in stability], height=0.35, color=BLUE)
    axes.plot([row["by_chance"] for row in stability], range(len(labels)), "|", color=BLACK, markersize=14)
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlim=(0, 1), ylim=(max(len(labels), 5) - 0.5, -0.5), title="same edges over seeds")
    axes.set_xlabel("Jaccard similarity\n(black: by chance)")
    axes.grid(axis="y", visible=False)
