"""Settings, grids, graphs and results with values of another type are refused in one sentence."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from test_bad_files import MODEL, refused

from circuit_breaking.engine.load import load_model
from circuit_breaking.errors import UserError
from circuit_breaking.figures.edge_effects import draw_evidence
from circuit_breaking.figures.edge_graph import draw_graph, read_graph
from circuit_breaking.figures.heat_map import draw_heat_map
from circuit_breaking.figures.indirect_objects import draw_next_tokens
from circuit_breaking.figures.loss_by_toxicity import draw_loss_by_toxicity
from circuit_breaking.figures.methods import draw_methods
from circuit_breaking.figures.pareto import draw_pareto
from circuit_breaking.figures.relearning import draw_relearning
from circuit_breaking.figures.report import draw_models, draw_report
from circuit_breaking.figures.training import draw_finetuning, draw_training
from circuit_breaking.runs.config import resolve_defaults
from circuit_breaking.runs.files import write_json
from circuit_breaking.runs.grid import combinations, parse_grid
from circuit_breaking.runs.ioi_results import GraphRecord
from circuit_breaking.runs.jobs import LocalJob, run_job
from circuit_breaking.runs.sweep import results_of


@pytest.mark.parametrize("word", ["a=0:99999999999999999999999", "a=0:9:0", "a=1:2:3:4", "a=0:" + "9" * 5000, "a=x:1"])
def test_grids_without_end(word):
    with pytest.raises(UserError):
        parse_grid([word])


def test_grids_of_too_many_jobs():
    grid = parse_grid([f"{name}=0:100" for name in "abcdef"])
    with pytest.raises(UserError, match="1,000,000,000,000 jobs"):
        combinations(grid)


def test_a_job_and_its_results_never_end_a_sweep(tmp_path):
    assert run_job(["a\0b"], str(tmp_path / "log"))["exit_code"] == 1
    job = LocalJob(["a\0b"], tmp_path / "log", 1)
    assert job.done() and job.result()["exit_code"] == 1
    (tmp_path / "report.json").write_text("[1, 2]")
    assert results_of(tmp_path) == {}
    (tmp_path / "report.json").write_text('{"loss": 1.5, "settings": {"lr": 1}}')
    assert results_of(tmp_path) == {"loss": 1.5}


@dataclass
class Open:
    length: int | None = None
    model: str | None = None
    alpha: float | None = None
    path: Path | None = None


def test_records_with_values_of_another_type():
    whole = {"length": 5, "model": "m", "alpha": 1, "path": "p", "more": []}
    assert resolve_defaults(Open(), whole) == Open(5, "m", 1, Path("p"))
    for name, value in (("length", "5"), ("length", 5.5), ("model", 3), ("alpha", "x"), ("path", 7), ("model", ["m"])):
        with pytest.raises(UserError, match=f"gives {name} as"):
            resolve_defaults(Open(), {**whole, name: value})


@pytest.mark.parametrize(
    "changes",
    [{"n_layers": 10**9}, {"n_heads": 10**9}, {"n_layers": 2.5}, {"n_layers": "2"}, {"n_heads": True}, {"x": 1}],
)
def test_graphs_that_no_model_has(tmp_path, changes):
    record = GraphRecord.of(MODEL.graph, {MODEL.graph.edges[0]: 0.5}).to_json()
    write_json(tmp_path / "graph.json", {**record, "graph": {**record["graph"], **changes}})
    refused(read_graph, tmp_path / "graph.json", "does not describe a graph")


def test_graphs_of_edges_that_are_none(tmp_path):
    for edges in ({"a0.9->m0": 0.5}, {"": 1}, {"embed->m0": "x"}, ["embed->m0"], {"embed->m0": None}):
        write_json(tmp_path / "graph.json", {**GraphRecord.of(MODEL.graph, {}).to_json(), "edges": edges})
        refused(read_graph, tmp_path / "graph.json")


def test_models_of_names_that_are_none():
    for name in ("a" * 300, "~nobody-at-all/model", "/x" * 3000, "a\0b"):
        with pytest.raises(UserError):
            load_model(name, device="cpu")


RESULTS = {
    "report.json": [draw_pareto, draw_models, draw_report],
    "evidence.json": [draw_evidence],
    "relearning.json": [draw_relearning],
    "uniform.csv": [draw_loss_by_toxicity],
    "metrics.jsonl": [draw_training, lambda folder: draw_finetuning(folder.parent)],
    "next_tokens.json": [draw_next_tokens],
    "graph.json": [draw_graph, draw_heat_map],
    "methods.json": [draw_methods],
}


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("text", ["[1]", '"x"', "{}", '{"models": 3}', '{"models": {"original": 1}}', '{"masks": [3]}'])
def test_results_that_are_others(tmp_path, name, text):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / name).write_text(text)
    for draw in RESULTS[name]:
        refused(draw, folder)
    assert [path.name for path in folder.iterdir()] == [name]
