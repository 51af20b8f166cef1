"""Runs that are interrupted come out as if they had not been."""

import os
import signal
from dataclasses import asdict, replace
from functools import cache
from multiprocessing import get_context

import pytest
import torch
from helpers.scripts import Killed, die
from helpers.tasks import QUICK, SHORT_CHOICE, make_task, small

from circuit_breaking.errors import UserError
from circuit_breaking.runs.checkpoints import NEWEST, PREVIOUS, Checkpoints
from circuit_breaking.runs.run_folder import locked
from circuit_breaking.runs.signals import Stopped, stop_signals
from circuit_breaking.training.budgets import shared_steps
from circuit_breaking.training.config import MaskConfig
from circuit_breaking.training.mask_trainer import train_mask
from circuit_breaking.training.methods import METHODS
from circuit_breaking.training.prefix_choice import choice_steps

pytestmark = pytest.mark.usefixtures("short_choice")
SETTINGS = MaskConfig(max_edges=6, **QUICK)  # 18 steps in two phases, and between them 2 that choose a number of edges


def run(checkpoints=None, die_at=None, how=None, **changes):
    """Train from the beginning or from the folder's checkpoint; call `how` at step `die_at`. The mask and the rows."""
    rows = []

    def on_step(row):
        rows.append({key: value for key, value in row.items() if key != "seconds"})
        if row["step"] == die_at:
            how()

    model = small()
    saved = checkpoints.load() if checkpoints else None
    tasks = make_task("break", 1), make_task("keep", 5)
    result = train_mask(model, *tasks, replace(SETTINGS, **changes), None, on_step, False, checkpoints, saved)
    return result.weights, rows


@cache
def uninterrupted(*changes):
    """The result of `run` without interruption; the changes are pairs of a name and a value."""
    return run(**dict(changes))


@pytest.mark.parametrize(
    "changes", [{"constants_lr": 0.05}, {"constants_lr": 0.05, "refine_rounds": 0}, {"refine_rounds": 0}]
)
def test_masks_of_all_budgets_may_begin_with_one_ranking(tmp_path, changes):
    phase = asdict(shared_steps(replace(SETTINGS, **changes)))
    shared = Checkpoints(tmp_path / "shared", {"shared": True})
    torch.manual_seed(4)
    _, first = run(shared, **phase)
    for budget in (1, 3, 9):
        torch.manual_seed(4)
        expected, rows = run(max_edges=budget, **changes)
        own = Checkpoints(tmp_path / str(budget), {"budget": budget})
        shared.hand_on(own)
        found, more = run(own, max_edges=budget, **changes)
        assert torch.equal(found, expected) and first + more == rows
        assert len(first) == QUICK["steps"] + SHORT_CHOICE
        assert int((found == 0).sum()) <= budget


def test_what_depends_on_the_budget_is_not_shared():
    for method in METHODS:
        assert (shared_steps(replace(SETTINGS, method=method)) is not None) == (method == "ranking")
    for changes in ({"method": "given"}, {"steps": 0}, {"max_edges": 51}, {"budgets": ()}):
        assert shared_steps(replace(SETTINGS, **changes)) is None


def killed(**changes):
    """A run of 18 steps, or 20 with those that choose how many edges to cut, that is killed at each of them in turn.

    Every second is enough for its three phases; `make test-slow` has the others.
    """
    steps = range(1, 20 if choice_steps(MaskConfig(**changes)) else 18)
    return [pytest.param(changes, step, marks=() if step % 2 else pytest.mark.slow) for step in steps]


@pytest.mark.parametrize(
    "changes, die_at",
    [case for method in METHODS for case in killed(method=method)] + killed(method="attribution", ig_steps=4),
)
def test_a_killed_run_comes_out_the_same(tmp_path, changes, die_at):
    expected, expected_rows = uninterrupted(*changes.items())
    checkpoints = Checkpoints(tmp_path, {"seed": 0}, every=3)
    with pytest.raises(Killed):
        run(checkpoints, die_at, die, **changes)
    mask, rows = run(checkpoints, **changes)
    assert torch.equal(mask, expected)
    assert rows == expected_rows[die_at // 3 * 3 :]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("die_at", [2, 7, 15])
def test_a_signal_saves_and_stops(tmp_path, die_at, number):
    expected, expected_rows = uninterrupted()
    checkpoints = Checkpoints(tmp_path, {"seed": 0}, every=0)
    with pytest.raises(Stopped, match=f"step {die_at + 1}; run the same command again to continue"):
        run(checkpoints, die_at, lambda: os.kill(os.getpid(), number))
    mask, rows = run(checkpoints)
    assert torch.equal(mask, expected) and rows == expected_rows[die_at + 1 :]


def test_signals_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with stop_signals() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("damage", ["flip", "cut short", "empty"])
def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path, damage, capsys):
    expected, _ = uninterrupted()
    checkpoints = Checkpoints(tmp_path, {"seed": 0}, every=3)
    with pytest.raises(Killed):
        run(checkpoints, 13, die)
    data = bytearray((tmp_path / NEWEST).read_bytes())
    if damage == "flip":
        data[-5] ^= 1
    (tmp_path / NEWEST).write_bytes(data[: {"flip": None, "cut short": 500, "empty": 0}[damage]])
    assert torch.equal(run(checkpoints)[0], expected)
    assert "passed over" in capsys.readouterr().err
    assert checkpoints.load() is not None  # the resumed run has saved again


def test_nothing_whole_is_a_new_start(tmp_path):
    checkpoints = Checkpoints(tmp_path, {"seed": 0}, every=3)
    for name in (NEWEST, PREVIOUS):
        (tmp_path / name).write_bytes(b"no")
    assert checkpoints.load() is None
    checkpoints.remove()
    assert not list(tmp_path.iterdir())


def test_another_runs_checkpoint_is_not_resumed(tmp_path, capsys):
    Checkpoints(tmp_path, {"alpha": 0.2}).save(3, {"weights": torch.ones(2)}, {})
    assert Checkpoints(tmp_path, {"alpha": 0.3}).load() is None
    assert "other settings" in capsys.readouterr().err
    saved = Checkpoints(tmp_path, {"alpha": 0.2}).load()
    assert saved.step == 3 and torch.equal(saved.tensors["weights"], torch.ones(2))


def test_random_states_continue(tmp_path):
    checkpoints = Checkpoints(tmp_path, {})
    torch.manual_seed(3)
    checkpoints.save(1, {"x": torch.zeros(())}, {})
    expected = torch.rand(4)
    torch.manual_seed(9)
    checkpoints.load()
    assert torch.equal(torch.rand(4), expected)


def test_a_folder_is_held_by_one_run_at_a_time(tmp_path):
    def other():
        try:
            with locked(tmp_path / "run"):
                os._exit(0)
        except UserError as error:
            os._exit(7 if "another run is writing" in str(error) else 1)

    with locked(tmp_path / "run"):
        process = get_context("fork").Process(target=other)
        process.start()
        process.join()
        assert process.exitcode == 7
    with locked(tmp_path / "run"):
        pass


def test_a_run_without_checkpoints_leaves_signals_alone():
    before = signal.signal(signal.SIGTERM, lambda *_: die())
    try:
        with pytest.raises(Killed):
            run(None, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, before)
