"""Tables of results on a terminal, in Markdown and in CSV, and numbers as tables show them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from circuit_breaking.evaluation.measurements import MEASURES
from circuit_breaking.evaluation.result_files import relearned
from circuit_breaking.runs.plain_table import print_table

FEW = 4  # models that the table has a column each for
COSTS_TEXT = (
    "Seconds that making each model took, on the clock and of the CPU; with tuning, the seconds for all learning rates "
    "together. Peak memory is above the memory in use before. These are measurements, so they differ from run to run."
)
UNSHOWN = {"distinct_unigrams", "distinct_trigrams"}  # measures that only the report's files show


def show(report: Mapping[str, Any]) -> None:
    """Print a report's `models`: every measure if there are few models, and otherwise the main ones.

    Estimates have their 95% intervals in brackets. Random edges are left out where there are many models.
    """
    header, rows = every_measure(report) if len(report["models"]) <= FEW else main_measures(report)
    print_table(header, rows, f"toxicity by {report['scorer']['name']} {report['scorer']['version']}")


def every_measure(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table with one column per model and one row per measure."""
    models = report["models"]
    rows = []
    if any("edges_cut" in model for model in models.values()):
        rows.append(["edges cut", *(str(model.get("edges_cut", "")) for model in models.values())])
    if any("masked" in model for model in models.values()):
        counts = [model.get("masked", {}).get("weights", 0) for model in models.values()]
        rows.append(["weights masked", *(f"{count:,}" for count in counts)])
    first = next(iter(models.values()))
    for key in first["losses"]:
        rows.append([f"loss on {key} text", *(interval(model["losses"].get(key)) for model in models.values())])
    for key in first["continuations"]:
        rows.append([f"after {key} prompts:", *([""] * len(models))])
        for measure, label in MEASURES.items():
            if measure not in UNSHOWN:
                cells = [interval(model["continuations"].get(key, {}).get(measure)) for model in models.values()]
                rows.append([f"  {label}", *cells])
    return ["", *models], rows


def main_measures(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table with one row per model and one column per measure, without random edges."""
    rows = []
    for name, model in report["models"].items():
        if model.get("kind") == "random":
            continue
        after = model["continuations"].get("toxic", {})
        share = model.get("changed_share", {}).get("parameters", 0)
        losses = [model["losses"].get(key) for key in ("toxic", "ordinary")]
        cells = map(interval, (*losses, after.get("toxicity"), after.get("perplexity")))
        rows.append([name, str(model.get("edges_cut", "")), f"{share:.0%}", *cells])
    return ["", "edges cut", "parameters changed", "toxic loss", "ordinary loss", "toxicity", "perplexity"], rows


def relearning_table(models: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table with one row per model: its toxicity before relearning and after the last step.

    Args:
        models: as in a `relearning.json`.
    """
    columns: dict[str, dict[str, Any]] = {}
    for examples, by_model in relearned(models).items():
        last = max((row["step"] for rows in by_model.values() for row in rows), default=0)
        headers = {last: f"{last} steps on {examples}"} | {0: "before"}
        for name, rows in by_model.items():
            for row in rows:
                if row["step"] in headers:
                    columns.setdefault(headers[row["step"]], {})[name] = row["toxicity"]
    for name, one in models.items():
        if one.get("few_shot"):
            columns.setdefault("after examples in the context", {})[name] = one["few_shot"]["with"]
    rows = [[name, *(interval(column.get(name), 2) for column in columns.values())] for name in models]
    return ["", *columns], rows


def costs_table(costs: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table of what making each model cost (`COSTS_TEXT`)."""
    seconds = ("seconds", "cpu_seconds", "seconds_with_tuning")
    rows = [
        [name, *(number(cost.get(key), 1) for key in seconds), number(cost.get("peak_gb"))]
        for name, cost in costs.items()
    ]
    return ["model", "seconds", "CPU seconds", "with tuning", "peak memory, GB"], rows


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with its first column aligned to the left and the others to the right."""
    lines = [f"| {' | '.join(header)} |", f"|{'|'.join(['---'] + ['--:'] * (len(header) - 1))}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def flat_rows(models: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of a CSV table: one row per model, one column per figure, such as `continuations.toxic.toxicity.low`."""
    rows = []
    for name, model in models.items():
        row: dict[str, Any] = {"model": name}
        for key, value in model.items():
            _flatten(row, key, value)
        rows.append(row)
    return rows


def _flatten(row: dict[str, Any], name: str, value: Any) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _flatten(row, f"{name}.{key}", inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _flatten(row, f"{name}.{index}", inner)
    else:
        row[name] = value


def number(value: float | None, digits: int = 3) -> str:
    """A number with `digits` decimals, two fewer from 10 on; an en dash for None."""
    if value is None:
        return "–"
    return f"{value:.{max(0, digits - 2)}f}" if abs(value) >= 10 else f"{value:.{digits}f}"


def interval(entry: Mapping[str, Any] | None, digits: int = 3) -> str:
    """An estimate as `value (low–high)`; only the value where there is no interval, an en dash where there is none."""
    if entry is None or entry.get("value") is None:
        return "–"
    if entry.get("low") is None:
        return number(entry["value"], digits)
    low, high = number(entry["low"], digits), number(entry["high"], digits)
    return f"{number(entry['value'], digits)} ({low}–{high})"
