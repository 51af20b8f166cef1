"""Every command in the documentation: its script is there and takes its settings."""

import re
from dataclasses import fields, is_dataclass
from functools import cache
from typing import get_type_hints

import pytest
import tyro
from helpers.markdown import PAGES, commands, name_of, prose
from helpers.scripts import load_script

from circuit_breaking.runs.files import ROOT

SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in (".", "toxicity", "ioi", "mnist", "benchmarks", "data", "tests")
    for path in (ROOT / folder).glob("*.py")
    if "run_script(" in path.read_text(encoding="utf-8")
)
PROGRAMS = {"pip", "conda", "source", "srun", "python3.11"}  # of others: not checked
# options of other programs
OPTIONS = {"index-url", "multi_gpu", "num_processes", "gres", "pty", "time", "partition", "account", "help", "export"}


@cache
def settings_of(script: str) -> type:
    return load_script(script).Settings


def parse(script: str, words: list[str]) -> object:
    """The settings that a script reads from its command line."""
    try:
        return tyro.cli(settings_of(script), args=words)
    except SystemExit as stop:
        raise AssertionError(f"{script} does not take {' '.join(words)}") from stop


def check(words: list[str], targets: set[str]) -> None:
    """Fail for a command that does not exist."""
    program = words[0]
    if program == "make":
        assert set(words[1:]) <= targets
    elif program in PROGRAMS or words[:2] in (["python", "-c"], ["python", "-m"]):
        return
    else:
        assert program in {"python", "sbatch", "accelerate"}, f"{program} is not known"
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        for word in words[:at]:
            assert not word.endswith(".sbatch") or (ROOT / word).is_file()
        settings = parse(words[at], words[at + 1 :])
        if words[at] == "sweep.py":
            names = {field.name for field in fields(settings_of(str(settings.script)))}
            assert {setting.partition("=")[0] for setting in settings.grid} <= names


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_exists(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, flags=re.MULTILINE))
    for words in commands(page):
        check(words, targets)


def flags(settings: type, prefix: str = "") -> set[str]:
    """Names of all settings of a class as the command line writes them, without dashes before them."""
    found, types = set(), get_type_hints(settings)
    for field in fields(settings):
        name = prefix + field.name
        if is_dataclass(types[field.name]):
            found |= flags(types[field.name], f"{name}.") | flags(types[field.name])
        found |= {name, f"no_{name}"}
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_setting_that_is_named_exists(page):
    known = OPTIONS.union(*(flags(settings_of(script)) for script in SCRIPTS))
    inline = re.findall(r"`([^`\n]+)`", prose(page))
    named = {name.replace("-", "_") for code in inline for name in re.findall(r"(?<!\S)--([\w.-]+)", code)}
    assert named <= {name.replace("-", "_") for name in known}, f"{name_of(page)}: {sorted(named - known)}"


def test_scripts_were_found():
    assert len(SCRIPTS) >= 25
