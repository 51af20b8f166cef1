"""Loss curves: of the training of a mask, and of fine-tuning by several methods."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from circuit_breaking.errors import UserError
from circuit_breaking.figures.style import (
    BLACK,
    BLUE,
    COLOURS,
    DARK_GREY,
    DASHED,
    GREY,
    VERMILION,
    figure,
    legend_below,
    readable,
)
from circuit_breaking.runs.checked_json import CheckedJson
from circuit_breaking.runs.files import read_jsonl
from circuit_breaking.runs.records import read_value
from circuit_breaking.runs.results import FineTuning

METRICS = "metrics.jsonl"
COLUMNS = ("step", "keep_loss", "break_loss")


@dataclass(frozen=True)
class Broken:
    """How the break loss of a task is drawn.

    Attributes:
        label: its name in the legend.
        axis: label of a panel for it alone, for a break loss that is not a loss in nats; None: beside the keep loss.
        sign: factor of what is drawn; -1 for a break loss that is minus the figure that people know.
    """

    label: str
    axis: str | None = None
    sign: float = 1.0


TOXIC = Broken("toxic text (to rise)")
ANSWER = Broken("right answer (to rise)")
INDIRECT_OBJECT = Broken("indirect object (to rise)")
ANSWER_DIFFERENCE = Broken("logit difference, right - wrong (to fall)", "logit difference", -1.0)
LOGIT_DIFFERENCE = Broken("logit difference, IO - S (to fall)", "logit difference", -1.0)


def draw_training(
    folder: Path | str,
    smooth: int = 9,
    broken: Broken = TOXIC,
    count: str = "n_cut",
    counted: str = "edges cut",
    final: int | None = None,
) -> Path:
    """Draw the loss to keep, the loss to raise, and the number of edges cut over the steps of a mask's training.

    Reads `metrics.jsonl` (one row per step: step, keep_loss, break_loss, `count`, phase) and writes `training.png`,
    both in `folder`. Losses of single batches are pale.

    Args:
        folder: the run folder.
        smooth: steps over which the lines average, within one phase.
        broken: how the loss to raise is drawn.
        count: the column that counts what is cut, "n_masked" for a mask over weights.
        counted: the axis label of that count.
        final: the count of the mask that was saved, where it is made from the last step by rounding; None: that of the
            last step.

    Raises:
        UserError: there is no such file, it holds no rows, or a row lacks one of the columns.
    """
    folder = Path(folder)
    columns, phases = read_metrics(folder / METRICS, count)
    steps, path = columns["step"], folder / "training.png"
    starts = phase_starts(phases)
    heights = (2, 1) if broken.axis is None else (1.4, 1.4, 1)
    with figure(path, 5.2, 1.2 * sum(heights)) as drawn:
        *panels, cut = drawn.subplots(len(heights), 1, sharex=True, height_ratios=heights)
        losses = panels[-1]
        for axes, values, label, colour in (
            (panels[0], broken.sign * columns["break_loss"], broken.label, VERMILION),
            (losses, columns["keep_loss"], "ordinary text (to stay)", BLUE),
        ):
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.7)
            for start, end in zip(starts, [*starts[1:], len(phases)], strict=True):
                line = smoothed(values[start:end], smooth)
                axes.plot(steps[start:end], line, color=colour, label=None if start else label)
        panels[0].set(ylabel=broken.axis)
        losses.set(ylabel="loss of a batch, nats")
        drawn.legend(loc="outside upper center", ncols=2)
        counts = columns[count]
        if final is not None:
            steps, counts = np.append(steps, steps[-1] + 1), np.append(counts, final)
        cut.step(steps, counts, where="mid", color=BLACK, linewidth=1.2)
        cut.set(xlabel="step", ylabel=counted)
        cut.set_ylim(bottom=0)
        cut.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        cut.annotate(
            f"{counts[-1]:,.0f}", (steps[-1], counts[-1]), xytext=(3, 0),
            textcoords="offset points", va="center", fontsize=8, annotation_clip=False,
        )  # fmt: skip
        if len(starts) > 1:
            every = [*panels, cut]
            _keep_apart(drawn, [_mark_phase(every, steps[at], phases[at], first=at == 0) for at in starts])
    return path


def read_metrics(path: Path, count: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """Columns of the training log, and the phase of each step."""
    hint = "Make it with toxicity/train_mask.py."
    rows, names = read_jsonl(path, hint), (*COLUMNS, count)
    if not rows:
        raise UserError(f"{path} holds no rows. {hint}")
    try:
        columns = {name: np.array([row[name] for row in rows], float) for name in names}
        phases = [str(row.get("phase", "")) for row in rows]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} has a row without {', '.join(names)} ({error!r}). {hint}") from error
    return columns, phases


def phase_starts(phases: list[str]) -> list[int]:
    """The rows at which a phase begins, from the phase of each row."""
    return [at for at in range(len(phases)) if at == 0 or phases[at] != phases[at - 1]]


def _mark_phase(panels: list[Axes], step: float, phase: str, first: bool) -> Annotation:
    """Write the name of a phase above its first step in the top panel, with a line before it in all panels."""
    if not first:
        for axes in panels:
            axes.axvline(step - 0.5, color=GREY, linewidth=0.7, linestyle=DASHED)
    return panels[0].annotate(
        phase, (step, 1), xycoords=("data", "axes fraction"), xytext=(2, 2), textcoords="offset points",
        fontsize=8, color=DARK_GREY,
    )  # fmt: skip


def _keep_apart(drawn: Figure, names: list[Annotation]) -> None:
    """Lift names that would lie on earlier ones, a line at a time."""
    drawn.draw_without_rendering()  # so that it is known where they are
    placed: list[Bbox] = []
    for name in names:
        while any(name.get_window_extent().overlaps(other) for other in placed):
            left, height = name.xyann
            name.xyann = (left, height + 1.3 * name.get_fontsize())
        placed.append(name.get_window_extent())


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """Centred mean over `width` values, over fewer at the ends; as long as `values`."""
    ones = np.ones(min(width, len(values)))
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


@dataclass(frozen=True)
class Checkpoint:
    """Losses of one checkpoint of fine-tuning on validation texts, in nats; NaN where one was not finite.

    `lr` is NaN for the candidates of a method without training, and `step` is then the number of a candidate.
    """

    lr: float
    step: int
    toxic: float
    ordinary: float

    @property
    def trained(self) -> bool:
        """Whether it is a checkpoint of training, and not a candidate."""
        return not math.isnan(self.lr)


def learning_rates(rows: Iterable[Checkpoint]) -> list[float]:
    """The learning rates of checkpoints, the lowest first."""
    return sorted({row.lr for row in rows if row.trained})


def draw_finetuning(folder: Path | str) -> Path:
    """Draw the losses of each checkpoint of fine-tuning by step: one column per method, one colour per learning rate.

    Methods that choose among candidates have a dot for each.

    Reads `<method>/metrics.jsonl` and `<method>/finetuning.json`, and writes `finetuning.png`. The star marks the
    checkpoint that was kept.

    Raises:
        UserError: there is no fine-tuned model in `folder`, or a file of one is damaged.
    """
    folder = Path(folder)
    methods = [read_finetuning(path.parent) for path in sorted(folder.glob("*/finetuning.json"))]
    if not methods:
        raise UserError(f"{folder} holds no fine-tuned models. Make some with toxicity/finetune_gpt2.py.")
    rates = learning_rates(row for _, rows, _ in methods for row in rows)
    path = folder / "finetuning.png"
    with figure(path, 1.2 + 1.5 * len(methods), 3.4) as drawn:
        axes = drawn.subplots(2, len(methods), sharex="col", sharey="row", squeeze=False)
        for column, (name, rows, kept) in enumerate(methods):
            for panel, text in zip(axes[:, column], ("toxic", "ordinary"), strict=True):
                for number, lr in enumerate(rates):
                    mine = [row for row in rows if row.lr == lr and not math.isnan(getattr(row, text))]
                    panel.plot(
                        [row.step for row in mine], [getattr(row, text) for row in mine],
                        color=COLOURS[number % 6], linewidth=1, label=f"lr {lr:g}",
                    )  # fmt: skip
                untrained = [row for row in rows if not row.trained]
                if untrained:
                    panel.plot(
                        [row.step for row in untrained], [getattr(row, text) for row in untrained], "o",
                        color=DARK_GREY, markersize=2.5,
                    )  # fmt: skip
                panel.plot(kept.step, getattr(kept, text), "*", color=BLACK, markersize=7, label="kept")
            axes[0, column].set_title(readable(name))
            axes[1, column].set_xlabel("candidate" if untrained else "step")
        axes[0, 0].set_ylabel("toxic loss, nats")
        axes[1, 0].set_ylabel("ordinary loss, nats")
        legend_below(drawn, axes[0, 0])
    return path


def read_finetuning(folder: Path) -> tuple[str, list[Checkpoint], Checkpoint]:
    """Name of a method, all its checkpoints, and the one that was kept."""
    hint = "Make it with toxicity/finetune_gpt2.py."
    path, log = folder / "finetuning.json", folder / METRICS
    kept = CheckedJson(read_value(path, hint, FineTuning), path, hint)["chosen"]
    rows = CheckedJson(read_jsonl(log, hint), log, hint, "line").rows()
    return folder.name, [_checkpoint(row) for row in rows], _checkpoint(kept)


def _checkpoint(row: CheckedJson) -> Checkpoint:
    losses = row["toxic"].number_or_nan(), row["ordinary"].number_or_nan()
    lr = row.get("lr")
    return Checkpoint(math.nan if lr is None else lr.number(), row["step"].integer(), *losses)
