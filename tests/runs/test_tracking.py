"""`--log-with`: the rows of metrics.jsonl also reach a tracking tool."""

import sys
from typing import ClassVar

import pytest

from circuit_breaking.errors import UserError
from circuit_breaking.runs import tracking
from circuit_breaking.runs.files import read_jsonl
from circuit_breaking.runs.run_folder import METRICS, recorded, resume_key

ROWS = [{"step": at, "phase": "relax", "loss": 1.0 / (at + 1), "n_cut": at} for at in range(5)]
RUN = {"settings": {"lr": 0.1, "model": "tiny", "means": None, "budgets": [1, 2]}}


@pytest.fixture
def memory(monkeypatch):
    """A tracker of accelerate that remembers what it gets, in the place of wandb's."""
    trackers = pytest.importorskip("accelerate.tracking", reason="accelerate is not installed")

    class Memory(trackers.GeneralTracker):
        name, requires_logging_directory = "wandb", False
        made: ClassVar = []

        def __init__(self, run_name, **options):
            super().__init__()
            self.about, self.rows, self.config, self.open = (run_name, options), [], None, None
            self.made.append(self)

        def start(self):
            self.open = True

        @property
        def tracker(self):
            return self

        def store_init_configuration(self, values):
            self.config = values

        def log(self, values, step=None, **more):
            self.rows.append({"step": step, **values})

        def finish(self):
            self.open = False

    monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, "wandb", Memory)
    monkeypatch.setattr(tracking, "find_spec", lambda name: True)
    return Memory.made


def test_a_tool_gets_the_rows_of_metrics_jsonl_and_the_settings(tmp_path, memory):
    with recorded(tmp_path / "mine", RUN, log_with="wandb") as how:
        for row in ROWS:
            how["on_step"](row)
        assert memory[0].open
    (found,) = memory
    assert found.rows == ROWS == read_jsonl(tmp_path / "mine" / METRICS) and not found.open
    assert found.about == ("circuit-breaking", {"name": "mine"})
    assert found.config == {"lr": 0.1, "model": "tiny", "means": "None", "budgets": "[1, 2]"}


def test_a_tool_is_closed_when_training_fails(tmp_path, memory):
    with pytest.raises(ZeroDivisionError), recorded(tmp_path, RUN, log_with="wandb"):
        1 / 0  # noqa: B018
    assert memory[0].open is False


def test_nothing_is_tracked_by_default(tmp_path, memory):
    with recorded(tmp_path, RUN) as how:
        how["on_step"](ROWS[0])
    assert memory == [] and read_jsonl(tmp_path / METRICS) == ROWS[:1]


def test_tensorboard_holds_the_same_numbers(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with recorded(tmp_path, RUN, log_with="tensorboard") as how:
        for row in ROWS:
            how["on_step"](row)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("loss", "n_cut"):
        found = [(one.step, one.value) for one in events.Scalars(name)]
        assert found == [(row["step"], pytest.approx(row[name])) for row in ROWS]


@pytest.mark.parametrize("missing", ["accelerate", "wandb"])
def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch, missing):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    if missing == "accelerate":
        monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    sentence = f"log_with is wandb, .*{missing}.*pip install.*leave log_with unset"
    with pytest.raises(UserError, match=sentence), recorded(tmp_path, RUN, log_with="wandb"):
        pass


def test_a_run_is_resumed_whatever_tracks_it():
    key = [resume_key({"settings": {"lr": 0.1, "log_with": name}}) for name in ("none", "wandb")]
    assert key[0] == key[1]
