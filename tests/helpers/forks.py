"""Scripts in a forked process: with signals, limits and an exit code, but without seconds of imports."""

import contextlib
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from circuit_breaking.runs import signals
from helpers.scripts import beside


class Forked:
    """What `subprocess.Popen([sys.executable, script, *words])` is to its caller; the script runs in a forked process.

    Args:
        command: Python, a script, its words.
        env: the environment.
        stdout, stderr: a file for both.
        prepare: called in the new process before the script.
    """

    def __init__(
        self, command: Sequence[object], env: Mapping[str, str], stdout, stderr=None, prepare: Callable | None = None
    ) -> None:
        self.returncode = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.dup2(stdout.fileno(), 1)
                os.dup2(stdout.fileno(), 2)
                code = _run([str(word) for word in command[1:]], env, prepare)
            finally:
                os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.02)
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def _run(argv: list[str], env: Mapping[str, str], prepare: Callable | None) -> int:
    for number in (*signals.SIGNALS, *signals.TERMINAL_SIGNALS):
        signal.signal(number, signal.SIG_DFL)
    signals._received = None
    os.environ.clear()
    os.environ.update(env)
    sys.argv = argv
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
    if prepare is not None:
        prepare()
    try:
        with beside(Path(argv[0])):
            runpy.run_path(argv[0], run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    return code
