"""The comparison of ways to find edges: every mask within its budget, equal texts, and nothing made twice."""

from dataclasses import replace

import pytest
import torch
from helpers.scripts import PLAIN, RUDE, called, load_script, save_small_model

from circuit_breaking.errors import UserError
from circuit_breaking.figures.methods import draw_methods, table
from circuit_breaking.runs.files import read_csv, read_json, write_json, write_jsonl, write_text
from circuit_breaking.runs.mask_record import CutEdges
from circuit_breaking.runs.tensors import read_tensors
from circuit_breaking.tasks import TextTask
from circuit_breaking.training.config import MaskConfig
from circuit_breaking.training.methods import METHODS

pytestmark = pytest.mark.usefixtures("coarse_pictures", "short_choice")
script = load_script("toxicity/compare_methods.py")
QUICK = MaskConfig(steps=11, refine_rounds=2, batch_size=3, refine_batch_size=6, alpha=1.0)
LINES = ("ranking", "clamped", "hard-concrete", "ugs", "attribution")
LINES += ("ranking alone", "clamped alone", "attribution alone", "random")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    save_small_model(folder / "model", n_layer=2)
    write_text(folder / "plain.txt", "\n".join(PLAIN))
    write_jsonl(folder / "train.jsonl", [{"text": text} for text in RUDE[::2]])
    write_jsonl(folder / "test.jsonl", [{"text": text} for text in RUDE[1::2]])
    return folder


def settings(data, out, **changes):
    given = {
        "model": str(data / "model"), "ordinary": str(data / "plain.txt"), "toxic_train": data / "train.jsonl",
        "toxic_test": data / "test.jsonl", "out": out, "device": "cpu", "training": QUICK, "budgets": (1, 4, 999),
        "seeds": 2, "random_seeds": 2, "num_texts": 10,
        "methods": LINES[:5], "alone": ("ranking", "clamped", "attribution"), **changes,
    }  # fmt: skip
    return script.Settings(**given)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run folder, and how many texts of each task each training of a mask drew."""
    out, drawn = tmp_path_factory.mktemp("out"), []
    plain, train = TextTask.draw, script.train_mask

    def draw(self, size):
        drawn[-1][self.name] = drawn[-1].get(self.name, 0) + size
        return plain(self, size)

    def counted(*words, **more):
        drawn.append({})
        return train(*words, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextTask, "draw", draw)
        patch.setattr(script, "train_mask", counted)
        script.main(settings(data, out))
    return out / "methods", drawn


def test_every_mask_is_within_its_budget_and_measured(finished):
    folder, _ = finished
    about = read_json(folder / "methods.json")
    rows = about["masks"]
    assert [(row["method"], row["budget"], row["seed"]) for row in rows] == [
        (method, budget, seed) for method in LINES for budget in (1, 4) for seed in (0, 1)
    ]
    for row in rows:
        name = f"{row['method'].replace(' ', '_')}_{row['budget']}_seed{row['seed']}"
        tensors, record = read_tensors(folder / "masks" / name / "mask.safetensors")
        assert int((tensors["weights"] == 0).sum()) == row["edges_cut"] <= row["budget"]
        assert len(CutEdges.read(folder / "masks" / name / "edges.json").edges) == row["edges_cut"]
        if row["method"] == "attribution alone":  # in so few steps others may find no edge that is worth cutting
            assert row["edges_cut"] == row["budget"]
        assert record["budget"] == row["budget"]
        objective = row["ordinary"] - 1.0 * row["toxic"]
        original = about["original"]["ordinary"] - 1.0 * about["original"]["toxic"]
        assert row["objective"] == pytest.approx(objective) and row["gain"] == pytest.approx(original - objective)
        if row["method"] == "random":
            assert row["edges_cut"] == row["budget"] and record["role"] == "random"
    for seed in (0, 1):  # one training for both budgets
        for method in ("ranking", "attribution"):
            places = [folder / "masks" / f"{method}_alone_{budget}_seed{seed}" for budget in (1, 4)]
            few, many = (set(CutEdges.read(place / "edges.json").edges) for place in places)
            assert few < many or (few == many and method == "ranking")  # fewer edges than that may be worth cutting
            assert len({(place / "metrics.jsonl").read_bytes() for place in places}) == 1
    assert len(read_csv(folder / "methods.csv")) == len(rows)


def test_every_method_sees_as_many_texts(finished):
    folder, drawn = finished
    assert len(drawn) == 28 and all(each == {"toxic text": 45, "ordinary text": 45} for each in drawn)
    assert read_json(folder / "methods.json")["texts_seen"] == {"refined": 45, "alone": 45}
    for training in (MaskConfig(), MaskConfig(refine_rounds=7), MaskConfig(steps=0, refine_rounds=7), QUICK):
        for method in METHODS:
            of_method = replace(training, method=method)
            seen = [script.texts_seen(script.at_equal_texts(one)) for one in (of_method, script.unrefined(of_method))]
            assert script.unrefined(of_method).refine_rounds == 0
            texts = training.batch_size * training.steps + training.refine_batch_size * training.refine_rounds
            assert 0 <= texts - seen[1] < training.batch_size and (seen[0] == texts or not training.steps)


def test_masks_that_are_there_are_kept_and_others_made_again(data, finished, monkeypatch, capsys):
    folder, _ = finished
    first = (folder / "methods.json").read_bytes(), (folder / "methods.png").read_bytes()
    made, train = [], script.train_mask

    def counted(*words, **more):
        made.append(words[3])
        return train(*words, **more)

    monkeypatch.setattr(script, "train_mask", counted)
    script.main(settings(data, folder.parent))
    assert made == [] and (folder / "methods.png").read_bytes() == first[1]
    assert "so there is no mask of 999" in capsys.readouterr().out
    lost = folder / "masks" / "hard-concrete_4_seed1" / "mask.safetensors"
    before = read_tensors(lost)[0]["weights"]
    lost.unlink()
    script.main(settings(data, folder.parent))
    assert [(one.method, one.max_edges) for one in made] == [("hard-concrete", 4)]
    assert torch.equal(read_tensors(lost)[0]["weights"], before)
    assert (folder / "methods.json").read_bytes() == first[0]
    more = settings(data, folder.parent, training=replace(QUICK, lr=0.1), methods=("clamped",), alone=(), budgets=(1,))
    script.main(more)
    assert len(made) == 1 + 2


def test_the_figure_is_drawn_from_its_file_alone(tmp_path, drawn):
    rows = [
        {"method": method, "budget": budget, "seed": seed, "toxic": 1.0 + number + seed, "ordinary": 1.0, "gain": -0.5}
        for number, method in enumerate(LINES)
        for budget in (1, 10)
        for seed in (0, 1)
    ]
    write_json(tmp_path / "methods.json", {"original": {"toxic": 0.5, "ordinary": 0.75}, "masks": rows})
    assert draw_methods(tmp_path).stat().st_size > 10_000
    gain, toxic, _ = drawn[0].axes
    lines = {line.get_label(): line for line in toxic.get_lines()}
    assert set(lines) >= {*LINES[:-1], "random edges"}
    assert list(lines["hard-concrete"].get_ydata()) == [3.0, 3.0] and list(lines["clamped"].get_xdata()) == [1, 10]
    assert lines["attribution"].get_color() == lines["attribution alone"].get_color()
    assert {line.get_ydata()[0] for line in gain.get_lines()} == {0, -0.5}
    header, cells = table(tmp_path)
    assert header == ["toxic / ordinary loss", "1 edges", "10 edges"]
    assert ["hard-concrete", "3.500 / 1.000", "3.500 / 1.000"] in cells


@pytest.mark.parametrize(
    "about", [{}, {"original": {"toxic": 1.0, "ordinary": 1.0}, "masks": []}, [1],
              {"original": {"toxic": 1.0, "ordinary": 1.0}, "masks": [{"method": "magic", "budget": 1}]}],
)  # fmt: skip
def test_files_that_cannot_be_drawn(tmp_path, about):
    with pytest.raises(UserError, match=r"there is no file .*compare_methods.py"):
        draw_methods(tmp_path)
    write_json(tmp_path / "methods.json", about)
    wrong = r"methods\.json(: its content is a list|: masks\.0\.method is| lacks| holds no)"
    with pytest.raises(UserError, match=wrong):
        draw_methods(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgets": ()}, "budgets are"),
        ({"budgets": (0,)}, "budgets are"),
        ({"methods": ("magic",)}, "method 'magic' is not one of"),
        ({"alone": ("magic",)}, "method 'magic' is not one of"),
        ({"seeds": 0}, "seeds is 0"),
        ({"random_seeds": -1}, "random_seeds is -1"),
        ({"training": MaskConfig(constants_lr=0.1)}, "constants_lr"),
    ],
)
def test_settings_that_make_no_sense(data, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        script.main(settings(data, tmp_path, **changes))


def test_on_the_command_line(data, tmp_path):
    done = called(
        "toxicity/compare_methods.py", "--model", data / "model", "--ordinary", "none.txt", "--out", tmp_path,
        "--toxic-train", data / "train.jsonl", "--toxic-test", data / "test.jsonl", "--training.lr", "0.1",
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: there is no file")
