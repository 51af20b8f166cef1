"""How scripts start: settings are read, and `--help` shown, before any large library is loaded."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import pytest
from helpers.scripts import called, command, load_script

from circuit_breaking.errors import UserError
from circuit_breaking.runs.cli import help_of, read_settings, run_script, wrapped
from circuit_breaking.runs.files import ROOT

LARGE = ("torch", "transformers", "matplotlib", "numpy", "sklearn", "datasets")
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in (".", "toxicity", "ioi", "mnist", "benchmarks", "data")
    for path in (ROOT / folder).glob("*.py")
    if "run_script(" in path.read_text(encoding="utf-8")
)

# runs scripts as the interpreter does, each in a forked process that finds tyro loaded; says how they ended, what they
# printed, which large libraries they loaded and how much of the CPU that took
STARTER = f"""
import json, os, resource, runpy, sys, tempfile, tyro, typeguard
for line in sys.stdin:
    words, files = json.loads(line), [tempfile.TemporaryFile("w+") for _ in range(3)]
    if os.fork() == 0:
        for number in (1, 2):
            os.dup2(files[number].fileno(), number)
        sys.argv, sys.path[0], code = words, words[0].rpartition("/")[0], 0
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        sys.stdout.flush()
        used = resource.getrusage(resource.RUSAGE_SELF)
        loaded = [name for name in {LARGE} if name in sys.modules]
        json.dump([code, loaded, used.ru_utime + used.ru_stime], files[0])
        files[0].flush()
        os._exit(0)
    os.wait()
    for file in files:
        file.seek(0)
    print(json.dumps([json.load(files[0]), files[1].read(), files[2].read()]), flush=True)
"""


@pytest.fixture(scope="module")
def start():
    """A function that starts a script; gives (exit code, large libraries loaded, seconds), its output and errors."""
    process = subprocess.Popen(
        [sys.executable, "-c", STARTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def starting(script, *words):
        print(json.dumps([str(ROOT / script), *map(str, words)]), file=process.stdin, flush=True)
        return json.loads(process.stdout.readline())

    with process:
        yield starting
        process.stdin.close()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_loads_no_large_library(start, script):
    (code, loaded, seconds), output, errors = start(script, "--help")
    assert code == 0 and not loaded and seconds < 2.5 and errors == ""
    module = load_script(script)
    assert output.startswith(module.__doc__.strip()[:60])
    assert "most used options" in output
    helps = {one.name: help_of(module.Settings, one.name) or "" for one in fields(module.Settings)}
    assert not [name for name, text in helps.items() if len(text) < 5]


def test_help_fits_a_narrow_terminal(monkeypatch):
    done = subprocess.run(
        [sys.executable, ROOT / "toxicity/evaluation.py", "--help"], capture_output=True, text=True, check=True,
        env={"COLUMNS": "80", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_help_ends_quietly_if_its_reader_leaves():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, ROOT / "toxicity/train_mask.py", "--help"], stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("script", "words", "sentence"),
    [
        (
            "toxicity/train_mask.py",
            ["--toxic-train", "/nowhere.jsonl"],
            "there is no file /nowhere.jsonl.",
        ),
        ("toxicity/evaluation.py", ["--samples", 0], "samples is 0; give 1 or more."),
        ("toxicity/compare.py", ["--examined-budget", 3], "examined_budget is 3, which is none of the budgets."),
        ("toxicity/finetune_gpt2.py", ["--methods", "x"], "there is no method 'x'; choose from joint, ascent"),
        ("toxicity/sweep_masks.py", ["--budgets", 0], "budgets are [0]; give one or more, each 1 or more."),
        ("ioi/train_mask.py", ["--train", "/nowhere.jsonl"], "there is no file /nowhere.jsonl. Make prompts with"),
        ("ioi/make_ioi_datasets.py", ["--train", 3], "3 and 2000 prompts do not come in pairs."),
        ("mnist/main.py", ["--steps", 0], "--steps is 0; it must be positive."),
        ("mask_learning.py", ["--model", "tiny", "--lr", 0], "lr is 0.0; it must be above 0."),
        ("sweep.py", ["toxicity/report.py"], "--grid is empty."),
        ("toxicity/generate.py", ["--prompt", "a", "--perplexity", "b"], "prompt and perplexity were both given."),
        ("toxicity/relearn.py", ["--device", "gpu"], "device 'gpu' is none of auto, cpu, cuda, cuda:<number> and mps."),
    ],
)
def test_wrong_settings_end_a_script_at_once(start, script, words, sentence):
    (code, loaded, _), _, errors = start(script, *words)
    (error,) = errors.splitlines()
    assert error.startswith(f"error: {sentence}")
    assert code == 1 and not loaded


@dataclass
class Block:
    TITLE: ClassVar[str] = "block"

    size: int = 1  # size of it
    where: Path | None = None  # a path


@dataclass
class Settings(Block):
    MOST_USED: ClassVar = ("name",)

    name: str = "x"  # name of it
    own: tuple[int, ...] = (1, 2)  # numbers
    size: int = 3
    # fmt: off
    long: str = (
        "a default that ruff writes on several lines"  # help of a setting
    )  # on several lines
    # fmt: on

    def check(self) -> None:
        if self.size < 1:
            raise UserError("size is too small.")


def test_settings_are_flat_and_grouped(capsys):
    assert read_settings(Settings, args=[]) == Settings()
    words = ["--size", "5", "--where", "/a", "--own", "7", "--name", "y"]
    assert read_settings(Settings, args=words) == Settings(5, Path("/a"), "y", (7,))
    with pytest.raises(SystemExit) as stop:
        read_settings(Settings, args=["--help"])
    shown = capsys.readouterr().out.partition("most used options")[2]  # after the usage
    assert stop.value.code == 0
    places = [shown.index(text) for text in ("--name", "other options", "--own", "block options")]
    assert places == sorted(places) and shown.index("--size") > places[-1]
    assert "size of it (default: 3)" in shown
    assert (
        help_of(Settings, "long") == "help of a setting on several lines" and help_of(Settings, "size") == "size of it"
    )


def test_settings_that_are_wrong_end_the_script(capsys):
    with pytest.raises(SystemExit) as stop:
        read_settings(Settings, args=["--size", "0"])
    assert stop.value.code == 1 and capsys.readouterr().err == "error: size is too small.\n"


def test_errors_of_ours_keep_their_traceback():
    def main(settings):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_script(main, Settings())


def test_docstrings_are_wrapped_by_their_parts():
    text = "One two three.\n\nReads   a b c d e f\n        g h.\nTime    long.\n\n    x   one\n    y   two"
    assert wrapped(text, 80) == text
    assert wrapped(text, 16).splitlines() == [
        "One two three.", "", "Reads   a b c d", "        e f g h.", "Time    long.", "", "    x   one", "    y   two",
    ]  # fmt: skip


def test_scripts_run_from_any_folder():
    assert command("toxicity/report.py", "--num-examples", 0).stderr.startswith("error: num_examples is 0")


def test_sweeps_need_submitit_when_they_start_jobs_of_slurm_only(start, tmp_path, monkeypatch):
    (code, _, _), output, _ = start("sweep.py", "--help")
    assert code == 0 and "--at-once" in output
    monkeypatch.setitem(sys.modules, "submitit", None)
    words = ["toxicity/report.py", "--grid", "num-examples=1", "--out", tmp_path, "--cluster", "slurm"]
    done = called("sweep.py", *words)
    assert done.returncode == 1
    sentence = "sweeps under SLURM are run by submitit, which is not installed: pip install -e '.[cluster]'"
    assert done.stderr.splitlines()[-1] == f"error: {sentence}"
