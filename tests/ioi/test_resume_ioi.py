"""The indirect-object scripts come out the same when they are interrupted."""

import os
import signal

import pytest
import torch
from helpers.scripts import Killed, die
from helpers.tasks import SHORT_CHOICE
from test_ioi_scripts import data  # noqa: F401 (a fixture)
from test_ioi_scripts import start as start_script

from circuit_breaking.errors import UserError
from circuit_breaking.evaluation import edge_importance
from circuit_breaking.models.load import TINY
from circuit_breaking.runs.files import read_json, read_jsonl
from circuit_breaking.runs.run_folder import locked
from circuit_breaking.runs.signals import Stopped
from circuit_breaking.runs.tensors import read_tensors
from circuit_breaking.tasks import IOITask
from circuit_breaking.training import mask_trainer as training

pytestmark = [
    pytest.mark.skipif(not (TINY / "config.json").is_file(), reason="the shipped model is not in tiny_gpt2"),
    pytest.mark.usefixtures("short_choice"),
]
STEPS = 7 + SHORT_CHOICE  # of a mask with the quick settings: to rank edges, refine, and choose a prefix


def stop():
    os.kill(os.getpid(), signal.SIGUSR1)


def at(monkeypatch, target, name, call, how):
    """Call `how` after the call of that number. Returns a list with an entry for each call."""
    plain, counted = getattr(target, name), []

    def called(self, *words, **more):
        value = plain(self, *words, **more)
        counted.append(name)
        if len(counted) == call:
            how()
        return value

    monkeypatch.setattr(target, name, called)
    return counted


def mask_of(folder):
    rows = [{**row, "seconds": 0} for row in read_jsonl(folder / "metrics.jsonl")]
    assert [row["step"] for row in rows] == list(range(STEPS))
    return read_tensors(folder / "mask.safetensors")[0]["weights"].tolist(), rows


COVERING = {"kind": "covering", "masks": 2, "max_edges": 3, "broken": 9.0, "checkpoint_every": 2, "num_test": 8}
FEW = {"batch_size": 3, "refine_batch_size": 3, "max_edges": 3}  # resuming is the same with more


@pytest.fixture(scope="module", autouse=True)
def undrawn():
    """Pictures and the importance of edges in them take most of the time and are not looked at here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edge_importance, "STEPS", 1)
        for name in ("draw_edges", "draw_next_tokens", "draw_training"):
            patch.setattr(f"circuit_breaking.figures.indirect_objects.{name}", lambda *args, **kwargs: None)
        yield


def start(name, prompts, out, **changes):
    """Start a script with quick settings and few texts."""
    start_script(name, prompts, out, **{**FEW, **changes})


@pytest.fixture(scope="module")
def cover(data, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("cover")
    start("alternative_masks", data, out, **COVERING)
    return out / "covering"


@pytest.mark.parametrize(("step", "how"), [(STEPS + 2, die), (STEPS, stop)])
def test_a_cover_goes_on(data, cover, tmp_path, monkeypatch, step, how):  # noqa: F811
    with monkeypatch.context() as patch, pytest.raises(Killed if how is die else Stopped):
        at(patch, training._Trainer, "step", step, how)
        start("alternative_masks", data, tmp_path / "run", **COVERING)
    counted = at(monkeypatch, training._Trainer, "step", 0, die)
    start("alternative_masks", data, tmp_path / "run", **COVERING)
    again = tmp_path / "run" / "covering"
    for name in ("mask1", "mask2"):
        assert mask_of(cover / name) == mask_of(again / name)
    covers = [read_json(folder / "covering.json") for folder in (cover, again)]
    assert covers[0]["masks"] == covers[1]["masks"] and len(covers[0]["masks"]) == 2
    masks, last = divmod(step - (how is die), STEPS)
    assert len(counted) == 2 * STEPS - masks * STEPS - (last // 2 * 2 if how is die else last)


@pytest.mark.parametrize(
    ("name", "folder", "changes"),
    [("train_mask", "run", {}), ("alternative_masks", "necessary", {"kind": "necessary"})],
)
def test_a_mask_goes_on(data, tmp_path, monkeypatch, capsys, name, folder, changes):  # noqa: F811
    changes = {**changes, "checkpoint_every": 2, "num_test": 8}
    start(name, data, tmp_path / "whole", **changes)
    start(name, data, tmp_path / "again", **changes)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at(patch, training._Trainer, "step", 6, die)
        start(name, data, tmp_path / "run", **changes)
    start(name, data, tmp_path / "run", **changes)
    assert "resuming from step 4" in capsys.readouterr().err
    assert mask_of(tmp_path / "whole" / folder) == mask_of(tmp_path / "run" / folder)
    assert mask_of(tmp_path / "whole" / folder) == mask_of(tmp_path / "again" / folder)
    start(name, data, tmp_path / "run", **changes, alpha=0.3)
    assert "other settings or data: starting from the beginning" in capsys.readouterr().err
    with locked(tmp_path / "run" / folder), pytest.raises(UserError, match="another run is writing"):
        start(name, data, tmp_path / "run", **changes)


TUNING = {"steps": 8, "batch_size": 4, "lr": 1e-3, "checkpoint_every": 3}


def tuned(out):
    weights = read_tensors(out / "finetuned" / "model" / "model.safetensors")[0]
    rows = read_jsonl(out / "finetuned" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(8)) and not list(out.rglob("checkpoint*"))
    return weights, rows


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("whole")
    start("finetune_gpt2", data, out, **TUNING)
    return tuned(out)


@pytest.mark.parametrize(("step", "how"), [(1, die), (5, die), (6, stop), (8, stop)])
def test_fine_tuning_goes_on(data, whole, tmp_path, monkeypatch, step, how):  # noqa: F811
    with monkeypatch.context() as patch, pytest.raises(Killed if how is die else Stopped):
        at(patch, IOITask, "loss", step, how)
        start("finetune_gpt2", data, tmp_path, **TUNING)
    counted = at(monkeypatch, IOITask, "loss", 0, die)
    start("finetune_gpt2", data, tmp_path, **TUNING)
    (weights, rows), (after, rows_after) = whole, tuned(tmp_path)
    assert rows == rows_after and all(map(torch.equal, weights.values(), after.values()))
    assert len(counted) == 8 - ((step - 1) // 3 * 3 if how is die else step)
    with locked(tmp_path / "finetuned"), pytest.raises(UserError, match="another run is writing"):
        start("finetune_gpt2", data, tmp_path, **TUNING)
