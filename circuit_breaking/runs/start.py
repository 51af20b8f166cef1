"""What a script does first, before it loads torch: signals, threads of the CPU, the terminal, the modules beside it."""

import os
import sys
from pathlib import Path
from typing import TextIO

from circuit_breaking.runs.cpus import set_threads
from circuit_breaking.runs.signals import end_on_signals

LAUNCHER = ("LOCAL_RANK", "RANK", "WORLD_SIZE")


def start(file: Path | str) -> None:
    """Prepare the process of the script `file`. Call it before torch is loaded.

    - SIGTERM and SIGUSR1 end the script with a sentence and a documented exit code (`signals.end_on_signals`).
    - torch will use the CPUs that this process may use, and its threads will wait without using a CPU (`cpus`).
    - What a terminal's encoding lacks is printed as an escape, such as `\\u2013`, in place of an error.
    - Modules beside the script are found, also with `python -m` and with PYTHONSAFEPATH.
    - An empty variable of a launcher, such as LOCAL_RANK, counts as one that is not set.
    """
    end_on_signals()
    set_threads()
    for name in LAUNCHER:
        if os.environ.get(name) == "":
            del os.environ[name]
    for stream in (sys.stdout, sys.stderr):
        escape_unprintable(stream)
    folder = str(Path(file).resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)


def escape_unprintable(stream: TextIO | None) -> None:
    """Let a stream print escapes for characters that its encoding lacks; a choice in PYTHONIOENCODING stays."""
    # `surrogateescape` is Python's own choice where the locale is C
    if stream is not None and hasattr(stream, "reconfigure") and stream.errors in ("strict", "surrogateescape"):
        stream.reconfigure(errors="backslashreplace")
