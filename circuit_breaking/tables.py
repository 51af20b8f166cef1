"""Reports as tables: on a terminal, in Markdown, in CSV (layer 3)."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from circuit_breaking.evaluation import MEASURES

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
        result.add_row(f"loss on {key} text", *(_cell(models[name]["losses"].get(key)) for name in models))
    for key in first["continuations"]:
        result.add_section()
        result.add_row(f"[italic]after {key} prompts")
        for measure, label in MEASURES.items():
            if measure in UNSHOWN:
                continue
            cells = (_cell(models[name]["continuations"].get(key, {}).get(measure)) for name in models)
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
        share = one.get("touched", {}).get("parameters", 0)
        cells = [
            *(one["losses"].get(key) for key in ("toxic", "ordinary")),
            after.get("toxicity"),
            after.get("perplexity"),
        ]
        result.add_row(name, str(one.get("edges_cut", "")), f"{share:.0%}", *map(_cell, cells))
    return result


def _cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None or entry["value"] is None:
        return "–"
    digits = 1 if entry["value"] >= 10 else 3
    numbers = [f"{entry[name]:.{digits}f}" for name in ("value", "low", "high") if entry.get(name) is not None]
    return numbers[0] if len(numbers) == 1 else f"{numbers[0]} ({numbers[1]}–{numbers[2]})"


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
