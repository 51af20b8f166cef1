"""The batch files, with SLURM's commands replaced by local ones."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers.scripts import load_script

from circuit_breaking.runs.files import ROOT

# a script that runs until a signal stops it, and prints its arguments
STUB = """#!/bin/bash
echo "ran $*" >> "$LOG"
[ "$1" = loading.py ] && { echo ready >> "$LOG"; exec sleep 60; } # is ended by any signal, as Python before it starts
[ "$1" = wait.py ] || exit "${CODE:-0}"
trap 'sleep 0.2; echo saved >> "$LOG"; exit 75' USR1 TERM
echo ready >> "$LOG"
while :; do sleep 0.05; done
"""


@pytest.fixture
def cluster(tmp_path):
    """An environment whose srun runs its command here and whose scontrol notes what it was asked."""
    bin_folder, log = tmp_path / "bin", tmp_path / "log"
    bin_folder.mkdir()
    for name, text in {
        "srun": '#!/bin/bash\nexec "$@"\n',
        "scontrol": '#!/bin/bash\necho "scontrol $*" >> "$LOG"\n',
        "python": STUB,
    }.items():
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHON": str(bin_folder / "python"),
        "LOG": str(log), "SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_SUBMIT_DIR": str(ROOT),
    }  # fmt: skip
    return environment, log


def start(environment, *words):
    return subprocess.Popen(["bash", *words], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(log, word, seconds=10):
    for _ in range(20 * seconds):
        if log.is_file() and word in log.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"{word} never came")


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "slurm").glob("*.sbatch")))
def test_syntax(name):
    subprocess.run(["bash", "-n", ROOT / "slurm" / name], check=True)


@pytest.mark.parametrize("code", [0, 1])
def test_a_job_ends_as_its_script_does(cluster, code):
    environment, log = cluster
    job = start({**environment, "CODE": str(code)}, "slurm/job.sbatch", "toxicity/train_mask.py", "--seed", "1")
    assert job.wait(30) == code
    assert log.read_text() == "ran toxicity/train_mask.py --seed 1\n"


def test_the_time_limit_saves_and_queues_again(cluster):
    environment, log = cluster
    job = start(environment, "slurm/job.sbatch", "wait.py")
    wait_for(log, "ready")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 0
    assert log.read_text().splitlines() == ["ran wait.py", "ready", "saved", "scontrol requeue 7"]


@pytest.mark.parametrize(("restarts", "code"), [(None, 0), ("2", 0), ("3", 138)])
def test_a_job_that_had_nothing_to_save_is_queued_again_three_times_at_most(cluster, restarts, code):
    environment, log = cluster
    environment |= {"SLURM_RESTART_COUNT": restarts} if restarts else {}
    job = start(environment, "slurm/job.sbatch", "loading.py")
    wait_for(log, "ready")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == code
    lines = ["ran loading.py", "ready"]
    assert log.read_text().splitlines() == lines + ([] if code else ["scontrol requeue 7"])
    assert ("Give the job more time" in job.stderr.read()) == (code != 0)


def test_preemption_saves_and_leaves_the_queue_to_slurm(cluster):
    environment, log = cluster
    job = start(environment, "slurm/job.sbatch", "wait.py")
    wait_for(log, "ready")
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) == 75
    assert log.read_text().splitlines() == ["ran wait.py", "ready", "saved"]


def test_an_array_job_has_its_seed_and_its_run(cluster):
    environment, log = cluster
    assert start(environment, "slurm/seeds.sbatch", "night", "toxicity/train_mask.py", "--alpha", "0.3").wait(30) == 0
    assert log.read_text() == "ran toxicity/train_mask.py --seed 3 --run night-3 --alpha 0.3\n"


def test_a_job_on_several_gpus_is_launched(cluster):
    environment, log = cluster
    assert start(environment, "slurm/gpus.sbatch", "toxicity/train_mask.py", "--model", "gpt2").wait(30) == 0
    assert log.read_text() == "ran slurm/launch.py toxicity/train_mask.py --model gpt2\n"


# what each of several processes runs; `$RANK` is what torchrun sets
WORKER = """
import os, signal, sys, time
log = open(os.environ["LOG"], "a")
if sys.argv[1] == "wait":
    def stop(number, frame):
        time.sleep(0.2)
        print("saved", number, file=log, flush=True)
        sys.exit(75)
    signal.signal(signal.SIGUSR1, stop)
    signal.signal(signal.SIGTERM, stop)
    print("ready" + os.environ["RANK"], file=log, flush=True)
    time.sleep(60)
print("ran", *sys.argv[1:], file=log, flush=True)
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, None])
def test_launched_processes_are_told_and_their_exit_code_is_the_jobs(tmp_path, number):
    pytest.importorskip("accelerate")
    (tmp_path / "worker.py").write_text(WORKER)
    log = tmp_path / "log"
    environment = {**os.environ, "PROCESSES": "2", "LOG": str(log), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    words = [
        sys.executable,
        ROOT / "slurm" / "launch.py",
        tmp_path / "worker.py",
        "wait" if number else "3",
        "--a",
        "b",
    ]
    job = subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL)
    if number is None:
        assert job.wait(60) == 3 and "ran 3 --a b" in log.read_text()
        return
    for rank in range(2):
        wait_for(log, f"ready{rank}", 60)
    job.send_signal(number)
    assert job.wait(60) == 75 and f"saved {number.value}" in log.read_text()


def test_the_exit_code_of_several_processes():
    """torch ends the other processes by SIGTERM (-15) when one has ended, whatever the order."""
    launch = load_script("slurm/launch.py")
    for codes, expected in (({75, -15}, 75), ({3, -15}, 3), ({1, 75}, 75), ({-9}, 137), ({138, -15}, 138)):
        assert launch.exit_code(codes) == expected


@pytest.mark.parametrize("words", [["slurm/job.sbatch"], ["slurm/seeds.sbatch", "night"], ["slurm/gpus.sbatch"]])
def test_nothing_to_run_is_said(cluster, words):
    job = start(cluster[0], *words)
    assert job.wait(30) == 2 and "usage" in job.stderr.read()
