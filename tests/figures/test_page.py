"""`report.html`: what is in it, that it is whole and small, and that nothing from data or models is read as HTML."""

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers.models import small_gpt2
from helpers.results import EVIL, entry, model, write_comparison, write_prompts

from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.mask import save_mask
from circuit_breaking.errors import UserError
from circuit_breaking.figures.browser.edge_list import EdgeList
from circuit_breaking.figures.browser.page import PAGE, end_with_page, write_page
from circuit_breaking.figures.browser.parts import Plot
from circuit_breaking.figures.browser.training import finetuning
from circuit_breaking.figures.sweep import draw_sweep
from circuit_breaking.graph import EdgeGraph
from circuit_breaking.runs.files import read_json, write_csv, write_json, write_jsonl

VOID = {"meta", "link", "img", "input", "br", "hr"}


class Reader(HTMLParser):
    """Tags, whether they are closed in order, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.texts, self.loaded = [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loaded += [value for name, value in attributes if name in ("src", "href") and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"{tag} is closed out of order"

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def read(path) -> tuple[Reader, dict]:
    page = path.read_text(encoding="utf-8")
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL).group(1)
    return Reader(page), json.loads(data)


def test_a_comparison_has_every_section_and_stays_small(tmp_path):
    write_comparison(tmp_path)
    path = write_page(tmp_path)
    assert path == tmp_path / PAGE and path.stat().st_size < 2_000_000
    page, data = read(path)
    assert not page.open
    for title in ("Models", "Comparison", "Edges", "Loss by toxicity of the text", "Does it come back?", "Fine-tuning"):
        assert title in page.text
    assert "0.200 (0.150–0.250)" in page.text  # toxicity of the mask of 12 edges, with its interval
    assert "masks of at most 12 edges on the Pareto front" in page.text
    assert all(one.startswith(("#", "data:")) for one in page.loaded)  # nothing is loaded
    assert len(data["plots"]) >= 7 and data["graphs"][0][0]["graph"]["n_edges"] == 207
    assert "What the models write" not in page.text


def test_relearning_by_adapters_and_costs_are_shown(tmp_path):
    write_comparison(tmp_path)
    found = read_json(tmp_path / "relearning.json")
    for one in found["models"].values():
        one["lora_relearning"] = {"10": [{"step": step, "toxicity": entry(0.1 * step)} for step in range(3)]}
    write_json(tmp_path / "relearning.json", found)
    unknown = {"seconds": 12.34, "cpu_seconds": None, "peak_gb": 0.456}
    write_json(tmp_path / "costs.json", {"zero_12": unknown, "joint": {**unknown, "seconds_with_tuning": 99.0}})
    page, data = read(write_page(tmp_path))
    plots = {one["title"]: one["traces"] for one in data["plots"]}
    by_adapters = plots["relearning from 10 examples, LoRA"]
    assert len(by_adapters) == len(found["models"]) and by_adapters[0]["y"] == pytest.approx([0, 0.1, 0.2])
    assert "relearning from 10 examples" in plots
    assert "Costs of this run" in page.text and "zero_12 12 – – 0.456 joint 12 – 99 0.456" in page.text
    write_json(tmp_path / "costs.json", {"zero_12": {"seconds": "12"}})
    with pytest.raises(UserError, match=r"costs.json: zero_12.seconds is a text and should be a number"):
        write_page(tmp_path)


def test_candidates_of_methods_without_training_are_dots(tmp_path):
    write_comparison(tmp_path)
    plots = [plot for part in finetuning(tmp_path).parts for plot in part.plots]
    names = {plot.title: [trace["name"] for trace in plot.traces] for plot in plots}
    assert names["steering: toxic loss"] == ["candidates", "kept"]
    assert names["joint: toxic loss"] == ["lr 0.0001", "kept"]


def test_a_run_on_prompts_shows_tokens_training_and_settings(tmp_path):
    write_prompts(tmp_path)
    page, data = read(write_page(tmp_path))
    for text in ("After “When Mary and John went home", "Settings in settings.json (ioi/train_mask.py)", "0.05", "abc"):
        assert text in page.text
    plots = {plot["title"]: plot for plot in data["plots"]}
    assert plots["original"]["traces"][0]["x"] == [0.7, 0.1]
    assert plots["logit difference (to fall)"]["traces"][0]["y"] == list(range(9))  # minus the break loss
    assert plots["edges cut"]["layout"]["annotations"][1]["text"] == "refine"
    values = np.frombuffer(base64.b64decode(data["graphs"][0][0]["values"]), "<f4")
    np.testing.assert_allclose(values, [0.5, -0.1], rtol=1e-6)


def test_nothing_from_data_or_models_is_read_as_html(tmp_path):
    write_prompts(tmp_path, EVIL, EVIL)
    report = {
        "record": "report", "version": 1, "models": {"original": model("original", 0.9, 1.0),
        EVIL: model("mask", 0.5, 1.1, 3, note=EVIL)}, "scorer": {"name": EVIL, "version": "1"}, "model": EVIL,
    }  # fmt: skip
    write_json(tmp_path / "report.json", report)
    rows = [
        {"model": name, "prompts": "toxic", "prompt": EVIL, "continuation": EVIL, "decoding": "continuations"}
        for name in ("original", EVIL)
    ]
    write_jsonl(tmp_path / "generations.jsonl", rows)
    path = write_page(tmp_path, generations=3)
    page, data = read(path)
    assert not page.open and page.tags.count("img") == 0
    scripts = page.tags.count("script")
    assert scripts == 5  # the data, two libraries and two of ours
    assert page.text.count(" ".join(EVIL.split())) >= 6
    assert "49" not in page.text.replace(EVIL, "")  # and text is not evaluated as a template
    plots = json.dumps(data["plots"])
    assert "<img" not in plots and "<script" not in plots and "&lt;img" in plots  # Plotly reads HTML in its texts
    source = path.read_text(encoding="utf-8")
    assert 'onerror="' not in source and "\u2028" not in re.search(r'id="data">(.*?)</script>', source).group(1)


def test_texts_of_models_are_there_only_if_they_are_asked_for(tmp_path):
    write_comparison(tmp_path)
    rows = [
        {"model": "original", "prompts": "toxic", "prompt": f"prompt {i}", "continuation": f"text {i}"}
        for i in range(4)
    ]
    write_jsonl(tmp_path / "generations.jsonl", rows)
    assert "prompt 0" not in read(write_page(tmp_path))[0].text
    page = read(write_page(tmp_path, generations=2))[0].text
    assert "They may be offensive. prompt 0 original text 0 prompt 1" in page and "prompt 2" not in page
    (tmp_path / "generations.jsonl").unlink()
    with pytest.raises(UserError, match="--save-generations"):
        write_page(tmp_path, generations=2)


def test_what_is_wrong_is_one_sentence_and_ends_no_script(tmp_path, capsys):
    with pytest.raises(UserError, match="there is no folder"):
        write_page(tmp_path / "none")
    with pytest.raises(UserError, match="holds no results"):
        write_page(tmp_path)
    write_prompts(tmp_path)
    (tmp_path / "graph.json").write_text("{}")
    with pytest.raises(UserError, match=r"graph\.json"):
        write_page(tmp_path)
    end_with_page(tmp_path)
    assert re.search(r"note: there is no new report\.html: .*graph\.json", capsys.readouterr().err)
    assert not (tmp_path / PAGE).exists()


def test_effects_of_edges_are_found_by_the_graph_of_the_masks(tmp_path):
    write_comparison(tmp_path)
    (tmp_path / "graph.json").unlink()
    save_mask(tmp_path / "masks" / "zero_12" / "mask.safetensors", load_model(small_gpt2(), device="cpu"))
    _, data = read(write_page(tmp_path))
    found = data["graphs"][0][0]
    assert found["title"] == "zero 12" and found["graph"]["n_layers"] == 3
    graph = EdgeGraph(3, 3)
    assert found["notes"][str(graph.index("a0.0->m1"))][0] == [
        "toxic loss, only this edge restored",
        "0.300 (0.250–0.350)",
    ]


def test_lists_of_edges_are_exact_in_two_bytes_and_in_four():
    for graph in (EdgeGraph(30, 9), EdgeGraph(40, 14)):
        names = [graph.edges[0], graph.edges[-1], graph.edges[len(graph) // 2]]
        one = EdgeList.of("x", graph, dict(zip(names, (1.0, -3.0, 2.0), strict=True)), "effect").to_json()
        order = np.frombuffer(base64.b64decode(one["order"]), "<u4" if one["wide"] else "<u2")
        assert order.tolist() == [len(graph) - 1, len(graph) // 2, 0] and one["shown"] == 3
        assert one["wide"] == (len(graph) > 65536)


def test_figures_that_are_not_finite_become_null():
    plot = Plot("x", [{"y": np.array([1.0, np.nan, np.inf])}], {"a": {"b": float("nan")}}).to_json()
    assert plot["traces"] == [{"y": [1.0, None, None]}] and plot["layout"] == {"a": {"b": None}}
    assert json.dumps(plot, allow_nan=False)


def test_a_sweep_shows_its_settings_losses_and_picture(tmp_path):
    last = {f"last.{name}": 1 for name in "abcdefghij"}  # more than the page shows
    rows = [
        {"alpha": alpha, "exit_code": 0, "seconds": 2.5, **last, "edges_cut": 12, "loss.after.toxic": alpha * 10}
        for alpha in (0.1, 0.2)
    ]
    write_csv(tmp_path / "sweep.csv", rows)
    draw_sweep(tmp_path, "alpha", "loss.after.toxic")
    page, _ = read(write_page(tmp_path))
    assert "alpha exit code seconds edges cut loss after toxic 0.1000 0 2.5000 12 1.0000" in page.text
    assert "last" not in page.text and page.tags.count("img") == 1


def test_benchmarks_of_the_harness_have_a_column_for_each_model(tmp_path):
    results = {"facts": {"acc,none": 0.5, "acc_stderr,none": 0.0312, "alias": "facts"}}
    models = {"ablated": {"results": results}, "original": {"results": {**results, "sums": {"acc,none": 0.25}}}}
    write_json(tmp_path / "harness.json", {"models": models})
    page, _ = read(write_page(tmp_path))
    assert "ablated original facts, acc,none 0.500 ± 0.031 0.500 ± 0.031 sums, acc,none – 0.250" in page.text
    write_json(tmp_path / "harness.json", {"models": {"ablated": {}}})
    with pytest.raises(UserError, match=r"harness.json lacks models.ablated.results"):
        write_page(tmp_path)
