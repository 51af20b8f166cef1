"""Pictures of masks, and the published circuit: drawn from files alone, saying what the files say."""

import json
from contextlib import nullcontext
from itertools import combinations, pairwise

import matplotlib.image
import numpy as np
import pytest

from circuit_breaking.errors import UserError
from circuit_breaking.figures.edge_graph import _curves, draw_graph, read_graph
from circuit_breaking.figures.edge_table import write_edge_table
from circuit_breaking.figures.heat_map import draw_heat_map
from circuit_breaking.figures.indirect_objects import (
    PANELS,
    draw_comparison,
    draw_models,
    draw_next_tokens,
    draw_run,
    draw_stages,
)
from circuit_breaking.figures.training import draw_training
from circuit_breaking.graph import Edge, EdgeGraph, node_of
from circuit_breaking.ioi.known_circuits import HEADS, circuit_edges, overlap
from circuit_breaking.runs.files import read_json, write_json, write_text
from circuit_breaking.runs.ioi_results import GraphRecord
from circuit_breaking.runs.records import RunSettings


def some_edges(graph, count, seed=0):
    random = np.random.default_rng(seed)
    chosen = random.choice(len(graph), count, replace=False)
    return {graph.edges[index]: float(random.normal()) for index in sorted(chosen)}


@pytest.mark.parametrize(
    ("graph", "count"),
    [(EdgeGraph(4, 4), 0), (EdgeGraph(4, 4), 5), (EdgeGraph(12, 12), 200), (EdgeGraph(30, 9), 200),
     (EdgeGraph(2, 3, split_qkv=True), 9), (EdgeGraph(3, 2, parallel=True), 4)],
)  # fmt: skip
def test_a_mask_is_drawn_as_graph_and_matrix(tmp_path, drawn, graph, count):
    edges = some_edges(graph, count)
    write_json(tmp_path / "graph.json", GraphRecord.of(graph, edges).to_json())
    assert read_graph(tmp_path / "graph.json")[:2] == (graph, edges)
    for draw in (draw_graph, draw_heat_map):
        picture = draw(tmp_path)
        assert picture.read_bytes().startswith(b"\x89PNG") and matplotlib.image.imread(picture).shape[0] > 400
    figures = drawn
    layered, matrix = (figure.axes[0] for figure in drawn)
    assert len(layered.patches) == count and f"{count} of {len(graph):,} edges cut" in layered.get_title()
    widths = sorted(patch.get_linewidth() for patch in layered.patches)
    if count:
        largest = max(abs(value) for value in edges.values())
        np.testing.assert_allclose(widths, sorted(0.5 + 3 * abs(value) / largest for value in edges.values()))
    named = {text.get_text() for text in layered.texts}
    assert named == {node for edge in edges for node in (edge.source, node_of(edge.target))} | {"embed", "output"}
    texts = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert texts[:1] == ["from embed"] and (count == 0 or f"{largest:.2g}" in texts)
    for patch in layered.patches:  # an arrow points at its reader
        assert patch.get_arrowstyle().arrow == "-|>"
    places = {(graph.sources.index(edge.source), graph.readers.index(edge.target)): v for edge, v in edges.items()}
    points = matrix.collections[0]
    found = {tuple(map(int, at)): v for at, v in zip(points.get_offsets(), points.get_array(), strict=True)}
    assert found == places


def test_edges_of_a_bundle_can_be_told_apart():
    """At GPT-2's size, the curves from all heads of a layer to its MLP keep a distance from each other."""
    graph = EdgeGraph(12, 12)
    edges = [Edge(f"a0.{head}->m0") for head in range(12)]
    curves = _curves(graph, edges, (0.02, 0.02))
    lines = {edge: curves[edge].interpolated(20).vertices for edge in edges}
    for first, second in pairwise(edges):
        between = slice(40, 80)  # the straight part of the lane
        gap = lines[first][between, 1].min() - lines[second][between, 1].max()
        assert gap > 0.04  # of a layer; nearer than this, two lines would be drawn as one
    ends = [curves[edge].vertices[-1].tolist() for edge in edges]
    assert len({tuple(end) for end in ends}) == 12


@pytest.mark.parametrize("graph", [EdgeGraph(4, 4), EdgeGraph(12, 12), EdgeGraph(30, 9), EdgeGraph(48, 25)], ids=str)
def test_labels_of_the_matrix_do_not_overlap(tmp_path, graph, monkeypatch):
    overlapping = []

    def looked_at(figure, path, **options):
        figure.draw_without_rendering()
        for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis):
            boxes = [label.get_window_extent() for label in axis.get_ticklabels()]
            overlapping.extend((a, b) for a, b in combinations(boxes, 2) if a.overlaps(b))
            assert len(boxes) > 3 and "output" in {label.get_text() for label in figure.axes[0].get_yticklabels()}

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", looked_at)
    monkeypatch.setattr("circuit_breaking.figures.style.atomic_path", lambda path: nullcontext(path))
    write_json(tmp_path / "graph.json", GraphRecord.of(graph, some_edges(graph, 5)).to_json())
    draw_heat_map(tmp_path)
    assert overlapping == []


def test_edges_are_written_as_latex(tmp_path):
    edges = {"m0->a2.1": 0.02, "a0.1->m1": -0.5}
    graph = GraphRecord.of(EdgeGraph(4, 4), edges, "cut", "fall of toxic_loss, 50%")
    write_json(tmp_path / "graph.json", graph.to_json())
    assert write_edge_table(tmp_path).read_text().splitlines() == [
        "% 2 of 207 edges cut; needs \\usepackage{booktabs}", "\\begin{tabular}{llr}", "\\toprule",
        "source & reader & fall of toxic\\_loss, 50\\% \\\\", "\\midrule", "a0.1 & m1 & $-0.5$ \\\\",
        "m0 & a2.1 & $0.02$ \\\\", "\\bottomrule", "\\end{tabular}",
    ]  # fmt: skip


def test_bars_show_both_names_before_and_after(tmp_path, drawn):
    rows = [
        {"token": " Mary", "probability": 0.7},
        {"token": " a", "probability": 0.1},
        {"token": " John", "probability": 1e-4},
    ]
    about = {"prompt": "Then Mary and John met, John gave it to", "IO": " Mary", "S": " John",
             "models": {"original": rows, "edges cut": rows[::-1]}}  # fmt: skip
    write_json(tmp_path / "next_tokens.json", about)
    assert draw_next_tokens(tmp_path).read_bytes().startswith(b"\x89PNG")
    first, second = drawn[0].axes
    assert [bar.get_width() for bar in first.patches] == [0.7, 0.1, 1e-4]
    assert [label.get_text() for label in second.get_yticklabels()] == ["John", "a", "Mary"]
    colours = [bar.get_facecolor() for bar in first.patches]
    assert len(set(colours)) == 3 and colours == [bar.get_facecolor() for bar in second.patches][::-1]


def test_a_comparison_shows_every_method_and_the_range_of_chance(tmp_path, drawn):
    def row(n_cut, value):
        return {"n_cut": n_cut, "logit_difference": value, "ordinary_loss": value / 2}

    methods = {"EAP": [row(5, 3.0), row(10, 1.0)], "random": [row(5, 4.0), row(5, 5.0), row(10, 4.0), row(10, 2.0)]}
    write_json(tmp_path / "comparison.json", {"original": row(0, 6.0), "methods": methods})
    assert draw_comparison(tmp_path).read_bytes().startswith(b"\x89PNG")
    left, right = drawn[0].axes
    lines = {line.get_label(): line.get_ydata() for line in left.lines}
    assert list(lines["EAP"]) == [3.0, 1.0] and list(lines["random"]) == [4.5, 3.0] and lines["original"][0] == 6.0
    assert list({line.get_label(): line.get_ydata() for line in right.lines}["EAP"]) == [1.5, 0.5]
    assert len(left.collections) == 1  # one band


def test_reports_and_stages_are_drawn(tmp_path, drawn):
    entry = {"value": 0.5, "low": 0.4, "high": 0.6}
    measures = dict.fromkeys(PANELS, entry)
    broken = {**measures, "logit_difference": {"value": None, "low": None, "high": None}}
    models = {"original": {"edges_cut": 0, "measures": measures}, "run": {"edges_cut": 1200, "measures": broken}}
    write_json(tmp_path / "report.json", {"models": models})
    write_json(
        tmp_path / "stages.json", {"faithful": 0.9, "stages": [{"kept": 80, "share": 1.0}, {"kept": 64, "share": 0.5}]}
    )
    for draw in (draw_models, draw_stages):
        assert draw(tmp_path).read_bytes().startswith(b"\x89PNG")
    labels = [label.get_text() for label in drawn[0].axes[0].get_yticklabels()]
    assert labels == ["original", "run (1,200 cut)"]


def test_files_that_cannot_be_drawn(tmp_path):
    for draw, name in (
        (draw_graph, "graph"), (draw_next_tokens, "next_tokens"), (draw_comparison, "comparison"),
        (draw_models, "report"), (draw_stages, "stages"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"no file .*{name}.json. Make it with ioi/"):
            draw(tmp_path)
        for content in ("[]", "{}", '{"methods": 3, "original": 1, "graph": {"n_heads": 0}, "edges": 2, "models": {}}'):
            write_text(tmp_path / f"{name}.json", content)
            with pytest.raises(UserError, match=f"{name}.json") as error:
                draw(tmp_path)
            assert "\n" not in str(error.value)
    write_json(tmp_path / "graph.json", GraphRecord.of(EdgeGraph(2, 2), {"a0.5->m1": 1.0}).to_json())
    with pytest.raises(UserError, match=r"no edge 'a0.5->m1'"):
        draw_heat_map(tmp_path)
    assert not list(tmp_path.glob("*.png"))


def test_the_published_circuit():
    graph = EdgeGraph(12, 12)
    assert sum(map(len, HEADS.values())) == 26 and all(
        head in graph.sources for heads in HEADS.values() for head in heads
    )
    edges = circuit_edges(graph)
    layer = {head: int(head[1:].split(".")[0]) for heads in HEADS.values() for head in heads}
    # by hand: embed to 3 + 2 + 4 + 13 heads; pairs of classes in layer order; 13 movers to output
    pairs = [("previous token", "induction"), ("duplicate token", "S-inhibition"), ("induction", "S-inhibition")]
    movers = [head for name, heads in HEADS.items() if "mover" in name for head in heads]
    count = 3 + 2 + 4 + 13 + 13 + sum(layer[a] < layer[b] for x, y in pairs for a in HEADS[x] for b in HEADS[y])
    count += sum(layer[a] < layer[b] for a in HEADS["S-inhibition"] for b in movers)
    assert len(edges) == count == 35 + 8 + 12 + 16 + 52
    split = circuit_edges(EdgeGraph(12, 12, split_qkv=True))
    assert "a8.6->a9.9.q" in split and "a8.6->a9.9.k" not in split and "embed->a9.9.v" in split
    assert {edge[:-2] if edge[-2] == "." and edge[-1] in "qkv" else edge for edge in split} == edges


def test_overlap_with_the_published_circuit(tmp_path, drawn):
    graph = EdgeGraph(12, 12)
    mask = {"a8.6->a9.9": 2.0, "a9.9->output": 1.0, "m0->a5.5": 0.5, "a1.1->m3": 0.1}
    found = overlap(graph, mask)
    assert found["in_circuit"] == ["a8.6->a9.9", "a9.9->output"]
    assert found["edges"]["precision"] == 0.5 and found["edges"]["recall"] == 2 / 123
    assert found["edges"]["by_chance"] == 123 / 11611
    assert found["heads"]["found"] == 4 and found["heads"]["shared"] == 3 and found["heads"]["recall"] == 3 / 26
    assert found["classes"]["name mover"] == {"heads": 3, "touched": 1}
    assert overlap(graph, [])["edges"]["precision"] is None
    everything = overlap(graph, graph.edges)
    assert everything["edges"]["recall"] == 1 and everything["edges"]["precision"] == everything["edges"]["by_chance"]
    write_json(
        tmp_path / "known.json",
        {
            **GraphRecord.of(graph, mask).to_json(),
            "record": "known circuit",
            "classes": HEADS,
            "in_circuit": found["in_circuit"],
        },
    )
    draw_graph(tmp_path, "known")
    assert len(drawn[0].axes[0].patches) == 4 and len(drawn[0].axes[0].texts) >= 26
    with pytest.raises(UserError, match="GPT-2 small's, and this is a graph of 4 layers"):
        overlap(EdgeGraph(4, 4), [])
    assert read_json(tmp_path / "known.json")["what"] == "cut"


def test_dollar_signs_are_drawn_as_they_are(tmp_path, drawn):
    prompt = r"It costs $\frac for Mary, so John gave $x$ to"  # as a formula this would not even parse
    rows = [{"token": " $a$", "probability": 0.7}, {"token": " $", "probability": 0.1}]
    about = {"prompt": prompt, "IO": " $a$", "S": " $", "models": {"original $m_1$": rows}}
    write_json(tmp_path / "next_tokens.json", about)
    draw_next_tokens(tmp_path)
    (axes,) = drawn[0].axes
    texts = [drawn[0]._suptitle, axes.title, *axes.get_yticklabels()]
    assert [text.get_text() for text in texts] == [f"{prompt} …", "original $m_1$", "$a$", "$"]
    assert not any(text.get_parse_math() for text in texts)


@pytest.mark.parametrize(
    ("task", "names"),
    [("ioi", ("IO - S", "indirect object", "subject")), ("addition", ("right - wrong", "right answer"))],
)
def test_other_tasks_have_no_names(tmp_path, drawn, monkeypatch, task, names):
    monkeypatch.setattr("circuit_breaking.figures.indirect_objects.draw_edges", lambda folder: None)
    settings = {"task": task, "objective": "logit_difference"}
    RunSettings(script="ioi/train_mask.py", provenance={"settings": settings}).write(tmp_path / "settings.json")
    rows = [{"step": step, "keep_loss": 1.0, "break_loss": -2.0, "n_cut": 4} for step in range(3)]
    write_text(tmp_path / "metrics.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
    bars = [{"token": " a", "probability": 0.7}]
    write_json(tmp_path / "next_tokens.json", {"prompt": "1+1=", "IO": " a", "S": " b", "models": {"original": bars}})
    draw_run(tmp_path)
    written = " ".join(text.get_text() for figure in drawn for legend in figure.legends for text in legend.get_texts())
    assert all(name in written for name in names) and ("subject" in written) == (task == "ioi")


def test_a_count_after_the_last_step_is_drawn(tmp_path, drawn):
    rows = [{"step": step, "keep_loss": 1.0, "break_loss": 2.0, "n_masked": 9} for step in range(3)]
    write_text(tmp_path / "metrics.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
    draw_training(tmp_path, count="n_masked", counted="units masked", final=5)
    (line,) = drawn[0].axes[-1].lines
    assert list(line.get_ydata()) == [9, 9, 9, 5] and drawn[0].axes[-1].texts[0].get_text() == "5"
