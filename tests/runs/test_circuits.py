"""Circuits in and out: graphs of EAP-IG, tables of edges, paths, and what is refused."""

import json

import pytest
import torch
from helpers.models import small_gpt2

from circuit_breaking.ablation.ablate import ablate
from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.mask import save_mask
from circuit_breaking.errors import UserError
from circuit_breaking.graph import EdgeGraph, on_a_path
from circuit_breaking.runs.circuit_files import read_circuit, read_edges_to_cut, write_circuit
from circuit_breaking.runs.circuits import Circuit, circuit_of
from circuit_breaking.runs.eap_graph import eap_edges, eap_order
from circuit_breaking.runs.files import write_json, write_text
from circuit_breaking.runs.mask_record import write_edges

# one layer of two heads, as EAP-IG writes it: every source, then head by head its query, key and value
BY_HAND = {
    "cfg": {"n_layers": 1, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 8},
    "nodes": {
        "input": {"in_graph": True}, "a0.h0": {"in_graph": True}, "a0.h1": {"in_graph": False},
        "m0": {"in_graph": True}, "logits": {"in_graph": True},
    },
    "edges": {
        "input->a0.h0<q>": {"score": 0.25, "in_graph": False}, "input->a0.h0<k>": {"score": -1.5, "in_graph": True},
        "input->a0.h0<v>": {"score": 0.1, "in_graph": False}, "input->a0.h1<q>": {"score": 0.0, "in_graph": False},
        "input->a0.h1<k>": {"score": 3e-7, "in_graph": False}, "input->a0.h1<v>": {"score": 7.0, "in_graph": True},
        "input->m0": {"score": 0.5, "in_graph": False}, "a0.h0->m0": {"score": 0.30000001192092896, "in_graph": True},
        "a0.h1->m0": {"score": -0.2, "in_graph": False}, "input->logits": {"score": 1.25, "in_graph": True},
        "a0.h0->logits": {"score": -4.0, "in_graph": False}, "a0.h1->logits": {"score": 0.75, "in_graph": False},
        "m0->logits": {"score": 2.0, "in_graph": True},
    },
}  # fmt: skip
SHAPES = [EdgeGraph(3, 2, split, parallel) for split in (False, True) for parallel in (False, True)]


def a_circuit(graph, scores=True):
    torch.manual_seed(len(graph))
    values = torch.randn(len(graph), dtype=torch.float64) if scores else None
    return Circuit(graph, torch.rand(len(graph)) > 0.5, values)


def same(one, other):
    assert one.graph == other.graph and torch.equal(one.kept, other.kept)
    assert (one.scores is None) == (other.scores is None)
    assert one.scores is None or torch.equal(one.scores, other.scores)
    return True


def test_a_graph_written_by_hand_is_read_and_written_back_equal(tmp_path):
    (tmp_path / "hand.json").write_text(json.dumps(BY_HAND))
    circuit = read_circuit(tmp_path / "hand.json")
    assert circuit.graph == EdgeGraph(1, 2, split_qkv=True)
    assert circuit.kept_edges() == ["embed->a0.0.k", "embed->a0.1.v", "a0.0->m0", "embed->output", "m0->output"]
    assert float(circuit.scores[circuit.graph.index("a0.0->output")]) == -4.0
    write_circuit(tmp_path / "back.json", circuit)
    assert (tmp_path / "back.json").read_text() == (tmp_path / "hand.json").read_text()
    assert circuit.pathless() == ["embed->a0.1.v"]
    pruned = circuit.pruned()
    assert pruned.kept_edges() == ["embed->a0.0.k", "a0.0->m0", "embed->output", "m0->output"]


def test_node_flags_and_scores_of_a_file_come_back(tmp_path):
    value = json.loads(json.dumps(BY_HAND))
    value["nodes"]["a0.h1"] = {"in_graph": True, "score": 0.5}
    value["nodes"]["m0"]["score"] = float("nan")
    (tmp_path / "hand.json").write_text(json.dumps(value))
    read = read_circuit(tmp_path / "hand.json")
    write_circuit(tmp_path / "back.json", read)
    assert (tmp_path / "back.json").read_text() == (tmp_path / "hand.json").read_text()
    assert read_edges_to_cut(tmp_path / "hand.json") == read.cut_edges()


def test_the_edges_of_a_file_are_cut(tmp_path):
    hf = small_gpt2()
    graph = EdgeGraph(3, 3, split_qkv=True)
    write_circuit(tmp_path / "c.json", a_circuit(graph).top(100), d_model=24)
    tokens, model = torch.randint(0, 50, (2, 7)), load_model(hf, split_qkv=True, device="cpu")
    read = read_circuit(tmp_path / "c.json", model.graph)
    assert int(read.kept.sum()) == 100
    with torch.no_grad():
        model.mask.weights.copy_(read.kept)
        masked = model(tokens)
    with ablate(hf, read_edges_to_cut(tmp_path / "c.json")), torch.no_grad():
        torch.testing.assert_close(hf(tokens).logits, masked, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("graph", SHAPES, ids=str)
@pytest.mark.parametrize("scores", [True, False])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_tables_come_back_exactly(tmp_path, graph, scores, suffix):
    circuit = a_circuit(graph, scores)
    write_circuit(tmp_path / f"c.{suffix}", circuit)
    assert same(read_circuit(tmp_path / f"c.{suffix}"), circuit)


@pytest.mark.parametrize("graph", SHAPES, ids=str)
@pytest.mark.parametrize("scores", [True, False])
def test_graphs_of_all_shapes_come_back_exactly(tmp_path, graph, scores):
    circuit = a_circuit(graph, scores)
    write_circuit(tmp_path / "c.json", circuit, d_model=16)
    assert same(read_circuit(tmp_path / "c.json", graph), circuit)


@pytest.mark.parametrize("graph", [shape for shape in SHAPES if shape.split_qkv], ids=str)
def test_edges_are_listed_in_the_order_of_eap_ig(graph):
    expected, stream = [], ["input"]
    for layer in range(graph.n_layers):
        heads = [f"a{layer}.h{head}" for head in range(graph.n_heads)]
        for source in stream:
            expected += [f"{source}->{head}<{letter}>" for head in heads for letter in "qkv"]
            expected += [f"{source}->m{layer}"] * graph.parallel
        stream += heads
        expected += [f"{source}->m{layer}" for source in stream] * (not graph.parallel)
        stream.append(f"m{layer}")
    names = eap_edges(graph)
    assert [names[at] for at in eap_order(graph).tolist()] == [*expected, *(f"{node}->logits" for node in stream)]


def test_a_circuit_fits_the_graph_of_its_model_or_is_refused(tmp_path):
    whole, split = EdgeGraph(2, 2), EdgeGraph(2, 2, split_qkv=True)
    circuit = a_circuit(whole)
    three = circuit.of_graph(split)
    assert all(circuit.kept[whole.index("embed->a0.1")] == three.kept[split.index(f"embed->a0.1.{x}")] for x in "qkv")
    assert same(three.of_graph(whole), circuit)
    kept = three.kept.clone()
    kept[split.index("embed->a1.0.k")] ^= True
    with pytest.raises(UserError, match=r"that make up embed->a1\.0 differ.*split_qkv"):
        three.with_kept(kept).of_graph(whole)
    with pytest.raises(UserError, match=r"is of a graph of 2 layers x 2 heads.*the model has a graph of 3 layers"):
        circuit.of_graph(EdgeGraph(3, 2))
    write_circuit(tmp_path / "c.json", circuit, d_model=4)
    for other in (EdgeGraph(2, 3), EdgeGraph(3, 2), EdgeGraph(2, 2, parallel=True)):
        with pytest.raises(UserError, match="this circuit is of"):
            read_circuit(tmp_path / "c.json", other)


def test_masks_and_lists_of_edges_are_circuits(tmp_path):
    model = load_model(small_gpt2(), device="cpu")
    edges = ["embed->a0.0", "a0.1->m2"]
    model.mask.cut_(edges)
    save_mask(tmp_path / "mask.safetensors", model)
    write_edges(tmp_path, edges)
    assert read_edges_to_cut(tmp_path / "mask.safetensors") == edges == read_edges_to_cut(tmp_path / "edges.json")
    assert same(read_circuit(tmp_path / "edges.json", model.graph), read_circuit(tmp_path / "mask.safetensors"))
    write_edges(tmp_path, edges, kept=True)
    kept = read_circuit(tmp_path / "kept_edges.json", model.graph)
    assert kept.kept_edges() == edges and same(kept.complement(), circuit_of(model.graph, edges, cut=True))
    with pytest.raises(UserError, match="does not say which graph"):
        read_circuit(tmp_path / "kept_edges.json")


def test_top_edges():
    circuit = Circuit(EdgeGraph(0, 1), torch.ones(1), torch.tensor([2.0]))
    assert int(circuit.top(0).kept.sum()) == 0
    graph = EdgeGraph(1, 1)  # embed->a0.0, embed->m0, a0.0->m0, and three into output
    circuit = Circuit(graph, torch.ones(6), torch.tensor([1.0, -5.0, 3.0, 3.0, 0.0, -1.0]))
    assert circuit.top(2).kept.tolist() == [False, False, True, True, False, False]
    assert circuit.top(1).kept.tolist() == [False, False, True, False, False, False]  # the first of equal ones
    assert circuit.top(2, absolute=True).kept.tolist() == [False, True, True, False, False, False]
    with pytest.raises(UserError, match="7 edges were asked for"):
        circuit.top(7)
    with pytest.raises(UserError, match="no scores"):
        Circuit(graph, torch.ones(6)).top(2)
    with pytest.raises(UserError, match="score of the edge embed->m0 is not a finite number"):
        Circuit(graph, torch.ones(6), torch.tensor([1.0, float("nan"), 3.0, 3.0, 0.0, -1.0]))


@pytest.mark.parametrize("graph", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_edges_on_paths_are_those_that_a_walk_finds(graph, seed):
    kept = torch.rand(len(graph), generator=torch.Generator().manual_seed(seed)) < 0.12
    names = [edge for edge, keep in zip(graph.edges, kept.tolist(), strict=True) if keep]
    walks, stack = set(), [("embed", ())]
    while stack:
        node, walk = stack.pop()
        if node == "output":
            walks.update(walk)
        for edge in names:
            if edge.source == node:
                reader = edge.target
                stack.append((reader[:-2] if reader[-1] in "qkv" else reader, (*walk, edge)))
    found = on_a_path(graph, kept)
    assert {edge for edge, on in zip(graph.edges, found.tolist(), strict=True) if on} == walks


def changed(**parts):
    value = json.loads(json.dumps(BY_HAND))
    for key, change in parts.items():
        change(value[key])
    return value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "no graph of EAP-IG"),
        ({**BY_HAND, "more": 1}, "does not consist of"),
        ({**BY_HAND, "nodes": []}, "is no object"),
        (changed(cfg=lambda cfg: cfg.pop("n_heads")), "does not give n_layers"),
        (changed(cfg=lambda cfg: cfg.update(n_layers=2)), "5 nodes, which do not fit its 2 layers x 2 heads"),
        (changed(cfg=lambda cfg: cfg.update(n_layers=10**9)), "do not fit"),
        (changed(cfg=lambda cfg: cfg.update(parallel_attn_mlp=True)), "has the edge 'a0.h[01]->m0'"),
        (changed(edges=lambda edges: edges.pop("input->m0")), "lacks the edge 'input->m0'"),
        (changed(edges=lambda edges: edges.update({"m0->m0": {"score": 0, "in_graph": True}})), "edge 'm0->m0'"),
        (changed(edges=lambda edges: edges["input->m0"].pop("score")), "for the edge 'input->m0'"),
        (changed(edges=lambda edges: edges["input->m0"].update(score=float("nan"))), "for the edge 'input->m0'"),
        (changed(edges=lambda edges: edges["input->m0"].update(in_graph=1)), "for the edge 'input->m0'"),
        (changed(nodes=lambda nodes: nodes.update({"m0": True})), "for the node 'm0'"),
        (changed(nodes=lambda nodes: nodes["m0"].update(neurons=[True])), "chooses single neurons"),
        (changed(nodes=lambda nodes: nodes.update({"m1": nodes.pop("m0")})), "lacks the node 'm0'"),
    ],
)
def test_damaged_graphs_are_refused(tmp_path, value, message):
    (tmp_path / "c.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=message) as error:
        read_circuit(tmp_path / "c.json")
    assert "c.json" in str(error.value) and "\n" not in str(error.value)


def test_other_files_are_refused(tmp_path):
    write_text(tmp_path / "c.pt", "x")
    with pytest.raises(UserError, match=r"c.pt is a pickle.*Graph.from_pt\(\"circuit.pt\"\).to_json"):
        read_circuit(tmp_path / "c.pt")
    with pytest.raises(UserError, match="of no known form"):
        read_circuit(tmp_path / "c.xyz")
    with pytest.raises(UserError, match=r"not as c\.pt"):
        write_circuit(tmp_path / "c.pt", a_circuit(SHAPES[0]))
    with pytest.raises(UserError, match="Give d_model"):
        write_circuit(tmp_path / "c.json", a_circuit(SHAPES[0]))
    write_json(tmp_path / "scores.json", {"a": 1})
    with pytest.raises(UserError, match="no graph of EAP-IG"):
        read_circuit(tmp_path / "scores.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("embed->m0,embed,m0,", "embed->m9,embed,m0,"), "not those of a graph of 1 layers"),
        (lambda text: text[: text.rstrip().rindex("\n") + 1], "not those of a graph"),
        (lambda text: text.replace("true", "perhaps", 1), "no true or false as 'kept'"),
        (lambda text: text.replace("score", "scores", 1), "no 'score'"),
        (lambda text: text.replace("0.5", "half", 1), "the score is no number"),
        (lambda text: text.replace("0.5", "", 1), "has no score for 1 of its 6 edges"),
    ],
)
def test_damaged_tables_are_refused(tmp_path, change, message):
    path = tmp_path / "c.csv"
    write_circuit(path, Circuit(EdgeGraph(1, 1), torch.ones(6), torch.full((6,), 0.5)))
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=message):
        read_circuit(path)


def test_damaged_parquet_is_refused(tmp_path):
    write_text(tmp_path / "c.parquet", "no table")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        read_circuit(tmp_path / "c.parquet")
