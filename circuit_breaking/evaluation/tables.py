"""Tables of results on a terminal, in Markdown and in CSV, and numbers as tables show them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from circuit_breaking.evaluation.measurements import MEASURES

UNSHOWN = {"distinct_unigrams", "distinct_trigrams"}  # measures that only the report's files show


def table(report: Mapping[str, Any]) -> Table:
    """A terminal table of a report's `models`: one column per model, 95% intervals in brackets."""
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
    """A terminal table for many models: one row per model with the main measures only, without random edges."""
    result = Table(title=f"toxicity by {report['scorer']['name']} {report['scorer']['version']}")
    columns = ("", "edges cut", "parameters changed", "toxic loss", "ordinary loss", "toxicity", "perplexity")
    for column in columns:
        result.add_column(column, justify="right" if column else "left")
    for name, model in report["models"].items():
        if model.get("kind") == "random":
            continue
        after = model["continuations"].get("toxic", {})
        share = model.get("changed_share", {}).get("parameters", 0)
        cells = [
            *(model["losses"].get(key) for key in ("toxic", "ordinary")),
            after.get("toxicity"),
            after.get("perplexity"),
        ]
        result.add_row(name, str(model.get("edges_cut", "")), f"{share:.0%}", *map(interval, cells))
    return result


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
