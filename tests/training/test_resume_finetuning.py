"""Fine-tuning that is interrupted comes out as if it had not been: the loop, and the scripts of both settings."""

import os
import random
import signal
import subprocess
import sys
import time
from functools import cache

import pytest
import torch
from helpers.models import small_gpt2
from helpers.scripts import Killed, die, load_script, save_toxic_data
from test_finetuning import QUICK, TRAINED, task

from circuit_breaking.errors import UserError
from circuit_breaking.runs.checkpoints import NEWEST, Checkpoints
from circuit_breaking.runs.files import ROOT, read_json, read_jsonl
from circuit_breaking.runs.run_folder import locked
from circuit_breaking.runs.signals import Stopped
from circuit_breaking.training import finetune as finetuning
from circuit_breaking.training.config import FinetuneSettings
from circuit_breaking.training.finetune import finetune

pytestmark = pytest.mark.usefixtures("coarse_pictures")
toxicity = load_script("toxicity/finetune_gpt2.py")


def run(monkeypatch, method, checkpoints=None, die_at=None, how=None, **changes):
    """Fine-tune from the beginning or a checkpoint; call `how` after step `die_at`. The weights and the result."""
    plain = finetuning._Run.advance

    def advance(self, number):
        plain(self, number)
        if self.done == die_at:
            how()

    hf, saved = small_gpt2(), checkpoints.load() if checkpoints else None
    settings = FinetuneSettings(**{**QUICK, **changes})
    with monkeypatch.context() as patch:
        patch.setattr(finetuning._Run, "advance", advance)
        result = finetune(hf, method, task(1), task(2), settings, False, checkpoints, saved)
    return hf.state_dict(), result


def same(first, second):
    weights = all(map(torch.equal, first[0].values(), second[0].values()))
    return weights and vars(first[1]) == vars(second[1])


@cache
def uninterrupted(method):
    """The weights and the result of `run` without an interruption."""
    with pytest.MonkeyPatch.context() as patch:
        return run(patch, method)


@pytest.mark.parametrize("method", TRAINED)
@pytest.mark.parametrize("die_at", [1, 3, 5, 8, 12])
def test_a_killed_run_comes_out_the_same(tmp_path, monkeypatch, method, die_at):
    expected = uninterrupted(method)
    checkpoints = Checkpoints(tmp_path, {}, every=2)
    with pytest.raises(Killed):
        run(monkeypatch, method, checkpoints, die_at, die)
    saved = checkpoints.load()
    assert (saved.step if saved else 0) == (die_at - 1) // 2 * 2
    assert same(run(monkeypatch, method, checkpoints), expected)
    steps = [row["step"] for row in expected[1].history]
    assert steps == sorted(set(steps))
    # the end is kept: nothing is trained once more
    assert same(run(monkeypatch, method, checkpoints, 12, die), expected)


@pytest.mark.parametrize("changes", [{"lr": 1e-9, "patience": 2, "check_every": 1}, {"lr": 1e30, "clip": 1e30}])
def test_a_run_that_ended_early_has_ended(tmp_path, monkeypatch, changes):
    expected = run(monkeypatch, "ascent", **changes)
    checkpoints = Checkpoints(tmp_path, {}, every=1)
    assert same(run(monkeypatch, "ascent", checkpoints, **changes), expected)
    last = checkpoints.load()
    assert last.values["ended"] and last.step < 12
    assert same(run(monkeypatch, "ascent", checkpoints, last.step + 1, die, **changes), expected)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_stops(tmp_path, monkeypatch, number):
    expected = uninterrupted("task_arithmetic")
    checkpoints = Checkpoints(tmp_path, {}, every=0)
    with pytest.raises(Stopped, match="step 7; run the same command again to continue") as stopped:
        run(monkeypatch, "task_arithmetic", checkpoints, 7, lambda: os.kill(os.getpid(), number))
    assert stopped.value.exit_code == 75
    assert checkpoints.load().step == 7
    assert same(run(monkeypatch, "task_arithmetic", checkpoints), expected)


def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path, monkeypatch, capsys):
    expected, checkpoints = uninterrupted("joint"), Checkpoints(tmp_path, {}, every=2)
    with pytest.raises(Killed):
        run(monkeypatch, "joint", checkpoints, 9, die)
    (tmp_path / NEWEST).write_bytes((tmp_path / NEWEST).read_bytes()[:-9])
    assert checkpoints.load().step == 6 and "passed over" in capsys.readouterr().err
    assert same(run(monkeypatch, "joint", checkpoints), expected)


# The script


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_toxic_data(tmp_path_factory.mktemp("data"))


def options(data, out, name, **changes):
    return {
        "model": str(data / "model"), "toxic_train": data / "train.jsonl", "toxic_test": data / "test.jsonl",
        "ordinary": str(data / "plain.txt"), "out": out, "run": name, "methods": ("joint", "rmu"),
        "lrs": (1e-3, 1e-4), "steps": 12, "check_every": 3, "batch_size": 4, "checkpoint_every": 2, "device": "cpu",
        **changes,
    }  # fmt: skip


def start(data, out, name, **changes):
    toxicity.main(toxicity.Settings(**options(data, out, name, **changes)))


def made(folder):
    """The results of a run, without values that differ between equal runs and hidden, partial pictures."""
    found, elsewhere = {}, {"run": None, "out": None}
    for path in sorted(folder.rglob("*")):
        begun = path.name.startswith(".finetuning.png.")
        if path.is_file() and path.name not in ("cost.json", "finetuning.png", ".lock") and not begun:
            content = path.read_bytes()
            if path.name == "finetuning.json":
                about = read_json(path)
                made_from = about["provenance"]
                provenance = {**made_from, "settings": {**made_from["settings"], **elsewhere}}
                content = {**about, "provenance": provenance, "finetuning": {**about["finetuning"], **elsewhere}}
            found[path.relative_to(folder)] = content
    return found


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    start(data, out, "whole")
    return out / "whole" / "finetuned"


def test_the_same_seed_gives_the_same_files_twice(data, whole, tmp_path):
    start(data, tmp_path, "again")
    assert made(whole) == made(tmp_path / "again" / "finetuned") and not list(whole.glob("*/checkpoints"))
    rows = read_jsonl(whole / "joint" / "metrics.jsonl")
    assert [(row["lr"], row["step"]) for row in rows] == [(lr, at) for lr in (1e-3, 1e-4) for at in (0, 3, 6, 9, 12)]


def kill_at(monkeypatch, step, how, counted=None):
    """Call `how` after a number of steps over all methods and rates. `counted` gets an entry for each step."""
    plain, counted = finetuning._Run.advance, [] if counted is None else counted

    def advance(self, number):
        plain(self, number)
        counted.append(self.done)
        if len(counted) == step:
            how()

    monkeypatch.setattr(finetuning._Run, "advance", advance)


@pytest.mark.parametrize("step", [1, 7, 13, 25, 48])
def test_a_killed_script_leaves_what_a_whole_one_does(data, whole, tmp_path, monkeypatch, step, capsys):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, step, die)
        start(data, tmp_path, "run")
    counted = []
    kill_at(monkeypatch, 0, die, counted)
    start(data, tmp_path, "run")
    here = tmp_path / "run" / "finetuned"
    assert made(here) == made(whole)
    assert len(counted) == 48 - (step - 1) // 12 * 12 - (step - 1) % 12 // 2 * 2  # no finished step is repeated
    assert ("is there, of the same settings" in capsys.readouterr().out) == (step > 24)


def test_a_signal_stops_the_script_and_a_changed_setting_starts_from_the_beginning(data, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        kill_at(patch, 17, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        start(data, tmp_path, "run")
    counted = []
    kill_at(monkeypatch, 0, die, counted)
    start(data, tmp_path, "run", batch_size=5)
    assert len(counted) == 48 and "other settings or data: starting from the beginning" in capsys.readouterr().err
    start(data, tmp_path, "run", batch_size=5, methods=("joint",))
    assert len(counted) == 48
    start(data, tmp_path, "run", batch_size=5, methods=("joint",), resume=False)
    assert len(counted) == 72
    start(data, tmp_path, "run", batch_size=5, methods=("joint",), lrs=(1e-3,))
    assert len(counted) == 84
    (tmp_path / "run" / "finetuned" / "joint" / "finetuning.json").write_text("{")
    start(data, tmp_path, "run", batch_size=5, methods=("joint",), lrs=(1e-3,))
    assert len(counted) == 96 and "made again" in capsys.readouterr().err


def test_a_method_is_made_by_one_run_at_a_time(data, tmp_path):
    with locked(tmp_path / "run" / "finetuned" / "joint"), pytest.raises(UserError, match="another run is writing"):
        start(data, tmp_path, "run")


def test_a_signal_between_trainings_stops_the_next(data, tmp_path, monkeypatch):
    plain = toxicity.save_hf_folder

    def save(*args):
        plain(*args)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(toxicity, "save_hf_folder", save)
    counted = []
    kill_at(monkeypatch, 0, die, counted)
    with pytest.raises(Stopped):
        start(data, tmp_path, "run")
    assert len(counted) == 25 and (tmp_path / "run" / "finetuned" / "joint" / "finetuning.json").is_file()


@pytest.mark.slow
def test_kills_at_random_moments_leave_the_same_files(data, tmp_path):
    def command(name):
        given = options(data, tmp_path, name, steps=40)
        words = [sys.executable, str(ROOT / "toxicity" / "finetune_gpt2.py")]
        for key, value in given.items():
            words += [f"--{key.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
        return words

    def started(name):
        return subprocess.Popen(command(name), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    begin = time.perf_counter()
    subprocess.run(command("whole"), check=True, capture_output=True)
    seconds, moments, kills = time.perf_counter() - begin, random.Random(0), 0
    stopped = started("killed")
    while not list((tmp_path / "killed").rglob(NEWEST)):
        time.sleep(0.005)
    stopped.terminate()
    assert stopped.wait() == 75
    for _ in range(5):
        process = started("killed")
        try:
            process.wait(seconds * moments.uniform(0.5, 0.8))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    assert kills >= 1
    done = subprocess.run(command("killed"), capture_output=True, text=True, check=True)
    assert "resuming from step" in done.stderr or "is there" in done.stdout
    assert made(tmp_path / "whole" / "finetuned") == made(tmp_path / "killed" / "finetuned")
