"""What happens before a script works: signals, threads, terminals and paths, and on which device it says it runs."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers.forks import Forked

from circuit_breaking.errors import UserError
from circuit_breaking.runs import cpus, devices, signals
from circuit_breaking.runs.cli import run_script
from circuit_breaking.runs.distributed import World
from circuit_breaking.runs.files import ROOT
from circuit_breaking.runs.launcher import launched, rank
from circuit_breaking.runs.signals import stop_signals

# a script in the manner of ours that loads no large library, with a module beside it
STUB = """
from dataclasses import dataclass
from circuit_breaking.runs.cli import read_settings, run_script

@dataclass
class Settings:
    seconds: float = 0  # how long it runs

if __name__ == "__main__":
    settings = read_settings(Settings)

import os, sys, time
from beside_the_stub import DASH

def main(settings):
    print("ready", "torch" in sys.modules, os.environ["OMP_WAIT_POLICY"], flush=True)
    time.sleep(settings.seconds)
    print(DASH, flush=True)

if __name__ == "__main__":
    run_script(main, settings)
"""


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stub")
    (folder / "stub.py").write_text(STUB)
    (folder / "beside_the_stub.py").write_text("DASH = '\\u2013'")
    return folder / "stub.py"


def started(words, cwd=None, **environment):
    """A Python process with further variables in its environment; None removes one."""
    found = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(
        [sys.executable, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd,
        env={name: value for name, value in found.items() if value is not None},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "environment", "shown"),
    [
        ([], {"PYTHONIOENCODING": "ascii"}, "\\u2013"),
        ([], {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "\\u2013"),
        ([], {"PYTHONIOENCODING": "ascii:replace"}, "?"),  # a value that is set stays
        ([], {"PYTHONSAFEPATH": "1", "LOCAL_RANK": "", "RANK": "", "WORLD_SIZE": ""}, "\u2013"),
        (["-m"], {"OMP_WAIT_POLICY": None}, "\u2013"),
    ],
    ids=["ascii", "C", "replace", "safe path", "module"],
)
def test_scripts_start_in_every_surrounding(stub, words, environment, shown):
    words = [*words, stub.stem] if words else [stub]
    # `python -m` finds the module in a folder above the current one, as `python -m toxicity.train_mask` does
    path = f"{ROOT}{os.pathsep}{stub.parent}" if words[0] == "-m" else str(ROOT)
    environment = {"PYTHONUTF8": "1", "PYTHONPATH": path, **environment}
    out, errors = started(words, "/", **{"OMP_WAIT_POLICY": "ACTIVE", **environment}).communicate(timeout=60)
    policy = environment.get("OMP_WAIT_POLICY", "ACTIVE") or "PASSIVE"
    assert out == f"ready False {policy}\n{shown}\n" and errors == ""


def test_environments_of_no_launcher_are_one_sentence(stub):
    out, errors = started([stub], LOCAL_RANK="0", RANK="x").communicate(timeout=60)
    assert out == "" and errors.startswith("error: RANK is 'x' in the environment") and errors.count("\n") == 1


def test_the_number_of_a_process(monkeypatch):
    for environment, expected in (({}, (0, 1)), ({"LOCAL_RANK": ""}, (0, 1)), ({"LOCAL_RANK": "1", "RANK": "3",
                                  "WORLD_SIZE": "4"}, (3, 4)), ({"LOCAL_RANK": "0", "RANK": ""}, (0, 1))):  # fmt: skip
        for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert launched() == expected and rank() == expected[0]
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="WORLD_SIZE is 'two'"):
        launched()
    assert rank() == 0


# Signals


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_ends_a_script_that_has_saved_nothing(stub, name):
    process = started([stub, "--seconds=60"])
    assert process.stdout.readline().startswith("ready")
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, name)
    assert errors.startswith(f"stopped by {name}. Run the same command again") and errors.count("\n") == 1


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="Linux shows what a process has loaded")
@pytest.mark.parametrize(
    ("script", "name"), [("toxicity/evaluation.py", "SIGUSR1"), ("toxicity/train_mask.py", "SIGTERM")]
)
def test_a_signal_ends_a_script_while_it_loads_torch(script, name):
    process = started([ROOT / script])
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in maps.read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(getattr(signal, name))
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, name) and out == ""
    assert errors.startswith(f"stopped by {name}. Run the same command again") and errors.count("\n") == 1


def test_a_signal_after_a_state_was_saved_has_the_exit_code_of_that(monkeypatch, capfd):
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    monkeypatch.setattr(signals, "_saved", False)
    try:
        signals.end_on_signals()
        for code in (128 + signal.SIGTERM, 75):
            with pytest.raises(SystemExit) as stop:
                os.kill(os.getpid(), signal.SIGTERM)
            assert stop.value.code == code
            signals.note_saved()
        with stop_signals() as received:  # a training loop is not interrupted
            os.kill(os.getpid(), signal.SIGUSR1)
            assert received == [signal.SIGUSR1]
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert capfd.readouterr().err.count("stopped by SIG") == 3


# Threads


def quota(root, folder, text):
    (root / folder).mkdir(parents=True, exist_ok=True)
    (root / folder / "cpu.max").write_text(text + "\n")


def test_threads_are_as_many_as_the_process_may_use(tmp_path, monkeypatch):
    monkeypatch.setattr(cpus, "CGROUPS", tmp_path)
    monkeypatch.setattr(cpus, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(cpus, "visible_cpus", lambda: 8)
    for name in ("SLURM_CPUS_PER_TASK", "OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that what the test sets is undone
        monkeypatch.delenv(name)
    assert cpus.cpu_limit() is None  # not Linux
    (tmp_path / "own").write_text("0::/job/step\n")
    quota(tmp_path, "job/step", "max 100000")
    assert cpus.cpu_limit() is None
    cpus.set_threads()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE" and "OMP_NUM_THREADS" not in os.environ
    quota(tmp_path, "job", "350000 100000")  # of a group around the process's own
    assert cpus.cpu_limit() == 3
    quota(tmp_path, "job/step", "50000 100000")
    assert cpus.cpu_limit() == 1
    quota(tmp_path, "job/step", "max 100000")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "2")
    assert cpus.cpu_limit() == 2
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "16")
    quota(tmp_path, "job", "max 100000")
    cpus.set_threads()
    assert "OMP_NUM_THREADS" not in os.environ  # torch starts no more than there are
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4")
    cpus.set_threads()
    assert os.environ["OMP_NUM_THREADS"] == "4"
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    cpus.set_threads()
    assert os.environ["OMP_NUM_THREADS"] == "4" and os.environ["OMP_WAIT_POLICY"] == "ACTIVE"  # what is set stays


def test_quotas_of_the_first_version_of_control_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(cpus, "CGROUPS", tmp_path)
    monkeypatch.setattr(cpus, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    (tmp_path / "own").write_text("4:cpu,cpuacct:/docker/ab\n")
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    for text, expected in (("-1\n", None), ("200000\n", 2)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(text)
        assert cpus.cpu_limit() == expected


# Devices

CPU = torch.device("cpu")


@dataclass
class OnDevice:
    device: str = "auto"  # where it computes


@pytest.fixture
def nvidia(tmp_path, monkeypatch):
    """A machine with the driver of an NVIDIA GPU that torch does not see."""
    (tmp_path / "version").write_text("NVRM version: 550")
    monkeypatch.setattr(devices, "NVIDIA_DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")


def test_a_script_says_once_where_it_runs(capsys, monkeypatch):
    monkeypatch.setattr(devices, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("auto", "cpu"):
        run_script(lambda settings: [devices.pick_device(settings.device) for _ in range(2)], OnDevice(name))
        assert capsys.readouterr().err == "device: cpu\n"
    devices.pick_device("auto")  # not within a script
    run_script(lambda settings: None, OnDevice())  # a script that only starts others
    run_script(lambda settings: devices.pick_device("auto"), object())
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(devices, "world", lambda: World(0, 4, CPU))
    devices.say_device("auto", CPU)
    assert capsys.readouterr().err == "device: cpu, in 4 processes\n"
    monkeypatch.setattr(devices, "world", lambda: World(1, 4, CPU))
    devices.say_device("auto", CPU)
    assert capsys.readouterr().err == ""


def test_a_gpu_that_is_not_used_is_noted(nvidia, capsys, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    devices.say_device("auto", CPU)
    device, note = capsys.readouterr().err.splitlines()
    assert device == "device: cpu" and note.startswith("note: this machine has an NVIDIA GPU, but this build of torch")
    assert "pip install torch==2.13.0+cu126 --index-url https://download.pytorch.org/whl/cu126" in note
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    devices.say_device("auto", CPU)
    assert "for CUDA 13.0) finds no GPU" in capsys.readouterr().err
    devices.say_device("cpu", CPU)  # a choice
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # another one
    devices.say_device("auto", CPU)
    assert capsys.readouterr().err == "device: cpu\n" * 2


def test_a_gpu_is_found_by_its_program_too(nvidia, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "NVIDIA_DRIVER", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not devices.has_nvidia_gpu()
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert devices.has_nvidia_gpu()


def test_docs_name_the_same_build_of_torch():
    for page in ("README.md", "docs/getting-started.md"):
        assert f"https://download.pytorch.org/whl/{devices.CUDA_BUILD}" in (ROOT / page).read_text(encoding="utf-8")


def test_the_real_scripts_say_it(tmp_path):
    """A script from end to end, in a forked process: the line stands first, and alone."""
    with (tmp_path / "said").open("w") as file:
        words = ["--texts", "ordinary", "--num-texts=2", "--device=cpu", f"--out={tmp_path / 'means'}"]
        process = Forked([sys.executable, ROOT / "ioi" / "compute_means.py", *words], os.environ, file)
        assert process.wait() == 0, (tmp_path / "said").read_text()
    said = (tmp_path / "said").read_text()
    assert said.startswith("device: cpu\n") and said.count("device:") == 1
