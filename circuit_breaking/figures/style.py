"""Figures, drawn from result files only, so that any is redrawn without a rerun (layer 3)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from matplotlib.figure import Figure
from matplotlib.style import context

from circuit_breaking.errors import UserError
from circuit_breaking.runs.files import atomic_path

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
