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


def _cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None or entry["value"] is None:
        return "–"
    digits = 1 if entry["value"] >= 10 else 3
    numbers = [f"{entry[name]:.{digits}f}" for name in ("value", "low", "high") if entry.get(name) is not None]
    return numbers[0] if len(numbers) == 1 else f"{numbers[0]} ({numbers[1]}–{numbers[2]})"
