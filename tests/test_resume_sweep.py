"""A sweep of masks that is interrupted: finished masks stay, the one in progress goes on."""

import os
import signal
from contextlib import nullcontext

import pytest
from scripts import Killed, die, load_script
from test_compare import data  # noqa: F401 (a fixture)

from circuit_breaking import training
from circuit_breaking.checkpoints import Stopped
from circuit_breaking.cli import UserError
from circuit_breaking.files import locked, read_json, read_jsonl, read_tensors
from circuit_breaking.training import MaskSettings

sweep = load_script("toxicity/sweep_masks.py")
QUICK = MaskSettings(
    relax_steps=4, anneal_steps=4, sift_steps=1, refine_rounds=2, tries=2, batch_size=3, refine_batch_size=3
)
STEPS = 11  # of a mask


def start(data, out, **changes):  # noqa: F811
    given = {
        "model": str(data / "model"), "toxic_train": data / "train.jsonl", "toxic_test": data / "test.jsonl",
        "ordinary": str(data / "plain.txt"), "out": out, "training": QUICK, "budgets": (2, 4), "stable_budget": 2,
        "seeds": 2, "random_seeds": 1, "carries": ("optimal", "mean"), "mean_texts": 20, "device": "cpu",
        "checkpoint_every": 3,
    }  # fmt: skip
    sweep.main(sweep.Settings(**{**given, **changes}))


def made(out):
    """What a sweep left of every mask, but for what is not the same twice."""
    found = {}
    for place in (out / "sweep" / "masks").iterdir():
        files = {path.name for path in place.iterdir()} - {".lock", "cost.json"}
        rows = read_jsonl(place / "metrics.jsonl") if "metrics.jsonl" in files else []
        tensors = [read_tensors(path)[0] for path in sorted(place.glob("*.safetensors"))]
        values = [{key: tensor.tolist() for key, tensor in one.items()} for one in tensors]
        rows = [{**row, "seconds": 0} for row in rows]
        found[place.name] = (files, rows, values, read_json(place / "edges.json"))
    return found


def at_step(monkeypatch, step, how):
    """`how` happens behind so many steps of the sweep, over all masks; a list that counts them."""
    plain, counted = training._Trainer.step, []

    def stepped(self):
        row = plain(self)
        counted.append(row)
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
    trained = {f"{carry}_{name}" for carry in ("optimal", "mean") for name in ("2", "4", "2_seed1")}
    chance = {"random_optimal_2_seed0", "random_mean_2_seed0", "random_mean_4_seed0"}
    assert set(whole) == trained | chance
    for name, (files, rows, _, _) in whole.items():
        assert [row["step"] for row in rows] == list(range(STEPS if name not in chance or "optimal" in name else 0))
        assert not any("checkpoint" in file for file in files)


@pytest.mark.parametrize("step", [2, 12, 40, 6 * STEPS + 7])
@pytest.mark.parametrize("how", ["kill", "signal"])
def test_an_interrupted_sweep_leaves_what_a_whole_one_does(data, whole, tmp_path, monkeypatch, step, how):  # noqa: F811
    killed = how == "kill"
    with monkeypatch.context() as patch, pytest.raises(Killed if killed else Stopped):
        at_step(patch, step, die if killed else lambda: os.kill(os.getpid(), signal.SIGTERM))
        start(data, tmp_path)
    counted = at_step(monkeypatch, 0, die)
    start(data, tmp_path)
    assert made(tmp_path) == whole
    masks, last = divmod(step - 1, STEPS) if killed else divmod(step, STEPS)
    assert len(counted) == 7 * STEPS - masks * STEPS - (last // 3 * 3 if killed else last)
    counted.clear()
    start(data, tmp_path)
    assert counted == [] and made(tmp_path) == whole


def test_only_what_makes_a_difference_makes_a_mask_anew(data, tmp_path, monkeypatch, capsys):  # noqa: F811
    counted = at_step(monkeypatch, 0, die)
    few = {"carries": ("zero",), "budgets": (2,), "seeds": 1}
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
    (tmp_path / "sweep" / "masks" / "zero_2" / "mask.safetensors").write_bytes(b"no")
    counted.clear()
    start(data, tmp_path, **few, seed=1)
    assert len(counted) == STEPS and "made anew" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "free"), [("zero_2", False), ("mean_2", True)])
def test_a_mask_is_made_by_one_run_at_a_time_and_others_beside_it(data, tmp_path, name, free):  # noqa: F811
    with (
        locked(tmp_path / "sweep" / "masks" / name),
        nullcontext() if free else pytest.raises(UserError, match="another run is writing"),
    ):
        start(data, tmp_path, carries=("zero",), budgets=(2,), seeds=1)
