"""Figures, drawn from result files only, so that any is redrawn without a rerun (layer 3)."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
from matplotlib.figure import Figure
from matplotlib.style import context
from matplotlib.ticker import MaxNLocator, PercentFormatter

from circuit_breaking.cli import UserError
from circuit_breaking.files import atomic_path, read_json, read_jsonl

P, T = ParamSpec("P"), TypeVar("T")

# Okabe and Ito's colours, which the colour-blind can tell apart, the darker ones first
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
MARKERS = "osD^vP*X"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.6,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "savefig.dpi": 200,
}


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches in the project's style, written to a PNG when the block ends."""
    with context(["default", STYLE]):
        drawn = Figure(figsize=(width, height), layout="constrained")  # no pyplot: no display, no global state
        yield drawn
        with atomic_path(path) as temporary:
            drawn.savefig(temporary, format="png")


def from_results(draw: Callable[P, T]) -> Callable[P, T]:
    """A function that draws what the files of a folder hold: where they hold something else, a `UserError` says so."""

    @wraps(draw)
    def checked(*words: P.args, **keywords: P.kwargs) -> T:
        try:
            return draw(*words, **keywords)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            where = words[0] if words else keywords.get("folder")
            raise UserError(
                f"the results in {where} lack what {draw.__name__} draws ({error!r}). Make them again."
            ) from error

    return checked


def apart(counts: Any) -> list[float]:
    """Of rising numbers those that are far enough apart to stand on a log axis."""
    kept: list[float] = []
    for count in counts:
        if not kept or count >= 1.4 * kept[-1]:
            kept.append(float(count))
    return kept


@from_results
def draw_report(folder: Path | str) -> Path:
    """Losses, toxic share and incoherence of every model of a report, with 95% intervals.

    Reads `report.json` (what `toxicity/evaluation.py` writes), writes `report.png`, both in `folder`.

    Raises:
        UserError: there is no report, or it holds no models.
    """
    folder = Path(folder)
    report = read_json(folder / "report.json", "Make one with toxicity/evaluation.py.")
    models = report.get("models") if isinstance(report, dict) else None
    if not models:
        raise UserError(f"{folder / 'report.json'} holds no models. Make it with toxicity/evaluation.py.")
    path = folder / "report.png"
    with figure(path, 7.2, 2.4 + 0.2 * math.ceil(len(models) / 4)) as drawn:
        axes = drawn.subplots(1, 3)
        after = {
            measure: {
                name: {key: about[measure] for key, about in one["continuations"].items()}
                for name, one in models.items()
            }
            for measure in ("toxic_share", "perplexity")
        }
        _points(axes[0], {name: one["losses"] for name, one in models.items()}, "{}\ntext")
        axes[0].set(title="next-token loss", ylabel="nats per token")
        _points(axes[1], after["toxic_share"], "{}\nprompts")
        axes[1].set(title="toxic continuations", ylim=(-0.03, 1.03))
        axes[1].yaxis.set_major_formatter(PercentFormatter(1, 0))
        _points(axes[2], after["perplexity"], "{}\nprompts")
        axes[2].set(title="incoherence of continuations", ylabel=f"perplexity under {report['reference']}")
        axes[2].set_ylim(bottom=0)
        handles, names = axes[0].get_legend_handles_labels()
        labels = [_label(name, models[name].get("edges_cut")) for name in names]
        drawn.legend([points for points, *_ in handles], labels, loc="outside lower center", ncols=min(len(labels), 4))
    return path


def _label(name: str, edges: int | None) -> str:
    return f"{name} ({edges} edge{'s' * (edges != 1)} cut)" if edges else name


def _points(axes: Any, models: Mapping[str, Mapping[str, Any]], label: str) -> None:
    """A point with its interval for every model (colour) and every set (place on the x axis)."""
    keys = list(dict.fromkeys(key for sets in models.values() for key in sets))
    step = min(0.16, 0.8 / len(models))
    for number, (name, sets) in enumerate(models.items()):
        places = np.arange(len(keys)) + step * (number - (len(models) - 1) / 2)
        values = np.array([_numbers(sets.get(key)) for key in keys]).reshape(-1, 3)
        axes.errorbar(
            places,
            values[:, 0],
            yerr=np.abs(values[:, 1:] - values[:, :1]).T,
            fmt=MARKERS[number % len(MARKERS)],
            color=COLOURS[number % len(COLOURS)],
            markersize=4.5,
            elinewidth=1.2,
            capsize=2,
            label=name,
            clip_on=False,
        )
    axes.set_xticks(range(len(keys)), [label.format(key) for key in keys])
    axes.set_xlim(-0.5, max(len(keys), 1) - 0.5)
    axes.tick_params(axis="x", length=0)


def _numbers(entry: Mapping[str, Any] | None) -> list[float]:
    numbers = [(entry or {}).get(name) for name in ("value", "low", "high")]
    return [np.nan if number is None else number for number in numbers]  # NaN is not drawn


@from_results
def draw_training(folder: Path | str, smooth: int = 9, broken: str = "toxic text (to rise)") -> Path:
    """Loss to keep, loss to raise, and edges cut, over the steps of a mask's training.

    Reads `metrics.jsonl` (a row a step: step, keep_loss, break_loss, n_cut, phase), writes `training.png`, both in
    `folder`. Losses of single batches are pale; the line is their running mean over `smooth` steps of one phase.
    `broken` is what the legend calls the loss to raise.

    Raises:
        UserError: there is no such file, it holds no rows, or a row lacks one of these.
    """
    folder = Path(folder)
    source, hint = folder / "metrics.jsonl", "Make it with toxicity/train_mask.py."
    rows = read_jsonl(source, hint)
    names = ("step", "keep_loss", "break_loss", "n_cut")
    if not rows:
        raise UserError(f"{source} holds no rows. {hint}")
    try:
        columns = {name: np.array([row[name] for row in rows], float) for name in names}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{source} has a row without {', '.join(names)} ({error!r}). {hint}") from error
    phases = [str(row.get("phase", "")) for row in rows]
    starts = [i for i in range(len(rows)) if i == 0 or phases[i] != phases[i - 1]]
    steps, path = columns["step"], folder / "training.png"
    with figure(path, 5.2, 3.6) as drawn:
        losses, cut = drawn.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        for name, label, colour in (
            ("break_loss", broken, COLOURS[1]),
            ("keep_loss", "ordinary text (to stay)", COLOURS[0]),
        ):
            losses.plot(steps, columns[name], color=colour, alpha=0.25, linewidth=0.7)
            for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
                line = _running_mean(columns[name][start:end], smooth)
                losses.plot(steps[start:end], line, color=colour, label=None if start else label)
        losses.set(ylabel="loss of a batch, nats")
        drawn.legend(loc="outside upper center", ncols=2)
        cut.step(steps, columns["n_cut"], where="mid", color=COLOURS[6], linewidth=1.2)
        cut.set(xlabel="step", ylabel="edges cut")
        cut.set_ylim(bottom=0)
        cut.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        cut.annotate(
            f"{columns['n_cut'][-1]:.0f}",
            (steps[-1], columns["n_cut"][-1]),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            annotation_clip=False,
        )
        for start in starts if len(starts) > 1 else []:
            for axes in (losses, cut) if start else ():
                axes.axvline(steps[start] - 0.5, color="#8C8C8C", linewidth=0.7, linestyle=(0, (3, 3)))
            losses.annotate(
                phases[start],
                (steps[start], 1),
                xycoords=("data", "axes fraction"),
                xytext=(2, 2),
                textcoords="offset points",
                fontsize=8,
                color="#555555",
            )
    return path


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Centred mean over `width` values, over fewer at the ends; as long as `values`."""
    ones = np.ones(min(width, len(values)))
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")
