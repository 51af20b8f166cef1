"""Two processes that share every batch get the same mask as one process with the whole batch."""

import os
import signal
import subprocess
import sys
import time

import parallel_case
import pytest
import torch
from helpers.scripts import PLAIN, RUDE, command, save_small_model

from circuit_breaking.errors import UserError
from circuit_breaking.runs import distributed as parallel
from circuit_breaking.runs.distributed import World, from_main, largest, launched, share, sum_
from circuit_breaking.runs.files import ROOT, read_json, read_jsonl, write_jsonl, write_text
from circuit_breaking.runs.tensors import read_tensors
from circuit_breaking.training.config import MaskConfig
from circuit_breaking.training.prefix_choice import choice_steps

LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes=2"]
LAUNCH += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]


def environment():
    """Without GPUs, and with the modules of the tests, whatever is installed."""
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def launch(*words, **more):
    pytest.importorskip("accelerate")
    return subprocess.Popen(
        [*LAUNCH, *map(str, words)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


@pytest.mark.usefixtures("short_choice")
def test_two_processes_find_what_one_finds(tmp_path):
    """By every method: masks, losses of every step, what cut edges carry; with uneven shares and none at all."""
    both = launch(ROOT / "tests" / "parallel_case.py", "--out", tmp_path, "--processes", 2)
    _, errors = both.communicate(timeout=200)
    assert both.returncode == 0, errors
    parallel_case.main(parallel_case.Settings(tmp_path, 1))
    one, *two = (read_json(tmp_path / name) for name in ("0_of_1.json", "0_of_2.json", "1_of_2.json"))
    assert [part["main"] for part in two] == [True, False] and one["main"]
    assert two[0]["found"] == two[1]["found"]  # bit for bit
    for name, expected in one["found"].items():
        found = two[0]["found"][name]
        close = 1e-4 if name == "IOI" else 1e-6  # float32 logits there
        changes = parallel_case.CASES[name]
        steps = (8 if "constants_lr" in changes else 6) + choice_steps(MaskConfig(**changes))
        assert found["weights"] == expected["weights"] and len(expected["rows"]) == steps, name
        for key in ("rows", "means"):
            torch.testing.assert_close(torch.tensor(found[key]), torch.tensor(expected[key]), atol=close, rtol=close)
    assert one["found"]["means"]["means"] and one["found"]["clamped"]["rows"] != one["found"]["few"]["rows"]


def script_words(folder, name):
    options = {
        "model": folder / "model", "toxic-train": folder / "train.jsonl", "toxic-test": folder / "test.jsonl",
        "ordinary": folder / "plain.txt", "out": folder, "run": name, "checkpoint-every": 0, "max-edges": 5,
        "num-texts": 10, "steps": 120, "refine-rounds": 20, "method": "hard-concrete", "constants-lr": 0,
    }  # fmt: skip
    return ["toxicity/train_mask.py", *(f"--{key}={value}" for key, value in options.items())]


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_signal_to_one_stops_all_and_the_next_launch_continues(tmp_path, rank):
    psutil = pytest.importorskip("psutil")
    save_small_model(tmp_path / "model")
    for name, rows in (("train", RUDE[:100]), ("test", RUDE[100:120])):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": text} for text in rows])
    write_text(tmp_path / "plain.txt", "\n".join(PLAIN))
    assert command(*script_words(tmp_path, "alone"), "--device=cpu").returncode == 0
    job, path = launch(*script_words(tmp_path, "both"), cwd=ROOT), tmp_path / "both" / "metrics.jsonl"
    while job.poll() is None and not (path.is_file() and len(path.read_text().splitlines()) > 20):
        time.sleep(0.01)
    for process in psutil.Process(job.pid).children():
        if process.environ().get("RANK") == rank:
            process.send_signal(signal.SIGUSR1)
    _, errors = job.communicate(timeout=100)
    assert job.returncode != 0 and f"stopped by signal {signal.SIGUSR1.value} after step" in errors, errors
    done = len(path.read_text().splitlines())
    assert 20 < done < 140 and read_tensors(tmp_path / "both" / "checkpoint.safetensors")[1]["step"] == done
    job = launch(*script_words(tmp_path, "both"), cwd=ROOT)
    output, errors = job.communicate(timeout=100)
    assert job.returncode == 0 and errors.count(f"resuming from step {done}") == 1, errors
    assert output.count("written to") == 1 and output.count("held-out loss on toxic text") == 1
    masks = [read_tensors(tmp_path / name / "mask.safetensors")[0]["weights"] for name in ("alone", "both")]
    assert torch.equal(*masks)
    rows = [read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("alone", "both")]
    assert [row["step"] for row in rows[1]] == list(range(140))
    for key in ("keep_loss", "break_loss"):
        assert [row[key] for row in rows[1]] == pytest.approx([row[key] for row in rows[0]], abs=1e-4)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 12])
def test_shares_are_even_and_whole(size, count, monkeypatch):
    for mirrored in (False, True):
        found = []
        for rank in range(size):
            monkeypatch.setattr(parallel, "world", lambda rank=rank: World(rank, size))
            found.append(list(range(count))[share(count, mirrored)])
        assert sorted(row for rows in found for row in rows) == list(range(count))
        assert max(map(len, found)) - min(map(len, found)) <= 1


def test_one_process_needs_nothing_of_the_others():
    assert launched() == (0, 1) and parallel.world() == World() and parallel.is_main()
    tensor = torch.ones(3)
    assert sum_(tensor) is tensor and from_main(tensor) is tensor and largest(4) == 4 and share(5) == slice(0, 5)


def test_a_script_that_writes_from_every_process_is_not_launched():
    done = subprocess.run(
        [sys.executable, ROOT / "ioi" / "known_circuit.py"], capture_output=True, text=True, check=False,
        env={**environment(), "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"},
    )  # fmt: skip
    assert done.returncode == 1 and "this script runs as one process" in done.stderr


def test_several_processes_need_accelerate(monkeypatch):
    monkeypatch.setattr(parallel, "launched", lambda: (0, 2))
    monkeypatch.setitem(sys.modules, "accelerate", None)
    parallel.world.cache_clear()
    try:
        with pytest.raises(UserError, match="needs accelerate: pip install"):
            parallel.world()
    finally:
        parallel.world.cache_clear()
