"""Figures are drawn from result files alone: they are PNGs, show the numbers of the files, and name faulty files."""

import json

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from circuit_breaking.errors import UserError
from circuit_breaking.figures.report import draw_report
from circuit_breaking.figures.style import legend_under, model_styles
from circuit_breaking.figures.training import LOGIT_DIFFERENCE, draw_training
from circuit_breaking.runs.files import write_json, write_jsonl, write_text


def test_models_of_one_colour_have_different_markers():
    masks = {str(at): {"kind": "mask", "ablation": "mean", "sweep": "masks"} for at in range(6)}
    styles = model_styles(masks).values()
    assert len({style["color"] for style in styles}) == 1 and len({style["marker"] for style in styles}) == 6


@pytest.mark.parametrize(("names", "fits"), [(("a", "b", "c"), True), (("a long name of a model",) * 9, False)])
def test_a_legend_is_no_wider_than_its_figure(names, fits):
    drawn = Figure(figsize=(6, 3), layout="constrained")
    lines = [drawn.subplots().plot([0, 1], label=name)[0] for name in names]
    legend_under(drawn, lines, names, len(names))
    drawn.draw_without_rendering()
    box = drawn.legends[0].get_window_extent()
    assert len(drawn.legends) == 1 and len(drawn.legends[0].get_texts()) == len(names)
    assert box.x0 >= 0 and box.x1 <= drawn.bbox.width
    assert (drawn.legends[0]._ncols == len(names)) == fits


def entry(value, width=0.1):
    return {"value": value, "low": value - width, "high": value + width}


def report(n_models=2):
    names = ["original", "ablated", *(f"method {i}" for i in range(n_models - 2))]
    models = {
        name: {
            "losses": {"toxic": entry(1 + i), "ordinary": entry(2 + i)},
            "continuations": {
                key: {"toxic_share": entry(0.5 / (i + 1)), "perplexity": entry(3 + i)} for key in ("toxic", "ordinary")
            },
            "edges_cut": i,
            "note": None,
        }
        for i, name in enumerate(names)
    }
    return {"models": models, "reference": "original", "scorer": {"name": "x", "version": "1"}}


def metrics(steps=90):
    phases = ["relax"] * (steps // 3) + ["anneal"] * (steps // 3) + ["refine"] * (steps - 2 * (steps // 3))
    rows = zip(range(steps), phases, strict=True)
    return [
        {"step": i, "phase": phase, "keep_loss": 3 + 0.1 * (i % 3), "break_loss": 4 + i / 50, "n_cut": max(90 - i, 12)}
        for i, phase in rows
    ]


def test_names_of_short_phases_lie_apart(tmp_path, drawn):
    phases = ["rank"] * 150 + ["choose"] * 8 + ["constants"] * 25
    write_jsonl(
        tmp_path / "metrics.jsonl", [{**row, "phase": at} for row, at in zip(metrics(183), phases, strict=True)]
    )
    draw_training(tmp_path)
    drawn[0].draw_without_rendering()
    names = [text for text in drawn[0].axes[0].texts if text.get_text() in phases]
    boxes = [name.get_window_extent() for name in names]
    assert len(boxes) == 3 and not any(one.overlaps(two) for at, one in enumerate(boxes) for two in boxes[:at])
    heights = [name.xyann[1] for name in names]
    assert heights[0] == heights[1] < heights[2]  # only where there is no room


def bars(axes):
    """Points and interval ends of every model in a panel, by label."""
    found = {}
    for container in axes.containers:
        points, _, (segments,) = container
        found[container.get_label()] = (
            points.get_ydata(),
            [[y for _, y in ends] for ends in segments.get_segments() if len(ends)],
        )
    return found


@pytest.mark.parametrize("n_models", [1, 2, 7])
def test_a_report_is_drawn_for_any_number_of_models(tmp_path, drawn, n_models):
    about = report(2)
    about["models"] = dict(list(report(n_models)["models"].items())[:n_models])
    write_json(tmp_path / "report.json", about)
    path = draw_report(tmp_path)
    assert path == tmp_path / "report.png" and path.read_bytes().startswith(b"\x89PNG")
    height, width = matplotlib.image.imread(path).shape[:2]
    assert width > 1200 and height > 400
    (figure,) = drawn
    assert isinstance(figure, Figure) and [axes.get_title() for axes in figure.axes] == [
        "next-token loss", "toxic continuations", "incoherence of continuations",
    ]  # fmt: skip
    for axes, measure in zip(figure.axes, (None, "toxic_share", "perplexity"), strict=True):
        found = bars(axes)
        assert list(found) == list(about["models"])
        for name, one in about["models"].items():
            sets = one["losses"] if measure is None else {k: v[measure] for k, v in one["continuations"].items()}
            points, intervals = found[name]
            np.testing.assert_allclose(points, [e["value"] for e in sets.values()])
            np.testing.assert_allclose(intervals, [[e["low"], e["high"]] for e in sets.values()])
    assert not list(tmp_path.glob(".*"))


def test_a_model_without_figures_leaves_a_gap(tmp_path, drawn):
    about = report(3)
    about["models"]["method 0"]["continuations"] = {}
    about["models"]["method 0"]["losses"]["toxic"] = {"value": None, "low": None, "high": None}
    write_json(tmp_path / "report.json", about)
    draw_report(tmp_path)
    points, _ = bars(drawn[0].axes[0])["method 0"]
    assert np.isnan(points[0]) and points[1] == 4


def test_training_is_drawn_as_recorded(tmp_path, drawn):
    rows = metrics()
    write_jsonl(tmp_path / "metrics.jsonl", rows)
    path = draw_training(tmp_path, smooth=3)
    assert path.read_bytes().startswith(b"\x89PNG")
    losses, cut = drawn[0].axes
    lines = [line for line in losses.lines if len(line.get_xdata()) == 90]
    np.testing.assert_allclose(lines[0].get_ydata(), [row["break_loss"] for row in rows])
    np.testing.assert_allclose(lines[1].get_ydata(), [row["keep_loss"] for row in rows])
    np.testing.assert_allclose(cut.lines[0].get_ydata(), [row["n_cut"] for row in rows])
    smoothed = next(line.get_ydata() for line in losses.lines if line.get_label() == "ordinary text (to stay)")
    assert len(smoothed) == 30  # one phase
    np.testing.assert_allclose(smoothed[1:-1], 3.1)
    np.testing.assert_allclose(smoothed[[0, -1]], [3.05, 3.15])
    assert [text.get_text() for text in losses.texts] == ["relax", "anneal", "refine"]


def test_a_logit_difference_is_not_drawn_as_a_loss(tmp_path, drawn):
    write_jsonl(tmp_path / "metrics.jsonl", [{**row, "break_loss": -row["break_loss"]} for row in metrics()])
    draw_training(tmp_path, broken=LOGIT_DIFFERENCE)
    difference, losses, _ = drawn[0].axes
    assert difference.get_ylabel() == "logit difference" and losses.get_ylabel() == "loss of a batch, nats"
    np.testing.assert_allclose(difference.lines[0].get_ydata(), [row["break_loss"] for row in metrics()])
    np.testing.assert_allclose(losses.lines[0].get_ydata(), [row["keep_loss"] for row in metrics()])


def test_the_training_of_a_mask_over_weights_is_drawn(tmp_path, drawn):
    rows = [{"n_masked" if name == "n_cut" else name: value for name, value in row.items()} for row in metrics()]
    write_jsonl(tmp_path / "metrics.jsonl", rows)
    draw_training(tmp_path, count="n_masked", counted="weights masked")
    counts = drawn[0].axes[-1]
    assert counts.get_ylabel() == "weights masked"
    np.testing.assert_allclose(counts.lines[0].get_ydata(), [row["n_masked"] for row in rows])
    with pytest.raises(UserError, match="n_cut"):
        draw_training(tmp_path)


def test_a_single_step_is_drawn(tmp_path):
    write_jsonl(tmp_path / "metrics.jsonl", metrics()[:1])
    assert draw_training(tmp_path).stat().st_size > 1000


def test_what_is_wrong_with_the_files(tmp_path):
    with pytest.raises(UserError, match=r"no file .*report.json. Make one with"):
        draw_report(tmp_path)
    for content in ("[]", '{"models": {}}'):
        write_text(tmp_path / "report.json", content)
        with pytest.raises(UserError, match="holds no models"):
            draw_report(tmp_path)
    with pytest.raises(UserError, match=r"no file .*metrics.jsonl"):
        draw_training(tmp_path)
    for content, message in (("", "no rows"), ('{"step": 1}\n', "without step"), ("[1]\n", "without step")):
        write_text(tmp_path / "metrics.jsonl", content)
        with pytest.raises(UserError, match=message):
            draw_training(tmp_path)
    assert not list(tmp_path.glob("*.png"))


def test_the_same_file_gives_the_same_picture(tmp_path):
    write_json(tmp_path / "report.json", report())
    first = draw_report(tmp_path).read_bytes()
    assert draw_report(tmp_path).read_bytes() == first
    assert json.loads((tmp_path / "report.json").read_text()) == report()
