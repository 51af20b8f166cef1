"""Which code runs: any edit of the package or the script is noticed, with and without git, and named on resuming."""

import shutil
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from helpers.scripts import load_script

from circuit_breaking.runs import code, provenance
from circuit_breaking.runs.checkpoints import Checkpoints
from circuit_breaking.runs.code import code_hash, difference, hashes_of, source_hashes
from circuit_breaking.runs.files import ROOT
from circuit_breaking.runs.provenance import git_commit
from circuit_breaking.runs.run_folder import resume_key


@dataclass
class Settings:
    alpha: float = 0.2  # a setting
    out: str = ""  # where results go


@pytest.fixture
def edit(tmp_path, monkeypatch):
    """A function that adds to a file of a copy of the package, and lets this process read it again."""
    package = tmp_path / "circuit_breaking"
    shutil.copytree(ROOT / "circuit_breaking" / "tasks", package / "tasks")
    monkeypatch.setattr(code, "PACKAGE", package)
    monkeypatch.setattr(code, "ROOT", tmp_path)

    def editing(name, text):
        path = tmp_path / name
        path.write_text(path.read_text() + text if path.is_file() else text)
        for cached in (code._sha256, code._package_files, code._with_imported):
            cached.cache_clear()

    (package / "figures").mkdir()
    editing("circuit_breaking/graph.py", "EDGES = 1\n")
    yield editing
    for cached in (code._sha256, code._package_files, code._with_imported):
        cached.cache_clear()


def test_every_edit_is_another_code(edit, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "stub", type(sys)("stub"))
    monkeypatch.setattr(Settings, "__module__", "stub")
    (tmp_path / "toxicity").mkdir()
    sys.modules["stub"].__file__ = str(tmp_path / "toxicity" / "stub.py")
    edit("toxicity/stub.py", "import os, circuit_breaking.graph\ndef main():\n    from utils import b\n")
    edit("toxicity/utils.py", "import more.names\nb = 1\n")
    edit("toxicity/more.py", "import utils\n")
    edit("toxicity/another_script.py", "c = 1\n")
    seen, before = [code_hash(Settings())], source_hashes(Settings())
    assert {"circuit_breaking/graph.py", "toxicity/stub.py", "toxicity/utils.py", "toxicity/more.py"} < set(before)
    for name, text in (
        ("circuit_breaking/graph.py", "EDGES = 2\n"),  # two edits that were not committed
        ("circuit_breaking/graph.py", "EDGES = 3\n"),
        ("circuit_breaking/tasks/new.py", ""),
        ("toxicity/stub.py", "# edited\n"),
        ("toxicity/utils.py", "b = 2\n"),
    ):
        edit(name, text)
        assert difference(hashes_of(seen[-1]), source_hashes(Settings())) == f"{name} differs"
        seen.append(code_hash(Settings()))
    assert len(set(seen)) == 6
    edit("toxicity/another_script.py", "c = 2\n")  # which this one does not import
    edit("toxicity/notes.txt", "")
    edit("circuit_breaking/figures/style.py", "GREY = 1\n")  # pictures are drawn from results
    assert code_hash(Settings()) == seen[-1]
    words = difference(before, source_hashes(Settings()))
    assert words == "circuit_breaking/graph.py, circuit_breaking/tasks/new.py, toxicity/stub.py and 1 more differ"


def test_a_resume_with_other_code_says_what_differs(edit, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(provenance, "git_commit", lambda: None)  # as without git, or in a repository of another user

    def checkpoints(**changes):
        return Checkpoints(tmp_path / "run", resume_key(provenance.provenance(Settings(**changes))))

    checkpoints().save(3, {"weights": torch.ones(2)}, {})
    monkeypatch.setattr(provenance, "git_commit", lambda: "0123+")  # the commit alone makes no difference
    assert checkpoints(out="elsewhere").load().step == 3
    assert capsys.readouterr().err == ""
    edit("circuit_breaking/graph.py", "# another one\n")
    assert checkpoints().load() is None
    said = capsys.readouterr().err
    assert "is of a run with other code (circuit_breaking/graph.py differs): starting from the beginning." in said
    assert "To resume it instead, press Ctrl-C now and start the same command with the earlier code." in said
    assert checkpoints(alpha=0.3).load() is None
    assert "other settings or data" in capsys.readouterr().err


def test_checkpoints_of_the_release_before_name_no_files(tmp_path, capsys):
    old = {"settings": {"alpha": 0.2}, "git_commit": "0123+"}
    Checkpoints(tmp_path, old).save(3, {"weights": torch.ones(2)}, {})
    now = resume_key({"settings": {"alpha": 0.2}, "git_commit": "0123+", "code": "00"})
    assert Checkpoints(tmp_path, now).load() is None
    assert "other code (its source files are not recorded)" in capsys.readouterr().err


def test_scripts_are_known_by_their_settings():
    module = load_script("ioi/known_circuit.py")
    names = set(source_hashes(module.Settings()))
    assert {"ioi/known_circuit.py", "circuit_breaking/engine/reads.py", "circuit_breaking/runs/code.py"} < names
    assert "ioi/train_mask.py" not in names
    assert set(provenance.provenance(module.Settings())) >= {"code", "git_commit"}


def test_hashing_takes_milliseconds_and_loads_nothing():
    words = (
        "import sys, time; from circuit_breaking.runs.code import code_hash; start = time.process_time(); code_hash()"
    )
    words += "; print(time.process_time() - start); assert not {'torch', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True, cwd=ROOT)
    assert float(done.stdout) < 0.2  # 0.01 on a core that nothing else uses


def test_without_git_there_is_no_commit(monkeypatch):
    git_commit.cache_clear()
    monkeypatch.setenv("PATH", "/nowhere")
    assert git_commit() is None
