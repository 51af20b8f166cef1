"""What a comparison says, against plain counting; its report and its figures from files alone."""

import json
import math
from itertools import combinations

import numpy as np
import pytest
from helpers.results import entry, model, models, relearning, write_comparison
from helpers.scripts import load_script

from circuit_breaking.errors import UserError
from circuit_breaking.evaluation.bootstrap import running_mean
from circuit_breaking.evaluation.conclusion import statement
from circuit_breaking.evaluation.controls import controls
from circuit_breaking.evaluation.edge_effects import jaccard, jaccard_by_chance
from circuit_breaking.evaluation.pareto import dominating, family_of, pareto
from circuit_breaking.evaluation.report_markdown import COSTS_HEADING, render
from circuit_breaking.evaluation.result_files import read_report
from circuit_breaking.evaluation.tables import flat_rows, interval, markdown_table, number, relearning_table
from circuit_breaking.figures.loss_by_toxicity import draw_loss_by_toxicity
from circuit_breaking.figures.pareto import draw_pareto
from circuit_breaking.figures.relearning import draw_relearning
from circuit_breaking.figures.report import draw_models as draw_all_models
from circuit_breaking.figures.training import draw_finetuning
from circuit_breaking.runs.files import read_csv, write_csv, write_json, write_jsonl, write_text
from circuit_breaking.runs.results import Report
from circuit_breaking.toxicity.uniform import read_uniform, spread

pytestmark = pytest.mark.usefixtures("coarse_pictures")
script = load_script("toxicity/report.py")


@pytest.fixture
def folder(tmp_path):
    write_comparison(tmp_path / "run")
    return tmp_path / "run"


def test_the_front_by_plain_counting():
    random = np.random.default_rng(0)
    for _ in range(50):
        points = {str(i): tuple(random.integers(0, 5, 2).tolist()) for i in range(8)}
        for name, point in points.items():
            beaten = [other for other, (a, b) in points.items() if a < point[0] and b < point[1]]
            assert dominating(point, points) == beaten and name not in beaten


@pytest.mark.parametrize(
    "joint, on", [((0.1, 1.04), ["zero_2"]), ((0.1, 1.01), []), ((0.1, 1.1), ["zero_2", "zero_12"])]
)
def test_the_report_says_which_masks_are_on_the_front(joint, on):
    known = models()
    known["joint"] = model("finetuned", *joint)
    found, text = pareto(known), statement(known)
    assert set(found["masks"]) == {"zero_2", "zero_12"} and set(found["baselines"]) == {"joint", "steering"}
    assert [name for name, one in found["masks"].items() if not one["beaten_by"]] == on
    assert found["on_front"] == bool(on)
    assert (f"**On the Pareto front of toxicity against ordinary loss: {', '.join(on)}**" in text) == bool(on)
    assert ("**No mask of at most 12 edges is on the Pareto front" in text) == (not on)
    assert "0.200" in text and "1.050" in text and f"{joint[1]:.3f}" in text
    # equal in one coordinate is not beaten
    known["joint"] = model("finetuned", 0.1, 1.05)
    assert not pareto(known)["masks"]["zero_12"]["beaten_by"]


def test_nothing_to_compare():
    known = {"original": models()["original"]}
    assert "No mask of at most 12 edges was measured" in statement(known)
    known["zero_2"] = models()["zero_2"]
    assert "No fine-tuned model was measured" in statement(known)


def test_random_edges_are_summed_up_over_seeds():
    row = next(row for row in controls(models()) if row["budget"] == 12)
    assert row["seeds"] == 3 and row["ablation"] == "zero"
    assert row["toxicity"] == {
        "mean": pytest.approx(-0.01), "lowest": pytest.approx(-0.02), "highest": pytest.approx(0.0),
        "mask": pytest.approx(-0.7),
    }  # fmt: skip
    assert row["ordinary_loss"]["highest"] == pytest.approx(0.024)
    assert "12 random edges (zero ablation, mean over 3 seeds" in statement(models())


def with_own_mask():
    """The models of a sweep, and before them the mask of the run itself, of the same budget and ablation."""
    known = models()
    for one in known.values():
        if one["kind"] in ("mask", "random"):
            one |= {"sweep": "run", "method": "random" if one["kind"] == "random" else "clamped"}
    own = model("mask", 0.5, 2.0, 12, budget=12, ablation="zero", seed=0, sweep=None, method="clamped")
    return {"original": known.pop("original"), "ablated": own, **known}


def test_random_edges_are_compared_with_the_mask_of_their_sweep():
    known = with_own_mask()
    row = next(row for row in controls(known) if row["budget"] == 12)
    assert row["sweep"] == "run" and row["toxicity"]["mask"] == pytest.approx(-0.7)
    # the first seed, whatever the order
    later = {**known["zero_12"], "seed": 1, "losses": known["ablated"]["losses"]}
    assert controls({"later": later, **known})[1] == row
    # of another sweep, or one of several methods: none
    known["zero_12"]["sweep"] = "other"
    assert next(row for row in controls(known) if row["budget"] == 12)["toxicity"]["mask"] is None
    known["zero_12"]["sweep"] = "run"
    known["attribution_12"] = {**known["zero_12"], "method": "attribution"}
    assert next(row for row in controls(known) if row["budget"] == 12)["toxicity"]["mask"] is None


def test_a_mask_by_itself_is_a_point_of_its_own(folder, drawn):
    write_json(folder / "report.json", {**read_report(folder), "models": with_own_mask()})
    draw_pareto(folder)
    axes = drawn[0].axes[0]
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    np.testing.assert_allclose(lines["mask, zero ablation"], [[0.02, 0.6], [0.05, 0.2], [0.3, 0.1]])
    points = {container.get_label(): container[0].get_xydata().tolist() for container in axes.containers}
    np.testing.assert_allclose(points["ablated"], [[1.0, 0.5]])


def test_a_model_has_one_colour_in_all_pictures(folder, drawn):
    write_json(folder / "report.json", {**read_report(folder), "models": with_own_mask()})
    draw_pareto(folder)
    draw_loss_by_toxicity(folder)
    draw_relearning(folder)
    draw_all_models(folder)
    pareto_axes, toxicity, again = (figure.axes[0] for figure in drawn[:3])
    of = {"zero 12": "mask, zero ablation", "joint": "joint", "original": "original"}
    named = [one for one in pareto_axes.containers if not one.get_label().startswith("_")]
    first = {container.get_label(): container[0].get_color() for container in named}
    first |= {line.get_label(): line.get_color() for line in pareto_axes.lines if line.get_label() in of.values()}
    assert len(set(first.values())) == len(first)
    for axes in (toxicity, again):
        for line in axes.lines:
            assert line.get_color() == first[of[line.get_label()]]
    rows = [label.get_text() for label in drawn[3].axes[0].get_yticklabels()]
    shown = dict(zip(rows, [one[0].get_color() for one in drawn[3].axes[0].containers], strict=False))
    assert {name: shown[name] for name in of} == {name: first[label] for name, label in of.items()}
    assert shown["ablated"] == first["ablated"] and shown["zero 2"] == shown["zero 50"] == shown["zero 12"]


def test_masks_stay_readable_beside_fine_tuned_models(folder, drawn):
    rows = read_csv(folder / "uniform.csv")
    write_csv(folder / "uniform.csv", [{**row, "joint": 9 * float(row["joint"])} for row in rows])
    draw_loss_by_toxicity(folder)
    masks, tuned = drawn[0].axes
    assert [line.get_label() for line in masks.lines] == ["original", "zero 12"]
    assert [line.get_label() for line in tuned.lines] == ["original", "joint"]
    assert masks.get_ylim()[1] < 3 < tuned.get_ylim()[1]


def test_families():
    known = models()
    assert family_of(known["zero_12"]) == "mask, zero ablation" and family_of(known["joint"]) == "other"
    assert family_of(known["random_zero_2_seed0"]) == "random edges, zero ablation"


def test_jaccard():
    assert jaccard([["a", "b"], ["b", "c"], ["a", "b"]]) == pytest.approx((1 / 3 + 1 + 1 / 3) / 3)
    assert jaccard([["a"]]) is None and jaccard([[], []]) == 1.0
    every = [jaccard([one, other]) for one in combinations(range(6), 2) for other in combinations(range(6), 3)]
    assert jaccard_by_chance(2, 3, 6) == pytest.approx(np.mean(every))
    assert jaccard_by_chance(6, 6, 6) == pytest.approx(1.0)


# Texts uniform over toxicity


def test_texts_spread_over_toxicity(tmp_path):
    toxicity = np.array([0.0, 0.05, 0.09, 0.5, 0.55, 1.0, 0.99, 0.95])
    assert spread(toxicity, 20).tolist() == [0, 1, 3, 4, 5, 6]
    assert spread(toxicity, 10).tolist() == [0, 3, 5]
    write_jsonl(tmp_path / "u.jsonl", [{"text": "a", "toxicity": 0.25}, {"text": "b", "toxicity": 1}])
    texts, scores = read_uniform(tmp_path / "u.jsonl")
    assert texts == ["a", "b"] and scores.tolist() == [0.25, 1.0]
    for row in ({"text": "a"}, {"text": "a", "toxicity": 2}, {"toxicity": 0.5}, 3):
        write_jsonl(tmp_path / "u.jsonl", [row])
        with pytest.raises(UserError, match="row 1: there is no 'text' with a 'toxicity'"):
            read_uniform(tmp_path / "u.jsonl")


def test_running_mean_against_a_plain_loop():
    random = np.random.default_rng(1)
    x, y = random.random(80), random.normal(2, 0.5, 80)
    at = np.array([0.1, 0.5, 3.0])
    mean, low, high = running_mean(x, y, at, 0.2)
    for place in (0, 1):
        weights = [max(0.0, 1 - abs(a - at[place]) / 0.2) for a in x]
        assert mean[place] == pytest.approx(sum(w * b for w, b in zip(weights, y, strict=True)) / sum(weights))
        assert low[place] < mean[place] < high[place]
    assert np.isnan([mean[2], low[2], high[2]]).all()
    # the band of the mean of all has the width that theory says
    wide = running_mean(x, y, np.array([0.5]), 1e6)
    half = 1.96 * y.std() / math.sqrt(80)
    assert wide[2, 0] - wide[1, 0] == pytest.approx(2 * half, rel=0.15)


def test_the_table_of_relearning():
    known = relearning()["models"]
    header, rows = relearning_table(known)
    ends = ["3 steps on 10 examples", "3 steps on 100 examples", "3 steps on 10 examples, LoRA"]
    assert header == ["", "before", *ends, "after examples in the context"]
    start, last, few = (interval(entry(value), 2) for value in (0.0, 0.1 * 3, 0.4))
    assert rows == [
        ["original", start, last, last, "–", few],
        ["zero_12", start, last, last, last, few],
        ["joint", start, "–", last, "–", interval(entry(0.2), 2)],  # of 10 examples, it broke before the last step
    ]
    for one in known.values():
        one.pop("few_shot")
        one.pop("lora_relearning", None)
        one["relearning"] = {count: steps[:1] for count, steps in one["relearning"].items()}
    assert relearning_table(known) == (["", "before"], [[name, start] for name in known])


# Files


def test_everything_is_drawn_from_files_alone(folder, capsys):
    script.main(script.Settings(run="run", out=folder.parent))
    pictures = [*(folder / name for name in script.PICTURES)]
    first = {path.name: path.read_bytes() for path in pictures}
    assert all(content.startswith(b"\x89PNG") for content in first.values())
    texts = {
        name: (folder / name).read_bytes() for name in ("report.md", "report.csv", "comparison.json", "costs.json")
    }
    for path in pictures:
        path.unlink()
    script.main(script.Settings(run="run", out=folder.parent))
    assert {path.name: path.read_bytes() for path in pictures} == first
    assert {name: (folder / name).read_bytes() for name in texts} == texts
    page = texts["report.md"].decode()
    assert "nan" not in page.lower().replace("finance", "") and "None" not in page
    assert (
        "- ascent: the loss was not finite at step 3." in page and "joint, relearning: 10 examples: it broke." in page
    )
    for heading in (
        "## Models",
        "## Random edges",
        "## Evidence for each edge",
        "## Does it come back?",
        f"## {COSTS_HEADING}",
    ):
        assert heading in page
    assert "OFFENSIVE" not in page
    rows = read_csv(folder / "report.csv")
    assert [row["model"] for row in rows] == list(models())
    joint = next(row for row in rows if row["model"] == "joint")
    assert float(joint["continuations.toxic.toxicity.value"]) == 0.1 and joint["chosen.lr"] == "0.0001"
    assert next(row for row in rows if row["model"] == "ascent")["losses.ordinary.value"] == ""
    assert json.loads(texts["comparison.json"])["pareto"]["on_front"] is True


def test_examples_are_shown_only_where_asked_for(folder):
    with pytest.raises(UserError, match="save-generations"):
        script.main(script.Settings(run="run", out=folder.parent, examples=True))
    rows = [
        {"model": name, "prompts": key, "decoding": way, "prompt": "you\n are", "continuation": f"{name} {key} {way}"}
        for name in models()
        for key in ("toxic", "ordinary")
        for way in ("continuations", "greedy")
    ]
    write_jsonl(folder / "generations.jsonl", rows)
    script.main(script.Settings(run="run", out=folder.parent))
    assert "zero_12 toxic" not in (folder / "report.md").read_text()
    script.main(script.Settings(run="run", out=folder.parent, examples=True))
    page = (folder / "report.md").read_text()
    assert "OFFENSIVE" in page and "> you are" in page and "- zero_12: zero_12 toxic continuations" in page
    assert "random_zero" not in page.split("## Examples")[1].split("##")[0] and "greedy\n" not in page


def test_costs_are_the_only_thing_that_changes(folder):
    script.main(script.Settings(run="run", out=folder.parent))
    first = (folder / "report.md").read_text()
    write_json(folder / "finetuned" / "joint" / "cost.json", {"seconds": 77.0, "cpu_seconds": 70.0, "peak_gb": 1.0})
    script.main(script.Settings(run="run", out=folder.parent))
    second = (folder / "report.md").read_text()
    assert first != second and first.split(f"## {COSTS_HEADING}")[0] == second.split(f"## {COSTS_HEADING}")[0]


def test_what_is_drawn_is_what_the_files_say(folder, drawn):
    draw_pareto(folder)
    axes = drawn[0].axes[0]
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    np.testing.assert_allclose(lines["mask, zero ablation"], [[0.02, 0.6], [0.05, 0.2], [0.3, 0.1]])
    np.testing.assert_allclose(lines["random edges, zero ablation"][1], [0.012, 0.89])
    assert {text.get_text() for text in axes.texts} == {"2", "12", "50"}
    labels = {container.get_label() for container in axes.containers}
    assert {"joint", "original"} <= labels and "ascent" not in labels
    draw_relearning(folder)
    ten = drawn[1].axes[0]
    assert ten.lines[0].get_ydata().tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3])
    draw_loss_by_toxicity(folder)
    labels = {line.get_label() for line in drawn[2].axes[0].lines}
    assert labels == {"original", "zero 12", "joint"}


def test_numbers_for_people():
    assert [number(v) for v in (None, 0.12345, 12.345, -0.5)] == ["–", "0.123", "12.3", "-0.500"]
    assert interval(entry(0.5)) == "0.500 (0.450–0.550)" and interval(None) == interval(entry(None)) == "–"
    assert interval({"value": 0.5}) == "0.500"
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n|---|--:|\n| 1 | 2 |"
    assert flat_rows({"m": {"a": {"b": [1, None]}, "c": 2}}) == [{"model": "m", "a.b.0": 1, "a.b.1": None, "c": 2}]
    assert "nan" not in render(
        Report(
            models=models(), scorer={"name": "x", "version": "1", "threshold": 0.5},
            num_texts={"toxic": 1, "ordinary": 1}, num_prompts={"toxic": 1, "ordinary": 1}, model="tiny", samples=1,
        ).to_json()
    )  # fmt: skip


def test_what_is_wrong_with_the_files(tmp_path):
    with pytest.raises(UserError, match=r"no file .*report.json. Make one with toxicity/evaluation.py"):
        script.main(script.Settings(run="none", out=tmp_path))
    assert list(tmp_path.iterdir()) == []
    write_text(tmp_path / "report.json", '{"models": {}}')
    with pytest.raises(UserError, match="holds no models"):
        read_report(tmp_path)
    with pytest.raises(UserError, match="holds no fine-tuned models"):
        draw_finetuning(tmp_path)
    with pytest.raises(ValueError, match="NaN"):
        write_csv(tmp_path / "a.csv", [{"a": math.nan}])
    assert not (tmp_path / "a.csv").exists()
