"""benchmarks/gpu.sh: every part has options that its script takes, and the results are gathered in one file."""

import json
import os
import subprocess
import sys

import pytest
import tyro
from helpers.scripts import load_script

from circuit_breaking.runs.files import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def run(out, python, **environment):
    names = {"OUT": str(out), "PYTHON": str(python), "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        ["bash", SCRIPT], env={**os.environ, **names}, capture_output=True, text=True, timeout=900, check=False
    )


@pytest.mark.parametrize("small", ["", "1"])
def test_every_part_is_called_with_options_that_it_takes(tmp_path, small):
    calls, fake = tmp_path / "calls.jsonl", tmp_path / "python"
    fake.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"if sys.argv[1] == '-': os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])\n"
        f"print(json.dumps(sys.argv[1:]), file=open({str(calls)!r}, 'a'))\n"
    )
    fake.chmod(0o755)
    assert run(tmp_path / "out", fake, SMALL=small, SEEDS="0").returncode == 0
    found = [json.loads(line) for line in calls.read_text().splitlines()]
    for script, *options in found:
        if script != "-m":
            module = load_script(script)
            tyro.cli(module.Settings, args=options)
    names = [options[options.index("--run") + 1] for _, *options in found if "--run" in options]
    assert names == [f"{method}_{kind}_seed0" for method in ("ranking", "ugs") for kind in ("mean", "learned")]
    parts = json.loads((tmp_path / "out" / "gpu.json").read_text())["parts"]
    assert len(parts) == len(found) and all(part["end"] == "done" for part in parts.values())


@pytest.mark.slow
def test_its_parts_run_on_a_cpu_in_small(tmp_path):
    assert run(tmp_path, sys.executable, SMALL="1", SECONDS_IN_ALL="900").returncode == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert all(part["end"] == "done" for part in found["parts"].values()) and found["memory"]["rows"]
    assert len(found["parts"]["ugs_learned_seed0"]["curve"]["rows"]) == 3
