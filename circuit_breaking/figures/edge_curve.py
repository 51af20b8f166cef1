"""The curve of a ranking: held-out losses and gain of the objective by the budget, the most edges to cut."""

from pathlib import Path

from circuit_breaking.errors import UserError
from circuit_breaking.figures.style import BLACK, BLUE, DASHED, GREY, VERMILION, figure, log_counts
from circuit_breaking.runs.checked_json import CheckedJson
from circuit_breaking.runs.ranking_record import CURVE, Curve
from circuit_breaking.runs.records import read_value

HINT = "Make it with toxicity/train_mask.py and method ranking."
LINES = {  # column: label, colour, marker
    "toxic": ("toxic text (to rise)", VERMILION, "o"),
    "ordinary": ("ordinary text (to stay)", BLUE, "s"),
}


def draw_curve(folder: Path | str) -> Path:
    """Draw both losses, and the gain of the objective below them, by the budget.

    Reads `curve.json` and writes `curve.png`, both in `folder`. Dashed lines show the losses with all edges.

    Raises:
        UserError: the file is missing or damaged, or holds no rows.
    """
    folder = Path(folder)
    original, rows = read_curve(folder)
    budgets = [row["budget"] for row in rows]
    with figure(folder / "curve.png", 4.6, 4.0) as drawn:
        losses, gain = drawn.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        for name, (label, colour, marker) in LINES.items():
            losses.axhline(original[name], color=colour, linewidth=0.8, linestyle=DASHED, alpha=0.7)
            losses.plot(budgets, [row[name] for row in rows], color=colour, marker=marker, markersize=4, label=label)
        losses.set(ylabel="held-out loss, nats")
        losses.legend()
        gain.axhline(0, color=GREY, linewidth=0.8)
        gain.plot(budgets, [row["gain"] for row in rows], color=BLACK, marker="D", markersize=3.5)
        gain.set(xlabel="budget: most edges to cut, in the order of the ranking", ylabel="gain of the\nobjective, nats")
        log_counts(gain, "x", budgets)
    return folder / "curve.png"


def read_curve(folder: Path) -> tuple[dict[str, float], list[dict[str, float]]]:
    """The losses with all edges, and the rows of `curve.json`: `budget`, `edges_cut`, both losses and the `gain`.

    Raises:
        UserError: the file is missing or damaged, or holds no rows.
    """
    path = folder / CURVE
    curve = CheckedJson(read_value(path, HINT, Curve), path, HINT)
    original = {name: curve["original"][name].number() for name in LINES}
    rows = [
        {name: row[name].number() for name in ("budget", "edges_cut", *LINES, "gain")} for row in curve["rows"].rows()
    ]
    if not rows:
        raise UserError(f"{path} holds no rows. {HINT}")
    return original, rows
