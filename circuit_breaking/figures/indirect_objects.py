"""Figures of the indirect-object scripts: comparisons of methods, pruning stages, reports, and next tokens."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from circuit_breaking.errors import UserError
from circuit_breaking.figures.edges import draw_edges
from circuit_breaking.figures.style import (
    BLUE,
    COLOURS,
    DARK_GREY,
    DASHED,
    GREY,
    LIGHT_GREY,
    MARKERS,
    VERMILION,
    figure,
    legend_below,
    log_counts,
)
from circuit_breaking.figures.training import (
    ANSWER,
    ANSWER_DIFFERENCE,
    INDIRECT_OBJECT,
    LOGIT_DIFFERENCE,
    draw_training,
)
from circuit_breaking.runs.checked_json import CheckedJson
from circuit_breaking.runs.ioi_results import IOI_COMPARISON, IOI_REPORT, IOIComparison, IOIReport, NextTokens, Stages
from circuit_breaking.runs.records import Record, RunSettings, read_value
from circuit_breaking.runs.results import new_or_old

PANELS = {  # measures of a report, with the title of each panel
    "logit_difference": "logit difference",
    "accuracy": "right answer first",
    "probability": "answer probability",
    "ordinary_loss": "ordinary loss, nats",
}
NAMES, ANSWERS = ("indirect object", "subject"), ("right answer", "wrong answer")  # of IOI, and of other tasks
COMPARED = {"logit_difference": "logit difference, right - wrong", "ordinary_loss": "loss on ordinary text, nats"}


def _open(path: Path, hint: str, kind: type[Record]) -> CheckedJson:
    return CheckedJson(read_value(path, hint, kind), path, hint)


def draw_comparison(folder: Path | str) -> Path:
    """Draw logit difference and ordinary loss by number of edges cut: one line per method, random masks as a range.

    Reads `ioi_comparison.json` (`original`, and `methods`: by name, rows of n_cut, logit_difference, ordinary_loss) and
    writes `comparison.png`, both in `folder`.

    Raises:
        UserError: the file is missing or damaged.
    """
    folder = Path(folder)
    original, methods = read_comparison(folder)
    path = folder / "comparison.png"
    with figure(path, 7.2, 3.1) as drawn:
        panels = drawn.subplots(1, 2)
        for column, (axes, (key, label)) in enumerate(zip(panels, COMPARED.items(), strict=True), 1):
            axes.axhline(original[key], color=DARK_GREY, linewidth=0.8, linestyle=DASHED, label="original")
            for number, (name, rows) in enumerate(methods.items()):
                _method_line(axes, name, rows[:, 0], rows[:, column], number)
            counts = max(methods.values(), key=len)[:, 0] if methods else [1]  # of the method with the most masks
            log_counts(axes, "x", np.unique(counts))
            axes.set(xlabel="edges cut", ylabel=label)
        legend_below(drawn, panels[0])
    return path


def read_comparison(folder: Path) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The measures of `COMPARED` with all edges; by method, rows of the edges cut and these measures, [n, 3].

    Raises:
        UserError: `ioi_comparison.json` is missing or damaged.
    """
    hint = "Make it with ioi/compare.py."
    report = _open(new_or_old(folder, IOI_COMPARISON, "comparison.json", hint), hint, IOIComparison)
    original = {name: report["original"][name].number() for name in COMPARED}
    methods = {
        name: np.array([[row[key].number() for key in ("n_cut", *COMPARED)] for row in rows.rows()]).reshape(-1, 3)
        for name, rows in report["methods"].items()
    }
    return original, methods


def _method_line(axes: Axes, name: str, n_cut: np.ndarray, values: np.ndarray, number: int) -> None:
    """Draw the mean by number of edges cut, with the range of several masks as a band."""
    counts = np.unique(n_cut)
    groups = [values[n_cut == count] for count in counts]
    colour = GREY if name == "random" else COLOURS[number % len(COLOURS)]
    means = [group.mean() for group in groups]
    axes.plot(counts, means, label=name, color=colour, marker=MARKERS[number % len(MARKERS)], markersize=4)
    if any(len(group) > 1 for group in groups):
        lows, highs = [group.min() for group in groups], [group.max() for group in groups]
        axes.fill_between(counts, lows, highs, color=colour, alpha=0.18, linewidth=0)


def draw_stages(folder: Path | str) -> Path:
    """Draw the share of the logit difference that is left by number of edges kept, as a sufficient circuit is pruned.

    Reads `stages.json` (`faithful`, the share that must be left, and `stages`: rows of kept and share) and writes
    `stages.png`, both in `folder`.

    Raises:
        UserError: the file is missing or damaged.
    """
    folder = Path(folder)
    kept, shares, least = read_stages(folder)
    path = folder / "stages.png"
    with figure(path, 4.0, 2.6) as drawn:
        axes = drawn.subplots()
        axes.plot(kept, shares, color=BLUE, marker=MARKERS[0], markersize=4)
        axes.axhline(least, color=DARK_GREY, linewidth=0.8, linestyle=DASHED)
        axes.annotate(f"{least:.0%}", (1, least), xycoords=("axes fraction", "data"), fontsize=8, va="center")
        log_counts(axes, "x", np.unique(kept))
        axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
        axes.invert_xaxis()
        axes.set(xlabel="edges kept", ylabel="logit difference left")
    return path


def read_stages(folder: Path) -> tuple[np.ndarray, np.ndarray, float]:
    """Edges kept [n] and the share of the logit difference left [n] by stage, and the share that must be left.

    Raises:
        UserError: `stages.json` is missing or damaged.
    """
    report = _open(folder / "stages.json", "Make it with ioi/alternative_masks.py --kind sufficient.", Stages)
    rows = [(row["kept"].number(), row["share"].number()) for row in report["stages"].rows()]
    kept, shares = np.array(rows).reshape(-1, 2).T
    least = report["faithful"].number()
    return kept, shares, least


@dataclass(frozen=True)
class Measured:
    """A model of a report: its label, and by measure the value with its interval (value, low, high)."""

    label: str
    measures: dict[str, tuple[float, float, float]]


def draw_models(folder: Path | str) -> Path:
    """Draw each model of a report, one row per model and one panel per measure, with 95% intervals.

    Reads `ioi_report.json` (written by `ioi/evaluation.py`) and writes `report.png`, both in `folder`.

    Raises:
        UserError: the file is missing or damaged, or holds no models.
    """
    folder = Path(folder)
    models = read_models(folder)
    path = folder / "report.png"
    with figure(path, 7.2, 1.1 + 0.32 * len(models)) as drawn:
        panels = drawn.subplots(1, len(PANELS), sharey=True)
        for axes, (key, label) in zip(panels, PANELS.items(), strict=True):
            for row, model in enumerate(models):
                if key not in model.measures:
                    continue
                value, low, high = model.measures[key]
                colour, marker = COLOURS[row % len(COLOURS)], MARKERS[row % len(MARKERS)]
                axes.plot([low, high], [row, row], color=colour, linewidth=1.6, solid_capstyle="butt")
                axes.plot(value, row, color=colour, marker=marker, markersize=5, clip_on=False)
            axes.set_title(label)
            axes.grid(axis="x", visible=True)
            axes.grid(axis="y", visible=False)
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.tick_params(axis="y", length=0)
            if key in ("accuracy", "probability"):
                axes.set_xlim(-0.04, 1.04)
        panels[0].axvline(0, color=GREY, linewidth=0.7)
        panels[0].set_yticks(range(len(models)), [model.label for model in models])
        panels[0].set_ylim(len(models) - 0.5, -0.5)
    return path


def read_models(folder: Path) -> list[Measured]:
    hint = "Make it with ioi/evaluation.py."
    path = new_or_old(folder, IOI_REPORT, "report.json", hint)
    report = read_value(path, hint, IOIReport)
    models = report.get("models") if isinstance(report, dict) else None
    if not models:
        raise UserError(f"{path} holds no models. {hint}")
    found = []
    for name, model in CheckedJson(models, path, hint, "models").items():
        measures, edges = {}, model.get("edges_cut")
        for key in PANELS:
            entry = model["measures"].get(key)
            if entry is not None and entry["value"].value is not None:  # null where it was not finite
                measures[key] = tuple(entry[end].number() for end in ("value", "low", "high"))
        n_cut = edges.integer() if edges is not None else 0
        found.append(Measured(f"{name} ({n_cut:,} cut)" if n_cut else name, measures))
    return found


def draw_next_tokens(folder: Path | str, labels: tuple[str, str] = NAMES) -> Path:
    """Draw the likeliest next tokens after one prompt as bars, for the original model and with the mask.

    Reads `next_tokens.json` (`prompt`, `IO`, `S`, and `models`: by name, rows of token and probability) and writes
    `next_tokens.png`, both in `folder`.

    Args:
        folder: the run folder.
        labels: what the tokens `IO` and `S` are, for the legend.

    Raises:
        UserError: the file is missing or damaged.
    """
    folder = Path(folder)
    prompt, io, subject, models = read_next_tokens(folder)
    path = folder / "next_tokens.png"
    longest = max((len(bars) for bars in models.values()), default=1)
    with figure(path, 3.3 * max(len(models), 1), 0.9 + 0.22 * longest) as drawn:
        panels = drawn.subplots(1, max(len(models), 1), squeeze=False)[0]
        for axes, (name, bars) in zip(panels, models.items(), strict=False):
            _token_bars(axes, bars, {subject: VERMILION, io: BLUE})
            axes.set(title=name, xlim=(0, 1.12), xlabel="probability")
        drawn.suptitle(f"{prompt} …", fontsize=9)
        handles = [
            Line2D([], [], color=colour, marker="s", linestyle="", label=label)
            for colour, label in zip((BLUE, VERMILION), labels, strict=True)
        ]
        drawn.legend(handles=handles, loc="outside lower center", ncols=2)
    return path


def read_next_tokens(folder: Path) -> tuple[str, str, str, dict[str, list[tuple[str, float]]]]:
    """The prompt of `next_tokens.json`, its right and its wrong answer, and by model the likeliest tokens.

    Raises:
        UserError: the file is missing or damaged.
    """
    report = _open(folder / "next_tokens.json", "Make it with ioi/train_mask.py.", NextTokens)
    prompt, io, subject = (report[name].text() for name in ("prompt", "IO", "S"))
    models = {
        name: [(row["token"].text(), row["probability"].number()) for row in rows.rows()]
        for name, rows in report["models"].items()
    }
    return prompt, io, subject, models


def _token_bars(axes: Axes, bars: list[tuple[str, float]], colours: dict[str, str]) -> None:
    """Draw one bar per token, the names in their colours, with the probability beside each."""
    shares = [share for _, share in bars]
    axes.barh(range(len(bars)), shares, color=[colours.get(token, LIGHT_GREY) for token, _ in bars], height=0.7)
    for row, share in enumerate(shares):
        axes.annotate(
            f"{share:.2f}" if share >= 0.005 else f"{share:.0e}", (share, row), xytext=(3, 0),
            textcoords="offset points", va="center", fontsize=7,
        )  # fmt: skip
    axes.set_yticks(range(len(bars)), [token.strip() or repr(token) for token, _ in bars])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def draw_run(folder: Path) -> None:
    """Draw all pictures of a run folder of ioi/train_mask.py or ioi/alternative_masks.py, from its files."""
    path, trained, found = folder / "settings.json", (folder / "metrics.jsonl").is_file(), None
    if trained or path.is_file():
        found = RunSettings.read(path, "Make it with ioi/train_mask.py.").provenance.get("settings")
    settings = found if isinstance(found, dict) else {}
    names = settings.get("task", "ioi") == "ioi"
    if trained:
        kinds = (INDIRECT_OBJECT, LOGIT_DIFFERENCE) if names else (ANSWER, ANSWER_DIFFERENCE)
        draw_training(folder, broken=kinds[settings.get("objective") == "logit_difference"])
    draw_edges(folder)
    draw_next_tokens(folder, NAMES if names else ANSWERS)
