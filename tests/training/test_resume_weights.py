"""Learning a mask over weights comes out the same when it is interrupted: the loop, and `mask_learning.py`."""

import copy
import os
import signal
from dataclasses import replace
from functools import cache

import pytest
import torch
from helpers.models import small_gpt2
from helpers.scripts import Killed, die
from helpers.tasks import make_task
from test_weight_training import QUICK, folder, script, settings  # noqa: F401 (folder is a fixture)

from circuit_breaking.errors import UserError
from circuit_breaking.runs.checkpoints import NEWEST, Checkpoints
from circuit_breaking.runs.files import read_jsonl
from circuit_breaking.runs.run_folder import locked
from circuit_breaking.runs.signals import Stopped
from circuit_breaking.runs.tensors import read_tensors
from circuit_breaking.training.config import WeightMaskSettings
from circuit_breaking.training.gates import METHODS
from circuit_breaking.training.weight_trainer import train_weight_mask

pytestmark = pytest.mark.usefixtures("coarse_pictures")


def run(checkpoints=None, die_at=None, how=None, **changes):
    """Train from the beginning or from the folder's checkpoint; at step `die_at`, call `how`. The mask and the rows."""
    rows = []

    def on_step(row):
        rows.append({key: value for key, value in row.items() if key != "seconds"})
        if row["step"] == die_at:
            how()

    hf = small_gpt2()
    before = copy.deepcopy(hf.state_dict())
    torch.manual_seed(0)
    saved = checkpoints.load() if checkpoints else None
    chosen = WeightMaskSettings(**{**QUICK, "max_masked": 9, "penalty": 0.01, **changes})
    try:
        result = train_weight_mask(
            hf, make_task("break", 1), make_task("keep", 5), chosen, on_step, False, checkpoints, saved
        )
    finally:
        assert all(torch.equal(before[name], value) for name, value in hf.state_dict().items())
    return {name: units.tolist() for name, units in result.mask.units.items()}, rows


@cache
def uninterrupted(*changes):
    """The result of `run` without interruption; the changes are pairs of a name and a value."""
    return run(**dict(changes))


@pytest.mark.parametrize("granularity", ["weight", "head"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("die_at", [1, 3, 4, 6, 9])
def test_a_killed_run_comes_out_the_same(tmp_path, die_at, method, granularity):
    changes = {"method": method, "granularity": granularity, "max_masked": 9 if granularity == "weight" else 2}
    expected, expected_rows = uninterrupted(*changes.items())
    checkpoints = Checkpoints(tmp_path, {}, every=2)
    with pytest.raises(Killed):
        run(checkpoints, die_at, die, **changes)
    assert run(checkpoints, **changes) == (expected, expected_rows[die_at // 2 * 2 :])
    assert run(checkpoints, 9, die, **changes) == (expected, [])  # the end is kept


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_stops(tmp_path, number):
    expected, rows = uninterrupted(("method", "hard-concrete"))
    checkpoints = Checkpoints(tmp_path, {}, every=0)
    with pytest.raises(Stopped, match="step 6; run the same command again to continue") as stopped:
        run(checkpoints, 5, lambda: os.kill(os.getpid(), number), method="hard-concrete")
    assert stopped.value.exit_code == 75
    assert run(checkpoints, method="hard-concrete") == (expected, rows[6:])


def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path, capsys):
    expected, rows = run()
    checkpoints = Checkpoints(tmp_path, {}, every=2)
    with pytest.raises(Killed):
        run(checkpoints, 7, die)
    (tmp_path / NEWEST).write_bytes(b"")
    assert run(checkpoints) == (expected, rows[4:]) and "passed over" in capsys.readouterr().err


# The script


def test_the_script_resumes_and_starts_from_the_beginning(folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    def start(name, **changes):
        script.main(replace(settings(folder, out=tmp_path, max_masked=20, checkpoint_every=2), run=name, **changes))
        mask = read_tensors(tmp_path / name / "weight_mask.safetensors")[0]
        rows = [{**row, "seconds": 0} for row in read_jsonl(tmp_path / name / "metrics.jsonl")]
        return {key: units.tolist() for key, units in mask.items()}, rows

    expected = start("whole")
    assert start("again") == expected and len(expected[1]) == 10
    plain = script.train_weight_mask

    def dying(*words, on_step, **more):
        def then(row):
            on_step(row)
            if row["step"] == 6:
                os.kill(os.getpid(), signal.SIGUSR1)

        return plain(*words, on_step=then, **more)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="after step 7"):
        patch.setattr(script, "train_weight_mask", dying)
        start("run")
    assert len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == 7
    assert start("run") == expected and "resuming from step 7" in capsys.readouterr().err
    assert (
        start("run", alpha=3.0) != expected
        and "other settings or data: starting from the beginning" in capsys.readouterr().err
    )
    with locked(tmp_path / "run"), pytest.raises(UserError, match="another run is writing"):
        start("run")
