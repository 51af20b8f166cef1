"""The loss curves of a mask's training."""

from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator

from circuit_breaking.errors import UserError
from circuit_breaking.figures.style import COLOURS, figure, from_results
from circuit_breaking.runs.files import read_jsonl


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
