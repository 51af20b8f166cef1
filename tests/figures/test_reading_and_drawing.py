"""A damaged result file ends in a sentence that names it; a defect of the drawing code keeps its traceback."""

import copy
import json
from importlib import import_module
from pkgutil import iter_modules

import pytest
import torch
from helpers.results import write_comparison
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from circuit_breaking import figures
from circuit_breaking.errors import UserError
from circuit_breaking.evaluation.result_files import OLD_NAMES, read_evidence, read_report
from circuit_breaking.figures.edge_curve import draw_curve
from circuit_breaking.figures.edge_effects import draw_evidence
from circuit_breaking.figures.edge_graph import draw_graph
from circuit_breaking.figures.heat_map import draw_heat_map
from circuit_breaking.figures.indirect_objects import draw_comparison, draw_models, draw_next_tokens, draw_stages
from circuit_breaking.figures.loss_by_toxicity import draw_loss_by_toxicity
from circuit_breaking.figures.methods import draw_methods
from circuit_breaking.figures.mnist import draw_run
from circuit_breaking.figures.pareto import draw_pareto
from circuit_breaking.figures.relearning import draw_relearning
from circuit_breaking.figures.report import draw_models as draw_all_models
from circuit_breaking.figures.report import draw_report
from circuit_breaking.figures.sweep import draw_sweep
from circuit_breaking.figures.training import draw_finetuning, draw_training
from circuit_breaking.graph import EdgeGraph
from circuit_breaking.runs.files import read_json, write_json, write_jsonl, write_text
from circuit_breaking.runs.ioi_results import GraphRecord
from circuit_breaking.runs.tensors import write_tensors


def write_indirect_objects(folder):
    row = {"n_cut": 3, "logit_difference": 2.0, "ordinary_loss": 1.0}
    write_json(folder / "comparison.json", {"original": row, "methods": {"EAP": [row, {**row, "n_cut": 9}]}})
    write_json(folder / "stages.json", {"faithful": 0.9, "stages": [{"kept": 80, "share": 1.0}]})
    measures = {"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}}
    write_json(folder / "report.json", {"models": {"original": {"edges_cut": 0, "measures": measures}}})
    tokens = {"original": [{"token": " Mary", "probability": 0.7}]}
    write_json(folder / "next_tokens.json", {"prompt": "Then", "IO": " Mary", "S": " John", "models": tokens})
    circuit = {"classes": {"mover": ["a1.0"]}, "in_circuit": ["a0.1->m1"]}
    graph = GraphRecord.of(EdgeGraph(2, 2), {"a0.1->m1": 0.5, "embed->m0": 1.0}).to_json()
    write_json(folder / "graph.json", {**graph, "record": "known circuit", **circuit})


def write_others(folder):
    metrics = [{"step": i, "phase": "relax", "keep_loss": 3.0, "break_loss": 4.0, "n_cut": 2} for i in range(3)]
    write_jsonl(folder / "metrics.jsonl", metrics)
    rows = [{"method": "clamped", "budget": 2, "toxic": 1.0, "ordinary": 1.0, "gain": 0.1}]
    write_json(folder / "methods.json", {"original": {"toxic": 1.0, "ordinary": 1.0}, "masks": rows})
    row = {"budget": 2, "edges_cut": 2, "toxic": 1.0, "ordinary": 0.9, "gain": 0.1}
    curve = {"original": {"toxic": 0.5, "ordinary": 0.9}, "rows": [row, {**row, "budget": 5, "edges_cut": 4}]}
    write_json(folder / "curve.json", curve)
    write_text(folder / "sweep.csv", "lr,exit_code,seconds,loss\n1,0,3,0.5\n2,0,3,0.4\n")


def write_mnist(folder):
    row = {"step": 0, "variant": "mask", "edges cut": 2, "test target": 0.5, "test other": 0.9}
    write_jsonl(folder / "metrics.jsonl", [row, {**row, "step": 1}])
    write_json(
        folder / "report.json",
        {"script": "mnist/main.py", "source": "digits", "target_class": 3, "mates": [4], "side": 2,
         "images": {"bad examples": 5}, "edges": {"first layer": 8, "last layer": 4},
         "results": {"original": row, "mask": row}},
    )  # fmt: skip
    write_tensors(
        folder / "mask.safetensors", {"mask": torch.tensor([0.0, 1.0] * 6), "mean target image": torch.rand(4)}, {}
    )


FIGURES = {  # name: (writes the files, draws, the files that are read)
    "report": (write_comparison, draw_report, ["report.json"]),
    "models": (write_comparison, draw_all_models, ["report.json"]),
    "pareto": (write_comparison, draw_pareto, ["report.json"]),
    "loss by toxicity": (write_comparison, draw_loss_by_toxicity, []),
    "evidence": (write_comparison, draw_evidence, ["evidence.json"]),
    "relearning": (write_comparison, draw_relearning, ["relearning.json"]),
    "finetuning": (
        write_comparison, lambda folder: draw_finetuning(folder / "finetuned"), ["finetuned/joint/finetuning.json"],
    ),
    "training": (write_others, draw_training, []),
    "methods": (write_others, draw_methods, ["methods.json"]),
    "curve": (write_others, draw_curve, ["curve.json"]),
    "sweep": (write_others, lambda folder: draw_sweep(folder, "lr"), []),
    "comparison of masks": (write_indirect_objects, draw_comparison, ["comparison.json"]),
    "stages": (write_indirect_objects, draw_stages, ["stages.json"]),
    "models of indirect objects": (write_indirect_objects, draw_models, ["report.json"]),
    "next tokens": (write_indirect_objects, draw_next_tokens, ["next_tokens.json"]),
    "graph": (write_indirect_objects, draw_graph, ["graph.json"]),
    "heat map": (write_indirect_objects, draw_heat_map, ["graph.json"]),
    "mnist": (write_mnist, draw_run, ["report.json"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FIGURES)
def test_a_defect_in_drawing_keeps_its_traceback(tmp_path, monkeypatch, name):
    write, draw, _ = FIGURES[name]
    write(tmp_path)
    monkeypatch.setattr(Figure, "savefig", lambda *args, **kwargs: None)
    monkeypatch.setattr("circuit_breaking.figures.style.atomic_path", lambda path: _Nothing())
    draw(tmp_path)

    def broken(*args, **kwargs):
        raise TypeError("a defect of ours")

    for method in ("set", "set_title", "tick_params", "annotate", "plot", "set_xlabel", "imshow", "set_ylabel"):
        with monkeypatch.context() as patch:
            called = []
            patch.setattr(Axes, method, lambda *args, **kwargs: called.append(1) or broken())  # noqa: B023
            try:
                draw(tmp_path)
            except TypeError as error:
                assert str(error) == "a defect of ours"
                return
            assert not called  # this figure does without it
    pytest.fail("no method of the axes was called")


class NotDrawnError(Exception):
    """The file was read without an error."""


def not_drawn(*args):
    raise NotDrawnError


class _Nothing:
    def __enter__(self):
        return None

    def __exit__(self, *args):
        return False


def positions(value, at=()):
    """Position of every value in a JSON value; of lists the first element only."""
    yield at
    inner = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    for key, one in inner:
        yield from positions(one, (*at, key))


def damaged(value, at, how):
    """A copy with the value at a position removed or replaced."""
    changed = copy.deepcopy(value)
    if not at:
        return how
    place = changed
    for key in at[:-1]:
        place = place[key]
    if how == "removed":
        del place[at[-1]]
    else:
        place[at[-1]] = how
    return changed


def shrunk(value):
    """A comparison's report with one model of each kind, so that there is less to damage."""
    names = ("original", "zero_12", "random_zero_12_seed0", "joint")
    if "zero_12" not in value.get("models", {}):
        return value
    models = {name: value["models"][name] for name in names if name in value["models"]}
    for one in models.values():
        one.pop("greedy", None)
        one["continuations"] = {
            key: {name: about[name] for name in ("toxic_share", "toxicity", "perplexity")}
            for key, about in one.get("continuations", {}).items()
        }
    return {**value, "models": models}


@pytest.mark.parametrize("name", [name for name, (_, _, files) in FIGURES.items() if files])
def test_whatever_is_damaged_in_a_file_is_a_sentence_or_drawn(tmp_path, monkeypatch, name):
    """Each value removed or of another type: either it does not matter, or a `UserError` names the file.

    All are read; as drawing takes time, one in 20 of those that can be read is drawn.
    """
    write, draw, (file,) = FIGURES[name]
    write(tmp_path)
    monkeypatch.setattr(Figure, "savefig", lambda *args, **kwargs: None)
    monkeypatch.setattr("circuit_breaking.figures.style.atomic_path", lambda path: _Nothing())
    whole = shrunk(read_json(tmp_path / file)) if name != "relearning" else read_json(tmp_path / file)
    write_json(tmp_path / file, whole)
    draw(tmp_path)
    refused, read = 0, 0
    modules = [import_module(f"{figures.__name__}.{found.name}") for found in iter_modules(figures.__path__)]
    for at in list(positions(whole)):
        for how in ("removed", "x", None, [], {}, 3):
            (tmp_path / file).write_text(json.dumps(damaged(whole, at, how)))
            try:
                with monkeypatch.context() as patch:
                    for module in modules if read % 20 else ():
                        patch.setattr(module, "figure", not_drawn, raising=False)
                    draw(tmp_path)
            except NotDrawnError:
                read += 1
            except UserError as error:
                refused += 1
                assert "\n" not in str(error) and "traceback" not in str(error)
                assert str(tmp_path) in str(error) or "edge" in str(error), (at, how)
            except Exception as error:
                raise AssertionError(f"{at} {how!r}: {error!r}") from error
            else:
                read += 1
    assert refused > 10


def test_fields_of_the_previous_release_are_read(tmp_path, capsys):
    write_comparison(tmp_path)
    report, evidence = read_report(tmp_path), read_evidence(tmp_path)
    assert "release" not in capsys.readouterr().err
    for file in ("report.json", "evidence.json"):
        value = read_json(tmp_path / file)
        text = json.dumps({name: value[name] for name in value if name not in ("record", "version")})
        for old, new in OLD_NAMES.items():
            text = text.replace(f'"{new}":', f'"{old}":')
        (tmp_path / file).write_text(text)
    assert '"touched":' in (tmp_path / "report.json").read_text() and '"within":' in text
    assert read_report(tmp_path) == report and read_evidence(tmp_path) == evidence
    assert capsys.readouterr().err.count("has the format of an older release") == 2
    assert draw_pareto(tmp_path).is_file() and draw_evidence(tmp_path).is_file()


def test_tables_that_are_damaged(tmp_path):
    write_comparison(tmp_path)
    for text in ("toxicity,original\n0.5,x\n", "original\n1\n", "toxicity,original\n"):
        write_text(tmp_path / "uniform.csv", text)
        with pytest.raises(UserError, match=r"uniform\.csv"):
            draw_loss_by_toxicity(tmp_path)
    write_mnist(tmp_path)
    write_tensors(tmp_path / "mask.safetensors", {"mask": torch.ones(5), "mean target image": torch.rand(4)}, {})
    with pytest.raises(UserError, match="no masks that fit"):
        draw_run(tmp_path)
    assert not list(tmp_path.glob("*.png"))
