"""Metrics of circuits against plain definitions: faithfulness, CPR and CMD, completeness, AUROC, overlap."""

import itertools
import math

import pytest
import torch
from helpers.masks import TOKENS, make_means
from helpers.models import small_gpt2

from circuit_breaking.engine.load import load_model
from circuit_breaking.errors import UserError
from circuit_breaking.evaluation.agreement import auroc, overlap_matrix
from circuit_breaking.evaluation.circuit_checks import (
    completeness,
    edge_parts,
    minimality,
    node_parts,
    random_sets,
)
from circuit_breaking.evaluation.faithfulness import (
    MIB_FRACTIONS,
    Curve,
    area,
    ends_of,
    faithfulness_curve,
    mean_of,
)
from circuit_breaking.graph import EdgeGraph
from circuit_breaking.runs.circuits import Circuit, circuit_of

GRAPH = EdgeGraph(2, 2)


def scored(graph, seed=0):
    scores = torch.randn(len(graph), generator=torch.Generator().manual_seed(seed))
    return Circuit(graph, torch.ones(len(graph)), scores)


def test_areas_are_those_of_mib():
    """MIB's own sum, written out: trapezoids between its fractions, over f and over |1 - f|."""
    values = [0.1, 0.4, 0.2, 0.6, 1.3, 1.1, 0.9, 0.95, 1.0, 1.0]
    curve = Curve(MIB_FRACTIONS, (0,) * 10, tuple(2 * value - 1 for value in values), 1.0, -1.0)
    assert curve.faithfulness == pytest.approx(values)
    under = from_one = 0.0
    for index in range(9):
        width = MIB_FRACTIONS[index + 1] - MIB_FRACTIONS[index]
        under += width * (values[index] + values[index + 1]) / 2
        from_one += width * (abs(1 - values[index]) + abs(1 - values[index + 1])) / 2
    assert curve.cpr == pytest.approx(under) and curve.cmd == pytest.approx(from_one)
    perfect = Curve(MIB_FRACTIONS, (0,) * 10, (3.0,) * 10, 3.0, 1.0)
    assert perfect.cpr == pytest.approx(0.999) and perfect.cmd == 0  # MIB's line starts at 0.1%
    assert area([0, 1, 3], [1, 3, 3]) == 8


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("kind", ["zero", "mean"])
def test_a_curve_is_that_of_its_circuits(absolute, prune, kind):
    model = load_model(small_gpt2(), split_qkv=True, device="cpu")
    model.means = make_means(model, kind)
    circuit = scored(model.graph)

    def metric(mask):
        return model(TOKENS, mask=mask)[:, -1, 3].mean()

    fractions = (0.01, 0.1, 0.4, 1.0)
    curve = faithfulness_curve(mean_of([metric, metric]), circuit, model.mask.weights, fractions, absolute, prune)
    names = sorted(
        range(len(model.graph)),
        key=lambda at: -abs(float(circuit.scores[at])) if absolute else -float(circuit.scores[at]),
    )

    def plain(kept):
        model.mask.reset_()
        model.mask.cut_([edge for edge in model.graph.edges if edge not in kept])
        with torch.no_grad():
            return float(model(TOKENS)[:, -1, 3].mean())

    whole, empty = plain(set(model.graph.edges)), plain(set())
    for fraction, count, value, share in zip(fractions, curve.n_edges, curve.values, curve.faithfulness, strict=True):
        kept = {model.graph.edges[at] for at in names[: math.floor(fraction * len(names))]}
        if prune:
            kept -= set(circuit_of(model.graph, kept).pathless())
        assert count == len(kept)
        assert value == pytest.approx(plain(kept), abs=1e-4)
        assert share == pytest.approx((plain(kept) - empty) / (whole - empty), abs=1e-3)
    assert curve.values[-1] == pytest.approx(curve.whole) and curve.faithfulness[-1] == pytest.approx(1)


def test_curves_that_cannot_be_drawn():
    circuit, ones = scored(GRAPH), torch.ones(len(GRAPH))
    for fractions in ((), (0.0, 1.0), (0.5, 0.2), (0.5, 0.5), (0.5, 1.5)):
        with pytest.raises(UserError, match="do not rise"):
            faithfulness_curve(lambda mask: 1.0, circuit, ones, fractions)
    with pytest.raises(UserError, match="no circuit can be more or less faithful"):
        _ = faithfulness_curve(lambda mask: 1.0, circuit, ones).cpr
    with pytest.raises(UserError, match="no batch"):
        mean_of([])
    with pytest.raises(UserError, match="no scores"):
        faithfulness_curve(lambda mask: 1.0, Circuit(GRAPH, ones), ones)


def by_names(graph):
    """A metric that is a number for each kept edge, and one more for a pair that stands in for each other."""
    worth = {edge: float(number + 1) for number, edge in enumerate(graph.edges)}

    def metric(kept):
        names = [edge for edge, keep in zip(graph.edges, kept.tolist(), strict=True) if keep]
        return sum(worth[name] for name in names) + 50.0 * ("m0->output" in names or "m1->output" in names)

    return metric, worth


def test_completeness_and_minimality_are_their_definitions():
    metric, worth = by_names(GRAPH)
    edges = ["embed->a0.0", "a0.0->m0", "m0->output"]
    circuit = circuit_of(GRAPH, edges)
    parts = edge_parts(circuit)
    assert list(parts) == [edge for edge in GRAPH.edges if edge in edges]
    sets = [names for size in range(4) for names in itertools.combinations(parts, size)]
    everything = sum(worth.values()) + 50.0
    for row in completeness(metric, circuit, parts, sets):
        cut = sum(worth[name] for name in row.without)
        alone = sum(worth[name] for name in edges) - cut + 50.0 * ("m0->output" not in row.without)
        assert row.circuit == alone and row.model == everything - cut  # m1->output still stands in
        assert row.gap == pytest.approx(abs(alone - (everything - cut)))
    assert minimality(metric, circuit, parts) == {name: worth[name] + 50.0 * (name == "m0->output") for name in parts}
    # what a part adds may show only where another is cut
    both = circuit_of(GRAPH, ["m0->output", "m1->output"])
    found = minimality(metric, both, edge_parts(both), [(), ("m1->output",)])
    assert found["m0->output"] == worth["m0->output"] + 50.0 and found["m1->output"] == worth["m1->output"]
    with pytest.raises(UserError, match="'m1' is no part"):
        completeness(metric, circuit, parts, [("m1",)])


def test_nodes_as_parts_hold_all_their_edges():
    circuit = circuit_of(EdgeGraph(2, 2, split_qkv=True), ["embed->a0.0.k", "a0.0->m1", "m1->output"])
    parts = node_parts(circuit)
    assert list(parts) == ["a0.0", "m1"]
    for node, edges in parts.items():
        for edge, inside in zip(circuit.graph.edges, edges.tolist(), strict=True):
            assert inside == (
                node in (edge.source, edge.target.removesuffix(".q").removesuffix(".k").removesuffix(".v"))
            )


def test_random_sets():
    sets = random_sets("abcdefgh", 30, seed=1)
    assert sets[0] == () and len(sets) == 30 and sets == random_sets("abcdefgh", 30, seed=1)
    assert 2 < sum(map(len, sets)) / 29 < 6 and random_sets("ab", 0) == []


@pytest.mark.parametrize("seed", range(4))
def test_auroc_counts_pairs(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-4, 5, (60,), generator=generator).float()  # with many ties
    known = torch.rand(60, generator=generator) < 0.3
    for absolute in (False, True):
        values = scores.abs() if absolute else scores
        pairs = [(float(a), float(b)) for a in values[known] for b in values[~known]]
        plain = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)
        assert auroc(scores, known, absolute) == pytest.approx(plain)
    assert auroc(known.float(), known) == 1 and auroc(-known.float(), known) == 0
    with pytest.raises(UserError, match="0 of 60 edges"):
        auroc(scores, torch.zeros(60))


def test_overlap_of_masks():
    names = {"one": GRAPH.edges[:6], "two": GRAPH.edges[3:13], "none": [], "also none": []}
    found = overlap_matrix({name: circuit_of(GRAPH, edges) for name, edges in names.items()})
    for row, a in enumerate(names.values()):
        for column, b in enumerate(names.values()):
            both, either = len(set(a) & set(b)), len(set(a) | set(b))
            assert int(found.shared[row, column]) == both
            assert float(found.jaccard[row, column]) == pytest.approx(both / either if either else 1.0)
            assert float(found.recall[row, column]) == pytest.approx(both / len(a) if a else math.nan, nan_ok=True)
    with pytest.raises(UserError, match="two is of a graph of 1 layers"):
        overlap_matrix({"one": circuit_of(GRAPH, []), "two": circuit_of(EdgeGraph(1, 2), [])})
    with pytest.raises(UserError, match="no circuit"):
        overlap_matrix({})


def test_known_ends_are_not_measured_again():
    circuit, ones, seen = scored(GRAPH), torch.ones(len(GRAPH)), []

    def metric(mask):
        seen.append(float(mask.mean()))
        return float(mask.mean())

    ends = ends_of(metric, ones)
    assert ends == (1.0, 0.0) and seen == [1.0, 0.0]
    known, measured = (faithfulness_curve(metric, circuit, ones, (0.1, 0.4), ends=one) for one in (ends, None))
    assert known == measured and len(seen) == 2 + 2 + 4
