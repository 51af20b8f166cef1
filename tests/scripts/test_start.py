"""How scripts start: settings are read, and `--help` shown, before any large library is loaded."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import pytest
from helpers.scripts import command, load_script

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

# runs a script as the interpreter does, and says what it loaded and how much of the CPU that took
HELP = f"""
import json, resource, runpy, sys
script = sys.argv[1]
sys.argv, sys.path[0] = [script, "--help"], script.rpartition("/")[0]
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as stop:
    used = resource.getrusage(resource.RUSAGE_SELF)
    loaded = [name for name in {LARGE} if name in sys.modules]
    print(json.dumps([stop.code, loaded, used.ru_utime + used.ru_stime]), file=sys.stderr)
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_loads_no_large_library(script):
    done = subprocess.run([sys.executable, "-c", HELP, ROOT / script], capture_output=True, text=True, check=True)
    code, loaded, seconds = json.loads(done.stderr)
    assert code == 0 and not loaded and seconds < 2.5
    module = load_script(script)
    assert done.stdout.startswith(module.__doc__.strip()[:60])
    assert "most used options" in done.stdout
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
    ],
)
def test_wrong_settings_end_a_script_at_once(script, words, sentence):
    code = HELP.replace('"--help"', "*sys.argv[2:]")
    done = subprocess.run(
        [sys.executable, "-c", code, ROOT / script, *map(str, words)], capture_output=True, text=True, check=False
    )
    error, about = done.stderr.splitlines()
    assert error.startswith(f"error: {sentence}")
    assert json.loads(about)[:2] == [1, []]


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


def test_sweeps_need_submitit_when_they_start_jobs_only(tmp_path):
    (tmp_path / "submitit.py").write_text("raise ModuleNotFoundError(name='submitit')")  # found first: it is hidden
    words = ["toxicity/report.py", "--grid", "num-examples=1", "--out", tmp_path]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    shown, done = (
        subprocess.run(
            [sys.executable, ROOT / "sweep.py", *more], capture_output=True, text=True, env=environment, check=False
        )
        for more in (["--help"], words)
    )
    assert shown.returncode == 0 and "--at-once" in shown.stdout
    assert done.returncode == 1
    assert done.stderr == "error: sweeps are run by submitit, which is not installed: pip install -e '.[cluster]'\n"
