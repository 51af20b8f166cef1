"""What Windows lacks: modules and signals of POSIX. Their absence is simulated; nothing here has run on Windows."""

import ast
import importlib.util
import os
import signal
import sys
from types import SimpleNamespace

import pytest

from circuit_breaking.errors import UserError
from circuit_breaking.runs.files import ROOT

POSIX_ONLY = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix"}


def fresh(name):
    """A module of `runs`, executed once more."""
    spec = importlib.util.spec_from_file_location(f"fresh_{name}", ROOT / "circuit_breaking" / "runs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def windows(monkeypatch):
    """Python without `fcntl` and SIGUSR1, and with a `msvcrt` that locks as that of Windows does, by name of file."""
    taken = set()

    def locking(descriptor, mode, count):
        key = os.fstat(descriptor).st_ino
        if key in taken:
            raise PermissionError(13, "Permission denied")
        taken.add(key)

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    for name in ("SIGUSR1", "SIGHUP"):
        monkeypatch.delattr(signal, name)
    return taken


def test_a_folder_is_locked_without_fcntl(windows, tmp_path):
    locks = fresh("locks")
    with (
        locks.locked(tmp_path / "run"),
        pytest.raises(UserError, match="another run is writing"),
        locks.locked(tmp_path / "run"),
    ):
        pass
    windows.clear()  # as the system does when the file is closed
    with locks.locked(tmp_path / "run"):
        pass


def test_a_system_without_locks_is_refused(windows, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "msvcrt", None)
    with pytest.raises(UserError, match=r"cannot lock .*no file locks on this system"), fresh("locks").locked(tmp_path):
        pass


def test_signals_that_windows_lacks_are_left_out(windows):
    signals = fresh("signals")
    assert signals.SIGNALS == (signal.SIGTERM,) and signals.TERMINAL_SIGNALS == (signal.SIGINT,)
    with signals.stop_signals() as received:
        assert received == []


def test_nothing_else_imports_what_windows_lacks():
    files = [
        path for folder in ("circuit_breaking", "toxicity", "ioi", "mnist") for path in (ROOT / folder).rglob("*.py")
    ]
    found = set()
    for path in [*files, ROOT / "sweep.py", ROOT / "mask_learning.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            found |= {(path.name, name) for name in names if name in POSIX_ONLY}
    assert found == {("locks.py", "fcntl")}
