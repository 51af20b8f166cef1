"""`report.html`: everything that the result files of a folder say, as one page that needs no network.

`write_page` reads the files, puts the sections together and renders `assets/report.html`. The page holds its style, its
scripts and their libraries, and its data as JSON, so that it opens from any disk. Whatever comes from data or models is
escaped: Jinja2 escapes text in the page, JSON is escaped by `tojson`, and `Plot` escapes what Plotly reads as HTML. The
page also forbids the browser to run any script but its own, and to load anything.
"""

import sys
from base64 import b64encode
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from circuit_breaking.errors import UserError
from circuit_breaking.evaluation.result_files import read_first_continuations
from circuit_breaking.figures.browser import comparison, edges, models, others, prompts, training
from circuit_breaking.figures.browser.about import about, model_of
from circuit_breaking.figures.browser.parts import Generations, Graph, Plots, Section
from circuit_breaking.runs.distributed import is_main
from circuit_breaking.runs.files import write_text

PAGE = "report.html"
ASSETS = Path(__file__).parent / "assets"
SCRIPTS = ("vendor/plotly-basic.min.js", "vendor/d3.min.js", "edge_graph.js", "report.js")
SECTIONS: tuple[Callable[[Path], Section | None], ...] = (
    models.models, comparison.comparison, prompts.measures, prompts.next_tokens, others.mnist, edges.edges,
    prompts.comparison, others.methods, prompts.faithfulness, training.curve, prompts.stages, prompts.covering,
    models.evidence, models.uniform, models.relearning, training.training, training.finetuning, others.sweep,
    others.harness, models.costs, about,
)  # fmt: skip


def write_page(folder: Path | str, generations: int = 0) -> Path:
    """Write `report.html` into a folder of results, from the files that are in it.

    Args:
        folder: a run folder, or another folder of results.
        generations: number of prompts of which the models' continuations are shown, folded behind a warning. They may
            be offensive. 0: none.

    Raises:
        UserError: the folder holds no results, a file of results is damaged, or the page cannot be written.
    """
    page = make_page(folder, generations)
    write_text(Path(folder) / PAGE, page)
    return Path(folder) / PAGE


def make_page(folder: Path | str, generations: int = 0) -> str:
    """The page of a folder of results as HTML. Arguments and errors are those of `write_page`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}. Give the folder of a run, such as data/toxicity/demo.")
    found = [section for make in SECTIONS if (section := make(folder)) is not None]
    if not found:
        raise UserError(f"{folder} holds no results. Give the folder of a run, such as data/toxicity/demo.")
    if generations:
        texts = Generations(list(read_first_continuations(folder, generations).items()))
        found.insert(-1, Section("What the models write", [texts]))
    return render(folder.resolve().name, model_of(folder), models.key_figures(folder), found)


def end_with_page(folder: Path | str, generations: int = 0) -> None:
    """Write the page at the end of a script, in the main process. If it cannot be made, stderr says why.

    The results are written by then, so that a damaged file of an earlier run in the same folder ends no script. The
    arguments are those of `write_page`.

    Raises:
        UserError: the page cannot be written, for example because the disk is full.
    """
    if not is_main():
        return
    try:
        page = make_page(folder, generations)
    except UserError as error:
        print(f"note: there is no new {PAGE}: {error}", file=sys.stderr)
        return
    write_text(Path(folder) / PAGE, page)


def render(title: str, model: str, figures: list[tuple[str, str]], sections: list[Section]) -> str:
    """The page as HTML.

    Args:
        title: name of the run.
        model: name of the model, "" if unknown.
        figures: labels and figures for the top of the page.
        sections: the sections.
    """
    plots: list[dict[str, Any]] = []
    graphs: list[list[dict[str, Any]]] = []
    numbers: dict[int, int] = {}  # of plots and graphs, by the identity of the part
    for part in (part for section in sections for part in section.parts):
        if isinstance(part, Plots):
            for plot in part.plots:
                numbers[id(plot)] = len(plots)
                plots.append(plot.to_json())
        elif isinstance(part, Graph):
            numbers[id(part)] = len(graphs)
            graphs.append([one.to_json() for one in part.lists])
    scripts = [_asset(name) for name in SCRIPTS]
    return _template().render(
        title=title, model=model, figures=figures, sections=sections, number=lambda part: numbers[id(part)],
        data={"plots": plots, "graphs": graphs}, style=_asset("report.css"), scripts=scripts,
        hashes=[f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" for script in scripts],
    )  # fmt: skip


@cache
def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


@cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(ASSETS), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("report.html")
