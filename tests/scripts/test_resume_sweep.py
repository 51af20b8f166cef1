"""A sweep of masks that is interrupted: finished masks stay, the one in progress is resumed."""

import os
import signal
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from helpers.scripts import Killed, die, load_script
from helpers.tasks import SHORT_CHOICE
from test_compare import data  # noqa: F401 (a fixture)

from circuit_breaking.engine.ablation_values import compute_means
from circuit_breaking.engine.load import load_model
from circuit_breaking.errors import UserError
from circuit_breaking.models.load import load_tokenizer
from circuit_breaking.runs.files import read_jsonl
from circuit_breaking.runs.mask_record import CONTROL, ControlRecord, CutEdges
from circuit_breaking.runs.run_folder import locked
from circuit_breaking.runs.signals import Stopped
from circuit_breaking.runs.tensors import read_tensors
from circuit_breaking.training import mask_trainer as training
from circuit_breaking.training.config import MaskConfig

pytestmark = pytest.mark.usefixtures("coarse_pictures", "short_choice")
sweep = load_script("toxicity/sweep_masks.py")
QUICK = MaskConfig(
    steps=8, refine_rounds=3, constants_steps=2, batch_size=3, refine_batch_size=3
)  # fmt: skip
GIVEN_STEPS, CONSTANTS = 11, 2  # steps of ablation constants: with random edges, with those of a mask
RANK, STEPS = 8 + SHORT_CHOICE, 11 + SHORT_CHOICE  # steps of the ranking that budgets share, and of a mask
# steps of the trainings of the sweep below, first to last: what is shared, and what masks do behind it; random edges
SHARED, LEARNED, FIXED = range(RANK), range(RANK, STEPS + CONSTANTS), range(RANK, STEPS)
TRAININGS = [SHARED, LEARNED, LEARNED, SHARED, LEARNED, SHARED, FIXED, FIXED, SHARED, FIXED]
TRAININGS += [range(GIVEN_STEPS + CONSTANTS)]
TOTAL = sum(map(len, TRAININGS))
CONTROLS = {"optimal_2_bias", "optimal_2_added", "optimal_2_mean"}


def given(data, out, **changes):  # noqa: F811
    """Settings of a sweep."""
    return {
        "model": str(data / "model"), "toxic_train": data / "train.jsonl", "toxic_test": data / "test.jsonl",
        "ordinary": str(data / "plain.txt"), "out": out, "training": QUICK, "budgets": (2, 4), "stable_budget": 2,
        "seeds": 2, "random_seeds": 1, "ablations": ("optimal", "mean"), "mean_texts": 20, "device": "cpu",
        "checkpoint_every": 3, "run": "sweep", **changes,
    }  # fmt: skip


def start(data, out, **changes):  # noqa: F811
    sweep.main(sweep.Settings(**given(data, out, **changes)))


def made(out):
    """The results of a sweep for every mask, without times and other values that differ between equal runs."""
    found = {}
    for place in (out / "sweep" / "masks").iterdir():
        files = {path.name for path in place.iterdir()} - {".lock", "cost.json"}
        rows = read_jsonl(place / "metrics.jsonl") if "metrics.jsonl" in files else []
        tensors = [read_tensors(path)[0] for path in sorted(place.glob("*.safetensors"))]
        values = [{key: tensor.tolist() for key, tensor in one.items()} for one in tensors]
        rows = [{**row, "seconds": 0} for row in rows]
        cut = ControlRecord.read(place / CONTROL) if CONTROL in files else CutEdges.read(place / "edges.json")
        found[place.name] = (files, rows, values, cut.edges)
    return found


def at_step(monkeypatch, step, how):
    """Call `how` after a number of steps, counted over all masks. Returns a list with the number of each step."""
    plain, counted = training._Trainer.step, []

    def stepped(self):
        row = plain(self)
        counted.append(self.done - 1)
        if len(counted) == step:
            how()
        return row

    monkeypatch.setattr(training._Trainer, "step", stepped)
    return counted


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("whole")
    start(data, out)
    return made(out)


def test_the_same_seed_gives_the_same_masks_twice(data, whole, tmp_path):  # noqa: F811
    start(data, tmp_path)
    assert made(tmp_path) == whole
    trained = {f"{ablation}_{name}" for ablation in ("optimal", "mean") for name in ("2", "4", "2_seed1")}
    chance = {"random_optimal_2_seed0", "random_mean_2_seed0", "random_mean_4_seed0"}
    assert set(whole) == trained | chance | CONTROLS
    assert all(whole[name][3] == whole["optimal_2"][3] for name in CONTROLS)
    for name, (files, rows, _, _) in whole.items():
        untrained = name in CONTROLS or (name in chance and "optimal" not in name)
        steps = 0 if untrained else GIVEN_STEPS if name in chance else STEPS
        steps += CONSTANTS if "optimal" in name and not untrained else 0
        assert [row["step"] for row in rows] == list(range(steps))
        assert not any("checkpoint" in file for file in files)


def test_sharing_a_phase_changes_nothing(data, whole):  # noqa: F811
    """Each mask is the one that training for its budget alone gives."""
    for name, (_, rows, tensors, edges) in whole.items():
        if name.startswith("random") or name in CONTROLS:
            continue
        ablation, budget, *more = name.split("_")
        seed = 1 if more else 0
        settings = sweep.Settings(**given(data, None))
        splits = sweep.read_texts(settings, load_tokenizer(settings.model), seed)
        model = load_model(settings.model, device="cpu")
        model.ablate_from = settings.ablate_from
        model.means = compute_means(model, splits.ordinary["train"][:20])
        torch.manual_seed(seed)
        how = replace(QUICK, max_edges=int(budget), constants_lr=settings.learned_lr if ablation == "optimal" else 0.0)
        result = training.train_mask(model, *splits.tasks(seed), how, progress=False)
        assert [{**row, "seconds": 0} for row in result.history] == rows
        assert [str(edge) for edge in result.edges] == edges
        assert model.mask.weights.tolist() == tensors[0]["weights"]
        assert ablation == "mean" or model.means.tolist() == tensors[1]["means"]


def test_random_edges_are_all_cut_and_only_what_they_carry_is_learned(data, whole):  # noqa: F811
    _, rows, tensors, edges = whole["random_optimal_2_seed0"]
    assert len(edges) == 2 == len(whole["optimal_2"][3]) and {row["n_cut"] for row in rows} == {2}
    assert [row["phase"] for row in rows] == ["given"] * GIVEN_STEPS + ["constants"] * CONSTANTS
    assert tensors[1]["means"] != whole["optimal_2"][2][1]["means"]


def kept_of(steps):
    """How many steps of a killed sweep are not repeated: each third of a training is saved."""
    done = 0
    for training_steps in TRAININGS:
        if steps - done < len(training_steps):
            reached = training_steps.start + steps - done
            return done + max(0, reached // 3 * 3 - training_steps.start)
        done += len(training_steps)
    return done


@pytest.mark.parametrize("how", ["kill", "signal"])
def test_a_sweep_interrupted_four_times_leaves_what_a_whole_one_does(data, whole, tmp_path, monkeypatch, how):  # noqa: F811
    killed, done, order = how == "kill", 0, [step for steps in TRAININGS for step in steps]
    for step in (2, 12, 40, TOTAL - 4):
        with monkeypatch.context() as patch, pytest.raises(Killed if killed else Stopped):
            counted = at_step(patch, step - done, die if killed else lambda: os.kill(os.getpid(), signal.SIGTERM))
            start(data, tmp_path)
        assert counted == order[done:step]  # no finished step is repeated
        done = kept_of(step - 1) if killed else step
    counted = at_step(monkeypatch, 0, die)
    start(data, tmp_path)
    assert counted == order[done:]
    assert made(tmp_path) == whole
    counted.clear()
    start(data, tmp_path)
    assert counted == [] and made(tmp_path) == whole and not (tmp_path / "sweep" / "rankings").exists()


def test_only_what_makes_a_difference_makes_a_mask_again(data, tmp_path, monkeypatch, capsys):  # noqa: F811
    counted = at_step(monkeypatch, 0, die)
    few = {"ablations": ("zero",), "budgets": (2,), "seeds": 1}
    for changes, masks in (
        ({}, 1),
        ({"budgets": (2, 4)}, 1),
        ({"random_seeds": 3, "seeds": 2}, 1),
        ({"learned_lr": 0.5}, 1),
        ({"learned_lr": 0.5, "resume": False}, 1),
        ({"seed": 1}, 1),
    ):
        counted.clear()
        start(data, tmp_path, **{**few, **changes})
        assert len(counted) == masks * STEPS, changes
    counted.clear()
    start(data, tmp_path, **{**few, "budgets": (2, 4)}, seed=1)
    assert len(counted) == STEPS  # that of 4 edges alone
    (tmp_path / "sweep" / "masks" / "zero_2" / "mask.safetensors").write_bytes(b"no")
    counted.clear()
    start(data, tmp_path, **few, seed=1)
    assert len(counted) == STEPS and "made again" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "free"), [("zero_2", False), ("mean_2", True)])
def test_a_mask_is_made_by_one_run_at_a_time_and_others_beside_it(data, tmp_path, name, free):  # noqa: F811
    with (
        locked(tmp_path / "sweep" / "masks" / name),
        nullcontext() if free else pytest.raises(UserError, match="another run is writing"),
    ):
        start(data, tmp_path, ablations=("zero",), budgets=(2,), seeds=1)
