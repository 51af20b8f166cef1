"""Write a comparison's report and draw its figures, from result files alone: no model is run.

Reads   data/toxicity/<run>/: report.json and, if they are there, uniform.csv, evidence.json, relearning.json,
        finetuned/*/, masks/*/cost.json; with --examples also generations.jsonl.
Writes  data/toxicity/<run>/: report.md; report.csv, one row per model; comparison.json, the Pareto front and the random
        edges; costs.json; every .png.
Time    seconds.

The parts of report.md and report.html above the heading "Costs of this run", and every other file except costs.json,
depend on the seed alone.
"""

from dataclasses import dataclass
from typing import ClassVar

from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.config import check_counts
from circuit_breaking.toxicity.settings import ToxicRunSettings


@dataclass
class Settings(ToxicRunSettings):
    MOST_USED: ClassVar = ("run", "out", "examples", "num_examples")

    examples: bool = False  # put examples of the models' texts into report.md, which then contains OFFENSIVE TEXT
    num_examples: int = 5  # prompts of which examples are shown

    def check(self) -> None:
        check_counts(self, "num_examples")


if __name__ == "__main__":
    settings = read_settings(Settings)

from pathlib import Path
from typing import Any

from circuit_breaking.evaluation.controls import controls
from circuit_breaking.evaluation.pareto import pareto
from circuit_breaking.evaluation.report_markdown import render
from circuit_breaking.evaluation.result_files import (
    COSTS,
    EVIDENCE,
    RELEARNING,
    UNIFORM,
    read_evidence,
    read_first_continuations,
    read_relearning,
    read_report,
)
from circuit_breaking.evaluation.tables import flat_rows
from circuit_breaking.figures.browser.page import end_with_page
from circuit_breaking.figures.edge_effects import draw_evidence
from circuit_breaking.figures.edges import draw_edges
from circuit_breaking.figures.loss_by_toxicity import draw_loss_by_toxicity
from circuit_breaking.figures.pareto import draw_pareto
from circuit_breaking.figures.relearning import draw_relearning
from circuit_breaking.figures.report import draw_models
from circuit_breaking.figures.training import draw_finetuning
from circuit_breaking.runs.cost import COST_FILE
from circuit_breaking.runs.files import read_json, write_csv, write_json, write_text
from circuit_breaking.runs.results import Comparison

PICTURES = (
    "pareto.png", "models.png", "loss_by_toxicity.png", "graph.png", "evidence.png", "relearning.png",
    "finetuned/finetuning.png",
)  # fmt: skip


def before_and_after(folder: Path, count: int) -> str:
    """The first continuation by every model but random masks, of the first toxic prompts. It may be offensive."""
    parts = []
    for prompt, by_model in read_first_continuations(folder, count).items():
        lines = [f"- {name}: {_one_line(text)}" for name, text in by_model.items()]
        parts.append("\n".join([f"> {_one_line(prompt)}", "", *lines]))
    return "\n\n".join(parts)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def gather_costs(folder: Path) -> dict[str, Any]:
    """What making each model cost, by name."""
    return {path.parent.name: read_json(path) for path in sorted(folder.glob(f"*/*/{COST_FILE}"))}


def main(settings: Settings) -> None:
    settings.check()
    folder = settings.out / settings.run
    report = read_report(folder)
    models = report["models"]
    evidence = read_evidence(folder) if (folder / EVIDENCE).is_file() else None
    relearning = read_relearning(folder) if (folder / RELEARNING).is_file() else None
    examples = before_and_after(folder, settings.num_examples) if settings.examples else ""
    draw_pareto(folder)
    draw_models(folder)
    if (folder / UNIFORM).is_file():
        draw_loss_by_toxicity(folder)
    if (folder / "graph.json").is_file():
        draw_edges(folder)
    if evidence is not None:
        draw_evidence(folder)
    if relearning is not None:
        draw_relearning(folder)
    if list(folder.glob("finetuned/*/metrics.jsonl")):
        draw_finetuning(folder / "finetuned")
    costs = gather_costs(folder)
    write_json(folder / COSTS, costs)
    Comparison(pareto=pareto(models), random_edges=controls(models)).write(folder / "comparison.json")
    write_csv(folder / "report.csv", flat_rows(models))
    pictures = [name for name in PICTURES if (folder / name).is_file()]
    write_text(folder / "report.md", render(report, evidence, relearning, costs, pictures, examples))
    end_with_page(folder, settings.num_examples if settings.examples else 0)
    print(f"written to {folder}: report.md, report.csv, costs.json, {', '.join(pictures)}")


if __name__ == "__main__":
    run_script(main, settings)
