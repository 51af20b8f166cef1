"""Reports as tables on a terminal and in CSV, and numbers as tables show them (layer 3)."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from circuit_breaking.evaluation.measure import MEASURES

UNSHOWN = {"distinct_unigrams", "distinct_trigrams"}  # in the report's files only


def table(report: Mapping[str, Any]) -> Table:
    """A report's `models` as a table: a column a model, 95% intervals in brackets."""
    models = report["models"]
    result = Table(title=f"toxicity by {report['scorer']['name']} {report['scorer']['version']}")
    result.add_column("")
    for name in models:
        result.add_column(name, justify="right")
    result.add_row("edges cut", *(str(models[name].get("edges_cut", "")) for name in models))
    first = next(iter(models.values()))
    for key in first["losses"]:
        result.add_row(f"loss on {key} text", *(interval(models[name]["losses"].get(key)) for name in models))
    for key in first["continuations"]:
        result.add_section()
        result.add_row(f"[italic]after {key} prompts")
        for measure, label in MEASURES.items():
            if measure in UNSHOWN:
                continue
            cells = (interval(models[name]["continuations"].get(key, {}).get(measure)) for name in models)
            result.add_row(f"  {label}", *cells)
    return result


def overview(report: Mapping[str, Any]) -> Table:
    """The same for many models: a row a model, the main measures only; of random masks, which are controls, none."""
    result = Table(title=f"toxicity by {report['scorer']['name']} {report['scorer']['version']}")
    columns = ("", "edges cut", "parameters changed", "toxic loss", "ordinary loss", "toxicity", "perplexity")
    for column in columns:
        result.add_column(column, justify="right" if column else "left")
    for name, one in report["models"].items():
        if one.get("kind") == "random":
            continue
        after = one["continuations"].get("toxic", {})
        share = one.get("changed_share", {}).get("parameters", 0)
        cells = [
            *(one["losses"].get(key) for key in ("toxic", "ordinary")),
            after.get("toxicity"),
            after.get("perplexity"),
        ]
        result.add_row(name, str(one.get("edges_cut", "")), f"{share:.0%}", *map(interval, cells))
    return result


def flat_rows(models: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a model with every figure in a column of its own, `continuations.toxic.toxicity.low` and the like."""
    rows = []
    for name, one in models.items():
        row: dict[str, Any] = {"model": name}
        for key, value in one.items():
            _flatten(row, key, value)
        rows.append(row)
    return rows


def _flatten(row: dict[str, Any], name: str, value: Any) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _flatten(row, f"{name}.{key}", inner)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            _flatten(row, f"{name}.{number}", inner)
    else:
        row[name] = value


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table: fewer digits where it is large, an en dash where it is None."""
    if value is None:
        return "–"
    return f"{value:.{max(0, digits - 2)}f}" if abs(value) >= 10 else f"{value:.{digits}f}"


def interval(entry: Mapping[str, Any] | None, digits: int = 3) -> str:
    """`value (low–high)`."""
    if entry is None or entry.get("value") is None:
        return "–"
    if entry.get("low") is None:
        return number(entry["value"], digits)
    low, high = number(entry["low"], digits), number(entry["high"], digits)
    return f"{number(entry['value'], digits)} ({low}–{high})"
