"""Sweeps: their jobs and results, and that a failed job does not end the others."""

import os
import signal
import sys
import time

import pytest
from helpers.forks import Forked
from helpers.scripts import called

from circuit_breaking.errors import UserError
from circuit_breaking.figures.sweep import draw_sweep
from circuit_breaking.runs import jobs
from circuit_breaking.runs.files import ROOT, read_json, write_csv
from circuit_breaking.runs.grid import combinations, parse_grid
from circuit_breaking.runs.jobs import LocalJob, SlurmJob, run_job, stop_all
from circuit_breaking.runs.sweep import flatten, read_table

pytestmark = pytest.mark.usefixtures("coarse_pictures")
# a script in the manner of ours: fails for size 2, leaves a report otherwise, and counts how often it ran
STUB = """
import argparse, json, pathlib, sys
parser = argparse.ArgumentParser()
for name in ("--size", "--seed", "--out", "--run", "--base"):
    parser.add_argument(name)
a = parser.parse_args()
folder = pathlib.Path(a.out) / a.run
folder.mkdir(parents=True, exist_ok=True)
with (folder / "ran").open("a") as file:
    file.write("x")
if a.size == "2":
    sys.exit("error: size 2 is not possible.")
loss = float(a.base) / int(a.size) + int(a.seed) / 100
(folder / "report.json").write_text(json.dumps({"loss": loss, "settings": {"size": 9}, "name": "stub"}))
"""


def test_lists_and_ranges():
    grid = parse_grid(["alpha=0.1, 0.2", "max_edges=5", "--seed=0:6:2"])
    assert grid == {"alpha": ["0.1", "0.2"], "max-edges": ["5"], "seed": ["0", "2", "4"]}
    found = combinations(grid)
    assert len(found) == 6 and found[1] == {"alpha": "0.1", "max-edges": "5", "seed": "2"}


@pytest.mark.parametrize(
    "words", [["alpha"], ["=3"], ["alpha="], ["a=1,,2"], ["a=1", "a=2"], ["s=0:"], ["s=3:3"], ["s=0:x"], ["s=0:9:0"],
              ["s=0:99999999"], ["s=1:2:3:4"]],
)  # fmt: skip
def test_what_is_no_grid(words):
    with pytest.raises(UserError):
        parse_grid(words)


def test_numbers_of_a_report():
    assert flatten({"a": {"b": 1, "c": [1], "d": "x", "e": True}, "f": 0.5}) == {"a.b": 1, "f": 0.5}


def test_a_job_that_cannot_start_is_a_failed_job(tmp_path):
    assert run_job(["/no/such/program"], str(tmp_path / "log"))["exit_code"] == 1
    assert run_job([sys.executable, "-c", "raise SystemExit(3)"], str(tmp_path / "log"))["exit_code"] == 3
    job = LocalJob(["/no/such/program"], tmp_path / "log", 1)
    assert job.done() and job.result()["exit_code"] == 1 and "No such file" in job.result()["error"]


def test_a_job_beyond_its_time_limit_is_stopped(tmp_path, monkeypatch):
    """It is asked to stop first, and killed if it does not."""
    monkeypatch.setattr(jobs, "GRACE", 0.2)
    for ignoring, code in ((False, -signal.SIGTERM), (True, -signal.SIGKILL)):
        trap = "import signal, time; " + ("signal.signal(signal.SIGTERM, signal.SIG_IGN); " if ignoring else "")
        job = LocalJob([sys.executable, "-c", f"{trap}time.sleep(60)"], tmp_path / "log", 0.5 / 60)
        while not job.done():
            time.sleep(0.02)
        assert job.result()["exit_code"] == code and "longer than its time limit" in job.result()["error"]


# a job that saves its state when it is asked to stop, and one that does not stop
SLOW = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(next(word[6:] for word in sys.argv if word.startswith("--out=")))
def stop(number, frame):
    if "--deaf=1" not in sys.argv:
        (folder / f"saved{os.getpid()}").touch()
        sys.exit(75)
signal.signal(signal.SIGTERM, stop)
(folder / f"running{os.getpid()}").touch()
time.sleep(60)
"""


def running(folder):
    return [int(path.name.removeprefix("running")) for path in folder.glob("running*")]


@pytest.mark.parametrize(
    ("number", "deaf"), [("SIGTERM", 0), ("SIGINT", 0), ("SIGHUP", 0), ("SIGUSR1", 0), ("SIGTERM", 1)]
)
def test_a_sweep_that_is_stopped_stops_its_jobs(tmp_path, number, deaf):
    (tmp_path / "slow.py").write_text(SLOW)
    words = ["--grid", "size=1,2,3", "--fixed", f"deaf={deaf}", "--out", tmp_path, "--name", "s", "--at-once", "2"]
    with (tmp_path / "said").open("w") as file:
        sweep = Forked([sys.executable, ROOT / "sweep.py", tmp_path / "slow.py", *words], os.environ, file)
    folder = tmp_path / "s"
    while len(running(folder)) < 2:
        assert sweep.poll() is None, (tmp_path / "said").read_text()
        time.sleep(0.02)
    sweep.send_signal(getattr(signal, number))
    if deaf:  # a second signal does not wait for jobs that do not stop
        time.sleep(0.3)
        sweep.send_signal(signal.SIGINT)
    assert sweep.wait() == 75
    said = (tmp_path / "said").read_text()
    assert "with 2 running jobs, which were stopped too. Run the same command again" in said and "Traceback" not in said
    for pid in running(folder):
        assert deaf or (folder / f"saved{pid}").exists()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_jobs_of_slurm_are_cancelled():
    class Submitted:
        cancelled = False

        def done(self):
            return False

        def cancel(self, check):
            self.cancelled = True

    submitted = [Submitted(), Submitted()]
    stop_all([SlurmJob(job) for job in submitted], [signal.SIGTERM])
    assert all(job.cancelled for job in submitted)


def test_tables_come_back(tmp_path):
    rows = [{"a": "x", "n": 1, "v": 0.25}, {"a": "y", "n": 2, "w": 3}]
    write_csv(tmp_path / "t.csv", rows)
    assert read_table(tmp_path / "t.csv") == [{**rows[0], "w": ""}, {"a": "y", "n": 2, "v": "", "w": 3}]


def sweep(folder, *more):
    return called(
        "sweep.py", folder / "stub.py", "--grid", "size=1,2,4", "seed=0:2", "--fixed", "base=8", "--out", folder,
        "--name", "s", "--at-once", "3", *more,
    )  # fmt: skip


def test_a_sweep_gathers_what_went_well_and_names_what_failed(tmp_path):
    (tmp_path / "stub.py").write_text(STUB)
    done = sweep(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "4 of 6 jobs done" in done.stdout and done.stdout.count("failed: size=2") == 2
    rows = read_table(tmp_path / "s" / "sweep.csv")
    assert [(r["size"], r["seed"], r["exit_code"], r["loss"]) for r in rows] == [
        (1, 0, 0, 8.0), (1, 1, 0, 8.01), (2, 0, 1, ""), (2, 1, 1, ""), (4, 0, 0, 2.0), (4, 1, 0, 2.01),
    ]  # fmt: skip
    assert "size 2 is not possible" in (tmp_path / "s" / "size=2_seed=0.log").read_text()
    assert read_json(tmp_path / "s" / "size=1_seed=0.json")["exit_code"] == 0
    picture = (tmp_path / "s" / "sweep.png").read_bytes()
    draw_sweep(tmp_path / "s", "size", "loss")  # from the table alone
    assert (tmp_path / "s" / "sweep.png").read_bytes() == picture
    with pytest.raises(UserError, match="no column 'nothing'"):
        draw_sweep(tmp_path / "s", "size", "nothing")
    # once more: only what failed runs again
    sweep(tmp_path)
    assert (tmp_path / "s" / "size=1_seed=0" / "ran").read_text() == "x"
    assert (tmp_path / "s" / "size=2_seed=0" / "ran").read_text() == "xx"


def test_settings_that_make_no_sense(tmp_path):
    (tmp_path / "stub.py").write_text(STUB)
    for more, message in [
        (["--fixed", "base=1,2"], "several values"), (["--at-once", "0"], "at_once"), (["--grid"], "empty"),
    ]:  # fmt: skip
        done = sweep(tmp_path, *more)
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
