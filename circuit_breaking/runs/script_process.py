"""Scripts as processes of their own that start without seconds of imports.

The first script that is started also starts a server, a process that imports what scripts import and does nothing else;
each script then runs in a fork of it (the start method "forkserver" of `multiprocessing`). So scripts share no state
but imported modules.
"""

import multiprocessing
import os
import runpy
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

# to start a process, `multiprocessing` asks all others whether they have ended, which two threads must not do at once
LOCK = threading.Lock()


class ScriptProcess:
    """A script that runs as a process, its output in a file.

    Args:
        script: the file.
        words: its command line.
        log: the file for what it prints.
        threads: CPU threads of torch.
        preloaded: modules that the server imports, by name; those of the first script count. Without any, there is no
            server, and the script imports for itself. A script that may use a GPU needs this, since the driver need not
            survive a fork. On macOS it is always so, for the same reason.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(
        self, script: Path, words: Sequence[str], log: Path, threads: int, preloaded: Sequence[str] = ()
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("", encoding="utf-8")  # an error that the caller can report
        about = str(script), list(words), str(log), threads
        with LOCK, _variable("OMP_NUM_THREADS", str(threads)):  # which libraries read when they are loaded
            self.process = _forked(preloaded, about) or _started("spawn", about)

    def poll(self) -> int | None:
        """The exit code, None while the script runs. That of a script which a signal ended is minus its number."""
        with LOCK:
            return self.process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.process.pid, number)


def _forked(preloaded: Sequence[str], about: tuple) -> multiprocessing.Process | None:
    """The process as a fork of the server, which is started if there is none; None if there cannot be one."""
    if not preloaded or sys.platform != "linux":
        return None
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(preloaded))
    with suppress(OSError):  # where the name of the temporary folder is too long for that of a socket
        return _started("forkserver", about)
    return None


def _started(method: str, about: tuple) -> multiprocessing.Process:
    process = multiprocessing.get_context(method).Process(target=_run, args=about)
    process.start()
    return process


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """An environment variable for processes that are started in this block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _run(script: str, words: list[str], log: str, threads: int) -> None:
    """What the process does. `SystemExit` and errors end it as they end a script."""
    with Path(log).open("w", encoding="utf-8") as file:
        for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            os.dup2(file.fileno(), number)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # the server may have been started for another number
    import torch

    torch.set_num_threads(threads)
    sys.argv = [script, *words]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
