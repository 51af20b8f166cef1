"""Figures of an MNIST run, from the files in its folder.

`accuracy_<variant>.png`: accuracy by step, with the number of edges cut on a second axis (the paper's figure).
`pixels.png`: the pixels whose edges were cut, beside the mean image of the target class.
`comparison.png`: all variants at their last step.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from circuit_breaking.errors import UserError
from circuit_breaking.figures.style import BLUE, DARK_GREY, GREEN, ORANGE, PINK, VERMILION, figure
from circuit_breaking.runs.checked_json import CheckedJson
from circuit_breaking.runs.files import read_jsonl
from circuit_breaking.runs.mnist_results import MASKS, MNIST_REPORT, MnistMasks, MnistReport
from circuit_breaking.runs.records import read_value
from circuit_breaking.runs.results import new_or_old
from circuit_breaking.runs.tensors import read_tensors

HINT = "Give the folder of a finished run of mnist/main.py or mnist/old.py."
CURVES = {  # set -> label ({t} is the target class, {m} the other classes of its group), colour, line
    "test other": ("test, not {t}", BLUE, "-"),
    "train other": ("train, not {t}", BLUE, ":"),
    "test mates": ("test {m}", GREEN, "-"),
    "test target": ("test {t}, held out", VERMILION, "-"),
    "train target": ("train {t}", VERMILION, ":"),
    "bad examples": ("{n} bad examples", PINK, "--"),
    "test target as reference": ("test {t} labelled as by a\nnetwork that never saw {t}", ORANGE, "-."),
}
BARS = ("test target", "test mates", "test other")
EDGES_CUT = "edges cut"
Row = dict[str, float]  # accuracy by set, and the edges cut


@dataclass(frozen=True)
class Run:
    """What the figures show of a run."""

    labels: dict[str, str]  # of each set of images in legends
    target_class: int
    source: str  # where the images come from
    n_edges: int
    counts_edges: bool  # one edge is cut per step, so that the x axis counts edges
    steps: dict[str, list[int]]  # by variant
    rows: dict[str, list[Row]]  # by variant, one per step
    results: dict[str, Row]  # by variant, at the last step
    target_image: np.ndarray  # mean image of the target class, [side, side]
    cuts_by_pixel: dict[str, np.ndarray]  # by variant, number of edges cut at each pixel, [side, side]
    cuts_in_last_layer: dict[str, int]  # by variant


def draw_run(folder: Path) -> list[Path]:
    """Draw all figures of a run folder.

    Returns:
        The paths of the figures.

    Raises:
        UserError: a file is missing or damaged.
    """
    run = read_run(folder)
    paths = {name: folder / f"accuracy_{re.sub(r'[^a-z0-9]+', '_', name)}.png" for name in run.rows}
    for name, path in paths.items():
        _draw_accuracy(path, run, name)
    _draw_pixels(folder / "pixels.png", run)
    _draw_comparison(folder / "comparison.png", run)
    return [*paths.values(), folder / "pixels.png", folder / "comparison.png"]


def read_run(folder: Path) -> Run:
    path, log = new_or_old(folder, MNIST_REPORT, "report.json", HINT), folder / "metrics.jsonl"
    mask_file = new_or_old(folder, MASKS, "mask.safetensors", HINT)
    report = CheckedJson(read_value(path, HINT, MnistReport), path, HINT)
    steps: dict[str, list[int]] = {}
    rows: dict[str, list[Row]] = {}
    for row in CheckedJson(read_jsonl(log, HINT), log, HINT, "line").rows():
        name = row["variant"].text()
        steps.setdefault(name, []).append(row["step"].integer())
        rows.setdefault(name, []).append(_row(row))
    for name, members in rows.items():
        if any(not row.keys() >= members[0].keys() for row in members):
            raise UserError(f"{log} has rows of {name} with different columns. {HINT}")
    target = report["target_class"].integer()
    mates = " and ".join(f"{mate.integer()}s" for mate in report["mates"].rows())
    words = {"t": f"{target}s", "m": f"{mates} (same group)", "n": report["images"]["bad examples"].integer()}
    tensors, header = read_tensors(mask_file, HINT)
    if "record" in header:
        MnistMasks.check_version(header, mask_file, HINT)
    side, n_first = report["side"].integer(), report["edges"]["first layer"].integer()
    image = tensors.pop("mean target image", None)
    if image is None or side < 1 or image.numel() % side:
        raise UserError(f"{mask_file} has no mean target image of {side} pixels a side. {HINT}")
    masks = {name: tensors[name].numpy() < 0.5 for name in rows if name in tensors}
    if not masks or any(cut.ndim != 1 or cut.size < n_first or n_first % image.numel() for cut in masks.values()):
        raise UserError(f"{mask_file} has no masks that fit the network of {path}. {HINT}")
    return Run(
        labels={name: label.format(**words) for name, (label, _, _) in CURVES.items()},
        target_class=target,
        source=report["source"].text(),
        n_edges=sum(count.integer() for _, count in report["edges"].items()),
        counts_edges=report["script"].text().endswith("old.py"),
        steps=steps,
        rows=rows,
        results=_read_results(report["results"]),
        target_image=image.numpy().reshape(-1, side),
        cuts_by_pixel={
            name: cut[:n_first].reshape(-1, image.numel()).sum(0).reshape(-1, side) for name, cut in masks.items()
        },
        cuts_in_last_layer={name: int(cut[n_first:].sum()) for name, cut in masks.items()},
    )


def _row(row: CheckedJson) -> Row:
    """The accuracies of a row, and the edges cut."""
    row[EDGES_CUT].integer()
    return {name: row[name].number() for name in (EDGES_CUT, *CURVES) if name in row.value}


def _read_results(results: CheckedJson) -> dict[str, Row]:
    """Accuracies of each variant at its last step; all have the sets of the original that are drawn."""
    found = {name: _row(row) for name, row in results.items()}
    for name in [name for name in BARS if name in results["original"].value]:
        for variant in found:
            results[variant][name].number()
    return found


def _draw_accuracy(path: Path, run: Run, name: str) -> None:
    """Draw accuracy by step, and the number of edges cut on the right-hand axis."""
    steps, rows = run.steps[name], run.rows[name]
    with figure(path, 7.0, 3.4) as drawn:
        axes, lines = drawn.subplots(), []
        axes.grid(visible=False)
        if not run.counts_edges and any(row[EDGES_CUT] for row in rows):
            right, cut = axes.twinx(), [row[EDGES_CUT] for row in rows]
            right.grid(visible=False)
            right.fill_between(steps, cut, color=DARK_GREY, alpha=0.12, linewidth=0)
            lines += right.plot(steps, cut, color=DARK_GREY, linewidth=1.2, label="edges cut (right axis)")
            right.set_ylabel(f"edges cut, of {run.n_edges:,}", color=DARK_GREY)
            right.set_ylim(0, 1.08 * max(cut))
            right.tick_params(colors=DARK_GREY)
            right.spines["right"].set_visible(True)
            axes.set_zorder(right.get_zorder() + 1)  # curves over the shaded area
            axes.patch.set_visible(False)
        curves = []
        for key, (_, colour, line) in CURVES.items():
            if key in rows[0]:
                values = [100 * row[key] for row in rows]
                curves += axes.plot(steps, values, line, color=colour, linewidth=1.6, label=run.labels[key])
        axes.set_xlabel(f"edges cut, of {run.n_edges:,}" if run.counts_edges else "step")
        axes.set_ylabel("classified as their group, %")
        axes.set_xlim(steps[0], max(steps[-1], 1))
        axes.set_ylim(-2, 102)
        axes.set_title(f"{name} ({run.source})", loc="left")
        drawn.legend(handles=curves + lines, loc="outside right upper")


def _draw_pixels(path: Path, run: Run) -> None:
    """Draw how many of a pixel's edges each mask cuts, beside the mean image of the target class."""
    maps = run.cuts_by_pixel
    image = run.target_image
    with figure(path, 2.5 * (len(maps) + 1) + 0.5, 3.3) as drawn:
        panels = drawn.subplots(1, len(maps) + 1, squeeze=False)[0]
        panels[0].imshow(image, cmap="gray_r")
        panels[0].set_title(f"mean of the training {run.target_class}s")
        top = max(1, *(int(counts.max()) for counts in maps.values()))
        for axes, (name, counts) in zip(panels[1:], maps.items(), strict=True):
            shown = axes.imshow(counts, cmap="Reds", vmin=0, vmax=top)
            axes.contour(image, levels=[image.min() + 0.5 * np.ptp(image)], colors=DARK_GREY, linewidths=0.7)
            last = run.cuts_in_last_layer[name]
            axes.set_title(f"{name}: {int(counts.sum()):,} edges cut\n(and {last} of the last layer)")
        for axes in panels:
            _without_ticks(axes)
        bar = drawn.colorbar(shown, ax=list(panels), shrink=0.75, pad=0.01)
        bar.set_label("edges cut at the pixel")
        bar.ax.yaxis.get_major_locator().set_params(integer=True)


def _without_ticks(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(True)


def _draw_comparison(path: Path, run: Run) -> None:
    """Draw the accuracy of each variant at its last step, on the main sets of images."""
    results = run.results
    sets = [name for name in BARS if name in results["original"]]
    with figure(path, 7.0, 0.55 * len(results) + 1.2) as drawn:
        axes = drawn.subplots()
        height, rows = 0.8 / max(len(sets), 1), np.arange(len(results))
        for number, name in enumerate(sets):
            values = [100 * row[name] for row in results.values()]
            offset = (number - (len(sets) - 1) / 2) * height
            bars = axes.barh(rows + offset, values, height * 0.92, color=CURVES[name][1], label=run.labels[name])
            axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
        cut = {name: int(row[EDGES_CUT]) for name, row in results.items()}
        axes.set_yticks(rows, [f"{name}\n{cut[name]:,} edges cut" if cut[name] else name for name in results])
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set_xlim(0, 108)
        axes.set_xticks(range(0, 101, 20))
        axes.set_xlabel("classified as their group, %")
        drawn.legend(loc="outside upper center", ncols=3)
